"""Three-dimensional flow: the term against another form, conservation, forcings, bits."""

import json
import math
import sys

import numpy as np
import pytest
import torch

from hpc_closure.spectral.diagnostics import diagnostics_of
from hpc_closure.spectral.differentiable import DifferentiableSolver
from hpc_closure.spectral.equations.convection import Convection
from hpc_closure.spectral.modes.differentiable import DifferentiableTransform
from hpc_closure.spectral.modes.grid import Grid, hermitian, to_fields, to_spectra
from hpc_closure.spectral.modes.resolution import pencils
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.noise.draws import NoiseModel
from hpc_closure.spectral.noise.laws import OrnsteinUhlenbeck, RingNoise
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

POWER = {"kind": "power", "power": 0.7, "reach": 1.5}
OU = {"kind": "ornstein_uhlenbeck", "wavenumber": 1.5, "width": 0.5, "correlation_time": 0.1}


def problem_of(**changes):
    settings = {"grid": 16, "length": 2 * math.pi, "viscosity": 0.02, "dt": 0.01, "scheme": "rk4"}
    return Problem(**{"equation": "navier_stokes_3d", **settings, **changes})


def simulation_of(members=(0, 3), **changes):
    return Simulation(problem_of(**changes), list(members), 1).initialise()


def rotational(u_hat, grid):
    """Return P (u x curl u) by whole transforms: another form of the term, written anew."""
    k = torch.stack(torch.broadcast_tensors(*grid.k))
    curl = 1j * torch.cross(k.expand(u_hat.shape).to(u_hat), u_hat, dim=1)
    u, vorticity = to_fields(u_hat, grid.sizes), to_fields(curl, grid.sizes)
    force = to_spectra(torch.cross(u, vorticity, dim=1), grid.mode_counts)
    return force - k * ((k * force).sum(1) * grid.inverse_k2)[:, None]


def largest_divergence(u_hat, grid):
    return sum(k * part for k, part in zip(grid.k, u_hat.unbind(1))).abs().max()


# -- the term -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [2 * math.pi, (1.0, 2.0, 0.5)])
def test_the_term_is_that_of_the_rotational_form(lengths):
    physics = problem_of().physics
    grid = Grid(16, lengths, 3)
    transform = Transform(grid)
    u_hat = physics.draw_initial(grid, [0, 1], 0, "test")
    convection = Convection(transform)
    u = torch.view_as_real(u_hat)
    u = convection.project(u).contiguous()  # solenoidal for these lengths
    expected = rotational(torch.view_as_complex(u), grid)
    assert convection.compiled is not None
    for found in (
        convection.tendency(u, torch.empty_like(u)),
        convection.by_transforms(u, torch.empty_like(u)),
        convection.differentiable_tendency(u, DifferentiableTransform(grid, u)),
    ):
        difference = torch.view_as_complex(found.contiguous()) - expected
        assert difference.abs().max() < 1e-14 * expected.abs().max()


def test_the_term_on_unequal_sides():
    grid = Grid((16, 12, 10), (2.0, 1.0, 1.5))
    convection = Convection(Transform(grid))
    assert convection.compiled is None
    noise = torch.randn(2, 3, *grid.sizes, dtype=torch.float64)
    u = convection.project(torch.view_as_real(to_spectra(noise, grid.mode_counts)))
    found = torch.view_as_complex(convection.tendency(u, torch.empty_like(u)))
    expected = rotational(torch.view_as_complex(u), grid)
    assert (found - expected).abs().max() < 1e-13 * expected.abs().max()


def test_an_exchange_of_axes_exchanges_the_velocities():
    simulation = simulation_of()
    rate = simulation.nonlinear_hat()
    for axes in [(1, 2, 0), (2, 0, 1), (1, 0, 2)]:
        turned = simulation_of()
        n = turned.grid.size
        fields = to_fields(simulation.state, (n, n, n))
        moved = fields[:, list(axes)].permute(0, 1, *(2 + axis for axis in axes))
        turned.load_state(0, to_spectra(moved, turned.grid.mode_counts))
        fields = to_fields(rate, (n, n, n))
        expected = fields[:, list(axes)].permute(0, 1, *(2 + axis for axis in axes))
        found = to_fields(turned.nonlinear_hat(), (n, n, n))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_energy_and_helicity_are_conserved_by_the_term():
    simulation = simulation_of(forcing=POWER)
    diagnostics = diagnostics_of(simulation)
    transfer = diagnostics.transfer()
    assert (abs(transfer["energy"]) < 1e-14 * transfer["energy_magnitude"]).all()
    u, rate = diagnostics.state(), diagnostics.nonlinear()
    density = diagnostics.weights * (rate * diagnostics.curl(u).conj()).real
    assert (abs(density.sum((1, 2, 3, 4))) < 1e-14 * abs(density).sum((1, 2, 3, 4))).all()


