"""Late leads: where the true ensemble is no better than climatology, no score counts."""

import pytest
import torch

from hpc_closure.evaluate.report import figures
from hpc_closure.evaluate.report.page import Report
from hpc_closure.evaluate.report.summary import summarise
from hpc_closure.evaluate.rows import find, frame, select
from hpc_closure.evaluate.scores.coupled.late import SENTENCE, late_leads
from hpc_closure.evaluate.scores.table import Labels
from hpc_closure.evaluate.stages.coupled import score_coupled

LEADS = [0.5, 1.0, 2.0, 4.0]
KNOWN = [0.95, 0.7, 0.0, 0.0]  # correlation with the start that the truth has there
LABELS = Labels({"closure": "subgrid", "sensors": "none", "interval": 5})


def fields(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def forgotten(points, members=16, cases=12):
    """Truth and ensembles of a flow that forgets its start; ``drift`` is of another climate."""
    start = fields(0, cases, *points)
    known = torch.tensor(KNOWN).double()[:, None, None]
    left = (1 - known.square()).sqrt()

    def law(seed, number):
        return known * start[:, None] + left * fields(seed, number, cases, len(LEADS), *points)

    ensembles = {
        "model": law(2, members),
        "drift": 1.08 * fields(3, members, cases, len(LEADS), *points),
        "oracle": law(4, members),
        "climatology": fields(5, 40, cases, len(LEADS), *points),
    }
    return law(1, 1)[0], ensembles


@pytest.fixture(scope="module", params=[(12, 12), (1, 64)], ids=["plane", "line"])
def rows(request):
    truth, ensembles = forgotten(request.param)
    return score_coupled(truth, ensembles, LEADS, LABELS).rows


def test_what_can_be_gained_falls_to_nothing(rows):
    known = select(rows, score="predictability", shell=None)
    assert set(known["method"]) == {"oracle"}
    first, second, *late = (find(known, lead_time=lead) for lead in LEADS)
    crps = [
        find(rows, method=name, score="crps", lead_time=0.5, shell=None).value
        for name in ("oracle", "climatology")
    ]
    assert first.value == pytest.approx(1 - crps[0] / crps[1], rel=1e-9)
    assert first.low < first.value < first.high and first.value > 0.6 > second.value > 0.2
    assert all(abs(row.value) < 0.05 for row in late)


def test_late_leads_are_those_at_which_another_climate_scores_as_well(rows):
    assert late_leads(rows) == [2.0, 4.0]
    ratio = select(rows, method="drift", score="crps_ratio", shell=None)
    assert find(ratio, lead_time=0.5).value > 2
    assert find(ratio, lead_time=4.0).value < 1.03


def test_a_lead_that_is_followed_by_one_that_tells_is_not_late():
    base = {"stage": "coupled", "closure": "subgrid", "method": "oracle", "grid": 8}
    values = {1.0: 0.5, 2.0: 0.04, 3.0: 0.06, 4.0: 0.049, 8.0: -0.1}
    records = [
        {**base, "score": "predictability", "lead_time": lead, "value": value}
        for lead, value in values.items()
    ]
    assert late_leads(frame(records)) == [4.0, 8.0]
    assert late_leads(frame([])) == []


def test_without_a_true_ensemble_no_lead_is_called_late():
    truth, ensembles = forgotten((12, 12))
    del ensembles["oracle"]
    rows = score_coupled(truth, ensembles, LEADS, LABELS).rows
    assert not len(select(rows, score="predictability")) and late_leads(rows) == []


def test_no_headline_is_of_a_late_lead(rows):
    lines = summarise(rows)
    coupled, spread = lines[:2]
    error = find(rows, method="model", score="relative_error_mean", lead_time=1.0, shell=None)
    assert "lead time 1, the last that is not late;" in coupled.what
    assert coupled.model.startswith(f"{error.value:.3g}")
    assert spread.what.endswith("at lead time 1")
    for line in lines:
        assert "lead time 4" not in line.what
    every = rows[~rows["lead_time"].isin([0.5, 1.0])]
    words = [line.model for line in summarise(every)]
    assert (
        words[0] == "every lead time is late: scores there do not separate good closures from bad"
        and len(words) == 1
    )


def test_late_leads_have_a_dagger_in_the_tables(rows, tmp_path):
    Report("t", rows).write(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    heads = [page.count(f">{words}</th>") for words in ("0.5", "1", "2†", "4†")]
    assert heads[0] >= 4 and len(set(heads)) == 1
    assert page.count(SENTENCE.replace("'", "&#39;")) == 1
    assert "At lead time 1, the last that is not late (the last of all is 4):" in page
    early = rows[rows["lead_time"].isna() | rows["lead_time"].isin([0.5, 1.0])]
    Report("t", early).write(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "†" not in page and "At the last lead time, 1:" in page


def test_the_joint_energy_score_is_over_lead_times_that_are_not_late(rows, request):
    """It does not change where late leads are cut off; without an oracle all leads count."""
    points = (12, 12) if "plane" in request.node.name else (1, 64)
    truth, ensembles = forgotten(points)
    early = {name: ensemble[:, :, :2] for name, ensemble in ensembles.items()}
    cut = score_coupled(truth[:, :2], early, LEADS[:2], LABELS).rows
    for score in ("energy_score_joint", "energy_score_joint_ratio"):
        for method in ("model", "drift"):
            whole, part = (find(one, method=method, score=score) for one in (rows, cut))
            assert whole.value == part.value and whole.low == part.low
    difference = "energy_score_joint_difference"
    there, here = (find(one, method="drift", score=difference) for one in (rows, cut))
    assert there.value == here.value
    del ensembles["oracle"]
    unknown = score_coupled(truth, ensembles, LEADS, LABELS).rows
    scores = [find(one, method="drift", score="energy_score_joint") for one in (unknown, rows)]
    assert scores[0].value != scores[1].value


def test_where_every_lead_is_late_no_trajectory_is_scored():
    truth, ensembles = forgotten((12, 12))
    late = {name: ensemble[:, :, 2:] for name, ensemble in ensembles.items()}
    rows = score_coupled(truth[:, 2:], late, LEADS[2:], LABELS).rows
    assert late_leads(rows) == LEADS[2:]
    assert not rows["score"].str.startswith("energy_score_joint").any()
    assert len(select(rows, score="correlated_95")) == len(ensembles)


def test_figures_over_lead_time_shade_the_late_ones(rows):
    for axis in figures.error_growth(rows).axes:
        (band,) = (one for one in axis.patches if one.get_label() == "late")
        assert band.get_x() == 2.0
        assert band.get_x() + band.get_width() == pytest.approx(axis.get_xlim()[1])
        assert "late" in [text.get_text() for text in axis.get_legend().get_texts()]
    early = rows[rows["lead_time"].isna() | rows["lead_time"].isin([0.5, 1.0])]
    assert not any(axis.patches for axis in figures.error_growth(early).axes)


def test_the_worst_similarity_is_a_headline():
    base = {"stage": "coupled", "closure": "subgrid", "grid": 8, "score": "similarity_worst"}
    values = {
        "model": (0.68, 0.6, 0.7),
        "oracle": (0.9, 0.8, 1.0),
        "rung_64_moved": (0.2, 0.1, 0.3),
    }
    records = [
        {**base, "method": method, "value": value, "low": low, "high": high}
        for method, (value, low, high) in values.items()
    ]
    (line,) = summarise(frame(records))
    assert line.what.endswith("least similarity to the filtered DNS")
    assert line.model == "0.680 [0.600, 0.700]"
    assert line.beside == (
        "the exact law 0.900, rung_64_moved 0.200, no closure 0 by definition, the filtered DNS 1"
    )
