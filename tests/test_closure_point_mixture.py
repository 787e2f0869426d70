"""A mixture of two normal laws at every point, joined by a Gaussian copula."""

import copy
import math

import pytest
import torch
from closure_case import SIZE, states_of
from torch import Tensor

import hpc_closure
from hpc_closure.closure import artifact
from hpc_closure.closure.artifact import build
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.losses import crps
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.fields.two_normals import TwoNormals
from hpc_closure.closure.fitting.judging import judge_spread
from hpc_closure.closure.gaussian.conditioning import Observed
from hpc_closure.closure.model import Request
from hpc_closure.closure.reductions import Reader
from hpc_closure.spectral.modes.grid import resize

CONFIG = {
    "preset": "point_mixture",
    "mean": "none",
    "width": 8,
    "mean_layers": 1,
    "noise_memory": "off",
}
TWO = {"equation": "two_layer_qg", "deformation_radius": 0.2}
ACROSS = 0.6  # correlation of the normal scores of two channels
MEMBERS = 16


class Law:
    """Two components at every point, the second one where the state is large.

    Args:
        fields: number of fields.
        apart: distance of the components; 0 = a single normal law.
    """

    def __init__(self, fields: int = 1, apart: float = 1.6):
        self.fields, self.apart = fields, apart
        self.band = band(10)
        k2 = self.band.grid.integer_k2.double()
        spectrum = torch.exp(-k2 / 4) * (k2 > 0)
        self.std = (spectrum / (spectrum * self.band.weights).sum()).sqrt()

    def states(self, count: int, first: int = 0) -> Tensor:
        """(count, n, n), of two fields (count, 2, n, n)."""
        if self.fields == 1:
            return states_of(count, first)
        both = [states_of(count, first + 500_000 * channel) for channel in range(2)]
        return torch.stack(both, 1)

    def points(self, states: Tensor) -> TwoNormals:
        """Laws of the values; the second channel has the opposite sign."""
        odds = 2 * states - 0.5
        weights = torch.nn.functional.logsigmoid(torch.stack([-odds, odds]))
        sign = torch.ones(self.fields).double()
        sign[1:] = -1.0
        sign = sign[:, None, None] if self.fields > 1 else 1.0
        means = torch.stack([torch.zeros_like(states), self.apart + 0.3 * states]) * sign
        stds = torch.tensor([0.5, 0.8 if self.apart else 0.5]).double()
        if not self.apart:
            means = torch.zeros_like(means)
        return TwoNormals(weights, means, stds.log().view(2, *[1] * states.ndim).expand_as(means))

    def scores(self, ids: range, item: int = 0) -> Tensor:
        """Draw the copula's fields."""
        shape = (self.fields,) if self.fields > 1 else ()
        key = keyed_noise.Key(5, "copula", ids, item)
        white = keyed_noise.white_fields(
            self.band, key, keyed_noise.STREAM_BASE, torch.device("cpu"), shape
        )
        if shape:
            white[:, 1] = ACROSS * white[:, 0] + math.sqrt(1 - ACROSS**2) * white[:, 1]
        return self.band.to_physical(white * self.std, SIZE)

    def draw(self, states: Tensor, ids: range, item: int = 0) -> Tensor:
        """One U per state, within the band of the model."""
        fields = self.points(states).quantile(self.scores(ids, item))
        return self.band.to_physical(self.band.to_spectral(fields), SIZE)

    def batches(self, count: int, first: int, chunk: int = 100) -> list[tuple[Tensor, Tensor]]:
        """Pairs (state, target), float32."""
        out = []
        for start in range(first, first + count, chunk):
            states = self.states(chunk, start)
            targets = self.draw(states, range(start, start + chunk))
            out.append((states.float(), targets.float()))
        return out


