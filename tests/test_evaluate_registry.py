"""Each score is described once, beside what computes it; users add theirs by naming a module."""

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pandas
import pytest
import torch
from conftest import TINY, four_verbs
from test_evaluate_pointwise import normal

from hpc_closure.evaluate import verb as evaluate
from hpc_closure.evaluate.rows import find, frame, select
from hpc_closure.evaluate.scores import paired, record, registry, table
from hpc_closure.evaluate.scores.coupled import exceedance
from hpc_closure.evaluate.scores.forecast import Forecast, Truth
from hpc_closure.evaluate.scores.joint import patches
from hpc_closure.evaluate.scores.record import Score
from hpc_closure.evaluate.scores.table import Statistics, form_scores
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.work.options import Options

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "tests" / "extend"


@pytest.fixture(scope="module")
def example():
    """The module of the docs, importable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE)
        yield importlib.import_module("score_example")
    del sys.modules["score_example"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, example):
    """A run whose evaluation names the example."""
    changes = ["evaluate.scores=[score_example]", "evaluate.sensors=[]"]
    return Run.of(four_verbs(tmp_path_factory.mktemp("scores"), TINY, changes))


def test_scores_of_a_users_module_stand_in_rows_and_report(run, example):
    rows = pandas.read_csv(run.scores_csv)
    generated = rows[(rows.stage == "generated") & rows["shell"].isna()]
    methods = set(generated.method)
    for score in example.SCORES:
        assert set(generated[generated.score == score.name].method) == methods
    explained = rows[(rows.score == "explained") & (rows.method == "model")]
    assert explained["shell"].notna().any() and explained["lead_time"].notna().any()
    page = run.report.read_text()
    for words in ("error of the peak", "Explained, by lead time", ">Explained by the mean"):
        assert words in page
    assert example.SCORES[0].meaning in page
    known = {**registry.BUILT_IN, **registry.by_name(example.SCORES)}
    assert set(rows.score) <= set(known)


def test_extremes_have_rows_in_both_stages(run):
    rows = pandas.read_csv(run.scores_csv)
    for stage in ("generated", "coupled"):
        here = rows[rows.stage == stage]
        methods = set(here[here.score == "crps"].method)
        for score in ("patch_max_crps", "field_max_crps", "exceedance_brier"):
            assert set(here[here.score == score].method) == methods, (stage, score)
    page = run.report.read_text()
    assert "Extremes and patches" in page and "Patch maxima, by lead time" in page


def test_the_named_modules_are_part_of_what_scores_are_made_from(run):
    experiment = reading.load(run.config)
    plain = reading.load(run.config, ["evaluate.scores=[]"])
    assert "scores" in experiment.stage_settings("evaluate")["evaluate"]
    assert "scores" not in plain.stage_settings("evaluate")["evaluate"]
    assert registry.files(["score_example"]) == [EXAMPLE / "score_example.py"]
    with pytest.raises(
        ValueError, match="evaluate.scores=no_such_module: no_such_module cannot be imported"
    ):
        evaluate.run(
            reading.load(run.config, ["evaluate.scores=[no_such_module]"]), Options(verbosity=-1)
        )


def statistics_of(ensemble, truth, further):
    found = Statistics(further)
    found.add(Forecast(ensemble, Truth(truth)))
    return found


def test_a_function_of_samples_and_a_formula_of_statistics_give_their_numbers(example):
    truth, ensemble = normal(6, 8, 8), normal(5, 6, 8, 8, seed=1)
    statistics = statistics_of(ensemble, truth, example.SCORES)
    rows = frame({"stage": "generated", **one} for one in form_scores(statistics, torch.arange(6)))
    total = select(rows, shell=None)
    peak = example.peak_error(ensemble, truth).mean()
    assert find(total, score="peak_error").value == pytest.approx(float(peak), rel=1e-12)
    mean = (ensemble.mean(0) - truth).square().mean()
    explained = find(total, score="explained")
    assert explained.value == pytest.approx(float(1 - mean / truth.square().mean()), rel=1e-12)
    assert explained.low < explained.value < explained.high
    assert len(select(rows, score="explained")) > 3 and len(select(rows, score="peak_error")) == 1


def test_a_function_that_returns_other_shapes_is_refused():
    score = Score("wrong", "", "", sample=lambda ensemble, truth: truth)
    words = r"score wrong: its function returned \(6, 4, 4\) .* expected one number a sample, \(6,"
    with pytest.raises(ValueError, match=words):
        statistics_of(normal(2, 6, 4, 4), normal(6, 4, 4), (score,))


FINE = Score("mine", "", "", needs=("mse",), formula=lambda s, m: s["mse"])


@pytest.mark.parametrize(
    "scores, words",
    [
        ((), "SCORES of own_scores is not a tuple of one or more Score of "),
        (("mse",), "SCORES of own_scores is not a tuple of one or more Score of "),
        (None, "SCORES of own_scores is not a tuple of one or more Score of "),
        ((replace(FINE, name="crps"),), "has a score crps, a name that is taken; choose another"),
        ((FINE, FINE), "has a score mine, a name that is taken; choose another"),
        ((replace(FINE, needs=("skill",)),), "score mine needs skill, which is no statistic; "),
        ((replace(FINE, per_shell=True),), "needs mse, which is no statistic per shell; there "),
        ((replace(FINE, formula=None),), "score mine has needs, but no formula"),
        ((Score("mine", "", ""),), "has neither a formula with its needs nor a function of"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(scores, words, monkeypatch):
    module = ModuleType("own_scores")
    module.SCORES = scores
    monkeypatch.setitem(sys.modules, "own_scores", module)
    with pytest.raises(ValueError, match=f"^evaluate.scores[:=].*{words}") as refused:
        registry.load(["own_scores"])
    assert "\n" not in str(refused.value)


def test_a_module_that_fails_is_named_with_its_error(tmp_path, monkeypatch):
    (tmp_path / "broken_scores.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    words = "broken_scores cannot be imported .ZeroDivisionError: division by zero.; install its "
    with pytest.raises(ValueError, match=words):
        registry.load(["broken_scores"])


def test_a_module_without_scores_is_named():
    with pytest.raises(ValueError, match="^evaluate.scores=json: json has no SCORES; expected a "):
        registry.load(["json"])


def test_every_score_is_described_once():
    every = [score for module in registry.MODULES for score in module.SCORES]
    assert len(every) == len(registry.BUILT_IN)
    assert all(score.heading and score.meaning for score in every)
    for score in every:
        names = table.SHELL_STATISTICS if score.spectra or score.per_shell else table.STATISTICS
        assert {need.removeprefix("reference_") for need in score.statistics} <= set(names)
    assert {score.table for score in paired.SCORES} == {record.PAIRED}
    assert [score.name for score in exceedance.SCORES] == ["probability", "members_needed"]


def test_the_statistics_are_those_that_are_described():
    statistics = Statistics(threshold=1.0)
    quarter = {
        name: (torch.ones(3, 4, 4), torch.ones(3, 4, 4))
        for name in ("low_variance", "high_variance")
    }
    forecast = Forecast(normal(20, 3, 4, 4), Truth(normal(3, 4, 4)))
    statistics.add(forecast, torch.ones(3), quarter)
    assert set(statistics.total) == set(table.STATISTICS)
    assert set(statistics.shells) == set(table.SHELL_STATISTICS)


def docs_script():
    path = ROOT / "docs" / "scores.py"
    spec = importlib.util.spec_from_file_location("docs_scores", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_page_is_that_of_the_records():
    """``python docs/scores.py`` writes it."""
    script = docs_script()
    assert script.PAGE.read_text(encoding="utf-8") == script.page()


def test_formulas_on_the_page_are_those_that_are_computed():
    """Each is evaluated as it is printed."""
    script = docs_script()
    means = {name: 1 + torch.rand(3, dtype=torch.float64) for name in table.STATISTICS}
    means |= {f"reference_{name}": 2 * value for name, value in means.items()}
    shown = 0
    for score in (*table.SCORES, *patches.SCORES):
        text = script.formula(score, table).strip("`")
        if score.formula is not None:
            shown += 1
            value = eval(text, {"M": 5, "torch": torch, **means})
            assert torch.allclose(value, score.formula(means, 5), rtol=1e-12), score.name
            assert not re.search(r"pointwise|s\[", text)
    assert shown > 20
