"""Submission without a Slurm: requests, cost, batch text, arrays; fake programs on PATH."""

import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import cloudpickle
import pytest
import slurm_payload
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hpc_closure.batch import requeue, squeue, submit
from hpc_closure.batch.site import Profile
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.schema import Experiment
from hpc_closure.work import atomic

pytest_plugins = ["fake_programs"]
TESTS = str(Path(__file__).parent)


def names(number):
    return [f"{index:06d}-{index:06d}" for index in range(number)]


@pytest.fixture
def request_of(tmp_path):
    def make(units=4, profile=None, **changes):
        profile = profile or Profile(python="python", node_local=[])
        run = Run(tmp_path / "runs" / "study")
        work = slurm_payload.run_units
        return submit.Request(run, tuple(names(units)), work, profile, **changes)

    return make


def fake_slurm(programs, refuse=""):
    """sbatch that numbers jobs from 101, keeps script and environment; srun only exists."""
    programs("srun", "exit 1")
    programs(
        "sbatch",
        f"""
        number=$(( $(cat $here/last 2>/dev/null || echo 100) + 1 ))
        {refuse}
        echo $number > $here/last
        cp "$1" $here/script.$number
        env > $here/env.$number
        echo "Submitted batch job $number" """,
    )


# Requests


def test_the_experiment_wins_over_the_profile_where_it_states_something(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "base": "diffusion_64",
                "root": str(tmp_path),
                "cluster": {"walltime": "2h", "members_per_block": 10, "units_per_task": 3},
            }
        )
    )
    site = Profile(
        walltime="9h", max_running_tasks=7, signal_before_end="4m", gpus_per_node=2, max_requeues=5
    )
    experiment, run, work = reading.load(path), Run(tmp_path), slurm_payload.run_units
    request = submit.Request.of(experiment, run, names(4), work, profile=site)
    assert (request.walltime, request.max_running_tasks, request.signal_before_end) == (
        7200.0,
        7,
        240.0,
    )
    assert (request.max_requeues, request.units_per_task, request.devices) == (5, 3, 2)
    # the experiment's walltime is that of a rollout task
    request = submit.Request.of(experiment, run, names(4), work, "train", site)
    assert (request.walltime, request.max_running_tasks, request.devices) == (9 * 3600.0, 7, 2)


@pytest.mark.parametrize(
    "walltime, lead, fits",
    [
        (3600, 600, True),
        (3600, 720, True),
        (3600, 721, False),
        (14400, 3000, False),
        (14400, 2880, True),
        (60, 59, True),
        (60, 60, False),
    ],
)
def test_signal_lead_rule(request_of, walltime, lead, fits):
    if fits:
        request_of(walltime=walltime, signal_before_end=lead)
    else:
        with pytest.raises(ValueError, match="shorten it"):
            request_of(walltime=walltime, signal_before_end=lead)


def test_cost_in_one_line(request_of):
    profile = Profile(cpus_per_task=4)
    assert (
        submit.cost(request_of(16, devices=2, walltime=4 * 3600))
        == "16 tasks x 4 h x 2 GPUs <= 128 GPU-hours"
    )
    assert (
        submit.cost(request_of(1, profile, walltime=1800))
        == "1 task x 0.5 h x 4 cores <= 2 core-hours"
    )
    assert (
        submit.cost(request_of(10, units_per_task=4)) == "3 tasks x 1 h x 1 core <= 3 core-hours"
    )


@given(st.integers(0, 60), st.integers(1, 7), st.integers(1, 5))
def test_arrays_hold_every_unit_once_in_order(number, per_task, max_array):
    arrays = submit.plan_arrays(names(number), per_task, max_array)
    tasks = [task for array in arrays for task in array]
    assert [unit for task in tasks for unit in task] == names(number)
    assert all(1 <= len(array) <= max_array for array in arrays)
    assert all(1 <= len(task) <= per_task for task in tasks)
    assert sum(len(task) < per_task for task in tasks) <= 1
    assert sum(len(array) < max_array for array in arrays) <= 1


