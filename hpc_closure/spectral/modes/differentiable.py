"""Transforms between real pairs and fields that give new tensors, so that autograd goes through.

On small squares they are products with real matrices, which beat the FFTs of such lines (2.4 times
at 32 points per side, on one CPU thread); a gradient is the product with the transposed ones. The
solver's own are in :mod:`~hpc_closure.spectral.modes.transform`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpc_closure.spectral.modes.grid import Grid, to_fields, to_spectra

MATRICES = 48  # points per side up to which matrices are faster


def times_i(z: Tensor) -> Tensor:
    """``i z`` for real pairs, a new tensor: autograd goes through it."""
    return torch.stack([-z[..., 1], z[..., 0]], -1)


class TracedTransform:
    """Transforms of one grid; calls may overlap.

    Args:
        grid: of the fields.
        like: real tensor whose dtype and device the matrices take.
        matrices: points per side up to which they are used.
    """

    def __init__(self, grid: Grid, like: Tensor, matrices: int = MATRICES):
        self.grid = grid
        self.by_matrices = grid.dimensions == 2 and grid.size <= matrices
        if not self.by_matrices:
            # a half spectrum stands for its conjugate, too
            self._count = (grid.weights * grid.size**grid.dimensions)[..., None].to(like)
            return
        angle = torch.arange(grid.size, dtype=torch.float64) * (2 * math.pi / grid.size)
        along = grid.integer_ky.flatten()[:, None] * angle  # (K + 1, n)
        cos, sin = along.cos(), along.sin()
        # (ky, pair, pair, n)
        both = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
        weights = grid.weights.flatten()[:, None, None, None]
        self._y = (both * weights).flatten(2).flatten(0, 1).to(like)
        self._from_y = (both / grid.size).flatten(2).flatten(0, 1).T.contiguous().to(like)
        across = angle[:, None] * grid.integer_kx.flatten()  # (n, 2K + 1)
        both = torch.stack([across.cos(), -across.sin()], -1).flatten(1)
        self._x = both.to(like)
        self._from_x = (both / grid.size).T.contiguous().to(like)

    def fields(self, w: Tensor) -> Tensor:
        """Fields ``(..., n, n)`` (``(..., n)`` on a line) of pairs ``(..., 2K + 1, K + 1, 2)``."""
        if self.by_matrices:
            return self._to_fields(w, self._y, self._x)
        w_hat = torch.view_as_complex(w.contiguous())
        return to_fields(w_hat, self.grid.size, self.grid.dimensions)

    def spectra(self, fields: Tensor) -> Tensor:
        """Pairs of fields, cut to the retained modes: inverse of :meth:`fields`."""
        if self.by_matrices:
            return self._to_pairs(fields, self._from_x, self._from_y)
        return torch.view_as_real(to_spectra(fields, self.grid.modes, self.grid.dimensions))

    def fields_transposed(self, fields: Tensor) -> Tensor:
        """What the transposed of :meth:`fields`, as a real matrix, makes of fields."""
        if self.by_matrices:
            return self._to_pairs(fields, self._x.T, self._y.T)
        return self.spectra(fields) * self._count

    def spectra_transposed(self, w: Tensor) -> Tensor:
        """What the transposed of :meth:`spectra`, as a real matrix, makes of pairs."""
        if self.by_matrices:
            return self._to_fields(w, self._from_y.T, self._from_x.T)
        return self.fields(w / self._count)

    def _to_fields(self, w: Tensor, along: Tensor, across: Tensor) -> Tensor:
        rows = w.flatten(-2) @ along  # (..., real and imaginary part of n)
        return across @ rows.unflatten(-1, (2, self.grid.size)).flatten(-3, -2)

    def _to_pairs(self, fields: Tensor, across: Tensor, along: Tensor) -> Tensor:
        rows = (across @ fields).unflatten(-2, (-1, 2)).flatten(-2)
        return (rows @ along).unflatten(-1, (-1, 2))
