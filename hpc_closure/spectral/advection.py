r"""Four algebraic forms of ``-u . grad w`` in two dimensions.

With ``u = psi_y``, ``v = -psi_x``, ``-Lap psi = w``:

========== ================================================ =====================
form       u . grad w                                       real FFTs, in + out
========== ================================================ =====================
advective  u w_x + v w_y                                    4 + 1
flux       (u w)_x + (v w)_y                                3 + 2
basdevant  (dxx - dyy)(u v) + dxy(v^2 - u^2)                2 + 2
packed     1/2 Im[(dx - i dy)^2 z^2],  z = u + i v          1 + 1 complex
========== ================================================ =====================

They agree to round-off on the retained modes. Basdevant (J. Comput. Phys. 50, 1983) has the fewest
transforms; in float32 its error at the end of the spectrum is 1e-5 at 256^2, flux has 2e-6. Packed
needs mode -k beside k, so one device must hold the member.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_closure.spectral.symbols import Symbol
from hpc_closure.spectral.transform import Transform


class Advection:
    """``-u . grad w`` from ``w_hat``, both as real pairs ``(members, 2K + 1, columns, 2)``."""

    num_fields = 2

    def __init__(self, transform: Transform):
        grid, self.transform = transform.grid, transform
        self.like = torch.empty(0, dtype=transform.real, device=transform.device)
        local = transform.local
        kx, ky, inverse = local(grid.kx), local(grid.ky), local(grid.inverse_k2)
        self.u = self.symbol(1j * ky * inverse)
        self.v = self.symbol(-1j * kx * inverse)
        self.dx = self.symbol(1j * kx * torch.ones_like(ky))
        self.dy = self.symbol(1j * ky * torch.ones_like(kx))
        self._work: dict[int, Tensor] = {}

    def symbol(self, values: Tensor) -> Symbol:
        """Diagonal operator in the transform's precision, on its device."""
        return Symbol(values, self.like)

    def work(self, w: Tensor) -> Tensor:
        """Buffer for ``num_fields`` spectra of the shape of ``w``."""
        members = w.shape[0]
        if members not in self._work:
            self._work[members] = w.new_empty(self.num_fields, *w.shape)
        return self._work[members]

    def velocity(self, w: Tensor) -> Tensor:
        """Physical velocity ``(2, members, rows, n)``."""
        uv = self.work(w)
        self.u.apply(w, uv[0])
        self.v.apply(w, uv[1])
        return self.transform.to_physical(torch.view_as_complex(uv[:2]))

    def tendency(self, w: Tensor, out: Tensor) -> Tensor:
        """``out = -(u . grad w)``."""
        raise NotImplementedError


class Advective(Advection):
    """``-(u w_x + v w_y)``."""

    num_fields = 4

    def tendency(self, w: Tensor, out: Tensor) -> Tensor:
        work = self.work(w)
        for field, symbol in zip(work, (self.u, self.v, self.dx, self.dy)):
            symbol.apply(w, field)
        u, v, w_x, w_y = self.transform.to_physical(torch.view_as_complex(work))
        product = u.mul_(w_x).add_(v.mul_(w_y)).neg_()
        return out.copy_(torch.view_as_real(self.transform.to_spectral(product)))


class Flux(Advection):
    """``-((u w)_x + (v w)_y)``."""

    num_fields = 3

    def __init__(self, transform: Transform):
        super().__init__(transform)
        self.minus_dx = self.symbol(-torch.complex(*_parts(self.dx)))
        self.minus_dy = self.symbol(-torch.complex(*_parts(self.dy)))

    def tendency(self, w: Tensor, out: Tensor) -> Tensor:
        work = self.work(w)
        self.u.apply(w, work[0])
        self.v.apply(w, work[1])
        work[2].copy_(w)
        fields = self.transform.to_physical(torch.view_as_complex(work))
        fields[:2].mul_(fields[2])
        flux = torch.view_as_real(self.transform.to_spectral(fields[:2]))
        self.minus_dx.apply(flux[0], out)
        self.minus_dy.apply(flux[1], work[0])
        return out.add_(work[0])


