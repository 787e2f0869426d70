"""Transforms that autograd goes through: matrices are the FFTs, transposed is transposed."""

import pytest
import torch

from hpc_closure.spectral.modes.differentiable import DifferentiableTransform, times_i
from hpc_closure.spectral.modes.grid import Grid, hermitian
from hpc_closure.spectral.modes.transform import Transform

GRIDS = [Grid(16), Grid(18, length=3.0), Grid(24, dimensions=1)]
LIKE = torch.zeros(1, dtype=torch.float64)


def pairs_and_fields(grid):
    generator = torch.Generator().manual_seed(1)
    w_hat = torch.randn(2, 3, *grid.shape, dtype=torch.complex128, generator=generator)
    fields = torch.randn(2, 3, *grid.points, dtype=torch.float64, generator=generator)
    return torch.view_as_real(hermitian(w_hat, grid.dimensions)), fields


@pytest.fixture(params=["matrices", "ffts"])
def matrices(request):
    """Points per side up to which they are used."""
    return 64 if request.param == "matrices" else 0


@pytest.mark.parametrize("grid", GRIDS)
def test_as_the_solvers_transform(grid, matrices):
    transform, own = DifferentiableTransform(grid, LIKE, matrices), Transform(grid)
    assert transform.by_matrices == (grid.dimensions == 2 and grid.size <= matrices)
    pairs, fields = pairs_and_fields(grid)
    expected = own.to_physical(torch.view_as_complex(pairs))
    assert (transform.fields(pairs) - expected).abs().max() < 1e-13 * expected.abs().max()
    expected = torch.view_as_real(own.to_spectral(fields))
    assert (transform.spectra(fields) - expected).abs().max() < 1e-14
    assert (transform.spectra(transform.fields(pairs)) - pairs).abs().max() < 1e-14


@pytest.mark.parametrize("grid", GRIDS)
def test_transposed(grid, matrices):
    transform = DifferentiableTransform(grid, LIKE, matrices)
    pairs, fields = pairs_and_fields(grid)
    one = (transform.fields(pairs) * fields).sum()
    other = (pairs * transform.fields_transposed(fields)).sum()
    assert abs(one - other) < 1e-13 * fields.numel()
    one = (transform.spectra(fields) * pairs).sum()
    other = (fields * transform.spectra_transposed(pairs)).sum()
    assert abs(one - other) < 1e-13 * fields.numel()


def test_times_i():
    z = torch.randn(5, dtype=torch.complex128)
    assert torch.equal(torch.view_as_complex(times_i(torch.view_as_real(z))), 1j * z)
