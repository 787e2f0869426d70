"""States of several channels: two-layer quasi-geostrophic flow, clouds, and a medium."""

import hashlib
import math
import sys

import numpy as np
import pytest
import torch

from hpc_closure.spectral import simulation
from hpc_closure.spectral.differentiable import DifferentiableSolver
from hpc_closure.spectral.modes.grid import hermitian, resize
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

LAYERS = Problem(
    equation="two_layer_qg",
    grid=32,
    length=2 * math.pi,
    dt=2e-3,
    deformation_radius=0.4,
    depth_ratio=0.25,
    mean_flow=(0.4, -0.1),
    beta=0.7,
    drag=0.3,
    scheme="ab3",
    initial={"kind": "band", "wavenumber": 4},
    noise={"kind": "ring", "wavenumber": 5, "energy_rate": 0.1},
)
CLOUDS = Problem(
    equation="clouds",
    grid=32,
    length=2 * math.pi,
    dt=0.0125,
    drag=0.1,
    scheme="cn_ab2",
    initial={"kind": "band", "wavenumber": 4, "energy": 0.3},
    noise={"kind": "ring", "wavenumber": 2.5, "width": 0.5, "energy_rate": 0.1},
)
MEDIUM = CLOUDS.replace(equation="excitable", scheme="etdrk4")
QUIET = {"noise": {"kind": "none"}}
EACH = pytest.mark.parametrize(
    "problem", [LAYERS, CLOUDS, MEDIUM], ids=["layers", "clouds", "medium"]
)


def run(problem, members, steps, **options):
    return Simulation(problem, members, 11, **options).initialise().advance(steps)


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def random_state(problem, members=2):
    """Smooth random states of all channels."""
    sim = Simulation(problem, range(members), 0)
    shape = (*sim.state.shape[:2], problem.grid, problem.grid)
    fields = 10 * torch.randn(
        shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    spectra = sim.transform.to_spectral(fields)
    return sim.load_state(0, spectra * torch.exp(-0.1 * sim.grid.integer_k2))


@EACH
def test_states_do_not_depend_on_the_batch(problem, monkeypatch):
    whole = run(problem, range(5), 12, threads=1)
    assert whole.state.shape == (5, len(problem.physics.channels), *whole.grid.shape)
    for chunk, threads in ((1, None), (2, 2)):
        points = chunk * problem.grid**2 * len(problem.physics.channels)
        monkeypatch.setattr(simulation, "CHUNK_POINTS", points)
        assert digest(run(problem, range(5), 12, threads=threads).state) == digest(whole.state)
    assert digest(run(problem, [4, 1], 12).state) == digest(whole.state[[4, 1]])


@EACH
@pytest.mark.parametrize("stop", [1, 7])  # also before the scheme has all past steps
def test_restart_is_bit_exact(problem, stop):
    straight = run(problem, [0, 2], 15)
    saved = run(problem, [0, 2], stop).save_state()
    resumed = Simulation(problem, [0, 2], 11).load_state(**saved).advance(15 - stop)
    assert digest(resumed.state) == digest(straight.state)


PROGRAM = """
from mpi4py import MPI
import hashlib, sys, torch
sys.path.insert(0, {folder!r})
torch.set_num_threads(1)
from test_spectral_channels import CLOUDS, LAYERS, MEDIUM
from hpc_closure.spectral.simulation import Simulation
for problem in (LAYERS, CLOUDS, MEDIUM):
    sim = Simulation(problem, [0, 4], 3, comm=MPI.COMM_WORLD).initialise().advance(8)
    full = sim.save_state()["w_hat"]
    speed = float(sim.speed().max())
    if MPI.COMM_WORLD.rank == 0:
        print(hashlib.sha256(full.tobytes()).hexdigest(), speed, flush=True)
"""


@pytest.mark.mpi
def test_states_do_not_depend_on_the_number_of_ranks(mpirun):
    from pathlib import Path

    program = PROGRAM.format(folder=str(Path(__file__).parent))
    outputs = []
    for ranks in (1, 3):
        done = mpirun(ranks, [sys.executable, "-c", program], timeout=300)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.split())
    assert len(outputs[0]) == 6 and outputs[0] == outputs[1]


