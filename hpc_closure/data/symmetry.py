"""Symmetries of the equation on a periodic grid: more samples from the same trajectories.

A map of the square is one of its 8 rotations and reflections, then a translation by grid points.
It takes solutions to solutions if it leaves the equation, its forcing and the law of its noise
unchanged. Vorticity and its closures are pseudo-scalars: a reflection changes their sign. A scalar
keeps its sign, and the components of a vector are turned as the axes are. One map acts on all
channels of a state.

* Every map leaves advection, viscosity and drag unchanged. Translations and (x, y) -> (x, -y)
  leave a beta plane unchanged: there the planetary vorticity beta y changes its sign as w does. A
  map that reflects x or exchanges the axes takes beta v to another term. Mean flows along x that
  do not depend on y, such as those of two layers, leave the same maps. The equation decides
  (:meth:`~hpc_closure.spectral.equations.base.Equation.is_symmetry`).
* The forcing is compared point by point, so nothing has to be known about it. The published
  forcing, 0.1 (sin + cos)(2 pi (x + y)), is unchanged by translations along one direction, (x + s,
  y - s), and by four of the maps, each with a fitting shift.
* A subgrid closure, conditioned on the flow, does not depend on a forcing that acts on resolved
  scales. Its samples have the symmetries of the equation without forcing. The states that follow a
  sample do not.
* The steady forcing of several channels is compared channel by channel, a vector as a whole. A
  constant in a scalar, such as the restoring of moisture, is unchanged by every map.
* Every map leaves a law of noise unchanged that is homogeneous and isotropic on the square.
  Another law returns fields with its symmetries
  (:meth:`~hpc_closure.spectral.noise.laws.Noise.symmetry_fields`), which are compared as the
  forcing of the first channel is.
"""

import math
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
        fields: fields on the training grid, such as the steady forcing: (n, n) of a single kind,
            (C, n, n) of C kinds.
        maps: those of ``MAPS`` that are tested.
        kinds: how a map changes each channel, as :class:`~spectral.equations.base.Channel` has it.

    Raises:
        ValueError: a component of a vector without the other one.
    """

    def __init__(
        self,
        fields: Sequence[np.ndarray],
        maps: Sequence[tuple] = MAPS,
        kinds: Sequence[str] = ("pseudo-scalar",),
    ):
        self.size, self.kinds = fields[0].shape[-1], tuple(kinds)
        self.partners = _partners(self.kinds)
        self.signs = np.array([_signs(self.kinds, *candidate) for candidate in MAPS])
        rows = []
        for candidate in maps:
            fitting = np.logical_and.reduce(
                [self._fitting_shifts(field, *candidate) for field in fields]
            )
            rows += [(MAPS.index(candidate), *shift) for shift in np.argwhere(fitting)]
        self.elements = np.array(rows, dtype=np.int64)

    @classmethod
    def of(cls, equation: Equation, size: int, forced: bool = True) -> "Symmetry":
        """Return the maps of a grid of ``size`` points per side that leave an equation unchanged.

        Args:
            equation: the equation, its channels, its forcing and its noise.
            size: points per side.
            forced: whether the map must leave the steady forcing unchanged as well.
        """
        grid = Grid(size, equation.length)
        kinds = [channel.kind for channel in equation.channels]
        spectrum = equation.steady(grid) * forced
        fields = [Transform(grid).to_physical(spectrum[None])[0].numpy()]
        for field in equation.noise.symmetry_fields(grid):
            fields.append(np.zeros((len(kinds), size, size)))
            fields[-1][0] = field
        maps = [candidate for candidate in MAPS if equation.is_symmetry(*candidate)]
        return cls(fields, maps, kinds)

    def __len__(self) -> int:
        return len(self.elements)

    def draw(self, seed: int, first: int, count: int) -> np.ndarray:
        """Draw elements (count, 3) for the samples at stream positions ``first ...``."""
        words = uniform_bits(key_of(seed, "symmetry", 0), STREAM, first, count)[::4]
        return self.elements[words % np.uint64(len(self))]

    def apply(self, field: Tensor, elements: np.ndarray) -> Tensor:
        """Map fields, one element per first index.

        Args:
            field: (b, ..., n, n) of a single kind, (b, ..., C, n, n) of C kinds.
            elements: (b, 3), from :meth:`draw`.

        Raises:
            ValueError: the fields have another number of channels.
        """
        channels = len(self.kinds)
        if channels > 1 and (field.ndim < 4 or field.shape[-3] != channels):
            raise ValueError(
                f"fields are {tuple(field.shape)}, expected (b, ..., {channels}, n, n): the "
                f"channels are {', '.join(self.kinds)}"
            )
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
        count = math.prod(field.shape[1:-2]) // channels
        flat = field.reshape(len(field), count, channels, self.size**2)
        out = flat.gather(-1, source.flatten(1)[:, None, None].expand_as(flat))
        if "vector x" in self.kinds:
            out = torch.where(exchanged[..., None], out[:, :, self.partners], out)
        sign = torch.as_tensor(self.signs[elements[:, 0]], device=field.device)
        return (out * sign[:, None, :, None].to(field.dtype)).view_as(field)

    def _fitting_shifts(self, field: np.ndarray, turn: int, row: int, column: int) -> np.ndarray:
        """Return for each shift (n, n) whether the mapped and shifted field equals the field.

        The test uses the correlation of the two, of each scalar and of each vector alone: a small
        forcing counts beside a large one.
        """
        size, channels = self.size, len(self.kinds)
        field = field.reshape(channels, size, size)
        index = np.arange(size)
        mapped = field.transpose(0, 2, 1)[self.partners] if turn else field
        mapped = mapped[:, (row * index % size)[:, None], column * index % size]
        mapped = mapped * self.signs[MAPS.index((turn, row, column))][:, None, None]
        norm = (field**2).sum((-2, -1))
        spectrum = np.fft.rfft2(field) * np.conj(np.fft.rfft2(mapped))
        correlation = np.fft.irfft2(spectrum, s=(size, size))
        fitting = np.full((size, size), True)
        for first, partner in enumerate(self.partners):
            if partner >= first:  # a vector once
                both = sorted({first, partner})
                whole = norm[both].sum()
                # |f - shifted g|^2 = 2 |f|^2 - 2 correlation
                fitting &= whole - correlation[both].sum(0) <= 1e-9 * whole
        return fitting


def _partners(kinds: tuple[str, ...]) -> list[int]:
    """Return for each channel the one from which it comes if the axes are exchanged.

    Raises:
        ValueError: a component of a vector without the other one.
    """
    partners, vectors = list(range(len(kinds))), 0
    for channel, pair in enumerate(zip(kinds, kinds[1:])):
        if pair == ("vector x", "vector y"):
            partners[channel : channel + 2] = [channel + 1, channel]
            vectors += 1
    if not kinds.count("vector x") == kinds.count("vector y") == vectors:
        raise ValueError(
            f"channels are {', '.join(kinds)}: expected each vector x directly followed by its "
            "vector y"
        )
    return partners


def _signs(kinds: tuple[str, ...], turn: int, row: int, column: int) -> list[int]:
    """Return the factor of each channel under a map of ``MAPS``."""
    reflected = (1 - 2 * turn) * row * column
    by_kind = {"scalar": 1, "pseudo-scalar": reflected, "vector x": row, "vector y": column}
    return [by_kind[kind] for kind in kinds]
