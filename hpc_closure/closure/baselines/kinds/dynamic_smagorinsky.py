"""The eddy viscosity of Smagorinsky, with the constant that the flow itself shows."""

from hpc_closure.closure.baselines.base import Baseline


class DynamicSmagorinsky(Baseline):
    """By the identity of Germano et al. (Phys. Fluids A 1991) as Lilly (1992) solves it.

    A sharp test filter at half of the modes, means over the square, never below zero. Nothing is
    tuned.
    """

    name = "dynamic_smagorinsky"
    note = "c of the flow"

    @classmethod
    def tendency(cls, w_hat, band, delta, *constants):
        from hpc_closure.closure.baselines.eddy_viscosity import germano, strain_rate

        return germano(w_hat, band, delta, strain_rate)