@pytest.mark.parametrize(
    "problem", [LAYERS, CLOUDS.replace(births="mean")], ids=["layers", "clouds"]
)
@pytest.mark.parametrize("scheme", ["ab3", "ab3_plain", "cn_ab2", "etdrk4"])
def test_the_differentiable_solver_agrees(problem, scheme):
    problem = problem.replace(scheme=scheme, **QUIET)
    sim = random_state(problem)
    start = sim.state.clone()
    states, _ = DifferentiableSolver(problem).advance(start, 6)
    sim.advance(6)
    assert (states - sim.state).abs().max() < 1e-12 * sim.state.abs().max()


# ---- two layers


def reference(q, problem, steps):
    """March two layers (2, n, n) in plain numpy on all modes of the grid, products padded."""
    n, physics = problem.grid, problem.physics
    k = np.fft.fftfreq(n, 1 / n)
    kx, ky = np.meshgrid(k, k, indexing="ij")  # length 2 pi
    k2 = kx**2 + ky**2
    retained = (np.abs(kx) <= (n - 1) // 3) & (np.abs(ky) <= (n - 1) // 3)
    f1 = physics.deformation_radius**-2 / (1 + physics.depth_ratio)
    f2 = physics.depth_ratio * f1
    shear = physics.mean_flow[0] - physics.mean_flow[1]
    gradients = physics.beta + f1 * shear, physics.beta - f2 * shear
    operator = np.array([[-(k2 + f1), f1 + 0 * k2], [f2 + 0 * k2, -(k2 + f2)]]).transpose(
        2, 3, 0, 1
    )
    operator[0, 0] = np.eye(2)
    inverse = np.linalg.inv(operator)
    inverse[0, 0] = 0
    kappa = np.sqrt(k2) * 2 * np.pi / n
    filtered = np.exp(-23.6 * np.clip(kappa - 0.65 * np.pi, 0, None) ** 4)

    def field(spectrum):
        return np.fft.ifft2(spectrum).real

    def rate(q_hat):
        psi = np.einsum("xyij,jxy->ixy", inverse, q_hat)
        out = []
        for layer in range(2):
            u = physics.mean_flow[layer] + field(-1j * ky * psi[layer])
            v = field(1j * kx * psi[layer])
            c = field(q_hat[layer])
            flux = 1j * kx * np.fft.fft2(u * c) + 1j * ky * np.fft.fft2(v * c)
            one = -flux - 1j * kx * gradients[layer] * psi[layer]
            if layer == 1:
                one = one + physics.drag * k2 * psi[1]
            out.append(one * retained)
        return np.array(out)

    q_hat, past = np.fft.fft2(q) * retained, []
    for _ in range(steps):
        past = [rate(q_hat), *past][:3]
        weights = [(1,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12)][len(past) - 1]
        total = sum(weight * one for weight, one in zip(weights, past))
        q_hat = filtered * (q_hat + problem.dt * total)
    return field(q_hat)


def test_two_layers_march_as_in_plain_numpy():
    problem = LAYERS.replace(**QUIET)
    sim = random_state(problem, 1)
    start = torch.stack([sim.fields([name])[name] for name in ("q_upper", "q_lower")], 1)
    expected = reference(start[0].numpy(), problem, 40)
    sim.advance(40)
    for layer, name in enumerate(("q_upper", "q_lower")):
        actual = sim.fields([name])[name][0].numpy()
        assert np.abs(actual - expected[layer]).max() < 1e-11 * np.abs(expected).max()
        assert np.abs(actual - start[0, layer].numpy()).max() > 0.05 * np.abs(expected).max()


def test_without_the_filter_a_mode_in_the_corner_stays():
    problem = LAYERS.replace(scheme="ab3", dt=1e-3, drag=0.0, **QUIET)
    kept = {}
    for scheme in ("ab3", "ab3_plain"):
        sim = Simulation(problem.replace(scheme=scheme), [0], 0)
        start = torch.zeros_like(sim.state)
        start[0, 0, sim.grid.modes, sim.grid.modes] = 1e-9  # beyond the filter's circle
        start[0, 0, 1, 2] = 1e-9
        sim.load_state(0, start).advance(20)
        kept[scheme] = sim.state[0, 0].abs() / 1e-9
    assert kept["ab3"][1, 2] == pytest.approx(1, abs=0.02) == kept["ab3_plain"][1, 2]
    corner = problem.make_grid().modes, problem.make_grid().modes
    assert kept["ab3"][corner] < 0.1 and kept["ab3_plain"][corner] == pytest.approx(1, abs=0.02)


def test_a_small_wave_grows_as_its_eigenvalue():
    """The closed form of the linear problem, drag and beta included, per mode."""
    problem = LAYERS.replace(scheme="etdrk4", dt=0.02, **QUIET)
    sim = Simulation(problem, [0], 0)
    physics, kx, ky = problem.physics, 2.0, 1.0
    k2, (f1, f2) = kx**2 + ky**2, physics.stretching
    inversion = np.linalg.inv(np.array([[-(k2 + f1), f1], [f2, -(k2 + f2)]]))
    matrix = -1j * kx * np.diag(physics.mean_flow)
    matrix = matrix - 1j * kx * np.diag(physics.mean_gradients) @ inversion
    matrix = matrix + physics.drag * k2 * np.diag([0, 1]) @ inversion
    values, vectors = np.linalg.eig(matrix)
    assert values.real.max() > 0.02  # baroclinic instability
    start = torch.zeros(1, 2, *sim.grid.shape, dtype=torch.complex128)
    start[0, :, 2, 1] = torch.tensor([1e-7, 2e-7j])
    sim.load_state(0, start).advance(100)
    growth = vectors @ np.diag(np.exp(values * 2.0)) @ np.linalg.inv(vectors)
    expected = growth @ np.array([1e-7, 2e-7j])
    assert sim.state[0, :, 2, 1].numpy() == pytest.approx(expected, rel=1e-6)


def test_round_off_between_opposite_modes_does_not_grow():
    """No field shows it, so the nonlinear term does not limit what the mean shear lets grow."""
    problem = LAYERS.replace(noise={"kind": "none"}, mean_flow=(1.5, -0.5))
    sim = Simulation(problem, [0], 0).initialise()
    state = sim.state.clone()
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(state[..., 0].shape, generator=generator, dtype=torch.float64)
    state[..., 0] += 1e-9 * state.abs().max() * noise
    sim.load_state(10, state)  # not a step at which modes are made those of a real field

    def apart():
        return float((sim.state - hermitian(sim.state)).abs().max() / sim.state.abs().max())

    before = apart()
    sim.advance(40)
    during = apart()
    sim.advance(1000)
    assert before > 1e-10 and during > 1e-11 and apart() < 1e-15


def test_advection_conserves_energy_and_potential_enstrophy():
    problem = LAYERS.replace(drag=0.0, beta=0.0, mean_flow=(0, 0), **QUIET)
    sim = random_state(problem)
    rates = torch.view_as_real(sim.nonlinear_hat())
    psi = sim._workers[0].equation.streamfunctions(sim.pairs)
    depth = torch.tensor([problem.physics.depth_ratio, 1.0]).double()
    weights = sim.grid.weights[..., None]

    def products(a, b):
        return (a * b * weights).sum((-3, -2, -1)), (a.abs() * b.abs() * weights).sum((-3, -2, -1))

    by_layer, sizes = products(psi, rates)
    assert ((by_layer * depth).sum(1).abs() < 1e-12 * (sizes * depth).sum(1)).all()
    by_layer, sizes = products(sim.pairs, rates)
    assert (by_layer.abs() < 1e-12 * sizes).all()


def test_velocities_of_layers_are_those_of_their_streamfunctions():
    sim = random_state(LAYERS)
    velocity = sim.fields(["velocity"])["velocity"]  # (members, components, layers, n, n)
    psi = sim.field_spectra("streamfunction")
    expected = sim.transform.to_physical(1j * sim.grid.kx * psi)
    assert (velocity[:, 1] - expected).abs().max() < 1e-13 * expected.abs().max()
    mean = torch.tensor(LAYERS.physics.mean_flow)[:, None, None]
    speed = (velocity[:, 0] + mean).abs() + velocity[:, 1].abs()
    assert sim.speed() == pytest.approx(speed.amax((1, 2, 3)).numpy())
    with pytest.raises(ValueError, match="unknown field 'vorticity'"):
        sim.fields(["vorticity"])


def test_the_noise_forces_the_upper_layer():
    sim = run(LAYERS, [0, 1], 3)
    noise = sim.noise_hat()
    assert noise.shape == sim.state.shape
    assert noise[:, 0].abs().max() > 0 and not noise[:, 1].any()


# ---- clouds


def test_births_have_their_law():
    """Numbers, sizes and places of 4,000 steps, where the moisture varies along x."""
    sim = Simulation(CLOUDS, [0], 5)
    x, _ = sim.grid.coordinates()
    angle = 2 * math.pi / sim.grid.length * x
    field = (0.6 + 0.2 * torch.cos(angle)).expand(32, 32)
    w_hat = sim.transform.to_spectral(field[None])[0].numpy()
    births = [sim.events.draw(3, step, w_hat) for step in range(4000)]
    places = np.concatenate([place for place, _ in births])
    sizes = np.concatenate([size for _, size in births])
    number = np.array([len(size) for _, size in births])
    rate = CLOUDS.physics.rate(field)
    expected = float(rate.mean()) * CLOUDS.physics.length**2 * CLOUDS.dt
    assert number.mean() == pytest.approx(expected, rel=0.03)
    assert number.var() == pytest.approx(expected, rel=0.1)
    assert sizes.mean() == pytest.approx(1, abs=0.03) and sizes.std() == pytest.approx(1, abs=0.05)
    for wave in (1, 2):  # the law of the places, by its Fourier coefficients
        law = float((rate * torch.cos(wave * angle)).mean() / rate.mean())
        assert np.cos(2 * np.pi * wave * places[:, 0]).mean() == pytest.approx(law, abs=0.02)
        assert np.cos(2 * np.pi * wave * places[:, 1]).mean() == pytest.approx(0, abs=0.02)
        assert np.sin(2 * np.pi * wave * places[:, 0]).mean() == pytest.approx(0, abs=0.02)
    again, other = sim.events.draw(3, 17, w_hat), sim.events.draw(4, 17, w_hat)
    assert np.array_equal(again[0], births[17][0]) and np.array_equal(again[1], births[17][1])
    assert not np.array_equal(again[0], other[0])


def test_a_step_of_too_many_births_is_one_line():
    with pytest.raises(
        ValueError, match="generate.dt=1 has 1.26e.03 candidates of births in a st"
    ):
        Simulation(CLOUDS.replace(dt=1.0), [0], 5)


def test_births_do_not_depend_on_the_grid():
    """Finer grids with the same modes of the moisture see the same births."""
    small, large = (Simulation(CLOUDS.replace(grid=grid), [0], 5) for grid in (32, 64))
    w_hat = random_state(CLOUDS, 1).state[0, 1] * 0.02
    w_hat[0, 0] = 0.6
    fine = resize(w_hat, large.grid.modes)
    for step in range(50):
        one, other = small.events.draw(0, step, w_hat.numpy()), large.events.draw(
            0, step, fine.numpy()
        )
        assert np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])


