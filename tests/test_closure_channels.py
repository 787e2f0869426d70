"""Closures of states with several fields."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hpc_closure.closure.artifact import Closure, build, load, save
from hpc_closure.closure.compatibility import check_fits
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.features import Features, feature_spectra
from hpc_closure.closure.fields.losses import crps
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.gaussian.channel_covariance import apply_channels
from hpc_closure.closure.model import Request
from hpc_closure.experiment import reading
from hpc_closure.experiment.kinds import equation_of, whole_fields
from hpc_closure.spectral.equations.base import Channel
from hpc_closure.spectral.equations.two_layer import TwoLayerQG
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

SIZE, MODES = 16, 5
LENGTH = 2 * math.pi
LAYERS = {
    "equation": "two_layer_qg",
    "length": LENGTH,
    "deformation_radius": 0.5,
    "mean_flow": [0.3, 0.0],
}
CLOUDS = {"equation": "clouds", "length": LENGTH}
NONE = {"sensors": "none"}
SMALL = {"width": 8, "modes": 4, "layers": 1, "mean_layers": 1, "conditions": NONE}
B = band(MODES, LENGTH)
COHERENCE, PHASE = 0.8, math.pi / 3


def factors_of_layers():
    """F of two layers of unit variance per mode, with a phase that is odd in kx."""
    factors = torch.zeros(2, 2, 2, *B.shape, dtype=torch.float64)
    kx = B.grid.integer_kx.double().expand(B.shape)
    sign = torch.sign(kx)
    factors[0, 0, 0] = 1.0
    factors[0, 1, 0] = COHERENCE * torch.where(sign == 0, 1.0, math.cos(PHASE))
    factors[1, 1, 0] = -COHERENCE * math.sin(PHASE) * sign
    factors[0, 1, 1] = math.sqrt(1 - COHERENCE**2)
    return factors


class Law:
    """U = A V + noise of two layers: a known mean and a known covariance across the layers."""

    variance = 0.3 / (1 + B.grid.integer_k2.double()) * (B.grid.integer_k2 > 0)

    def noise(self, ids, seed):
        key = keyed_noise.Key(seed, "law", ids, 0)
        white = keyed_noise.white_fields(B, key, 0, torch.device("cpu"), (2,))
        return apply_channels(factors_of_layers(), white) * self.variance.sqrt()

    def states(self, ids):
        key = keyed_noise.Key(1, "state", ids, 0)
        white = keyed_noise.white_fields(B, key, 0, torch.device("cpu"), (2,))
        return white / (1 + B.grid.integer_k2.double()) * (B.grid.integer_k2 > 0)

    def mean(self, w_hat):
        return torch.stack([0.5 * w_hat[:, 1], -0.2 * w_hat[:, 0]], 1)

    def batches(self, first, count, chunk=100):
        out = []
        for start in range(first, first + count, chunk):
            ids = range(start, start + chunk)
            states = self.states(ids)
            target = self.mean(states) + self.noise(ids, 11)
            out.append(tuple(B.to_physical(part, SIZE).float() for part in (states, target)))
        return out


def fitted(count=1200, equation=LAYERS, **config):
    torch.manual_seed(0)
    model = build({**SMALL, "equation": equation, **config}, SIZE, LENGTH)
    for phase in model.phases:
        first = {"fit": 0, "hold": 10_000, "train": 10_000, "valid": 20_000}[phase.members]
        model.begin(phase.name, Law().batches(first, count))
    return model


@pytest.fixture(scope="module")
def gaussian():
    return fitted(preset="gaussian")


def test_the_regression_finds_the_other_layer(gaussian):
    w_hat = Law().states(range(90_000, 90_050))
    mean = gaussian.encode(w_hat[:, None]).mean_hat
    error = (mean - Law().mean(w_hat)).abs().square().sum()
    assert float(error / Law().mean(w_hat).abs().square().sum()) < 1e-3
    assert {"q_upper", "q_lower"} <= set(gaussian.library.active)


def test_draws_have_the_covariance_across_layers(gaussian):
    count = 4000
    w_hat = torch.zeros(1, 2, *B.shape, dtype=torch.complex128)
    drawn = gaussian.sample_hat(Request(w_hat, range(count), seed=5))
    across = (drawn[:, 0] * drawn[:, 1].conj()).mean(0)
    powers = drawn.abs().square().mean(0)
    seen = B.grid.integer_k2.expand(B.shape) > 0
    coherence = (across.abs() / powers.prod(0).sqrt().clamp(min=1e-300))[seen]
    assert coherence.numpy() == pytest.approx(COHERENCE, abs=0.06)
    east = seen & (B.grid.integer_kx.expand(B.shape) > 0)
    assert torch.angle(across[east]).mul(180 / math.pi).numpy() == pytest.approx(60, abs=7)
    west = seen & (B.grid.integer_kx.expand(B.shape) < 0)
    assert torch.angle(across[west]).mul(180 / math.pi).numpy() == pytest.approx(-60, abs=7)


def test_draws_score_as_those_of_the_law(gaussian):
    law, ids = Law(), range(80_000, 80_200)
    states = law.states(ids)
    truth = B.to_physical(law.mean(states) + law.noise(ids, 11), SIZE)
    ours, exact = [], []
    for member in range(16):
        keys = [keyed_noise.pair(i, member) for i in ids]
        drawn = gaussian.sample_hat(Request(states, keys, seed=3))
        ours.append(B.to_physical(drawn, SIZE))
        exact.append(B.to_physical(law.mean(states) + law.noise(keys, 12), SIZE))
    scores = [crps(torch.stack(each), truth).mean() for each in (ours, exact)]
    assert float(scores[0] / scores[1]) < 1.02


def test_a_score_and_networks_have_an_output_per_layer(tmp_path):
    model = fitted(
        200, preset="default", residual="score", sensors="kriging", validate_parts="off"
    )
    batch = dict(zip(("state", "target"), Law().batches(500, 100)[0]))
    batch |= {"sample_index": torch.arange(100)}
    for phase in ("mean", "generator"):
        model.resume(phase)
        loss = model.loss_per_sample(batch, 0, 0)
        assert loss.shape == (100,) and bool(loss.isfinite().all())
        loss.mean().backward()
        grads = [w.grad for w in model.phase_named(phase).parameters(model)]
        assert any(grad is not None and bool(grad.abs().sum() > 0) for grad in grads)
    assert model.statistics.score_gain.shape[-1] == B.grid.num_shells
    state = B.to_physical(Law().states(range(3)), SIZE)
    drawn = model.sample_batch(Request(state, range(3), seed=1))
    assert drawn.shape == (3, 2, SIZE, SIZE)


def test_a_local_generator_is_translation_invariant_and_one_per_layer():
    model = fitted(200, preset="default", generator="cnn", layers=2, validate_parts="off")
    torch.manual_seed(1)
    network = model.residual.network.double()
    torch.nn.init.normal_(network.head.weight, std=0.1)
    channels = len(network.read) + 4  # with the coordinates
    conditions, x = torch.randn(2, channels, 12, 12).double(), torch.randn(2, 4, 12, 12).double()
    angle, largest = torch.tensor([0.7]).double(), torch.zeros(2, 50).double()
    shifts = (3, -2), (-2, -1)
    plain, low = network(x, largest, angle, network.encode(conditions, largest))
    moved, _ = network(
        x.roll(*shifts), largest, angle, network.encode(conditions.roll(*shifts), largest)
    )
    assert plain.shape == (2, 2, 12, 12) and not bool(low.any())
    assert torch.allclose(plain.roll(*shifts), moved, atol=1e-12)
    places = [number for number in range(channels) if number not in network.read]
    assert places == list(range(model.num_features, model.num_features + 4))


def test_resampled_draws_are_residuals_of_the_training_moved():
    model = fitted(300, preset="resampled", amplitude="none", mean=["regression"])
    archive = torch.view_as_complex(model.statistics.law_archive.double())
    assert 256 <= len(archive) <= 512
    state = torch.zeros(1, 2, *B.shape, dtype=torch.complex128)
    drawn = model.sample_hat(Request(state, range(2000), seed=5))
    powers = drawn.abs().square()
    known = archive.abs().square()
    nearest = (powers[:200, None] - known[None]).flatten(2).abs().amax(-1).min(1).values
    assert float(nearest.max()) < 1e-6 * float(known.max())
    assert len(powers[:200, 0, 0, 1].unique()) > 100
    # moved: phases are uniform, and those of the two layers move together
    phases = drawn[:, 0, 1, 1] / drawn[:, 0, 1, 1].abs()
    assert float(phases.mean().abs()) < 0.1
    across = (drawn[:, 0] * drawn[:, 1].conj()).mean(0)
    expected = (archive[:, 0] * archive[:, 1].conj()).mean(0)
    assert torch.allclose(across, expected, atol=0.05 * float(expected.abs().max()))
    again = model.sample_hat(Request(state, range(2000), seed=5))
    assert torch.equal(again, drawn)
    other = model.sample_hat(Request(state, range(2000), seed=5, call=1))
    assert not torch.allclose(other[0], drawn[0])


@pytest.mark.parametrize("network", ["fno", "cnn"])
def test_a_generator_stays_finite_far_from_its_training(network):
    model = fitted(200, preset="default", generator=network, validate_parts="off")
    torch.manual_seed(1)
    for weight in model.residual.parameters():
        torch.nn.init.normal_(weight, std=1.0)
    state = 1e4 * B.to_physical(Law().states(range(8)), SIZE)
    drawn = model.sample_batch(Request(state, range(8), seed=1))
    assert bool(drawn.isfinite().all())


def test_a_file_gives_the_same_draws(gaussian, tmp_path):
    path = tmp_path / "model.safetensors"
    target = {"kind": "subgrid", "interval": 1, "dt": 0.1, "every": 0.1}
    save(gaussian, path, target=target, provenance={})
    closure = load(path)
    state = B.to_physical(Law().states([4]), SIZE)[0].numpy()
    one = closure.sample(state, members=3, seed=2)
    expected = gaussian.sample_batch(Request(torch.from_numpy(state)[None], range(3), seed=2))
    assert one.shape == (3, 2, SIZE, SIZE) and np.allclose(one, expected, atol=1e-6)
    two = closure.sample(np.stack([state] * 2), members=[[0, 1, 2]] * 2, seed=2)
    assert np.allclose(two[1], one, atol=1e-6)
    for wrong in (state[0], np.concatenate([state, state[:1]])):
        with pytest.raises(ValueError, match=r"state has shape .*, expected \(2, n, n\)"):
            closure.sample(wrong)


def test_a_model_of_other_fields_is_refused(gaussian, tmp_path):
    path = tmp_path / "model.safetensors"
    target = {"kind": "subgrid", "interval": 20, "dt": 0.0125, "every": 0.25}
    save(gaussian, path, target=target, provenance={})
    line = "its state is q_upper, q_lower, the experiment's is vorticity, moisture, rain"
    with pytest.raises(ValueError, match=line):
        check_fits(path, reading.load("clouds"), "use.model=layers")


def test_members_do_not_depend_on_their_company(gaussian):
    state = B.to_physical(Law().states(range(4)), SIZE)
    together = gaussian.sample_batch(Request(state, [7, 8, 9, 10], seed=1))
    alone = gaussian.sample_batch(Request(state[2:3], [9], seed=1))
    assert torch.allclose(together[2], alone[0], atol=1e-12)


def test_features_of_layers_are_the_solvers_velocities():
    equation = equation_of({"equation": LAYERS})
    problem = Problem(**LAYERS, grid=SIZE, dt=0.01, hyperviscosity=1e-8)
    solver = Simulation(problem, range(2), 0)
    w_hat = Law().states(range(2))
    solver.load_state(0, w_hat)
    velocity = solver.fields(["velocity"], size=SIZE)["velocity"]  # (members, 2, layers, n, n)
    features = Features(B, equation)
    assert features.names[:4] == ("u1", "v1", "u2", "v2")
    ours = B.to_physical(features.spectra(w_hat)[:, :4], SIZE)
    expected = velocity.transpose(1, 2).flatten(1, 2)
    assert torch.allclose(ours, expected, atol=1e-12)


def test_features_of_clouds_are_those_of_the_flow_and_its_scalars():
    features = Features(B, equation_of({"equation": CLOUDS}))
    key = keyed_noise.Key(1, "state", range(2), 0)
    w_hat = keyed_noise.white_fields(B, key, 0, torch.device("cpu"), (3,))
    found = dict(zip(features.names, features.spectra(w_hat).unbind(1)))
    flow = dict(zip(("u", "v", "w", "w_x", "w_y"), feature_spectra(w_hat[:, 0], B).unbind(1)))
    assert torch.allclose(found["u"], flow["u"]) and torch.allclose(found["v"], flow["v"])
    assert torch.equal(found["vorticity_y"], flow["w_y"])
    rain = dict(zip(("u", "v", "w", "w_x", "w_y"), feature_spectra(w_hat[:, 2], B).unbind(1)))
    assert torch.equal(found["rain_x"], rain["w_x"]) and torch.equal(found["rain"], w_hat[:, 2])


def test_white_noise_of_channels_is_independent_and_keyed():
    key = keyed_noise.Key(1, "test", range(2000), 0)
    device = torch.device("cpu")
    three = keyed_noise.white_fields(B, key, 5, device, (3,))
    two = keyed_noise.white_fields(B, key, 5, device, (2,))
    assert torch.equal(three[:, :2], two)  # a narrower draw is the beginning of a wider one
    products = (three[:, 0] * three[:, 1].conj()).mean(0).abs()
    assert float(products.max()) < 5 / math.sqrt(2000)
    one = keyed_noise.white_fields(B, key, 5, device, ())
    assert torch.equal(one, two[:, 0])


def test_a_closure_knows_the_number_of_its_fields(gaussian):
    assert Closure(gaussian, None).channels == 2


# ---- previous closures --------------------------------------------------------------------------

MATRIX = torch.tensor([[0.6, -0.5], [0.4, 0.7]], dtype=torch.float64)  # |eigenvalue| = 0.79
INNOVATION = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=torch.float64)


def stationary():
    """Covariance S = A S A' + Q of the recursion U_n = A U_(n-1) + noise, as a matrix equation."""
    eye = torch.eye(4, dtype=torch.float64)
    vector = torch.linalg.solve(eye - torch.kron(MATRIX, MATRIX), INNOVATION.flatten())
    return vector.view(2, 2)


