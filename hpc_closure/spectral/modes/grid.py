"""Periodic grids, their retained modes, and changes of resolution in spectral space.

A field on ``n`` points per side keeps the modes ``|kx|, |ky| <= K`` with ``K`` the largest integer
such that ``n >= 3 K + 1``. Products of two retained fields are then free of aliasing (2/3 rule).
Only these modes are stored, as ``(2K + 1, K + 1)`` complex numbers: rows ``kx = 0..K, -K..-1``,
columns ``ky = 0..K``. Coefficients are divided by the number of points, so an array means the same
field on every grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hpc_closure.spectral.modes.resolution import retained_modes


@dataclass(frozen=True)
class Grid:
    """A periodic square (or line) of ``size`` points per side.

    Args:
        size: points per side, even, at least 4.
        length: side of the square; points are at ``i * length / size``.
        dimensions: 2, or 1 for a line.

    Raises:
        ValueError: an argument is out of range.
    """

    size: int
    length: float = 1.0
    dimensions: int = 2

    def __post_init__(self):
        if self.size < 4 or self.size % 2:
            raise ValueError(f"grid size must be even and at least 4, got {self.size}")
        if not self.length > 0:
            raise ValueError(f"length must be positive, got {self.length}")
        if self.dimensions not in (1, 2):
            raise ValueError(f"dimensions must be 1 or 2, got {self.dimensions}")

    @property
    def modes(self) -> int:
        """Return the number ``K`` of retained modes in each direction."""
        return retained_modes(self.size)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one member's retained spectrum."""
        K = self.modes
        return (2 * K + 1, K + 1) if self.dimensions == 2 else (K + 1,)

    @property
    def points(self) -> tuple[int, ...]:
        """Return the shape of one member's physical field."""
        return (self.size,) * self.dimensions

    @cached_property
    def integer_kx(self) -> Tensor:
        """Return the integer kx of the rows, ``(2K + 1, 1)`` int64; on a line one zero."""
        if self.dimensions == 1:
            return torch.zeros(1, dtype=torch.int64)
        K = self.modes
        return torch.cat([torch.arange(K + 1), torch.arange(-K, 0)]).reshape(-1, 1)

    @cached_property
    def integer_ky(self) -> Tensor:
        """Return the integer ky of the columns, ``(1, K + 1)`` int64; on a line ``(K + 1,)``."""
        columns = torch.arange(self.modes + 1)
        return columns.reshape(1, -1) if self.dimensions == 2 else columns

    @cached_property
    def integer_k2(self) -> Tensor:
        """Return the squared integer wavevector, int64, retained shape."""
        return self.integer_kx**2 + self.integer_ky**2

    @property
    def unit(self) -> float:
        """Return the smallest wavenumber, ``2 pi / length``."""
        return 2 * math.pi / self.length

    @cached_property
    def kx(self) -> Tensor:
        """Return the wavenumbers of the rows (float64, ``2 pi / length`` included)."""
        return self.integer_kx.double() * self.unit

    @cached_property
    def ky(self) -> Tensor:
        """Return the wavenumbers of the columns (float64, ``2 pi / length`` included)."""
        return self.integer_ky.double() * self.unit

    @cached_property
    def k2(self) -> Tensor:
        """Return the squared wavenumber, float64, retained shape."""
        return self.integer_k2.double() * self.unit**2

    @cached_property
    def inverse_k2(self) -> Tensor:
        """Return ``1 / k2``, with zero for the mean."""
        return torch.where(self.integer_k2 > 0, 1.0 / self.k2.clamp(min=self.unit**2 / 2), 0.0)

    @cached_property
    def weights(self) -> Tensor:
        """Return Parseval weights: ``sum(weights |w_hat|^2) = <w^2>``.

        They are 1 for ``ky = 0``, else 2.
        """
        return torch.where(self.integer_ky == 0, 1.0, 2.0).double()

    @cached_property
    def _shell(self) -> Tensor:
        return torch.round(self.integer_k2.double().sqrt()).long()

    def shell(self) -> Tensor:
        """Return the shell of every retained mode: ``|k|`` (integer units) rounded, int64."""
        return self._shell

    @property
    def num_shells(self) -> int:
        """Return the number of shells, the corners ``|k| > K`` included."""
        return int(self._shell.max()) + 1

    def shell_sum(self, values: Tensor) -> Tensor:
        """Return Parseval-weighted shell sums ``(..., shells)`` of values per retained mode.

        With ``values = |w_hat|^2`` the shells add up to ``<w^2>``. See :func:`shell_sum`.
        """
        return shell_sum(values, self._shell, self.weights)

    def coordinates(self) -> tuple[Tensor, ...]:
        """Return coordinates that broadcast to a field: ``(x, y)``, or ``(x,)`` on a line."""
        x = torch.arange(self.size, dtype=torch.float64) * (self.length / self.size)
        return (x,) if self.dimensions == 1 else (x.reshape(-1, 1), x.reshape(1, -1))


class Row(Grid):
    """A line as closures and scores see it: a plane of one row.

    Spectra are ``(1, K + 1)`` and fields ``(1, n)``, so that code for planes applies. The
    functions below recognise a row by its shape.
    """

    def __init__(self, size: int, length: float = 1.0):
        super().__init__(size, length, dimensions=1)

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, self.modes + 1)

    @property
    def points(self) -> tuple[int, ...]:
        return (1, self.size)

    @cached_property
    def integer_kx(self) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.int64)

    @cached_property
    def integer_ky(self) -> Tensor:
        return torch.arange(self.modes + 1).reshape(1, -1)


