"""It learns: on laws known in closed form, each trained part is worth more than the closed forms.

A part that does not help is judged away, so nothing else notices when training fails. Here every
model is small, trained by the trainer for some hundred steps, and must be nearer to the law than
the same model without its trained parts, by margins that another seed does not cross.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from closure_case import Remembering, cubic_drag, one_way_kernel, outside

from hpc_closure.bench.model.known import Known, fit
from hpc_closure.bench.model.sampling import Reference
from hpc_closure.closure.artifact import build
from hpc_closure.closure.composed.generators import Drawn, Score
from hpc_closure.closure.composed.model import CompositeClosure
from hpc_closure.closure.fields.sensors import read_regular
from hpc_closure.closure.model import ClosureModel, Request
from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.schema import Train
from hpc_closure.train import trainer
from hpc_closure.train.trainer import Average

GRID = 16
SEED = 0  # the bounds hold for 0, 1 and 2
STATES, MEMBERS = 32, 32
SMALL = {"width": 12, "modes": 4, "layers": 1, "mean_layers": 1, "conditions": {"sensors": "none"}}
CLOSED = {"mean": ["regression"], "amplitude": "none", "residual": "gaussian"}


def learned(known, *, samples, steps, batch=32, **config):
    """A small model trained on a law, on one thread: the same weights on every machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return fit(
            known, samples=samples, steps=steps, batch=batch, config={**SMALL, **CLOSED, **config}
        )
    finally:
        torch.set_num_threads(threads)


@dataclass
class Judged:
    """A trained model, and scores of it and of ``mean_gp`` on states that it has not seen.

    Attributes:
        rows: columns of :mod:`hpc_closure.bench.model.sampling`, 1 is the law.
    """

    known: Known
    model: ClosureModel
    rows: dict[str, dict]

    @classmethod
    def of(cls, known, **settings) -> "Judged":
        model = learned(known, **settings)
        states = known.states("test", STATES)
        reference = Reference(known, states, known.draw(states, 9_000_000), MEMBERS)
        rows = {
            name: reference.judge(lambda chosen: drawn(model, states, chosen, method))
            for name, method in (("model", None), ("mean_gp", "mean_gp"))
        }
        rows["law"] = reference.judge(lambda chosen: reference.law(chosen, range(MEMBERS)))
        return cls(known, model, rows)

    def closed(self, column: str) -> float:
        """Share of the gap between ``mean_gp`` and the law that the trained part closes."""
        law = self.rows["law"][column]
        own, plain = (self.rows[name][column] - law for name in ("model", "mean_gp"))
        if column == "crps_ratio":  # below the law's by chance is no distance from it
            return 1 - max(own, 0.0) / plain
        return 1 - abs(own) / abs(plain)


def drawn(model, states, chosen, method=None, count=MEMBERS):
    """(members, states, n, n), draws of their own for each state."""
    asked = Request(states[:1].float(), (), seed=7, method=method)
    out = []
    for row in range(chosen.start, chosen.stop):
        ids = range(row * count, (row + 1) * count)
        out.append(
            model.sample_batch(replace(asked, state=states[row : row + 1].float(), members=ids))
        )
    return torch.stack(out, 1).double()


def acting(model):
    """Names of the trained parts that act."""
    return [part.name for part in model.parts() if part.trained and part.acts]


# ---- what is not Gaussian -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def score():
    return Judged.of(Known("regimes", GRID, SEED), samples=1500, steps=500, residual="score")


@pytest.fixture(scope="module")
def one_pass():
    return Judged.of(Known("regimes", GRID, SEED), samples=1000, steps=250, residual="crps")


def test_a_score_learns_two_regimes(score):
    assert acting(score.model) == ["residual: score"]
    assert score.closed("crps_ratio") > 0.75
    assert score.closed("low_variance") > 0.75
    assert abs(score.rows["model"]["high_variance"] - 1) < 0.1


def test_one_pass_learns_two_regimes(one_pass):
    assert acting(one_pass.model) == ["residual: crps"]
    assert one_pass.closed("crps_ratio") > 0.5
    assert one_pass.closed("low_variance") > 0.3
    assert abs(one_pass.rows["model"]["high_variance"] - 1) < 0.25


def pattern(fields):
    """Amplitude (..., ) of the pattern whose sign is the regime, cos(2 pi x / L)."""
    x = torch.arange(GRID, dtype=torch.float64) * (2 * torch.pi / GRID)
    return (2 * x.cos()[:, None] * fields).mean((-2, -1))


