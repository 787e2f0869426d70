"""The nonlinear term in three dimensions by the functions of :mod:`cube_kernels` (CPU)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.cpu import jit
from hpc_closure.spectral.cpu.cube_kernels import PRODUCTS, VELOCITIES, apart, programs
from hpc_closure.spectral.cpu.line_kernels import CONSTANTS, LANES, radices, twiddles
from hpc_closure.spectral.modes.slabs import Slabs
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
        n, self.slabs = grid.size, transform.slabs
        self.size, self.programs = n, programs(n)
        self.dtype = torch.empty(0, dtype=transform.real).numpy().dtype
        self.columns = transform.columns
        width = grid.shape[-1]
        self.blocks = -(-width // LANES)
        # the kernels return twice the products, and their transforms are not normalised
        scale = 0.5 / n**3
        kx, ky, kz = (np.zeros(length) for length in (*grid.shape[:2], self.blocks * LANES))
        for place, k in zip((kx, ky, kz), grid.k):
            place[: k.numel()] = k.flatten().numpy() * scale
        inverse = np.zeros((*grid.shape[:2], self.blocks * LANES))
        inverse[..., :width] = grid.inverse_k2.numpy() / scale**2
        factors = kx, ky[self.columns], kz, inverse[:, self.columns]
        self._factors = tuple(np.ascontiguousarray(f, dtype=self.dtype) for f in factors)
        self._mixed = np.zeros((PRODUCTS, self.blocks, 2 * apart(n)), self.dtype)
        self._work = tuple(np.zeros((8, 2 * apart(n)), self.dtype))
        tables = twiddles(n).astype(self.dtype), CONSTANTS.astype(self.dtype)
        self._tables = (*tables, LANES, np.arange(width))
        self._planes: dict[tuple, np.ndarray] = {}
        self._shape = (3, *grid.shape[:1], len(factors[1]), 2 * width)
        self._all_columns = grid.shape[1]

    def load(self) -> None:
        """Compile the functions that :meth:`tendency` calls, or read them from the disk cache.

        The calls have no members, so that ranks need not wait for each other. A damaged cache is
        rebuilt.
        """
        programs, factors, common = self.programs, self._factors, (self._work, self._tables)
        spectra, planes = np.zeros((0, *self._shape), self.dtype), self._make(0)
        calls: list[tuple[Any, tuple]]
        if self.slabs is None:
            calls = [(programs.whole, (spectra, self._make(1)[0], self._mixed, factors, spectra))]
        else:
            calls = [
                (programs.to_planes, (spectra, planes)),
                (programs.planes, (planes, self._mixed)),
                (programs.to_spectra, (planes, factors, spectra)),
            ]
        for program, arguments in calls:
            jit.load(program, *arguments, *common)

    def tendency(self, u: Tensor, out: Tensor) -> Tensor:
        """Write the term of velocities to ``out`` and return it.

        Both are contiguous real pairs ``(members, 3, 2K + 1, local columns, K + 1, 2)``.
        """
        shape = len(u), *self._shape
        spectra, result = u.view(shape).numpy(), out.view(shape).numpy()
        programs, common = self.programs, (self._work, self._tables)
        if self.slabs is None:
            planes = self._make(1)[0]
            programs.whole(spectra, planes, self._mixed, self._factors, result, *common)
            return out
        rows = self.slabs.rows(self.size)
        columns = self._make(len(u))
        planes = self._make(len(u), rows.stop - rows.start, self._all_columns)
        programs.to_planes(spectra, columns, *common)
        self._exchange(self.slabs, columns, planes, to_planes=True)
        programs.planes(planes, self._mixed, *common)
        self._exchange(self.slabs, columns, planes, to_planes=False)
        programs.to_spectra(columns, self._factors, result, *common)
        return out

    def _make(self, members: int, rows: int | None = None, columns: int | None = None):
        """Return a work array of planes; by default of all rows and this rank's columns."""
        rows, columns = rows or self.size, columns or self._shape[2]
        shape = members, rows, PRODUCTS, self.blocks, columns * _PAIR
        if shape not in self._planes:
            self._planes[shape] = np.zeros(shape, self.dtype)
        return self._planes[shape]

    def _exchange(
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