@pytest.mark.parametrize("forcing", [{"kind": "none"}, POWER])
def test_energy_changes_by_viscosity_and_power(forcing):
    simulation = simulation_of(forcing=forcing)
    diagnostics = diagnostics_of(simulation)
    u = diagnostics.state()
    pairs = simulation.pairs
    nonlinear = simulation.problem.make_equation(simulation.transform).nonlinear
    rate = torch.view_as_complex(nonlinear(pairs, torch.empty_like(pairs))).numpy()
    rate = rate - diagnostics.damping * u
    change = (diagnostics.weights * (u.conj() * rate).real).sum((1, 2, 3, 4))
    entries = diagnostics.measure()
    expected = entries["energy_injection"] - 2 * 0.02 * entries["enstrophy"]
    np.testing.assert_allclose(change, expected, rtol=1e-13)
    np.testing.assert_allclose(entries["energy_injection"], forcing.get("power", 0))
    np.testing.assert_allclose(entries["energy_dissipation"], 0.04 * entries["enstrophy"])


def test_the_state_stays_solenoidal():
    simulation = simulation_of(forcing=POWER, noise=OU).advance(20)
    state = simulation.state
    assert largest_divergence(state, simulation.grid) < 1e-14 * state.abs().max()


def test_constant_power_amplifies_no_round_off():
    """Divergence, and what modes k and -k have apart from a real field, end no long run.

    The nonlinear term sees neither, and a force that follows the state let both grow like the
    forced modes: by a factor of 1e9 in 60 eddy times.
    """
    simulation = simulation_of(grid=12, forcing={**POWER, "power": 5.0}, dt=0.02)
    generator = torch.Generator().manual_seed(1)
    state = simulation.state.clone()
    noise = torch.randn(state[..., 0].shape, generator=generator, dtype=torch.float64)
    state[..., 0] += 1e-6 * state.abs().max() * noise

    def size():
        u = simulation.state
        asymmetric = (u - hermitian(u, 3)).abs().max()
        return torch.stack([largest_divergence(u, simulation.grid), asymmetric])

    simulation.load_state(0, state)
    before = size()
    simulation.advance(300)
    assert (before > 1e-7 * state.abs().max()).all()
    assert (size() < before).all()


# -- initial laws and a known flow ----------------------------------------------------------------


def test_the_band_has_the_energy_and_no_divergence():
    physics = problem_of(initial={"kind": "band", "energy": 2.0, "wavenumber": 3.0}).physics
    grid = Grid(20, 2.0, 3)
    u = physics.draw_initial(grid, range(40), 5, "test")
    assert largest_divergence(u, grid) < 1e-14
    energy = 0.5 * (u.abs().square() * grid.weights).sum((2, 3, 4)).mean(0)
    assert abs(energy.sum() - 2.0) < 0.1
    assert (abs(energy - 2.0 / 3) < 0.1).all()  # isotropic


def test_the_band_is_the_same_on_every_grid():
    physics = problem_of().physics
    small, large = (physics.draw_initial(Grid(n, 1.0, 3), [2], 5, "test") for n in (12, 20))
    assert torch.equal(large[..., : small.shape[-1]][:, :, :4, :4], small[:, :, :4, :4])


