"""Submission without a Slurm: profiles, batch text, arrays, queue; fake programs on PATH."""

import json
import os
import pickle
import signal
import stat
import sys
import time
from pathlib import Path

import cloudpickle
import pytest
import slurm_payload
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.rollout import site as profiles
from hpc_closure.rollout import submit
from hpc_closure.rollout.site import Profile, load_profile
from hpc_closure.work import atomic

TESTS = str(Path(__file__).parent)


def names(number):
    return [f"{index:06d}-{index:06d}" for index in range(number)]


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """PATH with nothing but the fake programs that a test makes: ``programs("squeue", text)``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)

    def make(name, text):
        path = folder / name
        path.write_text(f"#!/bin/bash\nPATH=/usr/bin:/bin\nhere={tmp_path}\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return make


@pytest.fixture
def request_of(tmp_path):
    def make(units=4, profile=None, **changes):
        profile = profile or Profile(python="python", node_local=[])
        return submit.Request(
            tmp_path / "config.yaml",
            Run(tmp_path / "runs" / "study"),
            tuple(names(units)),
            profile,
            **changes,
        )

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


# Profiles


@pytest.mark.parametrize("name", profiles.profiles())
def test_shipped_profiles_load(name):
    profile = load_profile(name)
    assert profile.name == name
    for stage in ("generate", "train", "rollout", "evaluate"):
        assert profile.for_stage(stage).options() is not None


def test_profiles_by_name_in_the_working_folder_and_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "slurm" / "profiles"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("account: abc\nmem: 4000\n")
    assert load_profile("mine").options() == {"account": "abc", "mem": "4000"}
    assert load_profile(folder / "mine.yaml").name == "mine"
    assert load_profile("testbed").partition == "main"  # of the checkout, still found
    assert load_profile(None).options() == {}


def test_the_profile_in_the_docs_loads(tmp_path):
    page = (Path(TESTS).parent / "docs" / "cluster.md").read_text()
    text = page.split("```text\n")[1].split("```")[0]
    (tmp_path / "site.yaml").write_text(text)
    site = load_profile(tmp_path / "site.yaml")
    assert site.for_stage("train").options() == {
        "account": "my_project",
        "partition": "gpu",
        "gpus-per-node": 4,
        "cpus-per-task": 8,
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("acount: x", "unknown key acount; did you mean account?"),
        ("stages: {train: {gpus: 4}}", "unknown key stages.train.gpus; did you mean gres?"),
        ("max_array: 0", "max_array=0"),
        ("stages: {trian: {}}", "stages.trian"),
        ("walltime: soon", "'soon'"),
        ("a: [", "not valid YAML"),
    ],
)
def test_profile_errors_name_the_key(tmp_path, text, message):
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="site.yaml") as error:
        load_profile(path)
    if "did you mean gres" not in message:
        assert message in str(error.value)


def test_unknown_profiles_name_the_known():
    with pytest.raises(ValueError, match="did you mean testbed"):
        load_profile("testbad")
    with pytest.raises(ValueError, match="no such file"):
        load_profile("./testbed.yaml.not")


def test_a_stage_replaces_what_it_states():
    site = Profile.model_validate(
        {
            "account": "a",
            "gres": "gpu:a100:4",
            "extra": {"exclusive": True},
            "stages": {
                "generate": {"gpus_per_node": 0, "partition": "cpu"},
                "train": {"extra": {"mail-type": "END"}},
            },
        }
    )
    assert site.devices == 4
    assert site.for_stage("generate").options() == {
        "account": "a",
        "partition": "cpu",
        "exclusive": True,
    }
    assert site.for_stage("train").options() == {
        "account": "a",
        "gres": "gpu:a100:4",
        "exclusive": True,
        "mail-type": "END",
    }
    assert site.for_stage("rollout") is site


@pytest.mark.parametrize(
    "gres, devices",
    [(None, 0), ("gpu", 1), ("gpu:4", 4), ("gpu:a100", 1), ("gpu:a100:2", 2), ("shard:8", 0)],
)
def test_devices_of_gres(gres, devices):
    assert Profile(gres=gres).devices == devices


# Requests


def test_the_experiment_wins_over_the_profile_where_it_states_something(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "base": "quickstart",
                "root": str(tmp_path),
                "cluster": {"walltime": "2h", "members_per_block": 10, "units_per_task": 3},
            }
        )
    )
    site = Profile(walltime="9h", throttle=7, signal_lead="4m", gpus_per_node=2, max_requeues=5)
    request = submit.Request.of(reading.load(path), path, Run(tmp_path), names(4), site)
    assert (request.walltime, request.throttle, request.signal_lead) == (7200.0, 7, 240.0)
    assert (request.max_requeues, request.units_per_task, request.devices) == (5, 3, 2)


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
        request_of(walltime=walltime, signal_lead=lead)
    else:
        with pytest.raises(ValueError, match="shorten it"):
            request_of(walltime=walltime, signal_lead=lead)


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
    request = request_of(5, Profile(max_array=2), throttle=4)
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
    request = request_of(4, site, devices=1, walltime=5400.0, throttle=2)
    [text] = submit.batch_text(request)
    assert text == GOLDEN.format(folder=tmp_path / "runs/study/logs/rollout/jobs")
    assert sorted(tmp_path.rglob("*")) == before


def test_sbatch_gets_the_batch_text(request_of, programs, tmp_path):
    fake_slurm(programs)
    request = request_of(7, Profile(max_array=3, python="python", node_local=[]), throttle=4)
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
    request = submit.Request(Path("x.yaml"), Run("/tmp/runs/study"), tuple(names(1)), Profile())
    with pytest.raises(ValueError, match="/tmp is usually a node's own disk.*node_local"):
        submit.submit(request)
    assert not Path("/tmp/runs/study/.units").exists()


def test_no_slurm_is_said_in_one_line(request_of, programs):
    with pytest.raises(RuntimeError, match="no Slurm here"):
        submit.submit(request_of())
    with pytest.raises(ValueError, match="expected slurm or local"):
        submit.submit(request_of(), "cloud")
    assert submit.submit(request_of(0)) == []


# The queue


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
    found = submit.queued_units(run)
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
    assert submit.queued_members(run) == {20, 21}


@pytest.mark.parametrize("squeue", [None, "exit 1", "sleep 30"])
def test_a_queue_that_does_not_answer_is_no_error(tmp_path, programs, squeue):
    run = Run(tmp_path / "run")
    submissions(run)
    if squeue:
        programs("squeue", squeue)
    start = time.monotonic()
    assert submit.queued_units(run, timeout=0.5) == {}
    assert time.monotonic() - start < 5


def test_the_queue_is_asked_only_about_submissions_and_sacct_never(tmp_path, programs, request_of):
    fake_slurm(programs)
    for name in ("squeue", "sacct", "scontrol"):
        programs(name, f"echo {name} >> $here/asked")
    assert submit.queued_units(Run(tmp_path / "none")) == {}
    request = request_of(6, Profile(max_array=2, node_local=[]))
    submit.submit(request)
    submit.queued_units(request.run)
    assert (tmp_path / "asked").read_text().split() == ["squeue"]


# The payload


def test_the_payload_is_small_and_holds_no_progress(tmp_path):
    payload = submit.Payload("/x/config.yaml", ("000000-000019",), "slurm_payload:run_units")
    again = payload.checkpoint()
    assert again.function is payload and not again.args and not again.kwargs
    copy = pickle.loads(cloudpickle.dumps(payload))
    assert vars(copy) == vars(payload)
    assert len(cloudpickle.dumps(payload)) < 300


def test_a_task_killed_while_it_was_queued_again_is_queued_again(tmp_path, monkeypatch):
    for name, value in {
        "SUBMITIT_EXECUTOR": "slurm",
        "SUBMITIT_FOLDER": str(tmp_path),
        "SLURM_JOB_ID": "12",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    left = tmp_path / "12_submitted.pkl.save_tmp"
    left.touch()
    submit.Payload("x", ("000000-000000",), "slurm_payload:run_units").checkpoint()
    assert not left.exists()


def run_payload(function, monkeypatch):
    """Exit code of a payload whose units' loop is ``function``."""
    monkeypatch.setattr(slurm_payload, "run_units", function)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        submit.Payload("x", ("000000-000000",), "slurm_payload:run_units")()
    except SystemExit as end:
        return end.code
    finally:
        for number, previous in handlers.items():
            signal.signal(number, previous)
    return 0


