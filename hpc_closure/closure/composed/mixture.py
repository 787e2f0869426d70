r"""One or two Gaussian laws of the residual that depend on the state, fitted by likelihood.

.. math:: q \sim \sum_c p_c(V)\,N\bigl(\mu_c(V),\, e^{2 g_c(V)} B_c B_c^T\bigr)

Let y be the residual over the law of its modes
(:mod:`~hpc_closure.closure.gaussian.mode_covariance`). Component c of the law of y has

* a mean :math:`\mu_c` of every mode, of which a part of the largest modes depends on the state;
* a lower triangular 2 x 2 factor :math:`B_c` of every mode;
* a log amplitude :math:`g_c` of every shell;
* a weight :math:`p_c`.

A perceptron computes the parts that depend on the state from its summary numbers
(:meth:`Band.summary`). With one component, the law is Gaussian, with mean and spread that depend
on the state. Two components start at plus and minus the direction in which the largest modes vary
most. If another part learns the mean (numbers or a network), the components are centred,
:math:`\sum_c p_c\mu_c = 0`, because a further mean is an error that a coupled run accumulates.

This is not a flow: a draw takes one evaluation of a perceptron, and the likelihood is known.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpc_closure.closure.composed.generators import Drawn, Generator
from hpc_closure.closure.composed.part_selection import ImprovementGate
from hpc_closure.closure.fields.members import for_members
from hpc_closure.closure.fields.modes import Band
from hpc_closure.closure.gaussian.mode_covariance import apply_factors, remove_factors
from hpc_closure.closure.gaussian.residual_coordinates import ResidualCoordinates
from hpc_closure.closure.networks.blocks import Counts, perceptron
from hpc_closure.spectral.modes.grid import to_device_cached

__all__ = ["Mixture", "principal"]

HIDDEN = 64  # width of the perceptron
RATE = 5.0  # learning rate of the tables over that of other weights; Adam's steps ignore scale
APART = 0.8  # initial distance of each peak from the mean, in standard deviations
WIDEST = 1.5  # largest |g|


@dataclass
class Components:
    """Components of the laws of B states; the component, of K, is the first axis.

    Attributes:
        log_weights: (K, B).
        means: (K, B or 1, ...) spectra of y.
        factors: (K, 3, B or 1, ...) log b11, b21, log b22, each including g.
    """

    log_weights: Tensor
    means: Tensor
    factors: Tensor


class Mixture(Generator):
    """Mixture of Gaussian laws; see the module's docstring.

    Args:
        config: configuration of the model; ``components``: 1 or 2.
        own: band of the model; tables have its modes and are truncated to those of the residual.
    """

    #: it acts without being judged on unseen members
    judged = False

    def __init__(self, config: dict[str, Any], own: Band):
        super().__init__(config)
        self.components = number = int(config["components"])
        if config.get("centred") is None:  # set once, because an unused mean is dropped later
            config["centred"] = bool(set(config["mean"]) - {"regression"})
        self.about_mean = bool(config["centred"])
        self.shells = own.grid.num_shells
        self.tables = nn.Parameter(torch.zeros(number, 5, *own.shape))
        self.odds = nn.Parameter(torch.zeros(number))
        counts = Counts.of(own.grid.dimensions)
        self.largest = counts.largest
        outputs = number * (1 + counts.largest + self.shells)
        self.numbers = perceptron(counts.summary, outputs, HIDDEN)

    def laws(self, frame: ResidualCoordinates, summary: Tensor) -> Components:
        """Compute the components of the laws of states with summary numbers (B, 51)."""
        kept, count = frame.kept, self.components
        outputs = self.numbers(summary).unflatten(-1, (count, -1)).transpose(0, 1)  # (K, B, ...)
        odds, low, log_size = outputs.split([1, self.largest, self.shells], -1)
        weights = (odds[..., 0] + self.odds[:, None]).log_softmax(0)
        tables = RATE * kept.resized(self.tables)
        means = torch.complex(tables[:, 0], tables[:, 1])
        if count == 2 and frame.offset is not None:
            apart = remove_factors(
                _factors(frame, means), kept.place_largest(to_device_cached(frame.offset, means))
            )
            means = means + torch.stack([apart, -apart])
        means = means[:, None]
        if self.about_mean:
            share = kept.each(weights.exp())
            means = means - (share * means).sum(0, keepdim=True)
        else:
            means = means + kept.place_largest(low)
        bounded = WIDEST * torch.tanh(log_size / WIDEST)
        size = bounded[..., to_device_cached(kept.grid.shell(), bounded)]  # (K, B, ...)
        log_first, across, log_second = tables[:, 2:, None].unbind(1)
        factors = torch.stack([log_first + size, across * size.exp(), log_second + size], 1)
        return Components(weights, means, factors)

    # ---- fitting --------------------------------------------------------------------------------

    def loss(self, frame, conditions, x0, z, uniform):
        """Compute the negative log-likelihood (B,) per number of q, up to a constant."""
        white = x0.to(torch.complex64) * frame.law.modes("whiten", x0.real.float())
        y = remove_factors(_factors(frame, white), _root(frame, white) * white)
        real, imaginary = frame.law.modes("mask", white) * _numbers(frame, white)
        laws = self.laws(frame, conditions.summary)
        off = y - laws.means
        log_first, across, log_second = laws.factors.unbind(1)
        first = off.real * torch.exp(-log_first)
        second = (off.imag - across * first) * torch.exp(-log_second)
        misfit = real * (0.5 * first.square() + log_first)
        misfit = misfit + imaginary * (0.5 * second.square() + log_second)
        likelihood = laws.log_weights - misfit.sum(frame.kept.axes)
        return -likelihood.logsumexp(0) / (real.sum() + imaginary.sum()).clamp(min=1)

    def gate(self, frame):
        return ImprovementGate(frame.kept)

    def evidence(self, frame, conditions, x0, z, uniform):
        likelihood = self.loss(frame, conditions, x0, z, uniform).double()
        return torch.full_like(likelihood, 0.5), likelihood

    # ---- drawing --------------------------------------------------------------------------------

    def draw(self, frame, conditions, z, shells, effort):
        """Draw residuals; the imaginary part of the noise's mean mode chooses the component."""
        chosen, count = z.flatten(1)[:, 0].imag, len(z)
        laws = self.laws(frame, conditions.summary)
        white = z.to(torch.complex64) * frame.law.modes("whiten", z.real.float())
        weights = laws.log_weights.exp()
        share = for_members(weights.mT, count)
        level = torch.special.ndtr(chosen)[:, None].to(share)
        first = frame.kept.each((level < share[:, :1])[:, 0])
        means, factors = laws.means, laws.factors
        drawn = []
        for mean, (log_first, across, log_second) in zip(means, factors):
            parts = [log_first.exp(), across, log_second.exp()]
            member_factors = torch.stack([for_members(part, count) for part in parts])
            drawn.append(
                apply_factors(member_factors, _root(frame, white) * white)
                + for_members(mean, count)
            )
        y = drawn[0] if len(drawn) == 1 else torch.where(first, *drawn)
        mean = (frame.kept.each(weights) * means).sum(0)
        return Drawn(
            self._to_residual(frame, y),
            for_members(self._to_residual(frame, mean), count),
            sharp=True,
        )

    def _to_residual(self, frame: ResidualCoordinates, y: Tensor) -> Tensor:
        """Convert spectra of y to spectra of q."""
        q_hat = apply_factors(_factors(frame, y), y) * frame.law.modes("colour", y)
        return frame.kept.hermitian(q_hat / _root(frame, q_hat))


