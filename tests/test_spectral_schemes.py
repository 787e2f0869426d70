"""Time schemes: amplification factors, orders, Brownian paths."""

import math

import numpy as np
import pytest
import torch

from hpc_closure.spectral.modes.grid import Grid
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.schemes import SCHEMES as SCHEME_CLASSES
from hpc_closure.spectral.schemes import Explicit
from hpc_closure.spectral.simulation import Simulation

SCHEMES = ("cn_euler", "cn_ab2", "etdrk4", "imex_rk3")
ORDERS = {"cn_euler": 1, "cn_ab2": 2, "etdrk4": 4, "imex_rk3": 3}
GAMMA = 0.4358665215084590


def amplification(scheme, z):
    """Factor of one linear step, z = L dt."""
    if scheme == "etdrk4":
        return math.exp(z)
    if scheme == "imex_rk3":
        # the implicit half of ARS(3,4,3) is an L-stable DIRK; its stability function is a cubic
        g = GAMMA
        b1, b2 = -1.5 * g**2 + 4 * g - 0.25, 1.5 * g**2 - 5 * g + 1.25
        w1 = 1 / (1 - g * z)
        w2 = (1 + z * (1 - g) / 2 * w1) / (1 - g * z)
        return (1 + z * (b1 * w1 + b2 * w2)) / (1 - g * z)
    return (1 + z / 2) / (1 - z / 2)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("form", ["basdevant", "flux"])
def test_taylor_green_decays_by_the_schemes_own_factor(scheme, form):
    problem = Problem(
        grid=32,
        viscosity=2e-2,
        scheme=scheme,
        form=form,
        dt=1e-2,
        initial={"kind": "taylor_green", "wavenumber": 2},
    )
    sim = Simulation(problem, [0], 0).initialise()
    start = sim.state.clone()
    sim.advance(100)
    factor = amplification(scheme, -problem.viscosity * 8 * sim.grid.unit**2 * problem.dt) ** 100
    assert (sim.state - factor * start).abs().max() < 1e-12 * factor * start.abs().max()


def test_schemes_are_close_to_the_exact_decay():
    z = -0.1
    for scheme, order in ORDERS.items():
        order = max(order, 2)  # Crank-Nicolson alone is second order
        assert abs(amplification(scheme, z) - math.exp(z)) < abs(z) ** (order + 1)


def take_steps(stepper, w, term, steps):
    """``steps`` steps of a scheme from the start of its history, ``term`` explicit."""
    explicit, registers = Explicit(term, torch.zeros_like(w)), stepper.make_registers(w)
    stepper.load(w, {})
    for _ in range(steps):
        stepper.step(w, explicit, registers)


def end_of_ode(scheme, steps):
    """w' = -w + w^2, w(0) = 1/4 and 1/2, to t = 1, with -w as the implicit part."""
    transform = Transform(Grid(4, dimensions=1))
    stepper = SCHEME_CLASSES[scheme](-torch.ones(2, dtype=torch.complex128), 1 / steps, transform)
    w = torch.tensor([[[0.25, 0.0], [0.5, 0.0]]], dtype=torch.float64)

    def square(w, out):
        return torch.mul(w, w, out=out)

    take_steps(stepper, w, square, steps)
    return w[0, :, 0]


@pytest.mark.parametrize(
    "scheme, tolerance",
    [("cn_euler", 3e-3), ("cn_ab2", 8e-5), ("imex_rk3", 3e-7), ("etdrk4", 2e-9)],
)
def test_closed_form_ode(scheme, tolerance):
    exact = 1 / (1 + math.e * torch.tensor([3.0, 1.0], dtype=torch.float64))
    error = (end_of_ode(scheme, 32) - exact).abs().max()
    finer = (end_of_ode(scheme, 64) - exact).abs().max()
    assert error < tolerance
    assert abs(math.log2(error / finer) - ORDERS[scheme]) < 0.15


