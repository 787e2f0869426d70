"""Periodic grids, their retained modes, and changes of resolution in spectral space.

A grid has one to three sides. On a side of ``n`` points it keeps the modes ``|k| <= K`` with ``K``
the largest integer such that ``n >= 3 K + 1``. Products of two retained fields are then free of
aliasing (2/3 rule). Only these modes are stored: all sides but the last hold both signs, in the
order ``0..K, -K..-1``; the last side is the half axis ``0..K`` of the real transform. So a plane
has ``(2K + 1, K + 1)`` complex numbers, a line ``(K + 1,)``, a cube ``(2K + 1, 2K + 1, K + 1)``.
Coefficients are divided by the number of points, so an array means the same field on every grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hpc_closure.spectral.modes.resolution import per_side, retained_modes

SAME = 1e-9  # relative difference up to which wavenumbers of unequal sides have equal length


@dataclass(frozen=True, init=False)
class Grid:
    """A periodic box of one to three sides.

    Args:
        size: points, even, at least 4: a number for equal sides, or a tuple with one per side.
        length: length: a number, or a tuple with one per side. On a side of n points the points
            are at ``i * length / n``.
        dimensions: number of sides; by default that of the tuples, or 2.

    Attributes:
        sizes: points per side.
        lengths: length per side.

    Raises:
        ValueError: an argument is out of range, or two have different numbers of sides.
    """

    sizes: tuple[int, ...]
    lengths: tuple[float, ...]

    def __init__(
        self,
        size: int | Sequence[int],
        length: float | Sequence[float] = 1.0,
        dimensions: int | None = None,
    ):
        if dimensions is None:
            listed = [len(one) for one in (size, length) if isinstance(one, Sequence)]
            dimensions = listed[0] if listed else 2
        if dimensions not in (1, 2, 3):
            raise ValueError(f"dimensions must be 1, 2 or 3, got {dimensions}")
        object.__setattr__(self, "sizes", per_side(size, dimensions, "size"))
        object.__setattr__(self, "lengths", per_side(length, dimensions, "length"))
        if any(points < 4 or points % 2 for points in self.sizes):
            raise ValueError(f"grid size must be even and at least 4, got {size}")
        if not all(side > 0 for side in self.lengths):
            raise ValueError(f"length must be positive, got {length}")

    @property
    def dimensions(self) -> int:
        """Return the number of sides."""
        return len(self.sizes)

    @property
    def axes(self) -> tuple[int, ...]:
        """Return the axes of the sides in a field or a spectrum: ``(-2, -1)`` on a plane."""
        return tuple(range(-self.dimensions, 0))

    @property
    def size(self) -> int:
        """Return the points of each side.

        Raises:
            ValueError: the sides have different numbers of points.
        """
        return _equal(self.sizes, "points")

    @property
    def length(self) -> float:
        """Return the length of each side.

        Raises:
            ValueError: the sides have different lengths.
        """
        return _equal(self.lengths, "lengths")

    @property
    def mode_counts(self) -> tuple[int, ...]:
        """Return the number ``K`` of retained modes in each direction."""
        return tuple(retained_modes(size) for size in self.sizes)

    @property
    def modes(self) -> int:
        """Return the number ``K`` of retained modes, equal in each direction.

        Raises:
            ValueError: the sides have different numbers of modes.
        """
        return _equal(self.mode_counts, "modes")

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one member's retained spectrum."""
        *others, last = self.mode_counts
        return (*(2 * modes + 1 for modes in others), last + 1)

    @property
    def points(self) -> tuple[int, ...]:
        """Return the shape of one member's physical field."""
        return self.sizes

    @cached_property
    def integer_k(self) -> tuple[Tensor, ...]:
        """Return the integer wavenumbers of each side, int64, which broadcast to :attr:`shape`."""
        last = self.dimensions - 1
        out = []
        for side, modes in enumerate(self.mode_counts):
            values = torch.arange(modes + 1)
            if side != last:
                values = torch.cat([values, torch.arange(-modes, 0)])
            out.append(values.reshape([-1 if one == side else 1 for one in range(last + 1)]))
        return tuple(out)

    @property
    def integer_kx(self) -> Tensor:
        """Return the integer wavenumbers of the first of several sides; on a line one zero."""
        return self.integer_k[0] if self.dimensions > 1 else torch.zeros(1, dtype=torch.int64)

    @property
    def integer_ky(self) -> Tensor:
        """Return the integer wavenumbers of the second side; on a line those of the only one."""
        return self.integer_k[1 if self.dimensions > 1 else 0]

    @cached_property
    def integer_k2(self) -> Tensor:
        """Return the squared integer wavevector, int64, retained shape.

        Raises:
            ValueError: the sides have different lengths; use :attr:`groups` and :meth:`shell`.
        """
        _equal(self.lengths, "lengths")
        return sum((k**2 for k in self.integer_k[1:]), self.integer_k[0] ** 2)

    @property
    def unit(self) -> float:
        """Return the smallest wavenumber, ``2 pi`` over the longest side."""
        return 2 * math.pi / max(self.lengths)

    @property
    def reach(self) -> float:
        """Return the largest wavenumber that is retained in every direction."""
        sides = zip(self.mode_counts, self.lengths)
        return min(modes * (2 * math.pi / length) for modes, length in sides)

    @cached_property
    def k(self) -> tuple[Tensor, ...]:
        """Return the wavenumbers of each side, float64 (``2 pi / length`` included)."""
        sides = zip(self.integer_k, self.lengths)
        return tuple(k.double() * (2 * math.pi / length) for k, length in sides)

    @cached_property
    def kx(self) -> Tensor:
        """Return the wavenumbers of the first of several sides; on a line one zero."""
        return self.k[0] if self.dimensions > 1 else self.integer_kx.double()

    @cached_property
    def ky(self) -> Tensor:
        """Return the wavenumbers of the second side; on a line those of the only one."""
        return self.k[1 if self.dimensions > 1 else 0]

    @property
    def kz(self) -> Tensor:
        """Return the wavenumbers of the third side.

        Raises:
            ValueError: there are fewer sides.
        """
        if self.dimensions < 3:
            raise ValueError(f"kz needs three sides, the grid has {self.dimensions}")
        return self.k[2]

    @cached_property
    def _scaled_k2(self) -> Tensor:
        """Return the squared wavenumber in units of :attr:`unit`, float64, retained shape."""
        if len(set(self.lengths)) == 1:
            return self.integer_k2.double()
        longest = max(self.lengths)
        sides = zip(self.integer_k, self.lengths)
        squares = [(k.double() * (longest / length)) ** 2 for k, length in sides]
        return sum(squares[1:], squares[0])

    @cached_property
    def k2(self) -> Tensor:
        """Return the squared wavenumber, float64, retained shape."""
        return self._scaled_k2 * self.unit**2

    @cached_property
    def inverse_k2(self) -> Tensor:
        """Return ``1 / k2``, with zero for the mean."""
        return torch.where(self.k2 > 0, 1.0 / self.k2.clamp(min=self.unit**2 / 2), 0.0)

    @cached_property
    def weights(self) -> Tensor:
        """Return Parseval weights: ``sum(weights |w_hat|^2) = <w^2>``.

        They are 1 where the wavenumber of the last side is zero, else 2.
        """
        return torch.where(self.integer_k[-1] == 0, 1.0, 2.0).double()

    @cached_property
    def _grouped(self) -> tuple[Tensor, Tensor]:
        """Return the square ``|k|^2`` of each group in :attr:`unit`, and the group per mode."""
        if len(set(self.lengths)) == 1:
            squares, groups = torch.unique(self.integer_k2, return_inverse=True)
            return squares.double(), groups
        values, places = torch.unique(self._scaled_k2, return_inverse=True)
        # a group begins where the next value is larger by more than round-off
        begins = values[1:] > values[:-1] * (1 + SAME)
        number = torch.cat([begins.new_zeros(1), begins]).cumsum(0)
        return values[torch.cat([begins.new_ones(1), begins])], number[places]

    @property
    def groups(self) -> Tensor:
        """Return the group of equal ``|k|^2`` of every mode, int64, by increasing ``|k|``."""
        return self._grouped[1]

    @property
    def group_k2(self) -> Tensor:
        """Return ``|k|^2`` of each group in units of :attr:`unit` squared, float64."""
        return self._grouped[0]

    @cached_property
    def _shell(self) -> Tensor:
        return shell_of(self._scaled_k2)

    def shell(self) -> Tensor:
        """Return the shell of every retained mode: ``|k|`` over :attr:`unit`, rounded, int64."""
        return self._shell

    @cached_property
    def num_shells(self) -> int:
        """Return the number of shells, the corners beyond the largest side included."""
        return int(self._shell.max()) + 1

    def shell_sum(self, values: Tensor) -> Tensor:
        """Return Parseval-weighted shell sums ``(..., shells)`` of values per retained mode.

        With ``values = |w_hat|^2`` the shells add up to ``<w^2>``. See :func:`shell_sum`.
        """
        return shell_sum(values, self._shell, self.weights, self.num_shells)

    def courant(self, dt: Any) -> Any:
        """Return the CFL number of speed 1 and step ``dt``: ``dt`` over the smallest spacing."""
        size, length = max(zip(self.sizes, self.lengths), key=lambda side: side[0] / side[1])
        return dt * size / length

    @property
    def spacing(self) -> float:
        """Return the smallest distance of neighbouring points."""
        return min(length / size for size, length in zip(self.sizes, self.lengths))

    def coordinates(self) -> tuple[Tensor, ...]:
        """Return coordinates that broadcast to a field: ``(x, y)``, or ``(x,)`` on a line."""
        out = []
        for side, (size, length) in enumerate(zip(self.sizes, self.lengths)):
            x = torch.arange(size, dtype=torch.float64) * (length / size)
            out.append(x.reshape([-1 if one == side else 1 for one in range(self.dimensions)]))
        return tuple(out)


