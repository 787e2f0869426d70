"""The quarter of all scored points where the exact law spreads least, and most.

A law whose variance follows the flow can be right in total and wrong wherever it matters: the
total says nothing of a model that ignores the state. Points and snapshots are sorted together by
the law's pointwise variance; ``calm`` are the quarter with the least, ``wild`` with the most.
"""

from collections.abc import Callable

import torch
from torch import Tensor

APART = 1.01  # least ratio of the quarters' edges at which a variance depends on the state
SORTED = 2**24  # points that are sorted at most


class Quarters:
    """Where the law spreads least and most.

    Args:
        variance: indices (s,) of snapshots -> the law's pointwise variance (s, n, n).
        samples: number of snapshots.
        step: snapshots at a time.
    """

    def __init__(self, variance: Callable[[Tensor], Tensor], samples: int, step: int):
        self.variance = variance
        parts, skip = [], 1
        for start in range(0, samples, step):
            found = variance(torch.arange(start, min(start + step, samples))).cpu()
            skip = max(1, -(-samples * found[0].numel() // SORTED))
            parts.append(found.flatten()[::skip].double())
        ordered = torch.cat(parts).sort().values
        quarter = len(ordered) // 4
        self.low, self.high = float(ordered[quarter - 1]), float(ordered[-quarter])

    @classmethod
    def of(
        cls, variance: Callable[[Tensor], Tensor] | None, samples: int, step: int
    ) -> "Quarters | None":
        """The quarters; None where the variance is not known or hardly depends on the state."""
        if variance is None:
            return None
        quarters = cls(variance, samples, step)
        return quarters if quarters.high > APART * quarters.low else None

    def at(self, indices: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """{name: (mask, the law's variance)} on some snapshots, both (s, n, n)."""
        variance = self.variance(indices).double()
        return {
            "calm": (variance <= self.low, variance),
            "wild": (variance >= self.high, variance),
        }