class Recursion(Law):
    """U_n = A U_(n-1) + noise: a vector autoregressive law, which does not depend on V."""

    def draws(self, ids, seed, covariance):
        key = keyed_noise.Key(seed, "law", ids, 0)
        white = keyed_noise.white_fields(B, key, 0, torch.device("cpu"), (2,))
        root = torch.linalg.cholesky(covariance).to(white)
        return torch.einsum("ij,bjxy->bixy", root, white) * self.variance.sqrt()

    def batches(self, first, count, chunk=100):
        out = []
        for start in range(first, first + count, chunk):
            ids = range(start, start + chunk)
            previous = self.draws(ids, 12, stationary())
            target = torch.einsum("ij,bjxy->bixy", MATRIX.to(previous), previous)
            target = target + self.draws(ids, 13, INNOVATION)
            fields = [B.to_physical(each, SIZE) for each in (self.states(ids), target, previous)]
            out.append({"state": fields[0], "target": fields[1], "previous": fields[2][:, None]})
        return out


@pytest.fixture(scope="module")
def remembering():
    torch.manual_seed(0)
    conditions = {**NONE, "previous_closures": 1}
    settings = {**SMALL, "conditions": conditions, "equation": LAYERS, "preset": "gaussian"}
    model = build(settings, SIZE, LENGTH)
    for phase in model.phases:
        model.begin(phase.name, Recursion().batches(10_000 * len(phase.name), 1500))
    return model