@pytest.mark.parametrize("name, share", [("score", 0.6), ("one_pass", 0.3)])
def test_it_has_both_modes(name, share, request):
    """Distance in law (Wasserstein) of the bimodal amplitude, state by state."""
    judged = request.getfixturevalue(name)
    states, count = judged.known.states("test", STATES), 100
    draw = judged.known.law.sample
    truth, again = (
        pattern(draw(states, members=range(first, first + count), seed=3)).sort(0).values
        for first in (50_000, 60_000)
    )
    apart = {"law": float((again - truth).abs().mean())}
    for method in (None, "mean_gp"):
        own = pattern(drawn(judged.model, states, slice(0, STATES), method, count)).sort(0).values
        apart[method] = float((own - truth).abs().mean())
    closed = 1 - (apart[None] - apart["law"]) / (apart["mean_gp"] - apart["law"])
    assert closed > share


# ---- a variance that follows the flow -----------------------------------------------------------


@pytest.fixture(scope="module")
def amplitude():
    return Judged.of(Known("amplitude", GRID, SEED), samples=800, steps=200, amplitude="fno")


@pytest.fixture(scope="module")
def score_of_amplitude():
    known = Known("amplitude", GRID, SEED)
    return Judged.of(known, samples=1000, steps=300, batch=48, residual="score")


@pytest.mark.parametrize(
    "name, part",
    [("amplitude", "amplitude: fno"), ("score_of_amplitude", "residual: score")],
    ids=["amplitude", "score"],
)
def test_a_variance_that_follows_the_flow_is_learned(name, part, request):
    judged = request.getfixturevalue(name)
    assert acting(judged.model) == [part]
    assert judged.closed("low_variance") > 0.6
    assert judged.closed("high_variance") > 0.6
    assert judged.closed("crps_ratio") > 0.3


# ---- a mean that no term spans ------------------------------------------------------------------


def error_of_the_mean(model, mean_hat, truth, variance):
    """Mean square error of a mean on unseen states, in units of the noise's variance."""
    field = model.band.to_physical(mean_hat, truth.shape[-1])
    return float((field - truth).square().mean()) / variance


@pytest.mark.parametrize(
    "mean, kind, steps, left",
    [
        (one_way_kernel, "fno", 150, 0.15),
        (cubic_drag, "fno", 300, 0.15),
        (cubic_drag, "cnn", 400, 0.25),
    ],
    ids=["kernel", "cubic", "local"],
)
def test_a_mean_outside_the_regression_is_learned(mean, kind, steps, left):
    known = outside(mean, GRID)
    known.seed = SEED
    layers = 2 if mean is cubic_drag else 1
    model = learned(known, samples=800, steps=steps, mean=["regression", kind], mean_layers=layers)
    states = known.states("test", 100)
    truth, frames = known.law.mean(states), model.frames(states)
    closed, both = (
        error_of_the_mean(model, hat, truth, known.law.variance)
        for hat in (model.library(frames), model.encode(frames).mean_hat)
    )
    assert acting(model) == [f"mean: {kind}"]
    assert closed > 1.0  # the regression alone leaves more than the noise
    assert both < left * closed


# ---- memory -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def remembering():
    """Errors of the mean of two models, with the earlier state and without."""
    errors, models = {}, {}
    for history in (0, 1):
        known = Remembering(GRID, history)
        known.seed = SEED
        conditions = {"sensors": "none", "previous_states": history}
        models[history] = model = learned(
            known, samples=600, steps=150, mean=["regression", "fno"], conditions=conditions
        )
        now, before, _ = known.pairs("test", 100)
        frames = model.frames(now, before[:, None] if history else None)
        mean_hat, truth = model.encode(frames).mean_hat, known.law.mean(before)
        errors[history] = error_of_the_mean(model, mean_hat, truth, known.law.variance)
    return models, errors


def test_the_earlier_state_is_made_use_of_where_the_law_has_memory(remembering):
    """By the network: the regression has no term of it."""
    models, errors = remembering
    assert models[1].library.active == []
    assert acting(models[1]) == ["mean: fno"]
    assert errors[0] > 10
    assert errors[1] < 0.2 * errors[0]


CARRIED = 0.8  # of a closure that is left after an interval