def _equal(values: tuple, what: str):
    """Return the value that all sides have, or raise ValueError."""
    if len(set(values)) > 1:
        raise ValueError(f"this needs sides of equal {what}, the grid has {values}")
    return values[0]


def shell_of(k2: Tensor) -> Tensor:
    """Return the shell of squared wavenumbers in units of the smallest one, int64.

    Halves, which unequal lengths can have, are rounded up whatever their round-off.
    """
    return torch.floor(k2.sqrt() + (0.5 + SAME)).long()


def shell_sum(
    values: Tensor, shell: Tensor, weights: Tensor | None = None, count: int | None = None
) -> Tensor:
    """Sum values per mode over wavenumber shells; returns ``(..., shells)``.

    On the CPU values are added in the order of the modes.

    Args:
        values: real ``(..., *shell.shape)``; the sums have its precision and device.
        shell: shell of each mode, int64 (or of each group of modes).
        weights: number of modes that each value stands for, broadcast to ``values``; by default 1.
        count: number of shells; by default up to the largest in ``shell``.

    Returns:
        ``(..., shells)``.
    """
    if weights is not None:
        values = values * to_device_cached(weights, values)
    values = values.flatten(-shell.dim())
    count = int(shell.max()) + 1 if count is None else count
    out = values.new_zeros(*values.shape[:-1], count)
    return out.index_add_(-1, to_device_cached(shell, values).flatten(), values)


