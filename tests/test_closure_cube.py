"""Closures of flows in three dimensions: vectors, laws, networks, baselines."""

import math

import numpy as np
import pytest
import torch
from cube_case import EQUATION, LENGTH, NONE, SIZE, SMALL, B, CubeLaw, divergence, fitted

from hpc_closure.closure.artifact import build
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.features import Features
from hpc_closure.closure.fields.losses import crps
from hpc_closure.closure.fields.modes import band, largest_count
from hpc_closure.closure.fields.sensors import Sensors
from hpc_closure.closure.fields.vectors import (
    QUADRATIC,
    carried_by,
    solenoidal,
    strain_norm,
    vector_terms,
)
from hpc_closure.closure.gaussian.channel_covariance import (
    ChannelCovariance,
    apply_channels,
    covariance,
    remove_channels,
)
from hpc_closure.closure.model import Request
from hpc_closure.closure.reductions import Reader
from hpc_closure.data.symmetry import Symmetry
from hpc_closure.experiment.kinds import equation_of

VECTOR = ("vector x", "vector y", "vector z")
LAW = CubeLaw()
U_HAT = LAW.states(range(4))
SYMMETRY = Symmetry([np.zeros((3, SIZE, SIZE, SIZE))], kinds=VECTOR)
# shifts by half a side, which also the grid of products has
EVERY = np.array([(number, 6, 0, 6) for number in range(48)])


def mapped(u_hat, elements=EVERY):
    """Map one velocity (3, *modes) by every element, (48, 3, *modes)."""
    fields = B.to_physical(u_hat, SIZE).expand(len(elements), 3, SIZE, SIZE, SIZE)
    return B.to_spectral(SYMMETRY.apply(fields, elements))


def close(one, other, tolerance=1e-10):
    return float((one - other).abs().max()) < tolerance * float(other.abs().max())


# ---- the band


def test_largest_modes_of_lines_squares_and_cubes():
    """A field of modes up to 2 is its numbers, and their number is that of its freedoms."""
    for sides in (1, 2, 3):
        b = band(3, 1.0, sides)
        field = torch.randn(2, *b.points(12), dtype=torch.float64)
        numbers = b.largest(b.to_spectral(field))
        assert numbers.shape == (2, largest_count(sides)) == (2, 5**sides)
        low = b.place_largest(numbers)
        assert torch.equal(b.largest(low), numbers)
        assert torch.equal(b.hermitian(low), low)
        kept = torch.stack(torch.broadcast_tensors(*b.grid.integer_k)).abs().amax(0) <= 2
        assert close(low, b.to_spectral(field) * kept)
        assert int(b.independent.sum() * 2 - 1) == (2 * b.modes + 1) ** sides


def test_white_noise_of_a_cube_has_unit_modes_and_a_real_field():
    w_hat = keyed_noise.white_spectra(B, 1, "test", range(3000), 0)
    assert float((w_hat.abs().square().mean(0) - 1).abs().max()) < 0.12
    assert close(B.to_spectral(B.to_physical(w_hat[:9], 8)), w_hat[:9])
    few = keyed_noise.white_spectra(B, 1, "test", [7], 0)
    assert torch.equal(few, w_hat[7:8])


def test_values_at_points_of_a_cube_are_those_of_the_grid():
    w_hat = keyed_noise.white_spectra(B, 1, "test", range(2), 0)
    x = torch.arange(8, dtype=torch.float64) * (LENGTH / 8)
    values = B.values(w_hat, torch.cartesian_prod(x, x, x)).view(2, 8, 8, 8)
    assert close(values, B.to_physical(w_hat, 8))


