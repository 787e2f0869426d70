"""Write the report: one self-contained HTML file without network access.

Its only script moves the slider over the frames of the coupled run; without frames there is none.

The content is computed from score rows, figures and plain data; ``templates/report.html`` defines
the appearance, for light and dark displays. Images are embedded.
"""

import base64
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pandas import DataFrame, isna

from hpc_closure.evaluate.report.gallery import SECTIONS, Picture
from hpc_closure.evaluate.report.slider import Slider
from hpc_closure.evaluate.report.summary import GROUP, WHOLE, groups, heading, summarise
from hpc_closure.evaluate.rows import Absent, find, format_value, pivot, select, sort_methods
from hpc_closure.evaluate.scores.coupled import exceedance
from hpc_closure.evaluate.scores.coupled.late import DAGGER, SENTENCE, late_leads
from hpc_closure.evaluate.scores.joint import coherence
from hpc_closure.evaluate.scores.paired import DIFFERENCES, WORSE, verdict
from hpc_closure.evaluate.scores.record import PAIRED, Score
from hpc_closure.evaluate.scores.registry import BUILT_IN, by_name
from hpc_closure.experiment.method_names import METHODS, MODEL, MODELS
from hpc_closure.work.atomic import write_text

TEMPLATES = Path(__file__).parent / "templates"
MAX_TIMES = 6  # lead times side by side
LEADING = "relative_error_mean"  # the first table by lead time; the others are folded


