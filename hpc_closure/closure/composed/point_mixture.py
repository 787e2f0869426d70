r"""Mixture of two normal laws at every point, joined by a Gaussian copula; fitted by likelihood.

.. math:: q(x) = F_x^{-1}\bigl(\Phi(s(x))\bigr), \qquad
          F_x = p\,N(\mu_1, \sigma_1^2) + (1 - p)\,N(\mu_2, \sigma_2^2)

Weights, means and standard deviations are fields that 3 x 3 convolutions compute from the
conditions, in units of the rms of q. The normal scores s (:mod:`~..fields.two_normals`) are a
stationary Gaussian field of unit variance. Its spectrum, and its covariance across channels, are
those of the scores of unseen snapshots; they are fitted after the network (:func:`fit_copula`).

This is the strongest simple law of events that happen at a point or do not. What it lacks is the
dependence of neighbouring points on each other beyond that of a Gaussian field that is the same
everywhere.
"""

from typing import Any

import torch
from torch import Tensor

from hpc_closure.closure.composed.generators import Drawn, Generator
from hpc_closure.closure.composed.part_selection import ImprovementGate
from hpc_closure.closure.fields.members import for_members
from hpc_closure.closure.fields.two_normals import TwoNormals
from hpc_closure.closure.gaussian.channel_covariance import apply_channels, remove_channels
from hpc_closure.closure.gaussian.residual_coordinates import ResidualCoordinates
from hpc_closure.closure.networks.blocks import LocalNetwork
from hpc_closure.experiment.kinds import channel_shape_of, fields_of

__all__ = ["PointMixture"]

NUMBERS = 5  # of the law of a point: log odds, two means, two log standard deviations
START = (0.0, -0.3, 0.3, -0.7, 0.1)  # two components that differ, or both would learn the same
WIDEST = (10.0, 10.0, 10.0, 3.0, 3.0)  # bounds of these numbers


class PointMixture(Generator):
    """Mixture of two normal laws at every point; see the module's docstring.

    Args:
        channels: number of condition channels of the state, the coordinates last.
        config: configuration of the model.
    """

    #: it acts without being judged on unseen members
    judged = False

    def __init__(self, channels: int, config: dict[str, Any]):
        super().__init__(config)
        fields = fields_of(config)
        self.channel_shape = channel_shape_of(config)
        sizes = (config["width"], config["mean_layers"], config["dimensions"])
        self.network = LocalNetwork(channels, *sizes, fields=NUMBERS * fields)
        with torch.no_grad():
            start = torch.tensor(START).repeat_interleave(fields)
            self.network.head.bias.copy_(start)

    def laws(self, conditions: Any) -> TwoNormals:
        """Compute the laws (B, g, g), or (B, C, g, g), of q over its rms."""
        out = self.network(conditions.fields, conditions.summary)
        numbers = out.unflatten(1, (NUMBERS, *self.channel_shape)).unbind(1)
        odds, first, second, log_first, log_second = (
            bound * torch.tanh(number / bound) for number, bound in zip(numbers, WIDEST)
        )
        return TwoNormals(
            torch.nn.functional.logsigmoid(torch.stack([odds, -odds])),
            torch.stack([first, second]),
            torch.stack([log_first, log_second]),
        )

    # ---- fitting --------------------------------------------------------------------------------

    def loss(self, frame, conditions, x0, z, uniform):
        """Compute the negative log-likelihood (B,) per point, without the term 0.5 log(2 pi)."""
        density = self.laws(conditions).log_density(self._points(frame, x0).float())
        return -density.flatten(1).mean(1)

    def gate(self, frame):
        return ImprovementGate(frame.kept)

    def evidence(self, frame, conditions, x0, z, uniform):
        likelihood = self.loss(frame, conditions, x0, z, uniform).double()
        return torch.full_like(likelihood, 0.5), likelihood

    def scores(self, frame: ResidualCoordinates, conditions: Any, q_hat: Tensor) -> Tensor:
        """Compute the normal scores of q, spectra (B, ...) complex128 in the residual band."""
        fields = self.laws(conditions).double().score(self._points(frame, q_hat).double())
        return frame.kept.to_spectral(fields)

    def _points(self, frame: ResidualCoordinates, q_hat: Tensor) -> Tensor:
        """Return the values of q at the points of the grid, in units of its rms."""
        fields = frame.field(q_hat)
        return fields / frame.law.rms(fields)

    # ---- drawing --------------------------------------------------------------------------------

    def draw(self, frame, conditions, z, shells, effort):
        """Draw residuals: base noise is the noise of the normal scores, with another spectrum."""
        count, laws = len(z), self.laws(conditions).double()
        scores = self._scores_of_noise(frame, z)
        each = (
            torch.stack([for_members(one, count) for one in part])
            for part in (laws.log_weights, laws.means, laws.log_stds)
        )
        rms = frame.law.rms(scores)
        inside = frame.law.modes("mask", scores)  # the closure has no other modes
        q_hat, mean_hat = (
            frame.kept.to_spectral(rms * fields) * inside
            for fields in (TwoNormals(*each).quantile(scores), laws.mean())
        )
        return Drawn(q_hat, for_members(mean_hat, count), sharp=True)

    def _scores_of_noise(self, frame: ResidualCoordinates, z: Tensor) -> Tensor:
        """Turn base noise (M, ...) of q into fields of normal scores, of unit variance."""
        z = z.to(torch.complex128)
        if frame.channels is not None:
            z = remove_channels(frame.channels, z)
        copula = frame.copula or frame.law
        scores = copula.coloured(z * frame.law.modes("whiten", z))
        factors = frame.channels if frame.copula is None else frame.copula_channels
        if factors is not None:
            scores = apply_channels(factors, scores)
        fields = frame.field(scores)
        return fields / copula.rms(fields)
