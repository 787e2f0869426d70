r"""Closed-form laws that a mean plus a stationary Gaussian process cannot represent.

Both take the mean :math:`\bar U` and the noise :math:`\beta\xi \sim N(0, \beta^2 Q)` of an exact
law:

* :class:`StateAmplitude`: :math:`U = \bar U + D\,\beta\xi` with
  :math:`D = 1 + c\,|w| / \mathrm{rms}(w)`: Gaussian given w, with a covariance D Q D that
  follows the flow;
* :class:`TwoRegimes`: with probability p(w), :math:`U = \bar U + b_1\beta\xi + a\phi`, else
  :math:`U = \bar U + b_2\beta\xi - a\phi`: bimodal, with a sign-flipped large-scale pattern
  :math:`\phi = \sqrt2\cos(2\pi x / L)`, a in units of the noise's pointwise standard deviation.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hpc_closure.closure import draws
from hpc_closure.closure.exact import ExactLaw

__all__ = ["StateAmplitude", "TwoRegimes"]


class StateLaw:
    """What both share: the mean and noise of an exact law on the grid of the states."""

    def __init__(self, base: ExactLaw):
        self.base = base

    def mean(self, states: Tensor) -> Tensor:
        """E[U | V], (B, n, n) float64."""
        raise NotImplementedError

    def draw(self, states: Tensor, ids: Sequence[int], seed: int, call: int) -> Tensor:
        """One U per state (B, n, n); ``ids`` key the draws."""
        raise NotImplementedError

    def sample(
        self, states: Tensor, *, members: Sequence[int], seed: int, call: int = 0
    ) -> Tensor:
        """Draws (members, B, n, n) float64; each member and state draws for itself."""
        rows = range(len(states))
        return torch.stack(
            [
                self.draw(states, [draws.pair(member, row) for row in rows], seed, call)
                for member in members
            ]
        )

    def noise(self, ids: Sequence[int], seed: int, call: int) -> Tensor:
        """beta xi, (len(ids), n, n) float64."""
        white = draws.white_spectra(self.base.band, seed, "oracle", ids, call)
        return self.base.transform.to_physical(self.base.law.coloured(white))


class StateAmplitude(StateLaw):
    """N(mean, D Q D), D = 1 + c |w| / rms(w).

    Args:
        base: exact law of the mean and the noise.
        strength: c.
    """

    def __init__(self, base: ExactLaw, strength: float = 1.0):
        super().__init__(base)
        self.strength = strength

    def amplitude(self, states: Tensor) -> Tensor:
        """D, (B, n, n)."""
        states = states.double().cpu()
        rms = states.square().mean((-2, -1), keepdim=True).sqrt()
        return 1 + self.strength * states.abs() / rms

    def mean(self, states: Tensor) -> Tensor:
        return self.base.mean(states)

    def draw(self, states: Tensor, ids: Sequence[int], seed: int, call: int) -> Tensor:
        return self.mean(states) + self.amplitude(states) * self.noise(ids, seed, call)


class TwoRegimes(StateLaw):
    """Two-component mixture whose weights depend on the flow.

    Args:
        base: exact law of the mean and the noise.
        amplitudes: b1, b2, factors of the noise in the two regimes.
        pattern: a, in units of the noise's pointwise standard deviation.
        scale: p(w) = 1 / (1 + exp(-s / scale)), s the correlation of w with
            sqrt(2) sin(2 pi y / L) over rms(w).
    """

    def __init__(
        self,
        base: ExactLaw,
        amplitudes: tuple[float, float] = (0.6, 1.0),
        pattern: float = 1.0,
        scale: float = 0.25,
    ):
        super().__init__(base)
        self.amplitudes, self.scale = amplitudes, scale
        size = base.grid.size
        x = torch.arange(size, dtype=torch.float64) * (2 * math.pi / size)
        wave = pattern * math.sqrt(2 * base.variance) * x.cos()
        self.pattern = wave[:, None].expand(size, size)
        self.probe = (math.sqrt(2) * x.sin())[None, :].expand(size, size)

    def probability(self, states: Tensor) -> Tensor:
        """p(w), (B,)."""
        states = states.double().cpu()
        observed = (states * self.probe).mean((-2, -1)) / states.square().mean((-2, -1)).sqrt()
        return torch.sigmoid(observed / self.scale)

    def mean(self, states: Tensor) -> Tensor:
        tilt = 2 * self.probability(states) - 1
        return self.base.mean(states) + tilt[:, None, None] * self.pattern

    def draw(self, states: Tensor, ids: Sequence[int], seed: int, call: int) -> Tensor:
        uniform = draws.uniforms(seed, "oracle", ids, call, 1)[:, 0]
        first = (uniform < self.probability(states))[:, None, None]
        one, two = self.amplitudes
        noise = self.noise(ids, seed, call)
        drawn = torch.where(first, one * noise + self.pattern, two * noise - self.pattern)
        return self.base.mean(states) + drawn
