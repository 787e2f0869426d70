"""The report: one HTML file that needs nothing else, not even the network.

Everything in it is computed from the rows, the figures and the plain data handed in. Images are
inlined, there is no script, and both light and dark displays are served.
"""

import base64
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_closure.evaluate.page import PAGE, STYLE
from hpc_closure.evaluate.rows import (
    GRANTED,
    MODELS,
    Absent,
    Pivot,
    Row,
    Rows,
    format_value,
    pivot,
)
from hpc_closure.evaluate.summary import describe, groups, headlines
from hpc_closure.work.atomic import write_text

# score -> heading, meaning; the order of the columns
SCORES = {
    "relative_error": (
        "error of one sample",
        "‖x − y‖ / ‖y‖ of one member, averaged over members and snapshots (the published figure)",
    ),
    "relative_error_mean": ("error of the mean", "the same of the ensemble mean"),
    "crps": (
        "CRPS",
        "fair continuous ranked probability score; for a point forecast the mean absolute error",
    ),
    "crps_ratio": (
        "CRPS ratio",
        "CRPS over that of the exact law (or true ensemble); 1 is the best possible",
    ),
    "energy_score": ("energy score", "fair energy score: like the CRPS, of whole fields"),
    "spread": ("spread", "root of the mean unbiased variance over members"),
    "spread_ratio": (
        "spread ratio",
        "spread over that of the exact law (or true ensemble); 1 is right",
    ),
    "spread_skill": (
        "spread / skill",
        "spread over error of the ensemble mean, finite ensemble size corrected; 1 is calibrated",
    ),
    "bias2_ratio": (
        "bias² / floor",
        "squared bias of the mean (ensemble size and realised noise taken off) over the noise",
    ),
    "coverage_90": ("90 % coverage", "share of points inside the central 90 % interval"),
    "rank_p": (
        "rank p",
        "p-value of the rank histogram of whitened modes (or of one pixel per field); a small one "
        "means not calibrated",
    ),
    "energy_ratio": ("power ratio", "mean square of a member over that of the truth"),
    "diverged": ("diverged", "share of members with values that are not finite"),
    "valid_time": ("valid time", "time at which the ensemble mean's relative error reaches 0.5"),
    "wasserstein1": (
        "W₁",
        "Wasserstein-1 distance of pointwise vorticity to the truth's, in standard deviations",
    ),
    "probability": ("probability", "share of members in which the event asked for happened"),
    "members_needed": (
        "members needed",
        "ensemble size that would give the probability to the tolerance asked for",
    ),
    "cost_ms": ("cost [ms]", "wall time of one closure sample, or of one member and solver step"),
    "cost_ratio": ("cost ratio", "cost over that of the bare solver"),
}
TABLES = {
    "Accuracy and cost": (
        "relative_error",
        "relative_error_mean",
        "crps",
        "energy_score",
        "valid_time",
        "wasserstein1",
        "diverged",
        "cost_ms",
        "cost_ratio",
    ),
    "The event asked for": ("probability", "members_needed"),
    "Calibration": (
        "crps_ratio",
        "spread",
        "spread_ratio",
        "spread_skill",
        "bias2_ratio",
        "coverage_90",
        "rank_p",
        "energy_ratio",
    ),
}
METHODS = {
    "model": "the trained closure",
    GRANTED: "the trained closure, granted an estimate of the closure (conditions.physics)",
    "oracle": "draws of the exact law; in the coupled run the full system with other noise, with "
    "sensors the reduced solver with draws of the exact law given what they read",
    "oracle_x0.95": "the exact law with its spread shrunk to 95 %: a control that must fail",
    "physics": "the known term granted, no network",
    "fourier": "periodic Fourier interpolation of the sensors alone",
    "climatology": "random states of the training members",
    "none": "no closure",
}


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        section: ``generated``, ``coupled``, ``training`` or ``cost``.
        png: its file.
        caption: what it shows.
    """

    section: str
    png: Path
    caption: str


def write_report(
    path: str | Path,
    rows: Rows,
    *,
    title: str,
    summary: Mapping[str, Mapping[str, Any]],
    pictures: Sequence[Picture] = (),
    provenance: Mapping[str, Any] | Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    start: float | None = None,
    lead_times: Sequence[float] | None = None,
) -> Path:
    """Write the report.

    Args:
        path: ``report.html``.
        rows: all score rows, with the methods that do not apply.
        title: name of the run.
        summary: heading -> facts on what was run.
        pictures: figures in order.
        provenance: plain data, printed as it is.
        notes: sentences a reader must know, e.g. that fewer members than planned were there.
        start: time at which the coupled runs start.
        lead_times: those to print; None = up to six of those scored.
    """
    by_section: dict[str, list[str]] = {}
    for picture in pictures:
        by_section.setdefault(picture.section, []).append(_figure(picture))
    parts = [
        _section("headlines", "Headlines", _list(headlines(rows, start), "No model was scored.")),
        _section("run", "What was run", _summary(summary) + _list(notes, "", "notes")),
        _section("generated", "Generated closure", _generated(rows), by_section),
        _section("coupled", "Coupled run", _coupled(rows, lead_times), by_section),
        _section("training", "Training", "", by_section),
        _section("cost", "Cost", "", by_section),
        _section("words", "Methods and scores", _glossary(rows)),
        _section("provenance", "Provenance", _provenance(provenance)),
    ]
    kept = [(name, heading, body) for name, heading, body in parts if body]
    links = " ".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in kept)
    sections = "\n".join(
        f'<section id="{name}"><h2>{heading}</h2>\n{body}\n</section>'
        for name, heading, body in kept
    )
    page = PAGE.format(title=_escape(title), style=STYLE, links=links, sections=sections)
    write_text(path, page)
    return Path(path)


def _escape(value: Any) -> str:
    return html.escape(str(value))


def _section(name: str, heading: str, body: str, figures: Mapping | None = None):
    return name, heading, body + "".join((figures or {}).get(name, []))


def _list(items: Iterable[str], otherwise: str, kind: str = "headlines") -> str:
    lines = "".join(f"<li>{_escape(item)}</li>" for item in items)
    return f'<ul class="{kind}">{lines}</ul>' if lines else f"<p>{otherwise}</p>" * bool(otherwise)


def _figure(picture: Picture) -> str:
    image = Path(picture.png).read_bytes()
    data = base64.b64encode(image).decode()
    width = int.from_bytes(image[16:20], "big") // 2  # of the PNG header; letters of one size
    caption = _escape(picture.caption)
    return (
        f'<figure><img alt="{caption}" style="--w: {width}px" '
        f'src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _summary(summary: Mapping[str, Mapping[str, Any]]) -> str:
    blocks = []
    for heading, facts in summary.items():
        lines = "".join(
            f"<dt>{_escape(key)}</dt><dd>{_escape(value)}</dd>" for key, value in facts.items()
        )
        blocks.append(f"<div><h3>{_escape(heading)}</h3><dl>{lines}</dl></div>")
    return f'<div class="facts">{"".join(blocks)}</div>' if blocks else ""


# ---- tables ---------------------------------------------------------------------------------


def _generated(rows: Rows) -> str:
    parts = []
    for columns, group in groups(rows, "generated"):
        total = group.where(shell=None)
        first = next(iter(total))
        parts.append(f"<h3>{_escape(describe(columns).capitalize())}</h3>")
        parts.append(
            f'<p class="note">Target of {columns["interval"] or 1} solver step(s); '
            f"{first.samples} snapshots of the {columns['split']} members.</p>"
        )
        parts += _score_tables(
            total, [n for n in rows.absent if _belongs(n, columns, "generated")]
        )
        floor = total.find(method="oracle", score="floor")
        if floor is not None:
            parts.append(_floor(total, floor))
        parts.append(_shells(group))
    return "\n".join(parts)


def _belongs(note: Absent, columns: dict, stage: str) -> bool:
    same = note.stage == stage and note.closure == columns["closure"]
    return same and note.sensors in (None, columns["sensors"])


def _score_tables(rows: Rows, absent: Sequence[Absent]) -> list[str]:
    """Accuracy and calibration apart; a score that says nothing (nobody diverged) is left out."""
    parts: list[str] = []
    for caption, names in TABLES.items():
        kept = [row for row in rows if row.score in names]
        if all(row.value == 0 for row in kept if row.score == "diverged"):
            kept = [row for row in kept if row.score != "diverged"]
        if kept:
            scored = {row.score for row in kept}
            shown = Rows(kept, list(absent))
            table = pivot(shown, order=[name for name in names if name in scored])
            parts.append(_table(table, caption, absent if not parts else ()))
    return parts


def _floor(rows: Rows, floor: Row) -> str:
    realised = rows.find(method="oracle", score="floor_realised")
    text = (
        "Best possible relative error of any mean, from the exact law and these data: σ/rms(U) = "
        f"{format_value('floor', floor.value)}"
    )
    if realised is not None:
        text += f" (with the noise that these snapshots realised: {realised.value:.3g})"
    best = floor.value * math.sqrt(2)
    return f'<p class="note">{text}; of a perfect single sample {best:.3g}.</p>'


def _shells(rows: Rows) -> str:
    kept = [row for row in rows.where(score="spread_ratio") if row.shell is not None]
    if not kept:
        return ""
    table = pivot(Rows(kept), columns="shell", order=sorted({row.shell for row in kept}))
    return _details("Spread ratio per wavenumber shell", _table(table, "", (), plain=True))


def _coupled(rows: Rows, lead_times: Sequence[float] | None) -> str:
    parts = []
    for columns, group in groups(rows, "coupled"):
        total = group.where(shell=None)
        times = sorted({row.lead_time for row in total if row.lead_time})
        if not times:
            continue
        shown = [time for time in lead_times or times if time in times] or times
        if len(shown) > 6:
            shown = [shown[round(i * (len(shown) - 1) / 5)] for i in range(6)]
        first = next((row for row in total if row.method in MODELS), None)
        parts.append(f"<h3>{_escape(describe(columns).capitalize())}</h3>")
        parts.append(
            f'<p class="note">Closure called every {columns["interval"]} solver step(s)'
            + (f"; {first.members} members, {first.samples} start(s)" if first else "")
            + ".</p>"
        )
        absent = [note for note in rows.absent if _belongs(note, columns, "coupled")]
        for score in ("relative_error_mean", "relative_error", "spread_ratio", "spread_skill"):
            part = Rows([r for r in total.where(score=score) if r.lead_time in shown])
            if not len(part):
                continue
            heading = f"{SCORES[score][0]}, by lead time"
            if score == "relative_error_mean":
                part.absent = absent
                table = pivot(part, columns="lead_time", order=shown)
                parts.append(_table(table, heading.capitalize(), absent))
            else:
                table = pivot(part, columns="lead_time", order=shown)
                parts.append(_details(heading.capitalize(), _table(table, "", ())))
        asked = TABLES["The event asked for"]
        last = Rows([r for r in total if r.lead_time in (None, times[-1]) or r.score in asked])
        parts.append(f'<p class="note">At the last lead time, {times[-1]:g}:</p>')
        parts += _score_tables(last, ())
    return "\n".join(parts)


def _details(heading: str, body: str) -> str:
    return f"<details><summary>{heading}</summary>{body}</details>"


def _table(table: Pivot, caption: str, absent: Sequence[Absent], plain: bool = False) -> str:
    """A table whose first column stays in view; intervals under the values unless ``plain``."""
    heads = []
    for column in table.columns:
        name, meaning = SCORES.get(column, (_number(column), ""))
        heads.append(f'<th scope="col" title="{_escape(meaning)}">{_escape(name)}</th>')
    reasons = {note.method: note.reason for note in absent}
    lines = []
    for method, cells in zip(table.index, table.cells, strict=True):
        mark = "*" if method in reasons and not any(cells) else ""
        kind = ' class="model"' if method in MODELS else ""
        values = "".join(_cell(cell, plain) for cell in cells)
        lines.append(f'<tr{kind}><th scope="row">{_escape(method)}{mark}</th>{values}</tr>')
    missing = "".join(
        f'<p class="note">* {_escape(method)}: {_escape(reason)}</p>'
        for method, reason in reasons.items()
        if method in table.index and not any(table.cells[table.index.index(method)])
    )
    return (
        f'<div class="table"><table><caption>{_escape(caption)}</caption><thead><tr><th></th>'
        f"{''.join(heads)}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>{missing}"
    )


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(row: Row | None, plain: bool) -> str:
    if row is None:
        return '<td class="absent">n/a</td>'
    value = _escape(format_value(row.score, row.value))
    if row.low is None or row.high is None or plain:
        return f"<td>{value}</td>"
    low, high = (format_value(row.score, edge) for edge in (row.low, row.high))
    if low == value == high:
        return f"<td>{value}</td>"
    return f"<td>{value}<small>{_escape(low)} – {_escape(high)}</small></td>"


# ---- words ----------------------------------------------------------------------------------


def _glossary(rows: Rows) -> str:
    used = set(rows.distinct("score"))
    methods = [*rows.distinct("method"), *(note.method for note in rows.absent)]
    lines = [(m, METHODS[m]) for m in dict.fromkeys(methods) if m in METHODS]
    lines += [(name, text) for score, (name, text) in SCORES.items() if score in used]
    facts = "".join(f"<dt>{_escape(k)}</dt><dd>{_escape(v)}</dd>" for k, v in lines)
    absent = [f"{n.stage}, {n.closure}: no row {n.method}, {n.reason}." for n in rows.absent]
    return (
        f'<dl class="words">{facts}</dl><p class="note">Small figures under a value: 95 % '
        "interval by bootstrap over trajectories (generated) or starts (coupled). n/a: does not "
        "apply.</p>" + _list(absent, "", "notes")
    )


def _provenance(provenance: Any) -> str:
    if not provenance:
        return ""
    text = json.dumps(provenance, indent=1, default=str, ensure_ascii=False)
    return _details("Versions, hashes, host, times", f"<pre>{_escape(text)}</pre>")
