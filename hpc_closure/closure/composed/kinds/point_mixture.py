"""A residual drawn from a law of two components at every point."""

from hpc_closure.experiment.kinds import ResidualKind, fields_of


class PointMixture(ResidualKind):
    """Draw from a mixture of two normal laws at every point, joined by a Gaussian copula."""

    name = "point_mixture"
    flow_dimensions = (1, 2, 3)
    reads = ("width", "mean_layers")
    reads_sensors = False
    several_fields = True

    @classmethod
    def build(cls, channels, config, band):
        from hpc_closure.closure.composed.point_mixture import PointMixture as Points
        from hpc_closure.closure.gaussian.conditioning import Kriged

        # neither the channels of sensors nor log D
        return Points(channels - Kriged.channels - fields_of(config), config)
