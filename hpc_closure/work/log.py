"""Logging: one logger for all ranks, and the progress of a loop.

Rank 0 logs from INFO on, the other ranks from WARNING. Each line has a time and, in a parallel
run, ``rank/size``. Everything goes to standard error; standard output is for results. Progress is
a line that is redrawn on a terminal, and a log line now and then elsewhere.
"""

import functools
import logging
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "hpc_closure"
EVERY_SECONDS = 30.0
EVERY_FRACTION = 0.1
EVERY_FRAME = 0.1  # seconds between two redraws of the progress line on a terminal
BAR = 20  # characters of the progress bar
CLEAR = "\r\x1b[K"  # go to the start of the line and clear it
_logger = logging.getLogger(NAME)


class _Formatter(logging.Formatter):
    def __init__(self, rank: int, size: int):
        super().__init__(datefmt="%Y-%m-%d %H:%M:%S")
        self.where = f" {rank}/{size}" if size > 1 else ""

    def format(self, record):
        stamp = self.formatTime(record, self.datefmt)
        level = "" if record.levelno == logging.INFO else f" {record.levelname}"
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return f"{stamp}{self.where}{level}  {text}"


class _Screen(logging.StreamHandler):
    """A stream handler; on a terminal a log line replaces the progress line."""

    def emit(self, record):
        if self.stream.closed:  # the reader has gone; the work continues
            return
        if self.stream.isatty():
            self.stream.write(CLEAR)
        super().emit(record)


class _LogFile(logging.FileHandler):
    """A log file that may be unwritable (full disk, another user's file).

    The first error is printed to standard error; the work continues.
    """

    broken = False

    def emit(self, record):
        try:
            super().emit(record)
        except OSError as error:  # the first line opens the file
            self._give_up(error)

    def handleError(self, record):
        self._give_up(sys.exc_info()[1])

    def close(self):
        try:
            super().close()
        except OSError as error:  # closing writes what is still buffered
            self._give_up(error)

    def _give_up(self, error):
        if not self.broken:
            self.broken = True
            reason = getattr(error, "strerror", None) or error
            print(f"cannot write the log {self.baseFilename}: {reason}", file=sys.stderr)


def setup(
    rank: int = 0,
    size: int = 1,
    *,
    verbosity: int = 0,
    file: Path | str | None = None,
    stream=None,
) -> logging.Logger:
    """Set up the logger of the program; a second call replaces the handlers.

    Args:
        rank, size: rank of this process and number of ranks.
        verbosity: 1 shows debug lines, -1 only warnings.
        file: file to which rank 0's lines, and the warnings of all ranks, are appended as well.
        stream: stream of the lines; by default standard error.

    Raises:
        RuntimeError: the folder of the log file cannot be made.
    """
    level = {1: logging.DEBUG, 0: logging.INFO}.get(max(-1, min(1, verbosity)), logging.WARNING)
    if rank > 0:
        level = max(level, logging.WARNING)
    _logger.setLevel(level)
    _logger.propagate = False
    for handler in list(_logger.handlers):
        _logger.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [_Screen(stream or sys.stderr)]
    if file is not None:
        log_path = Path(file)
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(_LogFile(log_path, mode="a", encoding="utf-8", delay=True))
        except OSError as error:
            raise RuntimeError(f"cannot write the log {log_path}: {error.strerror}") from error
    for handler in handlers:
        handler.setFormatter(_Formatter(rank, size))
        _logger.addHandler(handler)
    logging.captureWarnings(True)
    warnings = logging.getLogger("py.warnings")
    warnings.handlers = list(_logger.handlers) if rank == 0 else [logging.NullHandler()]
    warnings.propagate = False
    warn_once.cache_clear()
    return _logger


def get() -> logging.Logger:
    """Return the logger of the program."""
    return _logger


