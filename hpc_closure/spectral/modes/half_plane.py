"""The half of a real field's modes: its wavevectors, and where their draws are placed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.modes.grid import Grid


def half_plane(wavevectors: np.ndarray) -> np.ndarray:
    """Select one of each pair ``k, -k``: the last nonzero component is positive; and the mean."""
    last = np.zeros(len(wavevectors), dtype=wavevectors.dtype)
    for component in wavevectors.T:
        last = np.where(component == 0, last, component)
    return wavevectors[last >= 0]


def wavevectors_within(
    radius: int, inner: float = 0.0, outer: float | None = None, dimensions: int = 2
) -> np.ndarray:
    """Return half-plane wavevectors with ``inner <= |k| <= outer``, ``(M, 2)`` int64, by length.

    Components are at most ``radius``. In three dimensions they are ``(M, 3)`` of the half space.
    """
    side = np.arange(-radius, radius + 1)
    axes = np.meshgrid(*[side] * dimensions, indexing="ij")
    vectors = half_plane(np.stack(axes, -1).reshape(-1, dimensions))
    square = (vectors**2).sum(1)
    selected = square >= inner**2
    if outer is not None:
        selected &= square <= outer**2
    vectors, square = vectors[selected], square[selected]
    return vectors[np.lexsort((*vectors.T[::-1], square))]


def ring(wavenumber: float, width: float, dimensions: int = 2) -> np.ndarray:
    """Return the half-plane wavevectors of a ring ``(M, 2)``, or shell ``(M, 3)``, without mean.

    Raises:
        ValueError: the ring has no wavevector.
    """
    inner, outer = max(wavenumber - width, 0.5), wavenumber + width
    vectors = wavevectors_within(int(outer), inner, outer, dimensions)
    if not len(vectors):
        raise ValueError(f"no wavevector has length in [{inner}, {outer}]: widen the ring")
    return vectors


class ModeDraws:
    """Places draws for half-plane wavevectors in a box of a retained spectrum.

    The field of a placed draw is real: a mode ``ky = 0``, ``kx < 0`` takes the conjugate of its
    mirror image's draw, and the mean takes ``sqrt(2) Re z``, which preserves its variance ``E
    |z|^2``. The box has rows ``0..R, -R..-1`` and columns ``0..C`` and is the smallest that holds
    the drawn modes. Draws for all wavevectors of a grid fill its full retained spectrum. In three
    dimensions the box has two sides of both signs and one of ``0..C``.

    Args:
        wavevectors: ``(M, 2)`` integer wavevectors of the half plane, or ``(M, 3)``, in the order
            drawn. Those that the grid does not retain are drawn and dropped, so that the path is
            the same on every grid.
        modes: retained modes ``K`` of the grid, or one number per side.
    """

    def __init__(self, wavevectors: np.ndarray, modes: int | Sequence[int]):
        sides = wavevectors.shape[1]
        self.modes = tuple(modes) if isinstance(modes, Sequence) else (modes,) * sides
        retained = np.flatnonzero((np.abs(wavevectors) <= self.modes).all(1))
        vectors = wavevectors[retained]
        self.num_drawn = len(wavevectors)
        #: largest component of each side
        self.reach = tuple(int(reach) for reach in np.abs(vectors).max(0, initial=0))
        self.rows, self.columns = self.reach[0], self.reach[-1]
        self.box = _shape(self.reach)
        # Index of the draw of each mode of the box; index num_drawn is an extra draw that is zero.
        self._source = np.full(int(np.prod(self.box)), self.num_drawn)
        self._source[np.ravel_multi_index((vectors % self.box).T, self.box)] = retained
        is_mirrored = (vectors[:, -1] == 0) & (vectors != 0).any(1)
        mirrored = -vectors[is_mirrored] % self.box
        self._conjugate = np.ravel_multi_index(mirrored.T, self.box)
        self._source[self._conjugate] = retained[is_mirrored]
        self.has_mean = bool((vectors == 0).all(1).any())

    def assignment(self) -> tuple[np.ndarray, np.ndarray]:
        """Return draw and sign (1, -1: conjugate, 0: real mean) of each mode of the box."""
        sign = np.ones(len(self._source), dtype=np.int64)
        sign[self._conjugate] = -1
        if self.has_mean:
            sign[0] = 0
        return self._source, sign

    def empty(self, *lead: int) -> np.ndarray:
        """Return an array ``(*lead, M + 1)`` for draws whose last entry is zero."""
        out = np.empty((*lead, self.num_drawn + 1), dtype=np.complex128)
        out[..., -1] = 0.0
        return out

    def place(self, values: np.ndarray) -> np.ndarray:
        """Place ``(..., M + 1)`` draws in ``(..., *box)``; their field is real."""
        out = values.take(self._source, axis=-1)
        if len(self._conjugate):
            out[..., self._conjugate] = out[..., self._conjugate].conj()
        if self.has_mean:
            out[..., 0] = np.sqrt(2.0) * out[..., 0].real
        return out.reshape(*values.shape[:-1], *self.box)

    def place_std(self, std: np.ndarray) -> np.ndarray:
        """Place ``(M,)`` standard deviations in ``box``, real."""
        return np.append(std, 0.0).take(self._source).reshape(self.box)

    def add(
        self,
        base: Tensor,
        rate: Tensor,
        out: Tensor,
        columns: slice,
        halves: slice | None = None,
    ) -> None:
        """Write ``base + rate`` to ``out`` inside the box; ``out`` is unchanged elsewhere.

        Args:
            base: real pairs ``(rows, 2K + 1, columns, 2)``, on a line ``(rows, K + 1, 2)``, in
                three dimensions ``(rows, 3, 2K + 1, columns, K + 1, 2)``.
            rate: real pairs ``(rows, *box, 2)``, in three dimensions ``(rows, 3, *box, 2)``.
            out: shaped like ``base``.
            columns: columns of the full spectrum that ``base`` holds.
            halves: modes of the last of three sides that ``base`` holds; None = all.
        """
        if base.dim() == 3:
            base, out = base[:, None], out[:, None]
        for here, there in self._blocks(_shape(self.modes), columns, halves):
            torch.add(base[here], rate[there], out=out[here])

    def spread(self, box: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Expand ``(..., *box)`` to the full retained spectrum ``(..., *shape)``.

        The box of a line has one row.
        """
        out = box.new_zeros(*box.shape[: -len(self.box)], *shape)
        if len(shape) == 1:
            out[..., : self.columns + 1] = box[..., 0, :]
            return out
        for here, there in self._blocks(shape, slice(0, shape[1])):
            out[here[:-1]] = box[there[:-1]]
        return out

    def _blocks(
        self, shape: Sequence[int], columns: slice, halves: slice | None = None
    ) -> Iterator[tuple]:
        """Yield the places of blocks of one sign per side, in real pairs and in those of the box.

        Args:
            shape: shape of a full spectrum.
            columns: those that the pairs hold, a range of the second side.
            halves: the same of the third side.
        """
        held = [slice(0, shape[0]), columns, halves or slice(0, shape[-1])]
        spans: list[list[tuple[slice, slice]]] = []
        for side, (length, reach) in enumerate(zip(shape, self.reach)):
            start, stop = held[side].start, held[side].stop
            signs = [(0, 0, reach + 1)]  # first in the spectrum, first in the box, number
            if side < len(shape) - 1:
                signs.append((length - reach, reach + 1, reach))
            spans.append([])
            for first, place, number in signs:
                low, high = max(first, start), min(first + number, stop)
                if low < high:
                    here, there = slice(low - start, high - start), place - first
                    spans[-1].append((here, slice(low + there, high + there)))
        for block in itertools.product(*spans):
            here, there = zip(*block)
            yield (..., *here, slice(None)), (..., *there, slice(None))


