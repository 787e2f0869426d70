"""Intervals from blocks of samples that are independent of each other.

Snapshots of one trajectory are not independent, trajectories are. So a score is computed again
with each trajectory left out in turn (delete-one jackknife; Efron & Stein, Ann. Stat. 9 (1981)
586), and Student's law with one degree of freedom less than there are trajectories gives the ends.
A score that is positive in all of these gets its interval on the logarithm: scores are skewed like
the errors that they are means of. Such an interval holds the truth 89 to 97 % of the time
(``tests/test_evaluate_intervals.py``); percentiles of a bootstrap over so few blocks do so far too
seldom.
"""

import math
from collections.abc import Callable, Mapping

import torch
from scipy.special import stdtrit
from torch import Tensor

MIN_BLOCKS = 4  # fewer blocks say nothing about their spread

Means = Mapping[str, Tensor]


def interval_columns(
    values: Mapping[str, Tensor],
    blocks: Tensor,
    formula: Callable[[Means], Tensor],
    *,
    signed: bool = False,
) -> dict[str, float]:
    """Columns ``value, low, high`` of a single number, by :func:`block_interval`."""
    found = block_interval(values, blocks, formula, signed=signed)
    return dict(zip(("value", "low", "high"), map(float, found), strict=True))


def block_interval(
    values: Mapping[str, Tensor],
    blocks: Tensor,
    formula: Callable[[Means], Tensor],
    *,
    level: float = 0.95,
    signed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """A score of means over samples, with its interval.

    Args:
        values: per-sample values by name, each (S, ...).
        blocks: (S,) block of each sample, any integers.
        formula: from the means by name, each (...) or (blocks, ...), to the score.
        level: probability of the interval.
        signed: the score may be of either sign, and is never taken on its logarithm.

    Returns:
        value, low, high, each with the shape of the score; low and high are NaN for fewer than
        four blocks.
    """
    names, index = torch.unique(blocks.cpu(), return_inverse=True)
    number = len(names)
    sums = {
        name: part.new_zeros(number, *part.shape[1:]).index_add_(0, index, part)
        for name, part in values.items()
    }
    counts = torch.bincount(index, minlength=number).double()
    value = formula({name: part.sum(0) / counts.sum() for name, part in sums.items()})
    if number < MIN_BLOCKS:
        return value, torch.full_like(value, torch.nan), torch.full_like(value, torch.nan)
    left = counts.sum() - counts
    without = formula(
        {
            name: (part.sum(0) - part) / left.view(-1, *[1] * (part.ndim - 1))
            for name, part in sums.items()
        }
    )
    quantile = float(stdtrit(number - 1, (1 + level) / 2))

    def half(replicates: Tensor) -> Tensor:
        """Half the width of the interval."""
        error = math.sqrt((number - 1) / number) * (replicates - replicates.mean(0)).norm(dim=0)
        return quantile * error

    positive = (value > 0) & (without > 0).all(0) & (not signed)
    factor = half(without.clamp_min(torch.finfo(without.dtype).tiny).log()).exp()
    low = torch.where(positive, value / factor, value - half(without))
    high = torch.where(positive, value * factor, value + half(without))
    return value, low, high
