"""The eddy viscosity of Smagorinsky with a dynamic constant."""

from hpc_closure.closure.baselines.base import Baseline


class DynamicSmagorinsky(Baseline):
    """U = div(nu grad w) with Smagorinsky's nu and a constant from the flow.

    The constant follows from the identity of Germano et al. (Phys. Fluids A 1991) as solved by
    Lilly (1992), with a sharp test filter at half of the modes and means over the square or cube.
    Negative values are set to zero. Nothing is tuned.
    """

    name = "dynamic_smagorinsky"
    several_fields = True
    flow_dimensions = (2, 3)
    note = "c of the flow"

    @classmethod
    def tendency(cls, w_hat, band, delta, *constants):
        from hpc_closure.closure.baselines.eddy_viscosity import germano, strain_rate

        return germano(w_hat, band, delta, strain_rate)
