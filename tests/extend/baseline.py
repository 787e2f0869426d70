"""A baseline from outside the package: linear drag, whose rate coupled runs choose."""

from pydantic import Field

from hpc_closure.closure.baselines.base import Baseline
from hpc_closure.spectral.recipe import NonNegative, Section


class Drag(Baseline):
    """U = -rate w. Name it with ``model.preset: extend.baseline:Drag``."""

    constants = {"rate": (0.0, 0.05, 0.2)}

    class Options(Section):
        """Keys of ``model.options``."""

        rate: NonNegative | None = Field(None, description="1/time; none = tuned in coupled runs")

    @classmethod
    def tendency(cls, w_hat, band, delta, rate):
        return -rate * w_hat
