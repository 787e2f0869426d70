"""The report: complete, self-contained, well formed, and its sentences follow the numbers."""

import base64
import math
import re
from html.parser import HTMLParser

import pytest

from hpc_closure.evaluate.report import SCORES, TABLES, Picture, write_report
from hpc_closure.evaluate.rows import Rows
from hpc_closure.evaluate.summary import describe, headlines

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


def run_rows(p_control=1e-9):
    rows = Rows()
    base = {"closure": "diffusion", "grid": 64, "interval": 1, "members": 32, "samples": 200}
    table = {
        "model": {
            "relative_error": 0.481,
            "crps_ratio": 1.004,
            "spread_ratio": 0.995,
            "rank_p": 0.4,
        },
        "oracle": {"relative_error": 0.478, "crps_ratio": 1.0, "rank_p": 0.6, "floor": 0.338},
        "oracle_x0.95": {"rank_p": p_control},
        "physics": {"relative_error": 0.338},
        "none": {"relative_error": 1.0},
    }
    for method, scores in table.items():
        for score, value in scores.items():
            rows.add(
                **base,
                stage="generated",
                method=method,
                score=score,
                value=value,
                low=0.98 * value,
                high=1.02 * value,
                evaluations=2 if method == "model" else None,
            )
    rows.add(**base, stage="generated", method="model", shell=2, score="spread_ratio", value=0.97)
    base |= {"interval": 5, "members": 20, "samples": 1}
    for lead, factor in ((0.0, 0.0), (5.0, 0.5), (20.0, 1.0)):
        for method, value in (("model", 0.002), ("oracle", 0.0015), ("none", 0.7)):
            columns = {**base, "stage": "coupled", "method": method, "lead_time": lead}
            rows.add(**columns, score="relative_error_mean", value=factor * value)
            rows.add(**columns, score="diverged", value=0)
            if lead and method == "model":
                rows.add(**columns, score="spread_ratio", value=1.01)
                rows.add(**columns, score="spread_skill", value=0.97)
    rows.add(**base, stage="coupled", method="model", score="cost_ms", value=1.5)
    rows.add(**base, stage="coupled", method="model", score="cost_ratio", value=4.9)
    rows.leave_out("generated", "diffusion", "fourier", "there are no sensors to interpolate")
    rows.leave_out("coupled", "diffusion", "smagorinsky", "G is not a <subgrid> term & more")
    return rows


@pytest.fixture
def report(tmp_path):
    picture = tmp_path / "loss.png"
    picture.write_bytes(PIXEL)
    path = write_report(
        tmp_path / "evaluate" / "report.html",
        run_rows(),
        title="quickstart <b>& co</b>",
        summary={"Physics": {"equation": "vorticity2d", "viscosity": 1e-3}, "Data": {"grid": 64}},
        pictures=[Picture("training", picture, "Loss of training and held-out members.")],
        provenance={"git": {"revision": "abc123", "dirty": False}, "host": "node1"},
        notes=["18 of 20 planned members are present."],
        start=30.0,
    )
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
    for name in ("error of one sample", "CRPS ratio", "spread ratio", "rank p", "cost [ms]"):
        assert name in heads
    assert {"model", "oracle", "oracle_x0.95", "physics", "fourier*", "none"} <= set(heads)
    assert "diverged" not in heads  # nobody did
    assert heads.count("5") == heads.count("20") and "0" not in heads
    assert "0.471 – 0.491" in page.texts["small"]
    assert "* fourier: there are no sensors to interpolate" in page.texts["p"]
    assert "* smagorinsky: G is not a <subgrid> term & more" in page.texts["p"]
    assert "n/a" in page.texts["td"] and "&lt; 1e-6" in report
    floor = next(text for text in page.texts["p"] if text.startswith("Best possible"))
    assert "σ/rms(U) = 0.338" in floor and "single sample 0.478" in floor


def test_every_table_column_is_explained():
    names = [name for table in TABLES.values() for name in table]
    assert set(names) == set(SCORES) and len(names) == len(set(names))


def test_headlines_put_the_references_beside_the_model():
    error, calibration, coupled, spread = headlines(run_rows(), start=30.0)
    assert error.startswith("Generated closure (diffusion, no sensors, 64² grid): one sample with")
    assert "2 evaluations of the score network is at relative error 0.481 [0.471, 0.491]" in error
    assert "the exact law 0.478, the granted physics 0.338, no closure 1.00" in error
    assert error.endswith("σ/rms(U) = 0.338.")
    assert "CRPS 1.00 [0.984, 1.02] times the exact law's, spread 0.995" in calibration
    assert "passes (p = 0.4)" in calibration and "p < 1e-6: this test can tell" in calibration
    assert "at t = 50 (start 30, horizon 20; 20 members, 1 start)" in coupled
    assert "relative error 0.00200; the exact law 0.00150, no closure 0.700" in coupled
    assert coupled.endswith("350 times nearer than without closure.")
    assert "1.01 of the true ensemble's and 0.970 of its error" in spread
    assert spread.endswith("A member step costs 1.50 ms, 4.90 times the bare solver.")


def test_the_event_asked_for_has_a_headline_and_a_table(tmp_path):
    rows = Rows()
    base = {"stage": "coupled", "closure": "diffusion", "grid": 64, "interval": 5, "samples": 1}
    for method, share in (("model", 0.31), ("oracle", 0.29), ("truth", 1.0)):
        columns = {**base, "method": method, "lead_time": 10.0, "members": 1000}
        rows.add(**columns, score="probability", value=share, low=share - 0.02, high=share + 0.02)
        rows.add(**columns, score="members_needed", value=2305)
    (sentence,) = headlines(rows)
    assert "lead time 10) has probability 0.310 [0.290, 0.330] by 1000 members" in sentence
    assert sentence.endswith(
        "the exact law 0.290. 2305 members would give it to the tolerance " "asked for."
    )
    page = Page(write_report(tmp_path / "r.html", rows, title="t", summary={}).read_text())
    assert {"probability", "members needed", "truth"} <= set(page.texts["th"])


def test_headlines_say_when_the_test_could_not_fail():
    assert "this test could not tell them apart" in headlines(run_rows(p_control=0.3))[1]


def test_headlines_of_other_runs():
    rows = Rows()
    base = {"stage": "coupled", "closure": "subgrid", "sensors": "none", "grid": 64, "interval": 5}
    for method, value in (("model", math.inf), ("none", 0.5)):
        rows.add(
            **base,
            method=method,
            lead_time=3.0,
            score="relative_error_mean",
            value=value,
            members=4,
            samples=2,
        )
    (sentence,) = headlines(rows)
    assert "at the end (horizon 3; 4 members, 2 starts)" in sentence
    assert sentence.endswith("is at relative error diverged; no closure 0.500.")
    assert headlines(Rows()) == []
    columns = {"closure": "convection", "sensors": "8x8", "grid": 128}
    assert describe(columns) == "convection, sensors: 8x8, 128² grid"


def test_report_without_a_model_still_stands(tmp_path):
    rows = Rows()
    rows.add(stage="generated", closure="subgrid", method="none", grid=32, score="mse", value=1)
    path = write_report(tmp_path / "report.html", rows, title="empty", summary={})
    page = Page(path.read_text())
    assert "No model was scored." in page.texts["p"]
