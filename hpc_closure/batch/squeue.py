"""Record submissions, and ask squeue which submitted units are pending or running.

This is information for the user. Correctness does not depend on it: the files of the run show
which units are done and which are being computed.
"""

import os
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from hpc_closure.experiment.folder import Run
from hpc_closure.work import atomic, log
from hpc_closure.work.units import members_of

# Reasons of pending jobs that never start without a person: the node died at launch, the job was
# requeued too often, or a job that it depends on failed. Their units must be submitted again.
_STUCK = (
    "launch failed requeued held",
    "JobHoldMaxRequeue",
    "JobHeldAdmin",
    "DependencyNeverSatisfied",
)
_ID = re.compile(r"(?P<job>\d+)(?:_(?:(?P<task>\d+)|\[(?P<tasks>[^\]]*)\]))?")


def record(
    run: Run,
    stage: str,
    job: str,
    tasks: Sequence[Sequence[str]],
    log: Path | str,
    executor: str = "slurm",
) -> None:
    """Append a submission to the run folder, to match the queue's jobs with units later.

    Args:
        run: the run folder.
        stage: the submitted stage.
        job: id of the job.
        tasks: units of task 0, 1, ... of the array; one entry for a job that is no array.
        log: pattern of the log files.
        executor: ``slurm`` or ``local``.
    """
    atomic.append_jsonl(
        run.submissions(stage),
        {
            "job": job,
            "executor": executor,
            "tasks": [list(task) for task in tasks],
            "log": str(log),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    )


def queued(run: Run, stages: Iterable[str], timeout: float = 10.0) -> dict[str, dict[str, str]]:
    """List the units in the queue, ``{stage: {unit: "pending" or "running"}}``.

    Calls squeue once, or not at all if nothing was submitted. Returns no units if there is no
    Slurm or it does not answer. Skips jobs that never start without a person.
    """
    found: dict[str, dict[str, str]] = {stage: {} for stage in stages}
    submissions = {
        record["job"]: (stage, record["tasks"])
        for stage in found
        for record in atomic.read_jsonl(run.submissions(stage))
        if record.get("executor") == "slurm" and isinstance(record.get("job"), str)
    }
    if not submissions:
        return found
    try:
        answer = subprocess.run(
            ["squeue", "--me", "--noheader", "--format=%i %T %r"],
            timeout=timeout,
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # Lists of array tasks are cut at 64 characters otherwise.
            env={**os.environ, "SLURM_BITSTR_LEN": "0"},
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        log.get().debug(f"squeue did not answer: {error}")
        return found
    for line in answer.splitlines():
        array_id, state, reason = [*line.strip().split(" ", 2), "", ""][:3]
        match = _ID.fullmatch(array_id)
        if match and match["job"] in submissions and reason.replace("_", " ") not in _STUCK:
            label = "pending" if state in ("PENDING", "REQUEUED") else "running"
            stage, tasks = submissions[match["job"]]
            for at in _listed(match["task"], match["tasks"], len(tasks)):
                found[stage].update(dict.fromkeys(tasks[at], label))
    return found


def queued_units(run: Run, stage: str = "rollout", timeout: float = 10.0) -> dict[str, str]:
    """List the units of one stage in the queue, ``{unit: "pending" or "running"}``."""
    return queued(run, [stage], timeout)[stage]


def queued_members(run: Run, stage: str = "rollout") -> set[int]:
    """List the members of all units of one stage in the queue."""
    return members_of(queued_units(run, stage))


def _listed(task: str | None, tasks: str | None, number: int) -> list[int]:
    """List the task numbers in squeue's job ids ``12_3``, ``12_[0-4,7,10-20:5%2]`` or ``12``.

    Args:
        task: the number after the underscore, or None.
        tasks: the text in brackets, or None.
        number: tasks of the array; a plain ``12`` names all of them.
    """
    if task is None and (tasks is None or "..." in tasks):
        return list(range(number))
    listed: list[int] = []
    for part in (task or tasks or "").partition("%")[0].split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if found:
            first, last, step = found.groups()
            listed += range(int(first), int(last or first) + 1, int(step or 1))
    return [at for at in listed if at < number]
