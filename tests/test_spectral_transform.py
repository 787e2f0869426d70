"""Transforms: round trips, derivatives, other sizes, bits that do not depend on the batch."""

import math

import pytest
import torch

from hpc_closure.spectral.modes.grid import Grid, hermitian, to_fields
from hpc_closure.spectral.modes.slabs import blocks
from hpc_closure.spectral.modes.transform import Transform


def random_spectrum(grid, members=4, dtype=torch.complex128):
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(members, *grid.shape, dtype=dtype, generator=generator)
    return hermitian(white, grid.dimensions)


@pytest.mark.parametrize("precision, tolerance", [("float64", 1e-14), ("float32", 1e-5)])
@pytest.mark.parametrize("size, dimensions", [(48, 1), (48, 2), (16, 3)])
def test_round_trip(precision, tolerance, size, dimensions):
    grid = Grid(size, dimensions=dimensions)
    transform = Transform(grid, precision)
    w_hat = random_spectrum(grid).to(transform.complex)
    back = transform.to_spectral(transform.to_physical(w_hat))
    assert back.dtype == transform.complex
    assert (back - w_hat).abs().max() < tolerance * 10
    finer = (3 * size // 2,) * dimensions
    assert transform.to_physical(w_hat, size=finer).shape == (4, *finer)


@pytest.mark.parametrize("sizes", [(16, 24), (10, 16, 12)])
def test_sides_may_differ(sizes):
    grid = Grid(sizes, length=(1.0, 2.0, 0.5)[: len(sizes)])
    transform, w_hat = Transform(grid), random_spectrum(grid)
    fields = transform.to_physical(w_hat)
    torch.testing.assert_close(fields, to_fields(w_hat, sizes))
    torch.testing.assert_close(transform.to_spectral(fields), w_hat)


def test_modes_mean_what_the_grid_says():
    grid = Grid(24, length=2.0)
    x, y = grid.coordinates()
    field = torch.sin(grid.unit * (3 * x - 2 * y)) + 0.5
    w_hat = Transform(grid).to_spectral(field.expand(1, 24, 24))[0]
    expected = torch.zeros(grid.shape, dtype=torch.complex128)
    expected[0, 0] = 0.5
    expected[-3, 2] = 0.5j  # sin(3x - 2y) = Re[-i/2 e^(i(3x-2y))] + its conjugate at (-3, 2)
    torch.testing.assert_close(w_hat, expected)
    assert grid.unit == math.pi


@pytest.mark.parametrize("size", [16, 24, 48, 60, 64, 96, (12, 16, 24)])
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_bits_do_not_depend_on_the_batch(size, precision):
    grid = Grid(size)
    transform = Transform(grid, precision)
    w_hat = random_spectrum(grid, 5).to(transform.complex)
    field = transform.to_physical(w_hat)
    back = transform.to_spectral(field)
    for rows in (slice(0, 1), slice(1, 3), slice(2, 5)):
        assert torch.equal(transform.to_physical(w_hat[rows]), field[rows])
        assert torch.equal(transform.to_spectral(field[rows]), back[rows])


def test_blocks_cover_without_gaps():
    parts = blocks(22, 4)
    assert [p.stop - p.start for p in parts] == [6, 6, 5, 5]
    assert parts[0].start == 0 and parts[-1].stop == 22


def test_too_small_a_grid_is_refused():
    grid = Grid(32)
    with pytest.raises(ValueError, match="resize"):
        Transform(grid).to_physical(random_spectrum(grid), size=16)