def test_the_share_beyond_a_band_counts_every_mode_once():
    field = torch.randn(3, 12, 12, 12, dtype=torch.float64)
    share = B.share_beyond(torch.fft.rfftn(field, dim=(1, 2, 3)), 12)
    inside = B.to_physical(B.to_spectral(field), 12)
    power = (field - field.mean((1, 2, 3), keepdim=True)).square().sum((1, 2, 3))
    assert torch.allclose(share, (field - inside).square().sum((1, 2, 3)) / power)
    kept_hat = band(4, LENGTH, 3).to_spectral(field)
    kept = B.to_physical(kept_hat, 12)
    power = (kept - kept.mean((1, 2, 3), keepdim=True)).square().sum((1, 2, 3))
    left = kept - B.to_physical(B.to_spectral(kept), 12)
    assert torch.allclose(B.share_beyond(kept_hat), left.square().sum((1, 2, 3)) / power)


# ---- terms


def test_a_flow_whose_terms_are_known():
    """u = (sin z, cos z, 0) is Beltrami, so u.grad u = 0, and |S| = 1 everywhere."""
    z = torch.arange(SIZE, dtype=torch.float64) * (LENGTH / SIZE)
    fields = torch.zeros(1, 3, SIZE, SIZE, SIZE, dtype=torch.float64)
    fields[0, 0], fields[0, 1] = torch.sin(z), torch.cos(z)
    u_hat = B.to_spectral(fields)
    assert torch.allclose(strain_norm(u_hat, B), torch.ones((), dtype=torch.float64))
    terms = vector_terms(u_hat, B, QUADRATIC)
    assert float(terms["u.grad u"].abs().max()) < 1e-14
    # S of |S| = 1 is linear in u, d_j S_ij = Lap u / 2
    assert close(terms["div |S|S"], -0.5 * u_hat)
    # carried by a uniform flow along x: -d/dx
    uniform = torch.zeros_like(u_hat)
    uniform[:, 0, 0, 0, 0] = 2.0
    moved = carried_by(uniform, U_HAT[:1], B)
    assert close(moved, -2j * B.grid.k[0] * U_HAT[:1])


@pytest.mark.parametrize("name", QUADRATIC)
def test_vector_terms_turn_with_the_axes_and_have_no_divergence(name):
    plain = vector_terms(U_HAT[:1], B, [name])[name]
    assert divergence(plain) < 1e-14 and float(plain.abs().max()) > 1e-4
    assert close(vector_terms(mapped(U_HAT[0]), B, [name])[name], mapped(plain[0]))


def test_features_of_a_velocity():
    features = Features(B, equation_of({"equation": EQUATION}))
    assert len(features.names) == 3 + 9 + 3 + 1 and features.is_vector
    values = dict(zip(features.names, features.spectra(U_HAT).unbind(1)))
    assert torch.equal(values["v"], U_HAT[:, 1])
    assert torch.allclose(values["w_y"], 1j * B.grid.k[1] * U_HAT[:, 2])
    nonlinear = solenoidal(carried_by(U_HAT, U_HAT, B), B)
    assert torch.allclose(values["N u"], nonlinear[:, 0])
    assert close(
        B.to_physical(values["|S|"], 24).mean((1, 2, 3)), strain_norm(U_HAT, B).mean((1, 2, 3))
    )
    assert [features.names[place] for place in features.own] == ["u", "v", "w"]


# ---- the law


def of_vectors(count, seed=0, helical=0.0):
    """Solenoidal vectors of an isotropic law, (count, 3, *modes); ``helical`` adds its curl."""
    key = keyed_noise.Key(seed, "vector", range(count), 0)
    white = keyed_noise.white_fields(B, key, 0, torch.device("cpu"), (3,))
    u = solenoidal(white, B) * torch.exp(-0.3 * B.grid.k2) * (B.grid.k2 > 0)
    return u + helical * curl(u) / B.grid.k2.sqrt().clamp(min=1.0)


def curl(u_hat):
    k = torch.stack(torch.broadcast_tensors(*B.grid.k))
    return torch.linalg.cross((1j * k).expand_as(u_hat), u_hat, dim=1)