def fitted(law: Law, steps: int, count: int = 600):
    """A model of a law, fitted by Adam on pairs of its own."""
    torch.manual_seed(0)
    model = build({**CONFIG, "equation": TWO if law.fields > 1 else None}, SIZE)
    pairs = {"train": law.batches(count, 0), "valid": law.batches(count // 2, 20_000)}
    for phase in model.phases:
        model.begin(phase.name, pairs.get(phase.members, pairs["train"]))
        weights = phase.parameters(model)
        if not weights:
            continue
        states, targets = (torch.cat(part) for part in zip(*pairs["train"]))
        optimiser = torch.optim.Adam(weights, lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for step in range(steps):
            rows = torch.randperm(len(states))[:32]
            batch = {"state": states[rows], "target": targets[rows], "sample_index": rows}
            loss = phase.loss(model, batch, 0, step).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


@pytest.fixture(scope="module", params=[1, 2], ids=["field", "channels"])
def case(request):
    """A law, a model of it, unseen states, their truths, and draws of the model and the law."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    law = Law(request.param)
    model = fitted(law, 150)
    states = law.states(60, 90_000)
    ids = range(90_000, 90_060)
    ours = [
        model.sample_batch(Request(states.float(), range(60), seed=1, call=call))
        for call in range(MEMBERS)
    ]
    exact = [law.draw(states, ids, 1 + call) for call in range(MEMBERS)]
    yield law, model, states, law.draw(states, ids), torch.stack(ours), torch.stack(exact)
    torch.set_num_threads(threads)


def conditions_of(model, states: Tensor):
    """The conditions of the residual."""
    encoding = model.encode(model.frames(states.float()))
    absent = model.conditioning.absent(model.frame, encoding.features)
    return model.posterior(encoding, Observed(absent), [])


def test_draws_score_as_those_of_the_exact_law(case):
    _, _, _, truth, ours, exact = case
    score, best = (float(crps(drawn.double(), truth).mean()) for drawn in (ours, exact))
    assert score == pytest.approx(best, rel=0.02)


@pytest.mark.parametrize("level", [-1.64, -0.67, 0.0, 0.67, 1.64])
def test_quantiles_at_every_point_are_those_of_the_law(case, level):
    """On average over points with one kind of state, since two components can imitate others."""
    law, _, states, _, ours, _ = case
    quantile = law.points(states).quantile(torch.full_like(states, level))
    below = (ours < quantile).double().mean(0)
    expected = float(torch.special.ndtr(torch.tensor(level)))
    for least, most in ((-9, -0.5), (-0.5, 0.5), (0.5, 9)):
        rows = (states > least) & (states < most)
        assert float(below[rows].mean()) == pytest.approx(expected, abs=0.05)


def test_points_are_correlated_as_in_the_law(case):
    law, _, states, _, ours, exact = case
    points = law.points(states)
    scores, known = (
        torch.stack([points.score(one.double()) for one in drawn]) for drawn in (ours, exact)
    )

    def correlation(fields: Tensor, shift: int, along: int) -> Tensor:
        moved = torch.roll(fields, shift, along)
        return (fields * moved).mean((0, 1, -2, -1)) / fields.square().mean((0, 1, -2, -1))

    for shift in (1, 2, 4, 6):
        for along in (-1, -2):
            one, other = (correlation(fields, shift, along) for fields in (scores, known))
            assert torch.allclose(one, other, atol=0.04)
    if law.fields > 1:
        across = [
            float(torch.corrcoef(fields.movedim(2, 0).flatten(1))[0, 1])
            for fields in (scores, known)
        ]
        assert across[0] == pytest.approx(across[1], abs=0.05)


def test_the_mean_of_the_law_is_that_of_its_draws(case):
    _, model, states, _, ours, _ = case
    key = keyed_noise.Key(0, "test", range(4 * 200), 0)
    z = model.base_noise(model.frame.law, key, keyed_noise.STREAM_BASE)
    with torch.no_grad():
        conditions = conditions_of(model, states[:4])
        made = model.residual.draw(model.frame, conditions, z, torch.ones(()), None)
    fields, mean = (model.frame.field(part) for part in (made.q, made.mean))
    fields, mean = (part.unflatten(0, (4, 200)) for part in (fields, mean))
    off = (fields.mean(1) - mean[:, 0]) / fields.std(1)
    assert made.sharp and float(off.square().mean()) < 2 / 200


@torch.no_grad()
def test_the_noise_has_the_memory_of_normal_scores(case):
    """Not that of q, which is less if q has rare events."""
    law, trained, _, _, _, _ = case
    model, count, rho = copy.deepcopy(trained), 100, 0.8
    model.config["noise_memory"] = "on"
    head = model.residual.network.head
    head.weight.zero_()
    head.bias.copy_(torch.tensor([2.2, -0.3, 3.0, -1.5, 0.0]).repeat_interleave(law.fields))
    states = law.states(count, 80_000).float()
    conditions, draws = conditions_of(model, states), []
    first, fresh = (
        model.base_noise(
            model.frame.law,
            keyed_noise.Key(0, "test", range(count), moment),
            keyed_noise.STREAM_BASE,
        )
        for moment in range(2)
    )
    for z in (first, rho * first + math.sqrt(1 - rho**2) * fresh):
        draws.append(model.residual.draw(model.frame, conditions, z, torch.ones(()), None).q)
    targets = model.band.to_physical(resize(torch.cat(draws), model.band.modes), SIZE)
    member, moment = torch.arange(2 * count) % count, torch.arange(2 * count) // count
    batch = {"state": torch.cat([states, states]), "target": targets}
    judge_spread(model, Reader([{**batch, "member": member, "moment": moment}]), False)
    found = torch.exp(-1 / model.statistics.memory_times.clamp(min=1e-3))[..., 1:4]
    assert torch.allclose(found, torch.full_like(found, rho), atol=0.05)


def test_a_file_draws_the_same_and_a_member_alone(case, tmp_path):
    _, model, states, _, _, _ = case
    path = tmp_path / "m.safetensors"
    target = {"kind": "diffusion", "dt": 0.01, "interval": 1}
    artifact.save(model, path, target=target, provenance={})
    closure, state = hpc_closure.load(path), states[0].float()
    whole = closure.sample(state, members=8, seed=3, call=2)
    ours = model.sample_batch(Request(state[None], range(8), seed=3, call=2))
    assert torch.equal(whole, ours.to(whole))
    assert torch.equal(closure.sample(state, members=[5], seed=3, call=2)[0], whole[5])
    assert not torch.equal(closure.sample(state, members=[5], seed=3, call=3)[0], whole[5])


def test_a_law_of_a_single_component_is_gaussian():
    law = Law(apart=0.0)
    model = fitted(law, 60, 200)
    states = law.states(20, 90_000)
    drawn = torch.stack(
        [
            model.sample_batch(Request(states.float(), range(20), seed=1, call=call))
            for call in range(MEMBERS)
        ]
    ).double()
    kurtosis = float(drawn.pow(4).mean() / drawn.square().mean().square())
    assert kurtosis == pytest.approx(3.0, abs=0.15)
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.03)
    assert float(drawn.mean()) == pytest.approx(0.0, abs=0.02)


# ---- laws of numbers ----------------------------------------------------------------------------


def some_laws(count: int) -> TwoNormals:
    """Laws with far or close components, of very different widths and weights."""
    draw = torch.Generator().manual_seed(3)
    odds, first, second, log_first, log_second = torch.randn(5, count, generator=draw).double()
    return TwoNormals(
        torch.nn.functional.logsigmoid(torch.stack([4 * odds, -4 * odds])),
        torch.stack([3 * first, 3 * second]),
        torch.stack([3 * torch.tanh(log_first), 3 * torch.tanh(log_second)]),
    )


def test_scores_and_quantiles_are_inverse_far_into_both_tails():
    laws = some_laws(2000)
    std = laws.log_stds.exp().amax(0) + (laws.means[0] - laws.means[1]).abs()
    for level in (-6.0, -3.0, -0.5, 0.0, 0.5, 3.0, 6.0):
        scores = torch.full((2000,), level).double()
        x = laws.quantile(scores)
        assert torch.allclose(laws.score(x), scores, atol=1e-6)
        assert float(((laws.quantile(laws.score(x)) - x) / std).abs().max()) < 1e-6


def test_density_and_mean_are_those_of_the_levels():
    laws = some_laws(20)
    x = torch.linspace(-300, 300, 150_001, dtype=torch.float64)
    every = TwoNormals(*(one[..., None] for one in (laws.log_weights, laws.means, laws.log_stds)))
    density = every.log_density(x).exp() / math.sqrt(2 * math.pi)
    step = float(x[1] - x[0])
    assert torch.allclose(density.sum(-1) * step, torch.ones(20).double(), atol=1e-6)
    assert torch.allclose((density * x).sum(-1) * step, laws.mean(), atol=1e-5)
    place = torch.randint(73_500, 76_500, (20,), generator=torch.Generator().manual_seed(0))
    level = density.cumsum(-1).gather(-1, place[:, None])[:, 0] * step
    seen = (level > 1e-3) & (level < 1 - 1e-3)
    found = torch.special.ndtr(laws.score(x[place] + step / 2))
    assert int(seen.sum()) > 10 and torch.allclose(found[seen], level[seen], atol=1e-4)


def test_quantiles_have_the_derivatives_of_the_inverse():
    laws, scores = some_laws(20), torch.linspace(-2, 2, 20).double()
    parts = [
        part.clone().requires_grad_() for part in (laws.log_weights, laws.means, laws.log_stds)
    ]
    scores.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *inputs: TwoNormals(inputs[0].log_softmax(0), *inputs[1:3]).quantile(inputs[3]),
        (*parts, scores),
        eps=1e-6,
        atol=1e-4,
    )