class Polarisation:
    """Makes solenoidal vectors of two normals per wavevector.

    Args:
        wavevectors: integer wavevectors ``(M, 3)``, without the mean.
        grid: grid of the field.
    """

    def __init__(self, wavevectors: np.ndarray, grid: Grid):
        k = wavevectors / np.array(grid.lengths)
        k = k / np.sqrt((k**2).sum(1, keepdims=True))
        upright = (wavevectors[:, :2] == 0).all(1)
        axis = np.where(upright[:, None], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0])
        first = np.cross(k, axis)
        first /= np.sqrt((first**2).sum(1, keepdims=True))
        #: two unit vectors orthogonal to each wavevector, over sqrt(2), (2, 3, M, 1)
        self.directions = np.stack([first, np.cross(k, first)]).transpose(0, 2, 1)[..., None]
        self.directions *= np.sqrt(0.5)

    def vectors(self, normals: np.ndarray) -> np.ndarray:
        """Return vectors ``(..., 3, M)`` of complex normals ``(..., 2 M)``.

        ``E |vector|^2`` is that of a normal. The field of a placed vector has no divergence.
        """
        num = self.directions.shape[2]
        # multiplying real pairs by reals rounds once
        pairs = normals.view(np.float64).reshape(*normals.shape[:-1], 2, 1, num, 2)
        out = pairs[..., 0, :, :, :] * self.directions[0]
        out += pairs[..., 1, :, :, :] * self.directions[1]
        return out.view(np.complex128)[..., 0]


def _shape(modes: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a spectrum with these modes per side."""
    *others, last = modes
    return (*(2 * number + 1 for number in others), last + 1)
