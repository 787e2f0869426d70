"""Symmetries: maps of solutions to solutions, found from equation, forcing and noise."""

import numpy as np
import pytest
import torch
from test_spectral_channels import CLOUDS, LAYERS, QUIET

from hpc_closure.data.reader import DataSet
from hpc_closure.data.symmetry import MAPS, Symmetry, maps_of
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.schema import RolloutTraining
from hpc_closure.generate import verb as generate
from hpc_closure.spectral.modes.grid import Grid
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.noise.draws import NoiseModel
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.train import verb as train

N = 16
X, Y = np.meshgrid(np.arange(N) / N, np.arange(N) / N, indexing="ij")
PUBLISHED = 0.1 * (np.sin(2 * np.pi * (X + Y)) + np.cos(2 * np.pi * (X + Y)))
KOLMOGOROV = -np.cos(8 * np.pi * Y)
RING = np.random.default_rng(0).normal(size=(N, N))


def fields(seed=0, count=3):
    """Smooth random vorticity, (count, N, N)."""
    white = np.random.default_rng(seed).normal(size=(count, N, N))
    k = np.fft.fftfreq(N, 1 / N)
    kept = (np.abs(k)[:, None] <= 5) & (np.arange(N // 2 + 1) <= 5)
    return np.fft.irfft2(np.fft.rfft2(white) * kept, s=(N, N))


def tendency(w, forcing):
    """-u.grad w + nu Lap w + f on the grid, by spectral derivatives."""
    kx = 2 * np.pi * np.fft.fftfreq(N, 1 / N)[:, None]
    ky = 2 * np.pi * np.arange(N // 2 + 1)
    k2 = kx**2 + ky**2
    w_hat = np.fft.rfft2(w)
    psi_hat = w_hat / np.where(k2 == 0, 1, k2)

    def back(values):
        return np.fft.irfft2(values, s=(N, N))

    u, v = back(1j * ky * psi_hat), back(-1j * kx * psi_hat)
    advection = u * back(1j * kx * w_hat) + v * back(1j * ky * w_hat)
    return -advection - 1e-3 * back(k2 * w_hat) + forcing


@pytest.mark.parametrize(
    "forcing, number",
    [(0 * X, 8 * N * N), (PUBLISHED, 4 * N), (KOLMOGOROV, 4 * 4 * N), (RING, 1)],
    ids=["none", "published", "kolmogorov", "ring"],
)
def test_the_equation_commutes_with_every_map(forcing, number):
    symmetry = Symmetry([forcing])
    assert len(symmetry) == number
    w = torch.from_numpy(fields(count=1))
    expected = torch.from_numpy(tendency(w.numpy(), forcing))
    chosen = symmetry.elements[:: max(1, number // 64)]
    for element in chosen:
        moved = symmetry.apply(w, element[None])
        found = tendency(moved.numpy(), forcing)
        np.testing.assert_allclose(
            found, symmetry.apply(expected, element[None]).numpy(), atol=1e-12 * 100
        )


def test_a_wrong_map_is_noticed():
    """The test above can fail: a shift along x alone does not leave the published forcing."""
    symmetry = Symmetry([0 * X])
    w = torch.from_numpy(fields(count=1))
    shift = np.array([[0, 3, 0]])
    found = tendency(symmetry.apply(w, shift).numpy(), PUBLISHED)
    expected = symmetry.apply(torch.from_numpy(tendency(w.numpy(), PUBLISHED)), shift).numpy()
    assert np.abs(found - expected).max() > 0.01


EVERY = np.array([(m, i, j) for m in range(8) for i in range(N) for j in range(N)])
NONE = {"kind": "none"}


@pytest.mark.parametrize(
    "physics, number",
    [
        (dict(forcing=NONE), 8 * N * N),
        (dict(forcing=NONE, drag=0.3), 8 * N * N),
        (dict(forcing=NONE, beta=5.0), 2 * N * N),
        (dict(forcing={"kind": "published"}), 4 * N),
        (dict(forcing={"kind": "published"}, drag=0.3), 4 * N),
        (dict(forcing={"kind": "published"}, beta=5.0), N),
        (dict(forcing={"kind": "kolmogorov"}), 4 * 4 * N),
        (dict(forcing={"kind": "kolmogorov"}, beta=-5.0), 2 * 4 * N),
    ],
    ids=str,
)
def test_a_step_of_the_solver_commutes_with_what_is_kept_and_with_nothing_else(physics, number):
    """All 8 maps at all shifts, each followed by a step, against the step followed by it."""
    problem = Problem(grid=N, dt=1e-2, noise=NONE, **physics)
    symmetry = Symmetry.of(problem.physics, N)
    kept = {tuple(row) for row in symmetry.elements.tolist()}
    assert len(kept) == len(symmetry) == number
    free, w = Symmetry([0 * X]), torch.from_numpy(fields(count=1))

    def step(states):
        flow = Simulation(problem, list(range(len(states))), seed=0)
        flow.load_state(0, flow.transform.to_spectral(states))
        flow.advance(1)
        return flow.transform.to_physical(flow.state)

    every = w.expand(len(EVERY), N, N)
    after = step(w)
    mapped = free.apply(after.expand(len(EVERY), N, N).contiguous(), EVERY)
    error = (step(free.apply(every.contiguous(), EVERY)) - mapped).abs().amax((-2, -1))
    error = (error / (after - w).abs().max()).tolist()
    for element, one in zip(EVERY.tolist(), error):
        assert one < 1e-9 if tuple(element) in kept else one > 1e-3, (element, one)


def test_two_regimes_leave_four_maps():
    """A pattern cos(x) and a probe sin(y): each map at the one shift that leaves both."""
    problem = Problem(grid=N, dt=1e-2, forcing=NONE, noise={"kind": "two_regimes"})
    symmetry = Symmetry.of(problem.physics, N)
    found = {tuple(row) for row in symmetry.elements.tolist()}
    half = N // 2
    turned = {(1, 1): (0, 0), (1, -1): (half, 0), (-1, 1): (half, half), (-1, -1): (0, half)}
    assert found == {(MAPS.index(((0, 1), signs)), *shift) for signs, shift in turned.items()}
    # the law's own probability and pattern: left by these, and one of them by no other
    noise, grid = problem.physics.noise, Grid(N)
    response = noise.response(NoiseModel(noise, grid, 1e-2, seed=0), range(len(EVERY)))
    free, transform = Symmetry([0 * X]), Transform(grid)
    w = torch.from_numpy(fields(count=1)).expand(len(EVERY), N, N).contiguous()
    mapped = transform.to_spectral(free.apply(w, EVERY)).numpy()
    moved = np.abs(np.array(response.probability(mapped)) - response.probability(mapped[:1])[0])
    pattern = torch.from_numpy(np.cos(2 * np.pi * X)).expand(len(EVERY), N, N).contiguous()
    turned = (free.apply(pattern, EVERY) - pattern).abs().amax((-2, -1)).numpy()
    for element, one in zip(EVERY.tolist(), np.maximum(moved, turned)):
        assert one < 1e-12 if tuple(element) in found else one > 1e-4, (element, one)


def test_an_amplitude_that_follows_the_state_leaves_what_the_forcing_leaves():
    for forcing in (NONE, {"kind": "published"}):
        problem = Problem(grid=N, forcing=forcing, noise={"kind": "state_amplitude"})
        plain = Problem(grid=N, forcing=forcing)
        found, expected = (Symmetry.of(one.physics, N) for one in (problem, plain))
        assert np.array_equal(found.elements, expected.elements)


def test_without_its_forcing_an_equation_has_all_that_noise_and_beta_leave():
    """A closure given the flow does not see a forcing of resolved scales."""
    forcing = {"kind": "ring", "wavenumber": 3, "width": 1, "amplitude": 1.0}
    for beta, number in ((0.0, 8 * N * N), (5.0, 2 * N * N)):
        problem = Problem(grid=N, forcing=forcing, noise=NONE, beta=beta)
        assert len(Symmetry.of(problem.physics, N)) == 1
        assert len(Symmetry.of(problem.physics, N, forced=False)) == number


# ---- states of several channels

SIDE = 32
CALM = LAYERS.replace(beta=0.0, mean_flow=(0, 0), forcing=NONE, **QUIET)
SHEARED = LAYERS.replace(forcing=NONE, **QUIET)
RAINY = CLOUDS.replace(births="mean", forcing=NONE, **QUIET)
SCALARS = (0.0, 0.7, 0.3)  # means of vorticity, moisture and rain


def moved_and_marched(problem, elements, kinds=None, steps=4):
    """Return how far "map, then march" is from "march, then map", per element.

    The unit is the largest change of a channel while it marches.
    """
    physics, side = problem.physics, problem.grid
    channels = len(physics.channels)
    kinds = kinds or [channel.kind for channel in physics.channels]
    free = Symmetry([np.zeros((channels, side, side))], kinds=kinds)
    white = torch.from_numpy(np.random.default_rng(3).normal(size=(1, channels, side, side)))

    def march(states):
        flow = Simulation(problem, list(range(len(states))), seed=0)
        flow.load_state(0, flow.transform.to_spectral(states))
        flow.advance(steps)
        return flow.transform.to_physical(flow.state)

    grid = Grid(side, physics.length)
    spectra = Transform(grid).to_spectral(white) * torch.exp(-0.1 * grid.integer_k2)
    start = Transform(grid).to_physical(spectra)
    if physics.equation == "clouds":
        start = 0.2 * start / start.abs().amax((-2, -1), True)
        start += torch.tensor(SCALARS, dtype=start.dtype)[:, None, None]
    every = start.expand(len(elements), *start.shape[1:]).contiguous()
    end = march(start)
    expected = free.apply(end.expand_as(every).contiguous(), elements)
    error = (march(free.apply(every, elements)) - expected).abs().amax((-2, -1))
    scale = (end - start).abs().amax((-2, -1))
    assert (scale > 1e-4).all()
    return (error / scale).amax(1).numpy()


@pytest.mark.parametrize(
    "problem, number",
    [(SHEARED, 2), (SHEARED.replace(mean_flow=(0, 0)), 2), (CALM, 8), (RAINY, 8)],
    ids=["shear", "beta", "drag", "clouds"],
)
def test_solver_steps_of_several_channels_commute_with_what_the_equation_allows(problem, number):
    allowed = [problem.physics.is_symmetry(*candidate) for candidate in MAPS]
    assert sum(allowed) == number
    errors = moved_and_marched(problem, np.array([(one, 3, 5) for one in range(8)]))
    for one, error in zip(allowed, errors):
        assert error < 1e-10 if one else error > 1e-3, errors


def determinant_of(permutation, signs):
    """Return 1 of a rotation, -1 of a reflection: the axes are exchanged first, then reflected."""
    matrix = np.diag(signs) @ np.eye(len(signs))[list(permutation)]
    return int(np.round(np.linalg.det(matrix)))


@pytest.mark.parametrize(
    "problem, kinds",
    [
        (CALM, ["pseudo-scalar", "scalar"]),
        (RAINY, ["pseudo-scalar"] * 3),
        (RAINY, ["scalar"] * 3),
    ],
    ids=["layers", "clouds of the wrong sign", "clouds"],
)
def test_a_wrong_kind_of_a_channel_is_noticed(problem, kinds):
    """The test above can fail: a reflection with a wrong sign of one channel."""
    determinants = [determinant_of(*candidate) for candidate in MAPS]
    errors = moved_and_marched(problem, np.array([(one, 3, 5) for one in range(8)]), kinds)
    for one, error in zip(determinants, errors):
        assert error < 1e-10 if one == 1 else error > 1e-3, errors


@pytest.mark.parametrize(
    "problem, number",
    [(CALM, 4 * SIDE), (SHEARED, SIDE), (RAINY, 4 * SIDE)],
    ids=["layers", "shear", "clouds"],
)
def test_the_steady_forcing_of_the_first_channel_selects_the_maps(problem, number):
    """The published forcing: four maps along one diagonal; with shear the identity alone."""
    problem = problem.replace(forcing={"kind": "published"})
    symmetry = Symmetry.of(problem.physics, SIDE)
    assert symmetry.kinds == tuple(channel.kind for channel in problem.physics.channels)
    assert len(symmetry) == number
    assert moved_and_marched(problem, symmetry.elements[::7]).max() < 1e-10
    shifted = symmetry.elements[::7] + np.array([0, 1, 0])
    assert moved_and_marched(problem, shifted).min() > 1e-6
    unforced = Symmetry.of(problem.physics, SIDE, forced=False)
    allowed = sum(problem.physics.is_symmetry(*candidate) for candidate in MAPS)
    assert len(unforced) == allowed * SIDE**2


def test_fields_of_a_law_of_noise_are_those_of_the_first_channel():
    law = Problem(grid=N, length=CALM.physics.length, noise={"kind": "two_regimes"}).physics
    layers = CALM.physics.model_copy(update={"noise": law.noise})  # not validated
    found, expected = Symmetry.of(layers, N), Symmetry.of(law, N)
    assert len(found) == 4 and np.array_equal(found.elements, expected.elements)


def velocity_of(w):
    """Return (psi_y, -psi_x) of vorticities (b, N, N), (b, 2, N, N)."""
    kx, ky = 2 * np.pi * np.fft.fftfreq(N, 1 / N)[:, None], 2 * np.pi * np.arange(N // 2 + 1)
    k2 = kx**2 + ky**2
    psi = np.fft.rfft2(w) / np.where(k2 == 0, 1, k2)
    return np.fft.irfft2(np.stack([1j * ky * psi, -1j * kx * psi], 1), s=(N, N))


VELOCITY = ("vector x", "vector y")


def test_a_vector_is_turned_with_the_flow():
    """The velocity of the mapped vorticity is the mapped velocity; with a scalar beside it."""
    w = fields(count=8)
    elements = np.array([(one, 3, 5) for one in range(8)])
    plain = Symmetry([0 * X])
    moved = plain.apply(torch.from_numpy(w), elements).numpy()
    states = np.concatenate([w[:, None], velocity_of(w), w[:, None] ** 2], 1)
    expected = np.concatenate([moved[:, None], velocity_of(moved), moved[:, None] ** 2], 1)
    kinds = ("pseudo-scalar", *VELOCITY, "scalar")
    symmetry = Symmetry([np.zeros((4, N, N))], kinds=kinds)
    found = symmetry.apply(torch.from_numpy(states), elements).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-13)
    # times before the channels, as a batch has them
    history = torch.from_numpy(np.stack([states, -states, 3 * states], 1))
    found = symmetry.apply(history, elements).numpy()
    np.testing.assert_allclose(found, np.stack([expected, -expected, 3 * expected], 1), atol=1e-13)


def test_a_vector_is_compared_as_a_whole():
    """A uniform vector along x is left by (x, -y), one along the diagonal by an exchange."""
    along_x, diagonal, scalar = (
        np.stack([one + 0 * X, other + 0 * X, 1e3 + 0 * X])
        for one, other in ((1e-3, 0), (1e-3, 1e-3), (0, 0))
    )
    for field, maps in (
        (along_x, {((0, 1), (1, 1)), ((0, 1), (1, -1))}),
        (diagonal, {((0, 1), (1, 1)), ((1, 0), (1, 1))}),
        (scalar, set(MAPS)),
    ):
        symmetry = Symmetry([field], kinds=(*VELOCITY, "scalar"))
        assert {MAPS[one] for one in symmetry.elements[:, 0]} == maps
        assert len(symmetry) == len(maps) * N * N


def test_a_single_kind_of_one_channel_needs_no_axis_of_channels():
    w = torch.from_numpy(fields(count=8))
    elements = np.array([(one, 0, 0) for one in range(8)])
    scalar = Symmetry([0 * X], kinds=["scalar"]).apply(w, elements)
    signs = torch.tensor([determinant_of(*candidate) for candidate in MAPS])[:, None, None]
    assert (scalar == signs * Symmetry([0 * X]).apply(w, elements)).all()


@pytest.mark.parametrize(
    "kinds", [VELOCITY[:1], VELOCITY[::-1], ("vector x", "scalar", "vector y")]
)
def test_half_a_vector_is_refused(kinds):
    with pytest.raises(ValueError, match="expected each vector x directly followed by its vect"):
        Symmetry([np.zeros((len(kinds), N, N))], kinds=kinds)


@pytest.mark.parametrize("shape", [(8, N, N), (8, 3, N, N), (2, N, N)])
def test_fields_of_other_channels_are_one_line(shape):
    symmetry = Symmetry([np.zeros((2, N, N))], kinds=("pseudo-scalar", "scalar"))
    with pytest.raises(
        ValueError, match=r"expected \(b, ..., 2, n, n\): the channels are pseudo-"
    ):
        symmetry.apply(torch.zeros(shape), symmetry.draw(0, 0, shape[0]))


# ---- lines and cubes

CUBE = 12
FLOW = ("vector x", "vector y", "vector z")


def solenoidal(u):
    """Project velocities (b, 3, n, n, n) on those without divergence, modes |k| < n / 3."""
    k, inverse, kept = _waves(u.shape[-1])
    u_hat = torch.fft.fftn(u, dim=(-3, -2, -1)) * kept
    u_hat = u_hat - k * (k * u_hat).sum(1, keepdim=True) * inverse
    return torch.fft.ifftn(u_hat, dim=(-3, -2, -1)).real


def _waves(size):
    k1 = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    k = torch.stack(torch.meshgrid(k1, k1, k1, indexing="ij"))
    k2 = k.square().sum(0)
    return k, torch.where(k2 > 0, 1 / k2.clamp(min=1), 0.0), (k.abs() < size / 3).all(0)


def cubic_tendency(u, forcing):
    """-P(u.grad u) + nu Lap u + f of velocities (b, 3, n, n, n), by spectral derivatives."""
    k, _, _ = _waves(u.shape[-1])
    axes = (-3, -2, -1)
    u_hat = torch.fft.fftn(u, dim=axes)
    slopes = torch.fft.ifftn(1j * k * u_hat[:, :, None], dim=axes).real
    carried = torch.einsum("bj...,bij...->bi...", u, slopes)
    friction = torch.fft.ifftn(k.square().sum(0) * u_hat, dim=axes).real
    return solenoidal(-carried) - 1e-2 * friction + forcing


def cubic_flow(seed=0, count=1):
    white = np.random.default_rng(seed).normal(size=(count, 3, CUBE, CUBE, CUBE))
    return solenoidal(torch.from_numpy(white))


def far_from(symmetry, element, forcing):
    """Return how far "map, then tendency" is from "tendency, then map", and map of pressures."""
    u = cubic_flow()
    expected = symmetry.apply(cubic_tendency(u, forcing), element[None])
    found = cubic_tendency(symmetry.apply(u, element[None]), forcing)
    return float((found - expected).abs().max() / expected.abs().max())


def test_the_48_maps_of_a_cube_take_a_flow_to_a_flow():
    maps = maps_of(3)
    assert len(set(maps)) == 48 and maps[0] == ((0, 1, 2), (1, 1, 1))
    symmetry = Symmetry([np.zeros((3, CUBE, CUBE, CUBE))], kinds=FLOW)
    assert len(symmetry) == 48 * CUBE**3
    for number in range(48):
        element = np.array([number, 1, 5, 2])
        assert far_from(symmetry, element, 0.0) < 1e-12, maps[number]


def test_a_map_of_a_cube_with_a_wrong_sign_of_a_component_is_noticed():
    """The test above can fail: each of the 48 maps, with the sign of one component changed."""
    symmetry = Symmetry([np.zeros((3, CUBE, CUBE, CUBE))], kinds=FLOW)
    symmetry.signs[:, 1] *= -1
    for number in range(48):
        assert far_from(symmetry, np.array([number, 1, 5, 2]), 0.0) > 1e-2


def test_solver_steps_of_a_cube_commute_with_its_48_maps():
    """As the equation says, all of them; if the sign of w is left out, 24 only."""
    equation = {"equation": "navier_stokes_3d", "length": 2 * np.pi}
    problem = Problem(grid=CUBE, dt=1e-2, noise=NONE, forcing=NONE, **equation)
    assert all(problem.physics.is_symmetry(*one) for one in maps_of(3))
    symmetry = Symmetry.of(problem.physics, CUBE)
    assert len(symmetry) == 48 * CUBE**3 and symmetry.kinds == FLOW

    def step(states):
        flow = Simulation(problem, list(range(len(states))), seed=0)
        flow.load_state(0, flow.transform.to_spectral(states)).advance(3)
        return flow.transform.to_physical(flow.state)

    u = cubic_flow()
    grid = Grid(CUBE, 2 * np.pi, 3)
    u = Transform(grid).to_physical(Transform(grid).to_spectral(u))
    elements = np.array([(number, 1, 5, 2) for number in range(48)])
    after = step(u)
    expected = symmetry.apply(after.expand(48, -1, -1, -1, -1), elements)
    error = step(symmetry.apply(u.expand(48, -1, -1, -1, -1), elements)) - expected
    assert float(error.abs().max() / (after - u).abs().max()) < 1e-10
    symmetry.signs[:, 2] = 1
    wrong = step(symmetry.apply(u.expand(48, -1, -1, -1, -1), elements))
    wrong = wrong - symmetry.apply(after.expand(48, -1, -1, -1, -1), elements)
    fitting = wrong.abs().amax((1, 2, 3, 4)) < 1e-10 * (after - u).abs().max()
    assert int(fitting.sum()) == 24  # those that do not reflect z


def test_a_forcing_of_a_cube_selects_its_maps():
    """Of sin(2 z) along x: it leaves 16 maps, each at the shifts that leave sin(2 z)."""
    forcing = np.zeros((3, CUBE, CUBE, CUBE))
    forcing[0] = np.sin(4 * np.pi * np.arange(CUBE) / CUBE)
    symmetry = Symmetry([forcing], kinds=FLOW)
    kept = {maps_of(3)[number] for number in symmetry.elements[:, 0]}
    assert kept == {one for one in maps_of(3) if one[0] == (0, 1, 2)}
    assert len(symmetry) == 8 * 2 * CUBE**2
    for element in symmetry.elements[::311]:
        assert far_from(symmetry, element, torch.from_numpy(forcing)) < 1e-12
        element = element + np.array([0, 0, 0, 1])
        assert far_from(symmetry, element, torch.from_numpy(forcing)) > 1e-3


def test_pseudo_scalars_and_scalars_of_a_cube():
    """Helicity u.curl u changes its sign under the 24 reflections, energy under none."""
    u, (k, _, _) = cubic_flow(), _waves(CUBE)
    axes = (-3, -2, -1)

    def state(u):
        curl_hat = torch.linalg.cross(1j * k[None], torch.fft.fftn(u, dim=axes), dim=1)
        curl = torch.fft.ifftn(curl_hat, dim=axes).real
        helicity, energy = (u * curl).sum(1), u.square().sum(1)
        return torch.cat([helicity[:, None], u, energy[:, None]], 1)

    kinds = ("pseudo-scalar", *FLOW, "scalar")
    symmetry = Symmetry([np.zeros((5, CUBE, CUBE, CUBE))], kinds=kinds)
    plain = Symmetry([np.zeros((3, CUBE, CUBE, CUBE))], kinds=FLOW)
    elements = np.array([(number, 3, 0, 7) for number in range(48)])
    every = u.expand(48, -1, -1, -1, -1)
    found = symmetry.apply(state(u).expand(48, -1, -1, -1, -1), elements)
    expected = state(plain.apply(every, elements))
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-11)
    assert (symmetry.signs[:, 0] == -1).sum() == 24


def test_only_equal_sides_are_exchanged():
    fields = np.zeros((8, 8, 4))
    symmetry = Symmetry([fields], kinds=["scalar"])
    assert len(symmetry) == 16 * fields.size
    w = torch.from_numpy(np.random.default_rng(0).normal(size=(16, 8, 8, 4)))
    numbers = sorted(set(symmetry.elements[:, 0]))
    assert {maps_of(3)[number][0] for number in numbers} == {(0, 1, 2), (1, 0, 2)}
    element = np.array([(maps_of(3).index(((1, 0, 2), (1, 1, -1))), 0, 0, 0)])
    found = symmetry.apply(w[:1], element)
    assert (found == w[:1].transpose(1, 2)[..., (-np.arange(4)) % 4]).all()


def test_sides_of_different_lengths_are_not_exchanged():
    equation = {"equation": "navier_stokes_3d", "length": [2.0, 2.0, 1.0]}
    problem = Problem(grid=8, dt=1e-2, noise=NONE, forcing=NONE, **equation)
    assert len(Symmetry.of(problem.physics, 8)) == 16 * 8**3


@pytest.mark.parametrize("equation", ["burgers1d", "kuramoto_sivashinsky1d"])
def test_solver_steps_on_a_line_commute_with_its_reflection(equation):
    """u(x) to -u(-x), at any shift; without the sign it is no symmetry."""
    problem = Problem(grid=32, dt=1e-2, equation=equation, noise=NONE, forcing=NONE, length=8.0)
    symmetry = Symmetry.of(problem.physics, 32)
    assert len(symmetry) == 2 * 32
    w = np.random.default_rng(0).normal(size=(1, 32))
    w = torch.from_numpy(np.fft.irfft(np.fft.rfft(w)[:, :6], n=32))

    def step(states):
        flow = Simulation(problem, list(range(len(states))), seed=0)
        flow.load_state(0, flow.transform.to_spectral(states)).advance(5)
        return flow.transform.to_physical(flow.state)

    every, after = w.expand(64, -1).contiguous(), step(w)
    error = step(symmetry.apply(every, symmetry.elements))
    error = error - symmetry.apply(after.expand(64, -1), symmetry.elements)
    assert error.abs().max() < 1e-10 * (after - w).abs().max()
    symmetry.signs[1] *= -1
    error = step(symmetry.apply(every, symmetry.elements))
    error = error - symmetry.apply(after.expand(64, -1), symmetry.elements)
    assert error[32:].abs().amax(1).min() > 1e-3 * (after - w).abs().max()


def test_elements_of_a_large_cube_are_not_listed():
    """48 maps of 128^3 points are a hundred million elements; draws list only their own."""
    symmetry = Symmetry([np.zeros((1, 1, 1)) + np.zeros((128, 128, 128))], kinds=["scalar"])
    drawn = symmetry.draw(0, 0, 4096)
    assert len(symmetry) == 48 * 128**3
    assert len(set(drawn[:, 0])) == 48 and drawn[:, 1:].min() == 0 and drawn[:, 1:].max() == 127


@pytest.mark.parametrize("kinds", [FLOW[:2], (*FLOW[:2], "scalar"), FLOW[::-1]])
def test_a_vector_of_a_cube_has_three_components(kinds):
    with pytest.raises(ValueError, match="directly followed by its vector y and its vector z"):
        Symmetry([np.zeros((len(kinds), 4, 4, 4))], kinds=kinds)


def test_published_translations_are_the_diagonal_ones():
    symmetry = Symmetry([PUBLISHED], MAPS[:1])
    assert {tuple(row) for row in symmetry.elements[:, 1:]} == {(s, -s % N) for s in range(N)}


def test_identity_and_shapes():
    symmetry = Symmetry([RING])
    assert (symmetry.elements == [[0, 0, 0]]).all() and MAPS[0] == ((0, 1), (1, 1))
    w = torch.from_numpy(fields(count=4)).float()
    assert (symmetry.apply(w, symmetry.draw(0, 0, 4)) == w).all()
    history = torch.stack([w, 2 * w], dim=1)
    free = Symmetry([0 * X])
    elements = free.draw(0, 10, 4)
    moved = free.apply(history, elements)
    assert moved.shape == history.shape
    assert (moved[:, 1] == 2 * free.apply(w, elements)).all()


def test_draws_cover_the_group():
    symmetry = Symmetry([PUBLISHED])
    drawn = symmetry.draw(1, 0, 4000)
    counts = np.unique(drawn, axis=0, return_counts=True)[1]
    assert len(counts) == len(symmetry) and counts.min() > 8
    assert (symmetry.draw(1, 100, 5) == drawn[100:105]).all()


def test_a_training_is_augmented_by_what_its_equation_leaves(tiny):
    """From the experiment file to the samples: a beta plane leaves a quarter of them."""
    for beta, number in [("0", 4 * N), ("5", N)]:
        changes = ["train.augment=true", "generate.closure=convection", f"physics.beta={beta}"]
        experiment = reading.load(tiny, [*changes, f"name=beta{beta}"])
        assert generate.run(experiment) == 0
        store = DataSet(Run.of(experiment).data)
        try:
            fit, valid = train.samples(experiment, store)
            assert len(fit.symmetry) == number and valid.symmetry is None
        finally:
            store.close()


@pytest.mark.parametrize("trajectory", [None, RolloutTraining()])
def test_the_symmetry_of_the_flow_is_asked_for_where_something_is_followed(
    tiny, trajectory, monkeypatch
):
    experiment = reading.load(tiny, ["train.augment=true"])
    assert generate.run(experiment) == 0
    section = experiment.train.model_copy(update={"rollout_training": trajectory})
    subgrid = experiment.generate.model_copy(update={"closure": "subgrid"})
    asked, plain = [], Symmetry.of

    def of(equation, size, forced=True):
        asked.append(forced)
        return plain(equation, size, forced)

    monkeypatch.setattr(Symmetry, "of", of)
    store = DataSet(Run.of(experiment).data)
    try:
        changed = experiment.model_copy(update={"train": section, "generate": subgrid})
        fit, _ = train.samples(changed, store)
    finally:
        store.close()
    assert sorted(asked) == [False] + [True] * bool(trajectory)
    assert (len(fit.flow) < len(fit.symmetry)) == bool(trajectory)
