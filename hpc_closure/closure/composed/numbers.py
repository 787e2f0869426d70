"""Mean of the largest modes as a sum of functions of summary numbers of the state, in closed form.

A network that learns a mean from some thousand draws has an error of some thousandths of the
variance. The error is the same in every call, so a coupled run accumulates it, while noise
averages out. If the mean depends on few summary numbers of the state, few coefficients suffice.
Their error is smaller by the ratio of their number to that of a network's weights.

Candidates are smooth functions, a line and steps, of each of the numbers of :meth:`Band.summary`.
For each of the 25 numbers of the largest modes, terms are added one after another as long as the
extended Bayesian information criterion decreases (Chen, Chen, Biometrika 95 (2008) 759).
"""

import math

import torch
from torch import Tensor

from hpc_closure.closure.reductions import Reader

__all__ = ["NumberMean", "candidates"]

SLOPES, PLACES = (1.0, 2.0, 4.0), (-1.0, -0.5, 0.0, 0.5, 1.0)  # of steps, in scales
MOST = 8  # largest number of terms for one number of the closure
BEYOND = 6.0  # bound of a number, in scales
RIDGE = 1e-9


def candidates(numbers: Tensor) -> Tensor:
    """Compute candidate functions (B, 1 + 16 x 51) of scaled numbers (B, 51); the first is 1."""
    x = numbers.clamp(-BEYOND, BEYOND)
    steps = [torch.tanh(slope * (x - place)) for slope in SLOPES for place in PLACES]
    return torch.cat([torch.ones_like(x[:, :1]), x, *steps], dim=-1)


class NumberMean:
    """Sums of the normal equations of the coefficients."""

    def __init__(self) -> None:
        self.number = 0
        self.gram: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0
        self.square: Tensor | float = 0.0

    def add(self, numbers: Tensor, largest: Tensor) -> None:
        """Add numbers (B, 51) of states, and residuals (B, 25) of their closures."""
        terms, largest = candidates(numbers.double()), largest.double()
        self.gram = self.gram + (terms.mT @ terms).cpu()
        self.cross = self.cross + (terms.mT @ largest).cpu()
        self.square = self.square + largest.square().sum(0).cpu()
        self.number += len(numbers)

    def coefficients(self, reader: Reader) -> Tensor:
        """Compute coefficients (terms, 25), float64; most are zero, or all if no term pays."""
        gram, cross, square, number = reader.sum(self.gram, self.cross, self.square, self.number)
        out = torch.zeros_like(cross)
        scale = gram.diagonal().clamp(min=1e-300).sqrt()
        gram, cross = gram / scale / scale[:, None], cross / scale[:, None]
        price = math.log(number) + 2 * math.log(len(gram))
        for place in range(len(square)):
            if float(square[place]) <= 0:
                continue
            chosen, values = _select(gram, cross[:, place], float(square[place]), number, price)
            if chosen:
                out[chosen, place] = values / scale[chosen]
        return out


def _select(
    gram: Tensor, cross: Tensor, square: float, number: int, price: float
) -> tuple[list[int], Tensor]:
    """Select terms by forward selection; returns them and their coefficients."""
    chosen: list[int] = []
    values, remaining = torch.zeros(0, dtype=torch.float64), square
    while len(chosen) < MOST:
        # variance that each further term explains after projection on the chosen ones
        if chosen:
            inverse = torch.linalg.inv(gram[chosen][:, chosen] + RIDGE * torch.eye(len(chosen)))
            over = gram[:, chosen] @ inverse
            rest = cross - over @ cross[chosen]
            size = 1.0 - (over * gram[:, chosen]).sum(1)
        else:
            rest, size = cross, torch.ones_like(cross)
        gain = torch.where(size > 1e-4, rest.square() / size.clamp(min=1e-4), 0.0)
        gain[chosen] = 0.0
        best = int(gain.argmax())
        after = remaining - float(gain[best])
        if after <= 0 or number * math.log(remaining / after) < price:
            break
        chosen.append(best)
        remaining = after
        block = gram[chosen][:, chosen] + RIDGE * torch.eye(len(chosen))
        values = torch.linalg.solve(block, cross[chosen])
    return chosen, values
