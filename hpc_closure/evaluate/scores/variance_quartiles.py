"""Select the quarters of all scored points with the least and the largest exact variance.

If the exact variance depends on the flow, the spread can be right in total although the model
ignores the state. Therefore points of all snapshots are sorted together by the law's pointwise
variance; ``low_variance`` is the quarter with the least variance, ``high_variance`` that with
the largest.
"""

from collections.abc import Callable

import torch
from torch import Tensor

APART = 1.01  # least ratio of the quarters' edges at which a variance depends on the state
SORTED = 2**24  # largest number of points that are sorted


class Quarters:
    """Masks of the quarters of least and largest variance of the law.

    Args:
        variance: indices (s,) of snapshots -> the law's pointwise variance (s, n, n).
        samples: number of snapshots.
        step: number of snapshots whose variance is computed at once.
    """

    def __init__(self, variance: Callable[[Tensor], Tensor], samples: int, step: int):
        self.variance = variance
        parts, skip = [], 1
        for start in range(0, samples, step):
            block = variance(torch.arange(start, min(start + step, samples))).cpu()
            skip = max(1, -(-samples * block[0].numel() // SORTED))
            parts.append(block.flatten()[::skip].double())
        ordered = torch.cat(parts).sort().values
        quarter = len(ordered) // 4
        self.low, self.high = float(ordered[quarter - 1]), float(ordered[-quarter])

    @classmethod
    def of(
        cls, variance: Callable[[Tensor], Tensor] | None, samples: int, step: int
    ) -> "Quarters | None":
        """Build the quarters; None if the variance is unknown or hardly depends on the state."""
        if variance is None:
            return None
        quarters = cls(variance, samples, step)
        return quarters if quarters.high > APART * quarters.low else None

    def at(self, indices: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return {name: (mask, the law's variance)} for some snapshots, both (s, n, n)."""
        variance = self.variance(indices).double()
        return {
            "low_variance": (variance <= self.low, variance),
            "high_variance": (variance >= self.high, variance),
        }
