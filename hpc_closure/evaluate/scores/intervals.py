"""Compute intervals from independent blocks of samples.

Snapshots of one trajectory are dependent, trajectories are independent. Therefore a score is
recomputed with each trajectory left out (delete-one jackknife; Efron & Stein, Ann. Stat. 9 (1981)
586). The ends follow from Student's law, whose degrees of freedom are the number of trajectories
less one. If a score is positive in all of these, the interval is computed for its logarithm,
because scores are skewed like the errors of which they are means. Nominal 95 % intervals cover the
truth in 89 to 97 % of cases (``tests/test_evaluate_intervals.py``). Percentiles of a bootstrap
over so few blocks cover it far less often.
"""

import math
from collections.abc import Callable, Mapping

import torch
from scipy.special import stdtrit
from torch import Tensor

MIN_BLOCKS = 4  # the spread of fewer blocks cannot be estimated

Means = Mapping[str, Tensor]


def interval_columns(
    values: Mapping[str, Tensor],
    blocks: Tensor,
    formula: Callable[[Means], Tensor],
    *,
    signed: bool = False,
) -> dict[str, float]:
    """Return columns ``value, low, high`` of a scalar score, by :func:`block_interval`."""
    interval = block_interval(values, blocks, formula, signed=signed)
    return dict(zip(("value", "low", "high"), map(float, interval), strict=True))


def block_interval(
    values: Mapping[str, Tensor],
    blocks: Tensor,
    formula: Callable[[Means], Tensor],
    *,
    level: float = 0.95,
    signed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Form a score from means over samples and compute its interval.

    Args:
        values: values per sample by name, each (S, ...).
        blocks: block of each sample (S,), any integers.
        formula: maps the means by name, each (...) or (blocks, ...), to the score.
        level: probability of the interval.
        signed: the score may have either sign; its interval is never on the logarithm.

    Returns:
        value, low and high, each in the shape of the score; low and high are NaN for fewer than
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
        """Return half the width of the interval."""
        error = math.sqrt((number - 1) / number) * (replicates - replicates.mean(0)).norm(dim=0)
        return quantile * error

    positive = (value > 0) & (without > 0).all(0) & (not signed)
    factor = half(without.clamp_min(torch.finfo(without.dtype).tiny).log()).exp()
    low = torch.where(positive, value / factor, value - half(without))
    high = torch.where(positive, value * factor, value + half(without))
    return value, low, high
