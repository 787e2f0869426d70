"""The default model: closed-form calibration, conditions, invariances, reproducible draws."""

import math
from dataclasses import replace

import pytest
import torch
from closure_case import BASELINES, SMALL, batches_of, fitted, law_of, states_of

from hpc_closure.closure.artifact import build
from hpc_closure.closure.composed.mean import FARTHEST
from hpc_closure.closure.fields.features import physics_estimate
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.fields.sensors import Sensors, regular_positions
from hpc_closure.closure.model import Request
from hpc_closure.experiment.models import preset_names, resolve
from hpc_closure.spectral.modes.grid import resize


@pytest.fixture(scope="module", params=["diffusion", "convection"])
def case(request):
    law = law_of(request.param)
    return law, fitted(law, 1000)


@pytest.fixture(scope="module")
def diffusion():
    law = law_of("diffusion")
    return law, fitted(law)


def batch_of(law, count=8):
    state, target = batches_of(law, count, first=500)[0]
    return {"state": state, "target": target, "sample_index": torch.arange(count) + 3}


def test_mean_and_spread_are_those_of_the_law(case):
    law, model = case
    states = states_of(60, first=50_000)
    draws_of = torch.stack(
        [
            model.sample_batch(Request(states, members=range(100 * i, 100 * i + 60), seed=1))
            for i in range(20)
        ]
    )
    spread = draws_of.var(0).mean()
    assert float(spread / law.variance) == pytest.approx(1, abs=0.06)
    bias = (draws_of.mean(0) - law.mean(states)).square().mean() - spread / 20
    assert float(bias) < 0.02 * law.variance
    b = law.band
    hats = b.to_spectral(draws_of)
    ours = b.by_group(hats.var(0)).mean(0)
    exact = law.law.spectrum * b.group_size
    for low, high in ((0, 1), (1, 4), (4, 10), (10, 25)):
        rows = (b.group_k2 >= low) & (b.group_k2 < high)
        ratio = math.sqrt(float(ours[rows].sum() / exact[rows].sum()))
        assert ratio == pytest.approx(1, abs=0.1 if low == 0 else 0.05)


def test_sensors_meet_the_kriging_floor(case):
    law, model = case
    states = states_of(30, first=60_000)
    truth = law.sample(states, members=[5], seed=2)[0]
    for side in (8, 4):
        step = truth.shape[-1] // side
        sensors = Sensors(truth[:, ::step, ::step].reshape(30, -1), regular_positions(side))
        samples = torch.stack(
            [
                model.sample_batch(
                    Request(states, members=range(50 * i, 50 * i + 30), seed=1, sensors=sensors)
                )
                for i in range(10)
            ]
        )
        spread = float(samples.var(0).mean())
        error = float((samples.mean(0) - truth).square().mean())
        floor = law.posterior_variance(sensors)
        assert spread == pytest.approx(floor, rel=0.15)
        assert error == pytest.approx(1.1 * floor, rel=0.25)