def test_taylor_green_vortex():
    simulation = simulation_of(initial={"kind": "taylor_green"}, viscosity=0.0)
    x, y, z = simulation.grid.coordinates()
    fields = simulation.fields(["u", "v", "w", "vorticity"])
    torch.testing.assert_close(fields["u"][0], x.sin() * y.cos() * z.cos())
    torch.testing.assert_close(fields["v"][0], -x.cos() * y.sin() * z.cos())
    assert fields["w"].abs().max() < 1e-16
    curl = 2 * x.sin() * y.sin() * z.cos()
    torch.testing.assert_close(fields["vorticity"][0, 2], curl)
    # inviscid enstrophy 3/8 (1 + 5 t^2/48 + ...), Taylor and Green 1937
    diagnostics = diagnostics_of(simulation)
    first = diagnostics.measure()
    np.testing.assert_allclose([first["energy"][0], first["enstrophy"][0]], [1 / 8, 3 / 8])
    t = simulation.advance(10).time
    growth = diagnostics.measure()["enstrophy"][0] - 3 / 8
    assert abs(growth / (5 / 128 * t**2) - 1) < 2e-3


# Energy and enstrophy at t = 1, 2, 3, Re 1600, of the reference of the International Workshop on
# High-Order CFD Methods, case C3.5 (spectral code on 512^3, spectral_Re1600_512.gdiag); and how
# far 48^3 points may be off.
RE_1600 = [
    (0.124515267367, 0.415054960369, 1e-8, 1e-7),
    (0.123916765840, 0.566047789484, 1e-6, 3e-4),
    (0.123023878593, 0.901208116699, 5e-5, 1e-2),
]


def test_taylor_green_vortex_of_the_workshop():
    flow = {"initial": {"kind": "taylor_green"}, "viscosity": 1 / 1600, "grid": 48, "dt": 0.05}
    simulation = simulation_of([0], **flow)
    for energy, enstrophy, *errors in RE_1600:
        entries = diagnostics_of(simulation.advance(20)).measure()
        assert abs(entries["energy"][0] / energy - 1) < errors[0]
        assert abs(entries["enstrophy"][0] / enstrophy - 1) < errors[1]


@pytest.mark.parametrize("scheme, order", [("rk2", 2), ("rk4", 4), ("etdrk4", 4)])
def test_order_of_the_schemes(scheme, order):
    def state(dt):
        problem = problem_of(scheme=scheme, dt=dt, forcing=POWER, viscosity=0.1)
        return Simulation(problem, [0], 1).initialise().advance(round(0.4 / dt)).state

    exact = state(0.0025)
    errors = [(state(dt) - exact).abs().max() for dt in (0.1, 0.05)]
    assert math.log2(errors[0] / errors[1]) > order - 0.35


# -- forcings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [OrnsteinUhlenbeck(rms=0.5, **OU), RingNoise(wavenumber=2)])
def test_noise_is_solenoidal_and_of_the_stated_size(law):
    grid = Grid(16, 3.0, 3)
    model = NoiseModel(law, grid, 0.01, 3)
    members = range(300)
    draws = model.stationary(members) if law.memory else model.draw(members, 4, 1)[0]
    noise = model.spread(draws)
    assert largest_divergence(noise, grid) < 1e-13 * noise.abs().max()
    power = (noise.abs().square() * grid.weights).sum((2, 3, 4)).mean(0)
    rate = 0.5**2 if law.memory else 2 * law.energy_rate / model.dt
    np.testing.assert_allclose(power.sum(), rate, rtol=0.05)
    np.testing.assert_allclose(power, rate / 3, rtol=0.1)
    np.testing.assert_allclose(model.variance, rate)
    std = (model.std_hat.square() * grid.weights).sum()
    np.testing.assert_allclose(std, rate)


def test_the_noise_of_half_steps_is_that_of_the_step():
    model = NoiseModel(RingNoise(wavenumber=2), Grid(16, 1.0, 3), 0.01, 3)
    halves, whole = model.draw([5], 6, 2, level=1), model.draw([5], 3, 1)
    np.testing.assert_allclose((halves[0] + halves[1]) / 2, whole[0], atol=1e-13)


def test_a_force_of_zero_energy_is_refused():
    with pytest.raises(ValueError, match="physics.initial.kind=zero: forcing power needs"):
        problem_of(forcing=POWER, initial={"kind": "zero"})
    with pytest.raises(ValueError, match="is for flows in three dimensions; vorticity2d needs"):
        Problem(forcing=POWER)
    with pytest.raises(ValueError, match="is for flows in two dimensions; navier_stokes_3d needs"):
        problem_of(forcing={"kind": "published"})


# -- gradients ------------------------------------------------------------------------------------