def order_problem(scheme, dt):
    return Problem(
        grid=32,
        viscosity=2e-3,
        drag=0.1,
        beta=2.0,
        forcing={"kind": "published", "amplitude": 1.0},
        scheme=scheme,
        dt=dt,
        initial={"kind": "band", "wavenumber": 2, "width": 1, "energy": 0.1},
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_keeps_what_it_needs_of_past_steps(scheme):
    transform = Transform(Grid(4, dimensions=1))
    linear = -torch.ones(2, dtype=torch.complex128)
    make = SCHEME_CLASSES[scheme]
    w = torch.tensor([[[0.25, 0.0], [0.5, 0.0]], [[0.1, 0.2], [0.3, 0.0]]], dtype=torch.float64)
    explicit = Explicit(lambda w, out: torch.mul(w, w, out=out), torch.full_like(w, 0.1))
    one = make(linear, 0.1, transform)
    registers = one.make_registers(w)
    one.load(w, {})
    assert one.is_starting == make.has_memory and one.save() == {}
    one.step(w, explicit, registers)
    memory = {name: spectra.clone() for name, spectra in one.save().items()}
    addresses = [spectra.data_ptr() for spectra in one.save().values()]
    assert list(memory) == (["previous_hat"] if scheme == "cn_ab2" else [])
    assert not one.is_starting
    other, copy = make(linear, 0.1, transform), w.clone()
    other.load(copy, memory)
    one.step(w, explicit, registers)
    other.step(copy, explicit, registers)
    assert torch.equal(copy, w)
    one.load(w, memory)
    assert [x.data_ptr() for x in one.save().values()] == addresses  # which a graph may hold
    # row by row, as chunks of an ensemble go, it is the same
    for stepper in (one, other):
        stepper.load(w, {})
    for _ in range(3):
        one.step(w, explicit, registers)
    for row in (1, 0):
        part = Explicit(explicit.nonlinear, explicit.held[:1])
        for _ in range(3):
            rows = slice(row, row + 1)
            other.step(copy[rows], part, other.make_registers(copy[rows]), rows)
    assert torch.equal(copy, w)
    with pytest.raises(ValueError, match="needs no older_hat"):
        one.load(w, {**memory, "older_hat": w})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_order_of_convergence_on_a_forced_flow(scheme):
    time = 0.5

    def end(scheme, steps):
        sim = Simulation(order_problem(scheme, time / steps), [0], 0)
        return sim.initialise().advance(steps).state

    exact = end("etdrk4", 512)
    steps = {1: (128, 256), 2: (64, 128), 3: (16, 32), 4: (16, 32)}[ORDERS[scheme]]
    errors = [(end(scheme, n) - exact).abs().square().sum().sqrt() for n in steps]
    slope = math.log2(errors[0] / errors[1])
    assert abs(slope - ORDERS[scheme]) < 0.1, slope


class Manufactured:
    """A vorticity of two waves, ``w = g1(t) w1(x) + g2(t) w2(x)``, and the forcing that makes it.

    The mean vorticity moves nothing and is not damped, so it serves as the clock: its rate is one
    and the forcing is read off at its value, at every stage of every scheme.
    """

    RATES = (3.0, 5.0)

    def __init__(self):
        self.transform = Transform(Grid(16))
        self.equation = Problem(grid=16, viscosity=5e-3).make_equation(self.transform)
        shape = (1, *self.transform.grid.shape, 2)
        self.waves = torch.zeros(2, *shape, dtype=torch.float64)
        self.waves[0, 0, 1, 1, 0] = 8.0
        self.waves[1, 0, 2, 1, 1] = self.waves[1, 0, -3, 2, 0] = 6.0

    def exact(self, time):
        """Real pairs of the solution, the clock in the mean."""
        a, b = self.RATES
        w = (1 + math.sin(a * time)) * self.waves[0] + math.cos(b * time) * self.waves[1]
        w[0, 0, 0, 0] = time
        return w

    def forcing(self, time):
        """dw/dt - N(w) - L w."""
        a, b = self.RATES
        rate = a * math.cos(a * time) * self.waves[0] - b * math.sin(b * time) * self.waves[1]
        w = self.exact(time)
        flow = self.equation.nonlinear(w, torch.empty_like(w))
        out = rate - flow - w * self.equation.linear.real[None, :, :, None]
        out[0, 0, 0, 0] = 1.0
        return out

    def explicit(self, w, out):
        """R(w) at the time that w itself tells."""
        force = self.forcing(float(w[0, 0, 0, 0]))
        return self.equation.nonlinear(w, out).add_(force)

    def error(self, scheme, dt, steps):
        """Of the schemes' end, relative."""
        stepper = SCHEME_CLASSES[scheme](self.equation.linear, dt, self.transform)
        w = self.exact(0.0)
        take_steps(stepper, w, self.explicit, steps)
        exact = self.exact(dt * steps)
        assert abs(float(w[0, 0, 0, 0]) - dt * steps) < 1e-13
        return float((w - exact).norm() / exact.norm())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_order_of_convergence_on_manufactured_vorticity(scheme):
    steps = {1: 256, 2: 64, 3: 128, 4: 32}[ORDERS[scheme]]
    problem = Manufactured()
    start = problem.exact(0.0)
    flow = problem.equation.nonlinear(start, torch.empty_like(start))
    assert flow.norm() > 0.5 * start.norm()  # the waves do act on each other
    errors = [problem.error(scheme, 0.5 / n, n) for n in (steps, 2 * steps)]
    slope = math.log2(errors[0] / errors[1])
    assert errors[1] < 0.02 and abs(slope - ORDERS[scheme]) < 0.1, (errors, slope)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_steady_state_of_a_forced_mode_is_exact(scheme):
    # A single forced mode has no nonlinear term: its steady state is f / (nu k^2).
    problem = Problem(
        grid=16,
        viscosity=0.1,
        forcing={"kind": "published"},
        scheme=scheme,
        dt=4e-2,
        initial={"kind": "zero"},
    )
    sim = Simulation(problem, [0], 0).initialise().advance(200)
    expected = 0.1 * complex(0.5, -0.5) / (0.1 * 2 * sim.grid.unit**2)
    tolerance = 1e-11 if scheme == "etdrk4" else 1e-13
    assert abs(sim.state[0, 1, 1].item() - expected) < tolerance


@pytest.mark.parametrize("scheme", ["cn_euler", "cn_ab2", "etdrk4", "imex_rk3"])
def test_strong_order_on_one_brownian_path(scheme):
    # Additive noise: the Euler-Maruyama family converges strongly with order one.
    time, coarsest, levels = 0.25, 16, 4
    noise = {"kind": "ring", "wavenumber": 2, "width": 1, "energy_rate": 0.2}
    ends = []
    for level in range(levels + 2):
        dt = time / coarsest / 2**level
        problem = order_problem(scheme, dt)
        problem = problem.replace(noise=noise, path_dt=time / coarsest, grid=16)
        sim = Simulation(problem, range(8), 0).initialise()
        ends.append(sim.advance(coarsest * 2**level).state)
    errors = [(e - ends[-1]).abs().square().sum().sqrt().item() for e in ends[:levels]]
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    assert slopes.mean() > 0.9, (errors, slopes)


def test_linear_noise_response_matches_its_law():
    # No flow, one linear mode: w is an AR(1) process with known stationary variance.
    problem = Problem(
        grid=16,
        viscosity=0.05,
        noise={"kind": "ring", "wavenumber": 1, "width": 0.1, "energy_rate": 1e-8},
        initial={"kind": "zero"},
        dt=1e-2,
    )
    sim = Simulation(problem, range(200), 0).initialise().advance(600)
    z = problem.viscosity * sim.grid.unit**2 * problem.dt / 2
    a, b = (1 - z) / (1 + z), problem.dt / (1 + z)
    variance = (b * float(sim.noise.std_hat[1, 0])) ** 2 / (1 - a**2)
    measured = sim.state[:, [1, 0], [0, 1]].abs().square().mean()
    assert abs(measured / variance - 1) < 4 / 400**0.5


def test_adaptive_steps_are_the_members_own():
    problem = Problem(
        grid=32,
        dt=2e-2,
        cfl=0.05,
        scheme="imex_rk3",
        initial={"kind": "gaussian_field", "amplitude": 60.0},
        noise={"kind": "q_wiener", "amplitude": 5e-4, "draws": 10, "correlation": 0.005},
    )
    sim = Simulation(problem, range(6), 0, threads=1).initialise()
    levels = sim.levels()
    assert len(set(levels.tolist())) > 1
    sim.advance(5)
    alone = Simulation(problem, [4], 0).initialise().advance(2).advance(3)
    assert torch.equal(alone.state[0], sim.state[4])


def test_adaptive_step_equals_the_fixed_small_step():
    # With one level for the whole run the ladder is a fixed step of dt / 2^j on the refined path.
    noise = {"kind": "q_wiener", "amplitude": 5e-4, "draws": 10, "correlation": 0.005}
    smooth = {"kind": "band", "wavenumber": 2, "width": 1, "energy": 0.1}
    ladder = Problem(grid=32, dt=8e-3, cfl=0.08, noise=noise, initial=smooth)
    sim = Simulation(ladder, [0], 0).initialise()
    level = int(sim.levels()[0])
    assert level > 0
    fixed = Problem(grid=32, dt=8e-3 / 2**level, noise=noise, path_dt=8e-3, initial=smooth)
    other = Simulation(fixed, [0], 0).initialise().advance(2 * 2**level)
    sim.advance(2)
    torch.testing.assert_close(sim.state, other.state, rtol=0, atol=1e-14)


def test_a_member_beyond_the_ladder_is_lost_and_the_others_go_on():
    ladder = Problem(grid=16, dt=1e-2, cfl=1e-2, max_refinements=3)
    members = range(6)
    sim = Simulation(ladder, members, 0).initialise()
    middle = float(np.median(sim.speed())) * 1e-2 * 16 / 2**3  # half of them need more
    some = ladder.replace(cfl=middle)
    sim = Simulation(some, members, 0).initialise().advance(2)
    lost = sim.mark_lost()
    assert 0 < lost.sum() < 6
    assert sim.state[torch.from_numpy(lost)].isnan().all()
    left = [member for member in members if not lost[member]]
    alone = Simulation(some, left, 0).initialise().advance(2)
    assert torch.equal(sim.state[left], alone.state)


def test_a_member_that_is_not_finite_or_too_large_to_square_is_lost():
    sim = Simulation(Problem(grid=16), [4, 5, 6, 7], 0).initialise()
    expected = sim.state.clone()
    sim.state[0, 1, 2] = math.nan
    sim.state[2, 1, 2] = 1e200
    assert sim.mark_lost().tolist() == [True, False, True, False]
    assert sim.state[[0, 2]].isnan().all() and torch.equal(sim.state[[1, 3]], expected[[1, 3]])
