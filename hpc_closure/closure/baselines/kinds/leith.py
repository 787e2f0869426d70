"""The eddy viscosity of Leith (Physica D 1996)."""

from hpc_closure.closure.baselines.base import Baseline
from hpc_closure.closure.baselines.kinds.smagorinsky import CHOICES, Constant


class Leith(Baseline):
    r"""U = div(nu grad w), :math:`\nu = (c\Delta)^3 |\nabla w|`."""

    name = "leith"
    several_fields = True
    layered = True
    constants = {"coefficient": CHOICES}
    Options = Constant

    @classmethod
    def tendency(cls, w_hat, band, delta, *constants):
        from hpc_closure.closure.baselines.eddy_viscosity import slope, viscous

        return constants[0] ** 3 * viscous(w_hat, band, delta, slope)
