r"""The nonlinear term of three-dimensional flow, :math:`-P\,\partial_j(u_i u_j)`.

P is the projection on solenoidal fields. A multiple of the unit tensor in :math:`u_i u_j` has a
gradient as its divergence, which P removes, so w w is subtracted from the diagonal: five products,
and 3 + 5 real transforms (Basdevant, J. Comput. Phys. 50, 1983). The rotational form needs 6 + 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hpc_closure.spectral.modes.differentiable import DifferentiableTransform, times_i
from hpc_closure.spectral.modes.transform import Transform

if TYPE_CHECKING:
    from hpc_closure.spectral.cpu.convection import CompiledConvection

_COMPARED: set[tuple] = set()  # keys of compiled functions that passed _compare


class Convection:
    """The term of velocities ``(members, 3, 2K + 1, local columns, K + 1, 2)``, real pairs.

    On the CPU compiled functions compute it if they exist for the grid, otherwise transforms of
    full fields.

    Args:
        transform: transform of the grid.
    """

    def __init__(self, transform: Transform):
        grid, self.transform = transform.grid, transform
        factors = transform.factors(*grid.k, grid.inverse_k2)
        #: wavenumbers (3, 2K + 1, local columns, K + 1, 2) and 1 / k^2
        self.k, self.inverse_k2 = factors[:3, 0], factors[3, 0]
        self.compiled: CompiledConvection | None = None
        if transform.lines.on_cpu:
            from hpc_closure.spectral.cpu.convection import compiled_convection

            self.compiled = compiled_convection(transform)
        self._key = grid.sizes, transform.real, transform.num_ranks

    def tendency(self, u: Tensor, out: Tensor) -> Tensor:
        """Write the term of ``u`` to ``out`` and return it; both are contiguous."""
        if self.compiled is None:
            return self.by_transforms(u, out)
        if self._key not in _COMPARED:
            self._compare(self.compiled)
            _COMPARED.add(self._key)
        return self.compiled.tendency(u, out)

    def _compare(self, compiled: CompiledConvection) -> None:
        """Raise RuntimeError unless compiled functions and transforms agree; once per process."""
        from hpc_closure.spectral.cpu.jit import compare

        shape, generator = (1, 3, *self.transform.shape, 2), torch.Generator().manual_seed(0)
        random = torch.randn(shape, generator=generator, dtype=torch.float64)
        u = random.to(self.transform.real)
        compiled.load()
        actual = compiled.tendency(u, torch.empty_like(u))
        expected = self.by_transforms(u, torch.empty_like(u))
        bound = 1e3 * torch.finfo(u.dtype).eps
        sizes = " x ".join(map(str, self.transform.grid.sizes))
        compare(actual, expected, bound, f"three-dimensional flow on {sizes} points", __file__)

    def by_transforms(self, u: Tensor, out: Tensor) -> Tensor:
        """Write the term to ``out`` by transforms of full fields, and return it."""
        fields = self.transform.synthesize(*((part.contiguous(), None) for part in u.unbind(1)))
        return out.copy_(self._of_products(self.transform.analyse(_products(fields, 0))))

    def differentiable_tendency(self, u: Tensor, transform: DifferentiableTransform) -> Tensor:
        """Return the term as a new tensor that autograd differentiates."""
        return self._of_products(transform.spectra(_products(transform.fields(u), 1)).unbind(1))

    def _of_products(self, products) -> Tensor:
        """Return -P div of the spectra of the five products, ``(members, 3, ..., 2)``."""
        xx, yy, xy, xz, yz = products
        x, y, z = self.k
        flux = torch.stack(
            [x * xx + y * xy + z * xz, x * xy + y * yy + z * yz, x * xz + y * yz], 1
        )
        return -times_i(self.project(flux))

    def project(self, vectors: Tensor) -> Tensor:
        """Return the solenoidal part of vectors ``(members, 3, ..., 2)``; their mean is kept."""
        along = (vectors * self.k).sum(1) * self.inverse_k2
        return vectors - along[:, None] * self.k

    def speed(self, u: Tensor) -> Tensor:
        """Return the largest ``|u| + |v| + |w|`` per member on this rank's rows."""
        fields = self.transform.synthesize(*((part.contiguous(), None) for part in u.unbind(1)))
        return fields.abs_().sum(0).amax((-3, -2, -1))

    def vorticity(self, u: Tensor) -> Tensor:
        """Return the pairs of the curl of ``u``, shaped like ``u``."""
        x, y, z = self.k
        a, b, c = u.unbind(1)
        return times_i(torch.stack([y * c - z * b, z * a - x * c, x * b - y * a], 1))


def _products(fields: Tensor, axis: int) -> Tensor:
    """Return uu - ww, vv - ww, uv, uw and vw along an axis of velocities."""
    u, v, w = fields.unbind(axis)
    return torch.stack([(u - w) * (u + w), (v - w) * (v + w), u * v, u * w, v * w], axis)