def test_the_solver_with_gradients_is_the_solver():
    simulation = simulation_of(forcing=POWER)
    start = simulation.state.clone()
    found, _ = DifferentiableSolver(simulation.problem).advance(start, 3)
    expected = simulation.advance(3).state
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_gradients_are_those_of_finite_differences():
    solver = DifferentiableSolver(problem_of(grid=8, forcing=POWER))
    start = solver.problem.physics.draw_initial(solver.grid, [0], 0, "test")
    direction = solver.problem.physics.draw_initial(solver.grid, [1], 0, "test")

    def value(step):
        return solver.advance(start + step * direction, 2)[0].abs().square().sum()

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(value(step), step)
    with torch.no_grad():
        expected = (value(torch.tensor(1e-5)) - value(torch.tensor(-1e-5))) / 2e-5
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)


# -- bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_bits_do_not_depend_on_members_and_restarts(precision):
    settings = {"forcing": POWER, "noise": {**OU, "rms": 0.5}, "precision": precision}
    every = simulation_of([0, 3, 7, 8], **settings).advance(6)
    some = simulation_of([3, 7], **settings).advance(4)
    saved = some.save_state()
    again = simulation_of([3, 7], **settings).load_state(**saved).advance(2)
    assert torch.equal(again.state, every.state[1:3])
    assert torch.equal(again.state, some.advance(2).state)


PROGRAM = """
from mpi4py import MPI
import hashlib, json, sys
import numpy as np, torch
torch.set_num_threads(1)
sys.path.insert(0, "tests")
from test_spectral_navier_stokes_3d import OU, POWER, problem_of
from hpc_closure.spectral.diagnostics import diagnostics_of
from hpc_closure.spectral.simulation import Simulation

world = MPI.COMM_WORLD
if sys.argv[1:]:  # pencils where slabs would do
    from hpc_closure.spectral.modes import transform
    transform.pencils = lambda ranks, columns, halves: (ranks // 2, 2)
ring = {"kind": "ring", "wavenumber": 2.0, "energy_rate": 0.1}
cases = {
    "power": {"forcing": POWER},
    "single": {"forcing": POWER, "precision": "float32"},
    "coloured": {"noise": OU, "scheme": "etdrk4"},
    "white": {"noise": ring, "scheme": "rk2", "hyperviscosity": 1e-5, "drag": 0.1},
    "more ranks than planes": {"grid": 8, "forcing": POWER, "dt": 0.05},
    "without compiled functions": {"grid": 14, "noise": ring, "scheme": "cn_ab2"},
}
result = {}
for name, change in cases.items():
    problem = problem_of(**change)
    sim = Simulation(problem, [0, 4, 7], 3, comm=world).initialise().advance(3)
    extra = sim.noise_hat() * 2
    sim.load_state(**sim.save_state()).advance(2, extra)
    digest = hashlib.sha256(sim.save_state()["w_hat"].tobytes())
    fields = sim.fields(["u", "vorticity"], size=problem.grid + 6)
    numbers = diagnostics_of(sim).measure()
    for part in [*fields.values(), *(numbers[key] for key in sorted(numbers))]:
        digest.update(np.ascontiguousarray(part).tobytes())
    result[name] = digest.hexdigest()
if world.rank == 0:
    print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def result(mpirun):
    """Digests of every case on a number of ranks; one run each."""
    known = {}

    def get(ranks, *forced):
        if (ranks, *forced) not in known:
            run = mpirun(ranks, [sys.executable, "-c", PROGRAM, *forced], timeout=600)
            assert run.returncode == 0, run.stderr[-3000:]
            known[ranks, *forced] = json.loads(run.stdout.strip().splitlines()[-1])
        return known[ranks, *forced]

    return get


NAMES = ["2", "3", "6", "pencils"]


@pytest.mark.mpi
@pytest.mark.parametrize("division", [(2,), (3,), (6,), (4, "pencils")], ids=NAMES)
def test_bits_do_not_depend_on_the_ranks(result, division):
    one, many = result(1), result(*division)
    assert {name for name in one if one[name] != many[name]} == set()


def test_the_ranks_of_pencils():
    assert pencils(11, 11, 6) == (11, 1)
    assert pencils(12, 11, 6) == (6, 2)
    assert pencils(66, 11, 6) == (11, 6)
    with pytest.raises(ValueError, match="13 domain ranks are not a product of at most 11"):
        pencils(13, 11, 6)