class Basdevant(Advection):
    """``(kx^2 - ky^2) FFT(u v) + kx ky FFT(v^2 - u^2)``."""

    def __init__(self, transform: Transform):
        super().__init__(transform)
        kx, ky = transform.local(transform.grid.kx), transform.local(transform.grid.ky)
        self.s_uv = self.symbol(kx**2 - ky**2)
        self.s_difference = self.symbol(kx * ky)

    def tendency(self, w: Tensor, out: Tensor) -> Tensor:
        products = self.velocity(w)
        u, v = products
        uv = u * v
        # v^2 - u^2 = (v - u)(v + u): keeps relative precision where the two are close.
        difference = torch.sub(v, u)
        v.add_(u).mul_(difference)
        u.copy_(uv)
        spectra = torch.view_as_real(self.transform.to_spectral(products))
        self.s_uv.apply(spectra[0], out)
        self.s_difference.apply(spectra[1], spectra[1])
        return out.add_(spectra[1])


class Packed(Advection):
    """One complex transform each way: ``z = u + i v`` in, ``z^2`` out; in full spectra."""

    def __init__(self, transform: Transform):
        super().__init__(transform)
        if transform.num_ranks > 1:
            raise ValueError(
                "the packed form needs modes k and -k on one rank: set form: basdevant or "
                "domain_ranks: 1"
            )
        grid = transform.grid
        K, kx, ky = grid.modes, grid.kx, grid.ky
        # z_hat(k) = (kx + i ky) / k^2 w_hat(k); at -k the sign changes and w_hat is conjugate.
        z = torch.complex(kx * grid.inverse_k2, ky * grid.inverse_k2)
        self.z_plus = self.symbol(z)
        self.z_minus = self.symbol(-z[:, 1:])
        self.s_uv = self.symbol(kx**2 - ky**2)
        self.s_difference = self.symbol(kx * ky)
        self.minus_rows = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(2 * K, 0, -1)])
        self.minus_rows = self.minus_rows.to(transform.device)

    def tendency(self, w: Tensor, out: Tensor) -> Tensor:
        transform, K = self.transform, self.transform.grid.modes
        n = transform.grid.size
        scratch = self.work(w)
        plus = self.z_plus.apply(w, torch.empty_like(w), scratch[0])
        conjugate = w[:, :, 1:].clone()
        conjugate[..., 1].neg_()
        minus = torch.empty_like(conjugate)
        self.z_minus.apply(conjugate, minus, scratch[1][:, :, 1:])
        z = w.new_zeros(w.shape[0], n, n, 2)
        rows = torch.cat([torch.arange(K + 1), torch.arange(n - K, n)]).to(w.device)
        z[:, rows, : K + 1] = plus
        z[:, rows, n - K :] = minus[:, self.minus_rows].flip(2)
        z = transform.lines.x_to_physical(torch.view_as_complex(z))
        z = transform.lines.y_complex_to_physical(z)
        zr = torch.view_as_real(z)
        u, v = zr[..., 0], zr[..., 1]
        square = torch.empty_like(zr)
        square[..., 0] = (v - u) * (v + u)
        square[..., 1] = u * v
        s = transform.lines.y_complex_to_spectral(torch.view_as_complex(square))
        s = torch.view_as_real(transform.lines.x_to_spectral(s))
        s_plus = s[:, rows, : K + 1]
        columns = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(n - 1, n - K - 1, -1)])
        s_minus = s[:, rows[self.minus_rows]][:, :, columns.to(w.device)]
        # S = A + i B with A, B transforms of real fields: A = (S(k) + S*(-k)) / 2, B = -i (S - S*) / 2.
        difference = torch.stack(
            [s_plus[..., 0] + s_minus[..., 0], s_plus[..., 1] - s_minus[..., 1]], -1
        ).mul_(0.5)
        uv = torch.stack(
            [s_plus[..., 1] + s_minus[..., 1], s_minus[..., 0] - s_plus[..., 0]], -1
        ).mul_(0.5)
        self.s_uv.apply(uv, out)
        self.s_difference.apply(difference, difference)
        return out.add_(difference)


def _parts(symbol: Symbol) -> tuple[Tensor, Tensor]:
    imag = symbol.imag[..., 1].double()
    return torch.zeros_like(imag), imag


FORMS = {"advective": Advective, "flux": Flux, "basdevant": Basdevant, "packed": Packed}
