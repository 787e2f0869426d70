"""Provenance: what ran, where and when; stored in every product and in RUN/provenance.jsonl."""

import functools
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import hpc_closure
from hpc_closure.work import atomic

PACKAGES = ("numpy", "scipy", "torch", "h5py", "mpi4py", "deepspeed", "submitit", "safetensors")


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the main packages, without importing them."""
    numbers = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            numbers[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return numbers


@functools.cache
def git(folder: str | None = None, quick: bool = False) -> dict | None:
    """Return revision and dirty flag if the package runs from a checkout, else None.

    ``quick``: without the flag, for which git looks at every file of the checkout.
    """
    folder = folder or str(Path(hpc_closure.__file__).resolve().parent.parent)
    if not (Path(folder) / ".git").exists():
        return None

    def run_git(*arguments):
        return subprocess.run(
            ["git", "-C", folder, "-c", "core.fsmonitor=false", *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        ).stdout.strip()

    try:
        revision = {"revision": run_git("rev-parse", "HEAD")}
        if quick:
            return revision
        changes = run_git("status", "--porcelain", "--untracked-files=no")
        return {**revision, "dirty": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return None


def job() -> dict[str, object]:
    """Return the identity of the batch job; empty outside of a job."""
    environ = os.environ
    if environ.get("SLURM_JOB_ID"):
        name = environ["SLURM_JOB_ID"]
        if environ.get("SLURM_ARRAY_JOB_ID"):
            name = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ.get('SLURM_ARRAY_TASK_ID', '?')}"
        return {"job": name, "restarts": _number(environ.get("SLURM_RESTART_COUNT"))}
    for key in ("PBS_JOBID", "LSB_JOBID", "JOB_ID"):
        if environ.get(key):
            return {"job": environ[key], "restarts": 0}
    return {}


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


def collect(*, ranks: int = 1, device: str = "cpu", quick: bool = False, **extra) -> dict:
    """Return one provenance record.

    Args:
        ranks: number of processes that work together.
        device: for example ``cpu`` or the name of the GPU.
        quick: see :func:`git`.
        extra: further entries, for example ``verb="generate"``, ``hashes={...}``, ``run=...``.
    """
    record = {
        "version": hpc_closure.__version__,
        "git": git(quick=quick),
        "versions": versions(),
        "host": socket.gethostname(),
        "user": os.environ.get("USER") or os.environ.get("LOGNAME", ""),
        "pid": os.getpid(),
        **job(),
        "ranks": ranks,
        "device": device,
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "time": now(),
    }
    if not record["threads"]:
        record["threads"] = (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        )
    record.update({key: value for key, value in extra.items() if value is not None})
    return record


def append(run, record: dict) -> None:
    """Append a record to RUN/provenance.jsonl."""
    atomic.append_jsonl(run.provenance, record)
