"""A residual drawn from a Gaussian law with a covariance per wavevector."""

from hpc_closure.experiment.kinds import ResidualKind


class ByMode(ResidualKind):
    """Draw from a Gaussian law with a covariance per wavevector, fitted in closed form."""

    name = "modes"
    flow_dimensions = (1, 2, 3)
    trained = False
    reads_sensors = False

    @classmethod
    def build(cls, channels, config, band):
        from hpc_closure.closure.composed.generators import Modes

        return Modes()
