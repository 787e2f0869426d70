"""What the queue says about submitted units; a fake squeue on PATH."""

import time

import pytest

from hpc_closure.batch import squeue
from hpc_closure.experiment.folder import Run
from hpc_closure.work import atomic

pytest_plugins = ["fake_programs"]


def names(number):
    return [f"{index:06d}-{index:06d}" for index in range(number)]


def submissions(run):
    atomic.append_jsonl(
        run.submissions("rollout"),
        {
            "job": "101",
            "executor": "slurm",
            "tasks": [names(40)[2 * at : 2 * at + 2] for at in range(20)],
        },
    )
    atomic.append_jsonl(
        run.submissions("rollout"),
        {"job": "102", "executor": "slurm", "tasks": [["000040-000040"]]},
    )
    atomic.append_jsonl(
        run.submissions("rollout"),
        {"job": "103", "executor": "local", "tasks": [["000041-000041"]]},
    )


@pytest.mark.parametrize(
    "answer, queued, running",
    [
        ("", [], []),
        ("101_3 RUNNING", [], [6, 7]),
        ("101_[0-1,5,8-12:2%4] PENDING", [0, 1, 2, 3, 10, 11, 16, 17, 20, 21, 24, 25], []),
        ("101_[1-3,5,...] PENDING", list(range(40)), []),
        ("102 PENDING\n999_[0-3] PENDING\n998 RUNNING\n103 RUNNING", [40], []),
        ("101_0 COMPLETING\n102 CONFIGURING\n101_1 REQUEUED", [2, 3], [0, 1, 40]),
        (
            "101_0 PENDING Resources\n101_1 PENDING launch failed requeued held\n"
            "102 PENDING DependencyNeverSatisfied\n101_2 RUNNING None",
            [0, 1],
            [4, 5],
        ),
        ("101_77 RUNNING\nslurm_load_jobs error: timed out\n\n101_[x] PENDING", [], []),
    ],
)
def test_what_the_queue_says(tmp_path, programs, answer, queued, running):
    run = Run(tmp_path / "run")
    submissions(run)
    programs(
        "squeue",
        f"""echo "$@ SLURM_BITSTR_LEN=$SLURM_BITSTR_LEN" >> $here/calls
        cat <<'X'\n{answer}\nX""",
    )
    found = squeue.queued_units(run)
    assert sorted(unit for unit in found if found[unit] == "pending") == [
        f"{at:06d}-{at:06d}" for at in queued
    ]
    assert sorted(unit for unit in found if found[unit] == "running") == [
        f"{at:06d}-{at:06d}" for at in running
    ]
    [call] = (tmp_path / "calls").read_text().splitlines()
    assert "--me" in call and "SLURM_BITSTR_LEN=0" in call


def test_members_of_queued_units(tmp_path, programs):
    run = Run(tmp_path / "run")
    atomic.append_jsonl(
        run.submissions("rollout"),
        {"job": "7", "executor": "slurm", "tasks": [["000000-000019"], ["000020-000021"]]},
    )
    programs("squeue", "echo 7_1 PENDING")
    assert squeue.queued_members(run) == {20, 21}


@pytest.mark.parametrize("text", [None, "exit 1", "sleep 30"])
def test_a_queue_that_does_not_answer_is_no_error(tmp_path, programs, text):
    run = Run(tmp_path / "run")
    submissions(run)
    if text:
        programs("squeue", text)
    start = time.monotonic()
    assert squeue.queued_units(run, timeout=0.5) == {}
    assert time.monotonic() - start < 5
