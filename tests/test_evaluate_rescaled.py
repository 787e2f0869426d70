"""Rows on rescaled draws: shares of the draws up to each lead time."""

import numpy as np
import pytest
import torch

from hpc_closure.evaluate.report.summary import headline
from hpc_closure.evaluate.rows import find, frame
from hpc_closure.evaluate.scores.coupled.rescaled import records, shares
from hpc_closure.evaluate.scores.table import Labels


def counts_of(lead):
    """(2 members, 4 starts, 2 + 3 shells) after ``lead`` calls: shell 2 of one row at each."""
    counts = np.zeros((2, 4, 5))
    counts[..., 0] = lead
    counts[1, 2, [1, 4]] = lead
    return counts


def test_shares_are_of_all_draws_up_to_the_lead_by_shell():
    found = {row["shell"]: row for row in shares(counts_of(10))}
    assert set(found) == {None, 1, 2}  # the mean of a field, shell 0, is none
    assert found[None]["value"] == pytest.approx(1 / 8)
    assert found[1]["value"] == 0
    assert found[2]["value"] == pytest.approx(1 / 8)
    assert found[None]["low"] < 1 / 8 < found[None]["high"]  # over starts
    assert not list(shares(np.zeros((2, 4, 5))))


def test_rows_of_every_lead_stand_beside_what_is_expected():
    expected = torch.tensor([0.04, 0.0, 0.01, 0.03])
    rows = list(records({"model": [counts_of(2), counts_of(4)]}, {"model": expected}, [0.1, 0.2]))
    table = frame({"method": method, **columns} for method, columns in rows)
    for lead in (0.1, 0.2):
        row = find(table, score="rescaled_share", lead_time=lead, shell=None)
        assert row.value == pytest.approx(1 / 8)
    there = find(table, score="rescaled_share_expected", shell=None)
    assert there.value == pytest.approx(0.04)
    assert find(table, score="rescaled_share_expected", shell=2).value == pytest.approx(0.03)
    assert not list(records({}, {"model": expected}, [0.1]))


def lines(share, expected=0.03):
    labels = Labels({"closure": "subgrid", "sensors": "none", "interval": 25})
    own = {"stage": "coupled", "grid": 32, **labels.of("model")}
    rows = [
        {**own, "score": "rescaled_share", "lead_time": 0.1, "value": 0.5},
        {**own, "score": "rescaled_share", "lead_time": 10.0, "value": share},
    ]
    if expected is not None:
        rows.append({**own, "score": "rescaled_share_expected", "value": expected})
    return headline([], frame(rows))


def test_the_first_lines_say_it_where_it_is_more_than_one_in_a_hundred():
    (line,) = [line for line in lines(0.31) if "were rescaled" in line]
    assert "31\u00a0% of the draws up to lead time 10" in line
    assert "of the DNS's own closures 3\u00a0% would be" in line
    assert not [line for line in lines(0.01) if "were rescaled" in line]
    (line,) = [line for line in lines(0.02, None) if "were rescaled" in line]
    assert "DNS" not in line
