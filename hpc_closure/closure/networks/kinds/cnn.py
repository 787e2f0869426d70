"""3 x 3 convolutions as a network of mean or amplitude."""

from hpc_closure.experiment.kinds import NetworkKind, fields_of


class CNN(NetworkKind):
    """Periodic 3 x 3 convolutions, on a line of 3 points, on a cube of 3 x 3 x 3."""

    name = "cnn"
    several_fields = True
    reads = ("width", "mean_layers")
    flow_dimensions = (1, 2, 3)
    decay = 0.3

    @classmethod
    def build(cls, channels, config):
        from hpc_closure.closure.networks.blocks import LocalNetwork

        sizes = (config["width"], config["mean_layers"])
        return LocalNetwork(channels, *sizes, config["dimensions"], fields_of(config))
