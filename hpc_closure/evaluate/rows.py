"""Score rows in long form: the contract between ``evaluate`` and everybody who reads its numbers.

Rows are a pandas data frame, one number a row, an empty cell where a column does not apply:

    stage        ``generated`` (samples of the closure) or ``coupled`` (the closure in the solver)
    closure      target, e.g. ``diffusion``
    method       ``model``, ``oracle``, ``none``, others
    grid         points per side
    lead_time    time since the start of the coupled run
    shell        integer wavenumber shell; empty = in total
    score        name of the score
    value        its value; infinite where the run diverged
    low, high    ends of the 95 % interval
    sensors      layout of the sensors in words, ``none`` without
    evaluations  of the score network per closure sample; 0 where it is switched off
    interval     solver steps that one closure sample stands for
    members      ensemble size
    samples      snapshots (generated) or cases (coupled) averaged over
    split        part of the data, e.g. ``test``
    seeds        trainings that the row is the mean of; then low and high are their range, of
                 differences that of their intervals; empty = one

``docs/scores.md`` lists the scores and the methods; it is made from their records,
:class:`~hpc_closure.evaluate.scores.record.Score` and
:class:`~hpc_closure.experiment.method_names.Method`.

What could not be scored at all (no exact law, no sensors) stands beside the rows as notes with
reasons, see :class:`Absent`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pandas import DataFrame

from hpc_closure.experiment.method_names import METHODS
from hpc_closure.work.atomic import write_json, write_text

COLUMNS = {
    "stage": "str",
    "closure": "str",
    "method": "str",
    "grid": "Int64",
    "lead_time": "float64",
    "shell": "Int64",
    "score": "str",
    "value": "float64",
    "low": "float64",
    "high": "float64",
    "sensors": "str",
    "evaluations": "Int64",
    "interval": "Int64",
    "members": "Int64",
    "samples": "Int64",
    "split": "str",
    "seeds": "Int64",
}
DEFAULTS = {"sensors": "none", "split": "test"}

RUNG = "rung_"  # bare solvers on finer grids, printed before "none"
# after it the number of one of several trainings that are shown as one row
MARK = "#"


@dataclass(frozen=True)
class Absent:
    """A method that has no rows, and why (printed under the tables).

    ``sensors`` names the layout it is lacking for; None = for all.
    """

    stage: str
    closure: str
    method: str
    reason: str
    sensors: str | None = None


def frame(records: Iterable[Mapping[str, Any]]) -> DataFrame:
    """Rows from dictionaries of columns; numbers may be tensors or numpy scalars."""
    rows = [{**DEFAULTS, **record} for record in records]
    unknown = {name for row in rows for name in row} - set(COLUMNS)
    _refuse(unknown)
    return DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def select(rows: DataFrame, **columns: Any) -> DataFrame:
    """Rows whose columns equal the given values, None for empty: ``select(rows, shell=None)``."""
    _refuse(set(columns) - set(COLUMNS))
    for name, value in columns.items():
        rows = rows[rows[name].isna() if value is None else rows[name] == value]
    return rows


def find(rows: DataFrame, **columns: Any):
    """The single row with these columns as a named tuple, or None.

    Raises:
        ValueError: several rows have them.
    """
    matching = select(rows, **columns)
    if len(matching) > 1:
        raise ValueError(f"{len(matching)} rows have {columns}; name more columns")
    return next(matching.itertuples(index=False), None)


def _refuse(unknown: set[str]) -> None:
    if unknown:
        raise ValueError(f"no column {sorted(unknown)}; the columns are {', '.join(COLUMNS)}")


def write(
    folder: Path, rows: DataFrame, absent: Iterable[Absent], provenance: Mapping[str, Any]
) -> None:
    """Write ``scores.csv`` and ``scores.json`` into ``folder``; each is whole or absent.

    ``provenance`` goes into ``scores.json``, for who wants to know what the scores are of.
    """
    write_text(folder / "scores.csv", rows.to_csv(index=False, lineterminator="\n"))
    plain = rows.astype(object).where(rows.notna(), None).to_dict("records")
    document = {
        "provenance": dict(provenance),
        "columns": list(COLUMNS),
        "rows": [{name: _to_json(value) for name, value in row.items()} for row in plain],
        "absent": [asdict(note) for note in absent],
    }
    write_json(folder / "scores.json", document)


def _to_json(value: Any) -> Any:
    """JSON has no infinity: it is written as the word that ``float`` reads."""
    return str(value) if isinstance(value, float) and math.isinf(value) else value


# ---- printing -------------------------------------------------------------------------------


def sort_methods(names: Iterable[str]) -> list[str]:
    """Sort names as METHODS are, further closures after the opponents, rungs before ``none``."""
    order = [method.name for method in METHODS]

    def position(name: str) -> float:
        if name in order:
            return order.index(name)
        if name.startswith("oracle"):
            return order.index("oracle") + 0.5
        return order.index("none" if name.startswith(RUNG) else "mean_gp") - 0.5

    return sorted(dict.fromkeys(names), key=position)


def format_value(score: str, value: float | None) -> str:
    """Three significant digits; p-values and diverged runs in words."""
    if value is None or math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "diverged"
    if score == "rank_p":
        return "< 1e-6" if value < 1e-6 else f"{value:.2g}"
    if value == 0:
        return "0"
    value = float(f"{value:.3g}")
    size = abs(value)
    if size < 1e-3 or size >= 1e5:
        return f"{value:.2e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"


def pivot(
    rows: DataFrame, across: str = "score", order: Iterable | None = None, also: Iterable = ()
) -> DataFrame:
    """Rows laid out for printing: methods down, another column's values across.

    Args:
        rows: narrowed with :func:`select` until each cell holds one row.
        across: the column.
        order: its values, in this order; None = as they appear.
        also: further methods, which get an empty line.

    Returns:
        Cells are named tuples of a row, or None.

    Raises:
        ValueError: several rows for one cell.
    """
    cells = DataFrame(
        {
            "method": rows["method"],
            "across": rows[across],
            "cell": list(rows.itertuples(index=False)),
        }
    )
    table = cells.pivot(index="method", columns="across", values="cell")
    order = rows[across].unique() if order is None else order
    table = table.reindex(index=sort_methods([*rows["method"], *also]), columns=list(order))
    return table.astype(object).where(table.notna(), None)
