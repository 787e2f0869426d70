"""Symmetries of the equation on a periodic grid: more samples from the same trajectories.

A map is one of the rotations and reflections of the box (2 of a line, 8 of the square, 48 of a
cube), then a translation by grid points. It takes solutions to solutions if it leaves the
equation, its forcing and the law of its noise unchanged. Vorticity of a flow on a plane and its
closures are pseudo-scalars: a reflection changes their sign. A scalar keeps its sign, and the
components of a vector are turned as the axes are. One map acts on all channels of a state. Only
axes of equal length and equal number of points are exchanged.

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
* Every map leaves a law of noise unchanged that is homogeneous and isotropic on the box.
  Another law returns fields with its symmetries
  (:meth:`~hpc_closure.spectral.noise.laws.Noise.symmetry_fields`), which are compared as the
  forcing of the first channel is.
"""

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.equations import Equation
from hpc_closure.spectral.modes.grid import Grid
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.noise.counters import key_of, uniform_bits

__all__ = ["MAPS", "Symmetry", "maps_of"]

Map = tuple[tuple[int, ...], tuple[int, ...]]
STREAM = 11
COMPONENTS = ("vector x", "vector y", "vector z")


@lru_cache(maxsize=None)
def maps_of(sides: int) -> tuple[Map, ...]:
    """List the maps (permutation of the axes, sign of each axis) of a box of ``sides`` sides.

    Axis a of a mapped field is axis ``permutation[a]`` of the field, reflected if ``signs[a]`` is
    -1. There are 2 maps of a line, 8 of a square and 48 of a cube; the first is the identity.
    """
    return tuple(
        (permutation, signs)
        for permutation in itertools.permutations(range(sides))
        for signs in itertools.product((1, -1), repeat=sides)
    )


MAPS = maps_of(2)  # those of the square


