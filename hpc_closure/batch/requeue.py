"""How a batch job ends: the one policy of what goes back to the queue.

Exit code 75 (saved, not finished) does, at most ``HPC_CLOSURE_MAX_REQUEUES`` times, when the
cluster sent SIGUSR2 (time limit or preemption) or the verb stopped by itself; not after a
preemption that requeues by itself, nor after a bare SIGTERM, which is ``scancel`` unless the time
is up. Of several processes the first one decides, when all of them have saved.

Tasks that :mod:`hpc_closure.batch.submit` sent call :func:`settle`. A job submitted by hand puts
its step under the same policy (slurm/example.sbatch):

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
MOST = 20  # where the environment does not say


class Heard:
    """Notes which signals arrive, whoever handles them."""

    def __enter__(self) -> "Heard":
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
    """Send the job back to the queue where the policy says so; the code to exit with.

    Args:
        code: exit code of the verb.
        signals: those that this process heard meanwhile.
    """
    if code != EXIT_STOPPED or os.environ.get("SLURM_PROCID", "0") != "0":
        return code
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # all is saved: nothing left to stop
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    most = int(os.environ.get(MAX_REQUEUES) or MOST)
    why = _refusal(signals, restarts, most)
    if not why:
        # before it is done, because Slurm may end us at once
        _say(f"saved, not finished: back to the queue (requeue {restarts + 1} of at most {most})")
        why = _requeue()
    if why:
        _say(f"saved, not requeued: {why}; in any case the same command continues")
    return EXIT_STOPPED


def _refusal(signals: Collection[int], restarts: int, most: int) -> str:
    """Why the job is not to be queued again, or ""."""
    if "SLURM_JOB_ID" not in os.environ:
        return "no job of Slurm's"
    if signal.SIGTERM in signals and signal.SIGUSR2 not in signals and not _time_is_up():
        return "cancelled or killed"
    if restarts >= most:
        return f"started {restarts + 1} times already (cluster.max_requeues)"
    if shutil.which("scontrol") is None:
        return "there is no scontrol on this node"
    return "Slurm does it itself" if _preempted_to_queue() else ""


def _requeue() -> str:
    """Queue the job again; "" or why that failed."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"the cluster refused ({error})"
    return ""


def _time_is_up() -> bool:
    """Whether the job is past its time limit: its warning was lost, for it had just started."""
    with contextlib.suppress(ValueError):
        return 0 < float(os.environ.get("SLURM_JOB_END_TIME") or 0) <= time.time()
    return False


def _preempted_to_queue() -> bool:
    """Whether this job is being preempted by a partition that requeues.

    Slurm then requeues a job that ends in its grace time; one that was also requeued by hand is
    started once more after it has finished (seen with Slurm 24.11).
    """

    def show(what: str, variable: str) -> str:
        return subprocess.run(
            ["scontrol", "show", "-o", what, os.environ[variable]],
            text=True,
            capture_output=True,
            check=True,
            timeout=30,
        ).stdout

    with contextlib.suppress(OSError, subprocess.SubprocessError, KeyError):
        preempted = re.search(r"\bPreemptTime=\d", show("job", "SLURM_JOB_ID"))
        return bool(preempted) and "PreemptMode=REQUEUE" in show(
            "partition", "SLURM_JOB_PARTITION"
        )
    return False


def _say(line: str) -> None:
    job = os.environ.get("SLURM_JOB_ID", "?")
    print(f"[{time.strftime('%F %T')} job {job}] {line}", file=sys.stderr, flush=True)


def run(command: Sequence[str]) -> int:
    """Run a job's step, hand the warning on to it, and end as :func:`settle` says.

    SIGTERM is only noted: Slurm sends it to the step itself.
    """
    step: subprocess.Popen | None = None

    def warn(number, frame):
        if step is not None:
            step.send_signal(number)

    signal.signal(signal.SIGUSR2, warn)
    signal.signal(signal.SIGTERM, lambda *_: None)
    with Heard() as heard:
        step = subprocess.Popen(command)
        code = step.wait()
    return settle(code if code >= 0 else 128 - code, heard.signals)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m hpc_closure.batch.requeue COMMAND ...")
    sys.exit(run(sys.argv[1:]))
