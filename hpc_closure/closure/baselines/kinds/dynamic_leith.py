"""The eddy viscosity of Leith, with the constant that the flow itself shows."""

from hpc_closure.closure.baselines.base import Baseline


class DynamicLeith(Baseline):
    """By the identity of Germano et al. (Phys. Fluids A 1991) as Lilly (1992) solves it.

    A sharp test filter at half of the modes, means over the square, never below zero. Nothing is
    tuned.
    """

    name = "dynamic_leith"
    note = "c of the flow"

    @classmethod
    def tendency(cls, w_hat, band, delta, *constants):
        from hpc_closure.closure.baselines.eddy_viscosity import germano, slope

        return germano(w_hat, band, delta, slope)
