"""The vorticity equation on 16 x 16 points in numpy."""

import numpy as np

N, NU4, DRAG, DT = 16, 1e-13, 0.05, 0.02
kx = 2 * np.pi * np.fft.fftfreq(N, 1 / N)[:, None]  # of a box of side 1
ky = 2 * np.pi * np.arange(N // 2 + 1)[None, :]
square = kx**2 + ky**2
kept = (np.maximum(abs(kx), ky) < 2 * np.pi * N / 3).astype(float)
inverse = kept / np.where(square > 0, square, np.inf)
half = kept * np.exp(-0.5 * DT * (NU4 * square**4 + DRAG))  # decay over half a step


def rate(w):
    """Return -u . grad w, spectra of spectra."""
    parts = np.broadcast_arrays(ky * inverse, -kx * inverse, kx, ky)
    factors = 1j * np.stack(parts)
    u, v, w_x, w_y = np.fft.irfft2(factors * w[:, None], s=(N, N)).swapaxes(0, 1)
    return -kept * np.fft.rfft2(u * w_x + v * w_y)


def one_step(w):
    r1 = rate(w)
    r2 = rate(half * (w + DT / 2 * r1))
    r3 = rate(half * w + DT / 2 * r2)
    r4 = rate(half * (half * w + DT * r3))
    return half * (half * (w + DT / 6 * r1) + DT / 3 * (r2 + r3)) + DT / 6 * r4


class Reduced:
    dt = DT

    def step(self, v, n):
        w = kept * np.fft.rfft2(v)
        for _ in range(n):
            w = one_step(w)
        return np.fft.irfft2(w, s=(N, N))
