"""A Fourier neural operator as a network of mean or amplitude."""

from hpc_closure.experiment.kinds import NetworkKind, fields_of


class FNO(NetworkKind):
    """Fourier blocks on the generator's grid, and a perceptron for the largest modes."""

    name = "fno"
    several_fields = True
    reads = ("width", "modes", "mean_layers", "spectral_convolution")
    decay = 3.0
    flow_dimensions = (1, 2, 3)
    answers_largest = True

    @classmethod
    def build(cls, channels, config):
        from hpc_closure.closure.networks.blocks import FieldNetwork

        sizes = (config["width"], config["modes"], config["mean_layers"])
        form = config["spectral_convolution"]
        return FieldNetwork(channels, *sizes, form, fields_of(config), config["dimensions"])