def resize(w_hat: Tensor, modes: int | Sequence[int], dimensions: int = 2) -> Tensor:
    """Cut or zero-pad a retained spectrum to other numbers of modes.

    Args:
        w_hat: ``(..., 2K + 1, K + 1)``; of other numbers of sides as :class:`Grid` says.
        modes: retained modes of the result: one per side, or a number for equal sides.
        dimensions: number of sides, if ``modes`` is a number.

    Raises:
        ValueError: ``w_hat`` has another shape.
    """
    sides = _each(modes, dimensions)
    old = _mode_counts(w_hat, len(sides))
    if not isinstance(modes, Sequence) and len(set(old)) > 1:
        raise ValueError(
            f"a retained spectrum has (2K + 1, K + 1) modes, got {tuple(w_hat.shape[-2:])}"
            if len(sides) == 2
            else f"a number of modes needs equal sides, the spectrum has {old}"
        )
    *others, last = sides
    lead = w_hat.shape[: -len(sides)]
    out = w_hat.new_zeros(*lead, *(2 * modes + 1 for modes in others), last + 1)
    *shared, half = (min(pair) for pair in zip(old, sides))
    signs = [[slice(K + 1), slice(-K, None)] if K else [slice(1)] for K in shared]
    for part in itertools.product(*signs):
        block: tuple[Any, ...] = (..., *part, slice(half + 1))
        out[block] = w_hat[block]
    return out


