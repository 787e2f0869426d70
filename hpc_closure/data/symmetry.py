"""Symmetries of the equation on a periodic grid: more samples from the same trajectories.

A map of the square (one of its 8 rotations and reflections, then a translation by grid points)
takes solutions to solutions when it leaves the equation, its forcing and the law of its noise.
Vorticity and its closures are pseudo-scalars: a reflection changes their sign.

* Advection, viscosity and drag are left by every map. A beta plane is left by translations and by
  (x, y) -> (x, -y): there the planetary vorticity beta y changes its sign as w does, while a map
  that turns x over or exchanges the axes takes beta v to another term. The equation tells
  (:meth:`~hpc_closure.spectral.equations.base.Equation.leaves`).
* The forcing is checked point by point, so that nothing has to be known about it. The published
  one, 0.1 (sin + cos)(2 pi (x + y)), leaves one direction of translation, (x + s, y - s), and four
  of the maps, each at a fitting shift.
* A subgrid closure given the flow does not see a forcing, which acts on resolved scales: its
  samples have the symmetries of the equation without one. What follows a state does not.
* A law of noise that is homogeneous and isotropic on the square is left by every map; one that is
  not tells the fields that mark places in it
  (:meth:`~hpc_closure.spectral.noise.paths.Noise.marks`), and these are checked as the forcing is.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.equations import Equation
from hpc_closure.spectral.modes.grid import Grid
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.noise.counters import key_of, uniform_bits

# (axes exchanged, sign of x, sign of y)
MAPS = tuple((turn, row, column) for turn in (0, 1) for row in (1, -1) for column in (1, -1))
STREAM = 11


class Symmetry:
    """The maps that leave some fields unchanged.

    Args:
        fields: pseudo-scalars (n, n) on the training grid, such as the steady forcing.
        maps: those of ``MAPS`` that come into question.
    """

    def __init__(self, fields: Sequence[np.ndarray], maps: Sequence[tuple] = MAPS):
        self.size = fields[0].shape[-1]
        rows = []
        for chosen in maps:
            fitting = np.logical_and.reduce([_fitting_shifts(one, *chosen) for one in fields])
            rows += [(MAPS.index(chosen), *shift) for shift in np.argwhere(fitting)]
        self.elements = np.array(rows, dtype=np.int64)

    @classmethod
    def of(cls, equation: Equation, size: int, forced: bool = True) -> "Symmetry":
        """The maps of a grid of ``size`` points per side that leave an equation.

        Where not ``forced``, those that leave it but for its forcing.
        """
        grid = Grid(size, equation.length)
        spectrum = equation.forcing.spectrum(grid) * forced
        forcing = Transform(grid).to_physical(spectrum[None])[0]
        fields = [one.numpy() for one in (forcing, *equation.noise.marks(grid))]
        return cls(fields, [one for one in MAPS if equation.leaves(*one)])

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


def _fitting_shifts(field: np.ndarray, turn: int, row: int, column: int) -> np.ndarray:
    """Whether a mapped field equals itself after each shift (n, n): of the largest correlation."""
    size = field.shape[-1]
    index = np.arange(size)
    mapped = (field.T if turn else field)[np.ix_(row * index % size, column * index % size)]
    mapped = mapped * (1 - 2 * turn) * row * column
    norm = float((field**2).sum())
    correlation = np.fft.irfft2(np.fft.rfft2(field) * np.conj(np.fft.rfft2(mapped)), s=field.shape)
    # |f - shifted g|^2 = 2 |f|^2 - 2 correlation
    return norm - correlation <= 1e-9 * norm
