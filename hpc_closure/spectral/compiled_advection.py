"""The nonlinear term of members by the compiled functions of :mod:`line_kernels` (CPU)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.line_kernels import (
    CONSTANTS,
    FLUX,
    LANES,
    apart,
    programs,
    radices,
    twiddles,
)
from hpc_closure.spectral.transform import Transform


def compiled_advection(
    form: str, transform: Transform, to_velocity: Tensor, to_tendency: Tensor
) -> CompiledAdvection | None:
    """The compiled functions of a transform on the CPU, or None if its size has other factors."""
    if not radices(transform.grid.size):
        return None
    return CompiledAdvection(form, transform, to_velocity, to_tendency)


class CompiledAdvection:
    """``-(u . grad w)`` from ``w_hat``; keeps work arrays, so one per thread.

    Args:
        form: ``basdevant`` or ``flux``.
        transform: on the CPU, of a size that has :func:`line_kernels.radices`.
        to_velocity: real factors of i w_hat, ``(2, 1, 2K + 1, local columns, 2)``.
        to_tendency: real factors of the two products, the same shape.
    """

    KEPT_IN = Path(__file__).with_name("__pycache__")

    def __init__(self, form: str, transform: Transform, to_velocity: Tensor, to_tendency: Tensor):
        n = self.size = transform.grid.size
        self.slabs = transform.slabs
        self.into = to_velocity[:, 0, ..., 0].contiguous().numpy()
        self.dtype = self.into.dtype
        # products come back twice, and transforms are not normalised
        back = to_tendency[:, 0, ..., 0].contiguous().numpy()
        self.back = back / self.dtype.type(2 * n**2)
        self.programs = programs(n, form)
        self.fields = 3 if form == FLUX else 2
        self._work = tuple(np.zeros((3, 2 * apart(n)), self.dtype))
        self._tables = twiddles(n).astype(self.dtype), CONSTANTS.astype(self.dtype), LANES
        self._mixed = np.zeros(self._shape(1, n, self.into.shape[-1]), self.dtype)[0]

    def tendency(self, w: Tensor, out: Tensor) -> Tensor:
        """``out`` from ``w``, both real pairs ``(members, 2K + 1, local columns, 2)``."""
        w_hat = w.view(*w.shape[:2], -1).numpy()
        result = out.view(*out.shape[:2], -1).numpy()
        programs, common = self.programs, (self._work, self._tables)
        if self.slabs is None:
            programs.whole(w_hat, self.into, self.back, result, self._mixed, *common)
            return out
        n, columns = self.size, self.into.shape[-1]
        mixed = np.zeros(self._shape(len(w), n, columns), self.dtype)
        programs.to_rows(w_hat, self.into, mixed, *common)
        lines = self.slabs.to_rows(_lines(mixed, n, columns))
        rows, columns = lines.shape[-2:]
        mixed = self._blocks(lines)
        programs.multiply(mixed, rows, *common)
        lines = self.slabs.to_columns(_lines(mixed[:, :2], rows, columns), n)
        programs.to_columns(self._blocks(lines), self.back, result, *common)
        return out

    def _shape(self, members: int, rows: int, columns: int) -> tuple[int, ...]:
        """Of mixed fields, blocks of LANES columns: see :mod:`line_kernels`."""
        return members, self.fields, -(-columns // LANES), 2 * apart(rows)

    def _blocks(self, lines: Tensor) -> np.ndarray:
        """Mixed fields of lines (members, fields, 2 parts, rows, columns)."""
        rows, columns = lines.shape[-2:]
        mixed = np.zeros(self._shape(len(lines), rows, columns), self.dtype)
        blocks = _open(mixed[:, : lines.shape[1]], rows)
        for block in range(blocks.shape[2]):
            part = lines[..., block * LANES : (block + 1) * LANES]
            blocks[:, :, block, ..., : part.shape[-1]].copy_(part)
        return mixed


def _open(mixed: np.ndarray, rows: int) -> Tensor:
    """A view (members, fields, blocks, 2 parts, rows, LANES)."""
    return torch.from_numpy(mixed).unflatten(-1, (2, -1, LANES))[..., :rows, :]


def _lines(mixed: np.ndarray, rows: int, columns: int) -> Tensor:
    """Mixed fields as (members, fields, 2 parts, rows, columns)."""
    return _open(mixed, rows).permute(0, 1, 3, 4, 2, 5).flatten(-2)[..., :columns]
