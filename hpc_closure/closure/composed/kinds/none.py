"""No residual: a deterministic closure."""

from hpc_closure.experiment.kinds import ResidualKind


class Nothing(ResidualKind):
    """Draw nothing, so that every member has the mean."""

    name = "none"
    flow_dimensions = (1, 2, 3)
    several_fields = True
    trained = False
    reads_sensors = False

    @classmethod
    def build(cls, channels, config, band):
        from hpc_closure.closure.composed.generators import Gaussian

        return Gaussian()

    @classmethod
    def check(cls, config):
        if config["conditions"]["sensors"] != "none":
            raise ValueError(
                "model.residual=none has one answer, with nothing in it for sensors to tell: set "
                "model.conditions.sensors to none"
            )
