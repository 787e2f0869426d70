"""The published model: size, sensors, loss, sampler, learning, conditions, the coupled run."""

import math

import pytest
import torch
from closure_case import batches_of, law_of, score_loss, states_of

from hpc_closure.closure import artifact
from hpc_closure.closure.artifact import build
from hpc_closure.closure.baselines.published_model import box_filter, constant_loss, white_loss
from hpc_closure.closure.fields.sensors import Sensors, regular_positions
from hpc_closure.closure.header import Header
from hpc_closure.closure.model import Request
from hpc_closure.closure.networks.layers import SpectralConv
from hpc_closure.closure.sampling import PublishedVE
from hpc_closure.closure.targets import Target
from hpc_closure.experiment import reading
from hpc_closure.experiment.schema import Rollout
from hpc_closure.rollout.coupling import CoupledRun, Coupling
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.train.verb import build_model


def published(size=32, **config):
    torch.manual_seed(0)
    model = build({"preset": "published", **config}, size)
    model.resume("score")
    return model


def batch_of(count=4, size=32):
    generator = torch.Generator().manual_seed(0)
    state, target = torch.randn(2, count, size, size, generator=generator)
    return {"state": state, "target": 0.1 * target, "sample_index": torch.arange(count)}


@pytest.mark.parametrize(
    "config, numbers",
    [
        ({"upscaling": "conv"}, 697_237),
        # two more spectral layers smooth the sensors' lift
        ({"upscaling": "interp"}, 697_237 + 2 * 2 * 20 * 20 * 8 * 8),
        ({"conditions": {"sensors": "none"}}, 489_877),
    ],
)
def test_size_of_the_published_network(config, numbers):
    """Counted as the authors' code counts: a complex number as one, frozen frequencies too."""
    full = build({"preset": "published", **config}, 64)
    spectral = [one.weight for one in full.modules() if isinstance(one, SpectralConv)]
    assert full.num_parameters() == sum(p.numel() for p in full.parameters())
    real = full.num_parameters() - sum(weight.numel() for weight in spectral)
    frozen = full.network.frequencies.numel()
    assert real + sum(weight.numel() for weight in spectral) // 2 + frozen == numbers
    assert not any(p.is_complex() for p in full.parameters())


@pytest.mark.parametrize(
    "sensors,upscaling", [("none", "interp"), ("required", "interp"), ("required", "conv")]
)
def test_loss_and_sample(sensors, upscaling):
    model = published(conditions={"sensors": sensors}, upscaling=upscaling)
    batch = batch_of()
    model.begin("score", [batch])
    losses = model.loss_per_sample(batch, 0, 0)
    # score matching of an untrained network: E|z|^2 per sample, plus what the network says
    assert (losses / 32**2 > 0.8).all()
    model.loss(batch, 0, 0).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    given = None
    if sensors == "required":
        values = batch["target"][:, ::2, ::2].reshape(4, -1)
        given = Sensors(values, regular_positions(16))
    one = model.sample_batch(Request(batch["state"], members=[0, 1, 2, 3], seed=0, sensors=given))
    assert one.shape == (4, 32, 32) and torch.isfinite(one).all()
    again = model.sample_batch(
        Request(batch["state"], members=[0, 1, 2, 3], seed=0, sensors=given)
    )
    assert torch.equal(one, again)


def test_other_grid_than_trained():
    model = published(conditions={"sensors": "none"})
    out = model.sample_batch(Request(torch.randn(1, 48, 48), members=[0, 1], seed=0))
    assert out.shape == (2, 48, 48)


def test_both_forms_are_the_same_function():
    """``model.spectral_convolution`` chooses how a layer is computed, not what."""
    batch = batch_of()
    fft, matrix = (published(spectral_convolution=form) for form in ("fft", "matrix"))
    matrix.load_state_dict(fft.state_dict())
    one, other = (model.loss_per_sample(batch, 0, 0) for model in (fft, matrix))
    assert torch.allclose(one, other, rtol=1e-5)
    assert {layer.form for layer in matrix.modules() if isinstance(layer, SpectralConv)} == {
        "matrix"
    }


