"""Paired differences: start by start they tell apart what two intervals of their own cannot."""

import math

import pytest
import torch

from hpc_closure.evaluate.report.page import Report
from hpc_closure.evaluate.rows import find, select
from hpc_closure.evaluate.scores.intervals import interval_columns
from hpc_closure.evaluate.scores.paired import (
    ALIKE,
    BETTER,
    WORSE,
    difference,
    differences,
    verdict,
)
from hpc_closure.evaluate.scores.table import Labels
from hpc_closure.evaluate.stages.coupled import score_coupled

STARTS = torch.arange(30)


def hard_and_easy(factor, seed=0, own=0.01):
    """Scores of two methods: starts differ much, the methods by a factor and a little chance."""
    generator = torch.Generator().manual_seed(seed)
    hard = (0.6 * torch.randn(30, generator=generator, dtype=torch.float64)).exp()
    chance = (own * torch.randn(2, 30, generator=generator, dtype=torch.float64)).exp()
    return factor * hard * chance[0], hard * chance[1]


def test_a_small_difference_is_told_apart_where_two_intervals_are_not():
    one, other = hard_and_easy(1.02)
    ends = [interval_columns({"x": x}, STARTS, lambda means: means["x"]) for x in (one, other)]
    assert ends[0]["low"] < ends[1]["high"] and ends[1]["low"] < ends[0]["high"]
    found = difference(one, other, STARTS)
    assert found["value"] == pytest.approx(float(one.mean() / other.mean()) - 1, rel=1e-12)
    assert 0.005 < found["low"] < 0.02 < found["high"] < 0.03
    assert verdict(found["low"], found["high"]) == WORSE


def test_the_other_way_round_it_is_better():
    other, one = hard_and_easy(1.02)
    found = difference(one, other, STARTS)
    assert found["value"] < 0 and verdict(found["low"], found["high"]) == BETTER


def test_equal_methods_are_told_apart_in_one_of_twenty_cases():
    """An interval on the logarithm of a difference that happens to be positive never would."""
    wrong = 0
    for seed in range(400):
        found = difference(*hard_and_easy(1.0, seed, own=0.05), STARTS)
        wrong += verdict(found["low"], found["high"]) != ALIKE
    assert 0.02 < wrong / 400 < 0.09


def test_few_starts_tell_nothing():
    one, other = hard_and_easy(1.5)
    found = difference(one[:3], other[:3], STARTS[:3])
    assert math.isnan(found["low"]) and verdict(found["low"], found["high"]) == ALIKE
    assert verdict(-0.01, 0.01) == ALIKE and verdict(0.0, 0.01) == ALIKE


def test_lost_members_are_worse_and_a_lost_reference_tells_nothing():
    one, other = hard_and_easy(1.0)
    lost = torch.where(STARTS == 3, torch.inf, one)
    found = dict(differences("s", {"model": other, "lost": lost}, "model", STARTS))
    assert math.isinf(found["lost"]["low"]) and verdict(math.inf, math.inf) == WORSE
    assert not dict(differences("s", {"model": lost, "one": one}, "model", STARTS))
    assert not dict(differences("s", {"one": one, "other": other}, "model", STARTS))


def test_a_reference_of_several_trainings_is_their_mean():
    one, other = hard_and_easy(1.02)
    values = {"model": one, "x#1": 0.9 * other, "x#2": 1.1 * other, "xy": one}
    found = dict(differences("s", values, "x", STARTS))
    assert set(found) == {"model", "xy"}
    assert found["model"]["value"] == pytest.approx(difference(one, other, STARTS)["value"])


@pytest.fixture(scope="module")
def scored():
    """A model, one whose members are farther from the truth by 5 %, and one that is as good."""
    generator = torch.Generator().manual_seed(0)

    def fields(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sizes = (0.4 * fields(20, 1, 1, 1)).exp()
    truth = sizes * fields(20, 2, 12, 12)
    noise = sizes * fields(8, 20, 2, 12, 12)
    again = sizes * fields(8, 20, 2, 12, 12)
    ensembles = {"model": truth + noise, "far": truth + 1.05 * noise, "alike": truth + again}
    shared = {"closure": "subgrid", "sensors": "none", "interval": 5}
    return {
        against: score_coupled(truth, ensembles, [1.0, 2.0], Labels(shared, {}, against)).rows
        for against in ("model", "far")
    }


def test_every_method_is_compared_with_the_reference(scored):
    rows = select(scored["model"], shell=None)
    for score, leads in (
        ("crps_difference", (1.0, 2.0)),
        ("energy_score_joint_difference", (None,)),
    ):
        part = select(rows, score=score)
        assert set(part["method"]) == {"far", "alike"}
        for lead in leads:
            row = find(part, method="far", lead_time=lead)
            assert row.value == pytest.approx(0.05, abs=0.005) and row.low > 0
            same = find(part, method="alike", lead_time=lead)
            assert same.low < 0 < same.high
            plain = score.removesuffix("_difference")
            own, reference = (
                find(rows, method=name, score=plain, lead_time=lead).value
                for name in ("far", "model")
            )
            assert row.value == pytest.approx(own / reference - 1, rel=1e-9)


def test_another_reference_turns_the_sign(scored):
    part = select(scored["far"], score="crps_difference", lead_time=1.0)
    assert set(part["method"]) == {"model", "alike"}
    assert find(part, method="model").high < 0


def test_the_report_says_it_in_words(scored, tmp_path):
    Report("t", scored["model"], against="model").write(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    caption = "CRPS, difference to model, start by start, by lead time: negative is better"
    table = page[page.index(caption) :]
    table = table[: table.index("</table>")]
    lines = {line.split("</th>")[0]: line for line in table.split('scope="row">')[1:]}
    assert set(lines) == {"far", "alike"}
    assert lines["far"].count("%, worse<small>+") == 2
    assert lines["alike"].count("%, indistinguishable<small>") == 2
    Report("t", scored["far"], against="far").write(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "Difference to far, start by start, of whole trajectories" in page
    assert "%, better<small>-" in page
