"""Score rows in long form: the format of ``scores.csv`` and of every table computed from it.

Rows are a pandas data frame with one number per row. A cell is empty where a column does not
apply:

    stage        ``generated`` (samples of the closure) or ``coupled`` (the closure in the solver)
    closure      target, e.g. ``diffusion``
    method       ``model``, ``oracle``, ``none``, others
    grid         points per side; of the last side if sides have different numbers
    lead_time    time since the start of the coupled run
    shell        integer wavenumber shell; empty = all shells
    score        name of the score
    value        its value; infinite if the run diverged
    low, high    ends of the 95 % interval
    sensors      sensor layout in words, ``none`` without sensors
    evaluations  evaluations of the score network per closure sample; 0 if it is switched off
    interval     number of solver steps for which a closure sample is held
    members      ensemble size
    samples      number of snapshots (generated) or cases (coupled) in the mean
    split        part of the data, e.g. ``test``
    seeds        number of trainings that are averaged; low and high are then the range of their
                 values, or for differences the range of their intervals; empty = one training
    channel      field of the state, e.g. ``q_upper``; empty for a state of one field, and for
                 scores of all channels together; FIRST-SECOND for scores of a pair of them

``docs/scores.md`` lists scores and methods. It is generated from their records,
:class:`~hpc_closure.evaluate.scores.record.Score` and
:class:`~hpc_closure.experiment.method_names.Method`.

A method that could not be scored (no exact law, no sensors) has a note with the reason instead,
see :class:`Absent`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pandas import DataFrame, read_csv

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
    "channel": "str",
}
# scores that have another name in files of the previous release, by that name
RENAMED = {
    "brought_back": "rescaled_share",
    "brought_back_expected": "rescaled_share_expected",
    "pzf_mean": "l2_mean",
    "pzf_residual": "l2_residual",
    "pzf_spread": "variance_ratio",
    "pzf_total": "l2_total",
    "rank_sees": "rank_power",
    "spread_calm": "spread_low_variance",
    "spread_ratio_calm": "spread_ratio_low_variance",
    "spread_ratio_highest": "spread_ratio_max_shell",
    "spread_ratio_lowest": "spread_ratio_min_shell",
    "spread_ratio_wild": "spread_ratio_high_variance",
    "spread_wild": "spread_high_variance",
    "variance_wild_calm": "variance_high_over_low",
    "work_energy": "energy_transfer_ratio",
    "work_energy_distance": "energy_transfer_distance",
    "work_enstrophy": "enstrophy_transfer_ratio",
    "work_enstrophy_distance": "enstrophy_transfer_distance",
}
DEFAULTS = {"sensors": "none", "split": "test"}

RUNG = "rung_"  # prefix of bare solvers on finer grids, printed before "none"
MARK = "#"  # precedes the number of a training in a method name of ``evaluate.seeds``


@dataclass(frozen=True)
class Absent:
    """A method without rows and the reason, printed under the tables.

    ``sensors`` is the layout for which the rows are missing; None = all layouts.
    """

    stage: str
    closure: str
    method: str
    reason: str
    sensors: str | None = None


def frame(records: Iterable[Mapping[str, Any]]) -> DataFrame:
    """Build rows from dictionaries of columns; numbers may be tensors or numpy scalars."""
    rows = [{**DEFAULTS, **record} for record in records]
    for row in rows:
        row["grid"] = of_last_side(row.get("grid"))
    unknown = {name for row in rows for name in row} - set(COLUMNS)
    _refuse(unknown)
    return DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def of_last_side(grid: Any) -> Any:
    """Return the points of the last side: ``grid`` itself, or its last entry if it is a tuple."""
    return grid[-1] if isinstance(grid, tuple) else grid


def select(rows: DataFrame, **columns: Any) -> DataFrame:
    """Select the rows whose columns have these values; None selects empty cells."""
    _refuse(set(columns) - set(COLUMNS))
    for name, value in columns.items():
        value = of_last_side(value) if name == "grid" else value
        rows = rows[rows[name].isna() if value is None else rows[name] == value]
    return rows


def find(rows: DataFrame, **columns: Any):
    """Return the single row with these columns as a named tuple, or None.

    Raises:
        ValueError: several rows match.
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
    """Write ``scores.csv`` and ``scores.json`` into ``folder``, each atomically.

    ``provenance`` is stored in ``scores.json``: settings, versions and inputs of the scores.
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


def read(path: Path) -> DataFrame:
    """Read the rows of a ``scores.csv``; scores with names of the previous release are renamed.

    Files of the previous release have no column ``channel``; it is empty.
    """
    rows = read_csv(path, dtype=COLUMNS, keep_default_na=False, na_values="")
    if "channel" not in rows:
        rows = rows.reindex(columns=list(COLUMNS)).astype(COLUMNS)
    return rows.assign(score=rows["score"].replace(RENAMED))


def _to_json(value: Any) -> Any:
    """Convert infinity, which JSON lacks, to the string that ``float`` reads back."""
    return str(value) if isinstance(value, float) and math.isinf(value) else value


# ---- printing -------------------------------------------------------------------------------


def sort_methods(names: Iterable[str]) -> list[str]:
    """Sort method names as in METHODS; other closures after the opponents, rungs before none."""
    order = [method.name for method in METHODS]

    def position(name: str) -> float:
        if name in order:
            return order.index(name)
        if name.startswith("oracle"):
            return order.index("oracle") + 0.5
        return order.index("none" if name.startswith(RUNG) else "mean_gp") - 0.5

    return sorted(dict.fromkeys(names), key=position)


def points_in_words(grid: Any, dimensions: int) -> str:
    """Write points per side as ``24 points`` of a line, 64², 32³, or 48 x 24 of a tuple."""
    if isinstance(grid, tuple):
        return " x ".join(map(str, grid))
    return f"{grid}{ {1: ' points', 2: '²', 3: '³'}[dimensions]}"


def format_value(score: str, value: float | None) -> str:
    """Format with three significant digits; p-values and diverged runs in words."""
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
    """Pivot rows for printing: one line per method, one column per value of ``across``.

    Args:
        rows: narrowed with :func:`select` until each cell holds one row.
        across: column whose values become columns of the table.
        order: order of these values; None = order of appearance.
        also: further methods, which get an empty line.

    Returns:
        A table of rows as named tuples; None where a row is missing.

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
