"""The nonlinear term in three dimensions by the functions of :mod:`cube_kernels` (CPU)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.cpu import jit
from hpc_closure.spectral.cpu.cube_kernels import PRODUCTS, VELOCITIES, apart, programs
from hpc_closure.spectral.cpu.line_kernels import CONSTANTS, LANES, radices, twiddles
from hpc_closure.spectral.modes.slabs import Slabs, blocks
from hpc_closure.spectral.modes.transform import Transform

_PAIR = 2 * LANES  # numbers of a block of LANES modes


def compiled_convection(transform: Transform) -> CompiledConvection | None:
    """Return the compiled term; None for unequal sides or a size without ``radices``."""
    sizes = set(transform.grid.sizes)
    if len(sizes) > 1 or not radices(*sizes):
        return None
    return CompiledConvection(transform)


class CompiledConvection:
    """``-P d_j (u_i u_j)``, P the projection; holds work arrays of one thread.

    Args:
        transform: on the CPU, of equal sides whose size has :func:`line_kernels.radices`.
    """

    def __init__(self, transform: Transform):
        grid = transform.grid
        n, self.slabs, self.pencils = grid.size, transform.slabs, transform.pencils
        self.size, self.programs = n, programs(n)
        self.dtype = torch.empty(0, dtype=transform.real).numpy().dtype
        columns, halves = transform.columns, transform.halves
        width = halves.stop - halves.start
        parts = self.pencils.every if self.pencils else [halves]
        #: number of blocks of LANES modes kz of each rank that shares rows and columns
        self.blocks: list[int] = []
        places = []
        for part in parts:
            count, first = part.stop - part.start, sum(self.blocks)
            self.blocks.append(-(-count // LANES))
            places.append(first * LANES + np.arange(count))
        self.local_blocks = -(-width // LANES)
        # the kernels return twice the products, and their transforms are not normalised
        scale = 0.5 / n**3
        kx, ky, kz = (k.flatten().numpy() * scale for k in grid.k)
        padded = np.zeros(self.local_blocks * LANES)
        padded[:width] = kz[halves]
        inverse = np.zeros((*transform.shape[:2], len(padded)))
        inverse[..., :width] = transform.local(grid.inverse_k2).numpy() / scale**2
        factors = kx, ky[columns], padded, inverse
        self._factors = tuple(np.ascontiguousarray(f, dtype=self.dtype) for f in factors)
        self._work = tuple(np.zeros((8, 2 * apart(n)), self.dtype))
        tables = twiddles(n).astype(self.dtype), CONSTANTS.astype(self.dtype)
        self._tables = (*tables, LANES, np.concatenate(places))
        self._arrays: dict[tuple, np.ndarray] = {}
        self._shape = (3, *transform.shape[:2], 2 * width)
        self._all_columns = grid.shape[1]
        # two neighbouring rows of w are one complex line, so ranks divide pairs of rows
        self._rows = [slice(2 * pair.start, 2 * pair.stop) for pair in blocks(n // 2, len(parts))]

    def load(self) -> None:
        """Compile the functions that :meth:`tendency` calls, or read them from the disk cache.

        The calls have no members, so that ranks need not wait for each other. A damaged cache is
        rebuilt.
        """
        programs, factors, common = self.programs, self._factors, (self._work, self._tables)
        spectra, planes = np.zeros((0, *self._shape), self.dtype), self._planes(0)
        one, several = self._mixed(), self._array(0, 0, PRODUCTS, 0, 0)
        calls: list[tuple[Any, tuple]] = [
            (programs.to_planes, (spectra, planes)),
            (programs.to_spectra, (planes, factors, spectra)),
        ]
        if self.slabs is None:
            calls = [(programs.whole, (spectra, self._planes(1)[0], one, factors, spectra))]
        elif self.pencils is None:
            calls.append((programs.planes, (planes, one)))
        else:
            calls.append((programs.to_rows, (planes, several)))
            calls.append((programs.multiply, (several, 0)))
            calls.append((programs.from_rows, (several, planes)))
        for program, arguments in calls:
            jit.load(program, *arguments, *common)

    def tendency(self, u: Tensor, out: Tensor) -> Tensor:
        """Write the term of velocities to ``out`` and return it.

        Both are contiguous real pairs ``(members, 3, 2K + 1, local columns, local kz, 2)``.
        """
        shape = len(u), *self._shape
        spectra, result = u.view(shape).numpy(), out.view(shape).numpy()
        programs, common = self.programs, (self._work, self._tables)
        if self.slabs is None:
            planes = self._planes(1)[0]
            programs.whole(spectra, planes, self._mixed(), self._factors, result, *common)
            return out
        rows = self.slabs.rows(self.size)
        columns = self._planes(len(u))
        planes = self._planes(len(u), rows.stop - rows.start, self._all_columns)
        programs.to_planes(spectra, columns, *common)
        self._exchange_planes(self.slabs, columns, planes, to_planes=True)
        if self.pencils is None:
            programs.planes(planes, self._mixed(), *common)
        else:
            self._multiply(self.pencils, planes, common)
        self._exchange_planes(self.slabs, columns, planes, to_planes=False)
        programs.to_spectra(columns, self._factors, result, *common)
        return out

    def _multiply(self, pencils: Slabs, planes: np.ndarray, common: tuple) -> None:
        """Replace planes of velocities by planes of products, on pencils."""
        programs, rows = self.programs, self._rows[pencils.rank]
        count, lead = rows.stop - rows.start, planes.shape[:2]
        mixed = self._array(*lead, PRODUCTS, self.local_blocks, 2 * apart(self.size))
        lines = self._array(*lead, PRODUCTS, sum(self.blocks), 2 * apart(count))
        programs.to_rows(planes, mixed, *common)
        self._exchange_mixed(pencils, mixed, lines, to_rows=True)
        programs.multiply(lines, count, *common)
        self._exchange_mixed(pencils, mixed, lines, to_rows=False)
        programs.from_rows(mixed, planes, *common)

    def _planes(self, members: int, rows: int | None = None, columns: int | None = None):
        """Return a work array of planes; by default of all rows and this rank's columns."""
        rows, columns = rows or self.size, columns or self._shape[2]
        return self._array(members, rows, PRODUCTS, self.local_blocks, columns * _PAIR)

    def _mixed(self) -> np.ndarray:
        """Return a work array of a mixed plane."""
        return self._array(PRODUCTS, self.local_blocks, 2 * apart(self.size))

    def _array(self, *shape: int) -> np.ndarray:
        if shape not in self._arrays:
            self._arrays[shape] = np.zeros(shape, self.dtype)
        return self._arrays[shape]

    def _exchange_planes(
        self, slabs: Slabs, columns: np.ndarray, planes: np.ndarray, to_planes: bool
    ) -> None:
        """Exchange the velocities of local columns for those of local rows, or products back."""
        fields = slice(VELOCITIES if to_planes else PRODUCTS)
        of_columns, of_rows = (
            torch.from_numpy(array)[:, :, fields] for array in (columns, planes)
        )
        by_rows = [of_columns[:, slabs.rows(self.size, r)] for r in range(slabs.num_ranks)]
        ends = [slice(s.start * _PAIR, s.stop * _PAIR) for s in slabs.every]
        by_columns = [of_rows[..., end] for end in ends]
        slabs.exchange(*(by_rows, by_columns) if to_planes else (by_columns, by_rows))

    def _exchange_mixed(
        self, pencils: Slabs, mixed: np.ndarray, lines: np.ndarray, to_rows: bool
    ) -> None:
        """Exchange mixed planes of local modes kz for those of local rows y, or products back."""
        fields = slice(VELOCITIES if to_rows else PRODUCTS)
        of_modes, of_rows = (
            torch.from_numpy(array).unflatten(-1, (2, -1, LANES))[:, :, fields]
            for array in (mixed, lines)
        )
        by_rows = [of_modes[..., rows, :] for rows in self._rows]
        local = self._rows[pencils.rank]
        by_modes = list(of_rows[..., : local.stop - local.start, :].split(self.blocks, 3))
        pencils.exchange(*(by_rows, by_modes) if to_rows else (by_modes, by_rows))
