"""The nonlinear term of two layers by the compiled functions of :mod:`line_kernels` (CPU)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.cpu import jit
from hpc_closure.spectral.cpu.advection import CompiledAdvection
from hpc_closure.spectral.cpu.line_kernels import LAYERS, radices
from hpc_closure.spectral.modes.transform import Transform

_COMPARED: set[tuple] = set()  # sizes that passed compare_once


def compiled_layers(transform: Transform, *factors: Tensor) -> CompiledLayers | None:
    """Return the compiled term of two layers; None for unequal sides and without ``radices``."""
    sizes = set(transform.grid.sizes)
    if len(sizes) > 1 or not radices(*sizes):
        return None
    return CompiledLayers(transform, *factors)


class CompiledLayers(CompiledAdvection):
    """Advection of both layers and the linear terms that couple them, in one call.

    Args:
        transform: on the CPU, of a size that has :func:`line_kernels.radices`.
        to_velocity: as of :class:`CompiledAdvection`, from streamfunctions.
        to_tendency: real factors of the two products of Basdevant's form, the same shape.
        exchange: real factors of J(psi_1, psi_2) in the tendency of each layer, the same shape.
        inversion: real factors (4, 1, 2K + 1, local columns, 2) from the layers' potential
            vorticities to their streamfunctions, row by row.
        gradients: of the mean potential vorticity times kx, (2, 1, ...).
        drag: of the lower layer's streamfunction, (1, 1, ...).
    """

    form, fields, products, buffers = LAYERS, 4, 5, 4

    def __init__(
        self,
        transform: Transform,
        to_velocity: Tensor,
        to_tendency: Tensor,
        exchange: Tensor,
        inversion: Tensor,
        gradients: Tensor,
        drag: Tensor,
    ):
        super().__init__(LAYERS, transform, to_velocity, to_tendency)
        self.transform = transform
        self._key = self.size, transform.real, transform.num_ranks
        by_psi, by_gradient, by_drag, by_exchange = (
            each[:, 0, ..., 0].contiguous().numpy()
            for each in (inversion, gradients, drag, exchange)
        )
        # the kernels return the exchange itself, not twice
        self.back = np.concatenate([self.back, by_exchange / self.dtype.type(self.size**2)])
        self.factors = self.into, by_psi, by_gradient, by_drag[0]

    def load(self) -> None:
        programs, common = self.programs, (self._work, self._tables)
        shape = 0, 2, self.into.shape[1], 2 * self.into.shape[2]
        none, mixed = np.zeros(shape, self.dtype), np.zeros((0, self.products, 0, 0), self.dtype)
        if self.slabs is None:
            one = np.zeros((0, 0, 0), self.dtype)
            jit.load(programs.whole, none, self.factors, self.back, none, one, *common)
            return
        jit.load(programs.to_rows, none, self.factors, mixed, *common)
        jit.load(programs.multiply, mixed, 0, *common)
        jit.load(programs.to_columns, mixed, none, self.factors, self.back, none, *common)

    def compare_once(self, by_transforms: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Raise RuntimeError unless :meth:`rate` is the term by transforms; once per process."""
        if self._key in _COMPARED:
            return
        transform = self.transform
        generator = torch.Generator().manual_seed(0)
        shape = 1, 2, *transform.shape, 2
        random = torch.randn(shape, generator=generator, dtype=torch.float64)
        w = random.to(transform.real)
        actual, expected = torch.empty_like(w), torch.empty_like(w)
        self.load()
        self.rate(w, actual)
        by_transforms(w, expected)
        bound = 1e3 * torch.finfo(w.dtype).eps
        jit.compare(actual, expected, bound, f"two layers on {self.size}^2", __file__)
        _COMPARED.add(self._key)

    def rate(self, state: Tensor, out: Tensor) -> Tensor:
        """Write the term of potential vorticities to ``out`` and return it.

        Both are contiguous real pairs ``(members, 2, 2K + 1, local columns, 2)``.
        """
        q, result = (each.view(*each.shape[:3], -1).numpy() for each in (state, out))
        programs, n, common = self.programs, self.size, (self._work, self._tables)
        if self.slabs is None:
            mixed = self._mixed_fields(1, self.blocks[0], n)[0]
            programs.whole(q, self.factors, self.back, result, mixed, *common)
            return out
        columns, lines, count = self._of_ranks(len(q), self.slabs)
        programs.to_rows(q, self.factors, columns, *common)
        self._exchange(self.slabs, columns, lines, to_rows=True)
        programs.multiply(lines, count, *common)
        self._exchange(self.slabs, columns, lines, to_rows=False)
        programs.to_columns(columns, q, self.factors, self.back, result, *common)
        return out
