"""Differentiable transforms between real pairs and fields, which return new tensors.

On small squares a transform is a product with real matrices, and its gradient is the product with
their transposes. This beats FFTs of such short lines: 2.4 times at 32 points per side, on one CPU
thread. The transforms of the solver are in :mod:`~hpc_closure.spectral.modes.transform`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpc_closure.spectral.modes.grid import Grid, to_fields, to_spectra

MATRICES = 48  # points per side up to which matrices are faster


def times_i(z: Tensor) -> Tensor:
    """Return ``i z`` for real pairs, a new tensor that autograd differentiates."""
    return torch.stack([-z[..., 1], z[..., 0]], -1)


class DifferentiableTransform:
    """Transforms of one grid; calls may overlap, because no work array is shared.

    Args:
        grid: grid of the fields.
        like: real tensor whose dtype and device the matrices take.
        matrices: points per side up to which matrices are used.
    """

    def __init__(self, grid: Grid, like: Tensor, matrices: int = MATRICES):
        self.grid = grid
        self.by_matrices = len(set(grid.sizes)) == 1 and grid.sizes[0] <= matrices
        self.by_matrices = self.by_matrices and grid.dimensions == 2
        if not self.by_matrices:
            # a stored mode also stands for its conjugate, hence the Parseval weights
            self._count = (grid.weights * math.prod(grid.sizes))[..., None].to(like)
            return
        angle = torch.arange(grid.size, dtype=torch.float64) * (2 * math.pi / grid.size)
        along = grid.integer_ky.flatten()[:, None] * angle  # (K + 1, n)
        cos, sin = along.cos(), along.sin()
        # (ky, pair, pair, n)
        rotation = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
        weights = grid.weights.flatten()[:, None, None, None]
        self._y = (rotation * weights).flatten(2).flatten(0, 1).to(like)
        self._from_y = (rotation / grid.size).flatten(2).flatten(0, 1).T.contiguous().to(like)
        across = angle[:, None] * grid.integer_kx.flatten()  # (n, 2K + 1)
        rotation = torch.stack([across.cos(), -across.sin()], -1).flatten(1)
        self._x = rotation.to(like)
        self._from_x = (rotation / grid.size).T.contiguous().to(like)

    def fields(self, w: Tensor) -> Tensor:
        """Return fields ``(..., n, n)`` or ``(..., n)`` of pairs ``(..., 2K + 1, K + 1, 2)``."""
        if self.by_matrices:
            return self._to_fields(w, self._y, self._x)
        w_hat = torch.view_as_complex(w.contiguous())
        return to_fields(w_hat, self.grid.sizes)

    def spectra(self, fields: Tensor) -> Tensor:
        """Return the pairs of fields, cut to the retained modes: inverse of :meth:`fields`."""
        if self.by_matrices:
            return self._to_pairs(fields, self._from_x, self._from_y)
        return torch.view_as_real(to_spectra(fields, self.grid.mode_counts))

    def fields_transposed(self, fields: Tensor) -> Tensor:
        """Apply the transpose of :meth:`fields`, as a real matrix, to fields."""
        if self.by_matrices:
            return self._to_pairs(fields, self._x.T, self._y.T)
        return self.spectra(fields) * self._count

    def spectra_transposed(self, w: Tensor) -> Tensor:
        """Apply the transpose of :meth:`spectra`, as a real matrix, to pairs."""
        if self.by_matrices:
            return self._to_fields(w, self._from_y.T, self._from_x.T)
        return self.fields(w / self._count)

    def _to_fields(self, w: Tensor, along: Tensor, across: Tensor) -> Tensor:
        rows = w.flatten(-2) @ along  # (..., real and imaginary part of n)
        return across @ rows.unflatten(-1, (2, self.grid.size)).flatten(-3, -2)

    def _to_pairs(self, fields: Tensor, across: Tensor, along: Tensor) -> Tensor:
        rows = (across @ fields).unflatten(-2, (-1, 2)).flatten(-2)
        return (rows @ along).unflatten(-1, (-1, 2))
