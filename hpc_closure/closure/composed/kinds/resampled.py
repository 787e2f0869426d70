"""A residual drawn from the residuals of the training."""

from hpc_closure.experiment.kinds import ResidualKind


class Resampled(ResidualKind):
    """Draw a residual of the training at random, moved by a random distance."""

    name = "resampled"
    flow_dimensions = (1, 2, 3)
    several_fields = True
    trained = False
    reads_sensors = False

    @classmethod
    def build(cls, channels, config, band):
        from hpc_closure.closure.composed.generators import Resampled as Drawn

        return Drawn()