def chain(count, times, first=0):
    """States and closures (count, times, n, n): noise of which each call keeps CARRIED."""
    known = Known("diffusion", GRID)
    shape = (count, times, GRID, GRID)
    states = known.states("train", count * times, first)
    fresh = (known.draw(states, first) - known.law.mean(states)).view(shape)
    closures = [fresh[:, 0]]
    for time in range(1, times):
        closures.append(CARRIED * closures[-1] + math.sqrt(1 - CARRIED**2) * fresh[:, time])
    return states.view(shape), torch.stack(closures, 1)


def with_previous(count, times, number, first=0):
    """Batches of a chain with the last ``number`` closures of each state."""
    states, closures = chain(count, times, first)
    members = torch.arange(count)
    return [
        {
            "state": states[:, time].float(),
            "target": closures[:, time].float(),
            "member": members,
            "moment": torch.full((count,), time),
            **({"previous": closures[:, time - number : time].flip(1).float()} if number else {}),
        }
        for time in range(2, times)
    ]


@pytest.mark.parametrize("previous", [0, 1, 2])
def test_what_is_left_of_the_last_closure_is_not_drawn_anew(previous):
    """Given the last closure only the innovation is chance, and calls have the law's memory."""
    config = {**SMALL, **CLOSED, "conditions": {"sensors": "none", "previous_closures": previous}}
    model = build(config, GRID)
    for phase in model.phases:
        model.begin(phase.name, with_previous(100, 12, previous))
    s, kept = model.statistics, model.frame.kept
    chance = kept.variance(s.law_spectrum) / s.target_rms**2
    expected = 1 - CARRIED**2 if previous else 1.0
    assert chance == pytest.approx(expected, abs=0.03)
    assert bool((s.memory_times > 0).any()) == (previous == 0)  # noise with memory in its place
    if not previous:
        return
    states, closures = (part.float() for part in chain(60, 13, 500_000))
    last, made = closures[:, :previous].flip(1), []
    for call in range(10):
        request = Request(states[:, call + 2], range(60), 3, call, previous=last)
        made.append(model.sample_batch(request))
        last = torch.cat([made[-1][:, None], last[:, :-1]], 1)
    made = torch.stack(made, 1).double()
    assert float(made.square().mean().sqrt()) == pytest.approx(s.target_rms, rel=0.05)
    correlation = float((made[:, 1:] * made[:, :-1]).mean() / made.square().mean())
    assert correlation == pytest.approx(CARRIED, abs=0.08)


def test_noise_without_memory_is_white_from_call_to_call():
    config = {**SMALL, **CLOSED, "conditions": {"sensors": "none"}}
    states = chain(60, 13, 500_000)[0].float()
    found = {}
    for memory in ("on", "off"):
        model = build({**config, "noise_memory": memory}, GRID)
        for phase in model.phases:
            model.begin(phase.name, with_previous(100, 12, 0))
        model.adopt(replace(model.statistics, memory_spacing=1.0))
        calls = [model.sample_batch(Request(states[:, 3], range(60), 3, call)) for call in (7, 8)]
        one, other = (
            drawn - model.band.to_physical(model.encode(model.frames(states[:, 3])).mean_hat, GRID)
            for drawn in calls
        )
        found[memory] = float((one * other).mean() / one.square().mean())
    assert found["on"] > 0.4 and abs(found["off"]) < 0.05


def test_without_noise_every_member_has_the_mean():
    config = {**SMALL, **CLOSED, "conditions": {"sensors": "none", "previous_closures": 1}}
    model = build({**config, "residual": "none"}, GRID)
    batches = with_previous(60, 6, 1)
    for phase in model.phases:
        model.begin(phase.name, batches)
    state, last = batches[0]["state"][:1], batches[0]["previous"][:1]
    drawn = model.sample_batch(Request(state, range(3), 3, previous=last))
    mean = model.band.to_physical(model.encode(model.frames(state, None, last)).mean_hat, GRID)
    assert drawn.shape == (3, GRID, GRID)
    assert torch.allclose(drawn, mean.to(drawn).expand(3, -1, -1), atol=1e-5)
    assert [part.name for part in model.parts()] == ["mean: regression"]
    with pytest.raises(ValueError, match="set model.conditions.sensors to none"):
        build({**SMALL, **CLOSED, "residual": "none", "conditions": {"sensors": "optional"}}, GRID)