def path() -> Path | None:
    """Return the file that this process logs to, or None."""
    for handler in _logger.handlers:
        if isinstance(handler, logging.FileHandler):
            return Path(handler.baseFilename)
    return None


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning once per process; call it on rank 0 if it concerns all ranks."""
    _logger.warning(message)


def banner(title: str, facts: Mapping[str, Any]) -> None:
    """Log the first lines of a verb: what runs, and the facts that explain a failure.

    Args:
        title: the verb and the run.
        facts: a record of :func:`hpc_closure.work.provenance.collect` and entries of the verb.
    """
    git = facts.get("git") or {}
    revision = f" git {git['revision'][:12]}{'+dirty' if git.get('dirty') else ''}" if git else ""
    _logger.info(f"{title}: hpc-closure {facts.get('version', '?')}{revision}")
    job = f", job {facts['job']}" if facts.get("job") else ""
    if job and facts.get("restarts"):
        job += f" (restart {facts['restarts']})"
    device = facts.get("device", "cpu")
    if facts.get("cuda"):  # switches of code that no GPU has run yet
        device += f" with {', '.join(facts['cuda'])}"
    _logger.info(
        f"host {facts.get('host', '?')}{job}, {facts.get('ranks', 1)} rank(s), "
        f"device {device}, {facts.get('threads', '?')} thread(s)"
    )
    hashes = facts.get("hashes") or {}
    if hashes:
        _logger.info("hashes " + ", ".join(f"{key} {value[:12]}" for key, value in hashes.items()))
    if facts.get("run"):
        _logger.info(f"run folder {facts['run']}")


def duration(seconds: float) -> str:
    """Format seconds for people: ``42 s``, ``3.5 min``, ``2.1 h``, ``4.0 d``."""
    if seconds < 0 or seconds != seconds or seconds == float("inf"):
        return "?"
    for limit, scale, unit in ((100, 1, "s"), (6000, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / scale:.{0 if unit == 's' and seconds >= 10 else 1}f} {unit}"
    return f"{seconds / 86400:.1f} d"


class Progress:
    """Progress of a loop: a line that is redrawn on a terminal, log lines elsewhere.

        with log.Progress(num_steps, "members 0-19", unit="steps") as bar:
            for ...:
                bar.update(10)

    Off a terminal a line is logged every 30 s or every 10 %, whichever comes first, but never two
    within a second. It has the rate and the time left. ``show=False`` is for silent ranks.
    """

    def __init__(
        self,
        total: float,
        label: str,
        unit: str = "steps",
        *,
        initial: float = 0,
        show: bool = True,
    ):
        self.total, self.label, self.unit = max(float(total), 1e-300), label, unit
        self.done = self.initial = float(initial)
        self.show = show and _logger.isEnabledFor(logging.INFO)
        self.moving = self.show and sys.stderr.isatty()
        self.started = self.last_time = time.monotonic()
        self.last_done = self.done

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, *_) -> None:
        if self.moving:
            self._draw("")
        if self.show and kind is None:
            elapsed = duration(time.monotonic() - self.started)
            _logger.info(f"{self.label}: {self.done:g} {self.unit} in {elapsed}{self._rate()}")

    def update(self, amount: float = 1, note: str = "") -> None:
        """Add ``amount`` to the count; ``note`` (a loss, say) is shown in the line."""
        self.done += amount
        if not self.show:
            return
        now = time.monotonic()
        part = (self.done - self.last_done) / self.total
        waited = now - self.last_time
        if self.moving:
            due = waited >= EVERY_FRAME or self.done >= self.total
        else:
            due = waited >= EVERY_SECONDS or (part >= EVERY_FRACTION and waited >= 1.0)
        if due:
            self.last_time, self.last_done = now, self.done
            show = self._draw if self.moving else _logger.info
            show(self._line(note))

    def _line(self, note: str) -> str:
        return (
            f"{self.label}: {100 * self.done / self.total:.0f} % "
            f"({self.done:g}/{self.total:g} {self.unit}){self._rate(left=True)}"
            f"{', ' + note if note else ''}"
        )

    def _rate(self, left: bool = False) -> str:
        elapsed = time.monotonic() - self.started
        rate = (self.done - self.initial) / elapsed if elapsed > 0 else 0.0
        if rate <= 0:
            return ""
        text = f", {rate:,.0f} {self.unit}/s" if rate >= 1000 else f", {rate:.3g} {self.unit}/s"
        return text + f", {duration((self.total - self.done) / rate)} left" if left else text

    def _draw(self, line: str) -> None:
        """Redraw the progress line; an empty line removes it."""
        if line:
            filled = round(BAR * min(1.0, self.done / self.total))
            line = f"{'█' * filled}{'░' * (BAR - filled)} {line}"
        width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be cleared
        print(f"{CLEAR}{line[:width]}", end="", file=sys.stderr, flush=True)