class Symmetry:
    """The maps that leave some fields unchanged.

    Args:
        fields: fields on the training grid, such as the steady forcing: (n, n) of a single kind,
            (C, n, n) of C kinds; of three sides (n, n, n), of a line (n,).
        maps: those of :func:`maps_of` that are tested; None = all.
        kinds: how a map changes each channel, as :class:`~spectral.equations.base.Channel` has it.

    Attributes:
        maps: all maps of a box of so many sides, by number.

    Raises:
        ValueError: a component of a vector without the others.
    """

    def __init__(
        self,
        fields: Sequence[np.ndarray],
        maps: Sequence[Map] | None = None,
        kinds: Sequence[str] = ("pseudo-scalar",),
    ):
        self.kinds = tuple(kinds)
        self.sizes = fields[0].shape[fields[0].ndim - _sides_of(fields[0], self.kinds) :]
        self.maps = maps_of(len(self.sizes))
        vectors = _vectors(self.kinds, len(self.sizes))
        #: channel from which each channel comes, and its factor, by map
        self.sources = np.array([_sources(self.kinds, vectors, one) for one, _ in self.maps])
        self.signs = np.array([_signs(self.kinds, *candidate) for candidate in self.maps])
        self._wholes = _wholes(len(self.kinds), vectors, len(self.sizes))
        self._fitting: list[tuple[int, np.ndarray | None]] = []  # shifts by map; None = all
        for candidate in self.maps if maps is None else maps:
            shifts = self._shifts(fields, candidate)
            if shifts is None or len(shifts):
                self._fitting.append((self.maps.index(candidate), shifts))
        every = math.prod(self.sizes)
        counts = [every if shifts is None else len(shifts) for _, shifts in self._fitting]
        self._ends = np.cumsum(counts, dtype=np.int64)

    @classmethod
    def of(cls, equation: Equation, size: int, forced: bool = True) -> "Symmetry":
        """Return the maps of a grid of ``size`` points per side that leave an equation unchanged.

        Args:
            equation: the equation, its channels, its forcing and its noise.
            size: points per side.
            forced: whether the map must leave the steady forcing unchanged as well.
        """
        grid = Grid(size, equation.length, equation.dimensions)
        kinds = [channel.kind for channel in equation.channels]
        spectrum = equation.steady(grid) * forced
        fields = [Transform(grid).to_physical(spectrum[None])[0].numpy()]
        for field in equation.noise.symmetry_fields(grid):
            fields.append(np.zeros_like(fields[0]))
            fields[-1][(0,) * len(equation.channel_shape)] = field
        lengths = grid.lengths
        maps = [
            (axes, signs)
            for axes, signs in maps_of(equation.dimensions)
            if tuple(lengths[axis] for axis in axes) == lengths
            and equation.is_symmetry(axes, signs)
        ]
        return cls(fields, maps, kinds)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def elements(self) -> np.ndarray:
        """All elements (len(self), 1 + sides): number of the map, then the shift along each side.

        A cube without forcing has 48 n^3 of them; :meth:`draw` does not list them.
        """
        return self._elements(np.arange(len(self)))

    def draw(self, seed: int, first: int, count: int) -> np.ndarray:
        """Draw elements (count, 1 + sides) for the samples at stream positions ``first ...``."""
        words = uniform_bits(key_of(seed, "symmetry", 0), STREAM, first, count)[::4]
        return self._elements((words % np.uint64(len(self))).astype(np.int64))

    def _elements(self, places: np.ndarray) -> np.ndarray:
        """Return the elements (count, 1 + sides) of places (count,) in the list of all."""
        which = np.searchsorted(self._ends, places, side="right")
        out = np.empty((len(places), 1 + len(self.sizes)), dtype=np.int64)
        for number, (candidate, shifts) in enumerate(self._fitting):
            rows = which == number
            shift = places[rows] - (self._ends[number - 1] if number else 0)
            shift = shift if shifts is None else shifts[shift]
            out[rows, 0] = candidate
            out[rows, 1:] = np.stack(np.unravel_index(shift, self.sizes), axis=-1)
        return out

    def apply(self, field: Tensor, elements: np.ndarray) -> Tensor:
        """Map fields, one element per first index.

        Args:
            field: (b, ..., n, n) of a single kind, (b, ..., C, n, n) of C kinds; with as many
                sides as the maps have.
            elements: (b, 1 + sides), from :meth:`draw`.

        Raises:
            ValueError: the fields have another number of channels.
        """
        channels, sides = len(self.kinds), len(self.sizes)
        if channels > 1 and (field.ndim < 2 + sides or field.shape[-1 - sides] != channels):
            raise ValueError(
                f"fields are {tuple(field.shape)}, expected (b, ..., {channels}, "
                f"{', '.join('n' * sides)}): the channels are {', '.join(self.kinds)}"
            )
        permutations, signs = (
            torch.as_tensor([self.maps[number][part] for number in elements[:, 0]])
            for part in range(2)
        )
        shifts, source = torch.as_tensor(elements[:, 1:]), torch.zeros((), dtype=torch.int64)
        strides = torch.tensor([math.prod(self.sizes[axis + 1 :]) for axis in range(sides)])
        for axis, size in enumerate(self.sizes):
            # the value at this axis's point comes from ``point`` of the axis that it was
            point = signs[:, axis, None] * (torch.arange(size) - shifts[:, axis, None]) % size
            point = point * strides[permutations[:, axis], None]
            source = source[..., None] + point.view(-1, *[1] * axis, size)
        count = math.prod(field.shape[1:-sides]) // channels
        flat = field.reshape(len(field), count, channels, math.prod(self.sizes))
        source = source.flatten(1)[:, None, None].to(field.device)
        out = flat.gather(-1, source.expand_as(flat))
        if any(len(whole) > 1 for whole in self._wholes):
            sources = torch.as_tensor(self.sources[elements[:, 0]], device=field.device)
            out = out.gather(2, sources[:, None, :, None].expand_as(out))
        sign = torch.as_tensor(self.signs[elements[:, 0]], device=field.device)
        return (out * sign[:, None, :, None].to(field.dtype)).view_as(field)

    def _shifts(self, fields: Sequence[np.ndarray], candidate: Map) -> np.ndarray | None:
        """Return the shifts that leave all fields, as places (count,) in a field; None if all."""
        if any(self.sizes[one] != size for one, size in zip(candidate[0], self.sizes)):
            return np.empty(0, dtype=np.int64)
        fitting = None
        for field in fields:
            if field.any():
                one = self._fitting_shifts(field, candidate)
                fitting = one if fitting is None else fitting & one
        return None if fitting is None or fitting.all() else np.flatnonzero(fitting)

    def _fitting_shifts(self, field: np.ndarray, candidate: Map) -> np.ndarray:
        """Return for each shift (n, n) whether the mapped and shifted field equals the field.

        The test uses the correlation of the two, of each scalar and of each vector alone: a small
        forcing counts beside a large one.
        """
        number, (permutation, signs) = self.maps.index(candidate), candidate
        axes = tuple(range(-len(self.sizes), 0))
        field = field.reshape(len(self.kinds), *self.sizes)
        mapped = field.transpose(0, *(1 + axis for axis in permutation))[self.sources[number]]
        for axis, sign, size in zip(axes, signs, self.sizes):
            mapped = np.take(mapped, sign * np.arange(size) % size, axis)
        mapped = mapped * self.signs[number].reshape(-1, *[1] * len(axes))
        norm = (field**2).sum(axes)
        spectrum = np.fft.rfftn(field, axes=axes) * np.conj(np.fft.rfftn(mapped, axes=axes))
        correlation = np.fft.irfftn(spectrum, s=self.sizes, axes=axes)
        fitting = np.full(self.sizes, True)
        for both in self._wholes:
            whole = norm[both].sum()
            # |f - shifted g|^2 = 2 |f|^2 - 2 correlation
            fitting &= whole - correlation[both].sum(0) <= 1e-9 * whole
        return fitting


