"""The mean of a generator's draws: learned from draws alone, taken out, judged on other states."""

from dataclasses import replace

import pytest
import torch

from hpc_closure.bench.model.known import Known, fit
from hpc_closure.closure.composed import centre
from hpc_closure.closure.composed.generators import Drawn
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fitting.phases import draw_pairs
from hpc_closure.closure.model import Request

GRID, SEEN, UNSEEN = 16, 1500, 300
SMALL = {
    "width": 8,
    "modes": 4,
    "layers": 1,
    "mean_layers": 1,
    "amplitude": "none",
    "conditions": {"sensors": "none"},
}
ERROR = 0.3  # of the mean of draws, in standard deviations of a mode


def test_weights_tell_means_of_numbers_that_they_have_not_seen():
    generator = torch.Generator().manual_seed(0)

    def states(count):
        numbers = torch.randn(count, 51, generator=generator, dtype=torch.float64)
        return numbers, torch.tanh(numbers[:, :25] + numbers[:, 25:50])

    numbers, means = states(8000)
    weights = centre.fit(numbers, 1e-3 * (means + 0.3 * torch.randn(means.shape)))
    numbers, means = states(1000)
    error = centre.mean_of(weights, numbers) / 1e-3 - means
    assert float(error.square().mean() / means.square().mean()) < 0.4
    assert centre.mean_of([one.float() for one in weights], numbers.float()).dtype == torch.float32


def wrong(model):
    """Have the generator draw its base noise about a mean that follows the state."""

    def draw(frame, conditions, z, shells, effort):
        sized = ERROR * torch.tanh(conditions.summary[:, [7]].double())
        one = frame.kept.place_largest(sized.expand(-1, 25))
        off = (one * frame.law.modes("colour", z.real)).repeat_interleave(len(z) // len(one), 0)
        return Drawn(z + off)

    model.residual.draw = draw
    ones = torch.ones(model.frame.kept.grid.num_shells, dtype=torch.float64)
    model.statistics = replace(model.statistics, score_gain=ones, score_spread=ones)
    return model


def made(mean):
    known = Known("diffusion", GRID)
    model = fit(known, samples=400, steps=0, config={**SMALL, "mean": mean})
    return known, wrong(model)


def mean_of_draws(model, known, count=64):
    """Share of the law's variance that the square of the mean of draws has, without chance."""
    states = known.states("test", 60)
    halves = []
    for half in range(2):
        drawn = [
            model.sample_batch(
                Request(states, range(10_000 * half + 100 * i, 10_000 * half + 100 * i + 60), 1)
            )
            for i in range(count // 2)
        ]
        halves.append(torch.stack(drawn).mean(0) - known.law.mean(states))
    return float((halves[0] * halves[1]).mean() / known.law.variance)


@pytest.fixture(scope="module")
def centred():
    known, model = made(["regression", "numbers"])
    before = mean_of_draws(model, known)
    model.begin("centre", known.batches("train", SEEN))
    report = model.begin("centred", known.batches("valid", UNSEEN))
    return known, model, before, report


def test_the_mean_of_draws_is_taken_out(centred):
    known, model, before, report = centred
    assert report["acts"] and model.statistics.centre_members == UNSEEN
    assert "residual: centred" in [part.name for part in model.parts() if part.acts]
    assert before > 0.01
    assert abs(mean_of_draws(model, known)) < 0.2 * before


def test_spread_is_as_before(centred):
    """The mean was a part of the variance that the spread had been made for."""
    _, model, _, _ = centred
    factor = model.statistics.score_spread
    assert 1.01 < float(factor[1]) < 1.2


def test_a_baseline_has_no_generator_and_no_mean_of_one(centred):
    known, model, _, _ = centred
    states = known.states("test", 4)
    request = Request(states, range(4), 1, method="mean_gp")
    plain = model.sample_batch(request)
    kept = model.statistics
    model.statistics = replace(kept, centre_inner=None)
    assert torch.equal(plain, model.sample_batch(request))
    model.statistics = kept


def test_a_mean_that_unseen_members_do_not_show_is_not_taken_out(centred):
    known, model, _, _ = centred
    kept = model.statistics
    model.statistics = replace(kept, centre_outer=-kept.centre_outer)
    report = model.begin("centred", known.batches("valid", UNSEEN))
    assert not report["acts"] and model.centre_weights is None
    model.statistics = kept


def test_closures_that_have_that_mean_keep_it():
    """Draws about the truth's mean must not lose it, though it is not zero."""
    known, model = made(["regression", "numbers"])
    model.begin("centre", known.batches("train", SEEN))
    batches = []
    for state, target in known.batches("valid", UNSEEN):
        encoding = model.encode(model.frames(state.double()))
        off = ERROR * torch.tanh(encoding.summary[:, [7]].double())
        one = model.frame.kept.place_largest(off.expand(-1, 25))
        one = one * model.frame.law.modes("colour", one.real)
        field = model.frame.kept.to_physical(one, GRID)
        batches.append((state, target + field.float()))
    report = model.begin("centred", batches)
    assert not report["acts"] and model.centre_weights is None


def test_a_generator_that_alone_knows_the_mean_keeps_it():
    known, model = made(["regression"])
    assert model.begin("centre", known.batches("train", 200)) == {}
    assert model.begin("centred", known.batches("valid", 50)) == {}
    assert model.centre_weights is None


def test_pairs_are_of_opposite_noise(centred):
    """Else their means would vary as half a draw does, and tell an eighth as much."""
    known, model, _, _ = centred
    encoding = model.encode(model.frames(known.states("test", 3)))
    drawn = draw_pairs(model, encoding, range(3), 5, 7)
    assert drawn.shape[:3] == (3, 2, 5)
    means = drawn.mean(1)
    assert torch.allclose(means, means[:, :1].expand_as(means), atol=1e-6)
    keys = keyed_noise.Key(0, "x", range(3), 0)
    assert len(model.base_noise(model.frame.law, keys, keyed_noise.STREAM_BASE)) == 3
