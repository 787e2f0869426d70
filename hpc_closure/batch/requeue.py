"""End of a batch job: decide whether the job is requeued, and requeue it.

A job is requeued if its exit code is 75 (saved, not finished) and it received SIGUSR2 (time limit
or preemption) or stopped without a signal. It is not requeued

* more than ``HPC_CLOSURE_MAX_REQUEUES`` times;
* after a preemption for which Slurm requeues the job itself;
* after SIGTERM without SIGUSR2, which means ``scancel``, unless the time limit has passed.

In a job of several processes, the first process requeues, after all have saved.

Tasks of :mod:`hpc_closure.batch.submit` call :func:`settle`. A job submitted by hand runs its step
through this module to get the same policy (slurm/example.sbatch):

    exec python3 -m hpc_closure.batch.requeue srun python3 -m hpc_closure generate x.yaml
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence

from hpc_closure.work.stop import EXIT_STOPPED

MAX_REQUEUES = "HPC_CLOSURE_MAX_REQUEUES"
MOST = 20  # limit where the environment variable is not set


class SignalRecorder:
    """Record which signals arrive, independent of their handlers.

    Attributes:
        signals: signal numbers, complete when the context has been left.
    """

    def __enter__(self) -> "SignalRecorder":
        self.signals: set[int] = set()
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, False)
        self._previous = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self._previous)
        with contextlib.suppress(BlockingIOError):
            self.signals = set(os.read(self._read, 4096))
        os.close(self._read)
        os.close(self._write)


def settle(code: int, signals: Collection[int]) -> int:
    """Requeue the job if the policy allows it; returns the exit code of the process.

    Args:
        code: exit code of the verb.
        signals: signals that this process received during the verb.
    """
    if code != EXIT_STOPPED or os.environ.get("SLURM_PROCID", "0") != "0":
        return code
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # everything is saved; a signal has no use now
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    limit = int(os.environ.get(MAX_REQUEUES) or MOST)
    reason = _refusal(signals, restarts, limit)
    if not reason:
        # log before the requeue, because Slurm may kill this process at once
        _log(f"saved, not finished: back to the queue (requeue {restarts + 1} of at most {limit})")
        reason = _requeue()
    if reason:
        _log(f"saved, not requeued: {reason}; the same command continues the run")
    return EXIT_STOPPED


def _refusal(signals: Collection[int], restarts: int, limit: int) -> str:
    """Return why the job must not be requeued; "" if it may be."""
    if "SLURM_JOB_ID" not in os.environ:
        return "no job of Slurm's"
    if signal.SIGTERM in signals and signal.SIGUSR2 not in signals and not _past_time_limit():
        return "cancelled or killed"
    if restarts >= limit:
        return f"started {restarts + 1} times already (cluster.max_requeues)"
    if shutil.which("scontrol") is None:
        return "there is no scontrol on this node"
    return "Slurm does it itself" if _preempted_to_queue() else ""


def _requeue() -> str:
    """Requeue the job; returns "" or why that failed."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"the cluster refused ({error})"
    return ""


def _past_time_limit() -> bool:
    """Return whether the job is past its time limit.

    SIGTERM then comes from Slurm: the warning was lost because the job had just started.
    """
    with contextlib.suppress(ValueError):
        return 0 < float(os.environ.get("SLURM_JOB_END_TIME") or 0) <= time.time()
    return False


def _preempted_to_queue() -> bool:
    """Return whether this job is being preempted and its partition requeues preempted jobs.

    Slurm then requeues a job that ends within its grace time. If the job also requeued itself, it
    would be started once more after it has finished (Slurm 24.11).
    """

    def show_field(what: str, variable: str) -> str:
        return subprocess.run(
            ["scontrol", "show", "-o", what, os.environ[variable]],
            text=True,
            capture_output=True,
            check=True,
            timeout=30,
        ).stdout

    with contextlib.suppress(OSError, subprocess.SubprocessError, KeyError):
        preempted = re.search(r"\bPreemptTime=\d", show_field("job", "SLURM_JOB_ID"))
        return bool(preempted) and "PreemptMode=REQUEUE" in show_field(
            "partition", "SLURM_JOB_PARTITION"
        )
    return False


def _log(line: str) -> None:
    job = os.environ.get("SLURM_JOB_ID", "?")
    print(f"[{time.strftime('%F %T')} job {job}] {line}", file=sys.stderr, flush=True)


def run(command: Sequence[str]) -> int:
    """Run the step of a job, forward SIGUSR2 to it, then :func:`settle`; returns the exit code.

    SIGTERM is recorded but not forwarded, because Slurm sends it to the step itself.
    """
    step: subprocess.Popen | None = None

    def warn(number, frame):
        if step is not None:
            step.send_signal(number)

    signal.signal(signal.SIGUSR2, warn)
    signal.signal(signal.SIGTERM, lambda *_: None)
    with SignalRecorder() as recorder:
        step = subprocess.Popen(command)
        code = step.wait()
    return settle(code if code >= 0 else 128 - code, recorder.signals)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m hpc_closure.batch.requeue COMMAND ...")
    sys.exit(run(sys.argv[1:]))