def _sides_of(field: np.ndarray, kinds: tuple[str, ...]) -> int:
    """Return the number of sides of a field (..., n) of one kind, or (C, ..., n) of C kinds."""
    return field.ndim - (len(kinds) > 1)


def _vectors(kinds: tuple[str, ...], sides: int) -> list[int]:
    """Return the place of the first component of each vector.

    Raises:
        ValueError: a vector has not one component per side, next to each other.
    """
    names, first, place = COMPONENTS[:sides], [], 0
    while place < len(kinds):
        if kinds[place] in COMPONENTS:
            if kinds[place : place + sides] != names:
                followed = (
                    " and ".join(f"its {name}" for name in names[1:]) or "no other component"
                )
                raise ValueError(
                    f"channels are {', '.join(kinds)}: expected each vector x directly followed "
                    f"by {followed}"
                )
            first.append(place)
        place += sides if kinds[place] in COMPONENTS else 1
    return first


def _wholes(channels: int, vectors: list[int], sides: int) -> list[list[int]]:
    """List the channels of each scalar and of each vector."""
    inside = {first + axis for first in vectors for axis in range(sides)}
    scalars = [[channel] for channel in range(channels) if channel not in inside]
    return scalars + [[first + axis for axis in range(sides)] for first in vectors]


def _sources(kinds: tuple[str, ...], vectors: list[int], permutation: tuple) -> list[int]:
    """Return for each channel the one from which it comes if the axes are permuted."""
    sources = list(range(len(kinds)))
    for first in vectors:
        sources[first : first + len(permutation)] = [first + axis for axis in permutation]
    return sources


def _signs(kinds: tuple[str, ...], permutation: tuple, signs: tuple) -> list[int]:
    """Return the factor of each channel under a map."""
    pairs = itertools.combinations(permutation, 2)
    reflected = math.prod(signs) * (-1) ** sum(one > other for one, other in pairs)
    by_kind = {"scalar": 1, "pseudo-scalar": reflected, **dict(zip(COMPONENTS, signs))}
    return [by_kind[kind] for kind in kinds]
