"""Claims: which process computes a unit.

A claim is a file made by an exclusive create. Its owner touches it; it is *stale* when it was not
touched for ``stale_after`` seconds by the clock of the file server (the time of change of a file
touched just now), so clocks of the nodes may differ. It is stale at once when its process is known
to be dead: same host and dead process, or an earlier start of the same job. A stale claim is taken
over by an atomic rename.
"""

import contextlib
import functools
import json
import os
import re
import secrets
import socket
import time
from pathlib import Path

from hpc_closure.work import atomic, provenance

STALE_AFTER = 600.0
_NAME = re.compile(r"(\d{6,})-(\d{6,})\.claim")
_ON_THE_WAY = re.compile(r"\.clock\..+|\..+\.(claim|takeover)\..+|.+\.takeover")


@functools.cache
def _machine() -> str:
    """Identity of the process table: host, boot and process-id name space."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _born(pid: int) -> str | None:
    """Start time of a living process, or None; a zombie is dead."""
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
    """Who we are."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        **provenance.job(),
    }


def dead(record: dict) -> bool:
    """Whether the owner is known to be dead (False: it may live)."""
    mine = provenance.job()
    if (
        mine
        and record.get("job") == mine["job"]
        and _count(record.get("restarts")) < _count(mine["restarts"])
    ):
        return True
    if record.get("machine") != _machine() or not isinstance(record.get("pid"), int):
        return False
    born = _born(record["pid"])
    return born is None or born != record.get("born")


def _count(value) -> int:
    return value if isinstance(value, int) else 0


def read(path: Path) -> dict | None:
    """Content of a claim; None when it is gone, {} when it is torn."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError):
        return {}
    return record if isinstance(record, dict) else {}


def server_time(folder: Path) -> float:
    """Now by the clock of the file server; the local clock where we may not write."""
    probe = folder / f".clock.{atomic.token()}"
    try:
        with open(probe, "wb"):
            os.utime(probe)
        return probe.stat().st_mtime
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
    # A time far in the future was written before the server's clock was set back; a living
    # owner would have touched the file since.
    return age > stale_after or age < -stale_after


def living(folder: Path, names, stale_after: float = STALE_AFTER) -> dict[str, dict]:
    """Fresh claims among the file ``names`` of a bookkeeping folder, by unit name."""
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


class Lost(RuntimeError):
    """The claim was taken over by another process."""


class Claim:
    """A claim that we hold."""

    def __init__(self, path: Path, mark: str, stale_after: float):
        self.path, self.mark, self.stale_after = path, mark, stale_after
        self._touched = time.monotonic()

    def refresh(self) -> None:
        """Sign of life; cheap enough to call at every step.

        Raises:
            Lost: we were silent for so long that another process took the unit over.
        """
        if time.monotonic() - self._touched < self.stale_after / 20:
            return
        self.check()
        with atomic.disk_errors(self.path):
            os.utime(self.path)
        self._touched = time.monotonic()

    def check(self) -> None:
        """Raise :class:`Lost` when the claim is no longer ours."""
        record = read(self.path)
        if record is None or record.get("mark") != self.mark:
            raise Lost(
                f"claim {self.path.name} was taken over by another process after "
                f"{self.stale_after:g} s without a sign of life"
            )

    def release(self) -> None:
        """Give the unit back."""
        record = read(self.path)
        if record is not None and record.get("mark") == self.mark:
            self.path.unlink(missing_ok=True)


class _NoClaim(Claim):
    """Stand-in on the ranks that do not hold the claim of their group."""

    def __init__(self):
        pass

    def refresh(self) -> None:
        pass

    check = release = refresh


NO_CLAIM = _NoClaim()


def take(path: Path, stale_after: float = STALE_AFTER) -> Claim | None:
    """Claim a unit; None when somebody else has it.

    Raises:
        DiskError: the bookkeeping folder cannot be written.
    """
    record = {**owner(), "mark": secrets.token_hex(8), "since": provenance.now()}
    with atomic.disk_errors(path):
        if not _create(path, record):
            if not _take_over(path, record, stale_after):
                return None
    return Claim(path, record["mark"], stale_after)


def _create(path: Path, record: dict) -> bool:
    """Exclusive create with content: a whole private file is linked to the name."""
    private = path.with_name(f".{path.name}.{atomic.token()}.{record['mark']}")
    private.write_text(json.dumps(record), encoding="utf-8")
    try:
        os.link(private, path)
        return True
    except FileExistsError:
        return False
    except OSError:  # no hard links here: create first, write next
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(record))
        return True
    finally:
        private.unlink(missing_ok=True)


def _take_over(path: Path, record: dict, stale_after: float) -> bool:
    """Replace a stale claim; one process at a time, so that nobody replaces a fresh one."""
    old = read(path)
    if old is None:
        return False  # released just now; the next round gets it
    if not _stale(path, old, server_time(path.parent), stale_after):
        return False
    lock = path.with_suffix(".takeover")
    if not _create(lock, record):
        other = read(lock)
        if other is not None and _stale(lock, other, server_time(path.parent), 60.0):
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
    """Remove the private files of processes that were killed on their way to a claim.

    Args:
        folder: of the bookkeeping.
        names: its files.
        age: seconds for which they are left alone; their owners need them for milliseconds.
    """
    private = [folder / name for name in names if _ON_THE_WAY.fullmatch(name)]
    now = server_time(folder) if private else 0.0
    for path in private:
        with contextlib.suppress(OSError):
            if now - path.stat().st_mtime > age:
                path.unlink()
