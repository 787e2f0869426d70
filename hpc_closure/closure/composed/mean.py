r"""The trained parts that a state alone decides: the mean's correction and the amplitude.

Both are a network on the generator's grid (:class:`~hpc_closure.experiment.kinds.NetworkKind`).
What a regression of the mean leaves is their target; they are fitted on members of ``fit`` and act
as far as the gate lets them. What they give is bounded, whatever they are shown.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from hpc_closure.closure.fields.losses import gaussian_likelihood, spectral_square
from hpc_closure.closure.gaussian.residual_coordinates import Encoding, Frame
from hpc_closure.closure.networks.blocks import LARGEST, LOW, SUMMARY, perceptron
from hpc_closure.experiment.kinds import NetworkKind, find

__all__ = ["NetworkAmplitude", "NetworkMean"]

FARTHEST = 10.0  # standard deviations of the residual that a correction has at most, ...


class NetworkMean(nn.Module):
    """A correction of the mean, in units in which the regression's residual is white.

    Args:
        kind: name of the network, ``fno``, ``cnn`` or a class's path.
        channels: of the conditions.
        config: of the model.
    """

    def __init__(self, kind: str, channels: int, config: dict[str, Any]):
        super().__init__()
        chosen = find(NetworkKind, kind, "model.mean")
        self.kind, self.decay = kind, chosen.decay
        self.network = chosen.build(channels, config)
        self.farthest = FARTHEST  # ... or what unseen members have shown
        self.low = perceptron(SUMMARY, LARGEST, LOW) if chosen.answers_largest else None

    def forward(self, frame: Frame, encoding: Encoding) -> Tensor:
        """Whitened spectra (B, ...) in the residual band."""
        return self.spectra(frame, encoding, self.field(encoding))

    def field(self, encoding: Encoding) -> Tensor:
        """The network's answer (B, g, g), in standard deviations of the residual."""
        out = self.network(encoding.features, encoding.summary)
        return out.clamp(-self.farthest, self.farthest)

    def spectra(self, frame: Frame, encoding: Encoding, field: Tensor) -> Tensor:
        """Whitened spectra of an answer, with the largest modes where they are answered for."""
        # from fields of unit variance: weights need not grow to be seen
        white = frame.kept.to_spectral(field) * (2 * frame.kept.modes + 1)
        if self.low is None:
            return white
        return white + frame.kept.place_largest(self.low(encoding.summary))

    def correction(self, frame: Frame, white_hat: Tensor) -> Tensor:
        """The output in units of U."""
        return white_hat * frame.first.modes("colour", white_hat)

    def loss(self, frame: Frame, residual_hat: Tensor, white_hat: Tensor) -> Tensor:
        """Whitened square error (B,); 1 where the output is zero."""
        error = residual_hat * frame.first.modes("whiten", residual_hat) - white_hat
        return spectral_square(frame.kept, error, frame.first.modes("importance", error))


class NetworkAmplitude(nn.Module):
    """log D, bounded to a factor of 20; arguments as of :class:`NetworkMean`."""

    def __init__(self, kind: str, channels: int, config: dict[str, Any]):
        super().__init__()
        self.network = find(NetworkKind, kind, "model.amplitude").build(channels, config)

    def forward(self, encoding: Encoding) -> Tensor:
        """(B, g, g)."""
        return 3.0 * torch.tanh(self.network(encoding.features, encoding.summary) / 3.0)

    def loss(self, frame: Frame, residual_hat: Tensor, log_amplitude: Tensor) -> Tensor:
        """Negative log-likelihood per point (B,); 1/2 where D is 1."""
        field = frame.field(residual_hat) / math.sqrt(frame.first.variance)
        return gaussian_likelihood(field, log_amplitude)
