"""The eddy viscosity of Smagorinsky (1963)."""

from pydantic import Field

from hpc_closure.closure.baselines.base import Baseline
from hpc_closure.spectral.recipe import NonNegative, Section

CHOICES = tuple(round(0.06 * 1.3**step, 3) for step in range(12))  # 0.06 to 1.08


class Constant(Section):
    """Constant of an eddy viscosity."""

    coefficient: NonNegative | None = Field(
        None, description="eddy viscosities: c; none = tuned in coupled runs"
    )


class Smagorinsky(Baseline):
    r"""U = div(nu grad w), :math:`\nu = (c\Delta)^2 |S|`, |S| the rate of strain.

    In three dimensions U is the divergence of 2 nu S, without the part that pressure takes.
    """

    name = "smagorinsky"
    several_fields = True
    layered = True
    flow_dimensions = (2, 3)
    constants = {"coefficient": CHOICES}
    Options = Constant

    @classmethod
    def tendency(cls, w_hat, band, delta, *constants):
        from hpc_closure.closure.baselines.eddy_viscosity import strain_rate, viscous

        return constants[0] ** 2 * viscous(w_hat, band, delta, strain_rate)
