"""What training through the solver changes of closed forms: noise and terms, shell by shell."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Adjusted", "Adjustment"]


class Adjusted(NamedTuple):
    """Factors of the closed forms.

    Attributes:
        noise: (shells,) of the standard deviation of the base law.
        terms: (terms, shells) of the coefficients of the regression.
    """

    noise: Tensor
    terms: Tensor


class Adjustment(nn.Module):
    """Starts as no change.

    Args:
        terms: number of the regression's.
        shells: number of them.
        noise: there is noise whose size can be trained.
    """

    def __init__(self, terms: int, shells: int, noise: bool = True):
        super().__init__()
        self.log_noise: Tensor
        log_noise = torch.zeros(shells)
        if noise:
            self.log_noise = nn.Parameter(log_noise)
        else:
            self.register_buffer("log_noise", log_noise)
        self.terms = nn.Parameter(torch.zeros(terms, shells))

    def forward(self) -> Adjusted:
        return Adjusted(self.log_noise.exp(), 1 + self.terms)

    def __str__(self) -> str:
        noise, terms = (part.detach() for part in self())
        most = float((terms - 1).abs().max()) if terms.numel() else 0.0
        return f"noise x {noise.min():.2f} to {noise.max():.2f}, terms by up to {most:.0%}"