def test_a_cloud_is_born_where_it_is_drawn():
    sim = Simulation(CLOUDS.replace(grid=128), [0], 5)  # which resolves a cloud
    spectrum = torch.from_numpy(sim.events.spectrum(np.array([[0.25, 0.5]]), np.array([2.0])))
    field = sim.transform.to_physical(spectrum[None])[0]
    x, y = sim.grid.coordinates()
    square = (x - 0.25 * sim.grid.length) ** 2 + (y - 0.5 * sim.grid.length) ** 2
    assert (field - 2 * 20 * torch.exp(-square / (2 * 0.2**2))).abs().max() < 1e-9


def test_without_clouds_moisture_is_restored_and_rain_decays():
    problem = CLOUDS.replace(birth_rate=0, scheme="etdrk4", dt=0.01, **QUIET)
    sim = Simulation(problem, [0], 0)
    start = torch.zeros_like(sim.state)
    start[0, 1, 0, 0], start[0, 2, 0, 0] = 0.2, 1e-9
    sim.load_state(0, start).advance(50)
    assert sim.state[0, 1, 0, 0].real.item() == pytest.approx(1 - 0.8 * math.exp(-0.5 / 1.5))
    assert sim.state[0, 2, 0, 0].real.item() == pytest.approx(1e-9 * math.exp(-0.5 / 0.15))


