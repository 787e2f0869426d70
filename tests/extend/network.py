"""A network of the mean from outside the package: perceptrons at every point of the grid."""

from pydantic import Field
from torch import nn

from hpc_closure.experiment.kinds import NetworkKind
from hpc_closure.spectral.recipe import Count, Section


class Pointwise(NetworkKind):
    """Name it with ``model.mean: [regression, extend.network:Pointwise]``."""

    flow_dimensions = (1, 2)

    class Options(Section):
        """Keys of ``model.options``."""

        hidden: Count = Field(8, description="channels between the two layers")

    @classmethod
    def build(cls, channels, config):
        return Network(channels, config["options"]["hidden"])


class Network(nn.Module):
    """Map condition channels (B, C, g, g) to a field (B, g, g) of magnitude about one."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.first = nn.Conv2d(channels, hidden, 1)
        self.last = nn.Conv2d(hidden, 1, 1)
        nn.init.zeros_(self.last.weight)  # no correction at first
        nn.init.zeros_(self.last.bias)

    def forward(self, features, summary):
        return self.last(self.first(features).tanh())[:, 0]
