"""Return times of extremes, on events that begin at a known rate."""

import math

import pytest
import torch

from hpc_closure.evaluate.scores.coupled.returns import ReturnTimes

SIDE, LENGTH = 8, 600
TIMES = 0.5 * torch.arange(LENGTH + 1).double()


def fields_of(members, cases, seed, held=1, share=1.0):
    """Fields (L, members, cases, n, n), new at random every ``held`` times, else zero."""
    generator = torch.Generator().manual_seed(seed)
    number = LENGTH // held + 1
    drawn = torch.rand(number, members, cases, 2, 2, generator=generator)
    drawn *= torch.rand(drawn.shape, generator=generator) < share
    fields = torch.zeros(number, members, cases, SIDE, SIDE)
    fields[..., 1::4, 2::4] = drawn  # one point of each patch
    return fields.repeat_interleave(held, 0)[: LENGTH + 1]


def measured(truth, **ensembles):
    returns = ReturnTimes(truth[:, 0].transpose(0, 1), TIMES)
    for number in range(len(TIMES)):
        for method, fields in ensembles.items():
            returns.add(method, fields[number])
    return {(method, row["score"]): row for method, row in returns.records()}


@pytest.mark.parametrize("held", [1, 3])
def test_the_return_time_is_one_over_the_rate_of_beginnings(held):
    """Of values that are new every ``held`` intervals a share p (1 - p) rises above a level."""
    ensembles = {"model": fields_of(8, 6, 2, held), "oracle": fields_of(8, 6, 3, held)}
    rows = measured(fields_of(1, 6, 1, held), **ensembles)
    for name, p, tolerance in (("99", 0.01, 0.15), ("999", 0.001, 0.6)):
        row = rows["model", f"return_time_{name}"]
        assert row["value"] == pytest.approx(0.5 * held / (p * (1 - p)), rel=tolerance)
        assert row["low"] < row["value"] < row["high"]
    assert rows["model", "return_time_99_ratio"]["value"] == pytest.approx(1, abs=0.15)
    assert ("oracle", "return_time_99_ratio") not in rows


def test_half_as_many_events_have_twice_the_return_time():
    ensembles = {"model": fields_of(8, 6, 2, share=0.5), "oracle": fields_of(8, 6, 3)}
    row = measured(fields_of(1, 6, 1), **ensembles)["model", "return_time_99_ratio"]
    assert row["value"] == pytest.approx(2, rel=0.2) and row["low"] > 1.5


def test_without_an_event_it_is_infinite_and_of_a_lost_member_unknown():
    truth = fields_of(1, 4, 1)
    lost = truth.clone()
    lost[3:, 0, 0] = math.nan
    rows = measured(truth, none=torch.zeros_like(truth), model=lost)
    assert rows["none", "return_time_99"]["value"] == math.inf
    assert math.isnan(rows["model", "return_time_99"]["value"])