@dataclass(frozen=True)
class Report:
    """Content of the report.

    Attributes:
        title: name of the run.
        rows: all score rows.
        absent: methods that do not apply, with reasons.
        facts: heading -> settings of the run.
        pictures: figures in order.
        slider: frames of the coupled run; None = none.
        headline: first lines: which parts of the model act, what its generator adds.
        closed: methods in which no trained part acts.
        notes: warnings in sentences, e.g. that members of the ensemble are missing.
        provenance: settings, versions and inputs, printed as JSON.
        start: time at which the coupled runs start.
        lead_times: lead times to print; None = up to six of those scored.
        against: reference method of the paired differences.
        further: the user's scores of ``evaluate.scores``.
        dimensions: number of sides of the fields.
        replicas: whether the truth without sensors is a replica; tables then name their truth.
    """

    title: str
    rows: DataFrame
    absent: Sequence[Absent] = ()
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()
    slider: Slider | None = None
    notes: Sequence[str] = ()
    headline: Sequence[str] = ()
    closed: Collection[str] = ()
    provenance: Mapping[str, Any] | None = None
    start: float | None = None
    lead_times: Sequence[float] | None = None
    against: str = MODEL
    further: Sequence[Score] = ()
    dimensions: int = 2
    replicas: bool = False

    @property
    def scores(self) -> dict[str, Score]:
        """All scores by name."""
        return {**BUILT_IN, **by_name(self.further)}

    def write(self, path: Path) -> None:
        """Write ``report.html``."""
        jinja = Environment(
            loader=FileSystemLoader(TEMPLATES),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=StrictUndefined,
        )
        page = jinja.get_template("report.html").render(
            report=self,
            models=MODELS,
            summary=summarise(self.rows, self.start, self.closed, self.dimensions),
            generated=[self._generated(*group) for group in groups(self.rows, "generated")],
            coupled=list(self._coupled()),
            figures=self._figures(),
            glossary=self._glossary(),
            provenance=json.dumps(self.provenance, indent=1, default=str, ensure_ascii=False),
        )
        write_text(path, page)

    def _figures(self) -> dict[str, list[dict[str, Any]]]:
        """Return {section: figures}, with the images in base64."""
        figures: dict[str, list] = {name: [] for name in SECTIONS}
        for picture in self.pictures:
            image = picture.png.read_bytes()
            figures[picture.section].append(
                {
                    "caption": picture.caption,
                    # half the pixels of the PNG header: letters have one size in all figures
                    "width": int.from_bytes(image[16:20], "big") // 2,
                    "data": base64.b64encode(image).decode(),
                }
            )
        return figures

    def _notes(self, stage: str, columns: dict) -> dict[str, str]:
        """Return {method: reason} for the methods that are missing in a group of rows."""
        return {
            note.method: note.reason
            for note in self.absent
            if note.stage == stage
            and note.closure == columns["closure"]
            and note.sensors in (None, columns["sensors"])
        }

    def _heading(self, columns: dict) -> str:
        """Write the heading of a group of rows; with replicas it names their truth."""
        out = heading(columns, self.dimensions).capitalize()
        if not self.replicas:
            return out
        own = "the start's own trajectory"
        return f"{out}; truth: {'a replica' if columns['sensors'] == 'none' else own}"

    def _generated(self, columns: dict, rows: DataFrame) -> dict[str, Any]:
        """Lay out heading, note and tables of one group of the generated closure."""
        total = select(rows, shell=None)
        return {
            "heading": self._heading(columns),
            "columns": columns,
            "samples": total["samples"].iloc[0],
            "tables": list(self._tables(total, self._notes("generated", columns))),
            "paired": self._paired(total, DIFFERENCES[:-1], "snapshot by snapshot"),
            "floor": _floor(total),
            "shells": list(self._shells(rows)),
        }

    def _coupled(self) -> Iterator[dict[str, Any]]:
        """Lay out heading, note and tables of each group of coupled runs."""
        for columns, rows in groups(self.rows, "coupled"):
            total = select(rows, shell=None)
            times = sorted(time for time in total["lead_time"].dropna().unique() if time)
            if not times:
                continue
            shown = [time for time in self.lead_times or times if time in times] or times
            if len(shown) > MAX_TIMES:
                last = len(shown) - 1
                shown = [shown[round(i * last / (MAX_TIMES - 1))] for i in range(MAX_TIMES)]
            late = late_leads(total)
            in_use = [time for time in times if time not in late]
            last = in_use[-1] if in_use else times[-1]
            heads = {lead: (f"{lead:g}{DAGGER * (lead in late)}", "") for lead in shown}
            by_lead = total[total["lead_time"].isin(shown)]
            in_time, reasons = [], self._notes("coupled", columns)
            for score in sorted(self.scores.values(), key=lambda one: one.name != LEADING):
                part = select(by_lead, score=score.name)
                if score.by_lead_time and len(part):
                    caption = f"{score.heading}, by lead time".capitalize()
                    in_time.append(Table.of(part, "lead_time", heads, caption, reasons))
                    reasons = {}
            crps = select(by_lead, score=DIFFERENCES[0])
            paired = [
                *self._differences(crps, "lead_time", heads, "start by start, by lead time"),
                *self._paired(total, DIFFERENCES[-1:], "start by start, of whole trajectories"),
            ]
            ends = total["lead_time"].isna() | (total["lead_time"] == last)
            is_event = total["score"].isin(score.name for score in exceedance.SCORES)
            model = total[total["method"].isin(MODELS)]
            yield {
                "heading": self._heading(columns),
                "columns": columns,
                "sizes": next(model.itertuples(), None),
                "in_time": in_time,
                "paired": paired,
                "last": last,
                "of": times[-1],
                "late": SENTENCE if late else "",
                "tables": [*self._tables(total[ends | is_event], {}), *self._pairs(columns)],
            }

    def _pairs(self, columns: dict[str, Any]) -> "Iterator[Table]":
        """Lay out the table of pairs of fields, beside the scores of all channels together."""
        if columns["channel"] != WHOLE:
            return
        shared = {name: columns[name] for name in GROUP if name != "channel"}
        (score,) = coherence.SCORES
        rows = select(self.rows, stage="coupled", score=score.name, **shared)
        if len(rows):
            heads = {pair: (pair, score.meaning) for pair in rows["channel"].unique()}
            yield Table.of(rows, "channel", heads, coherence.CAPTION)

    def _paired(self, rows: DataFrame, names: Sequence[str], how: str) -> "list[Table]":
        """Lay out the table of differences to the reference method; [] without rows."""
        heads = {name: self._head(name) for name in names}
        return self._differences(rows[rows["score"].isin(names)], "score", heads, how)

    def _differences(
        self, rows: DataFrame, across: str, heads: "Heads", how: str
    ) -> "list[Table]":
        if rows.empty:
            return []
        what = "Difference" if across == "score" else "CRPS, difference"
        caption = f"{what} to {self.against}, {how}: negative is better"
        return [Table.of(rows, across, heads, caption)]

    def _head(self, name: str) -> tuple[str, str]:
        return self.scores[name].heading, self.scores[name].meaning

    def _tables(self, rows: DataFrame, reasons: Mapping[str, str]) -> "Iterator[Table]":
        """Lay out the tables of the score records, without ``diverged`` if no member diverged."""
        if not select(rows, score="diverged")["value"].any():
            rows = rows[rows["score"] != "diverged"]
        there = set(rows["score"])
        shown = [score for score in self.scores.values() if score.name in there]
        for caption in dict.fromkeys(score.table for score in self.scores.values()):
            heads = {
                score.name: self._head(score.name) for score in shown if score.table == caption
            }
            if caption not in ("", PAIRED) and heads:
                part = rows[rows["score"].isin(heads)]
                yield Table.of(part, "score", heads, caption + self._closed(part), reasons)

    def _closed(self, rows: DataFrame) -> str:
        """Name the methods of a table that are closed forms, in words."""
        names = [name for name in sort_methods(rows["method"]) if name in self.closed]
        return f" (closed form: {', '.join(names)})" if names else ""

    def _shells(self, rows: DataFrame) -> "Iterator[Table]":
        """Lay out the tables per wavenumber shell."""
        for score in self.scores.values():
            part = rows[(rows["score"] == score.name) & rows["shell"].notna()]
            if score.shells and len(part):
                heads = {shell: (f"{shell:g}", "") for shell in sorted(part["shell"].unique())}
                yield Table.of(part, "shell", heads, f"{score.shells} per wavenumber shell")

    def _glossary(self) -> dict[str, str]:
        """Return {name: meaning} of the methods and scores in the rows."""
        names = sort_methods([*self.rows["method"], *(note.method for note in self.absent)])
        used = set(self.rows["score"])
        several = self.rows.dropna(subset="seeds").groupby("method")["seeds"].max()
        means = {
            name: f"mean over {number} trainings that differ only in their seed; the small "
            "figures are the least and the largest value of them, for differences the outermost "
            "ends of their intervals"
            for name, number in several.items()
        }
        meanings = {method.name: method.meaning for method in METHODS}
        known = {name: meanings[name] for name in names if name in meanings} | means
        return known | {
            score.heading: score.meaning
            for score in self.scores.values()
            if score.name in used and (score.table or score.by_lead_time)
        }


