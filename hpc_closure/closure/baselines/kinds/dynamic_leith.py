"""The eddy viscosity of Leith with a dynamic constant."""

from hpc_closure.closure.baselines.base import Baseline


class DynamicLeith(Baseline):
    """U = div(nu grad w) with Leith's nu and a constant from the flow.

    The constant follows from the identity of Germano et al. (Phys. Fluids A 1991) as solved by
    Lilly (1992), with a sharp test filter at half of the modes and means over the square. Negative
    values are set to zero. Nothing is tuned.
    """

    name = "dynamic_leith"
    note = "c of the flow"

    @classmethod
    def tendency(cls, w_hat, band, delta, *constants):
        from hpc_closure.closure.baselines.eddy_viscosity import germano, slope

        return germano(w_hat, band, delta, slope)
