"""Score rows in long form: the contract between ``evaluate`` and everybody who reads its numbers.

One row is one number: which stage, closure and method, on which grid, at which lead time, in which
wavenumber shell, under which score. An empty field means "does not apply". What could not be
scored at all (no exact law, no sensors) is kept beside the rows with its reason.
"""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hpc_closure.work.atomic import read_json, write_json, write_text

# the order in which methods are printed; further names come after "model"
METHODS = ("model", "oracle", "physics", "fourier", "climatology", "none")
# the model's name where conditions.physics grants it an estimate of the closure
GRANTED = "model+physics"
MODELS = ("model", GRANTED)


@dataclass(frozen=True)
class Row:
    """One number of an evaluation; None where a column does not apply.

    Attributes:
        stage: ``generated`` (samples of the closure) or ``coupled`` (the closure in the solver).
        closure: target, e.g. ``diffusion``.
        method: ``model``, ``none``, ``fourier``, ``oracle``, ``physics``, ``climatology``, others.
        grid: points per side.
        lead_time: time since the start of the coupled run.
        shell: integer wavenumber shell; None = in total.
        score: name of the score.
        value: its value; infinite where the run diverged.
        low: lower end of the 95 % interval.
        high: upper end.
        sensors: layout of the sensors in words, ``none`` without.
        evaluations: of the score network per closure sample; 0 where it is switched off.
        interval: solver steps that one closure sample stands for.
        members: ensemble size.
        samples: snapshots (generated) or cases (coupled) averaged over.
        split: part of the data, e.g. ``test``.
    """

    stage: str
    closure: str
    method: str
    grid: int | None = None
    lead_time: float | None = None
    shell: int | None = None
    score: str = ""
    value: float = math.nan
    low: float | None = None
    high: float | None = None
    sensors: str = "none"
    evaluations: int | None = None
    interval: int | None = None
    members: int | None = None
    samples: int | None = None
    split: str = "test"


COLUMNS = tuple(column.name for column in fields(Row))
_INTEGERS = ("grid", "shell", "evaluations", "interval", "members", "samples")
_FLOATS = ("lead_time", "value", "low", "high")


@dataclass(frozen=True)
class Absent:
    """A method that a table lacks, and why (printed under the table).

    ``sensors`` names the layout it is lacking for; None = for all.
    """

    stage: str
    closure: str
    method: str
    reason: str
    sensors: str | None = None


@dataclass
class Rows:
    """A growing list of rows, with the methods that do not apply."""

    rows: list[Row] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, **columns: Any) -> None:
        """Append one row; numbers may be tensors or numpy scalars."""
        for name in _INTEGERS:
            if columns.get(name) is not None:
                columns[name] = int(columns[name])
        for name in _FLOATS:
            if columns.get(name) is not None:
                columns[name] = float(columns[name])
        for name in ("low", "high"):  # no interval from too few blocks
            if columns.get(name) is not None and math.isnan(columns[name]):
                columns[name] = None
        self.rows.append(Row(**columns))

    def extend(self, other: "Rows") -> None:
        self.rows.extend(other.rows)
        self.absent.extend(note for note in other.absent if note not in self.absent)

    def leave_out(
        self, stage: str, closure: str, method: str, reason: str, sensors: str | None = None
    ) -> None:
        """Note that a method has no rows, and why (see :class:`Absent`)."""
        note = Absent(stage, closure, method, reason, sensors)
        if note not in self.absent:
            self.absent.append(note)

    def where(self, **columns: Any) -> "Rows":
        """Rows whose columns equal the given values, e.g. ``where(score="crps", shell=None)``."""
        unknown = set(columns) - set(COLUMNS)
        if unknown:
            raise ValueError(f"no column {sorted(unknown)}; the columns are {', '.join(COLUMNS)}")
        kept = [
            row
            for row in self.rows
            if all(getattr(row, name) == value for name, value in columns.items())
        ]
        shared = {k: v for k, v in columns.items() if k in ("stage", "closure", "method")}
        notes = [n for n in self.absent if all(getattr(n, k) == v for k, v in shared.items())]
        return Rows(kept, notes)

    def find(self, **columns: Any) -> Row | None:
        """The single row with these columns, or None.

        Raises:
            ValueError: several rows have them.
        """
        found = self.where(**columns).rows
        if len(found) > 1:
            raise ValueError(f"{len(found)} rows have {columns}; name more columns")
        return found[0] if found else None

    def distinct(self, column: str) -> list:
        """Values of a column in order of appearance; methods in printing order."""
        values = list(dict.fromkeys(getattr(row, column) for row in self.rows))
        return sort_methods(values) if column == "method" else values

    # ---- files ------------------------------------------------------------------------------

    def write(
        self, folder: str | Path, provenance: Mapping[str, Any] | None = None
    ) -> tuple[Path, Path]:
        """Write ``scores.csv`` and ``scores.json`` into ``folder``; each is whole or absent.

        ``provenance`` goes into ``scores.json``, for who wants to know what the scores are of.
        """
        csv_path, json_path = Path(folder) / "scores.csv", Path(folder) / "scores.json"
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({k: "" if v is None else v for k, v in asdict(row).items()})
        write_text(csv_path, text.getvalue())
        document = {
            "provenance": dict(provenance or {}),
            "columns": COLUMNS,
            "rows": [{k: _to_json(v) for k, v in asdict(row).items()} for row in self.rows],
            "absent": [asdict(note) for note in self.absent],
        }
        write_json(json_path, document)
        return csv_path, json_path