@pytest.fixture
def handler():
    """Stands for submitit's handler of SIGUSR2, which requeues and exits."""
    calls = []

    def requeue(number, frame):
        calls.append(number)
        sys.exit(255)

    previous = {
        name: signal.signal(name, requeue if name == signal.SIGUSR2 else signal.SIG_IGN)
        for name in (signal.SIGUSR2, signal.SIGTERM)
    }
    yield calls
    for name, old in previous.items():
        signal.signal(name, old)


def stopped_by(*signals):
    def run_units(config_path, units):
        for number in signals:
            signal.signal(number, lambda *_: None)  # as hpc_closure.stop.Stop does
            os.kill(os.getpid(), number)
        return 75

    return run_units


def test_which_stops_go_back_to_the_queue(programs, monkeypatch, handler):
    assert run_payload(lambda *_: 0, monkeypatch) == 0
    assert run_payload(lambda *_: 3, monkeypatch) == 3
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 60))
    assert run_payload(stopped_by(signal.SIGTERM), monkeypatch) == 75  # scancel
    assert handler == []
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() - 1))  # and the warning was lost
    assert run_payload(stopped_by(signal.SIGTERM), monkeypatch) == 255
    assert handler.pop() == signal.SIGUSR2
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert run_payload(stopped_by(), monkeypatch) == 255  # --max-elapsed
    assert run_payload(stopped_by(signal.SIGUSR2), monkeypatch) == 255  # time limit
    assert run_payload(stopped_by(signal.SIGTERM, signal.SIGUSR2), monkeypatch) == 255
    assert len(handler) == 3