def test_noisy_scattered_sensors(diffusion):
    law, model = diffusion
    states = states_of(40, first=60_000)
    truth = law.sample(states, members=[5], seed=2)[0]
    positions = torch.rand(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = 0.3 * math.sqrt(law.variance)
    exact = law.band.at(law.band.to_spectral(truth), law.band.phases(positions))
    errors = noise * torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    sensors = Sensors(exact + errors, positions, noise)
    samples = torch.stack(
        [
            model.sample_batch(
                Request(states, members=range(50 * i, 50 * i + 40), seed=1, sensors=sensors)
            )
            for i in range(10)
        ]
    )
    spread = float(samples.var(0).mean())
    assert spread == pytest.approx(law.posterior_variance(sensors), rel=0.15)
    error = float((samples.mean(0) - truth).square().mean())
    assert error == pytest.approx(1.1 * spread, rel=0.25)


def test_untrained_networks_change_nothing(diffusion):
    _, model = diffusion
    assert not model.score_active
    assert model.amplitude_share == 0
    assert float(model.statistics.mean_gain.abs().max()) == 0


def test_same_member_same_draw_in_any_batch(diffusion):
    _, model = diffusion
    state = states_of(1)
    many = model.sample_batch(Request(state, members=[4, 9, 2], seed=3, call=1))
    alone = model.sample_batch(Request(state, members=[9], seed=3, call=1))
    assert torch.allclose(many[1:2], alone, atol=1e-10)
    later = model.sample_batch(Request(state, members=[9], seed=3, call=2))
    assert (later - alone).abs().max() > 1e-3


def test_answer_is_one_field_on_every_grid(diffusion):
    _, model = diffusion
    fine = band(model.band.modes)
    states = states_of(2)
    w_hat = fine.to_spectral(states)
    coarse = model.sample_batch(Request(states, members=[0, 1], seed=0))
    dense = model.sample_batch(Request(fine.to_physical(w_hat, 96), members=[0, 1], seed=0))
    assert torch.allclose(dense[:, ::3, ::3], coarse, atol=1e-8)
    assert torch.allclose(
        resize(band(40).to_spectral(dense), model.band.modes), fine.to_spectral(coarse), atol=1e-10
    )


def test_interval_rescales_the_white_part(diffusion):
    law, model = diffusion
    state = states_of(1)
    one = model.sample_batch(Request(state, members=range(200), seed=0))
    five = model.sample_batch(Request(state, members=range(200), seed=0, interval_ratio=5))
    assert float(five.var(0).mean() / one.var(0).mean()) == pytest.approx(0.2, rel=1e-6)
    mean = law.mean(state)
    assert torch.allclose(five.mean(0) - mean, (one.mean(0) - mean) / math.sqrt(5), atol=5e-3)


def test_loss_does_not_depend_on_how_the_batch_is_split(diffusion):
    law, model = diffusion
    for phase in ("mean", "generator"):
        model = fitted(law, 100)
        model.begin(phase, batches_of(law, 100))
        randomise(model)
        batch = batch_of(law)
        with torch.no_grad():
            whole = float(model.loss(batch, 5, 7))
            halves = [
                float(model.loss({key: value[part] for key, value in batch.items()}, 5, 7))
                for part in (slice(0, 4), slice(4, 8))
            ]
            assert sum(halves) / 2 == pytest.approx(whole, rel=1e-6)
            assert float(model.loss(batch, 5, 8)) != whole or phase == "mean"


def randomise(model):
    """Give the zero heads weights, so that every part acts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if not bool(weight.any()):
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))


@pytest.mark.parametrize("residual", ["score", "crps"])
@pytest.mark.parametrize("sensors", ["kriging", "learned"])
def test_every_phase_gives_gradients_to_its_own_weights(diffusion, residual, sensors):
    law, _ = diffusion
    model = build({**SMALL, "residual": residual, "sensors": sensors}, law.grid.size)
    for phase in ("mean", "generator"):
        model.begin(phase, batches_of(law, 100))
        randomise(model)
        model.loss(batch_of(law), 0, 0).backward()
        trained = {id(p) for p in model.phase_named(phase).parameters(model)}
        for name, parameter in model.named_parameters():
            if id(parameter) in trained:
                assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
                assert float(parameter.grad.abs().max()) > 0, name
            else:
                assert parameter.grad is None, name
        model.zero_grad()


def test_generator_with_sensors_keeps_exact_values(diffusion):
    """The projector takes the network's part out at the sensors, whatever the weights."""
    law, _ = diffusion
    model = fitted(law, 200)
    randomise(model)
    gain = torch.ones(model.frame.kept.grid.num_shells).double()
    model.adopt(replace(model.statistics, score_gain=gain))
    states = states_of(3, first=70_000)
    truth = law.sample(states, members=[5], seed=2)[0]
    sensors = Sensors(truth[:, ::8, ::8].reshape(3, -1), regular_positions(4))
    for method in ("euler", "heun", "dpmpp_2m"):
        out = model.sample_batch(
            Request(
                states, members=[0, 1, 2], seed=0, sensors=sensors, method=method, evaluations=3
            )
        )
        seen = out[:, ::8, ::8].reshape(3, -1)
        assert (seen - sensors.values).abs().max() < 1e-4 * float(truth.std())


def with_a_network(law, kind):
    """A model whose mean has a network of random weights, and nothing else that is learned."""
    torch.manual_seed(0)
    config = {"mean": ["regression", kind], "amplitude": "none", "residual": "gaussian"}
    model = build({**SMALL, **config}, law.grid.size)
    model.begin("mean", batches_of(law, 200))
    torch.nn.init.normal_(model.mean.network.head.weight)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["fno", "cnn"])
def test_the_networks_of_the_mean_are_bounded(diffusion, kind):
    """States that have left the range of the training are answered by no more than FARTHEST."""
    model, white = with_a_network(diffusion[0], kind), {}
    for times in (1.0, 1e6):
        encoding = model.encode(model.frames(times * states_of(4)))
        spectra = model.mean(model.frame, encoding) / (2 * model.frame.kept.modes + 1)
        white[times] = model.frame.kept.to_physical(spectra, model.frame.size)
    assert white[1.0].abs().max() > 0.1
    assert white[1e6].isfinite().all()
    # root mean square: a cut to the band overshoots, but adds no power
    assert white[1e6].square().mean((-2, -1)).sqrt().max() < 1.001 * FARTHEST


