"""Test by rank histograms whether the truth is exchangeable with the members.

If the forecast law is the true one, the rank of the truth among M members is uniform on 0..M. The
chi-squared test of uniformity needs *independent* ranks. Neighbouring grid points are correlated,
so with pooled pixels every test would fail. Therefore ranks are computed for coordinates that are
independent under the law (Fourier modes of a stationary law: "whitened modes"), or for one pixel
per field.

The number of ranks N determines the power. With 13 bins and a spread that is wrong by the factor
1 - e the non-centrality is about 1.6 e^2 N. For N = 20,000 it is 80 at e = 5 % (the test fails
almost surely with 12 degrees of freedom) and 3 at e = 1 % (the test usually passes). More ranks
would reject irrelevant errors; far fewer would accept everything.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hpc_closure.evaluate.scores.record import CALIBRATION, Score
from hpc_closure.evaluate.scores.spectra import shell_numbers, transform

MAX_RANKS = 20_000
MAX_BINS = 13
LEVEL = 0.01  # p-value below which a rank histogram fails
POWER = 0.8  # probability of failing at a spread error that counts as detectable
LARGEST = 0.9  # largest spread error that is considered
REQUIRES = "several members, at least five ranks expected in each bin"
SCORES = (
    Score(
        name="rank_p",
        heading="rank p",
        meaning="p-value of the rank histogram of whitened modes (or of one pixel per field); "
        "small if not calibrated",
        table=CALIBRATION,
        requires=REQUIRES,
    ),
    Score(
        name="rank_power",
        heading="detectable error",
        meaning="least relative error of the spread that the rank test detects with power 0.8, "
        "for this number of ranks",
        table=CALIBRATION,
        requires=REQUIRES,
    ),
)


def ranks(ensemble: Tensor, truth: Tensor, generator: torch.Generator) -> Tensor:
    """Rank the truth among the members; ties are broken at random.

    Args:
        ensemble: (M, ...).
        truth: (...).
        generator: CPU generator for the ties.

    Returns:
        (...) int64 in 0..M, on the CPU.
    """
    below = (ensemble < truth).sum(0).cpu()
    ties = (ensemble == truth).sum(0).cpu()
    share = torch.rand(ties.shape, generator=generator, dtype=torch.float64)
    return below + (share * (ties + 1)).long()


def rank_counts(values: Tensor, members: int) -> Tensor:
    """Count ranks 0..M; returns the histogram (M + 1,)."""
    return torch.bincount(values.flatten(), minlength=members + 1)


def merge(counts: Tensor, max_bins: int = MAX_BINS) -> tuple[Tensor, Tensor]:
    """Join neighbouring ranks into at most ``max_bins`` bins of (nearly) equal width.

    Returns:
        Counts and number of ranks of each bin, both (bins,).
    """
    index, widths = _bins(len(counts), max_bins)
    merged = torch.zeros(len(widths), dtype=torch.float64)
    return merged.index_add_(0, index, counts.double().cpu()), widths


def _bins(num: int, max_bins: int) -> tuple[Tensor, Tensor]:
    """Return the bin of each of ``num`` ranks and the number of ranks in each bin."""
    bins = min(max_bins, num)
    index = torch.arange(num) * bins // num
    return index, torch.bincount(index, minlength=bins)


def rank_p(counts: Tensor, max_bins: int = MAX_BINS) -> float:
    """Compute the chi-squared p-value of a rank histogram (M + 1,) against the uniform law.

    Returns:
        p in [0, 1]; NaN if fewer than five ranks are expected in a bin.
    """
    total = float(counts.sum())
    # fewer bins for few ranks: the statistic is chi-squared only with several ranks in each bin
    merged, widths = merge(counts, max(2, min(max_bins, int(total / 10))))
    expected = total * widths.double() / len(counts)
    if float(expected.min()) < 5:
        return float("nan")
    statistic = ((merged - expected).square() / expected).sum()
    freedom = torch.tensor(len(merged) - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


@lru_cache(maxsize=256)
def detectable_error(number: int, members: int, max_bins: int = MAX_BINS) -> float:
    """Compute the least relative spread error e that :func:`rank_p` detects at power POWER.

    The law is Gaussian and the ensemble's standard deviation is 1 - e times the right one. Under
    the condition of the truth's quantile the rank is binomial. This gives the probabilities of the
    bins, hence mean and variance of the statistic, which is approximated as normal.

    Args:
        number: number of independent ranks.
        members: ensemble size M.
        max_bins: as in :func:`rank_p`.

    Returns:
        e; NaN if not even an error of LARGEST is detected, or if there are too few ranks for a
        test.
    """
    from scipy.optimize import brentq
    from scipy.stats import binom, chi2, norm

    index_of_rank, widths = _bins(members + 1, max(2, min(max_bins, int(number / 10))))
    even = widths.numpy() / (members + 1)
    if number * even.min() < 5:
        return math.nan
    z = np.linspace(-8, 8, 1601)
    weight = norm.pdf(z) / norm.pdf(z).sum()
    freedom = len(even) - 1
    refused = chi2.isf(LEVEL, freedom)

    def lacks(error: float) -> float:
        u = norm.cdf(z / (1 - error)).clip(1e-9, 1 - 1e-9)
        rank = binom.pmf(np.arange(members + 1)[:, None], members, u)
        share = np.bincount(index_of_rank.numpy(), rank @ weight)
        off = (share - even) / even
        mean = (share * (1 - share) / even).sum() + number * (off**2 * even).sum()
        spread = 4 * number * ((off**2 * share).sum() - (off * share).sum() ** 2) + 2 * freedom
        return POWER - norm.sf((refused - mean) / spread**0.5)

    return float(brentq(lacks, 1e-3, LARGEST)) if lacks(LARGEST) < 0 < lacks(1e-3) else math.nan


def fourier_coordinates(fields: Tensor, max_shell: int) -> Tensor:
    """Compute real coordinates that are independent under any stationary Gaussian law.

    The coordinates are real and imaginary parts of one mode of each pair (k, -k) in shells
    0..max_shell. They remain independent when the law is conditioned on a regular m x m lattice of
    sensors with ``max_shell < m / 2``, because such sensors couple k only to k + m j.

    Args:
        fields: (..., n, n).
        max_shell: highest shell, below n / 2.

    Returns:
        (..., coordinates).

    Raises:
        ValueError: ``max_shell`` is not in 0..(n - 1) / 2.
    """
    size = fields.shape[-1]
    if not 0 <= max_shell < size / 2:
        raise ValueError(f"max_shell {max_shell} is not in 0..{(size - 1) // 2} of a {size} grid")
    shells = shell_numbers((size, size))
    row = torch.arange(size)[:, None]
    column = torch.arange(size // 2 + 1)[None]
    half = (column > 0) | (row < size / 2)  # on ky = 0 the rows kx < 0 repeat the rows kx > 0
    keep = ((shells <= max_shell) & half).flatten().nonzero()[:, 0].to(fields.device)
    chosen = transform(fields, 2).flatten(-2)[..., keep]
    return torch.cat((chosen.real, chosen.imag[..., 1:]), -1)  # k = 0 has no imaginary part
