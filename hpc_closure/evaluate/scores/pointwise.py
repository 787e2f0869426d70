"""Score point forecasts and ensembles with pure functions of tensors.

An ensemble has the shape ``(members, samples, ...)``, the truth ``(samples, ...)``. The trailing
axes are grid points and are averaged. Functions of an ensemble return one value per sample,
``(samples,)``. A score that is a root or a ratio is a function of *means over samples* of those
values, because a mean of ratios per sample is biased. Samples can thus be processed block by
block, and the interval resamples the same values per sample.

    relative error  ||x - y|| / ||y||                       Frobenius norm over the grid
    bias^2          |x_mean - y|^2 - s^2 / M - |y - E y|^2
    fair CRPS       <|x_i - y|> - sum_ij |x_i - x_j| / (2 M (M - 1))
    energy score    the same with fields for numbers and the norm for | |
    spread-skill    sqrt((M + 1) / M  <s^2> / <|x_mean - y|^2>)

A single member is a point forecast: its variance is zero and its CRPS is the absolute error. The
CRPS and the energy score are defined in :mod:`hpc_closure.closure.fields.losses`, because they are
also used as training losses.

Sources: Ferro, Q. J. R. Meteorol. Soc. 140 (2014) 1917 (fair scores); Lang et al., arXiv
2412.15832 (almost-fair CRPS); Fortin et al., J. Hydrometeorol. 15 (2014) 1708 (spread-skill).
"""

import torch
from torch import Tensor

from hpc_closure.closure.fields.losses import check_ensemble
from hpc_closure.evaluate.scores.record import ACCURACY, Score

VALID = 0.5  # relative error of the ensemble mean at which a forecast ends

# scores that are not functions of means over samples
SCORES = (
    Score(
        name="valid_time",
        heading="valid time",
        meaning=f"time at which the ensemble mean's relative error reaches {VALID:g}",
        table=ACCURACY,
        requires="coupled",
    ),
    Score(
        name="wasserstein1",
        heading="W₁",
        meaning="Wasserstein-1 distance of pointwise vorticity to the truth's, in standard "
        "deviations",
        table=ACCURACY,
        requires="coupled",
    ),
    Score(
        name="diverged",
        heading="diverged",
        meaning="share of members with values that are not finite",
        table=ACCURACY,
        requires="coupled",
    ),
    Score(
        name="floor",
        heading="floor",
        meaning="least possible relative error of a mean, from the exact law's variance: "
        "σ / rms(U)",
        requires="an exact law, no sensors (generated)",
    ),
    Score(
        name="floor_realised",
        heading="realised floor",
        meaning="the same with the noise realised in these snapshots",
        requires="an exact law (generated)",
    ),
)


def _mean_points(values: Tensor, leading: int) -> Tensor:
    """Average over all axes after the first ``leading``."""
    return values.flatten(leading).mean(-1) if values.ndim > leading else values


# ---- values per sample ----------------------------------------------------------------------


def relative_error(ensemble: Tensor, truth: Tensor) -> Tensor:
    """Compute the relative Frobenius error of one member, as in the published tables; (S,).

    The published tables average ``||x - y||_F / ||y||_F`` over snapshots with one sample each;
    here it is averaged over the members, too.

    Args:
        ensemble: (M, S, ...).
        truth: (S, ...).

    Returns:
        (S,), dimensionless.
    """
    check_ensemble(ensemble, truth)
    error = _mean_points((ensemble - truth).square(), 2).sqrt()
    return (error / _mean_points(truth.square(), 1).sqrt()).mean(0)


def mse(ensemble: Tensor, truth: Tensor) -> Tensor:
    """Compute the squared error of one member, averaged over members; (S,), units of truth^2."""
    check_ensemble(ensemble, truth)
    return _mean_points((ensemble - truth).square(), 2).mean(0)


def mean_mse(ensemble: Tensor, truth: Tensor) -> Tensor:
    """Compute the squared error of the ensemble mean; (S,), in units of truth squared."""
    check_ensemble(ensemble, truth)
    return _mean_points((ensemble - truth).mean(0).square(), 1)


def variance(ensemble: Tensor) -> Tensor:
    """Compute the unbiased variance over members, mean over the grid; (S,), zero if M = 1."""
    if len(ensemble) == 1:
        return torch.zeros(ensemble.shape[1], dtype=ensemble.dtype, device=ensemble.device)
    return _mean_points(ensemble.var(0, correction=1), 1)


def bias2(ensemble: Tensor, truth: Tensor, floor: Tensor | float = 0.0) -> Tensor:
    """Estimate the squared bias of the forecast law's mean; (S,), in units of truth squared.

    The squared error of the ensemble mean contains ``s^2 / M`` due to the finite ensemble, and the
    noise realised in the truth. Both are subtracted, so a single value may be negative.

    Args:
        ensemble: (M, S, ...).
        truth: (S, ...).
        floor: squared distance of the truth from its exact conditional mean (S,), i.e. ``mse`` of
            that mean; with 0 the noise of the truth is not subtracted.
    """
    return mean_mse(ensemble, truth) - variance(ensemble) / len(ensemble) - floor


