"""Two more forms of ``-u . grad w``: other algebra, other transforms, the same retained modes."""

import pytest
import torch
from torch import Tensor

from hpc_closure.spectral.equations.advection import FORMS, Advection
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.problem import Problem


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


class Packed(Advection):
    """``1/2 Im[(dx - i dy)^2 z^2]``, ``z = u + i v``: one complex transform each way.

    Needs mode ``-k`` beside ``k``, so whole spectra on one rank.
    """

    def __init__(self, transform: Transform):
        super().__init__(transform)
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
        n, K = self.transform.grid.size, self.transform.grid.modes
        scratch = self.work("scratch", w)
        conjugate = w.clone()
        conjugate[..., 1].neg_()
        plus = self.z_plus.apply(w, torch.empty_like(w), scratch)
        minus = self.z_minus.apply(conjugate, torch.empty_like(w), scratch)
        z = w.new_zeros(w.shape[0], n, n, 2)
        z[:, self.rows, : K + 1] = plus
        z[:, self.rows, n - K :] = minus[:, self.minus_rows, 1:].flip(2)
        z = torch.fft.ifft2(torch.view_as_complex(z), norm="forward")
        u, v = torch.view_as_real(z).unbind(-1)
        square = torch.stack([(v - u) * (v + u), u * v], -1)
        s = torch.view_as_real(torch.fft.fft2(torch.view_as_complex(square), norm="forward"))
        # S = A + i B, A and B transforms of real fields: A = (S(k) + S*(-k)) / 2, iB = the rest.
        s_plus = s[:, self.rows, : K + 1]
        s_minus = s[:, self.rows[self.minus_rows]][:, :, self.minus_columns]
        (p_re, p_im), (m_re, m_im) = s_plus.unbind(-1), s_minus.unbind(-1)
        difference = torch.stack([p_re + m_re, p_im - m_im], -1).mul_(0.5)
        uv = torch.stack([p_im + m_im, m_re - p_re], -1).mul_(0.5)
        self.s_uv.apply(uv, out, scratch)
        self.s_difference.scale(difference, scratch)
        return out.add_(difference)


ORACLES = {"advective": Advective, "packed": Packed}


@pytest.fixture
def oracle_forms(monkeypatch):
    """These forms are there too, for a problem :func:`in_form`."""
    for name, form in ORACLES.items():
        monkeypatch.setitem(FORMS, name, form)


def in_form(problem: Problem, form: str) -> Problem:
    """The problem with another form of the nonlinear term, of those here too."""
    return problem.model_copy(update={"form": form})