def test_a_closure_that_is_read_again_stays_within_what_the_training_saw():
    config = {**SMALL, **CLOSED, "conditions": {"sensors": "none", "previous_closures": 1}}
    model = build(config, GRID)
    batches = with_previous(60, 6, 1)
    for phase in model.phases:
        model.begin(phase.name, batches)
    b, request = model.band, Request(batches[0]["state"], range(60), 3)
    seen = [
        b.grid.shell_sum(b.to_spectral(one["target"].double()).abs().square()) for one in batches
    ]
    largest = torch.cat(seen).amax(0)

    def shells(times):
        last = replace(request, previous=times * batches[0]["previous"])
        drawn = model.sample_batch(last).double()
        return b.grid.shell_sum(b.to_spectral(drawn).abs().square())

    mean = torch.cat(seen).mean(0)
    assert (shells(50.0) < 1.001 * largest + 1e-8 * largest.sum()).all()
    assert model.num_rescaled == 60
    # at its edge a memory that feeds itself would stay: it goes back to the mean
    assert torch.allclose(shells(50.0)[:, 1:7], mean[1:7].expand(60, -1), rtol=1e-4)
    before = model.num_rescaled
    assert (shells(1.0)[:, 1:] < 1.001 * largest[1:]).all()
    assert model.num_rescaled - before < 20  # few of its own range


def test_a_mean_given_the_last_closures_stays_within_what_unseen_members_showed():
    """What it reads and answers, point by point, is no larger than when it was judged."""
    config = {
        "preset": "convolutional",
        "width": 4,
        "mean_layers": 2,
        "conditions": {"sensors": "none", "previous_closures": 1},
    }
    model = build(config, GRID)
    batches = with_previous(60, 6, 1)
    model.begin("mean", batches)
    torch.nn.init.normal_(model.mean.network.head.weight)
    model.begin("law", batches)
    frames = model.frames(batches[0]["state"], previous=batches[0]["previous"])
    farthest, seen = model.statistics.mean_largest, model.statistics.features_largest
    given, read = {}, {}
    for times in (1.0, 1e3):
        encoding = model.encode(times * frames)
        read[times] = encoding.features.abs().amax((0, 2, 3))[: len(seen)].double()
        given[times] = float(model.mean.field(encoding).abs().max())
    assert 0.3 * farthest < given[1.0] < 1.0001 * farthest
    assert given[1e3] < 1.0001 * farthest
    assert (read[1.0] < 1.0001 * seen).all()
    assert torch.allclose(read[1e3], seen, rtol=1e-4)  # all at their ends


def test_the_networks_see_the_last_closures():
    """And what the flow makes of the last one, each about one in size."""
    config = {**SMALL, **CLOSED, "conditions": {"sensors": "none", "previous_closures": 2}}
    model = build({**config, "residual": "score"}, GRID)
    batches = with_previous(60, 6, 2)
    for phase in model.phases:
        model.begin(phase.name, batches)
    state, last = batches[0]["state"], batches[0]["previous"]
    fields = model.encode(model.frames(state, None, last)).features[:, 5:8]
    assert torch.allclose(fields.square().mean((0, 2, 3)).sqrt(), torch.ones(3), atol=0.15)
    for channel in range(2):
        truth = model.band.to_physical(model.band.to_spectral(last[:, channel]), fields.shape[-1])
        both = torch.stack([fields[:, channel].flatten(), truth.flatten()])
        assert float(torch.corrcoef(both)[0, 1]) > 0.999
    assert not torch.allclose(fields[:, 2], fields[:, 0], atol=0.1)


# ---- learned sensors ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned_sensors():
    """A model; error of its ensemble mean and its variance, by sensors a side, over the law's."""
    known = Known("regimes", GRID, SEED)
    model = learned(
        known,
        samples=1000,
        steps=300,
        residual="score",
        sensors="learned",
        method="gaussian",
        conditions={"sensors": "optional"},
    )
    states = known.states("test", STATES)
    truth = known.draw(states, 9_000_000)
    variance = float((truth - known.law.mean(states)).square().mean())
    found = {}
    for side in (0, 4, 8):
        sensors = read_regular(truth.float(), side) if side else None
        ensemble = torch.stack(
            [
                model.sample_batch(
                    Request(states.float(), range(100 * i, 100 * i + STATES), 1, sensors=sensors)
                )
                for i in range(16)
            ]
        )
        error = (ensemble.mean(0) - truth).square().mean()
        found[side] = float(error) / variance, float(ensemble.var(0).mean()) / variance
    return model, found


def test_sensors_that_are_learned_tell_where_the_truth_is(learned_sensors):
    model, found = learned_sensors
    assert acting(model) == ["sensors: learned", "residual: score"]
    (none, _), (few, _), (many, _) = found.values()
    assert 0.9 < none < 1.5
    assert few < 0.5 * none
    assert many < 0.08 * none


