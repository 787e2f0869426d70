"""Exponential moving average of the weights, in float32, of the part each process holds."""

import torch
from torch import Tensor


class Average:
    """a <- a + (1 - d) (w - a) with d = min(decay, (1 + t) / (10 + t)): the start is forgotten.

    Args:
        weights: by name; ``decay`` = 0 makes the average the latest weights.
    """

    def __init__(self, weights: dict[str, Tensor], decay: float):
        self.decay = decay
        self.tensors = {key: value.detach().float().clone() for key, value in weights.items()}

    @torch.no_grad()
    def update(self, weights: dict[str, Tensor], step: int) -> None:
        """Take in the weights after ``step`` steps of the phase (1, 2, ...)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.tensors.values()), [weights[key] for key in self.tensors], 1 - decay
        )
