"""An excitable medium in a stirred tracer: four channels, two of which react."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from hpc_closure.spectral.differentiable import DifferentiableSolver
from hpc_closure.spectral.modes.differentiable import DifferentiableTransform
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

MEDIUM = Problem(
    equation="excitable",
    grid=32,
    length=3.0,
    dt=0.0125,
    drag=0.1,
    scheme="etdrk4",
    initial={"kind": "band", "wavenumber": 4, "energy": 0.3},
    noise={"kind": "none"},
)
NAMES = [channel.name for channel in MEDIUM.physics.channels]


def random_state(problem=MEDIUM, members=2):
    """Return a simulation with random states of all channels, all retained modes included."""
    sim = Simulation(problem, range(members), 0)
    shape = (members, 4, problem.grid, problem.grid)
    fields = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fields[:, 2:] = 0.4 + 0.5 * fields[:, 2:]
    spectra = sim.transform.to_spectral(fields)
    spectra[:, 0, 0, 0] = 0
    return sim.load_state(0, spectra)


def on_all_points(fields, problem, points):
    """Return the rates of fields (4, n, n) in plain numpy, products on a grid of many points."""
    n, physics = problem.grid, problem.physics
    kept = (n - 1) // 3

    def moved(fields, size):
        """Interpolate to another grid, or cut to the retained modes of a smaller one."""
        old = fields.shape[-1]
        spectrum = np.fft.fftshift(np.fft.fft2(fields), axes=(-2, -1))
        out = np.zeros((*fields.shape[:-2], size, size), dtype=complex)
        here, there = (slice(side // 2 - kept, side // 2 + kept + 1) for side in (old, size))
        out[..., there, there] = spectrum[..., here, here]
        shifted = np.fft.ifftshift(out, axes=(-2, -1))
        return np.fft.ifft2(shifted).real * (size / old) ** 2

    def slope(field, axis):
        k = 2 * np.pi / problem.length * np.fft.fftfreq(points, 1 / points)
        factor = 1j * (k[:, None] if axis == 0 else k[None, :])
        return np.fft.ifft2(factor * np.fft.fft2(field)).real

    w, c, d, v = moved(fields, points)
    k = 2 * np.pi / problem.length * np.fft.fftfreq(points, 1 / points)
    k2 = k[:, None] ** 2 + k[None, :] ** 2
    k2[0, 0] = np.inf
    psi = np.fft.ifft2(np.fft.fft2(w) / k2).real
    along_x, along_y = slope(psi, 1), -slope(psi, 0)  # the velocity
    rates = [-(along_x * slope(field, 0) + along_y * slope(field, 1)) for field in (w, c, d, v)]
    rates[1] = rates[1] - along_x
    gradient = (slope(c, 0) + 1) ** 2 + slope(c, 1) ** 2
    threshold = (v + physics.threshold_offset) / physics.threshold_scale
    rates[2] = rates[2] + physics.reaction_rate * d * (1 - d) * (d - threshold)
    rates[2] = rates[2] + physics.stimulus * (1 - d) * gradient
    rates[3] = rates[3] + d / physics.recovery_time
    return moved(np.array(rates), n)


def test_rates_are_those_of_plain_numpy_on_a_finer_grid():
    """Products of three fields are free of aliasing, too."""
    problem = MEDIUM.replace(stimulus=0.3)
    sim = random_state(problem, 1)
    fields = np.stack([sim.fields([name])[name][0].numpy() for name in NAMES])
    expected = on_all_points(fields, problem, 96)
    actual = sim.transform.to_physical(sim.nonlinear_hat())[0].numpy()
    for channel, name in enumerate(NAMES):
        scale = np.abs(expected[channel]).max()
        assert np.abs(actual[channel] - expected[channel]).max() < 1e-12 * scale, name


@pytest.mark.parametrize("start", [(0.02, 0.0), (0.3, 0.0), (0.9, 0.7)])
def test_a_homogeneous_state_follows_its_two_ordinary_equations(start):
    problem = MEDIUM.replace(dt=2e-3, stimulus=0.02)
    physics = problem.physics
    sim = Simulation(problem, [0], 0)
    spectra = torch.zeros_like(sim.state)
    spectra[0, 2, 0, 0], spectra[0, 3, 0, 0] = start

    def rates(_, state):
        d, v = state
        growth = physics.reaction_rate * d * (d - (v + physics.threshold_offset) / 0.75)
        return [(1 - d) * (growth + physics.stimulus), (d - v) / physics.recovery_time]

    sim.load_state(0, spectra).advance(1000)
    exact = solve_ivp(rates, (0, 2), start, method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    assert sim.state[0, 2:, 0, 0].real.numpy() == pytest.approx(exact, abs=1e-6)
    assert not sim.state[0, :2].any() and abs(exact[0] - start[0]) > 0.005


def test_a_strong_stimulus_does_not_lift_the_activator_beyond_one():
    """Above 1 it would grow without end, because the threshold (v + b)/a follows it."""
    sim = Simulation(MEDIUM.replace(stimulus=50.0), [0], 0)
    sim.load_state(0, torch.zeros_like(sim.state)).advance(800)
    d, v = sim.state[0, 2:, 0, 0].real.tolist()
    assert d == pytest.approx(1, abs=1e-3) and v == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("matrices", [0, 48])
def test_the_differentiable_term_agrees(matrices):
    problem = MEDIUM.replace(stimulus=0.3)
    sim = random_state(problem)
    expected = torch.view_as_real(sim.nonlinear_hat())
    transform = DifferentiableTransform(sim.grid, sim.pairs, matrices)
    terms = problem.make_equation(sim.transform)
    actual = terms.differentiable_nonlinear(sim.pairs, transform)
    for channel, name in enumerate(NAMES):
        size = expected[:, channel].abs().max()
        assert (actual[:, channel] - expected[:, channel]).abs().max() < 1e-12 * size, name


@pytest.mark.parametrize("scheme", ["ab3", "cn_ab2", "etdrk4"])
def test_the_differentiable_solver_agrees(scheme):
    problem = MEDIUM.replace(scheme=scheme, dt=2e-3)
    sim = random_state(problem)
    states, _ = DifferentiableSolver(problem).advance(sim.state.clone(), 6)
    sim.advance(6)
    assert (states - sim.state).abs().max() < 1e-12 * sim.state.abs().max()


def test_gradients_are_those_of_finite_differences():
    sim = random_state(MEDIUM, 1)
    solver = DifferentiableSolver(MEDIUM)
    generator = torch.Generator().manual_seed(3)
    change = sim.transform.to_spectral(
        torch.randn(1, 4, 32, 32, generator=generator, dtype=torch.float64)
    )

    def value(state):
        return torch.view_as_real(solver.advance(state, 3)[0]).square().sum()

    state = sim.state.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(state), state)
    slope = (torch.view_as_real(gradient) * torch.view_as_real(change)).sum().item()
    step = 1e-5
    ahead, behind = (value(sim.state + sign * step * change).item() for sign in (1, -1))
    assert slope == pytest.approx((ahead - behind) / (2 * step), rel=1e-6)


def test_a_shear_flow_along_the_gradient_makes_its_closed_form():
    """u = U cos(l y) at rest in time: c = -U cos(l y) (1 - exp(-kappa l^2 t)) / (kappa l^2)."""
    problem = MEDIUM.replace(viscosity=0, drag=0, tracer_diffusivity=0.05, stimulus=0)
    sim = Simulation(problem, [0], 0)
    _, y = sim.grid.coordinates()
    wave, speed = 2 * 2 * math.pi / problem.length, 0.7
    w = (speed * wave * torch.sin(wave * y)).expand(32, 32)  # -u_y
    spectra = torch.zeros_like(sim.state)
    spectra[0, 0] = sim.transform.to_spectral(w[None])[0]
    sim.load_state(0, spectra)
    velocity = sim.fields(["velocity"])["velocity"][0]
    assert (velocity[0] - speed * torch.cos(wave * y)).abs().max() < 1e-12
    assert velocity[1].abs().max() < 1e-12
    assert sim.speed() == pytest.approx(speed)
    sim.advance(40)
    rate = 0.05 * wave**2
    size = speed * (1 - math.exp(-rate * sim.time)) / rate
    tracer = sim.fields(["tracer"])["tracer"][0]
    assert (tracer + size * torch.cos(wave * y)).abs().max() < 1e-6 * size


def test_the_gradient_feeds_the_variance_of_the_tracer():
    """d<c^2>/dt = -2 <u c>: advection adds and removes none."""
    sim = random_state()
    fields = sim.fields(["tracer", "velocity"])
    rates = sim.transform.to_physical(sim.nonlinear_hat()[:, 1])
    feed = -(fields["velocity"][:, 0] * fields["tracer"]).mean((1, 2))
    gain = (fields["tracer"] * rates).mean((1, 2))
    assert gain.numpy() == pytest.approx(feed.numpy(), rel=1e-10)


SIGNS = torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64)[:, None, None]


def turned(fields, permutation, signs):
    """Move fields (members, 4, n, n) by a map of the square; a reflection changes that of w."""
    exchanged = permutation == (1, 0)
    out = fields.transpose(-2, -1) if exchanged else fields
    for axis, sign in zip((-2, -1), signs):
        if sign < 0:
            out = out.flip(axis).roll(1, axis)  # the point at 0 remains
    return out * SIGNS if (-1) ** exchanged * signs[0] * signs[1] < 0 else out


def marched(fields, steps=10):
    sim = Simulation(MEDIUM, range(len(fields)), 0)
    sim.load_state(0, sim.transform.to_spectral(fields)).advance(steps)
    return sim.transform.to_physical(sim.state)


@pytest.mark.parametrize("permutation", [(0, 1), (1, 0)])
@pytest.mark.parametrize("sign_x", [1, -1])
@pytest.mark.parametrize("sign_y", [1, -1])
def test_maps_of_the_square_are_symmetries_as_the_equation_says(permutation, sign_x, sign_y):
    sim = random_state()
    fields = sim.transform.to_physical(sim.state * torch.exp(-0.02 * sim.grid.integer_k2))
    candidate = permutation, (sign_x, sign_y)
    first, last = marched(turned(fields, *candidate)), turned(marched(fields), *candidate)
    difference = (first - last).abs().max() / last.abs().max()
    assert MEDIUM.physics.is_symmetry(*candidate) == (difference < 1e-10)
    assert MEDIUM.physics.is_symmetry(*candidate) == (
        candidate in [((0, 1), (1, 1)), ((0, 1), (1, -1))]
    )
    assert difference < 1e-10 or difference > 1e-4


def test_moving_a_state_moves_what_follows():
    sim = random_state()
    fields = sim.transform.to_physical(sim.state * torch.exp(-0.02 * sim.grid.integer_k2))
    first, last = marched(fields.roll((5, 3), (-2, -1))), marched(fields).roll((5, 3), (-2, -1))
    assert (first - last).abs().max() < 1e-10 * last.abs().max()


def test_members_begin_at_rest_in_a_moving_flow():
    sim = Simulation(MEDIUM, range(3), 0).initialise()
    assert sim.state[:, 0].abs().amax((1, 2)).min() > 0 and not sim.state[:, 1:].any()
    assert sim.events is None


def test_the_medium_is_excited_here_and_there():
    """Some points are excited, most are not, and the activator remains between 0 and 1."""
    problem = MEDIUM.replace(
        grid=64,
        length=2 * math.pi,
        dt=0.02,
        precision="float32",
        noise={"kind": "ring", "wavenumber": 2.5, "width": 0.5, "energy_rate": 0.1},
    )
    sim = Simulation(problem, [0], 1).initialise().advance(400)
    shares = []
    for _ in range(6):
        activator = sim.advance(25).fields(["activator"])["activator"]
        assert -0.1 < activator.min() and activator.max() < 1.1
        shares.append((activator > 0.5).double().mean().item())
    assert 0.01 < np.mean(shares) < 0.3, shares