def test_it_spreads_with_sensors_and_without(learned_sensors):
    """So briefly trained it is too sure with sensors, by less than a factor of 2.5."""
    _, found = learned_sensors
    for side, least in ((0, 0.6), (4, 0.16)):
        error, variance = found[side]
        assert least < variance / error < 1.6


# ---- nothing to learn ---------------------------------------------------------------------------


@pytest.mark.parametrize("residual, steps", [("score", 300), ("crps", 200)], ids=["score", "crps"])
def test_what_learned_noise_by_heart_does_not_act(residual, steps):
    """A Gaussian law and 32 states of it: all parts overfit, and without the gate it is seen."""
    rows = {}
    parts = {"mean": ["regression", "fno"], "amplitude": "fno", "residual": residual}
    for gate in ("off", "on"):
        known = Known("diffusion", GRID, SEED)
        judged = Judged.of(known, samples=32, steps=steps, batch=16, validate_parts=gate, **parts)
        rows[gate] = judged.rows["model"]["crps_ratio"] - judged.rows["mean_gp"]["crps_ratio"]
    assert rows["off"] > 0.015
    assert rows["on"] < 0.005


# ---- what the networks see ----------------------------------------------------------------------


def prepared(batches, **config):
    """A model with its closed-form statistics and untrained networks, and one of its batches."""
    model = build({**SMALL, **CLOSED, **config}, GRID)
    for phase in model.phases:
        model.begin(phase.name, batches)
    state, target = batches[0]
    return model, {"state": state, "target": target, "sample_index": torch.arange(len(state))}


def test_what_a_network_sees_is_in_units_of_its_spread():
    """Features, largest scales and noisy residual: each is there, and about one in size."""
    model, batch = prepared(Known("regimes", GRID).batches("train", 100), residual="score")
    network, seen = model.residual.network, {}
    encode, forward = network.encode, network.forward

    def watched_encode(fields, summary):
        seen.update(fields=fields, summary=summary)
        return encode(fields, summary)

    def watched_forward(noisy, largest, angle, encoded):
        seen.update(noisy=noisy, angle=angle)
        return forward(noisy, largest, angle, encoded)

    network.encode, network.forward = watched_encode, watched_forward
    model.resume("generator")
    model.loss(batch, 0, 0)
    for channel in range(5):
        assert float(seen["fields"][:, channel].square().mean().sqrt()) == pytest.approx(
            1, abs=0.1
        )
    varying = model.band.summary(model.frames(batch["state"])[:, 0]).std(0) > 1e-6
    assert int(varying.sum()) == 49  # all but the mean, twice
    assert torch.allclose(seen["summary"].mean(0)[varying], torch.zeros(49), atol=1e-3)
    assert torch.allclose(seen["summary"].std(0)[varying], torch.ones(49), atol=1e-3)
    for channel in range(2):
        assert float(seen["noisy"][:, channel].square().mean().sqrt()) == pytest.approx(1, abs=0.2)
    # noise levels from none to all
    assert float(seen["angle"].min()) < 0.1 and float(seen["angle"].max()) > 1.5


def test_exact_sensors_leave_nothing_of_the_truth_that_is_learned():
    """In training each state is conditioned on its own readings."""
    known = Known("diffusion", GRID)
    sensors = {"conditions": {"sensors": "required"}}
    model, batch = prepared(known.batches("train", 100), residual="score", **sensors)
    given = {}
    loss = model.residual.loss

    def watched(frame, posterior, x0, z, uniform):
        given.update(gains=posterior.gains, x0=x0)
        return loss(frame, posterior, x0, z, uniform)

    model.residual.loss = watched
    model.resume("generator")
    model.loss(batch, 0, 0)
    exact = [(rows, gain) for rows, gain in given["gains"] if float(gain.error.max()) < 1e-12]
    assert exact
    for rows, gain in exact:
        left = gain.at_sensors(given["x0"][rows])
        assert float(left.abs().max()) < 1e-3 * math.sqrt(known.law.variance)


class Damped(Score):
    """Draws with four fifths of the spread that they should have."""

    def draw(self, frame, given, z, shells, effort):
        return Drawn(0.8 * z)


