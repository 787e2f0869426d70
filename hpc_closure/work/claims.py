"""Claims: files that say which process computes a unit.

A claim is made by an exclusive create, and its owner touches it regularly. It is *stale* if it was
not touched for ``stale_after`` seconds. The clock is that of the file server (the time of change
of a file touched just now), because the clocks of the nodes may differ. A claim is stale at once
if its process is known to be dead: a dead process of the same host, or an earlier start of the
same job. A stale claim is taken over by an atomic rename. A claim whose owner was killed before it
had written its name into it is stale by age only.
"""

import contextlib
import functools
import json
import math
import os
import re
import secrets
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from hpc_closure.experiment.folder import UNIT, members_of_unit
from hpc_closure.work import atomic, provenance

STALE_AFTER = 600.0
UNWRITTEN = 60.0  # seconds after which a claim without content is stale
CLOCK_AFTER = 5.0  # seconds after which the server's clock is read again
_NAME = re.compile(rf"{UNIT}\.claim")
_TEMPORARY = re.compile(r"\.clock\..+|\..+\.(claim|takeover)\..+|.+\.takeover")
_clocks: dict[Path, tuple[float, float]] = {}  # server's and monotonic time, by folder


@functools.cache
def _machine() -> str:
    """Return the identity of the process table: host, boot and process-id name space."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _born(pid: int) -> str | None:
    """Return the start time of a living process, or None; a zombie is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""


def owner() -> dict:
    """Return the identity of this process, for a claim."""
    return {**_process(os.getpid()), **provenance.job()}


@functools.cache
def _process(pid: int) -> dict:
    """Return host, process table, number and start of this process; a fork has another number."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "born": _born(pid),
    }


def dead(record: dict) -> bool:
    """Return whether the owner is known to be dead (False: it may be alive)."""
    job = provenance.job()
    if (
        job
        and record.get("job") == job["job"]
        and _count(record.get("restarts")) < _count(job["restarts"])
    ):
        return True
    if record.get("machine") != _machine() or not isinstance(record.get("pid"), int):
        return False
    born = _born(record["pid"])
    return born is None or born != record.get("born")


def _count(value) -> int:
    return value if isinstance(value, int) else 0


def read(path: Path) -> dict | None:
    """Return the content of a claim; None if it does not exist, {} if it is torn."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError):
        return {}
    return record if isinstance(record, dict) else {}


def server_time(folder: Path) -> float:
    """Return the time of the file server's clock; the local time if the folder is unwritable.

    The clock is read every few seconds; between, this process counts the seconds.
    """
    now = time.monotonic()
    then = _clocks.get(folder)
    if then is not None and now - then[1] < CLOCK_AFTER:
        return then[0] + now - then[1]
    probe = folder / f".clock.{atomic.token()}"
    try:
        with open(probe, "wb"):
            os.utime(probe)
        _clocks[folder] = probe.stat().st_mtime, now
        return _clocks[folder][0]
    except OSError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _stale(path: Path, record: dict, now: float, stale_after: float) -> bool:
    if dead(record):
        return True
    try:
        age = now - path.stat().st_mtime
    except FileNotFoundError:
        return True
    if not record:  # its owner was killed before it wrote the content, which takes no time
        stale_after = min(stale_after, UNWRITTEN)
    # A time far in the future was written before the server's clock was set back. A living owner
    # would have touched the file since.
    return age > stale_after or age < -stale_after


def living(folder: Path, names, stale_after: float = STALE_AFTER) -> dict[str, dict]:
    """Return the fresh claims among the file ``names`` of a bookkeeping folder, by unit name."""
    names = [name for name in names if _NAME.fullmatch(name)]
    if not names:
        return {}
    now = server_time(folder)
    fresh = {}
    for name in names:
        record = read(folder / name)
        if record is not None and not _stale(folder / name, record, now, stale_after):
            fresh[name.removesuffix(".claim")] = record
    return fresh


def overlapping(path: Path, names: Iterable[str], stale_after: float = STALE_AFTER) -> set[int]:
    """Return the members that other living claims hold, of those that the claim ``path`` names.

    A stale claim is taken over and removed, so that its owner notices if it is alive after all.

    Args:
        path: the claim.
        names: names of the files in its folder, listed after the claim was made.
        stale_after: seconds without a sign of life after which a claim is stale.
    """
    first, last = members_of_unit(path.stem)
    held: set[int] = set()
    for name in names:
        if name == path.name or not _NAME.fullmatch(name):
            continue
        other_first, other_last = members_of_unit(name.removesuffix(".claim"))
        if other_last < first or last < other_first:
            continue
        other = path.parent / name
        if (record := read(other)) is None:
            continue
        if not _stale(other, record, server_time(path.parent), stale_after):
            held.update(range(other_first, other_last + 1))
        elif (stale := take(other, stale_after)) is not None:
            stale.release()
        else:  # another process takes it over now
            held.update(range(other_first, other_last + 1))
    return held


