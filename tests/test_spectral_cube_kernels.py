"""The compiled nonlinear term in three dimensions: the term, bits, members beside."""

import numpy as np
import pytest

from hpc_closure.spectral.cpu import cube_kernels
from hpc_closure.spectral.cpu.line_kernels import CONSTANTS, LANES, twiddles
from hpc_closure.spectral.modes.resolution import retained_modes


class Cube:
    """The compiled functions with their arrays; unit wavenumbers."""

    def __init__(self, size, dtype=np.float64):
        self.size, self.K, self.dtype = size, retained_modes(size), dtype
        sides, self.width = 2 * self.K + 1, self.K + 1
        blocks = -(-self.width // LANES)
        self.k = np.r_[0 : self.K + 1, -self.K : 0].astype(float)
        k2 = self.k[:, None, None] ** 2 + self.k[:, None] ** 2 + np.arange(self.width) ** 2
        scale = 1 / (2 * size**3)  # the kernels return twice the products, unnormalised
        inverse = np.zeros((sides, sides, blocks * LANES))
        inverse[..., : self.width] = np.where(k2 > 0, 1 / np.maximum(k2, 1), 0) / scale**2
        kz = np.zeros(blocks * LANES)
        kz[: self.width] = np.arange(self.width)
        factors = self.k * scale, self.k * scale, kz * scale, inverse
        self.factors = tuple(factor.astype(dtype) for factor in factors)
        self.planes = np.zeros((size, 5, blocks, sides * 2 * LANES), dtype)
        apart = cube_kernels.apart(size)
        self.mixed = np.zeros((5, blocks, 2 * apart), dtype)
        self.work = tuple(np.zeros((8, 2 * apart), dtype))
        constants = twiddles(size).astype(dtype), CONSTANTS.astype(dtype)
        self.tables = (*constants, LANES, np.arange(self.width))

    def tendency(self, u):
        spectra = np.ascontiguousarray(u.view(float)).astype(self.dtype)
        out = np.empty_like(spectra)
        arrays = self.planes, self.mixed, self.factors, out, self.work, self.tables
        cube_kernels.programs(self.size).whole(spectra, *arrays)
        return out.astype(float).view(complex)

    def random(self, members=1):
        n, generator = self.size, np.random.default_rng(1)
        return self.cut(np.fft.rfftn(generator.standard_normal((members, 3, n, n, n)), axes=AXES))

    def cut(self, full):
        kept = np.r_[0 : self.K + 1, self.size - self.K : self.size]
        return full[:, :, kept[:, None], kept, : self.width] / self.size**1.5

    def expected(self, u):
        """Return -P d_j (u_i u_j) by whole transforms and all nine products."""
        n, K = self.size, self.K
        kept = np.r_[0 : K + 1, n - K : n]
        full = np.zeros((len(u), 3, n, n, n // 2 + 1), complex)
        full[:, :, kept[:, None], kept, : self.width] = u
        fields = np.fft.irfftn(full, s=(n, n, n), axes=AXES, norm="forward")
        products = fields[:, :, None] * fields[:, None]
        spectra = np.fft.rfftn(products, axes=(-3, -2, -1), norm="forward")
        spectra = spectra[..., kept[:, None], kept, : self.width]
        k = np.stack(np.broadcast_arrays(self.k[:, None, None], self.k[:, None], self.k[: K + 1]))
        divergence = -1j * (k * spectra).sum(2)
        k2 = np.maximum((k**2).sum(0), 1)
        return divergence - k * ((k * divergence).sum(1) / k2)[:, None]


AXES = (2, 3, 4)


@pytest.mark.parametrize("size", [8, 12, 24])  # passes odd and even, rows short of sixteen
def test_the_term_is_that_of_whole_transforms(size):
    cube = Cube(size)
    u = cube.random(2)
    for state in (u, 2 * u):  # what a call leaves behind is nothing to the next
        expected = cube.expected(state)
        assert abs(cube.tendency(state) - expected).max() < 1e-14 * abs(expected).max()


def test_single_precision():
    cube = Cube(16, np.float32)
    u = cube.random()
    expected = cube.expected(u)
    assert abs(cube.tendency(u) - expected).max() < 2e-6 * abs(expected).max()


def test_bits_do_not_depend_on_the_members_beside():
    cube = Cube(16)
    u = cube.random(3)
    every = cube.tendency(u)
    u[1] = np.nan  # a member that is lost
    for rows in (slice(0, 1), slice(2, 3), slice(0, 3)):
        found = cube.tendency(u[rows])
        for place, row in enumerate(range(3)[rows]):
            assert row == 1 or np.array_equal(found[place], every[row])


def test_the_tendency_is_solenoidal():
    cube = Cube(16)
    rate = cube.tendency(cube.random())[0]
    k = cube.k[:, None, None], cube.k[:, None], cube.k[: cube.width]
    divergence = sum(wavenumber * part for wavenumber, part in zip(k, rate))
    assert abs(divergence).max() < 1e-13 * abs(rate).max()
    assert not rate[:, 0, 0, 0].any()