def helicity(u_hat):
    """Mean of u . curl u over that of u^2."""
    both = (u_hat.conj() * curl(u_hat)).sum(1).real * B.weights
    power = u_hat.abs().square().sum(1) * B.weights
    return float(both.sum() / power.sum())


def factors_of(q_hat):
    law = ChannelCovariance(B, VECTOR)
    law.add(q_hat, torch.arange(len(q_hat)) % 50)
    variance = B.spread(B.by_group(q_hat.abs().square().mean(0)) / B.group_size)
    return law, law.factors(Reader(()), variance), variance


@pytest.mark.parametrize("helical, grouping", [(0.0, "isotropic"), (0.6, "isotropic_handed")])
def test_draws_of_a_solenoidal_law_are_solenoidal_and_have_its_helicity(helical, grouping):
    q_hat = of_vectors(1500, helical=helical)
    law, factors, variance = factors_of(q_hat)
    assert law.grouping == grouping
    key = keyed_noise.Key(9, "draw", range(1500), 0)
    z = keyed_noise.white_fields(B, key, 0, torch.device("cpu"), (3,)) * variance.sqrt()
    assert divergence(z) > 0.3
    drawn = apply_channels(factors, z)
    assert divergence(drawn) < 1e-12
    assert divergence(apply_channels(factors, z.to(torch.complex64))) < 1e-6
    assert helicity(drawn) == pytest.approx(helicity(q_hat), abs=0.03)
    powers = [B.by_group(one.abs().square().sum(1).mean(0))[1:12] for one in (drawn, q_hat)]
    assert torch.allclose(*powers, rtol=0.05)
    assert close(apply_channels(factors, remove_channels(factors, drawn)), drawn, 1e-8)


def test_an_isotropic_law_turns_with_the_axes():
    """Its matrices S(k) are those of the turned wavevector, turned."""
    _, factors, variance = factors_of(of_vectors(400, helical=0.6))
    s = covariance(factors, variance)
    k = [one.expand(B.shape) for one in B.grid.integer_k]

    def at(*wavevector):
        place = tuple(torch.nonzero(sum((a - b).abs() for a, b in zip(k, wavevector)) == 0)[0])
        return s[(slice(None), slice(None), *place)]

    turn = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]).to(s)  # x to y to z
    assert close(at(0, 1, 2), turn @ at(1, 2, 0) @ turn.T)
    assert close(at(1, -2, 1), turn @ at(-2, 1, 1) @ turn.T)
    mirror = torch.diag(torch.tensor([1.0, 1, -1])).to(s)
    assert not close(at(1, 2, 1), mirror @ at(1, 2, -1 + 2) @ mirror.T, 1e-3)


def test_a_law_that_is_not_isotropic_has_matrices_of_its_own():
    q_hat = of_vectors(3000)
    q_hat[:, 1:] *= 0.3  # velocities along x only; no longer without divergence
    law, factors, variance = factors_of(q_hat)
    assert law.grouping == "mode"
    power = torch.diagonal(covariance(factors, variance), dim1=0, dim2=1).real.sum((0, 1, 2))
    assert float(power[0] / power[1:].sum()) > 3


def test_a_scalar_beside_a_vector():
    """An isotropic scalar is uncorrelated with the vector; kinds out of order are one line."""
    q_hat = of_vectors(800)
    scalar = keyed_noise.white_spectra(B, 5, "scalar", range(800), 0)[:, None]
    law = ChannelCovariance(B, ("scalar", *VECTOR))
    law.add(torch.cat([scalar, q_hat], 1), None)
    variance = B.spread(B.by_group(torch.cat([scalar, q_hat], 1).abs().square().mean(0)))
    factors = law.factors(Reader(()), variance / B.spread(B.group_size))
    assert law.grouping == "isotropic" and not factors[:, 0, 1:].any()
    for kinds in (VECTOR[:2], ("scalar", *VECTOR[::-1]), (*VECTOR[:2], "scalar", VECTOR[2])):
        with pytest.raises(ValueError, match="its 'vector y' and 'vector z': order"):
            ChannelCovariance(B, kinds)


