"""The nonlinear terms: forms, conservation, known fields."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from advection_oracles import in_form, oracle_forms  # noqa: F401

from hpc_closure.generate.certificate import certify
from hpc_closure.spectral.diagnostics import Diagnostics
from hpc_closure.spectral.equations import Equation
from hpc_closure.spectral.equations.advection import FORMS as ADVECTION_FORMS
from hpc_closure.spectral.forcing import Forcing, RingForcing
from hpc_closure.spectral.initial import Initial
from hpc_closure.spectral.modes.grid import Grid, hermitian
from hpc_closure.spectral.modes.transform import PRECISIONS, Transform
from hpc_closure.spectral.noise.laws import Noise, RingNoise
from hpc_closure.spectral.problem import WITH_EXPLICIT_HALF, WITH_MEMORY, Numerics, Problem
from hpc_closure.spectral.schemes import SCHEMES
from hpc_closure.spectral.simulation import Simulation

TURN = 2 * math.pi
FORMS = ("advective", "flux", "basdevant", "packed")
# two of them stand in the tests only
with_oracles = pytest.mark.usefixtures("oracle_forms")


def rough_state(grid, members=3):
    """A random field with a k^-3 energy tail up to the last retained mode."""
    generator = torch.Generator().manual_seed(1)
    w_hat = torch.randn(members, *grid.shape, dtype=torch.complex128, generator=generator)
    k2 = grid.integer_k2.double()
    amplitude = torch.where(k2 > 0, k2.clamp(min=1) ** -0.5, 0.0)
    return hermitian(w_hat * amplitude)


def nonlinear(form, grid=64, precision="float64", state=None, **physics):
    problem = in_form(Problem(grid=grid, precision=precision, **physics), form)
    sim = Simulation(problem, range(len(state)), 0).load_state(0, state)
    return sim.nonlinear_hat()


def padded_reference(grid, w_hat):
    """``-(u w_x + v w_y)`` by brute force on a grid twice as fine."""
    n, K = 2 * grid.size, grid.modes
    full = torch.zeros(len(w_hat), n, n // 2 + 1, dtype=torch.complex128)
    full[:, : K + 1, : K + 1], full[:, -K:, : K + 1] = w_hat[:, : K + 1], w_hat[:, -K:]
    k = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) * grid.unit
    kx, ky = k[:, None], k[None, : n // 2 + 1].abs()
    k2 = kx**2 + ky**2
    psi = full * torch.where(k2 > 0, 1 / k2, 0.0)

    def physical(s):
        return torch.fft.irfft2(s, s=(n, n), norm="forward")

    product = physical(1j * ky * psi) * physical(1j * kx * full)
    product -= physical(1j * kx * psi) * physical(1j * ky * full)
    N = torch.fft.rfft2(product, norm="forward")
    rows = torch.cat([torch.arange(K + 1), torch.arange(n - K, n)])
    return -N[:, rows, : K + 1]


@pytest.mark.parametrize("size", [16, 24, 64])
@pytest.mark.parametrize("length", [1.0, 2 * math.pi])
@pytest.mark.parametrize("form", FORMS)
@with_oracles
def test_every_form_is_the_dealiased_advection(form, size, length):
    grid = Grid(size, length)
    state = rough_state(grid)
    reference = padded_reference(grid, state)
    computed = nonlinear(form, size, state=state, length=length)
    assert (computed - reference).abs().max() < 1e-13 * reference.abs().max()


@pytest.mark.parametrize(
    "form, tolerance", [("advective", 3e-6), ("flux", 1e-5), ("basdevant", 5e-5)]
)
@with_oracles
def test_single_precision_tail(form, tolerance):
    grid = Grid(128)
    state = rough_state(grid, 1)
    tail = (grid.shell() >= 30) & (grid.shell() <= 34)
    reference = nonlinear("advective", 128, state=state)[:, tail]
    single = nonlinear(form, 128, "float32", state)[:, tail]
    error = (single - reference).abs().square().mean().sqrt()
    assert error < tolerance * reference.abs().square().mean().sqrt()


@pytest.mark.parametrize("form", FORMS)
@with_oracles
def test_energy_and_enstrophy_transfers_vanish(form):
    from hpc_closure.spectral.diagnostics import Diagnostics

    grid = Grid(64)
    sim = Simulation(in_form(Problem(), form), range(3), 0).load_state(0, rough_state(grid))
    sums = Diagnostics(sim).transfer()
    assert (abs(sums["energy"]) < 1e-13 * sums["energy_magnitude"]).all()
    assert (abs(sums["enstrophy"]) < 1e-13 * sums["enstrophy_magnitude"]).all()


def test_linear_symbol():
    problem = Problem(
        grid=16,
        length=2.0,
        viscosity=1e-2,
        hyperviscosity=1e-6,
        hyperviscosity_order=2,
        drag=0.3,
        beta=4.0,
    )
    linear = Simulation(problem, [0], 0).linear
    k = math.pi
    kx, ky = 2 * k, 3 * k
    k2 = kx**2 + ky**2
    expected = -1e-2 * k2 - 1e-6 * k2**2 - 0.3 + 1j * 4.0 * kx / k2
    assert abs(linear[2, 3].item() - expected) < 1e-13 * abs(expected)
    assert linear[0, 0] == -0.3


def test_rossby_wave_moves_west():
    # One plane wave solves the full equation: w ~ exp(i(kx x + ky y - omega t)),
    # omega = -beta kx / k^2, without nonlinear self-interaction.
    problem = Problem(
        grid=16, viscosity=0.0, beta=50.0, scheme="etdrk4", dt=1e-2, initial={"kind": "zero"}
    )
    sim = Simulation(problem, [0], 0)
    state = torch.zeros(1, *sim.grid.shape, dtype=torch.complex128)
    state[0, 2, 1] = 0.5
    sim.load_state(0, state).advance(100)
    kx, k2 = 2 * sim.grid.unit, 5 * sim.grid.unit**2
    phase = 50.0 * kx / k2  # -omega t at t = 1
    expected = 0.5 * complex(math.cos(phase), math.sin(phase))
    assert abs(sim.state[0, 2, 1].item() - expected) < 1e-12


@pytest.mark.parametrize(
    "forcing, field",
    [
        (
            {"kind": "published"},
            lambda x, y: 0.1 * (torch.sin(TURN * (x + y)) + torch.cos(TURN * (x + y))),
        ),
        (
            {"kind": "kolmogorov", "amplitude": 2.0, "wavenumber": 3},
            lambda x, y: -2.0 * 6 * math.pi * torch.cos(6 * math.pi * y) + 0 * x,
        ),
    ],
)
def test_steady_forcings_are_the_stated_fields(forcing, field):
    grid = Grid(32)
    spectrum = Forcing.model_validate(forcing).spectrum(grid)
    computed = Transform(grid).to_physical(spectrum[None])[0]
    torch.testing.assert_close(computed, field(*grid.coordinates()), rtol=0, atol=1e-13)


def test_ring_forcing_has_the_stated_rms_and_modes():
    grid = Grid(32)
    f = RingForcing(amplitude=0.7, wavenumber=6, width=1).spectrum(grid)
    assert abs((grid.weights * f.abs() ** 2).sum() - 0.49) < 1e-13
    lengths = grid.integer_k2[f != 0].double().sqrt()
    assert lengths.min() >= 5 and lengths.max() <= 7
    assert torch.equal(hermitian(f), f)


def test_kuramoto_sivashinsky_nonlinear_term():
    problem = Problem(
        equation="kuramoto_sivashinsky1d", grid=64, length=22.0, scheme="etdrk4", dt=0.1
    )
    sim = Simulation(problem, [0, 1], 0).initialise()
    u, k = sim.state, sim.grid.ky
    physical = sim.fields(["state"])["state"]
    u_x = sim.transform.to_physical(1j * k * u)
    expected = sim.transform.to_spectral(-physical * u_x)
    torch.testing.assert_close(sim.nonlinear_hat(), expected, rtol=0, atol=1e-14)


def test_kuramoto_sivashinsky_is_chaotic_and_bounded():
    problem = Problem(
        equation="kuramoto_sivashinsky1d",
        grid=64,
        length=22.0,
        scheme="etdrk4",
        dt=0.25,
        initial={"kind": "line", "amplitude": 0.1, "wavenumber": 4},
    )
    sim = Simulation(problem, range(8), 0).initialise().advance(2000)
    rms = sim.fields(["state"])["state"].square().mean().sqrt()
    assert 1.0 < rms < 1.7  # attractor of L = 22: rms about 1.3
    assert sim.state[:, 0].abs().max() < 1e-12  # the mean is conserved


def test_burgers_nonlinear_term_and_dissipation():
    problem = Problem(
        equation="burgers1d",
        grid=64,
        length=TURN,
        viscosity=0.05,
        scheme="etdrk4",
        dt=0.01,
        initial={"kind": "line", "wavenumber": 4},
    )
    sim = Simulation(problem, [0, 3], 1).initialise()
    u = sim.fields(["state"])["state"].numpy()
    k = np.arange(33)
    slope = np.fft.irfft(1j * k * np.fft.rfft(u))
    rate = np.fft.irfft(np.fft.rfft(u * slope) * (k <= 21))
    term = sim.transform.to_physical(sim.nonlinear_hat()).numpy()
    np.testing.assert_allclose(term, -rate, atol=1e-12)
    # d/dt <u^2>/2 = -nu <u_x^2>
    figures = Diagnostics(sim).measure()
    dissipation = 0.05 * (slope**2).mean(1)
    np.testing.assert_allclose(figures["energy_dissipation"], dissipation, rtol=1e-10)
    sim.advance(10)
    assert certify(sim, steps=3).passed
    assert (Diagnostics(sim).measure()["energy"] < figures["energy"]).all()


def test_every_choice_of_a_recipe_is_there():
    """Names that a recipe may state without loading torch, against what carries them out."""
    for key, known in (("scheme", SCHEMES), ("form", ADVECTION_FORMS), ("precision", PRECISIONS)):
        assert set(get_args(Numerics.model_fields[key].annotation)) == set(known)
    assert {name for name, one in SCHEMES.items() if one.has_memory} == set(WITH_MEMORY)
    halves = {name for name, one in SCHEMES.items() if one.has_explicit_half}
    assert halves == set(WITH_EXPLICIT_HALF)


@pytest.mark.parametrize("family", [Equation, Forcing, Noise, Initial])
def test_every_kind_can_be_chosen_and_explains_itself(family):
    for name, kind in family.kinds.items():
        chosen = family.model_validate({family.discriminator: name})
        assert type(chosen) is kind and kind.__doc__
        assert all(
            field.description
            for key, field in kind.model_fields.items()
            if key not in (*Equation.model_fields, "kind", "hyperviscosity_order")
        )


def test_keys_of_another_kind_are_checked_and_dropped():
    values = {"kind": "ring", "amplitude": 1e-3, "draws": 3, "energy_rate": 0.1}
    assert Noise.model_validate(values) == RingNoise(energy_rate=0.1)
    with pytest.raises(ValueError, match="draws"):
        Noise.model_validate({**values, "draws": 0})
    with pytest.raises(ValueError, match="colour"):
        Noise.model_validate({**values, "colour": 2})
    line = Equation.model_validate({"equation": "kuramoto_sivashinsky1d", "viscosity": 1e-3})
    assert "viscosity" not in line.parameters()