def test_a_partition_that_requeues_is_left_alone(programs, monkeypatch, handler, capsys):
    programs("scontrol", 'echo "$3=x PreemptTime=2030-01-01T00:00:00 PreemptMode=REQUEUE"')
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_JOB_PARTITION", "main")
    assert run_payload(stopped_by(signal.SIGUSR2), monkeypatch) == 75
    assert handler == [] and "Slurm does it itself" in capsys.readouterr().err
    programs("scontrol", 'echo "PreemptTime=None PreemptMode=REQUEUE"')
    assert run_payload(stopped_by(signal.SIGUSR2), monkeypatch) == 255


def test_requeues_end(programs, monkeypatch, handler, capsys):
    monkeypatch.setenv("HPC_CLOSURE_MAX_REQUEUES", "2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run_payload(stopped_by(signal.SIGUSR2), monkeypatch) == 255
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert run_payload(stopped_by(signal.SIGUSR2), monkeypatch) == 75
    assert "started 3 times already (cluster.max_requeues)" in capsys.readouterr().err


def test_no_scontrol_is_no_failure_of_the_unit(programs, monkeypatch, capsys):
    import submitit.core.utils

    for error, message in (
        (FileNotFoundError("scontrol"), "there is no scontrol on this node"),
        (submitit.core.utils.UncompletedJobError("timed-out too many times"), "too many"),
    ):

        def requeue(number, frame, error=error):
            raise error

        previous = signal.signal(signal.SIGUSR2, requeue)
        try:
            assert run_payload(stopped_by(signal.SIGUSR2), monkeypatch) == 75
        finally:
            signal.signal(signal.SIGUSR2, previous)
        assert message in capsys.readouterr().err


def test_units_on_this_machine(tmp_path, monkeypatch):
    """The local executor: real processes of submitit, no Slurm."""
    monkeypatch.setenv("PYTHONPATH", TESTS)
    plan = {
        "run": str(tmp_path / "run"),
        "members": 6,
        "per_block": 2,
        "steps": 10,
        "seconds": 0.1,
    }
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps(plan))
    books = slurm_payload.ledger(plan)
    units = tuple(unit.name for unit in books.plan(6, 2))
    request = submit.Request(
        path, books.run, units, Profile(), payload="slurm_payload:run_units", throttle=2
    )
    found = submit.submit(request, "local")
    assert sum(len(task) for one in found for task in one.tasks) == 3 and len(found) <= 2
    for _ in range(300):
        if books.survey(6, 2).counts()["done"] == 3:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("\n".join(one.log.read_text() for one in found))
    assert submit.queued_units(books.run) == {}
