"""The vorticity equation on 16 x 16 points in torch."""

import torch

N, NU4, DRAG, DT = 16, 1e-13, 0.05, 0.02
UNIT = 2 * torch.pi  # wavenumber 1 of a box of side 1
kx = UNIT * torch.fft.fftfreq(N, 1 / N, dtype=torch.float64)[:, None]
ky = UNIT * torch.arange(N // 2 + 1, dtype=torch.float64)[None, :]
square = kx**2 + ky**2
kept = (torch.maximum(abs(kx), ky) < UNIT * N / 3).double()
inverse = kept / torch.where(square > 0, square, torch.inf)
half = kept * torch.exp(-0.5 * DT * (NU4 * square**4 + DRAG))  # decay over half a step


def rate(w):
    """Return -u . grad w, spectra of spectra."""
    parts = torch.broadcast_tensors(ky * inverse, -kx * inverse, kx, ky)
    factors = 1j * torch.stack(parts)
    u, v, w_x, w_y = torch.fft.irfft2(factors * w[:, None], s=(N, N)).unbind(1)
    return -kept * torch.fft.rfft2(u * w_x + v * w_y)


def one_step(w):
    r1 = rate(w)
    r2 = rate(half * (w + DT / 2 * r1))
    r3 = rate(half * w + DT / 2 * r2)
    r4 = rate(half * (half * w + DT * r3))
    return half * (half * (w + DT / 6 * r1) + DT / 3 * (r2 + r3)) + DT / 6 * r4


class Reduced:
    dt = DT

    def step(self, v, n):
        w = kept * torch.fft.rfft2(v)
        for _ in range(n):
            w = one_step(w)
        return torch.fft.irfft2(w, s=(N, N))
