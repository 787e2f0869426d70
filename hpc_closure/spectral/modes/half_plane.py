"""The half plane of a real field's modes: its wavevectors, and where their draws are placed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def half_plane(wavevectors: np.ndarray) -> np.ndarray:
    """Select one of each pair ``k, -k``: ``ky > 0``, or ``ky = 0`` and ``kx >= 0``."""
    kx, ky = wavevectors[:, 0], wavevectors[:, 1]
    return wavevectors[(ky > 0) | ((ky == 0) & (kx >= 0))]


def wavevectors_within(radius: int, inner: float = 0.0, outer: float | None = None) -> np.ndarray:
    """Return half-plane wavevectors with ``inner <= |k| <= outer``, ``(M, 2)`` int64, by length.

    Components are at most ``radius``.
    """
    side = np.arange(-radius, radius + 1)
    pairs = half_plane(np.stack(np.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2))
    square = (pairs**2).sum(1)
    selected = square >= inner**2
    if outer is not None:
        selected &= square <= outer**2
    pairs, square = pairs[selected], square[selected]
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0], square))]


def ring(wavenumber: float, width: float) -> np.ndarray:
    """Return the half-plane wavevectors of a ring ``(M, 2)``, without the mean.

    Raises:
        ValueError: the ring has no wavevector.
    """
    inner, outer = max(wavenumber - width, 0.5), wavenumber + width
    vectors = wavevectors_within(int(outer), inner, outer)
    if not len(vectors):
        raise ValueError(f"no wavevector has length in [{inner}, {outer}]: widen the ring")
    return vectors


class ModeDraws:
    """Places draws for half-plane wavevectors in a box of a retained spectrum.

    The field of a placed draw is real: a mode ``ky = 0``, ``kx < 0`` takes the conjugate of its
    mirror image's draw, and the mean takes ``sqrt(2) Re z``, which preserves its variance ``E
    |z|^2``. The box has rows ``0..R, -R..-1`` and columns ``0..C`` and is the smallest that holds
    the drawn modes. Draws for all wavevectors of a grid fill its full retained spectrum.

    Args:
        wavevectors: ``(M, 2)`` integer wavevectors of the half plane, in the order drawn. Those
            that the grid does not retain are drawn and dropped, so that the path is the same on
            every grid.
        modes: retained modes ``K`` of the grid.
    """

    def __init__(self, wavevectors: np.ndarray, modes: int):
        kx, ky = wavevectors[:, 0], wavevectors[:, 1]
        retained = np.flatnonzero((np.abs(kx) <= modes) & (ky <= modes))
        self.num_drawn = len(wavevectors)
        self.rows = int(np.abs(kx[retained]).max(initial=0))
        self.columns = int(ky[retained].max(initial=0))
        width = self.columns + 1
        self.box = (2 * self.rows + 1, width)
        # Index of the draw of each mode of the box; index num_drawn is an extra draw that is zero.
        self._source = np.full(self.box[0] * width, self.num_drawn)
        self._source[(kx[retained] % self.box[0]) * width + ky[retained]] = retained
        mirrored = retained[(ky[retained] == 0) & (kx[retained] > 0)]
        self._conjugate = (-kx[mirrored] % self.box[0]) * width
        self._source[self._conjugate] = mirrored
        self.has_mean = bool(((kx[retained] == 0) & (ky[retained] == 0)).any())

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

    def add(self, base: Tensor, rate: Tensor, out: Tensor, columns: slice) -> None:
        """Write ``base + rate`` to ``out`` inside the box; ``out`` is unchanged elsewhere.

        Args:
            base: real pairs ``(rows, 2K + 1, columns, 2)``, on a line ``(rows, K + 1, 2)``.
            rate: real pairs ``(rows, *box, 2)``.
            out: shaped like ``base``.
            columns: columns of the full spectrum that ``base`` holds.
        """
        width = min(self.columns + 1, columns.stop) - columns.start
        if width <= 0:
            return
        if base.dim() == 3:
            base, out = base[:, None], out[:, None]
        rate = rate[:, :, columns.start : columns.start + width]
        upper = self.rows + 1
        torch.add(base[:, :upper, :width], rate[:, :upper], out=out[:, :upper, :width])
        if self.rows:
            lower = slice(-self.rows, None)
            torch.add(base[:, lower, :width], rate[:, upper:], out=out[:, lower, :width])

    def spread(self, box: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Expand ``(..., *box)`` to the full retained spectrum ``(..., *shape)``.

        The box of a line has one row.
        """
        out = box.new_zeros(*box.shape[:-2], *shape)
        if len(shape) == 1:
            out[..., : self.columns + 1] = box[..., 0, :]
            return out
        upper, width = self.rows + 1, self.columns + 1
        out[..., :upper, :width] = box[..., :upper, :]
        if self.rows:
            out[..., -self.rows :, :width] = box[..., upper:, :]
        return out