class Exact(torch.nn.Module):
    """Score times sigma of N(0, std^2) at every point."""

    upscaling = "none"

    def __init__(self, std):
        super().__init__()
        self.std, self.unused = std, torch.nn.Parameter(torch.zeros(1))

    def forward(self, t, x, state, sensors):
        sigma = PublishedVE().sigmas(t)[:, None, None]
        return -sigma * x / (self.std**2 + sigma**2)


def test_score_of_a_known_law_is_sampled_with_the_published_steps():
    """With the exact score of N(0, s^2), s = 0.3, the ten published steps are under-dispersed."""
    model, std = published(conditions={"sensors": "none"}), 0.3
    model.network = Exact(std)
    out = model.sample_batch(Request(torch.zeros(1, 32, 32), members=range(50), seed=0))
    assert 0.75 < float(out.std()) / std < 0.98


@pytest.mark.parametrize("std", [0.05, 0.0884, 0.3917473, 2.0])
def test_losses_in_closed_form(std):
    sigma2 = PublishedVE().sigmas(torch.linspace(0, 2, 2_000_001).double()) ** 2
    share = std**2 / (std**2 + sigma2)
    assert white_loss(8, std) == pytest.approx(64 * float(share.mean()), rel=1e-3)


def test_losses_are_those_of_the_scores_they_name():
    model, std = published(conditions={"sensors": "none"}), 1.0
    model.network = Exact(std)
    targets = std * torch.randn(4000, 8, 8, generator=torch.Generator().manual_seed(1))
    loss = score_loss(model, torch.zeros_like(targets), targets)
    assert loss == pytest.approx(white_loss(8, std), rel=0.05)
    model.network = Exact(math.inf)  # a score of zero
    assert score_loss(model, targets, targets) == pytest.approx(constant_loss(8), rel=0.01)


# ---- it learns ----------------------------------------------------------------------------------


class Negated(torch.nn.Module):
    """A network in whose loss (score + z) becomes (score - z): the target's sign flipped."""

    def __init__(self, network):
        super().__init__()
        self.network, self.upscaling = network, network.upscaling

    def forward(self, *args):
        return -self.network(*args)


def trained(steps, flipped=False):
    """A tiny network after some steps of Adam on the exact law of G, and its held-out loss."""
    law = law_of(size=16)
    config = {"width": 8, "modes": 4, "layers": 2, "conditions": {"sensors": "none"}}
    model = published(16, **config, target_factor=2.0)
    (state, target), (unseen, truth) = batches_of(law, 400, chunk=400) + batches_of(law, 100, 500)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    network = model.network
    for step in range(steps):
        rows = torch.arange(16 * step, 16 * (step + 1)) % len(state)
        model.network = Negated(network) if flipped else network
        batch = {"state": state[rows], "target": target[rows], "sample_index": rows}
        optimizer.zero_grad()
        model.loss(batch, 0, step).backward()
        optimizer.step()
    model.network = network
    return score_loss(model, unseen, truth)


def test_training_ends_below_the_best_constant_score_and_needs_the_right_sign():
    """Judged by a loss written again, so that a wrong sign in the model's own is seen."""
    assert trained(0) > 0.97 * constant_loss(16)
    assert trained(80) < 0.3 * constant_loss(16)
    assert trained(80, flipped=True) > 2 * constant_loss(16)


# ---- sensors and amplitude ----------------------------------------------------------------------


def box_by_hand(values, size):
    """The published filter of one field, point by point."""
    stride, side = size // len(values), len(values)
    sums = torch.zeros(size, size)
    for i in range(size):
        for j in range(size):
            for a in range(side):
                for b in range(side):
                    if abs(i - a * stride) < stride and abs(j - b * stride) < stride:
                        sums[i, j] += values[a, b]
    share = (sums - sums.min()) / (sums.max() - sums.min())
    return values.min() + share * (values.max() - values.min())


def test_box_filter_is_the_published_one():
    """A box of 2 n/s - 1 points, zeros outside, range restored per field."""
    values = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    wide = box_filter(values, 16)
    for one, expected in zip(wide, values):
        assert torch.allclose(one, box_by_hand(expected, 16), atol=1e-5)
    assert torch.allclose(wide.amax((1, 2)), values.amax((1, 2)))
    assert torch.allclose(box_filter(torch.full((1, 8, 8), 3.0), 32), torch.full((1, 32, 32), 3.0))
    assert torch.equal(box_filter(torch.zeros(1, 8, 8), 32), torch.zeros(1, 32, 32))


