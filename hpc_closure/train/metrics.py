"""Loss curves: metrics.csv, and the same as TensorBoard events.

Each step that reports has a row. The CSV file is authoritative: on resuming, rows after the
restored step are dropped and the events are written again from it, so no step appears twice.
"""

import csv
import io
import math
from pathlib import Path

from hpc_closure.work import atomic

FIRST = ("step", "phase", "loss", "lr", "seconds", "train_loss", "valid_loss")


class Metrics:
    """Rows of numbers keyed by step.

    Args:
        path: the CSV file.
        tensorboard: folder of the event files; None = none.
        restored: steps already done; later rows are dropped.
    """

    def __init__(self, path: Path, tensorboard: Path | None = None, restored: int = 0):
        self.path = Path(path)
        self.columns = list(FIRST)
        rows = [row for row in read(self.path) if row["step"] <= restored] if restored else []
        for row in rows:
            self._admit(row)
        self.last = max((int(row["step"]) for row in rows), default=-1)
        self._rewrite(rows)
        self._events = _events(tensorboard)
        for row in rows:
            self._event(row)

    def _admit(self, row: dict) -> bool:
        """Add columns for new keys of a row; returns whether there were any."""
        fresh = [key for key in row if key not in self.columns]
        self.columns += fresh
        return bool(fresh)

    def _rewrite(self, rows: list[dict]) -> None:
        atomic.write_text(self.path, self._text([dict(zip(self.columns, self.columns)), *rows]))

    def _text(self, rows: list[dict]) -> str:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self.columns, restval="", lineterminator="\n")
        writer.writerows([{key: _text(value) for key, value in row.items()} for row in rows])
        return buffer.getvalue()

    def write(self, row: dict) -> None:
        """Add a row. Raises ValueError unless its ``step`` is later than all before."""
        if row["step"] <= self.last:
            raise ValueError(f"step {row['step']} after step {self.last} in {self.path}")
        self.last = row["step"]
        if self._admit(row):
            self._rewrite([*read(self.path), row])
        else:
            with atomic.disk_errors(self.path), open(self.path, "a", encoding="utf-8") as stream:
                stream.write(self._text([row]))
        self._event(row)

    def _event(self, row: dict) -> None:
        if self._events is None:
            return
        for key, value in row.items():
            if key not in ("step", "phase") and isinstance(value, (int, float)):
                self._events.add_scalar(key, value, int(row["step"]))

    def flush(self) -> None:
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


def _text(value) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _events(folder: Path | None):
    """Create a TensorBoard writer; None if TensorBoard is not installed or ``folder`` is None."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    for old in Path(folder).glob("events.out.tfevents.*"):
        atomic.remove(old)
    return SummaryWriter(str(folder), max_queue=1000)


def read(path: Path) -> list[dict]:
    """Read the rows of a metrics.csv: numbers by column, ``phase`` as text, without empty cells.

    Incomplete lines and lines that are not rows of the table are skipped. Without a file there are
    no rows.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    complete = text[: text.rfind("\n") + 1]
    rows = []
    for values in csv.DictReader(io.StringIO(complete)):
        if None in values or None in values.values():
            continue
        try:
            row = {key: _value(key, text) for key, text in values.items() if text != ""}
        except ValueError:
            continue
        if isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _value(column: str, text: str) -> str | int | float:
    """Parse a cell. Raises ValueError for an invalid number."""
    if column == "phase":
        return text
    if column == "step":
        return int(text)
    value = float(text)
    return value if math.isfinite(value) else math.nan