# ---- the model


@pytest.fixture(scope="module")
def gaussian():
    return fitted(preset="gaussian")


def test_the_regression_of_vectors_finds_the_law(gaussian):
    assert set(gaussian.library.active) == {"u", "u.grad u"}
    states = LAW.states(range(90_000, 90_020))
    mean = gaussian.encode(states[:, None]).mean_hat
    error = (mean - LAW.mean(states)).abs().square().sum()
    assert float(error / LAW.mean(states).abs().square().sum()) < 1e-4


def test_draws_are_solenoidal_and_score_as_those_of_the_law(gaussian):
    ids = range(80_000, 80_100)
    states = LAW.states(ids)
    truth = B.to_physical(LAW.mean(states) + LAW.noise(ids, 11), SIZE)
    ours, exact = [], []
    for member in range(12):
        keys = [keyed_noise.pair(i, member) for i in ids]
        drawn = gaussian.sample_hat(Request(states, keys, seed=3))
        assert divergence(drawn) < 1e-6
        assert divergence(drawn.to(torch.complex64)) < 1e-6
        ours.append(B.to_physical(drawn, SIZE))
        exact.append(B.to_physical(LAW.mean(states) + LAW.noise(keys, 5), SIZE))
    scores = [float(crps(torch.stack(draws), truth).mean()) for draws in (ours, exact)]
    assert scores[0] < 1.02 * scores[1]


def test_the_mean_turns_with_the_axes(gaussian):
    plain = gaussian.encode(U_HAT[:1, None]).mean_hat
    assert close(gaussian.encode(mapped(U_HAT[0])[:, None]).mean_hat, mapped(plain[0]), 1e-8)


PRESETS = ("convolutional", "default", "one_pass", "gaussian_amplitude", "point_mixture")


@pytest.mark.parametrize("preset", [*PRESETS, "resampled", "local"])
def test_every_composition_trains_and_draws_solenoidal_closures(preset):
    settings = (
        {"preset": "default", "generator": "cnn"} if preset == "local" else {"preset": preset}
    )
    model = fitted(100, **settings)
    states, targets = LAW.batches(500, 100)[0]
    batch = {"state": states[:4], "target": targets[:4], "sample_index": torch.arange(4)}
    trained = 0
    for phase in model.phases:
        model.resume(phase.name)
        if phase.parameters(model):
            model.loss(batch, 0, 3).backward()
            trained += 1
    assert trained == {"resampled": 1, "gaussian_amplitude": 1, "convolutional": 1}.get(preset, 2)
    for name, weight in model.named_parameters():
        with torch.no_grad():  # so that every part says something
            weight.add_(0.02 * torch.randn_like(weight))
    drawn = model.sample_hat(Request(U_HAT, range(8), seed=1))
    assert drawn.shape == (8, 3, *B.shape) and divergence(drawn) < 1e-6
    fields = model.sample_batch(Request(states[:2], range(4), seed=1))
    assert fields.shape == (4, 3, SIZE, SIZE, SIZE)


def test_a_state_turned_in_a_model_of_convolutions_costs_nothing_new():
    """A draw does not depend on its batch, and finer grids have the same closure."""
    model = fitted(100, preset="convolutional")
    whole = model.sample_hat(Request(U_HAT, range(4), seed=1))
    alone = model.sample_hat(Request(U_HAT[2:3], [2], seed=1))
    assert close(alone, whole[2:3])
    finer = band(5, LENGTH, 3)
    drawn = model.sample_hat(Request(finer.resized(U_HAT), range(4), seed=1))
    assert close(B.resized(drawn), whole) and drawn.shape[-1] == 6


