"""Symmetries of the equation on a periodic grid: more samples from the same trajectories.

A map of the square is one of its 8 rotations and reflections, then a translation by grid points.
It takes solutions to solutions if it leaves the equation, its forcing and the law of its noise
unchanged. Vorticity and its closures are pseudo-scalars: a reflection changes their sign.

* Every map leaves advection, viscosity and drag unchanged. Translations and (x, y) -> (x, -y)
  leave a beta plane unchanged: there the planetary vorticity beta y changes its sign as w does. A
  map that reflects x or exchanges the axes takes beta v to another term. The equation decides
  (:meth:`~hpc_closure.spectral.equations.base.Equation.is_symmetry`).
* The forcing is compared point by point, so nothing has to be known about it. The published
  forcing, 0.1 (sin + cos)(2 pi (x + y)), is unchanged by translations along one direction, (x + s,
  y - s), and by four of the maps, each with a fitting shift.
* A subgrid closure, conditioned on the flow, does not depend on a forcing that acts on resolved
  scales. Its samples have the symmetries of the equation without forcing. The states that follow a
  sample do not.
* Every map leaves a law of noise unchanged that is homogeneous and isotropic on the square.
  Another law returns fields with its symmetries
  (:meth:`~hpc_closure.spectral.noise.laws.Noise.symmetry_fields`), which are compared as the
  forcing is.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.equations import Equation
from hpc_closure.spectral.modes.grid import Grid
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.noise.counters import key_of, uniform_bits

# maps: (axes exchanged, sign of x, sign of y)
MAPS = tuple((turn, row, column) for turn in (0, 1) for row in (1, -1) for column in (1, -1))
STREAM = 11


class Symmetry:
    """The maps that leave some fields unchanged.

    Args:
        fields: pseudo-scalars (n, n) on the training grid, such as the steady forcing.
        maps: those of ``MAPS`` that are tested.
    """

    def __init__(self, fields: Sequence[np.ndarray], maps: Sequence[tuple] = MAPS):
        self.size = fields[0].shape[-1]
        rows = []
        for candidate in maps:
            fitting = np.logical_and.reduce(
                [_fitting_shifts(field, *candidate) for field in fields]
            )
            rows += [(MAPS.index(candidate), *shift) for shift in np.argwhere(fitting)]
        self.elements = np.array(rows, dtype=np.int64)

    @classmethod
    def of(cls, equation: Equation, size: int, forced: bool = True) -> "Symmetry":
        """Return the maps of a grid of ``size`` points per side that leave an equation unchanged.

        Args:
            equation: the equation, its forcing and its noise.
            size: points per side.
            forced: whether the map must leave the steady forcing unchanged as well.
        """
        grid = Grid(size, equation.length)
        spectrum = equation.forcing.spectrum(grid) * forced
        forcing = Transform(grid).to_physical(spectrum[None])[0]
        fields = [field.numpy() for field in (forcing, *equation.noise.symmetry_fields(grid))]
        return cls(fields, [candidate for candidate in MAPS if equation.is_symmetry(*candidate)])

    def __len__(self) -> int:
        return len(self.elements)

    def draw(self, seed: int, first: int, count: int) -> np.ndarray:
        """Draw elements (count, 3) for the samples at stream positions ``first ...``."""
        words = uniform_bits(key_of(seed, "symmetry", 0), STREAM, first, count)[::4]
        return self.elements[words % np.uint64(len(self))]

    def apply(self, field: Tensor, elements: np.ndarray) -> Tensor:
        """Map fields (b, ..., n, n), one element per field."""
        turn, row, column = (
            torch.as_tensor([MAPS[number][part] for number in elements[:, 0]], device=field.device)
            for part in range(3)
        )
        shift_x, shift_y = torch.as_tensor(elements[:, 1:].T, device=field.device)
        points = torch.arange(self.size, device=field.device)
        i = (row[:, None] * (points - shift_x[:, None])) % self.size
        j = (column[:, None] * (points - shift_y[:, None])) % self.size
        # the value at (x, y) comes from (i, j), or from (j, i) if the axes are exchanged
        i, j = i[:, :, None], j[:, None, :]
        exchanged = turn[:, None, None].bool()
        source = torch.where(exchanged, j * self.size + i, i * self.size + j)
        flat = field.flatten(-2).flatten(1, -2) if field.ndim > 3 else field.flatten(-2)[:, None]
        out = flat.gather(-1, source.flatten(1)[:, None].expand_as(flat))
        sign = (1 - 2 * turn) * row * column
        return (out * sign[:, None, None].to(field.dtype)).view_as(field)


def _fitting_shifts(field: np.ndarray, turn: int, row: int, column: int) -> np.ndarray:
    """Return for each shift (n, n) whether the mapped and shifted field equals the field.

    The test uses the correlation of the two.
    """
    size = field.shape[-1]
    index = np.arange(size)
    mapped = (field.T if turn else field)[np.ix_(row * index % size, column * index % size)]
    mapped = mapped * (1 - 2 * turn) * row * column
    norm = float((field**2).sum())
    correlation = np.fft.irfft2(np.fft.rfft2(field) * np.conj(np.fft.rfft2(mapped)), s=field.shape)
    # |f - shifted g|^2 = 2 |f|^2 - 2 correlation
    return norm - correlation <= 1e-9 * norm
