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

from hpc_closure.spectral.transform import Transform


class Advection:
    """``-u . grad w`` from ``w_hat``, both as real pairs ``(members, 2K + 1, columns, 2)``."""

    def __init__(self, transform: Transform):
        grid, self.transform = transform.grid, transform
        # i times these, per mode: u_hat = i ky / k^2 w_hat, v_hat = -i kx / k^2 w_hat
        self.to_velocity = transform.factors(grid.ky * grid.inverse_k2, -grid.kx * grid.inverse_k2)
        self._work: dict[tuple, Tensor] = {}

    def work(self, name: str, like: Tensor) -> Tensor:
        """Work array of the shape of ``like``."""
        key = (name, like.shape)
        if key not in self._work:
            self._work[key] = torch.empty_like(like)
        return self._work[key]

    def rotate(self, w: Tensor) -> Tensor:
        """``i w_hat``."""
        out = self.work("rotated", w)
        torch.neg(w[..., 1], out=out[..., 0])
        out[..., 1].copy_(w[..., 0])
        return out

    def velocity(self, w: Tensor) -> Tensor:
        """Physical velocity ``(2, members, rows, n)``."""
        return self.transform.synthesize((self.rotate(w), self.to_velocity))

    def tendency(self, w: Tensor, out: Tensor) -> Tensor:
        """``out = -(u . grad w)``."""
        raise NotImplementedError


class Advective(Advection):
    """``-(u w_x + v w_y)``."""

    def __init__(self, transform: Transform):
        super().__init__(transform)
        grid = transform.grid
        kx, ky, inverse = grid.kx, grid.ky, grid.inverse_k2
        self.to_fields = transform.factors(ky * inverse, -kx * inverse, kx, ky)

    def tendency(self, w: Tensor, out: Tensor) -> Tensor:
        fields = self.transform.synthesize((self.rotate(w), self.to_fields))
        fields[:2].mul_(fields[2:])
        product = fields[0].add_(fields[1])
        return torch.neg(self.transform.analyse(product[None])[0], out=out)


class Flux(Advection):
    """``-((u w)_x + (v w)_y)``."""

    def __init__(self, transform: Transform):
        super().__init__(transform)
        self.divergence = transform.factors(transform.grid.kx, transform.grid.ky)

    def tendency(self, w: Tensor, out: Tensor) -> Tensor:
        fields = self.transform.synthesize((self.rotate(w), self.to_velocity), (w, None))
        fields[:2].mul_(fields[2])
        flux = self.transform.analyse(fields[:2], self.divergence)
        total = flux[0].add_(flux[1])
        # -i (kx F_x + ky F_y)
        out[..., 0].copy_(total[..., 1])
        torch.neg(total[..., 0], out=out[..., 1])
        return out


class Basdevant(Advection):
    """``(kx^2 - ky^2) FFT(u v) + kx ky FFT(v^2 - u^2)``."""

    def __init__(self, transform: Transform):
        super().__init__(transform)
        kx, ky = transform.grid.kx, transform.grid.ky
        self.to_tendency = transform.factors(kx**2 - ky**2, kx * ky)

    def tendency(self, w: Tensor, out: Tensor) -> Tensor:
        products = self.velocity(w)
        u, v = products
        difference = torch.sub(v, u, out=self.work("difference", u))
        total = torch.add(v, u, out=self.work("sum", u))
        u.mul_(v)
        torch.mul(difference, total, out=v)
        spectra = self.transform.analyse(products, self.to_tendency)
        return torch.add(spectra[0], spectra[1], out=out)


class Packed(Advection):
    """One complex transform each way: ``z = u + i v`` in, ``z^2`` out, on full spectra."""

    def __init__(self, transform: Transform):
        super().__init__(transform)
        if transform.num_ranks > 1:
            raise ValueError(
                "the packed form needs modes k and -k on one rank: set form: basdevant or "
                "domain_ranks: 1"
            )
        grid, device = transform.grid, transform.device
        K, n = grid.modes, grid.size
        # z_hat(k) = (kx + i ky) / k^2 w_hat(k); at -k the factor changes sign, w_hat is conjugate.
        z = torch.complex(grid.kx * grid.inverse_k2, grid.ky * grid.inverse_k2)
        self.z_plus, self.z_minus = transform.symbol(z), transform.symbol(-z)
        self.s_uv = transform.symbol(grid.kx**2 - grid.ky**2)
        self.s_difference = transform.symbol(grid.kx * grid.ky)
        minus = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(2 * K, 0, -1)])
        self.minus_rows = minus.to(device)
        self.rows = torch.cat([torch.arange(K + 1), torch.arange(n - K, n)]).to(device)
        self.minus_columns = (-torch.arange(K + 1) % n).to(device)

    def tendency(self, w: Tensor, out: Tensor) -> Tensor:
        transform, lines = self.transform, self.transform.lines
        n, K = transform.grid.size, transform.grid.modes
        scratch = self.work("scratch", w)
        conjugate = w.clone()
        conjugate[..., 1].neg_()
        plus = self.z_plus.apply(w, torch.empty_like(w), scratch)
        minus = self.z_minus.apply(conjugate, torch.empty_like(w), scratch)
        z = w.new_zeros(w.shape[0], n, n, 2)
        z[:, self.rows, : K + 1] = plus
        z[:, self.rows, n - K :] = minus[:, self.minus_rows, 1:].flip(2)
        z = lines.y_complex_to_physical(lines.x_to_physical(torch.view_as_complex(z)))
        u, v = torch.view_as_real(z).unbind(-1)
        square = torch.stack([(v - u) * (v + u), u * v], -1)
        s = lines.y_complex_to_spectral(torch.view_as_complex(square))
        s = torch.view_as_real(lines.x_to_spectral(s))
        # S = A + i B, A and B transforms of real fields: A = (S(k) + S*(-k)) / 2, iB = the rest.
        s_plus = s[:, self.rows, : K + 1]
        s_minus = s[:, self.rows[self.minus_rows]][:, :, self.minus_columns]
        (p_re, p_im), (m_re, m_im) = s_plus.unbind(-1), s_minus.unbind(-1)
        difference = torch.stack([p_re + m_re, p_im - m_im], -1).mul_(0.5)
        uv = torch.stack([p_im + m_im, m_re - p_re], -1).mul_(0.5)
        self.s_uv.apply(uv, out, scratch)
        self.s_difference.scale(difference, scratch)
        return out.add_(difference)


FORMS = {"advective": Advective, "flux": Flux, "basdevant": Basdevant, "packed": Packed}
