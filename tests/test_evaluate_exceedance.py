"""Exceedance probabilities: intervals that cover, sizes that suffice."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hpc_closure.evaluate.rows import find, frame
from hpc_closure.evaluate.scores.coupled.exceedance import (
    OBSERVABLES,
    event_records,
    members_needed,
    wilson,
)


def test_wilson_against_published_values():
    share, low, high = wilson(8, 10)
    assert share == 0.8
    assert (low, high) == (pytest.approx(0.4901625, abs=1e-6), pytest.approx(0.9433178, abs=1e-6))
    assert wilson(0, 20)[1] == 0.0 and wilson(20, 20)[2] == 1.0


def test_the_interval_covers_at_its_level():
    rng = np.random.default_rng(0)
    hits = rng.binomial(50, 0.2, 2000)
    covered = np.mean([wilson(int(h), 50)[1] <= 0.2 <= wilson(int(h), 50)[2] for h in hits])
    assert 0.92 < covered < 0.98


def test_the_size_asked_for_gives_the_tolerance():
    assert members_needed(0.3, 0.7, 0.05) == 385
    size = members_needed(0.05, 0.15, 0.02)
    _, low, high = wilson(round(0.15 * size), size)
    assert (high - low) / 2 == pytest.approx(0.02, rel=0.02)


def test_observables_of_a_sine():
    x = torch.arange(32, dtype=torch.float64) / 32
    field = torch.sin(2 * torch.pi * x)[:, None].expand(1, 1, 32, 32)
    assert float(OBSERVABLES["enstrophy"](field)) == pytest.approx(0.25)
    assert float(OBSERVABLES["peak"](field)) == pytest.approx(1.0)
    assert float(OBSERVABLES["large_scale"](field)) == pytest.approx(1.0)


def test_rows_of_an_event():
    event = SimpleNamespace(observable="peak", threshold=1.5, lead_time=2.0, tolerance=0.05)
    fields = torch.zeros(4, 1, 8, 8)
    fields[0] += 2.0
    labels = {"stage": "coupled", "closure": "diffusion"}
    rows = frame(event_records({"model": fields}, event, labels))
    row = find(rows, method="model", score="probability")
    assert row.value == 0.25 and row.low < 0.25 < row.high
    assert find(rows, score="members_needed").value > 300
