"""What the numbers of a run say, in sentences; nothing here is written by hand for one run.

The model is always named together with what it has to be measured against: the exact law where
there is one, and the best answer that needs no network.
"""

import math
from collections.abc import Iterator

from hpc_closure.evaluate.rows import GRANTED, MODELS, Row, Rows, format_value

PASS = 0.01  # p-value below which a rank histogram fails
NAMES = {
    "model": "the model",
    GRANTED: "the model, granted an estimate of the closure",
    "oracle": "the exact law",
    "physics": "the granted physics",
    "fourier": "Fourier interpolation of the sensors alone",
    "climatology": "climatology",
    "none": "no closure",
}
GROUP = ("closure", "sensors", "grid", "interval", "split")


def groups(rows: Rows, stage: str) -> Iterator[tuple[dict, Rows]]:
    """Rows of one stage that belong into one table: equal closure, sensors, grid, interval."""
    kept = rows.where(stage=stage)
    keys = dict.fromkeys(tuple(getattr(row, name) for name in GROUP) for row in kept)
    for key in keys:
        columns = dict(zip(GROUP, key, strict=True))
        yield columns, kept.where(**columns)


def describe(columns: dict) -> str:
    """A group in words: ``diffusion, no sensors, 64² grid``."""
    sensors = columns["sensors"]
    parts = [
        str(columns["closure"]),
        "no sensors" if sensors == "none" else f"sensors: {sensors}",
        f"{columns['grid']}² grid",
    ]
    return ", ".join(parts)


def headlines(rows: Rows, start: float | None = None) -> list[str]:
    """Sentences on every group that has a model.

    Args:
        rows: all rows of the run.
        start: time at which the coupled runs start.
    """
    sentences = []
    for columns, group in groups(rows, "generated"):
        sentences.append(_generated_error(columns, group))
        if _model(group) != GRANTED:  # what was granted certifies nothing
            sentences.append(_calibration(columns, group))
    for columns, group in groups(rows, "coupled"):
        sentences += [_coupled_error(columns, group, start), _coupled_spread(columns, group)]
        sentences.append(_event(columns, group))
    return [sentence for sentence in sentences if sentence]


def _value(rows: Rows, method: str, score: str, lead_time: float | None = None) -> Row | None:
    return rows.find(method=method, score=score, shell=None, lead_time=lead_time)


def _model(rows: Rows) -> str:
    """The name of the trained closure in these rows."""
    return GRANTED if any(row.method == GRANTED for row in rows) else "model"


def _say(row: Row) -> str:
    text = format_value(row.score, row.value)
    if row.low is not None and row.high is not None:
        low, high = format_value(row.score, row.low), format_value(row.score, row.high)
        text += f" [{low}, {high}]"
    return text


def _others(rows: Rows, score: str, lead_time: float | None = None) -> str:
    """The same score of the methods that a reader compares with."""
    names = [name for name in NAMES if name not in MODELS]
    found = [(name, _value(rows, name, score, lead_time)) for name in names]
    return ", ".join(
        f"{NAMES[name]} {format_value(score, row.value)}" for name, row in found if row is not None
    )


def _generated_error(columns: dict, rows: Rows) -> str:
    row = _value(rows, _model(rows), "relative_error")
    if row is None:
        return ""
    effort = ""
    if row.evaluations is not None:
        effort = f" with {row.evaluations or 'no'} evaluation{'s' * (row.evaluations != 1)}"
        effort += " of the score network" + " (switched off)" * (not row.evaluations)
    granted = ", granted an estimate of the closure," if _model(rows) == GRANTED else ""
    text = f"{_start(columns)}: one sample{effort}{granted} is at relative error {_say(row)}"
    others = _others(rows, "relative_error")
    floor = _value(rows, "oracle", "floor")
    text += f"; {others}." if others else "."
    if floor is not None:
        text += (
            " No mean without more information can be nearer than "
            f"σ/rms(U) = {format_value('floor', floor.value)}."
        )
    return text


def _start(columns: dict) -> str:
    return f"Generated closure ({describe(columns)})"


