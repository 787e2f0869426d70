"""Trained parts that depend on the state alone: the mean's correction and the amplitude.

Both are a network on the generator's grid (:class:`~hpc_closure.experiment.kinds.NetworkKind`).
Their target is the residual of the mean's regression. They are fitted on ``fit`` members and act
as far as the gate allows. Their outputs are bounded for any input.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hpc_closure.closure.fields.losses import (
    gaussian_crps,
    gaussian_likelihood,
    spectral_square,
)
from hpc_closure.closure.gaussian.residual_coordinates import ResidualCoordinates, StateConditions
from hpc_closure.closure.networks.blocks import LOW, Counts, perceptron
from hpc_closure.experiment.kinds import NetworkKind, channel_shape_of, fields_of, find

__all__ = ["NetworkAmplitude", "NetworkMean"]

FARTHEST = 10.0  # largest correction, in standard deviations of the residual


class NetworkMean(nn.Module):
    """A correction of the mean, in units in which the regression's residual is white.

    Args:
        kind: name of the network, ``fno``, ``cnn`` or the path of a class.
        channels: number of condition channels.
        config: configuration of the model.
    """

    def __init__(self, kind: str, channels: int, config: dict[str, Any]):
        super().__init__()
        network_kind = find(NetworkKind, kind, "model.mean")
        self.kind, self.decay = kind, network_kind.decay
        self.network = network_kind.build(channels, config)
        self.farthest = FARTHEST  # replaced by the largest output on unseen members
        fields = fields_of(config)
        self.channel_shape = channel_shape_of(config)
        self.low = None
        if network_kind.answers_largest:
            counts = Counts.of(config["dimensions"])
            self.low = perceptron(counts.summary * fields, counts.largest * fields, LOW)

    def forward(self, frame: ResidualCoordinates, encoding: StateConditions) -> Tensor:
        """Compute whitened spectra (B, ...) in the residual band; of C fields (B, C, ...)."""
        return self.spectra(frame, encoding, self.field(encoding))

    def field(self, encoding: StateConditions) -> Tensor:
        """Compute the network's output (B, g, g), in standard deviations of the residual.

        Of C fields it is (B, C, g, g).
        """
        out = self.network(encoding.features, encoding.summary)
        return out.clamp(-self.farthest, self.farthest)

    def spectra(
        self, frame: ResidualCoordinates, encoding: StateConditions, field: Tensor
    ) -> Tensor:
        """Transform an output to whitened spectra, and add the largest modes if predicted."""
        # scaled from fields of unit variance, so that weights need not grow
        # (on a line by more, because models of lines were trained so)
        kept = frame.kept
        scale = kept.white_rms if kept.grid.dimensions > 1 else float(2 * kept.modes + 1)
        white = kept.to_spectral(field) * scale
        if self.low is None:
            return white
        low = self.low(encoding.summary).unflatten(1, (*self.channel_shape, -1))
        return white + kept.place_largest(low)

    def correction(self, frame: ResidualCoordinates, white_hat: Tensor) -> Tensor:
        """Convert the output to units of U."""
        return white_hat * frame.first.modes("colour", white_hat)

    def loss(self, frame: ResidualCoordinates, residual_hat: Tensor, white_hat: Tensor) -> Tensor:
        """Compute the whitened square error (B,); 1 if the output is zero."""
        error = residual_hat * frame.first.modes("whiten", residual_hat) - white_hat
        return spectral_square(frame.kept, error, frame.first.modes("importance", error))


class NetworkAmplitude(nn.Module):
    """Log amplitude log D, bounded to a factor of 20; arguments as of :class:`NetworkMean`.

    It is fitted by the likelihood of points, or by their CRPS (``amplitude_score``). The CRPS is
    less sensitive to rare large residuals, for which a likelihood widens D.
    """

    def __init__(self, kind: str, channels: int, config: dict[str, Any]):
        super().__init__()
        self.score = gaussian_crps if config["amplitude_score"] == "crps" else gaussian_likelihood
        self.network = find(NetworkKind, kind, "model.amplitude").build(channels, config)

    def forward(self, encoding: StateConditions) -> Tensor:
        """Compute log D (B, g, g), of C fields (B, C, g, g)."""
        return 3.0 * torch.tanh(self.network(encoding.features, encoding.summary) / 3.0)

    def loss(
        self, frame: ResidualCoordinates, residual_hat: Tensor, log_amplitude: Tensor
    ) -> Tensor:
        """Compute the negative log-likelihood per point (B,), 1/2 if D is 1; or the CRPS."""
        field = frame.field(residual_hat)
        return self.score(field / frame.first.rms(field), log_amplitude, len(frame.kept.axes))