def test_a_coupled_closure_has_the_stationary_law_of_its_vector_recursion(remembering):
    assert remembering.library.active == ["U_q_upper[-1]", "U_q_lower[-1]"]
    assert float(remembering.library.spectral_radius()[1]) == pytest.approx(0.787, abs=0.01)
    count, seen = 500, B.grid.integer_k2.expand(B.shape) > 0
    state = torch.zeros(count, 2, *B.shape, dtype=torch.complex128)
    drawn, moments = torch.zeros_like(state)[:, None], torch.zeros(2, 2, 2).double()
    for call in range(60):
        request = Request(state, range(count), seed=5, call=call, previous=drawn)
        latest = remembering.sample_hat(request)
        if call >= 30:
            scaled = latest[..., seen] / Law.variance.sqrt()[seen]
            for lag, other in enumerate(
                (scaled, drawn[:, 0][..., seen] / Law.variance.sqrt()[seen])
            ):
                moments[lag] += torch.einsum("bik,bjk->ij", scaled, other.conj()).real
        drawn = latest[:, None]
    moments /= 30 * count * int(seen.sum())
    exact = torch.stack([stationary(), MATRIX @ stationary()])
    assert moments.numpy() == pytest.approx(exact.numpy(), abs=0.03 * float(exact.max()))


