"""The report: complete, self-contained, well formed, and its sentences follow the numbers."""

import base64
import math
import re
from html.parser import HTMLParser

import pytest

from hpc_closure.closure.part_report import PartReport
from hpc_closure.evaluate.report.gallery import Picture
from hpc_closure.evaluate.report.page import Report
from hpc_closure.evaluate.report.summary import heading, headline, summarise
from hpc_closure.evaluate.rows import Absent, frame

VOID = {"meta", "img", "br", "hr", "link", "input"}
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5Er"
    "kJggg=="
)


class Page(HTMLParser):
    """Checks nesting, collects texts of headings, cells and links."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.links, self.ids, self.sources = [], {}, [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs["href"]] if "href" in attrs else []
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.sources += [attrs["src"]] if "src" in attrs else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())


ABSENT = [
    Absent("generated", "diffusion", "fourier", "there are no sensors to interpolate"),
    Absent("coupled", "diffusion", "smagorinsky", "G is not a <subgrid> term & more"),
]


def run_rows(p_control=1e-9):
    records = []
    base = {"closure": "diffusion", "grid": 64, "interval": 1, "members": 32, "samples": 200}

    def add(**columns):
        records.append({**base, **columns})

    table = {
        "model": {
            "relative_error": 0.481,
            "crps_ratio": 1.004,
            "spread_ratio": 0.995,
            "rank_p": 0.4,
            "rank_power": 0.032,
        },
        "oracle": {"relative_error": 0.478, "crps_ratio": 1.0, "rank_p": 0.6, "floor": 0.338},
        "oracle_x0.95": {"rank_p": p_control},
        "physics": {"relative_error": 0.338},
        "none": {"relative_error": 1.0},
    }
    for method, scores in table.items():
        for score, value in scores.items():
            add(
                stage="generated",
                method=method,
                score=score,
                value=value,
                low=0.98 * value,
                high=1.02 * value,
                evaluations=2 if method == "model" else None,
            )
    add(stage="generated", method="model", shell=2, score="spread_ratio", value=0.97)
    base |= {"interval": 5, "members": 20, "samples": 1}
    for lead, factor in ((0.0, 0.0), (5.0, 0.5), (20.0, 1.0)):
        for method, value in (("model", 0.002), ("oracle", 0.0015), ("none", 0.7)):
            columns = {"stage": "coupled", "method": method, "lead_time": lead}
            add(**columns, score="relative_error_mean", value=factor * value)
            add(**columns, score="diverged", value=0)
            if lead and method == "model":
                add(**columns, score="spread_ratio", value=1.01)
                add(**columns, score="spread_skill", value=0.97)
    add(stage="coupled", method="model", score="cost_us", value=1.5)
    add(stage="coupled", method="model", score="cost_ratio", value=4.9)
    return frame(records)


@pytest.fixture
def report(tmp_path):
    picture = tmp_path / "loss.png"
    picture.write_bytes(PIXEL)
    path = tmp_path / "report.html"
    Report(
        title="quickstart <b>& co</b>",
        rows=run_rows(),
        absent=ABSENT,
        facts={"Physics": {"equation": "vorticity2d", "viscosity": 1e-3}, "Data": {"grid": 64}},
        pictures=[Picture("training", picture, "Loss of training and held-out members.")],
        notes=["18 of 20 planned members are present."],
        provenance={"git": {"revision": "abc123", "dirty": False}, "host": "node1"},
        start=30.0,
    ).write(path)
    return path.read_text()


def test_report_is_well_formed_and_needs_nothing_else(report):
    page = Page(report)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert len(page.sources) == 1 and page.sources[0].startswith("data:image/png;base64,")
    assert base64.b64decode(page.sources[0].split(",", 1)[1]) == PIXEL
    assert not re.search(r"https?://|<script|<link|@import|url\(", report)
    assert "prefers-color-scheme: dark" in report and 'name="viewport"' in report


def test_report_holds_what_was_run_and_escapes_it(report):
    page = Page(report)
    assert page.texts["h2"] == [
        "Headlines",
        "What was run",
        "Generated closure",
        "Coupled run",
        "Training",
        "Methods and scores",
        "Provenance",
    ]
    assert "quickstart &lt;b&gt;&amp; co&lt;/b&gt;" in report
    assert {"vorticity2d", "0.001"} <= set(page.texts["dd"])
    assert "18 of 20 planned members are present." in page.texts["li"]
    assert '"revision": "abc123"' in " ".join(page.texts["pre"])


def test_report_tables_have_methods_down_scores_across_and_reasons(report):
    page = Page(report)
    heads = page.texts["th"]
    for name in ("error of one sample", "CRPS ratio", "spread ratio", "rank p", "cost [us]"):
        assert name in heads
    assert {"model", "oracle", "oracle_x0.95", "physics", "fourier*", "none"} <= set(heads)
    assert "diverged" not in heads  # nobody did
    assert heads.count("5") == heads.count("20") and "0" not in heads
    assert "0.471 – 0.491" in page.texts["small"]
    assert "* fourier: there are no sensors to interpolate" in page.texts["p"]
    assert "* smagorinsky: G is not a <subgrid> term & more" in page.texts["p"]
    assert "n/a" in page.texts["td"] and "&lt; 1e-6" in report
    floor = next(text for text in page.texts["p"] if text.startswith("Least possible"))
    assert "σ/rms(U) = 0.338" in floor and "sample of the exact law has 0.478" in floor


@pytest.mark.parametrize(
    "p, seen, told",
    [
        (
            0.4,
            0.2,
            "does not fail (p = 0.4), and would as a rule not detect less than a spread wrong",
        ),
        (0.4, math.nan, "does not fail (p = 0.4), with too few ranks to detect a wrong spread"),
        (0.001, 0.2, "fails (p = 0.001)"),
        (0.001, 0.02, "fails (p = 0.001)"),
    ],
)
def test_a_weak_test_is_never_passed(p, seen, told):
    rows = run_rows()
    for score, value in (("rank_p", p), ("rank_power", seen)):
        rows.loc[(rows.score == score) & (rows.method == "model"), "value"] = value
    calibration = summarise(rows, start=30.0)[1]
    assert f"the rank histogram {told}" in calibration.model


def test_the_summary_puts_the_references_beside_the_model():
    error, calibration, coupled, spread, cost = summarise(run_rows(), start=30.0)
    assert error.what.startswith("Generated closure (diffusion, no sensors, 64² grid): relative")
    assert error.what.endswith("error of one sample, 2 evaluations of the score network")
    assert error.model == "0.481 [0.471, 0.491]"
    assert (
        "the exact law 0.478, the known term of the closure 0.338, no closure 1.00" in error.beside
    )
    assert error.beside.endswith("has an error below σ/rms(U) = 0.338")
    assert calibration.what == "Calibration (diffusion, no sensors, 64² grid)"
    assert "CRPS 1.00 [0.984, 1.02] times the exact law's, spread 0.995" in calibration.model
    assert "passes (p = 0.4; it detects a spread wrong by 3.2\u00a0%)" in calibration.model
    assert "the exact law has p = 0.6" in calibration.beside
    assert "p < 1e-6: this test can tell" in calibration.beside
    assert "one sample for 5 solver steps" in coupled.what
    assert "at t = 50 (start at 30, lead time 20; 20 members, 1 start)" in coupled.what
    assert coupled.model == "0.00200"
    assert coupled.beside.startswith("the exact law 0.00150, no closure 0.700")
    assert coupled.beside.endswith("the error is 350 times smaller than without closure")
    assert spread.model == "1.01 times the true ensemble's and 0.970 times the error of its mean"
    assert (cost.model, cost.beside) == (
        "1.50 us",
        "4.90 times that of the bare solver at its own step",
    )


def test_the_event_asked_for_has_a_line_and_a_table(tmp_path):
    base = {"stage": "coupled", "closure": "diffusion", "grid": 64, "interval": 5, "samples": 1}
    records = []
    for method, share in (("model", 0.31), ("oracle", 0.29), ("truth", 1.0)):
        columns = {**base, "method": method, "lead_time": 10.0, "members": 1000}
        ends = {"low": share - 0.02, "high": share + 0.02}
        records.append({**columns, "score": "probability", "value": share, **ends})
        records.append({**columns, "score": "members_needed", "value": 2305})
    rows = frame(records)
    (line,) = summarise(rows)
    assert line.what.endswith("lead time 10): probability")
    assert line.model == "0.310 [0.290, 0.330] from 1000 members"
    assert line.beside == (
        "the exact law 0.290; 2305 members estimate it within the tolerance of evaluate.event"
    )
    Report("t", rows).write(tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert {"probability", "members needed", "truth"} <= set(page.texts["th"])


def headline_rows(evaluations=4):
    base = {"stage": "generated", "closure": "diffusion", "grid": 64, "sensors": "none"}
    values = {
        "model": (1.005, 1.0, 0.99, 1.01),
        "mean_gp": (1.043, 1.02, 1.21, 0.803),
        "oracle": (1.0, 1.0, 1.0, 1.0),
    }
    names = (
        "crps_ratio",
        "spread_ratio",
        "spread_ratio_low_variance",
        "spread_ratio_high_variance",
    )
    return frame(
        {**base, "method": method, "score": score, "value": number, "evaluations": effort}
        for method, numbers in values.items()
        for score, number in zip(names, numbers, strict=True)
        for effort in [{"model": evaluations, "mean_gp": 0}.get(method)]
    )


PARTS = [
    PartReport("mean: regression", False, True, (), "w"),
    PartReport("residual: score", True, True, (0.9, 1.1)),
]


def test_the_first_lines_say_which_parts_act_and_what_the_generator_adds(tmp_path):
    first, second = headline(PARTS, headline_rows())
    assert first == "parts that act: mean: regression (w), residual: score (gain 0.9 to 1.1)"
    assert second == (
        "the model's CRPS is 1.00 times the exact law's; mean + Gaussian process has 1.04 times "
        "the exact law's CRPS; relative to the exact law's, the model's spread is 1.00 in all, "
        "0.990 in low-variance quarters, 1.01 in high-variance ones; without a generator it is "
        "1.02 in all, 1.21 in low-variance quarters, 0.803 in high-variance ones"
    )
    off = headline(PARTS[:1], headline_rows(evaluations=0))
    assert off[0] == "closed form: mean: regression (w); no trained part acts"
    assert off[1].startswith("the generator does not act; the model's CRPS is 1.00 times")
    assert headline(PARTS, frame([])) == [first]
    Report("t", headline_rows(), headline=[first, second]).write(tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert page.texts["p"][:2] == [f"{line[0].upper()}{line[1:]}." for line in (first, second)]


def beside(method, crps, **pairs):
    """Rows of an opponent: its CRPS over the law's, and (value, low, high) of scores."""
    own = {"stage": "generated", "closure": "diffusion", "grid": 64, "sensors": "none"}
    own["method"] = method
    rows = [{**own, "score": "crps_ratio", "value": crps}]
    for score, numbers in pairs.items():
        rows.append({**own, "score": score, **dict(zip(("value", "low", "high"), numbers))})
    return rows


