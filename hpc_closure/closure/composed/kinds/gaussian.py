"""A residual drawn from the stationary Gaussian law."""

from hpc_closure.experiment.kinds import ResidualKind


class Stationary(ResidualKind):
    """Draw from the base law itself, the baseline of the generators."""

    name = "gaussian"
    flow_dimensions = (1, 2, 3)
    several_fields = True
    trained = False

    @classmethod
    def build(cls, channels, config, band):
        from hpc_closure.closure.composed.generators import Gaussian

        return Gaussian()
