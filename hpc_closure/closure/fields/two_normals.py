r"""Mixtures of two normal laws, one at every point: density, normal scores and quantiles.

.. math:: F(x) = \sum_c p_c\,\Phi\bigl((x - \mu_c) / \sigma_c\bigr), \qquad
          s = \Phi^{-1}(F(x)), \qquad x = F^{-1}(\Phi(s)).

The normal score s of x is standard normal if x has the law F. Scores are used instead of the level
F, because a level near 1 has lost its digits: score and quantile are computed in the lower tail of
the law, or of its mirror image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.special import ndtr, ndtri

__all__ = ["TwoNormals"]

STEPS = 14  # of the search for a quantile; a fixed number, so that no row depends on the others
FARTHEST = 8.0  # largest score; a normal law is beyond it once in 10^15


@dataclass
class TwoNormals:
    """Laws of numbers of one shape; the two components are the first axis.

    Numbers and scores below may have any shape (...) to which the laws' broadcasts.

    Attributes:
        log_weights: (2, ...) log p, normalised.
        means: (2, ...).
        log_stds: (2, ...).
    """

    log_weights: Tensor
    means: Tensor
    log_stds: Tensor

    def double(self) -> "TwoNormals":
        """Return the laws in float64, with weights that sum to 1 in it."""
        weights = self.log_weights.double()
        return TwoNormals(weights.log_softmax(0), self.means.double(), self.log_stds.double())

    def mean(self) -> Tensor:
        """Return the means (...) of the laws."""
        return (self.log_weights.exp() * self.means).sum(0)

    def log_density(self, x: Tensor) -> Tensor:
        """Compute the logarithm of the density at x (...), without the term -0.5 log(2 pi)."""
        white = (x - self.means) * torch.exp(-self.log_stds)
        return (self.log_weights - self.log_stds - 0.5 * white.square()).logsumexp(0)

    def score(self, x: Tensor) -> Tensor:
        """Compute the normal scores of x (...), within +-8; in float64 if the laws are."""
        white = (x - self.means) * torch.exp(-self.log_stds)
        weights = self.log_weights.exp()
        below, above = ((weights * ndtr(side * white)).sum(0) for side in (1, -1))
        scores = torch.where(below < above, ndtri(below), -ndtri(above))
        return scores.clamp(-FARTHEST, FARTHEST)

    def quantile(self, score: Tensor) -> Tensor:
        """Compute x of normal scores (...), the inverse of :meth:`score`; laws in float64.

        Newton's method for the score of x, which is almost linear in x, within an interval that
        each step shortens; where a step would leave the interval, it is halved instead. The result
        is accurate to 1e-6 of the law's standard deviation, and differentiable.
        """
        with torch.no_grad():
            x = self._search(score)
        # one more step, whose derivatives are those of the inverse
        side = torch.where(score > 0, -1.0, 1.0)
        error, slope = self._lower_tail(x, side, score)
        return x - side * error / slope.detach()

    def _search(self, score: Tensor) -> Tensor:
        """Find x of scores (...), except for a last step of Newton's method."""
        side = torch.where(score > 0, -1.0, 1.0)  # mirrored, so that F is below 1/2
        ends = side * (self.means + score * self.log_stds.exp())  # quantiles of the components
        low, high = ends.amin(0), ends.amax(0)
        x = 0.5 * (low + high)  # a start from the likelier component's can be slow
        for _ in range(STEPS):
            error, slope = self._lower_tail(side * x, side, score)
            low, high = torch.where(error > 0, low, x), torch.where(error > 0, x, high)
            step = x - error / slope
            # false also where the level is 0 or 1 and the step is no number
            inside = (step >= low) & (step <= high)
            x = torch.where(inside, step, 0.5 * (low + high))
        return side * x

    def _lower_tail(self, x: Tensor, side: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the score of x minus its target, mirrored by ``side`` = +-1, and its slope."""
        scale = torch.exp(-self.log_stds)
        white = side * (x - self.means) * scale
        weights = self.log_weights.exp()
        found = ndtri((weights * ndtr(white)).sum(0))
        # the density over that of a standard normal at the score
        ratio = torch.exp(0.5 * (found.square() - white.square()))
        return found - side * score, (weights * scale * ratio).sum(0)