def coverage(ensemble: Tensor, truth: Tensor, level: float = 0.9) -> Tensor:
    """Compute the share of points inside the central interval; (S,), ``level`` if calibrated.

    The interval between the order statistics ``j`` and ``M + 1 - j`` holds an exchangeable truth
    with probability ``1 - 2 j / (M + 1)``. The two intervals that bracket ``level`` are weighted
    so that the expectation is exactly ``level`` for every M.

    Raises:
        ValueError: ``level`` is outside 1 / (M + 1) .. (M - 1) / (M + 1).
    """
    check_ensemble(ensemble, truth)
    num = len(ensemble)
    outside = (1 - level) / 2 * (num + 1)
    if not 1 <= level * (num + 1) <= num - 1:
        raise ValueError(
            f"a central interval of {level:g} cannot be taken from {num} members: the levels are "
            f"1/{num + 1} to {num - 1}/{num + 1}; choose such a level or more members"
        )
    not_above = (ensemble <= truth).sum(0)
    not_below = (ensemble >= truth).sum(0)
    inner = int(outside)  # the wider interval ends at the order statistics j and M + 1 - j
    wide, narrow = (
        ((not_above >= j) & (not_below >= j) & (2 * j <= num)).to(truth.dtype)
        for j in (inner, inner + 1)
    )
    share = outside - inner
    return _mean_points((1 - share) * wide + share * narrow, 1)


# ---- roots and ratios: functions of means over samples ------------------------------------------


def diverged(ensemble: Tensor) -> float:
    """Compute the share of members and samples (M, S, ...) with a value that is not finite."""
    return float(1 - ensemble.isfinite().flatten(1).all(1).double().mean())


def spread(variance: Tensor) -> Tensor:
    """Compute the root of the mean variance."""
    return variance.clamp_min(0).sqrt()


def spread_skill(variance: Tensor, mean_mse: Tensor, members: int) -> Tensor:
    """Divide spread by the error of the ensemble mean; 1 for a calibrated ensemble of any size.

    Args:
        variance: mean over samples of :func:`variance`, of any shape, e.g. per shell.
        mean_mse: mean over samples of :func:`mean_mse`, same shape.
        members: ensemble size M. For a calibrated ensemble ``mean_mse`` is (M + 1) / M times the
            variance in expectation.
    """
    return ((members + 1) / members * variance / mean_mse).sqrt()


def spread_ratio(variance: Tensor, reference: Tensor) -> Tensor:
    """Divide the spread by that of a reference law or ensemble, from their mean variances."""
    return (variance / reference).sqrt()


def crps_ratio(crps: Tensor, reference: Tensor) -> Tensor:
    """Divide the CRPS by the reference's; at least 1 in expectation for the exact law."""
    return crps / reference


def distance(spectrum: Tensor, truth: Tensor) -> Tensor:
    """Compute the relative L2 distance of two spectra (..., shells); returns (...)."""
    return ((spectrum - truth).square().sum(-1) / truth.square().sum(-1)).sqrt()


def energy_ratio(energy: Tensor, truth: Tensor) -> Tensor:
    """Divide the mean square of the members by that of the truth, in total or per shell."""
    return energy / truth


# ---- time and distributions -------------------------------------------------------------------


def valid_time(error: Tensor, times: Tensor, threshold: float = 0.5) -> Tensor:
    """Find the time at which a growing error first reaches a threshold, interpolated linearly.

    Args:
        error: relative error at each time (..., L); a value that is not finite counts as above.
        times: (L,) increasing.
        threshold: relative error at which the forecast ends.

    Returns:
        (...); the last time if the threshold is never reached.
    """
    error = torch.where(error.isfinite(), error, torch.inf)
    above = error >= threshold
    first = above.to(torch.int8).argmax(-1)
    before = (first - 1).clamp_min(0)
    low = error.gather(-1, before[..., None])[..., 0]
    high = error.gather(-1, first[..., None])[..., 0]
    share = ((threshold - low) / (high - low)).nan_to_num(nan=0.0).clamp(0, 1)
    crossing = times[before] + share * (times[first] - times[before])
    return torch.where(above.any(-1), crossing, times[-1])


def wasserstein1(first: Tensor, second: Tensor) -> Tensor:
    """Compute the Wasserstein-1 distance of two samples of any sizes: area between their CDFs."""
    first, second = first.flatten().sort().values, second.flatten().sort().values
    if len(first) == len(second):  # mean distance of the quantiles
        return (first - second).abs().mean()
    both = torch.cat((first, second)).sort().values
    first_cdf, second_cdf = (
        torch.searchsorted(part, both[:-1], right=True).to(both.dtype) / len(part)
        for part in (first, second)
    )
    return ((first_cdf - second_cdf).abs() * both.diff()).sum()
