"""The nonlinear term of an ensemble by the compiled functions of :mod:`line_kernels` (CPU)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.cpu import jit
from hpc_closure.spectral.cpu.line_kernels import (
    CONSTANTS,
    FLUX,
    LANES,
    apart,
    programs,
    radices,
    twiddles,
)
from hpc_closure.spectral.cpu.tiles import TILE
from hpc_closure.spectral.modes.slabs import Slabs
from hpc_closure.spectral.modes.transform import Transform


def compiled_advection(
    form: str, transform: Transform, to_velocity: Tensor, to_tendency: Tensor
) -> CompiledAdvection | None:
    """Return the compiled nonlinear term; None for unequal sides and sizes without ``radices``."""
    sizes = set(transform.grid.sizes)
    if len(sizes) > 1 or not radices(*sizes):
        return None
    return CompiledAdvection(form, transform, to_velocity, to_tendency)


class CompiledAdvection:
    """``-(u . grad c)`` of a field c that a flow carries; holds work arrays of one thread.

    Args:
        form: ``basdevant`` (c is the vorticity) or ``flux``.
        transform: on the CPU, of a size that has :func:`line_kernels.radices`.
        to_velocity: real factors of i times the spectrum that determines the velocity,
            ``(2, 1, 2K + 1, local columns, 2)``.
        to_tendency: real factors of the two products, the same shape.
    """

    #: mixed fields on the way to rows, products on the way back, and buffers for lines
    fields, products, buffers = 2, 2, 3

    def __init__(self, form: str, transform: Transform, to_velocity: Tensor, to_tendency: Tensor):
        n = self.size = transform.grid.size
        self.slabs = transform.slabs
        self.into = to_velocity[:, 0, ..., 0].contiguous().numpy()
        self.dtype = self.into.dtype
        # the kernels return twice the products, and their transforms are not normalised
        back = to_tendency[:, 0, ..., 0].contiguous().numpy()
        self.back = back / self.dtype.type(2 * n**2)
        self.programs = programs(n, form)
        if form == FLUX:
            self.fields = 3
        tiles = np.zeros(4 * TILE, self.dtype)
        self._work = *np.zeros((self.buffers, 2 * apart(n)), self.dtype), tiles
        columns = self.slabs.every if self.slabs else [slice(0, self.into.shape[-1])]
        #: number of blocks of LANES columns of each rank
        self.blocks: list[int] = []
        places = []
        for rank_columns in columns:
            width, first = rank_columns.stop - rank_columns.start, sum(self.blocks)
            self.blocks.append(-(-width // LANES))
            places.append(first * LANES + np.arange(width))
        tables = twiddles(n).astype(self.dtype), CONSTANTS.astype(self.dtype)
        self._tables = (*tables, LANES, np.concatenate(places))
        self._mixed: dict[tuple, np.ndarray] = {}

    def load(self) -> None:
        """Compile the functions that :meth:`tendency` calls, or read them from Numba's disk cache.

        The calls have no members, so that ranks need not wait for each other. A damaged cache is
        rebuilt.
        """
        programs, common = self.programs, (self._work, self._tables)
        no_members = np.zeros((0, self.into.shape[1], 2 * self.into.shape[2]), self.dtype)
        mixed = np.zeros((0, self.fields, 0, 0), self.dtype)
        into, back, none = self.into, self.back, (no_members, no_members)
        calls: list[tuple[Any, tuple]]
        if self.slabs is None:
            calls = [
                (
                    programs.whole,
                    (none, into, back, no_members, np.zeros((0, 0, 0), self.dtype)),
                )
            ]
        else:
            calls = [
                (programs.to_rows, (none, into, mixed)),
                (programs.multiply, (mixed, 0)),
                (programs.to_columns, (mixed, back, no_members)),
            ]
        for program, arguments in calls:
            jit.load(program, *arguments, *common)

    def tendency(self, stream: Tensor, out: Tensor, carried: Tensor | None = None) -> Tensor:
        """Write the tendency of a field to ``out`` and return it.

        All are real pairs ``(members, 2K + 1, local columns, 2)``.

        Args:
            stream: spectra that determine the velocity.
            out: the tendency.
            carried: the field, in flux form; by default ``stream``.
        """
        flow = stream.view(*stream.shape[:2], -1).numpy()
        field = flow if carried is None else carried.view(*carried.shape[:2], -1).numpy()
        result = out.view(*out.shape[:2], -1).numpy()
        programs, n, common = self.programs, self.size, (self._work, self._tables)
        if self.slabs is None:
            mixed = self._mixed_fields(1, self.blocks[0], n)[0]
            programs.whole((flow, field), self.into, self.back, result, mixed, *common)
            return out
        columns, lines, count = self._of_ranks(len(flow), self.slabs)
        programs.to_rows((flow, field), self.into, columns, *common)
        self._exchange(self.slabs, columns, lines, to_rows=True)
        programs.multiply(lines, count, *common)
        self._exchange(self.slabs, columns, lines, to_rows=False)
        programs.to_columns(columns, self.back, result, *common)
        return out

    def _of_ranks(self, members: int, slabs: Slabs) -> tuple[np.ndarray, np.ndarray, int]:
        """Return work arrays for local columns and for local rows, and the number of these."""
        rows = slabs.rows(self.size)
        count = rows.stop - rows.start
        columns = self._mixed_fields(members, self.blocks[slabs.rank], self.size)
        return columns, self._mixed_fields(members, sum(self.blocks), count), count

    def _mixed_fields(self, members: int, count: int, rows: int) -> np.ndarray:
        """Return a work array for ``count`` blocks of mixed fields, see :mod:`line_kernels`."""
        shape = members, max(self.fields, self.products), count, 2 * apart(rows)
        if shape not in self._mixed:
            self._mixed[shape] = np.zeros(shape, self.dtype)
        return self._mixed[shape]

    def _exchange(
        self, slabs: Slabs, columns: np.ndarray, lines: np.ndarray, to_rows: bool
    ) -> None:
        """Exchange mixed fields of local columns for those of local rows, or the products back."""
        fields = slice(self.fields if to_rows else self.products)
        rows = [slabs.rows(self.size, rank) for rank in range(slabs.num_ranks)]
        column_fields = _unpacked_view(columns, self.size)[:, fields]
        by_rows = [column_fields[..., row_range, :] for row_range in rows]
        local_rows = rows[slabs.rank]
        row_fields = _unpacked_view(lines, local_rows.stop - local_rows.start)[:, fields]
        by_columns = list(row_fields.split(self.blocks, 2))
        slabs.exchange(*(by_rows, by_columns) if to_rows else (by_columns, by_rows))


def _unpacked_view(mixed: np.ndarray, rows: int) -> Tensor:
    """Return mixed fields as a view (members, fields, blocks, 2 parts, rows, LANES)."""
    return torch.from_numpy(mixed).unflatten(-1, (2, -1, LANES))[..., :rows, :]
