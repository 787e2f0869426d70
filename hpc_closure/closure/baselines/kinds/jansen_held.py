"""A biharmonic viscosity that returns energy (Jansen and Held, Ocean Modelling 2014)."""

from typing import Annotated

from pydantic import Field

from hpc_closure.closure.baselines.base import Baseline
from hpc_closure.closure.baselines.kinds.smagorinsky import CHOICES, Constant


class JansenHeld(Baseline):
    r"""U = :math:`-\nabla^2(\nu_4\nabla^2 w)`, :math:`\nu_4 = (c\Delta)^4 |S|`, and backscatter.

    A negative viscosity, uniform in space, returns a share of the drained energy to the large
    scales.
    """

    name = "jansen_held"
    several_fields = True
    layered = True
    constants = {"coefficient": CHOICES, "backscatter_fraction": (0.0, 0.5, 0.8, 0.9, 1.0)}

    class Options(Constant):
        """Keys of this baseline."""

        backscatter_fraction: Annotated[float, Field(ge=0, le=1)] | None = Field(
            None, description="jansen_held: share of the energy that is given back; none = tuned"
        )

    @classmethod
    def tendency(cls, w_hat, band, delta, *constants):
        from hpc_closure.closure.baselines.eddy_viscosity import backscatter

        return backscatter(w_hat, band, delta, *constants)