def test_the_throttle_is_shared_by_the_arrays(request_of):
    request = request_of(5, Profile(max_array=2), max_running_tasks=4)
    found = [
        line
        for text in submit.batch_text(request)
        for line in text.splitlines()
        if "--array" in line
    ]
    # the third array is a single task, so a plain job
    assert found == ["#SBATCH --array=0-1%2", "#SBATCH --array=0-1%1"]


# Batch text

GOLDEN = """\
#!/bin/bash

# Parameters
#SBATCH --account=abc
#SBATCH --array=0-3%2
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --job-name=study-rollout
#SBATCH --mail-type=END
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output={folder}/%A_%a_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=90

# setup
module load gcc cuda
source /somewhere/bin/activate
export SRUN_CPUS_PER_TASK=${{SLURM_CPUS_PER_TASK:-1}}
export OMP_NUM_THREADS=${{SLURM_CPUS_PER_TASK:-1}}
export HPC_CLOSURE_MAX_REQUEUES=20

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output {folder}/%A_%a_%t_log.out --mpi=none \
python -u -m submitit.core._submit {folder}
"""


def test_golden_batch_text_needs_no_slurm_and_writes_nothing(request_of, programs, tmp_path):
    site = Profile(
        account="abc",
        partition="gpu",
        cpus_per_task=8,
        gpus_per_node=1,
        modules=["gcc", "cuda"],
        setup=["source /somewhere/bin/activate"],
        extra={"mail-type": "END"},
        python="python",
    )
    before = sorted(tmp_path.rglob("*"))
    request = request_of(4, site, devices=1, walltime=5400.0, max_running_tasks=2)
    [text] = submit.batch_text(request)
    assert text == GOLDEN.format(folder=tmp_path / "runs/study/logs/rollout/jobs")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_program_of_many_processes(request_of, tmp_path):
    """Nodes and tasks of the profile, one log, what srun must know, jobs that come before."""
    site = Profile(python="python", nodes=2, ntasks_per_node=4, cpus_per_task=1)
    changes = {"stage": "generate", "walltime": 1800.0, "after": "12:13"}
    request = request_of(4, site, **changes)
    [text] = submit.batch_text(request)
    log = tmp_path / "runs/study/logs/generate/jobs/%j_0_log.out"
    lines = text.splitlines()
    assert "--array" not in text and f"#SBATCH --output={log}" in lines
    assert "#SBATCH --nodes=2" in lines and "#SBATCH --ntasks-per-node=4" in lines
    assert "#SBATCH --dependency=afterok:12:13" in lines
    assert "#SBATCH --kill-on-invalid-dep=yes" in lines
    assert 'eval "$(python -m hpc_closure.batch.environment)"' in lines
    assert f"--output={log} python -u" in text and "--mpi" not in text
    assert submit.cost(request) == "2 nodes x 0.5 h x 4 cores <= 4 core-hours"
    assert request.arrays == [[tuple(names(4))]]
    [text] = submit.batch_text(request_of(4, site.model_copy(update={"mpi": "pmix"}), **changes))
    assert "--mpi=pmix python -u" in text
    [text] = submit.batch_text(request_of(1, site, stage="evaluate"))
    assert "#SBATCH --nodes=1" in text and "#SBATCH --ntasks-per-node=1" in text
    assert "--mpi=none" in text and "dependency" not in text


def test_sbatch_gets_the_batch_text(request_of, programs, tmp_path):
    fake_slurm(programs)
    request = request_of(
        7, Profile(max_array=3, python="python", node_local=[]), max_running_tasks=4
    )
    found = submit.submit(request)
    assert [one.job for one in found] == ["101", "102", "103"]
    assert [len(one.tasks) for one in found] == [3, 3, 1]
    for one, text in zip(found, submit.batch_text(request)):
        assert (tmp_path / f"script.{one.job}").read_text() == text
        assert one.log.parent.is_dir()
    assert found[0].log.name == "101_%a_0_log.out" and found[2].log.name == "103_0_log.out"
    records = atomic.read_jsonl(request.run.submissions("rollout"))
    assert [unit for record in records for task in record["tasks"] for unit in task] == names(7)


