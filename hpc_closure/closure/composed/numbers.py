r"""A mean of the largest modes by functions of single numbers of the state, in closed form.

A mean that a network learns from some thousand draws has an error of some thousandths of the
variance that is the same from call to call: a coupled run adds it up, while noise averages out.
Where the mean follows a few numbers of the state, few coefficients say as much with an error that
is smaller by their number over that of the weights. Candidates are smooth functions, a line and
steps, of each of the numbers of :meth:`Band.summary`. For every one of the 25 numbers of the
largest modes some are chosen one after another, as long as the extended Bayesian information
criterion falls (Chen, Chen, Biometrika 95 (2008) 759).
"""

import math

import torch
from torch import Tensor

from hpc_closure.closure.fields.modes import LARGEST
from hpc_closure.closure.reductions import Reader

__all__ = ["NumberMean", "candidates"]

SLOPES, PLACES = (1.0, 2.0, 4.0), (-1.0, -0.5, 0.0, 0.5, 1.0)  # of steps, in scales
MOST = 8  # terms of one number of the closure
BEYOND = 6.0  # scales at which a number is held
RIDGE = 1e-9


def candidates(numbers: Tensor) -> Tensor:
    """Functions (B, 1 + 16 x 51) of numbers (B, 51) that are about one in size; the first is 1."""
    x = numbers.clamp(-BEYOND, BEYOND)
    steps = [torch.tanh(slope * (x - place)) for slope in SLOPES for place in PLACES]
    return torch.cat([torch.ones_like(x[:, :1]), x, *steps], dim=-1)


class NumberMean:
    """Sums from which the coefficients follow."""

    def __init__(self) -> None:
        self.number = 0
        self.gram: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0
        self.square: Tensor | float = 0.0

    def add(self, numbers: Tensor, largest: Tensor) -> None:
        """Take in numbers (B, 51) of states and (B, 25) of what is left of their closures."""
        terms, largest = candidates(numbers.double()), largest.double()
        self.gram = self.gram + (terms.mT @ terms).cpu()
        self.cross = self.cross + (terms.mT @ largest).cpu()
        self.square = self.square + largest.square().sum(0).cpu()
        self.number += len(numbers)

    def coefficients(self, reader: Reader) -> Tensor:
        """(terms, 25) float64, most of them zero; all of them where nothing is worth a term."""
        gram, cross, square, number = reader.sum(self.gram, self.cross, self.square, self.number)
        out = torch.zeros_like(cross)
        scale = gram.diagonal().clamp(min=1e-300).sqrt()
        gram, cross = gram / scale / scale[:, None], cross / scale[:, None]
        price = math.log(number) + 2 * math.log(len(gram))
        for place in range(LARGEST):
            if float(square[place]) <= 0:
                continue
            chosen, found = _chosen(gram, cross[:, place], float(square[place]), number, price)
            if chosen:
                out[chosen, place] = found / scale[chosen]
        return out


def _chosen(
    gram: Tensor, cross: Tensor, square: float, number: int, price: float
) -> tuple[list[int], Tensor]:
    """Terms by forward selection, and their coefficients."""
    chosen: list[int] = []
    found, left = torch.zeros(0, dtype=torch.float64), square
    while len(chosen) < MOST:
        # what each further term would explain, once the chosen ones are taken out of it
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
        after = left - float(gain[best])
        if after <= 0 or number * math.log(left / after) < price:
            break
        chosen.append(best)
        left = after
        block = gram[chosen][:, chosen] + RIDGE * torch.eye(len(chosen))
        found = torch.linalg.solve(block, cross[chosen])
    return chosen, found