def test_a_generator_that_reads_the_state_whitens_it_with_its_own_spectrum(diffusion):
    """Not with that of the velocity, or of another of the features."""
    sizes = {"width": 4, "modes": 4, "layers": 1, "mean_layers": 1}
    batches = batches_of(diffusion[0], 100)
    model = build({"preset": "fno_score", **sizes}, batches[0][0].shape[-1])
    model.begin("mean", batches)
    states = torch.cat([state for state, _ in batches]).double()
    white = model.frame.whiten_state(model.band.to_spectral(states)).abs().square().double()
    kept = model.frame.kept
    power = kept.by_group(white).mean(0) / kept.group_size
    assert torch.allclose(power[1:20], torch.ones(19).double(), rtol=1e-3)


def test_a_convolutional_mean_knows_no_place(diffusion):
    model = with_a_network(diffusion[0], "cnn")
    step = model.grid // model.frame.size
    states = states_of(2)

    def answer(fields):
        spectra = model.mean(model.frame, model.encode(model.frames(fields)))
        return model.frame.kept.to_physical(spectra, model.frame.size)

    moved = answer(states.roll(3 * step, -1))
    assert torch.allclose(moved, answer(states).roll(3, -1), atol=1e-3)


def test_history_is_a_condition(diffusion):
    law, _ = diffusion
    states = states_of(100)
    target = 0.5 * states.roll(1, 0)
    batch = {
        "state": states.float(),
        "target": target.float(),
        "history": states.roll(1, 0)[:, None].float(),
    }
    model = build({**SMALL, "conditions": {"previous_states": 1}}, 32)
    report = model.begin("mean", [batch])
    assert report["terms"] == ["w[-1]"]
    model.begin("generator", [batch])
    with pytest.raises(ValueError, match="history has 0 frames"):
        model.sample_batch(Request(states[:1], members=[0], seed=0))


@pytest.mark.parametrize("kind", ["diffusion", "convection"])
def test_a_physics_estimate_is_a_condition(kind):
    """The estimate is the known term; granted to a model, it is the mean, with coefficient one."""
    law = law_of(kind)
    granted = {"kind": kind, "viscosity": law.problem.viscosity}
    w_hat = law.band.to_spectral(states_of(3))
    exact = law.mean_hat(w_hat)
    assert torch.allclose(physics_estimate(w_hat, law.band, **granted), exact, atol=1e-12)
    model = fitted(law, 200, conditions={"physics_estimate": granted})
    assert model.library.active == ["physics"]
    used = model.library.coefficients[model.library.names.index("physics")]
    assert float((used[1:10] - 1).abs().max()) < 0.05
    twin = build({**SMALL, "conditions": {"physics_estimate": granted}}, law.grid.size)
    twin.load_statistics(model.saved_statistics())
    twin.load_state_dict(model.state_dict())
    one, other = (
        m.sample_batch(Request(states_of(1), members=[0], seed=0)) for m in (model, twin)
    )
    assert torch.equal(one, other)


def test_the_estimate_of_a_subgrid_closure_dissipates_enstrophy():
    b = band(10)
    w_hat = b.to_spectral(states_of(4))
    leith = physics_estimate(w_hat, b, "subgrid", 0.0)
    transfer = (b.weights * (w_hat.conj() * leith).real).sum((-2, -1))
    assert (transfer < 0).all()
    with pytest.raises(ValueError, match="no physics estimate of closure 'none'"):
        physics_estimate(w_hat, b, "none", 0.0)


def test_presets_and_errors(diffusion):
    law, model = diffusion
    with pytest.raises(ValueError, match="expected one of default"):
        build({"preset": "big"}, 32)
    with pytest.raises(ValueError, match="model.wide is no setting of model.preset=default"):
        build({"wide": 3}, 32)
    with pytest.raises(ValueError, match="all zero"):
        build(SMALL, 32).begin("mean", [(torch.ones(4, 32, 32), torch.zeros(4, 32, 32))])
    alone = build({**SMALL, "conditions": {"sensors": "none"}}, 32)
    alone.load_statistics(model.saved_statistics())
    sensors = Sensors(torch.zeros(1), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="sensors=none"):
        alone.sample_batch(Request(states_of(1), members=[0], seed=0, sensors=sensors))
    for name in preset_names():
        config = {"preset": name}
        if name == "published":
            config["conditions"] = {"sensors": "none"}
        numbers = build(config, 64).num_parameters()
        closed = name in ("gaussian", *BASELINES)
        local = "cnn" in resolve(config).get("mean", ())
        least = 5e3 if local else 1e5
        assert numbers == 0 if closed else numbers > least