def test_it_learns_the_closure_as_quoted():
    """G = 2U for the diffusion term, at which the published noise range is meant; H = U."""
    factors = {
        name: build_model(reading.load(f"published_{name}")).config["target_factor"]
        for name in ("diffusion", "convection")
    }
    assert factors == {"diffusion": 2.0, "convection": 1.0}
    assert published().factor == 1.0  # alone, it knows of no closure
    single, double = (
        published(conditions={"sensors": "none"}, target_factor=factor) for factor in (1.0, 2.0)
    )
    batch = batch_of()
    twice = {**batch, "target": 2 * batch["target"]}
    assert torch.equal(double.loss_per_sample(batch, 0, 0), single.loss_per_sample(twice, 0, 0))
    request = Request(batch["state"], members=range(4), seed=0)
    assert torch.equal(2 * double.sample_batch(request), single.sample_batch(request))


def test_presets_have_the_published_recipe():
    for name, batch in (("diffusion", 80), ("convection", 200)):
        experiment = reading.load(f"published_{name}")
        train, generate = experiment.train, experiment.generate
        assert (train.clip, train.ema, train.schedule, train.lr) == (0, 0, "published", 1e-3)
        assert train.batch == batch and generate.interval == 1 and generate.closure == name
        snapshots = 95 * (1 + round((generate.t_end - generate.record.start) / 0.1))
        assert train.steps == round(1000 * snapshots / batch)


# ---- the coupled run ----------------------------------------------------------------------------


def closure_of(**config):
    model = published(width=8, modes=4, layers=1, target_factor=2.0, **config)
    target = {"kind": "diffusion", "interval": 1, "dt": 1e-3}
    return artifact.Closure(model.eval(), Header(model.config, model.grid, 1.0, target, {}))


def test_samples_are_held_as_published():
    closure = closure_of(conditions={"sensors": "none"})
    assert closure.describe_interval(5) == "held 5 steps as published, not rescaled"
    assert closure.describe_interval(1) == "held 1 step"
    state = states_of(1)[0]
    once, held = (closure.sample(state, members=3, interval=m) for m in (1, 5))
    assert torch.equal(once, held)
    closure.target["interval"] = 10
    with pytest.raises(ValueError, match="interval=5: the published network was trained at 10"):
        closure.describe_interval(5)
    default = artifact.Closure(build({}, 32), Header({}, 32, 1.0, {"interval": 1}, {}))
    assert default.describe_interval(5) == "held 5 steps" and default.interval_ratio(5) == 5


def test_coupled_as_published():
    """Trained at one step, held five; sensors read the closure of the call's step, not a mean."""
    closure = closure_of()
    seen, draw = [], closure.sample_hat

    def watch(request):
        seen.append((request.interval_ratio, request.sensors.values.clone()))
        return draw(request)

    closure.sample_hat = watch
    problem = law_of().problem
    rollout = Rollout(interval=5, sensors={"layout": "regular", "number": 16})
    run = CoupledRun(Coupling(problem, "diffusion", 32, 3, rollout), closure, [(7, 0)], [7])
    run.start(states_of(1).numpy(), 0)
    run.advance(3)
    assert run.step_index == 15 and all(held == 1.0 for held, _ in seen)
    assert all(torch.isfinite(field).all() for field in run.fields().values())
    truth = Simulation(problem, [7], 3)
    truth.load_state(0, truth.transform.to_spectral(states_of(1)))
    now = truth.transform.to_physical(Target("diffusion", 1).compute(truth))
    assert torch.allclose(seen[0][1], now[:, ::2, ::2].reshape(1, -1), rtol=0, atol=1e-12)


def test_errors():
    with pytest.raises(ValueError, match="required or none"):
        published(conditions={"sensors": "optional"})
    with pytest.raises(ValueError, match="reads no previous states"):
        published(conditions={"sensors": "none", "previous_states": 2})
    with pytest.raises(ValueError, match="should be .interp. or .conv."):
        published(upscaling="nearest")
