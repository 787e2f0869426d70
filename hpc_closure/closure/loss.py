r"""Losses, each a value per sample (B,), so that a batch split over processes averages exactly."""

import torch
from torch import Tensor

from hpc_closure.closure.band import Band

__all__ = ["spectral_square", "gaussian_likelihood", "almost_fair_crps", "spectral_energy_score"]


def spectral_square(band: Band, error_hat: Tensor, importance: Tensor) -> Tensor:
    """Mean over modes of |error|^2, weighted by ``importance`` and Parseval, (B,).

    With errors in whitened units a prediction of zero scores 1 when the law is the base law.
    """
    weights = band.on("weights", error_hat.device, importance.dtype) * importance
    square = torch.view_as_real(error_hat).square().sum(-1)
    return (square * weights).sum((-2, -1)) / weights.sum().clamp(min=1e-30)


def gaussian_likelihood(residual: Tensor, log_std: Tensor) -> Tensor:
    """Negative log-likelihood per point of N(0, exp(2 log_std)), less its constant, (B,)."""
    return (log_std + 0.5 * residual.square() * torch.exp(-2 * log_std)).mean((-2, -1))


def _pairs(samples: Tensor) -> Tensor:
    """Differences of all ordered pairs (M, M, B, ...)."""
    return samples[:, None] - samples[None, :]


def almost_fair_crps(samples: Tensor, truth: Tensor, alpha: float = 0.95) -> Tensor:
    r"""Almost-fair CRPS, averaged over points, (B,).

    .. math:: \frac1M\sum|x_i - y| - \frac{1 - \epsilon}{2M(M-1)}\sum_{i\ne j}|x_i - x_j|,
              \qquad \epsilon = (1 - \alpha) / M

    alpha = 1 is the fair score, whose members may drift apart; alpha = 0 the ensemble's own CRPS
    (Lang et al. 2024, AIFS-CRPS).

    Args:
        samples: (M, B, ...), M >= 2.
        truth: (B, ...).
        alpha: share of the fair score.
    """
    num = len(samples)
    skill = (samples - truth).abs().mean(0)
    spread = _pairs(samples).abs().sum((0, 1)) / (2 * num * (num - 1))
    score = skill - (1 - (1 - alpha) / num) * spread
    return score.flatten(1).mean(1)


def spectral_energy_score(
    band: Band, samples_hat: Tensor, truth_hat: Tensor, importance: Tensor, alpha: float = 0.95
) -> Tensor:
    """Almost-fair energy score of each coefficient, |.| the modulus, weighted mean, (B,).

    Seen in whitened units every scale counts alike, which the pointwise score does not give.
    """
    num = len(samples_hat)

    def modulus(values: Tensor) -> Tensor:
        # smooth at zero, where the modulus has no gradient
        return (torch.view_as_real(values).square().sum(-1) + 1e-12).sqrt()

    skill = modulus(samples_hat - truth_hat).mean(0)
    pairs = modulus(_pairs(samples_hat)) - 1e-6
    score = skill - (1 - (1 - alpha) / num) * pairs.sum((0, 1)) / (2 * num * (num - 1))
    weights = band.on("weights", importance.device, importance.dtype) * importance
    return (score * weights).sum((-2, -1)) / weights.sum().clamp(min=1e-30)
