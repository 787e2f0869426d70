"""Which units were submitted, and what the queue says about them.

Decoration: what is done and what runs is in the files of the run.
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

# Nobody but a person moves such a job, so its units are to be submitted again: its node died while
# it was started, it was requeued too often, a job before it failed.
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
    """Note a submission in the run folder: how we know later what the queue's jobs are.

    Args:
        tasks: units of task 0, 1, ... of the job; of a job that is no array, one entry.
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
    """Units that the queue still lists: ``{stage: {unit: "pending" or "running"}}``.

    At most one call of squeue, none without submissions; empty when there is no Slurm or it does
    not answer. Jobs that will never start by themselves are left out.
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
        word, state, reason = [*line.strip().split(" ", 2), "", ""][:3]
        match = _ID.fullmatch(word)
        if match and match["job"] in submissions and reason.replace("_", " ") not in _STUCK:
            label = "pending" if state in ("PENDING", "REQUEUED") else "running"
            stage, tasks = submissions[match["job"]]
            for at in _listed(match["task"], match["tasks"], len(tasks)):
                found[stage].update(dict.fromkeys(tasks[at], label))
    return found


def queued_units(run: Run, stage: str = "rollout", timeout: float = 10.0) -> dict[str, str]:
    """Units of one stage that the queue lists."""
    return queued(run, [stage], timeout)[stage]


def queued_members(run: Run, stage: str = "rollout") -> set[int]:
    """Members of the units of one stage that the queue lists."""
    return members_of(queued_units(run, stage))


def _listed(task: str | None, tasks: str | None, number: int) -> list[int]:
    """Tasks named by ``12_3``, by ``12_[0-4,7,10-20:5%2]``, or by ``12`` alone: all."""
    if task is None and (tasks is None or "..." in tasks):
        return list(range(number))
    listed: list[int] = []
    for part in (task or tasks or "").partition("%")[0].split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if found:
            first, last, step = found.groups()
            listed += range(int(first), int(last or first) + 1, int(step or 1))
    return [at for at in listed if at < number]
