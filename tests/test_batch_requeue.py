"""The policy of what goes back to the queue, with a fake scontrol."""

import signal
import subprocess
import sys

import pytest

from hpc_closure.batch import requeue

pytest_plugins = ["fake_programs"]

TERM, USR2 = signal.SIGTERM, signal.SIGUSR2
QUIET = 'echo "JobState=RUNNING PreemptTime=None PreemptMode=REQUEUE"; echo "$@" >> $here/calls'
PREEMPTED = QUIET.replace("None", "2030-01-01T00:00:00")
REFUSES = QUIET + "; [ $1 != requeue ]"


@pytest.fixture
def settle(programs, tmp_path, monkeypatch):
    """Settles a task of job 7: ``settle(code, signals, scontrol) -> (code, requeued jobs)``."""
    previous = signal.getsignal(USR2)

    def make(code, signals=(), scontrol=QUIET, **environment):
        environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_PARTITION": "main"} | environment
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        if scontrol:
            programs("scontrol", scontrol)
        code = requeue.settle(code, set(signals))
        calls = tmp_path / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        return code, [line.split()[1] for line in lines if line.startswith("requeue")]

    yield make
    signal.signal(USR2, previous)


@pytest.mark.parametrize("code", [0, 1, 3, 137])
def test_only_75_is_requeued(settle, code, capsys):
    assert settle(code, [USR2]) == (code, [])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "signals, environment, scontrol, said, requeued",
    [
        ([], {}, QUIET, "back to the queue (requeue 1 of at most 20)", True),  # --max-elapsed
        ([USR2], {"SLURM_RESTART_COUNT": "2"}, QUIET, "requeue 3 of at most 20", True),
        ([USR2, TERM], {}, QUIET, "back to the queue", True),
        ([TERM], {}, QUIET, "not requeued: cancelled", False),
        ([TERM], {"SLURM_JOB_END_TIME": "4000000000"}, QUIET, "not requeued: cancelled", False),
        ([TERM], {"SLURM_JOB_END_TIME": "9"}, QUIET, "back to the queue", True),
        ([], {"SLURM_RESTART_COUNT": "20"}, QUIET, "started 21 times already", False),
        ([], {"HPC_CLOSURE_MAX_REQUEUES": "0"}, QUIET, "started 1 times already", False),
        ([USR2], {"HPC_CLOSURE_MAX_REQUEUES": "2"}, QUIET, "requeue 1 of at most 2)", True),
        ([USR2], {}, PREEMPTED, "not requeued: Slurm does it itself", False),
        ([USR2], {}, None, "not requeued: there is no scontrol on this node", False),
        ([USR2], {}, REFUSES, "not requeued: the cluster refused", True),
    ],
)
def test_what_becomes_of_a_stopped_job(
    settle, capsys, signals, environment, scontrol, said, requeued
):
    assert settle(75, signals, scontrol, **environment) == (75, ["7"] if requeued else [])
    assert said in capsys.readouterr().err


def test_an_array_task_requeues_itself_only(settle):
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
    assert settle(75, [USR2], **array) == (75, ["5_3"])


def test_the_first_process_decides_and_the_others_end_quietly(settle, capsys):
    assert settle(75, [USR2], SLURM_PROCID="1") == (75, [])
    assert capsys.readouterr() == ("", "")
    assert settle(75, [USR2], SLURM_PROCID="0") == (75, ["7"])


def test_a_process_of_no_job_is_left_alone(programs, capsys):
    previous = signal.getsignal(USR2)
    assert requeue.settle(75, {USR2}) == 75
    signal.signal(USR2, previous)
    assert "not requeued: no job of Slurm's" in capsys.readouterr().err


STEP = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGUSR2, lambda *_: (print("warned", flush=True), sys.exit(75)))
pathlib.Path(sys.argv[1]).touch()
time.sleep(20)
"""


def test_a_step_is_warned_and_its_exit_code_comes_back(tmp_path):
    ready = tmp_path / "ready"
    step = [sys.executable, "-c", STEP, str(ready)]
    job = subprocess.Popen(
        [sys.executable, "-m", "hpc_closure.batch.requeue", *step],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not ready.exists():
        assert job.poll() is None
    job.send_signal(TERM)  # which Slurm sends to the step itself
    job.send_signal(USR2)
    out, error = job.communicate(timeout=20)
    assert (job.returncode, out) == (75, "warned\n") and "not requeued" in error
    for command, code in (("exit 5", 5), ("kill -9 $$", 137)):
        done = subprocess.run(
            [sys.executable, "-m", "hpc_closure.batch.requeue", "bash", "-c", command]
        )
        assert done.returncode == code
