"""Flows in boxes of unequal sides: the same flow as in the box that they repeat."""

import numpy as np
import pytest
import torch

from hpc_closure.experiment import reading
from hpc_closure.spectral.diagnostics import diagnostics_of
from hpc_closure.spectral.modes.differentiable import DifferentiableTransform
from hpc_closure.spectral.modes.grid import Grid, hermitian
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

QUIET = {"forcing": {"kind": "none"}, "noise": {"kind": "none"}, "initial": {"kind": "zero"}}


def on_both(repeated, **settings):
    """Spectra of a flow in a box and, repeated along the last side, in one twice as long.

    The long one is the problem of the box with the last side doubled.
    """
    problem = Problem(**settings, **QUIET)
    sizes, lengths = (*problem.sizes[:-1], 2 * problem.sizes[-1]), problem.lengths
    longer = problem.replace(grid=sizes, length=(*lengths[:-1], 2 * lengths[-1]))
    short, long = problem.make_grid(), longer.make_grid()
    lead = 2, *problem.physics.channel_shape
    w_hat = torch.zeros(*lead, *short.shape, dtype=torch.complex128)
    low = torch.randn(*lead, *short.shape, dtype=torch.complex128)
    k2 = short.k2 / short.unit**2
    w_hat = hermitian(low * torch.exp(-0.3 * k2) * (k2 > 0), short.dimensions)
    if repeated:  # components of a velocity, without divergence
        k = torch.stack([one.expand(short.shape) for one in short.k])
        w_hat = w_hat - k * ((k * w_hat).sum(1, keepdim=True) * short.inverse_k2)
    there = torch.zeros(*lead, *long.shape, dtype=torch.complex128)
    most = (short.shape[-1] - 1) * 2 + 1
    assert long.shape[-1] >= most
    there[..., :most:2] = w_hat
    return problem, longer, w_hat, there


@pytest.mark.parametrize(
    "settings",
    [
        {"grid": 24, "length": 1.0, "form": "basdevant"},
        {"grid": (24, 16), "length": (1.5, 1.0), "form": "flux"},
        {"grid": 16, "length": 2.0, "scheme": "etdrk4"},
        {"grid": 12, "equation": "navier_stokes_3d", "length": 6.0},
    ],
    ids=["square to 1:2", "3:2 to 3:4", "etdrk4", "cube"],
)
def test_a_flow_that_is_periodic_in_half_the_box_is_that_of_the_half_box(settings):
    three = settings.get("equation") == "navier_stokes_3d"
    settings = {"viscosity": 1e-3, "dt": 5e-3, "scheme": "cn_ab2", **settings}
    problem, longer, w_hat, there = on_both(three, **settings)
    short = Simulation(problem, range(2), 0).load_state(0, w_hat).advance(20)
    long = Simulation(longer, range(2), 0).load_state(0, there).advance(20)
    moved = (short.state - w_hat).abs().max()
    repeated = long.state[..., : 2 * w_hat.shape[-1] - 1 : 2]
    assert (repeated - short.state).abs().max() < 1e-13 < 1e-3 * moved
    assert long.state[..., 1::2].abs().max() < 1e-15
    for name, values in diagnostics_of(short).measure().items():
        np.testing.assert_allclose(diagnostics_of(long).measure()[name], values, rtol=1e-10)


@pytest.mark.parametrize("grid", [Grid((12, 8), (1.5, 1.0)), Grid((8, 12, 10))])
def test_transforms_with_gradients(grid):
    like = torch.zeros(1, dtype=torch.float64)
    transform = DifferentiableTransform(grid, like)
    fields = torch.randn(2, *grid.points, dtype=torch.float64)
    pairs = transform.spectra(fields)
    other = torch.view_as_real(
        hermitian(torch.randn(2, *grid.shape, dtype=torch.complex128), grid.dimensions)
    )
    assert torch.allclose(transform.spectra(transform.fields(other)), other, atol=1e-13)
    one, two = (pairs * other).sum(), (fields * transform.spectra_transposed(other)).sum()
    assert abs(one - two) < 1e-12
    one = (transform.fields(other) * fields).sum()
    two = (other * transform.fields_transposed(fields)).sum()
    assert abs(one - two) < 1e-11


def test_initial_laws_are_of_the_wavenumber_and_not_of_its_integers():
    numerics = {"grid": (48, 24), "length": (2.0, 1.0), "viscosity": 1e-3}
    wide = {"kind": "gaussian_field", "alpha": 2.0, "tau": 20.0}
    simulation = Simulation(Problem(**numerics, **{**QUIET, "initial": wide}), range(1000), 0)
    w_hat, grid = simulation.initialise().state, simulation.grid
    assert (hermitian(w_hat) - w_hat).abs().max() < 1e-15
    expected = 2 * 20.0**2 * (grid.k2 + 20.0**2) ** -2.0 * (grid.k2 > 0)
    found = w_hat.abs().square().mean(0)
    assert torch.allclose(found, expected, rtol=0.25)
    band = {"kind": "band", "wavenumber": 6.0, "width": 1.0, "energy": 0.3}
    simulation = Simulation(Problem(**numerics, **{**QUIET, "initial": band}), range(100), 0)
    w_hat = simulation.initialise().state
    drawn = w_hat.abs().sum(0) > 0
    length = grid.k2.sqrt() / grid.unit  # in units of the longest side
    assert torch.equal(drawn, (length - 6).abs() <= 1)
    energy = diagnostics_of(simulation).measure()["energy"].mean()
    assert energy == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize(
    "changes, words",
    [
        (["generate.grid=[64,32,32]"], r"generate.grid=\[64, 32, 32\] has 3 entries, but vort"),
        (["generate.record.grid=[32]"], r"generate.record.grid=\[32\] has 1 entries, but vort"),
        (
            ["physics.length=[1,2]"],
            "physics.forcing.kind=published needs equal sides, not sides of",
        ),
        (["generate.grid=[64,31]"], r"generate.grid.*=31: Input should be a multiple of 2"),
        (["generate.grid=[]"], "generate.grid"),
        (["generate.closure=diffusion", "generate.grid=[64,32]"], "generate.closure=diffusion ne"),
        (["generate.record.grid=[64,128]"], r"generate.record.grid=\[64, 128\] is finer"),
    ],
)
def test_what_needs_equal_sides_is_one_line(changes, words):
    with pytest.raises(ValueError, match=words) as error:
        reading.load("diffusion_64", ["generate.closure=none", *changes])
    assert "\n" not in str(error.value)


def test_a_recipe_of_lists_reads_back_and_numbers_keep_their_hash():
    problem = Problem(grid=[24, 16], length=[3, 2], viscosity=1e-3, **QUIET)
    again = Problem(**problem.recipe())
    assert again == problem and again.member_hash() == problem.member_hash()
    assert problem.sizes == (24, 16) and problem.lengths == (3.0, 2.0)
    equal = Problem(grid=24, viscosity=1e-3, **QUIET)
    assert equal.recipe()["grid"] == 24 and equal.recipe()["length"] == 1.0