def test_rain_takes_the_moisture_that_meets_it():
    """d<m>/dt = (1 - <m>) / T - <h m>, whatever the flow."""
    sim = random_state(CLOUDS.replace(birth_rate=0, **QUIET))
    fields = sim.fields(["moisture", "rain"])
    lost = (fields["moisture"] * fields["rain"]).mean((1, 2))
    rate = sim.nonlinear_hat()[:, 1, 0, 0].real
    assert rate.numpy() == pytest.approx(-lost.numpy(), rel=1e-10)


def test_the_mean_of_many_births_is_the_mean_rate():
    """Members that differ in their births alone, against the solver with the mean rate."""
    members, start = 400, random_state(CLOUDS, 1).state
    start[:, 1] *= 0.05 / start[:, 1].abs().max()
    start[:, 1, 0, 0] = 0.7
    start[:, 2] = 0
    problem = CLOUDS.replace(**QUIET)
    random = Simulation(problem, range(members), 2)
    random.load_state(0, start.expand(members, *start.shape[1:])).advance(1)
    mean = Simulation(problem.replace(births="mean"), [0], 2).load_state(0, start).advance(1)
    rain = random.fields(["rain"])["rain"]
    expected = mean.fields(["rain"])["rain"][0]
    assert rain.mean().item() == pytest.approx(expected.mean().item(), rel=0.05)
    variance = rain.var(0).mean() / members
    ratio = ((rain.mean(0) - expected).square().mean() / variance).item()
    assert 0.6 < ratio < 1.5