def to_fields(w_hat: Tensor, size: int | Sequence[int], dimensions: int = 2) -> Tensor:
    """Return the fields of spectra; cut modes that their points cannot carry.

    The result is a new tensor that autograd differentiates. The solver uses the faster
    :class:`~.transform.Transform`.

    Args:
        w_hat: retained spectra ``(..., 2K + 1, K + 1)``, on a line ``(..., K + 1)``.
        size: points: one number per side, or a number for equal sides.
        dimensions: number of sides, if ``size`` is a number.

    Returns:
        ``(..., n, n)``, on a line ``(..., n)``.
    """
    sizes = _each(size, dimensions)
    old = _mode_counts(w_hat, len(sizes))
    cut = tuple(min(K, (n - 1) // 2) for K, n in zip(old, sizes))
    if cut != old:
        w_hat = resize(w_hat, cut if len(sizes) > 1 else cut[0], len(sizes))
    axes = range(-len(sizes), 0)
    for axis, K, n in zip(axes[:-1], cut, sizes):
        middle = list(w_hat.shape)
        middle[axis] = n - 2 * K - 1
        parts = w_hat.narrow(axis, 0, K + 1), w_hat.narrow(axis, K + 1, K)
        w_hat = torch.cat([parts[0], w_hat.new_zeros(middle), parts[1]], dim=axis)
    return torch.fft.irfftn(w_hat, s=sizes, dim=tuple(axes), norm="forward")


def to_spectra(fields: Tensor, modes: int | Sequence[int], dimensions: int = 2) -> Tensor:
    """Return retained spectra of fields ``(..., n, n)``, on a line ``(..., n)``.

    This is the inverse of :func:`to_fields`; ``modes`` are one per side, or a number for equal
    sides, whose number is then ``dimensions``.
    """
    sides = _each(modes, dimensions)
    axes = range(-len(sides), 0)
    full = torch.fft.rfftn(fields, dim=tuple(axes), norm="forward")[..., : sides[-1] + 1]
    for axis, K in zip(axes[:-1], sides):
        parts = full.narrow(axis, 0, K + 1), full.narrow(axis, full.shape[axis] - K, K)
        full = torch.cat(parts, dim=axis)
    return full


def hermitian(w_hat: Tensor, dimensions: int = 2) -> Tensor:
    """Return a copy of ``w_hat`` whose modes ``k`` and ``-k`` are exactly those of a real field.

    Both are stored only where the wavenumber of the last side is zero. There the mode whose last
    nonzero wavenumber is negative takes the conjugate of the other; the mean takes its real part.
    """
    out = w_hat.clone()
    _mirror(w_hat[..., 0], out[..., 0], dimensions - 1)
    return out


def symmetrise(w_hat: Tensor, dimensions: int = 2) -> None:
    """Do in place what :func:`hermitian` does in a copy."""
    _mirror(w_hat[..., 0].clone(), w_hat[..., 0], dimensions - 1)


def _mirror(values: Tensor, out: Tensor, sides: int) -> None:
    """Write the conjugates of modes ``k`` to modes ``-k`` of ``out``; every side has both signs.

    ``values`` are the same as ``out``, in memory that autograd may save.
    """
    if not sides:
        out.copy_(torch.complex(values.real, torch.zeros_like(values.real)))
        return
    K = values.shape[-1] // 2
    if K:
        opposite = values[..., 1 : K + 1].conj().flip(-1)
        for axis in range(-sides, -1):
            opposite = opposite.flip(axis).roll(1, axis)
        out[..., K + 1 :] = opposite
    _mirror(values[..., 0], out[..., 0], sides - 1)


def _each(number: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """Return a number per side, from one per side or from one for all."""
    return tuple(number) if isinstance(number, Sequence) else (number,) * dimensions


def _mode_counts(w_hat: Tensor, dimensions: int) -> tuple[int, ...]:
    """Return the retained modes per side of a spectrum, from its shape.

    Raises:
        ValueError: a side with both signs has an even number of modes.
    """
    *others, last = w_hat.shape[-dimensions:]
    if any(number % 2 == 0 for number in others):
        shape = tuple(w_hat.shape[-dimensions:])
        raise ValueError(f"a retained spectrum has (2K + 1, K + 1) modes, got {shape}")
    return (*(number // 2 for number in others), last - 1)


#: copies by tensor, device and dtype; an entry lives as long as its tensor
_device_copies = WeakTensorKeyDictionary()


def to_device_cached(value: Tensor, like: Tensor) -> Tensor:
    """Return ``value`` on the device and in the real precision of ``like``, cached.

    An integer keeps its dtype. The cache knows a tensor by its identity, so ``value`` must not be
    changed in place.
    """
    dtype = value.dtype
    if dtype.is_floating_point:
        dtype = like.real.dtype if like.is_complex() else like.dtype
    if value.device == like.device and value.dtype == dtype:
        return value
    copies, key = _device_copies.setdefault(value, {}), (like.device, dtype)
    if key not in copies:
        copies[key] = value.to(device=like.device, dtype=dtype)
    return copies[key]