def test_a_shell_of_one_field_beyond_its_range_is_rescaled_alone(remembering):
    statistics = remembering.statistics
    assert statistics.target_largest.shape == (2, B.grid.num_shells) and remembering.guarded
    u_hat = Recursion().draws(range(4), 3, stationary())
    large = u_hat.clone()
    shell = B.grid.shell()
    large[1, 0, shell == 3] *= 40.0
    drawn, far = remembering._rescale_into_range(large)
    assert far.shape == (4, B.grid.num_shells)
    assert far.nonzero().tolist() == [[1, 3]]
    power = remembering.shell_power(drawn)[1, :, 3]
    assert float(power[0]) == pytest.approx(float(statistics.target_mean[0, 3]))
    drawn[1, 0, shell == 3] = large[1, 0, shell == 3]
    assert torch.equal(drawn, large)


def test_the_components_of_a_vector_have_one_range(remembering, monkeypatch):
    """Rescaled by one factor, a solenoidal closure stays solenoidal."""
    monkeypatch.setattr(remembering, "whole", [0, 0])
    statistics = remembering.statistics
    one = {
        name: getattr(statistics, name).sum(0, keepdim=True)
        for name in ("target_largest", "target_mean")
    }
    monkeypatch.setattr(remembering, "statistics", replace(statistics, **one))
    shell, w_hat = B.grid.shell(), Recursion().draws(range(4), 3, stationary())[:, 0]
    solenoidal = torch.stack([1j * B.grid.ky * w_hat, -1j * B.grid.kx * w_hat], 1)
    solenoidal[1, :, shell == 3] *= 40.0
    drawn, far = remembering._rescale_into_range(solenoidal)
    assert bool(far[1, 3])
    divergence = B.grid.kx * drawn[:, 0] + B.grid.ky * drawn[:, 1]
    assert float(divergence.abs().max()) < 1e-12 * float(drawn.abs().max())


