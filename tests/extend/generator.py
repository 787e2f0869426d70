"""A generator from outside the package: the Gaussian law with a size that follows the state."""

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from hpc_closure.closure.composed.generators import Drawn, Generator
from hpc_closure.closure.composed.part_selection import ImprovementGate
from hpc_closure.closure.fields.losses import spectral_square
from hpc_closure.closure.fields.members import for_members
from hpc_closure.closure.networks.blocks import SUMMARY
from hpc_closure.experiment.kinds import ResidualKind
from hpc_closure.spectral.recipe import Section


class Sized(ResidualKind):
    """Name it with ``model.residual: extend.generator:Sized``."""

    reads_sensors = False
    one_evaluation = True

    class Options(Section):
        """Keys of ``model.options``."""

        largest: Annotated[float, Field(gt=0, le=2)] = Field(
            1.0, description="upper bound of |log s|"
        )

    @classmethod
    def build(cls, channels, config, band):
        return SizedNoise(config)


class SizedNoise(Generator):
    """Draw q = s(V) z, where s depends on scalar features of the state."""

    def __init__(self, config):
        super().__init__(config)
        self.largest = config["options"]["largest"]
        self.size = nn.Linear(SUMMARY, 1)
        nn.init.zeros_(self.size.weight)  # the Gaussian law at first
        nn.init.zeros_(self.size.bias)

    def log_size(self, conditions):
        """Compute log s of states, (B,)."""
        return self.largest * self.size(conditions.summary)[:, 0].tanh()

    def likelihood(self, frame, x0, log_size):
        """Compute the negative log-likelihood (B,) of residuals, less its constant."""
        white = x0.to(torch.complex64) * frame.law.modes("whiten", x0.real.float())
        power = spectral_square(frame.kept, white, frame.law.modes("mask", white))
        return 0.5 * power * torch.exp(-2 * log_size) + log_size

    def loss(self, frame, conditions, x0, z, uniform):
        return self.likelihood(frame, x0, self.log_size(conditions))

    def gate(self, frame):
        return ImprovementGate(frame.kept)

    def evidence(self, frame, conditions, x0, z, uniform):
        log_size = self.log_size(conditions)
        without = self.likelihood(frame, x0, torch.zeros_like(log_size))
        return without, self.likelihood(frame, x0, log_size)

    def draw(self, frame, conditions, z, shells, effort):
        size = for_members(self.log_size(conditions).exp(), len(z)).to(z.real)
        return Drawn(z * size[:, None, None])