def test_previous_closures_are_terms_of_vectors():
    conditions = {**NONE, "previous_closures": 2}
    model = build(
        {**SMALL, "preset": "gaussian", "dimensions": 3, "equation": EQUATION}
        | {"conditions": conditions},
        SIZE,
        LENGTH,
    )
    names = ["U[-1]", "U[-2]", "u.grad U[-1]", "u.grad U[-2]"]
    assert [name for name in model.library.names if "U[" in name] == names
    batches = []
    for start in range(0, 400, 100):
        ids = range(start, start + 100)
        states, before, earlier = LAW.states(ids), LAW.noise(ids, 21), LAW.noise(ids, 22)
        target = 0.5 * before - 0.2 * solenoidal(carried_by(states, earlier, B), B)
        target = target + LAW.noise(ids, 11)
        fields = [B.to_physical(one, SIZE).float() for one in (states, target, before, earlier)]
        past = torch.stack(fields[2:], 1)
        batches.append({"state": fields[0], "target": fields[1], "previous": past})
    model.begin("mean", batches)
    assert {"U[-1]", "u.grad U[-2]"} <= set(model.library.active)
    assert float(model.library.spectral_radius()[1:4].mean()) == pytest.approx(0.5, abs=0.05)


def test_the_noise_of_a_vector_has_one_memory_and_stays_solenoidal():
    """Two snapshots per member, correlated by 0.6 in every shell: draws are, too."""
    batches, correlation = [], 0.6
    for start in range(0, 300, 100):
        ids = range(start, start + 100)
        first, fresh = LAW.noise(ids, 31), LAW.noise(ids, 32)
        pairs = torch.stack([first, correlation * first + (1 - correlation**2) ** 0.5 * fresh], 1)
        states = torch.stack([LAW.states(ids), LAW.states(ids)], 1).flatten(0, 1)
        fields = [B.to_physical(one, SIZE).float() for one in (states, pairs.flatten(0, 1))]
        tags = {"member": torch.tensor(ids).repeat_interleave(2), "moment": torch.arange(200) % 2}
        batches.append({"state": fields[0], "target": fields[1], **tags})
    settings = {**SMALL, "preset": "gaussian", "dimensions": 3, "equation": EQUATION}
    model = build(settings, SIZE, LENGTH)
    for phase in model.phases:
        model.begin(phase.name, batches)
    times = model.statistics.memory_times
    assert torch.equal(times[0], times[1]) and torch.equal(times[0], times[2])
    assert torch.exp(-1 / times[0, 1:4]).numpy() == pytest.approx(correlation, abs=0.05)
    model.load_statistics(model.saved_statistics(1.0))
    drawn = [model.sample_hat(Request(U_HAT[:1], range(400), call=call)) for call in (0, 1)]
    fluctuation = [one - one.mean(0) for one in drawn]
    assert divergence(drawn[0]) < 1e-6 and divergence(drawn[1]) < 1e-6
    share = mean(*fluctuation).mean() / mean(fluctuation[0], fluctuation[0]).mean()
    assert float(share) == pytest.approx(correlation, abs=0.25)


@pytest.mark.parametrize(
    "values, sides, words",
    [
        ((1,), 2, "have 2 coordinates, this model's flow has 3 dimensions"),
        ((1,), 3, r"shape \(1,\), expected \(..., 3, S\): every sensor reads all fields"),
        ((3, 1), 3, "trained with conditions.sensors=none: pass sensors=None"),
    ],
)
def test_sensors_that_do_not_fit_are_one_line(gaussian, values, sides, words):
    sensors = Sensors(torch.zeros(values), torch.zeros(1, sides))
    with pytest.raises(ValueError, match=words) as error:
        gaussian.sample_hat(Request(U_HAT, range(4), sensors=sensors))
    assert "\n" not in str(error.value)


# ---- baselines


def baseline(kind, *constants):
    settings = {"preset": kind, "dimensions": 3, "equation": EQUATION}
    made = build(settings, SIZE, LENGTH)
    made.constants = constants or made.constants
    return made


def mean(one, other):
    """Mean over the cube of the scalar product of two vectors, (B,)."""
    return ((one.conj() * other).real * B.weights).sum((1, 2, 3, 4))