# ---- tables ---------------------------------------------------------------------------------


# value of the pivoted column -> name and meaning of its table column
Heads = Mapping[Any, tuple[str, str]]


@dataclass(frozen=True)
class Cell:
    """A formatted value and its formatted interval; empty where there is none."""

    value: str = ""
    interval: str = ""


@dataclass(frozen=True)
class Table:
    """A table with one line per method.

    Attributes:
        caption: text above the table.
        heads: (name, meaning) of the columns.
        lines: method -> cells.
        reasons: method without cells -> reason.
    """

    caption: str
    heads: list[tuple[str, str]]
    lines: dict[str, list[Cell]]
    reasons: dict[str, str]

    @classmethod
    def of(
        cls,
        rows: DataFrame,
        across: str,
        heads: Heads,
        caption: str,
        reasons: Mapping[str, str] | None = None,
    ) -> "Table":
        """Lay out rows; ``reasons`` maps methods without rows to the reason."""
        reasons = reasons or {}
        table = pivot(rows, across, heads, reasons)
        lines = {
            method: [_cell(row, intervals=across != "shell") for row in cells]
            for method, cells in zip(table.index, table.to_numpy(), strict=True)
        }
        empty = {method for method, cells in lines.items() if not any(c.value for c in cells)}
        return cls(
            caption, [*heads.values()], lines, {m: r for m, r in reasons.items() if m in empty}
        )


def _cell(row, intervals: bool) -> Cell:
    if row is None:
        return Cell()
    if row.score in DIFFERENCES:
        return _difference(row)
    value, low, high = (format_value(row.score, edge) for edge in (row.value, row.low, row.high))
    bounded = intervals and not isna(row.low) and not isna(row.high)
    return Cell(value, f"{low} – {high}" if bounded and not low == value == high else "")


def _difference(row) -> Cell:
    """Format a paired difference in per cent with the verdict of its interval."""
    if math.isinf(row.value):
        return Cell(f"diverged, {WORSE}")
    value, low, high = (f"{100 * edge:+.2g}" for edge in (row.value, row.low, row.high))
    interval = "" if isna(row.low) or isna(row.high) else f"{low} – {high}"
    return Cell(f"{value} %, {verdict(row.low, row.high)}", interval)


def _floor(rows: DataFrame) -> str:
    """Describe the least possible error, from the exact law; "" if that is not known."""
    floor = find(rows, method="oracle", score="floor")
    if floor is None:
        return ""
    realised = find(rows, method="oracle", score="floor_realised")
    text = (
        "Least possible relative error of a predicted mean, from the exact law and these data: "
        f"σ/rms(U) = {format_value('floor', floor.value)}"
    )
    if realised is not None:
        text += f" ({realised.value:.3g} with the noise realised in these snapshots)"
    return f"{text}; a single sample of the exact law has {floor.value * math.sqrt(2):.3g}."