def wait_for_job(folder: Path, patience: float) -> None:
    """Wait until no other process of this batch job has a claim, at most ``patience`` seconds.

    A claim of a process that is known to be dead, of an earlier start of the job say, will stay.
    """
    job, end = provenance.job().get("job"), time.monotonic() + patience

    def held() -> bool:
        names = [entry.name for entry in os.scandir(folder) if _NAME.fullmatch(entry.name)]
        records = [read(folder / name) for name in names]
        return any(record and record.get("job") == job and not dead(record) for record in records)

    while job is not None and time.monotonic() < end and held():
        time.sleep(0.5)


class Lost(RuntimeError):
    """The claim was taken over by another process."""


class Claim:
    """A claim that this process holds.

    Attributes:
        inherited: whether it was taken over from a process that may have left files.
    """

    inherited = False

    def __init__(self, path: Path, mark: str, stale_after: float, inherited: bool = False):
        self.path, self.mark, self.stale_after = path, mark, stale_after
        self.inherited = inherited
        self._touched = self._read = time.monotonic()

    def refresh(self) -> None:
        """Touch the claim as a sign of life; cheap enough to call at every step.

        Raises:
            Lost: another process took the unit over after a long silence.
        """
        if time.monotonic() - self._touched < self.stale_after / 20:
            return
        self.check()
        with atomic.disk_errors(self.path):
            os.utime(self.path)
        self._touched = time.monotonic()

    def check(self) -> None:
        """Raise :class:`Lost` if this process no longer holds the claim."""
        self._read = -math.inf  # of a lost claim nothing is known any more
        record = read(self.path)
        if record is None or record.get("mark") != self.mark:
            raise Lost(
                f"claim {self.path.name} was taken over by another process after "
                f"{self.stale_after:g} s without a sign of life"
            )
        self._read = time.monotonic()

    def confirm(self) -> None:
        """Check the claim, unless its last touch is too recent for a takeover.

        Others take a claim over after a silence of ``stale_after``. Who touched it within a
        twentieth of that saves the request to the server; a process that was suspended reads it.

        Raises:
            Lost: another process took the unit over.
        """
        if time.monotonic() - min(self._read, self._touched) >= self.stale_after / 20:
            self.check()

    def release(self) -> None:
        """Release the unit, unless it is another process's now."""
        try:
            self.confirm()
        except Lost:
            return
        self.path.unlink(missing_ok=True)


class _NoClaim(Claim):
    """Stand-in on the ranks that do not hold the claim of their group."""

    def __init__(self):
        pass

    def refresh(self) -> None:
        pass

    check = confirm = release = refresh


NO_CLAIM = _NoClaim()


def take(path: Path, stale_after: float = STALE_AFTER, *, was_free: bool = False) -> Claim | None:
    """Claim a unit; return None if another process has it.

    Args:
        path: the claim.
        stale_after: seconds without a sign of life after which a claim is stale.
        was_free: there was no claim a moment ago; if there is one now, it is not looked at.

    Raises:
        DiskError: the bookkeeping folder cannot be written.
    """
    record = {**owner(), "mark": secrets.token_hex(8), "since": provenance.now()}
    inherited = False
    with atomic.disk_errors(path):
        if not _create(path, record):
            if was_free or not _take_over(path, record, stale_after):
                return None
            inherited = True
    return Claim(path, record["mark"], stale_after, inherited)


def _create(path: Path, record: dict) -> bool:
    """Create the claim exclusively, then write its content; returns whether it did not exist."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(record))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return True


def _take_over(path: Path, record: dict, stale_after: float) -> bool:
    """Replace a stale claim; a lock ensures that nobody replaces a fresh one."""
    old = read(path)
    if old is None:
        return False  # released just now; the next round gets it
    if not _stale(path, old, server_time(path.parent), stale_after):
        return False
    lock = path.with_suffix(".takeover")
    if not _create(lock, record):
        lock_owner = read(lock)
        if lock_owner is not None and _stale(lock, lock_owner, server_time(path.parent), 60.0):
            lock.unlink(missing_ok=True)
        return False
    try:
        old = read(path)
        if old is None or not _stale(path, old, server_time(path.parent), stale_after):
            return False
        private = path.with_name(f".{path.name}.{atomic.token()}.{record['mark']}")
        private.write_text(json.dumps(record), encoding="utf-8")
        os.replace(private, path)
        return True
    finally:
        lock.unlink(missing_ok=True)


def sweep(folder: Path, names, age: float = 3600.0) -> None:
    """Remove the private files of processes that were killed while they made a claim.

    Args:
        folder: the bookkeeping folder.
        names: names of its files.
        age: seconds after which a private file is removed; its owner needs it for milliseconds.
    """
    private = [folder / name for name in names if _TEMPORARY.fullmatch(name)]
    now = server_time(folder) if private else 0.0
    for path in private:
        with contextlib.suppress(OSError):
            if now - path.stat().st_mtime > age:
                path.unlink()