def test_sites_that_refuse_the_wckey(request_of, programs, tmp_path):
    fake_slurm(
        programs,
        refuse="""if grep -q wckey "$1"; then
        echo "sbatch: error: Batch job submission failed: Invalid wckey specification" >&2
        exit 1; fi""",
    )
    assert submit.submit(request_of())[0].job == "101"
    with pytest.raises(RuntimeError, match="^sbatch refused: sbatch: error: .*Invalid wckey"):
        submit.submit(request_of(profile=Profile(wckey="mine", node_local=[])))


def test_a_refusal_names_what_was_accepted(request_of, programs):
    fake_slurm(
        programs,
        refuse="""if [ $number = 102 ]; then
        echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; fi""",
    )
    request = request_of(6, Profile(max_array=3, node_local=[]))
    with pytest.raises(RuntimeError, match="QOSMax.*accepted before: 101"):
        submit.submit(request)
    [record] = atomic.read_jsonl(request.run.submissions("rollout"))
    assert record["job"] == "101" and record["tasks"] == [[name] for name in names(3)]


def test_settings_of_a_surrounding_job_are_left_out(request_of, programs, tmp_path, monkeypatch):
    fake_slurm(programs)
    for name, value in {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "3",
        "SBATCH_PARTITION": "debug",
        "MASTER_PORT": "1",
        "HOME_OF": "kept",
    }.items():
        monkeypatch.setenv(name, value)
    submit.submit(request_of())
    text = (tmp_path / "env.101").read_text()
    assert "SLURM_" not in text and "SBATCH_" not in text and "MASTER_" not in text
    assert "HOME_OF=kept" in text and os.environ["SLURM_NTASKS"] == "3"


def test_settings_of_the_login_shell_stay(request_of, programs, tmp_path, monkeypatch):
    fake_slurm(programs)
    monkeypatch.setenv("SBATCH_ACCOUNT", "from_my_bashrc")
    submit.submit(request_of())
    assert "SBATCH_ACCOUNT=from_my_bashrc" in (tmp_path / "env.101").read_text()


def test_a_run_on_a_node_local_disk_is_refused(programs):
    fake_slurm(programs)
    request = submit.Request(
        Run("/tmp/runs/study"), tuple(names(1)), slurm_payload.run_units, Profile()
    )
    with pytest.raises(ValueError, match="/tmp is usually a node's own disk.*node_local"):
        submit.submit(request)
    assert not Path("/tmp/runs/study/.units").exists()


def test_no_slurm_is_said_in_one_line(request_of, programs):
    with pytest.raises(RuntimeError, match="no Slurm here"):
        submit.submit(request_of())
    with pytest.raises(ValueError, match="expected slurm or local"):
        submit.submit(request_of(), "cloud")
    assert submit.submit(request_of(0)) == []


def test_the_queue_is_asked_only_about_submissions_and_sacct_never(tmp_path, programs, request_of):
    fake_slurm(programs)
    for name in ("squeue", "sacct", "scontrol"):
        programs(name, f"echo {name} >> $here/asked")
    assert squeue.queued_units(Run(tmp_path / "none")) == {}
    request = request_of(6, Profile(max_array=2, node_local=[]))
    submit.submit(request)
    squeue.queued_units(request.run)
    assert (tmp_path / "asked").read_text().split() == ["squeue"]


# The payload


def test_the_payload_is_small_and_holds_no_progress():
    payload = submit.Payload(slurm_payload.run_units, "/x/config.yaml", ("000000-000019",))
    copy = pickle.loads(cloudpickle.dumps(payload))
    assert copy == payload and copy.work is slurm_payload.run_units
    assert len(cloudpickle.dumps(payload)) < 300


def code_of(work, monkeypatch, settled=None):
    """Exit code of a payload; what reaches the policy goes to ``settled``."""

    def settle(code, signals):
        if settled is not None:
            settled.append((code, signals & {signal.SIGTERM, signal.SIGUSR2}))
        return code

    monkeypatch.setattr(requeue, "settle", settle)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        submit.Payload(work, "x", ("000000-000000",))()
    except SystemExit as end:
        return end.code
    finally:
        for number, previous in handlers.items():
            signal.signal(number, previous)
    return 0


