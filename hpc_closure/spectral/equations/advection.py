"""Two algebraic forms of ``-u . grad w`` in two dimensions.

With ``u = psi_y``, ``v = -psi_x``, ``-Lap psi = w``:

========== ================================================ =====================
form       u . grad w                                       real FFTs, in + out
========== ================================================ =====================
flux       (u w)_x + (v w)_y                                3 + 2
basdevant  (dxx - dyy)(u v) + dxy(v^2 - u^2)                2 + 2
========== ================================================ =====================

The forms agree to round-off on the retained modes. Basdevant (J. Comput. Phys. 50, 1983) needs
fewer transforms. In float32, at 256^2 points, its error at the end of the spectrum is 1e-5, that
of the flux form 2e-6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hpc_closure.spectral.modes.differentiable import DifferentiableTransform, times_i
from hpc_closure.spectral.modes.grid import Grid
from hpc_closure.spectral.modes.transform import Transform

if TYPE_CHECKING:
    from hpc_closure.spectral.cpu.advection import CompiledAdvection


class Advection:
    """``-u . grad w`` of ``w_hat``, both as real pairs ``(members, 2K + 1, columns, 2)``.

    Args:
        transform: transform of the grid.
        to_velocity: real factors of u and v, from i times the spectrum that determines them; by
            default those of the vorticity.
    """

    def __init__(self, transform: Transform, to_velocity: Tensor | None = None):
        grid, self.transform = transform.grid, transform
        if to_velocity is None:
            # without the factor i: u_hat = i ky / k^2 w_hat, v_hat = -i kx / k^2 w_hat
            to_velocity = transform.factors(grid.ky * grid.inverse_k2, -grid.kx * grid.inverse_k2)
        self.to_velocity = to_velocity
        self._work: dict[tuple, Tensor] = {}

    def work(self, name: str, like: Tensor) -> Tensor:
        """Return the work array ``name`` of the shape of ``like``."""
        key = (name, like.shape)
        if key not in self._work:
            self._work[key] = torch.empty_like(like)
        return self._work[key]

    def rotate(self, w: Tensor) -> Tensor:
        """Return ``i w_hat`` in a work array."""
        out = self.work("rotated", w)
        torch.neg(w[..., 1], out=out[..., 0])
        out[..., 1].copy_(w[..., 0])
        return out

    def velocity(self, w: Tensor) -> Tensor:
        """Return the physical velocity ``(2, members, rows, n)``."""
        return self.transform.synthesize((self.rotate(w), self.to_velocity))

    def tendency(self, w: Tensor, out: Tensor) -> Tensor:
        """Write ``-(u . grad w)`` to ``out`` and return it."""
        raise NotImplementedError


_COMPARED: set[tuple] = set()  # keys of compiled functions that passed _compare


class TwoProducts(Advection):
    """A form that transforms two products of fields back to spectra.

    On the CPU the compiled functions of :mod:`~cpu.line_kernels` compute it if they exist for the
    size of the grid. Otherwise it is computed by transforms of full fields.
    """

    form = ""

    def __init__(self, transform: Transform, to_velocity: Tensor | None = None):
        super().__init__(transform, to_velocity)
        self.to_tendency = transform.factors(*self.factors(transform.grid))
        self.compiled: CompiledAdvection | None = None
        if transform.lines.on_cpu:
            from hpc_closure.spectral.cpu.advection import compiled_advection

            factors = self.to_velocity, self.to_tendency
            self.compiled = compiled_advection(self.form, transform, *factors)
        self._key = self.form, transform.grid.sizes, transform.real, transform.num_ranks

    @staticmethod
    def factors(grid: Grid) -> tuple[Tensor, Tensor]:
        """Return the real factors of the spectra of the two products, per mode."""
        raise NotImplementedError

    def tendency(self, w, out):
        if self.compiled is None:
            return self.by_transforms(w, out)
        self._compare_once(self.compiled)
        return self.compiled.tendency(w, out)

    def _compare_once(self, compiled: CompiledAdvection) -> None:
        if self._key not in _COMPARED:
            self._compare(compiled)
            _COMPARED.add(self._key)

    def _compare(self, compiled: CompiledAdvection) -> None:
        """Raise RuntimeError unless compiled functions and transforms agree; once per process."""
        from hpc_closure.spectral.cpu.jit import compare

        shape = (2, 1, *self.transform.shape, 2)
        random = torch.randn(
            shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        w, carried = random.to(self.transform.real)
        more = (carried,) if self.form == "flux" else ()
        actual, expected = torch.empty_like(w), torch.empty_like(w)
        compiled.load()
        compiled.tendency(w, actual, *more)
        self.by_transforms(w, expected, *more)
        bound = 1e3 * torch.finfo(w.dtype).eps
        subject = f"the {self.form} form on {self.transform.grid.sizes[0]} points per side"
        compare(actual, expected, bound, subject, __file__)

    def by_transforms(self, w: Tensor, out: Tensor) -> Tensor:
        """Write ``-(u . grad w)`` to ``out`` by transforms of full fields, and return it."""
        raise NotImplementedError

    def differentiable_tendency(self, w: Tensor, transform: DifferentiableTransform) -> Tensor:
        """Return ``-(u . grad w)`` as a new tensor that autograd differentiates."""
        raise NotImplementedError


class Flux(TwoProducts):
    """``-((u c)_x + (v c)_y)`` of a field c that a flow carries; by default the vorticity."""

    form = "flux"

    @staticmethod
    def factors(grid):
        return grid.kx, grid.ky

    def carry(self, stream: Tensor, carried: Tensor, out: Tensor) -> Tensor:
        """Write the tendency of a carried field to ``out`` and return it.

        All are contiguous real pairs ``(members, 2K + 1, columns, 2)``.

        Args:
            stream: spectra from which ``to_velocity`` computes the velocity.
            carried: spectra of c.
            out: the tendency.
        """
        if self.compiled is None:
            return self.by_transforms(stream, out, carried)
        self._compare_once(self.compiled)
        return self.compiled.tendency(stream, out, carried)

    def by_transforms(self, w, out, carried=None):
        carried = w if carried is None else carried
        fields = self.transform.synthesize((self.rotate(w), self.to_velocity), (carried, None))
        fields[:2].mul_(fields[2])
        flux = self.transform.analyse(fields[:2], self.to_tendency)
        total = flux[0].add_(flux[1])
        # -i (kx F_x + ky F_y)
        out[..., 0].copy_(total[..., 1])
        torch.neg(total[..., 0], out=out[..., 1])
        return out

    def differentiable_tendency(self, w, transform, carried=None):
        carried = w if carried is None else carried
        velocity = transform.fields(times_i(w) * self.to_velocity)
        flux = transform.spectra(velocity * transform.fields(carried)) * self.to_tendency
        return -times_i(flux[0] + flux[1])


class Basdevant(TwoProducts):
    """``(kx^2 - ky^2) FFT(u v) + kx ky FFT(v^2 - u^2)``."""

    form = "basdevant"

    @staticmethod
    def factors(grid):
        return grid.kx**2 - grid.ky**2, grid.kx * grid.ky

    def by_transforms(self, w, out):
        u, v = velocity = self.velocity(w)
        difference = torch.sub(v, u, out=self.work("difference", u))
        total = torch.add(v, u, out=self.work("sum", u))
        u.mul_(v)
        torch.mul(difference, total, out=v)  # v^2 - u^2
        spectra = self.transform.analyse(velocity, self.to_tendency)
        return torch.add(spectra[0], spectra[1], out=out)

    def differentiable_tendency(self, w, transform):
        return _DifferentiableBasdevant.apply(w, self, transform)


class _DifferentiableBasdevant(torch.autograd.Function):
    """The term with its gradient written out, in half the time of autograd's operations."""

    @staticmethod
    def forward(ctx, w: Tensor, form: Basdevant, transform: DifferentiableTransform):
        velocity = transform.fields(times_i(w) * form.to_velocity)
        u, v = velocity
        products = torch.empty_like(velocity)
        torch.mul(u, v, out=products[0])
        torch.mul(v, v, out=products[1]).addcmul_(u, u, value=-1)
        ctx.save_for_backward(velocity)
        ctx.form, ctx.transform = form, transform
        spectra = transform.spectra(products)
        return torch.mul(spectra[0], form.to_tendency[0]).addcmul_(spectra[1], form.to_tendency[1])

    @staticmethod
    def backward(ctx, gradient: Tensor):
        u, v = velocity = ctx.saved_tensors[0]
        product, difference = ctx.transform.spectra_transposed(gradient * ctx.form.to_tendency)
        difference.mul_(2)
        back = torch.empty_like(velocity)
        torch.mul(v, product, out=back[0]).addcmul_(u, difference, value=-1)
        torch.mul(u, product, out=back[1]).addcmul_(v, difference)
        spectra = ctx.transform.fields_transposed(back)
        u_hat, v_hat = ctx.form.to_velocity
        return -times_i(torch.mul(spectra[0], u_hat).addcmul_(spectra[1], v_hat)), None, None


FORMS = {each.form: each for each in (Flux, Basdevant)}