@pytest.mark.parametrize(
    "interval, begins",
    [
        (
            (0.98, 0.97, 0.99),
            "a mixture of two Gaussian laws that follow the state is better than",
        ),
        (
            (1.0, 0.98, 1.02),
            "a mixture of two Gaussian laws that follow the state is as good as",
        ),
        ((1.03, 1.01, 1.05), "the model's CRPS is 1.00"),
    ],
)
def test_the_best_opponent_is_named_and_a_tie_or_a_defeat_is_said_first(interval, begins):
    rows = beside("gaussian_modes", 1.03, crps_difference=(0.04, 0.02, 0.06))
    rows += beside("mixture", 1.01, crps_difference=tuple(edge - 1 for edge in interval))
    both = frame([*rows, *headline_rows().astype(object).to_dict("records")])
    line = headline(PARTS, both)[1]
    assert line.startswith(begins)
    best = "a mixture of two Gaussian laws that follow the state, the best of 3"
    assert f"{best} closures without a generator, has 1.01 times the exact law's CRPS" in line


def test_rows_of_a_closed_form_model_carry_the_words(tmp_path):
    closed = ["model", "other"]
    error, *_, coupled, spread, cost = summarise(run_rows(), 30.0, closed)
    assert error.what.endswith("error of one sample, closed form")
    assert coupled.what.endswith("error of the ensemble mean, closed form")
    Report("t", run_rows(), closed=closed).write(tmp_path / "r.html")
    captions = Page((tmp_path / "r.html").read_text()).texts["caption"]
    assert captions.count("Accuracy and cost (closed form: model)") == 2
    Report("t", run_rows()).write(tmp_path / "r.html")
    assert "closed form" not in (tmp_path / "r.html").read_text()


