"""Symmetries of the equation on a periodic grid: more samples from the same trajectories.

A map of the square (one of its 8 rotations and reflections, then a translation by grid points)
takes solutions to solutions when it maps the forcing to itself. Vorticity and its closures are
pseudo-scalars: a reflection changes their sign. The laws of the noise are homogeneous and
isotropic and need no check; the forcing is checked point by point, so that nothing has to be known
about it.
The published one, 0.1 (sin + cos)(2 pi (x + y)), leaves one direction of translation,
(x, y) -> (x + s, y - s), and four of the maps, each at a fitting shift.
"""

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.counters import key_of, uniform_bits

MAPS = tuple((turn, row, column) for turn in (0, 1) for row in (1, -1) for column in (1, -1))
STREAM = 11


class Symmetry:
    """The maps that leave a forcing unchanged.

    Args:
        forcing: (n, n) steady forcing of the vorticity on the training grid.
        reflections: False keeps translations only (a planet's rotation tells left from right).
    """

    def __init__(self, forcing: np.ndarray, reflections: bool = True):
        self.size = forcing.shape[-1]
        rows = []
        for number, chosen in enumerate(MAPS if reflections else MAPS[:1]):
            for shift_x, shift_y in _fitting_shifts(forcing, *chosen):
                rows.append((number, shift_x, shift_y))
        self.elements = np.array(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.elements)

    def draw(self, seed: int, first: int, count: int) -> np.ndarray:
        """Elements (count, 3) of the samples at stream positions ``first ...``."""
        words = uniform_bits(key_of(seed, "symmetry", 0), STREAM, first, count)[::4]
        return self.elements[words % np.uint64(len(self))]

    def apply(self, field: Tensor, elements: np.ndarray) -> Tensor:
        """Map fields (b, ..., n, n), one element each."""
        turn, row, column = (
            torch.as_tensor([MAPS[number][part] for number in elements[:, 0]], device=field.device)
            for part in range(3)
        )
        shift_x, shift_y = torch.as_tensor(elements[:, 1:].T, device=field.device)
        points = torch.arange(self.size, device=field.device)
        i = (row[:, None] * (points - shift_x[:, None])) % self.size
        j = (column[:, None] * (points - shift_y[:, None])) % self.size
        # value at (x, y) comes from (i, j), or from (j, i) where the axes are exchanged
        i, j = i[:, :, None], j[:, None, :]
        exchanged = turn[:, None, None].bool()
        source = torch.where(exchanged, j * self.size + i, i * self.size + j)
        flat = field.flatten(-2).flatten(1, -2) if field.ndim > 3 else field.flatten(-2)[:, None]
        out = flat.gather(-1, source.flatten(1)[:, None].expand_as(flat))
        sign = (1 - 2 * turn) * row * column
        return (out * sign[:, None, None].to(field.dtype)).view_as(field)


def _fitting_shifts(forcing: np.ndarray, turn: int, row: int, column: int) -> np.ndarray:
    """Shifts (m, 2) after which a mapped forcing equals itself: of the largest correlation."""
    size = forcing.shape[-1]
    index = np.arange(size)
    mapped = (forcing.T if turn else forcing)[np.ix_(row * index % size, column * index % size)]
    mapped = mapped * (1 - 2 * turn) * row * column
    norm = float((forcing**2).sum())
    correlation = np.fft.irfft2(
        np.fft.rfft2(forcing) * np.conj(np.fft.rfft2(mapped)), s=forcing.shape
    )
    # |f - shifted g|^2 = 2 |f|^2 - 2 correlation
    return np.argwhere(norm - correlation <= 1e-9 * norm)