def _factors(frame: ResidualCoordinates, like: Tensor) -> Tensor:
    """Return the factors of the law by wavevector, (3, 2K + 1, K + 1)."""
    assert frame.factors is not None
    return to_device_cached(frame.factors, like)


def _root(frame: ResidualCoordinates, like: Tensor) -> Tensor:
    """Return factors (2K + 1, K + 1) that scale the parts of a whitened mode to unit normals."""
    root = torch.full(frame.kept.shape, math.sqrt(2.0), device=like.device)
    root[(0,) * root.ndim] = 1.0
    return root


def _numbers(frame: ResidualCoordinates, like: Tensor) -> Tensor:
    """Mark the independent real and imaginary parts of the modes, (2, 2K + 1, K + 1).

    Parts of conjugate modes are not independent, and the mean is real.
    """
    independent = frame.kept.independent.float().repeat(2, *[1] * len(frame.kept.shape))
    independent[(1, *[0] * len(frame.kept.shape))] = 0.0
    return independent.to(like.device)


def principal(covariance: Tensor) -> Tensor:
    """Return the initial position (25,) of a peak: the direction of largest variance of the modes.

    Args:
        covariance: (25, 25) of :meth:`Band.largest` of whitened residuals.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    direction = vectors[:, -1]
    direction = direction * torch.sign(direction[direction.abs().argmax()])
    return APART * values[-1].clamp(min=0).sqrt() * direction