def test_the_mean_of_many_births_over_ten_steps_is_the_mean_rate():
    """Each step adds its own births, and no others."""
    # clouds too weak to change the moisture, on which the rate depends
    problem = CLOUDS.replace(cloud_strength=0.01, rain_time=1e6, **QUIET)
    start = torch.zeros(1, 3, *problem.make_grid().shape, dtype=torch.complex128)
    start[0, 1, 0, 0] = 0.7
    random = Simulation(problem, range(200), 2)
    random.load_state(0, start.expand(200, *start.shape[1:])).advance(10)
    mean = Simulation(problem.replace(births="mean"), [0], 2).load_state(0, start).advance(10)
    rain, expected = random.state[:, 2, 0, 0].real, mean.state[0, 2, 0, 0].real
    assert rain.mean().item() == pytest.approx(expected.item(), rel=0.06)


def test_random_births_have_no_gradient():
    with pytest.raises(ValueError, match="without random events: set births=mean"):
        DifferentiableSolver(CLOUDS.replace(**QUIET))


@pytest.mark.parametrize(
    "change, line",
    [
        (
            {"noise": {"kind": "state_amplitude"}},
            "noise.kind=state_amplitude is for equations of one fiel",
        ),
        (
            {"cfl": 0.5, "scheme": "etdrk4"},
            "generate.cfl=0.5: clouds is solved in steps of one le",
        ),
        (
            {"removed": "convection"},
            "generate.closure=convection is a term of vorticity2d; clouds",
        ),
    ],
)
def test_settings_that_do_not_fit_are_one_line(change, line):
    with pytest.raises(ValueError, match=line):
        CLOUDS.replace(**change)
    with pytest.raises(ValueError, match="expected spectra of shape"):
        Simulation(CLOUDS, [0], 0).load_state(0, torch.zeros(1, 21, 11))