def _to_json(value: Any) -> Any:
    """JSON has no NaN or infinity: they are written as the words that ``float`` reads."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _row(columns: dict[str, Any], source: Path) -> Row:
    if set(columns) != set(COLUMNS):
        raise ValueError(
            f"{source}: read the columns {', '.join(map(str, columns))}; expected "
            f"{', '.join(COLUMNS)}"
        )
    columns = {k: None if v == "" else v for k, v in columns.items()}
    for names, kind in ((_INTEGERS, int), (_FLOATS, float)):
        for name in names:
            if columns[name] is not None:
                try:
                    columns[name] = kind(columns[name])
                except ValueError:
                    raise ValueError(
                        f"{source}: {name}={columns[name]!r} is not a number"
                    ) from None
    return Row(**columns)


def read(path: str | Path) -> Rows:
    """Read ``scores.csv`` (rows only) or ``scores.json`` (with the notes on what is absent)."""
    path = Path(path)
    if path.suffix == ".json":
        document = read_json(path)
        rows = [_row(columns, path) for columns in document["rows"]]
        return Rows(rows, [Absent(**note) for note in document["absent"]])
    with path.open(newline="", encoding="utf-8") as file:
        return Rows([_row(columns, path) for columns in csv.DictReader(file)])


# ---- printing -------------------------------------------------------------------------------


def sort_methods(names: Iterable[str]) -> list[str]:
    """Model, further methods, then the references: oracle (with its controls) ... none."""

    def position(name: str) -> float:
        if name in METHODS:
            return METHODS.index(name)
        return METHODS.index("oracle" if name.startswith("oracle") else "model") + 0.5

    return sorted(names, key=position)


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


@dataclass(frozen=True)
class Pivot:
    """A table for printing: ``cells[index][column]`` is a row or None."""

    index: list
    columns: list
    cells: list[list[Row | None]]

    def text(self) -> str:
        """Plain text, columns aligned."""
        lines = [["", *map(_label, self.columns)]]
        for name, cells in zip(self.index, self.cells, strict=True):
            values = [format_value(c.score, c.value) if c else "n/a" for c in cells]
            lines.append([_label(name), *values])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = [
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            for line in lines
        ]
        return "\n".join("  ".join(line).rstrip() for line in padded)


def _label(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def pivot(
    rows: Rows, index: str = "method", columns: str = "score", order: Iterable | None = None
) -> Pivot:
    """Lay rows out with one column's values down and another's across.

    Args:
        rows: narrowed with :meth:`Rows.where` until each cell holds one row.
        index: column whose values go down; methods that are absent get an empty line.
        columns: column whose values go across.
        order: the values across, in this order; None = as they appear.
    """
    across = list(order) if order is not None else rows.distinct(columns)
    down = rows.distinct(index)
    if index == "method":
        down = sort_methods(dict.fromkeys([*down, *(note.method for note in rows.absent)]))
    table: dict[tuple, Row] = {}
    for row in rows:
        key = getattr(row, index), getattr(row, columns)
        if key in table:
            raise ValueError(f"several rows for {key}: narrow with where() first")
        table[key] = row
    cells = [[table.get((name, column)) for column in across] for name in down]
    return Pivot(down, across, cells)