@pytest.mark.parametrize(
    "kind, constants",
    [
        ("smagorinsky", (0.2,)),
        ("dynamic_smagorinsky", ()),
        ("stochastic_smagorinsky", (0.2, 0.0, 0.0)),
    ],
)
def test_an_eddy_viscosity_takes_energy_and_turns_with_the_axes(kind, constants):
    made = baseline(kind, *constants)
    u_hat = LAW.states(range(40))
    found = made.tendency(u_hat, made.constants)
    taken = mean(u_hat, found)
    assert (taken <= 0).all() and (taken < 0).any() and divergence(found) < 1e-14
    row = int(taken.argmin())
    plain, turned = (
        made.tendency(one, made.constants) for one in (u_hat[row : row + 1], mapped(u_hat[row]))
    )
    assert close(turned, mapped(plain[0]))


def test_smagorinsky_of_a_flow_of_constant_strain():
    """u = (sin z, cos z, 0): |S| = 1, so U = (c Delta)^2 Lap u."""
    z = torch.arange(SIZE, dtype=torch.float64) * (LENGTH / SIZE)
    fields = torch.zeros(1, 3, SIZE, SIZE, SIZE, dtype=torch.float64)
    fields[0, 0], fields[0, 1] = torch.sin(z), torch.cos(z)
    u_hat = B.to_spectral(fields)
    found = baseline("smagorinsky", 0.17).tendency(u_hat, (0.17,))
    assert close(found, -((0.17 * LENGTH / SIZE) ** 2) * u_hat)


def test_the_dynamic_constant_of_a_cube_explains_what_the_test_filter_takes():
    made, u_hat = baseline("dynamic_smagorinsky"), LAW.states(range(200))
    cut = torch.stack(torch.broadcast_tensors(*B.grid.integer_k)).abs().amax(0) <= 1
    coarse, delta = u_hat * cut, LENGTH / SIZE

    def viscous(v_hat, width):
        return 2 * width**2 * vector_terms(v_hat, B, ["div |S|S"])["div |S|S"]

    def moved(v_hat):
        return solenoidal(carried_by(v_hat, v_hat, B), B)

    known = cut * (moved(u_hat) - moved(coarse))
    term, fine = cut * (viscous(u_hat, delta) - viscous(coarse, 2 * delta)), viscous(u_hat, delta)
    ratio = mean(fine, made.tendency(u_hat, ())) / mean(fine, fine)
    assert (ratio > 0).sum() > 5 and (ratio == 0).sum() > 5
    best = mean(*2 * [known + ratio.view(-1, 1, 1, 1, 1) * term])
    for factor in (1.05, 0.95):
        left = known + factor * ratio.view(-1, 1, 1, 1, 1) * term
        assert (mean(left, left) > best)[ratio > 0].all()


def test_the_random_force_is_solenoidal_and_lasts_as_long_as_it_says():
    u_hat = LAW.states(range(1))
    for calls, expected in ((0.0, 0.0), (4.0, math.cos(math.pi / 8))):
        made = baseline("stochastic_smagorinsky", 0.2, 0.5, calls)
        still = made.tendency(u_hat, made.constants)
        drawn = [
            made.sample_hat(Request(u_hat, range(300), seed=2, call=call)) - still
            for call in (0, 1, 5)
        ]
        assert divergence(drawn[0]) < 1e-12
        power = [float(mean(one, one).mean()) for one in drawn]
        assert power[1] == pytest.approx(power[0], rel=0.1)
        products = [float(mean(drawn[0], one).mean()) / power[0] for one in drawn[1:]]
        assert products == pytest.approx([expected, 0.0], abs=0.05)
    # a |S|^2 Delta^2 of unit g: twice the amplitude is twice the noise
    louder = baseline("stochastic_smagorinsky", 0.2, 1.0, 4.0)
    other = louder.sample_hat(Request(u_hat, range(300), seed=2, call=5)) - still
    assert close(other, 2 * drawn[2])
