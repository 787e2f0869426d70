"""Grids, retained modes and changes of resolution."""

import pytest
import torch

from hpc_closure.spectral.grid import Grid, hermitian, resize, retained_modes
from hpc_closure.spectral.transform import Transform


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
