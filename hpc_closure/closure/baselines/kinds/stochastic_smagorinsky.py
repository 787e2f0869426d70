"""The eddy viscosity of Smagorinsky with a random force, correlated in time."""

from pydantic import Field

from hpc_closure.closure.baselines.base import Baseline
from hpc_closure.closure.baselines.kinds.smagorinsky import CHOICES, Constant, Smagorinsky
from hpc_closure.spectral.recipe import NonNegative

NOISES = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6)
MEMORIES = (0.0, 2.0, 8.0)


class StochasticSmagorinsky(Baseline):
    r"""Smagorinsky's U plus the curl of :math:`a\Delta^2|S|^2 g` (Leith, Phys. Fluids A 1990).

    The random vector g is Gaussian, white in space, and correlated over ``noise_calls`` closure
    calls: it turns from one independent field to the next. c is chosen first, without noise; a and
    the memory then by the CRPS of several members per trajectory.
    """

    name = "stochastic_smagorinsky"
    several_fields = True
    flow_dimensions = (3,)
    draws = True
    constants = {"coefficient": CHOICES, "noise_coefficient": NOISES, "noise_calls": MEMORIES}
    later = ("noise_coefficient", "noise_calls")

    class Options(Constant):
        """Keys of this baseline."""

        noise_coefficient: NonNegative | None = Field(
            None, description="stochastic_smagorinsky: a; none = tuned in coupled runs"
        )
        noise_calls: NonNegative | None = Field(
            None,
            description="stochastic_smagorinsky: closure calls that noise lasts; none = tuned",
        )

    @classmethod
    def tendency(cls, w_hat, band, delta, *constants):
        return Smagorinsky.tendency(w_hat, band, delta, constants[0])

    @classmethod
    def noise(cls, w_hat, white, band, delta, *constants):
        from hpc_closure.closure.baselines.eddy_viscosity import random_rotation

        return constants[1] * random_rotation(w_hat, white, band, delta)

    @classmethod
    def memory(cls, *constants):
        return constants[2]
