"""A residual drawn from Gaussian laws that depend on the state."""

from typing import Annotated

from pydantic import Field

from hpc_closure.experiment.kinds import ResidualKind
from hpc_closure.spectral.recipe import Section


class Mixture(ResidualKind):
    """Draw from one or two Gaussian laws that depend on the state, fitted by likelihood."""

    name = "mixture"
    flow_dimensions = (1, 2, 3)
    reads_sensors = False

    class Options(Section):
        """Keys of this residual."""

        components: Annotated[int, Field(ge=1, le=2)] | None = Field(
            None, description="of a mixture; 1: a Gaussian law that follows the state"
        )

    @classmethod
    def build(cls, channels, config, band):
        from hpc_closure.closure.composed.mixture import Mixture as Laws

        return Laws(config, band)

    @classmethod
    def check(cls, config):
        if "components" not in config:
            raise ValueError(
                "model.residual=mixture is of the presets gaussian_state and mixture: set "
                "model.preset"
            )
