"""Members of an ensemble: the published scheme, names, restarts, equal bits."""

import hashlib

import numpy as np
import pytest
import torch

from hpc_closure.spectral import simulation
from hpc_closure.spectral.equations import Equation
from hpc_closure.spectral.modes.grid import Grid, resize
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.problem import Numerics, Problem
from hpc_closure.spectral.simulation import Simulation

PUBLISHED = Problem(
    grid=32,
    forcing={"kind": "published"},
    noise={"kind": "q_wiener", "amplitude": 5e-5, "draws": 10, "correlation": 0.005},
)


def digest(state):
    return hashlib.sha256(np.ascontiguousarray(state.cpu().numpy()).tobytes()).hexdigest()


def run(problem, members, steps, **options):
    return Simulation(problem, members, 11, **options).initialise().advance(steps)


def reference_step(w_hat, problem, noise_hat, *, removed="none", tendency=0.0):
    """The published scheme on the full grid, advective form, written out with torch.fft."""
    n, dt, nu = problem.grid, problem.dt, problem.viscosity
    K = Grid(n).modes
    k = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)
    kx, ky = 2 * np.pi * k[:, None], 2 * np.pi * k[None, : n // 2 + 1].abs()
    k2 = kx**2 + ky**2
    full = torch.zeros(len(w_hat), n, n // 2 + 1, dtype=torch.complex128)
    full[:, : K + 1, : K + 1], full[:, -K:, : K + 1] = w_hat[:, : K + 1], w_hat[:, -K:]

    def physical(s):
        return torch.fft.irfft2(s, s=(n, n), norm="forward")

    psi = full / torch.where(k2 > 0, k2, 1.0) * (k2 > 0)
    advection = physical(1j * ky * psi) * physical(1j * kx * full)
    advection += physical(-1j * kx * psi) * physical(1j * ky * full)
    N = torch.fft.rfft2(advection, norm="forward")
    x, y = Grid(n).coordinates()
    f = torch.fft.rfft2(
        0.1 * (torch.sin(2 * np.pi * (x + y)) + torch.cos(2 * np.pi * (x + y))), norm="forward"
    )
    cut = torch.cat([torch.arange(K + 1), torch.arange(n - K, n)])
    N, f, k2 = N[:, cut, : K + 1], f[cut, : K + 1], k2[cut, : K + 1]
    c = dt * nu / 2 * k2
    top = w_hat + dt * (f + noise_hat + tendency)
    if removed != "convection":
        top = top - dt * N
    if removed != "diffusion":
        top = top - c * w_hat
    return top / (1 + c), N, k2


def test_published_scheme_term_by_term():
    sim = Simulation(PUBLISHED, [0, 5], 3).initialise()
    for _ in range(5):
        expected, _, _ = reference_step(sim.state.clone(), PUBLISHED, sim.noise_hat())
        sim.advance(1)
        torch.testing.assert_close(sim.state, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("removed", ["diffusion", "convection"])
def test_a_granted_closure_gives_the_full_system_back(removed):
    full = Simulation(PUBLISHED, [1, 2], 3).initialise()
    reduced = Simulation(PUBLISHED.replace(removed=removed), [1, 2], 3)
    reduced.load_state(0, full.state)
    for _ in range(10):
        w, noise = reduced.state.clone(), full.noise_hat()
        _, N, k2 = reference_step(w, PUBLISHED, noise)
        closure = noise - PUBLISHED.viscosity / 2 * k2 * w if removed == "diffusion" else noise - N
        expected, _, _ = reference_step(w, PUBLISHED, 0.0, removed=removed, tendency=closure)
        reduced.advance(1, closure)
        full.advance(1)
        torch.testing.assert_close(reduced.state, expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(reduced.state, full.state, rtol=0, atol=1e-14)
    assert float(reduced.noise_hat().abs().max()) == 0


def test_initial_field_follows_the_published_law():
    # E <w^2> = sum 2 tau^3 (k^2 + tau^2)^-2.5 = 0.262^2. The 0.274 quoted for the published data
    # is the rms of its own few fields; one field scatters by 20 % about the law's value.
    sim = Simulation(PUBLISHED.replace(grid=64), range(400), 0).initialise()
    squares = sim.fields(["vorticity"])["vorticity"].square().mean((-2, -1))
    law = 2 * 7.0**3 * (sim.grid.k2 + 49.0) ** -2.5 * sim.grid.weights
    law[0, 0] = 0
    assert abs(law.sum().sqrt() - 0.262) < 5e-4
    assert abs(squares.mean() - law.sum()) < 4 * squares.std() / 20
    assert abs(0.274**2 - law.sum()) < squares.std()
    assert float(sim.state[:, 0, 0].abs().max()) == 0


def test_initial_field_is_the_same_on_every_grid():
    small = Simulation(PUBLISHED, [3], 0).initialise().state
    large = Simulation(PUBLISHED.replace(grid=64), [3], 0).initialise().state
    assert torch.equal(resize(large, Grid(32).modes), small)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_states_do_not_depend_on_the_batch(precision, monkeypatch):
    problem = PUBLISHED.replace(precision=precision)
    whole = run(problem, range(7), 30, threads=1)
    for chunk, threads in ((1, None), (3, 2), (2, 1)):
        monkeypatch.setattr(simulation, "CHUNK_POINTS", chunk * problem.grid**2)
        state = run(problem, range(7), 30, threads=threads).state
        assert digest(state) == digest(whole.state)
    assert digest(run(problem, [5, 2], 30).state) == digest(whole.state[[5, 2]])


@pytest.mark.parametrize("scheme", ["cn_euler", "cn_ab2", "etdrk4", "imex_rk3"])
@pytest.mark.parametrize(
    "noise",
    [
        PUBLISHED.physics.noise.parameters(),
        {
            "kind": "ornstein_uhlenbeck",
            "wavenumber": 4,
            "rms": 0.2,
            "correlation_time": 0.01,
        },
    ],
    ids=["white", "coloured"],
)
def test_restart_is_bit_exact(scheme, noise):
    problem = PUBLISHED.replace(scheme=scheme, noise=noise, grid=16)
    straight = run(problem, [0, 1, 2], 20)
    stopped = run(problem, [0, 1, 2], 7).save_state()
    resumed = Simulation(problem, [0, 1, 2], 11).load_state(**stopped).advance(13)
    assert resumed.step_index == straight.step_index == 20
    assert digest(resumed.state) == digest(straight.state)


def test_pieces_of_a_run_make_the_run():
    whole = run(PUBLISHED, [0, 1], 20)
    pieces = run(PUBLISHED, [0, 1], 3)
    pieces.advance(0).advance(4)
    for _ in range(9):
        pieces.advance(1)
    saved = pieces.save_state()
    assert digest(pieces.advance(4).state) == digest(whole.state)
    assert digest(pieces.load_state(**saved).advance(1).advance(3).state) == digest(whole.state)


def test_noise_hat_is_what_the_step_used():
    quiet = PUBLISHED.replace(noise={"kind": "none"})
    loud = Simulation(PUBLISHED, [4], 2).initialise()
    told = Simulation(quiet, [4], 2).initialise()
    for _ in range(3):
        told.advance(1, loud.noise_hat())
        loud.advance(1)
    torch.testing.assert_close(told.state, loud.state, rtol=0, atol=1e-16)


def test_fields():
    sim = Simulation(PUBLISHED, [0, 1], 1).initialise()
    fields = sim.fields(["vorticity", "velocity", "streamfunction"])
    assert fields["velocity"].shape == (2, 2, 32, 32)
    transform, grid = Transform(sim.grid), sim.grid
    u, v = (transform.to_spectral(fields["velocity"][:, i]) for i in (0, 1))
    curl = 1j * grid.kx * v - 1j * grid.ky * u
    torch.testing.assert_close(curl, sim.state, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        transform.to_spectral(fields["streamfunction"]) * grid.k2, sim.state, rtol=0, atol=1e-13
    )
    assert sim.fields(["vorticity"], size=48)["vorticity"].shape == (2, 48, 48)


def test_fine_and_coarse_grids_agree_while_resolved():
    smooth = dict(initial={"kind": "band", "wavenumber": 2, "width": 1, "energy": 1e-3})
    coarse = run(PUBLISHED.replace(**smooth), [0], 100)
    fine = run(PUBLISHED.replace(grid=64, **smooth), [0], 100)
    difference = resize(fine.state, coarse.grid.modes) - coarse.state
    assert difference.abs().max() < 1e-6 * coarse.state.abs().max()


def test_recipe_round_trip_and_hash():
    physics = {"viscosity": 1e-3, "forcing": {"kind": "published"}, "noise": {"kind": "none"}}
    problem = Problem.of(Equation.model_validate(physics), Numerics(grid=64, dt=1e-3))
    explicit = Problem(forcing={"kind": "published", "amplitude": 0.1})
    assert problem.member_hash() == explicit.member_hash()
    assert Problem(**problem.recipe()) == problem
    assert problem.replace(dt=2e-3).member_hash() != problem.member_hash()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scheme": "rk9"}, "scheme"),
        ({"viscosity": -1}, "viscosity"),
        ({"noise": {"kind": "q_wiener", "correlation": 0}}, "correlation"),
        ({"noise": {"kind": "ring", "wavenumber": 3, "energy_rate": 1, "colour": 2}}, "colour"),
        ({"forcing": {"kind": "kolmogorov", "wavenumber": 40}}, "beyond"),
        ({"scheme": "etdrk4", "removed": "diffusion"}, "cn_euler"),
        ({"scheme": "cn_ab2", "cfl": 0.5}, "steps of one length"),
    ],
)
def test_bad_problems_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Problem(**{"grid": 32, **change})


def test_unknown_physics_key_is_refused():
    with pytest.raises(ValueError, match="viscocity"):
        Problem(viscocity=1e-3)