def _is_line(values: Tensor, dimensions: int) -> bool:
    """Return whether spectra or fields are of a line.

    They are if ``dimensions`` is 1, or if they have a single row of more than one value.
    """
    return dimensions == 1 or values.ndim > 1 and values.shape[-2] == 1 < values.shape[-1]


def as_row(values: Tensor, dimensions: int) -> Tensor:
    """Give spectra or fields of a line, ``(..., n)``, their single row: ``(..., 1, n)``."""
    return values.unsqueeze(-2) if dimensions == 1 else values


def from_row(values: Tensor, dimensions: int) -> Tensor:
    """Remove the row that :func:`as_row` added."""
    return values.squeeze(-2) if dimensions == 1 else values


def shell_sum(values: Tensor, shell: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum values per mode over wavenumber shells; returns ``(..., shells)``.

    On the CPU values are added in the order of the modes.

    Args:
        values: real ``(..., *shell.shape)``; the sums have its precision and device.
        shell: shell of each mode, int64 (or of each group of modes).
        weights: number of modes that each value stands for, broadcast to ``values``; by default 1.

    Returns:
        ``(..., shells)``, shells up to the largest in ``shell``.
    """
    if weights is not None:
        values = values * to_device_cached(weights, values)
    values = values.flatten(-shell.dim())
    out = values.new_zeros(*values.shape[:-1], int(shell.max()) + 1)
    return out.index_add_(-1, to_device_cached(shell, values).flatten(), values)


def resize(w_hat: Tensor, modes: int, dimensions: int = 2) -> Tensor:
    """Cut or zero-pad a retained spectrum to another number of modes.

    Args:
        w_hat: ``(..., 2K + 1, K + 1)``; of a :class:`Row` ``(..., 1, K + 1)``; with ``dimensions``
            1 ``(..., K + 1)``.
        modes: retained modes of the result.
        dimensions: 1 or 2.

    Raises:
        ValueError: ``w_hat`` has another shape.
    """
    old = w_hat.shape[-1] - 1
    K = min(old, modes)
    if _is_line(w_hat, dimensions):
        out = w_hat.new_zeros(*w_hat.shape[:-1], modes + 1)
        out[..., : K + 1] = w_hat[..., : K + 1]
        return out
    if w_hat.shape[-2] != 2 * old + 1:
        raise ValueError(
            f"a retained spectrum has (2K + 1, K + 1) modes, got {tuple(w_hat.shape[-2:])}"
        )
    out = w_hat.new_zeros(*w_hat.shape[:-2], 2 * modes + 1, modes + 1)
    out[..., : K + 1, : K + 1] = w_hat[..., : K + 1, : K + 1]
    if K:
        out[..., -K:, : K + 1] = w_hat[..., -K:, : K + 1]
    return out


def to_fields(w_hat: Tensor, size: int, dimensions: int = 2) -> Tensor:
    """Return fields ``(..., n, n)``, or ``(..., n)``, of spectra; cut modes that n cannot carry.

    The result is a new tensor that autograd differentiates. The solver uses the faster
    :class:`~.transform.Transform`.
    """
    modes = min(w_hat.shape[-1] - 1, (size - 1) // 2)
    if modes < w_hat.shape[-1] - 1:
        w_hat = resize(w_hat, modes, dimensions)
    if _is_line(w_hat, dimensions):
        return torch.fft.irfft(w_hat, n=size, norm="forward")
    middle = w_hat.new_zeros(*w_hat.shape[:-2], size - 2 * modes - 1, modes + 1)
    rows = [w_hat[..., : modes + 1, :], middle, w_hat[..., modes + 1 :, :]]
    return torch.fft.irfft2(torch.cat(rows, dim=-2), s=(size, size), norm="forward")


def to_spectra(fields: Tensor, modes: int, dimensions: int = 2) -> Tensor:
    """Return retained spectra of fields ``(..., n, n)`` or ``(..., n)``.

    This is the inverse of :func:`to_fields`.
    """
    if _is_line(fields, dimensions):
        return torch.fft.rfft(fields, norm="forward")[..., : modes + 1]
    full = torch.fft.rfft2(fields, norm="forward")[..., : modes + 1]
    return torch.cat([full[..., : modes + 1, :], full[..., -modes:, :]], dim=-2)


def hermitian(w_hat: Tensor, dimensions: int = 2) -> Tensor:
    """Return a copy of ``w_hat`` whose ``ky = 0`` column is exactly that of a real field."""
    out = w_hat.clone()
    if _is_line(w_hat, dimensions):
        out[..., 0] = torch.complex(w_hat[..., 0].real, torch.zeros_like(w_hat[..., 0].real))
        return out
    K = w_hat.shape[-1] - 1
    zero = w_hat[..., 0, 0].real
    out[..., 0, 0] = torch.complex(zero, torch.zeros_like(zero))
    if K:
        out[..., K + 1 :, 0] = w_hat[..., 1 : K + 1, 0].conj().flip(-1)
    return out


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
