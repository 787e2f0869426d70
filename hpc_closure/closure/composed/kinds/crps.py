"""A residual drawn in one pass."""

from hpc_closure.experiment.kinds import ResidualKind


class CRPS(ResidualKind):
    """Add one network output to base noise; trained by an almost-fair score."""

    name = "crps"
    flow_dimensions = (1, 2, 3)
    several_fields = True
    reads = ("generator", "width", "modes", "layers", "spectral_convolution", "base_noise")
    learns_sensors = True
    one_evaluation = True

    @classmethod
    def build(cls, channels, config, band):
        from hpc_closure.closure.composed.generators import CRPSGenerator

        return CRPSGenerator(channels, config)
