r"""Losses per sample, (B,): averages over a batch that is split over processes are exact."""

import math

import torch
from torch import Tensor

from hpc_closure.closure.fields.modes import Band

__all__ = [
    "ALMOST_FAIR",
    "crps",
    "check_ensemble",
    "energy_of",
    "gaussian_crps",
    "over_channels",
    "energy_score",
    "gaussian_likelihood",
    "spectral_energy_score",
    "spectral_square",
    "square_distances",
]

ALMOST_FAIR = 0.95  # alpha of scores used as training losses


def spectral_square(band: Band, error_hat: Tensor, importance: Tensor) -> Tensor:
    """Average |error|^2 over modes, weighted by ``importance`` and Parseval; returns (B,).

    Of C channels, (B, C, ...), it is the mean over channels. With errors in whitened units, a
    prediction of zero scores 1 if the law is the base law.
    """
    weights = band.on("weights", error_hat.device, importance.dtype) * importance
    square = torch.view_as_real(error_hat).square().sum(-1)
    share = (square * weights).sum(band.axes) / weights.sum(band.axes).clamp(min=1e-30)
    return over_channels(share)


def gaussian_likelihood(residual: Tensor, log_std: Tensor, sides: int = 2) -> Tensor:
    """Compute the negative log-likelihood per point of N(0, exp(2 log_std)), (B,).

    The constant 0.5 log(2 pi) is left out. Fields have ``sides`` axes, (B, n, n) or (B, C, n, n).
    """
    likelihood = log_std + 0.5 * residual.square() * torch.exp(-2 * log_std)
    return over_channels(likelihood.mean(tuple(range(-sides, 0))))


def gaussian_crps(residual: Tensor, log_std: Tensor, sides: int = 2) -> Tensor:
    r"""Compute the CRPS per point of N(0, exp(2 log_std)), in closed form, (B,).

    Fields have ``sides`` axes, (B, n, n) or (B, C, n, n).

    With :math:`z = r/\sigma` it is :math:`\sigma[z(2\Phi(z) - 1) + 2\varphi(z) - \pi^{-1/2}]`
    (Gneiting et al., MWR 133 (2005) 1098).
    """
    std = log_std.exp()
    z = residual / std
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    score = std * (z * torch.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))
    return over_channels(score.mean(tuple(range(-sides, 0))))


def over_channels(values: Tensor) -> Tensor:
    """Average values (B,) or (B, C) over the channels, (B,)."""
    return values if values.ndim == 1 else values.mean(1)


def crps(ensemble: Tensor, truth: Tensor, alpha: float = 1.0) -> Tensor:
    r"""Compute the continuous ranked probability score, mean over points: (B,), units of truth.

    .. math:: \frac1M\sum|x_i - y| - \frac{1 - \epsilon}{2M(M-1)}\sum_{i,j}|x_i - x_j|,
              \qquad \epsilon = (1 - \alpha) / M

    alpha = 1 is the fair score, whose expectation does not depend on M. As a training loss it lets
    members drift apart; :data:`ALMOST_FAIR` prevents this. alpha = 0 is the score of the empirical
    law (Lang et al. 2024, AIFS-CRPS). A single member scores its absolute error.

    With sorted members ``sum_{i<j} |x_i - x_j| = sum_i (2 i - M - 1) x_(i)``, so the cost is
    O(M log M). The truth is subtracted first to avoid cancellation if the spread is far below the
    signal. Differentiable.

    Args:
        ensemble: (M, B, ...).
        truth: (B, ...).
        alpha: share of the fair score.

    Raises:
        ValueError: the shapes do not fit.
    """
    check_ensemble(ensemble, truth)
    error = (ensemble - truth).movedim(0, -1).contiguous()  # sorting along a stride is slow
    score = error.abs().mean(-1)
    num = len(ensemble)
    if num > 1:
        weights = 2.0 * torch.arange(num, dtype=error.dtype, device=error.device) - (num - 1)
        pairs = error.sort(-1).values @ weights
        score = score - (1 - (1 - alpha) / num) * pairs / (num * (num - 1))
    return score.flatten(1).mean(-1) if score.ndim > 1 else score


def check_ensemble(ensemble: Tensor, truth: Tensor) -> None:
    """Raise ValueError unless the ensemble has shape (M,) + shape of the truth."""
    if ensemble.ndim < 2 or ensemble.shape[1:] != truth.shape:
        raise ValueError(
            f"ensemble {tuple(ensemble.shape)} is not (members,) + truth {tuple(truth.shape)}"
        )


def spectral_energy_score(
    band: Band, samples_hat: Tensor, truth_hat: Tensor, importance: Tensor, alpha: float = 1.0
) -> Tensor:
    """Compute the energy score of each coefficient (modulus norm), weighted mean over modes, (B,).

    In whitened units every scale has equal weight, unlike in the pointwise score. ``alpha`` is as
    in :func:`crps`.
    """
    num = len(samples_hat)

    def modulus(values: Tensor) -> Tensor:
        # smooth at zero, where the modulus has no gradient
        return (torch.view_as_real(values).square().sum(-1) + 1e-12).sqrt()

    skill = modulus(samples_hat - truth_hat).mean(0)
    pairs = modulus(samples_hat[:, None] - samples_hat[None, :]) - 1e-6
    score = skill - (1 - (1 - alpha) / num) * pairs.sum((0, 1)) / (2 * num * (num - 1))
    weights = band.on("weights", importance.device, importance.dtype) * importance
    share = (score * weights).sum(band.axes) / weights.sum(band.axes).clamp(min=1e-30)
    return over_channels(share)


def energy_score(ensemble: Tensor, truth: Tensor) -> Tensor:
    """Compute the fair energy score with the rms norm over the grid: (S,), units of the truth.

    It depends on the joint law of all points, the CRPS only on the law of each point.
    """
    return energy_of(*square_distances(ensemble, truth))


def square_distances(ensemble: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean square distances over the grid, member to truth (S, M), to member (S, M, M)."""
    check_ensemble(ensemble, truth)
    error = (ensemble - truth).flatten(1)
    error = error.unflatten(1, (truth.shape[0], -1)).transpose(0, 1)  # (S, M, points)
    skill = error.square().mean(-1)
    error = error - error.mean(1, keepdim=True)  # less cancellation in the product below
    product = error @ error.mT / error.shape[-1]
    square = product.diagonal(dim1=1, dim2=2)
    return skill, (square[:, :, None] + square[:, None] - 2 * product).clamp_min(0)


def energy_of(skill: Tensor, pairs: Tensor) -> Tensor:
    """Compute the fair energy score (S,) from square distances (S, M) and (S, M, M)."""
    num = skill.shape[1]
    if num == 1:
        return skill.sqrt()[:, 0]
    return skill.sqrt().mean(1) - pairs.sqrt().triu(1).sum((1, 2)) / (num * (num - 1))
