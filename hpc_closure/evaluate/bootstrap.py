"""Intervals by block bootstrap.

Snapshots of one trajectory are not independent, trajectories are: whole trajectories are drawn
with replacement, and the score is computed again from the means of its per-sample values. With
few trajectories (the published test set has five) the interval is a rough one and too narrow.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

MIN_BLOCKS = 4  # fewer blocks say nothing about their spread

Means = Mapping[str, Tensor]


def block_bootstrap(
    values: Mapping[str, Tensor],
    blocks: Tensor,
    formula: Callable[[Means], Tensor],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """A score of means over samples, with its percentile interval.

    Args:
        values: per-sample values by name, each (S, ...).
        blocks: (S,) block of each sample, any integers.
        formula: from the means by name, each (...) or (resamples, ...), to the score.
        resamples: bootstrap draws.
        level: probability of the interval.
        seed: of the draws; the same blocks are drawn for every score.

    Returns:
        value, low, high, each with the shape of the score; low and high are NaN for fewer than
        four blocks.
    """
    names, index = torch.unique(blocks.cpu(), return_inverse=True)
    sums = {
        name: part.new_zeros(len(names), *part.shape[1:]).index_add_(0, index, part)
        for name, part in values.items()
    }
    counts = torch.bincount(index, minlength=len(names)).double()
    value = formula({name: part.sum(0) / counts.sum() for name, part in sums.items()})
    if len(names) < MIN_BLOCKS:
        return value, torch.full_like(value, torch.nan), torch.full_like(value, torch.nan)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(names), (resamples, len(names)), generator=generator)
    weights = torch.zeros(drawn.shape, dtype=torch.float64)
    weights = weights.scatter_add_(1, drawn, torch.ones_like(weights))
    weights = weights / (weights @ counts)[:, None]
    scores = formula({name: torch.tensordot(weights, part, dims=1) for name, part in sums.items()})
    low, high = (scores.nanquantile((1 + sign * level) / 2, dim=0) for sign in (-1, 1))
    return value, low, high