def test_the_policy_hears_how_a_task_ended_and_which_signals_came(monkeypatch):
    def stopped_by(*signals):
        def run_units(config_path, units):
            for number in signals:
                signal.signal(number, lambda *_: None)  # as hpc_closure.work.stop.Stop does
                os.kill(os.getpid(), number)
            return 75

        return run_units

    def warned_before_it_listens(config_path, units):
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(5)

    settled: list = []
    assert code_of(lambda *_: None, monkeypatch, settled) == 0
    assert code_of(lambda *_: 3, monkeypatch, settled) == 3
    assert code_of(lambda *_: sys.exit(4), monkeypatch, settled) == 4
    assert code_of(lambda *_: sys.exit("a word"), monkeypatch, settled) == 1
    assert code_of(stopped_by(), monkeypatch, settled) == 75
    assert code_of(stopped_by(signal.SIGTERM), monkeypatch, settled) == 75
    assert code_of(stopped_by(signal.SIGTERM, signal.SIGUSR2), monkeypatch, settled) == 75
    assert code_of(warned_before_it_listens, monkeypatch, settled) == 75
    assert settled == [
        (0, set()),
        (3, set()),
        (4, set()),
        (1, set()),
        (75, set()),
        (75, {signal.SIGTERM}),
        (75, {signal.SIGTERM, signal.SIGUSR2}),
        (75, {signal.SIGUSR2}),
    ]


def test_an_allocation_is_one_job_of_workers_without_mpi(request_of):
    request = request_of(
        500, Profile(max_array=3, python="python", cpus_per_task=2), workers=(8, 64)
    )
    [text] = submit.batch_text(request)
    assert "#SBATCH --nodes=8" in text and "#SBATCH --ntasks-per-node=64" in text
    assert "export HPC_CLOSURE_WORKER=auto" in text and "array" not in text
    [srun] = [line for line in text.splitlines() if line.startswith("srun")]
    assert "--mpi=none --kill-on-bad-exit=0" in srun and "%j_%N_log.out" in srun
    assert submit.cost(request) == "8 nodes x 1 h x 128 cores <= 1024 core-hours"


def test_idle_gpus_of_an_allocation_are_named(request_of, programs, caplog):
    fake_slurm(programs)
    for per_node, words in ((2, 1), (4, 0), (8, 0)):
        caplog.clear()
        profile = Profile(python="python", node_local=[])
        submit.submit(request_of(4, profile, devices=4, workers=(1, per_node)))
        assert caplog.text.count("with 4 GPUs: a worker uses one GPU") == words


def test_the_experiment_requests_an_allocation(tmp_path):
    changes = {"cluster": {"allocation": {"nodes": 2, "workers_per_node": 4}}}
    experiment = Experiment(root=str(tmp_path), **changes)
    run = Run.of(experiment)
    units = ["000000-000019"]
    for stage, workers in (("rollout", (2, 4)), ("train", None)):
        request = submit.Request.of(experiment, run, units, slurm_payload.run_units, stage)
        assert request.workers == workers


@pytest.mark.parametrize("workers", [None, (1, 3)])
def test_units_on_this_machine(tmp_path, monkeypatch, workers):
    """The local executor: real processes of submitit, no Slurm."""
    monkeypatch.setenv("PYTHONPATH", TESTS)
    plan = {
        "run": str(tmp_path / "run"),
        "members": 6,
        "per_block": 2,
        "steps": 10,
        "seconds": 0.1,
    }
    books = slurm_payload.ledger(plan)
    atomic.write_text(books.run.config, json.dumps(plan))
    units = tuple(unit.name for unit in books.plan(6, 2))
    request = submit.Request(
        books.run,
        units,
        slurm_payload.run_units,
        Profile(),
        max_running_tasks=2,
        workers=workers,
    )
    found = submit.submit(request, "local")
    if workers:  # each has all units
        assert [len(task) for one in found for task in one.tasks] == [3, 3, 3]
    else:
        assert sum(len(task) for one in found for task in one.tasks) == 3 and len(found) <= 2
    for _ in range(300):
        if books.survey(6, 2).counts()["done"] == 3:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("\n".join(one.log.read_text() for one in found))
    assert squeue.queued_units(books.run) == {}
