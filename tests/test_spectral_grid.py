"""Grids, retained modes and changes of resolution."""

import numpy as np
import pytest
import torch

from hpc_closure.spectral.modes.grid import Grid, hermitian, resize, shell_sum
from hpc_closure.spectral.modes.resolution import retained_modes
from hpc_closure.spectral.modes.transform import Transform


@pytest.mark.parametrize("size, modes", [(64, 21), (128, 42), (256, 85), (48, 15), (16, 5)])
def test_two_thirds_rule(size, modes):
    assert retained_modes(size) == modes
    assert Grid(size).shape == (2 * modes + 1, modes + 1)


@pytest.mark.parametrize("arguments", [{"size": 7}, {"size": 2}, {"size": 8, "length": 0}])
def test_bad_grids_are_refused(arguments):
    with pytest.raises(ValueError):
        Grid(**arguments)


def test_parseval():
    grid = Grid(32, length=2.5)
    w_hat = hermitian(torch.randn(3, *grid.shape, dtype=torch.complex128))
    field = Transform(grid).to_physical(w_hat)
    energy = (grid.weights * w_hat.abs() ** 2).sum((-2, -1))
    torch.testing.assert_close(energy, field.square().mean((-2, -1)), rtol=1e-13, atol=0)


def test_resize_keeps_the_field():
    small, large = Grid(32), Grid(48)
    w_hat = hermitian(torch.randn(2, *small.shape, dtype=torch.complex128))
    padded = resize(w_hat, large.modes)
    assert padded.shape[1:] == large.shape
    assert torch.equal(resize(padded, small.modes), w_hat)
    fine = Transform(large).to_physical(padded)
    torch.testing.assert_close(fine[:, ::3, ::3], Transform(small).to_physical(w_hat)[:, ::2, ::2])


def test_shells_count_every_mode():
    grid = Grid(24)
    assert int(grid.shell().max()) + 1 == grid.num_shells
    assert grid.shell()[0, 0] == 0 and grid.shell()[1, 1] == 1 and grid.shell()[-3, 4] == 5


@pytest.mark.parametrize("dimensions", [1, 2])
def test_shell_sums_of_a_spectrum_add_up_to_the_mean_square(dimensions):
    grid = Grid(24, length=3.0, dimensions=dimensions)
    w_hat = hermitian(torch.randn(5, *grid.shape, dtype=torch.complex128), dimensions)
    sums = grid.shell_sum(w_hat.abs() ** 2)
    assert sums.shape == (5, grid.num_shells) and sums.dtype == torch.float64
    field = Transform(grid).to_physical(w_hat)
    mean_square = field.square().flatten(1).mean(1)
    torch.testing.assert_close(sums.sum(1), mean_square, rtol=1e-13, atol=0)
    one = torch.zeros(grid.shape)
    one[..., 3] = 1.0  # |ky| = 3 has a second mode each, -k, that is not stored
    expected = [2.0 * int((grid.shell()[..., 3] == s).sum()) for s in range(grid.num_shells)]
    assert grid.shell_sum(one).tolist() == expected


def test_shell_sums_add_in_the_order_of_the_modes():
    grid = Grid(24)
    values = torch.randn(2, 3, *grid.shape, dtype=torch.float64)
    sums = shell_sum(values, grid.shell())
    by_hand = [
        np.bincount(grid.shell().numpy().ravel(), row.ravel())
        for row in values.numpy().reshape(6, -1)
    ]
    assert torch.equal(sums, torch.from_numpy(np.stack(by_hand)).reshape(2, 3, -1))