def test_spread_that_is_missing_on_unseen_members_is_made_up():
    batches = Known("diffusion", GRID).batches("train", 200)
    model, _ = prepared(batches, residual="score", validate_parts="off")
    model.residual.__class__ = Damped
    model.begin("check", batches)
    states = Known("diffusion", GRID).states("test", 4)
    own, other = (
        drawn(model, states, slice(0, 4), method).var(0).mean() for method in (None, "heun")
    )
    law = drawn(model, states, slice(0, 4), "mean_gp").var(0).mean()
    assert float((own / law).sqrt()) == pytest.approx(1, abs=0.03)
    # it was measured with the model's own sampler
    assert float((other / law).sqrt()) == pytest.approx(0.8, abs=0.03)


# ---- who sees what ------------------------------------------------------------------------------


def test_the_law_is_judged_on_members_that_the_mean_has_not_seen(monkeypatch):
    seen = {}
    begin, loss = CompositeClosure.begin, CompositeClosure.loss_per_sample

    def watched_begin(model, phase, reader):
        members = [batch["member"] for batch in reader]
        seen.setdefault(phase, set()).update(torch.cat(members).tolist())
        return begin(model, phase, reader)

    def watched_loss(model, batch, seed, step):
        if model.training:
            seen.setdefault(f"{model.phase.name} loss", set()).update(batch["member"].tolist())
        return loss(model, batch, seed, step)

    monkeypatch.setattr(CompositeClosure, "begin", watched_begin)
    monkeypatch.setattr(CompositeClosure, "loss_per_sample", watched_loss)
    both = {"mean": ["regression", "fno"], "residual": "score"}
    learned(Known("diffusion", GRID), samples=20, steps=40, batch=8, **both)
    # members of the validation set have numbers of their own
    assert len(seen["mean"]) == len(seen["generator"]) == 20
    assert not seen["mean"] & seen["generator"]
    assert seen["mean loss"] == seen["mean"]
    assert seen["generator loss"] == seen["generator"]


def by_member(members, times=20):
    """Batches of a law with many snapshots of few members."""
    pairs = Known("diffusion", GRID).batches("train", members * times)
    state, target = (torch.cat(parts) for parts in zip(*pairs))
    names = torch.arange(members).repeat_interleave(times)
    batch = {"state": state, "target": target, "member": names}
    return [{**batch, "moment": torch.arange(times).repeat(members)}]


@pytest.mark.parametrize("residual", ["score", "crps"])
def test_few_members_decide_nothing_however_many_snapshots(residual):
    parts = {"mean": ["regression", "fno"], "amplitude": "fno", "residual": residual}
    model = build({**SMALL, **parts}, GRID)
    for phase in model.phases:
        model.begin(phase.name, by_member(5))
    notes = {part.name: part.note for part in model.parts() if part.trained}
    few = "judged on 5 members, needs 8"
    assert notes == {"mean: fno": few, "amplitude: fno": few, f"residual: {residual}": few}


# ---- averaged weights ---------------------------------------------------------------------------


def test_the_average_forgets_the_start_and_then_decays_as_asked():
    average = Average({"w": torch.zeros(1)}, decay=0.9)
    expected = 0.0
    for step in range(1, 200):
        average.update({"w": torch.tensor([float(step)])}, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert float(average.tensors["w"]) == pytest.approx(expected, rel=1e-4)
    latest = Average({"w": torch.zeros(1)}, decay=0.0)
    latest.update({"w": torch.ones(1)}, 1)
    assert float(latest.tensors["w"]) == 1.0


def test_the_averaged_weights_are_the_ones_exported(tmp_path, monkeypatch):
    averages, latest = [], {}

    class Watched(Average):
        def __init__(self, weights, decay):
            super().__init__(weights, decay)
            averages.append(self)

        def update(self, weights, step):
            super().update(weights, step)
            latest.update({key: value.detach().clone() for key, value in weights.items()})

    monkeypatch.setattr(trainer, "Average", Watched)
    known, exported = Known("diffusion", GRID), []
    model = build({**SMALL, **CLOSED, "mean": ["fno"]}, GRID)
    settings = Train(steps=30, batch=8, lr=2e-3, engine="torch", schedule="constant")
    plan = trainer.Plan(settings, 0, Run(tmp_path))
    trainer.fit(model, known.data(20), plan, lambda model, path: exported.append(model))
    weights, (average,) = exported[0].state_dict(), averages
    for key, value in average.tensors.items():
        assert torch.equal(weights[key], value)
    assert any(not torch.allclose(weights[key], latest[key], rtol=1e-3) for key in latest)
