"""Several trainings of one closure: one row with their mean and range, and the seed of each."""

import math

import numpy as np
import pytest
import torch
from conftest import TINY, four_verbs
from pandas import isna
from test_evaluate_methods import written

import hpc_closure
from hpc_closure.evaluate import compare
from hpc_closure.evaluate import verb as evaluate
from hpc_closure.evaluate.report.page import Report
from hpc_closure.evaluate.rows import Absent, find, frame, select
from hpc_closure.evaluate.scores.table import Scored
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.rollout import verb as rollout
from hpc_closure.train import verb as train
from hpc_closure.work.options import Options

QUIET = Options(verbosity=-1)
OWN = ["model.validate_parts=off"]
ROW = "evaluate.seeds={drawn: [one, two, three]}"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A run, and three trainings on its data: with its own seed, and two others."""
    folder = tmp_path_factory.mktemp("seeds")
    # two members decide nothing, so the networks act anyway
    four_verbs(folder, TINY, OWN)
    path = folder / "experiment.yaml"
    for name, seed in (("one", []), ("two", ["train.seed=1"]), ("three", ["train.seed=2"])):
        experiment = reading.load(path, [f"name={name}", "use.data=tiny", *OWN, *seed])
        for verb in (train, rollout):
            assert verb.run(experiment, QUIET) == 0
    return path


def weights(path, name):
    run = Run.of(reading.load(path, [f"name={name}", *OWN]))
    return hpc_closure.load(run.model).model.state_dict()


def test_the_seed_of_the_training_is_that_of_the_data_by_default(path):
    own, one, two, three = (weights(path, name) for name in ("tiny", "one", "two", "three"))
    assert all(torch.equal(own[key], one[key]) for key in own)
    learned = [key for key in own if own[key].is_floating_point() and own[key].numel() > 100]
    for left, right in ((one, two), (two, three)):
        assert any(not torch.equal(left[key], right[key]) for key in learned)


def test_the_hash_knows_the_seed_where_it_is_another(path):
    plain = reading.load(path)
    same, other = (
        reading.load(path, [f"train.seed={seed}"]) for seed in (plain.seed, plain.seed + 1)
    )
    assert plain.stage_settings("train") == same.stage_settings("train")
    assert "seed" not in plain.stage_settings("train")["train"]
    assert plain.stage_hash("train") != other.stage_hash("train")
    assert plain.stage_hash("generate") == other.stage_hash("generate")


@pytest.fixture(scope="module")
def table(path):
    experiment = reading.load(path, [ROW, *OWN])
    assert evaluate.run(experiment, QUIET) == 0
    return written(experiment)[0]


def test_one_row_has_the_mean_and_the_range_of_the_trainings(table):
    for stage, lead, score in (
        ("generated", None, "crps"),
        ("coupled", 0.2, "crps"),
        ("coupled", 0.2, "spread_ratio"),
        ("coupled", None, "energy_score_joint"),
    ):
        rows = select(table, stage=stage, sensors="none", shell=None, score=score, lead_time=lead)
        each = [find(rows, method=f"drawn#{number}").value for number in (1, 2, 3)]
        row = find(rows, method="drawn")
        assert (row.low, row.high) == (min(each), max(each)) and row.low < row.high
        assert row.value == pytest.approx(np.mean(each), rel=1e-12) and row.seeds == 3
        first = find(rows, method="drawn#1")
        assert first.value == pytest.approx(find(rows, method="model").value, rel=1e-6)
        assert isna(first.seeds)


def test_the_report_shows_one_line_for_all(path, table):
    page = Run.of(reading.load(path)).report.read_text()
    assert '<th scope="row">drawn</th>' in page and 'row">drawn#' not in page
    assert "mean over 3 trainings that differ only in their seed" in page


@pytest.mark.parametrize(
    "changes, message",
    [
        ("{drawn: [one, tiny]}", "one and tiny both have train.seed=.*: they are one training"),
        ("{drawn: [one, wide]}", "one has train.lr=0.001, wide has 0.01; the runs of one row"),
        ("{drawn: [one, FILE]}", "model.safetensors: no run that trained a model of its own"),
        ("{drawn: [one, four]}", "drawn=four: no run, file or shipped model of this name"),
    ],
)
def test_runs_that_differ_in_more_are_one_clear_line(path, changes, message):
    changes = changes.replace("FILE", str(Run.of(reading.load(path)).model))
    wide = reading.load(
        path, ["name=wide", "use.data=tiny", "train.seed=3", "train.lr=0.01", *OWN]
    )
    assert train.run(wide, QUIET) == 0
    with pytest.raises(ValueError, match=message):
        evaluate.run(reading.load(path, [f"evaluate.seeds={changes}", *OWN]), QUIET)


@pytest.mark.parametrize(
    "change, message",
    [
        ("evaluate.seeds={none: [a, b]}", "none is the name of a built-in method"),
        ("evaluate.seeds={drawn: [a]}", "evaluate.seeds.drawn"),
        (
            "evaluate.against=drawn",
            "against=drawn is no method of the tables; expected one of model",
        ),
    ],
)
def test_settings_that_cannot_be_are_one_clear_line(path, change, message):
    with pytest.raises(ValueError, match=message):
        reading.load(path, [change])
    both = ["evaluate.compare={drawn: one}", ROW]
    with pytest.raises(ValueError, match="drawn is in compare and in seeds"):
        reading.load(path, both)
    assert reading.load(path, [ROW, "evaluate.against=drawn"]).evaluate.against == "drawn"


def made(values, score="crps", ends=None):
    base = {"stage": "coupled", "closure": "subgrid", "grid": 8, "score": score, "lead_time": 1.0}
    ends = ends or [(value - 0.1, value + 0.1) for value in values]
    return [
        {**base, "method": f"x#{n}", "value": value, "low": low, "high": high}
        for n, (value, (low, high)) in enumerate(zip(values, ends, strict=True), 1)
    ]


def joined(records, absent=()):
    scored = Scored(records=list(records), absent=list(absent))
    compare.join(scored, {"x": ("a", "b", "c")})
    return scored


def test_a_difference_is_told_apart_where_every_training_is():
    score, values = "crps_difference", [0.02, 0.03, 0.04]
    apart = joined(made(values, score, [(0.01, 0.03), (0.02, 0.04), (0.03, 0.05)]))
    row = find(apart.rows, method="x")
    assert (row.low, row.high) == (0.01, 0.05) and row.value == pytest.approx(0.03)
    one = joined(made(values, score, [(-0.01, 0.05), (0.02, 0.04), (0.03, 0.05)]))
    assert find(one.rows, method="x").low == -0.01
    few = joined(made(values, score, [(math.nan, math.nan)] * 3))
    assert math.isnan(find(few.rows, method="x").low)


def test_a_lost_training_is_a_lost_row_and_a_missing_one_a_note():
    assert math.isinf(find(joined(made([1.0, math.inf, 1.0])).rows, method="x").value)
    note = Absent("coupled", "subgrid", "x#2", "it has no coupled run")
    short = joined(made([1.0, 2.0]), [note])
    assert find(short.rows, method="x") is None
    shown = compare.shown(short)
    assert shown.records == [] and [one.reason for one in shown.absent] == [
        "x#2: it has no coupled run"
    ]


def test_spectra_are_means_and_single_ones_are_not_shown(tmp_path):
    scored = joined(made([1.0, 2.0, 4.0]))
    scored.spectra = {f"x#{n}": torch.full((3,), float(n)) for n in (1, 2, 3)}
    compare.join(scored, {"x": ("a", "b", "c")})
    shown = compare.shown(scored)
    assert list(shown.spectra) == ["x"] and torch.equal(shown.spectra["x"], torch.full((3,), 2.0))
    Report("t", frame(compare.shown(joined(made([1.0, 2.0, 4.0]))).records)).write(
        tmp_path / "r.html"
    )
    assert "2.33<small>1.00 – 4.00</small>" in (tmp_path / "r.html").read_text()