def _calibration(columns: dict, rows: Rows) -> str:
    crps, spread = (_value(rows, _model(rows), score) for score in ("crps_ratio", "spread_ratio"))
    p = _value(rows, _model(rows), "rank_p")
    parts = []
    if crps is not None:
        parts.append(f"CRPS {_say(crps)} times the exact law's")
    if spread is not None:
        parts.append(f"spread {_say(spread)} of the exact law's")
    if not parts and (skill := _value(rows, _model(rows), "spread_skill")) is not None:
        parts.append(f"spread over skill {_say(skill)}")
    if p is not None:
        verdict = "passes" if p.value >= PASS else "fails"
        parts.append(f"the rank histogram {verdict} (p {_p(p)})")
    if not parts:
        return ""
    text = f"Calibration ({describe(columns)}): {', '.join(parts)}."
    oracle = _value(rows, "oracle", "rank_p")
    control = next((r for r in rows.where(score="rank_p") if "oracle_x" in r.method), None)
    if p is not None and oracle is not None and control is not None:
        sound = oracle.value >= PASS > control.value
        text += (
            f" In the same run the exact law has p {_p(oracle)}, and with 95\u00a0% of its "
            f"spread p {_p(control)}: this test {'can' if sound else 'could not'} tell them apart."
        )
    return text


def _p(row: Row) -> str:
    text = format_value("rank_p", row.value)
    return text if text.startswith("<") else f"= {text}"


def _last(rows: Rows, score: str) -> float | None:
    times = [row.lead_time for row in rows.where(method=_model(rows), score=score, shell=None)]
    return max((time for time in times if time is not None), default=None)


def _coupled_error(columns: dict, rows: Rows, start: float | None) -> str:
    last = _last(rows, "relative_error_mean")
    if last is None:
        return ""
    row = _value(rows, _model(rows), "relative_error_mean", last)
    none = _value(rows, "none", "relative_error_mean", last)
    assert row is not None
    when = "the end" if start is None else f"t = {start + last:g}"
    since = "" if start is None else f"start {start:g}, "
    cases = "1 start" if row.samples == 1 else f"{row.samples} starts"
    held = f"a sample held for {columns['interval']} solver steps"
    text = (
        f"Coupled run ({describe(columns)}, {held}) at {when} ({since}horizon {last:g}; "
        f"{row.members} members, {cases}): the ensemble mean is at relative error {_say(row)}"
    )
    others = _others(rows, "relative_error_mean", last)
    text += f"; {others}" if others else ""
    if none is not None and 0 < none.value < math.inf and 0 < row.value < math.inf:
        factor = none.value / row.value
        words = f"{factor:.3g} times nearer" if factor >= 1 else f"{1 / factor:.3g} times farther"
        text += f": {words} than without closure"
    return text + "."


def _coupled_spread(columns: dict, rows: Rows) -> str:
    last = _last(rows, "spread_skill")
    parts = []
    if last is not None:
        for score, words in (
            ("spread_ratio", "of the true ensemble's"),
            ("spread_skill", "of its error"),
        ):
            row = _value(rows, _model(rows), score, last)
            if row is not None:
                parts.append(f"{_say(row)} {words}")
    text = (
        f"Spread of that ensemble at the last lead time: {' and '.join(parts)}." if parts else ""
    )
    cost, ratio = (_value(rows, _model(rows), score) for score in ("cost_ms", "cost_ratio"))
    if cost is not None:
        text += f" A member step costs {format_value('cost_ms', cost.value)} ms"
        if ratio is not None:
            text += f", {format_value('cost_ratio', ratio.value)} times the bare solver"
        text += "."
    return text.strip()


def _event(columns: dict, rows: Rows) -> str:
    row = next(iter(rows.where(method=_model(rows), score="probability")), None)
    if row is None:
        return ""
    text = (
        f"The event asked for ({describe(columns)}, lead time {row.lead_time:g}) has probability "
        f"{_say(row)} by {row.members} members"
    )
    others = _others(rows, "probability", row.lead_time)
    text += f"; {others}" if others else ""
    needed = _value(rows, _model(rows), "members_needed", row.lead_time)
    if needed is not None:
        text += f". {needed.value:.0f} members would give it to the tolerance asked for"
    return text + "."
