"""Vector instructions that the compiled solver uses, against plain loops."""

import numba
import numpy as np
import pytest

from hpc_closure.spectral.cpu import tiles
from hpc_closure.spectral.cpu.tiles import LANES, TILE


@numba.njit
def transposed(source, first, target, at):
    tiles.transpose(source, first, target, at)


@numba.njit
def there_and_back(parts, row, line, here, there, apart, found):
    tiles.combine(parts, row, line, here, there, apart)
    tiles.separate(line, here, there, apart, found, row)


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_a_tile_is_transposed(kind):
    source = np.random.default_rng(0).standard_normal(3 + TILE).astype(kind)
    target = np.zeros(5 + TILE, kind)
    transposed(source, 3, target, 5)
    assert np.array_equal(target[5:].reshape(8, 8), source[3:].reshape(8, 8).T)
    assert not target[:5].any()


def test_two_real_fields_are_one_complex_line_and_twice_themselves_afterwards():
    parts = np.random.default_rng(0).standard_normal(4 * TILE)
    line, found, row, apart = np.zeros(64), np.zeros(4 * TILE), 16, 32
    there_and_back(parts, row, line, 8, 16, apart, found)
    ui, ur, vi, vr = (parts[row + TILE * part :][:LANES] for part in range(4))
    u, v = ur + 1j * ui, vr + 1j * vi
    lines = 1j * line[:32] + line[32:]  # exchanged
    assert np.allclose(lines[8:16], u + 1j * v)
    assert np.allclose(lines[16:24], u.conj() + 1j * v.conj())
    ar, ai, br, bi = (found[row + TILE * part :][:LANES] for part in range(4))
    # of the exchanged line: i conj(u + i v) is the spectrum of v + i u
    assert np.allclose((ar, ai, br, bi), (2 * vr, -2 * vi, 2 * ur, -2 * ui))