def test_the_components_of_a_vector_are_one_field(monkeypatch):
    vector = (("u", "vector x"), ("v", "vector y"), ("w", "vector z"), ("b", "scalar"))
    channels = tuple(Channel(name, "", kind) for name, kind in vector)
    monkeypatch.setattr(TwoLayerQG, "channels", channels)
    assert whole_fields({"equation": LAYERS}) == [0, 0, 0, 1]
    assert whole_fields({"equation": None}) == [0]


def test_networks_read_the_previous_closures_of_all_fields():
    conditions = {**NONE, "previous_closures": 1}
    settings = {**SMALL, "conditions": conditions, "equation": LAYERS, "preset": "convolutional"}
    model = build(settings, SIZE, LENGTH)
    for phase in model.phases:
        model.begin(phase.name, Recursion().batches(10_000 * len(phase.name), 200))
    assert model.num_features == len(model.feature_set.names) + 2 + 2
    batch = Recursion().batches(0, 100)[0]
    frames_hat = model.frames(batch["state"], None, batch["previous"])
    features = model.feature_spectra(frames_hat, model.advected(frames_hat))
    assert features.shape[1] == model.num_features
    assert torch.equal(features[:, -4:-2], frames_hat[:, 1])
    assert torch.equal(features[:, -2:], model.advected(frames_hat)[:, 0])