def test_the_summary_says_when_the_test_could_not_fail():
    assert "this test could not tell them apart" in summarise(run_rows(p_control=0.3))[1].beside


def test_the_summary_says_when_the_network_is_off_and_what_was_granted():
    base = {"stage": "generated", "closure": "diffusion", "grid": 64, "score": "relative_error"}
    records = [{**base, "method": "model+physics", "value": 0.3, "evaluations": 0}]
    (line,) = summarise(frame([*records, {**records[0], "score": "rank_p", "value": 0.5}]))
    assert line.what.endswith(
        "one sample, score network switched off, with an estimate of the closure as input"
    )


def test_the_summary_of_other_runs():
    base = {"stage": "coupled", "closure": "subgrid", "sensors": "none", "grid": 64, "interval": 5}
    common = {"lead_time": 3.0, "score": "relative_error_mean", "members": 4, "samples": 2}
    values = (("model", math.inf), ("none", 0.5))
    rows = frame([{**base, **common, "method": name, "value": value} for name, value in values])
    (line,) = summarise(rows)
    assert "at the end (lead time 3; 4 members, 2 starts)" in line.what
    assert (line.model, line.beside) == ("diverged", "no closure 0.500")
    assert summarise(frame([])) == []
    columns = {"closure": "convection", "sensors": "8x8", "grid": 128}
    assert heading(columns) == "convection, sensors: 8x8, 128² grid"


def test_report_without_a_model_still_stands(tmp_path):
    base = {"stage": "generated", "closure": "subgrid", "method": "none", "grid": 32}
    path = tmp_path / "report.html"
    Report("empty", frame([{**base, "score": "mse", "value": 1}])).write(path)
    page = Page(path.read_text())
    assert "No model was scored." in page.texts["p"]
