"""The shell side of slurm/ without a Slurm: fake programs on PATH, dry runs."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parents[1] / "slurm"
SCRIPTS = sorted([*SLURM.glob("*.sbatch"), SLURM / "env.sh", *(SLURM / "testbed").glob("[ud]*")])
STAGES = ("generate", "train", "rollout", "evaluate")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash(path):
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(
            ["shellcheck", "-s", "bash", "-e", "SC1090,SC1091,SC2086,SC2034,SC2154", path],
            check=True,
        )


@pytest.mark.parametrize("stage", STAGES)
def test_batch_scripts_can_be_stopped_and_requeued(stage):
    text = (SLURM / f"{stage}.sbatch").read_text()
    for option in ("--signal=B:USR2@", "--requeue", "--open-mode=append", "--time="):
        assert f"#SBATCH {option}" in text
    assert text.rstrip().endswith("finish $?")


@pytest.fixture
def shell(tmp_path):
    """Runs lines of bash after env.sh, with fake programs: ``shell(lines, scontrol="...")``."""
    folder = tmp_path / "bin"

    def run(lines, environment=None, **programs):
        folder.mkdir(exist_ok=True)
        for name in ("bash", "date", "grep", "hostname", "cat", "kill", "sleep", "head"):
            if not (folder / name).exists():
                (folder / name).symlink_to(shutil.which(name))
        for name, text in programs.items():
            (folder / name).write_text(f"#!{shutil.which('bash')}\n{text}\n")
            (folder / name).chmod(stat.S_IRWXU)
        return subprocess.run(
            [shutil.which("bash"), "-c", f"source {SLURM}/env.sh\n{lines}"],
            text=True,
            capture_output=True,
            cwd=tmp_path,
            env={
                "PATH": str(folder),
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_PARTITION": "main",
                **(environment or {}),
            },
        )

    return run


@pytest.mark.parametrize(
    "library, mpi, netmod",
    [
        ("Open MPI v5.0.7, package: Debian OpenMPI", "pmix", ""),
        ("MPICH Version: 5.0.2 MPICH Device: ch4:ucx ofi", "pmi2", "ofi"),
        ("MPICH Version: 4.2.0 MPICH Device: ch4:ofi", "pmi2", ""),
        ("MPI VERSION : CRAY MPICH version 8.1 MPICH Device: ch4:ucx ofi", "cray_shasta", ""),
        ("Intel(R) MPI Library 2021.18", "pmi2", ""),
        ("MVAPICH Version : 4.0", "pmi2", ""),
        ("", "none", ""),
    ],
)
def test_srun_is_told_what_the_mpi_library_speaks(shell, library, mpi, netmod):
    asked = 'choose_mpi; echo "$SLURM_MPI_TYPE/${MPIR_CVAR_CH4_NETMOD:-}"'
    fake = f"echo '{library}'" if library else "exit 1"
    assert shell(asked, python3=fake).stdout.strip() == f"{mpi}/{netmod}"
    told = shell(asked, {"SLURM_MPI_TYPE": "pmix_v5", "MPIR_CVAR_CH4_NETMOD": "ucx"}, python3=fake)
    assert told.stdout.strip() == "pmix_v5/ucx"


def test_the_installed_mpi_is_recognised(tmp_path):
    pytest.importorskip("mpi4py")
    asked = f"source {SLURM}/env.sh; choose_mpi; echo $SLURM_MPI_TYPE"
    found = subprocess.run(
        ["bash", "-c", asked],
        capture_output=True,
        text=True,
        env={**os.environ, "HPC_CLOSURE_INTERPRETER": sys.executable},
    )
    assert found.stdout.strip() in ("pmi2", "pmix", "cray_shasta")


PREEMPTED = 'echo "JobState=RUNNING PreemptTime=2030-01-01T00:00:00 PreemptMode=REQUEUE"'
QUIET = 'echo "JobState=RUNNING PreemptTime=None PreemptMode=REQUEUE"; echo "$@" >> calls'


@pytest.mark.parametrize(
    "lines, environment, scontrol, code, said, requeued",
    [
        ("finish 0", {}, QUIET, 0, "exit code 0", False),
        ("finish 1", {}, QUIET, 1, "exit code 1", False),
        ("finish 3", {}, QUIET, 3, "exit code 3", False),
        ("finish 75", {}, QUIET, 75, "back to the queue (requeue 1 of at most 20)", True),
        ("heard=USR2; finish 75", {"SLURM_RESTART_COUNT": "2"}, QUIET, 75, "requeue 3 of", True),
        ("heard=' USR2 TERM'; finish 75", {}, QUIET, 75, "back to the queue", True),
        ("heard=TERM; finish 75", {}, QUIET, 75, "not requeued: cancelled", False),
        (
            "heard=TERM; finish 75",
            {"SLURM_JOB_END_TIME": "4000000000"},
            QUIET,
            75,
            "cancelled",
            False,
        ),
        (
            "heard=TERM; finish 75",
            {"SLURM_JOB_END_TIME": "9"},
            QUIET,
            75,
            "back to the queue",
            True,
        ),
        ("finish 75", {"SLURM_RESTART_COUNT": "20"}, QUIET, 75, "started 21 times already", False),
        ("finish 75", {"HPC_CLOSURE_MAX_REQUEUES": "0"}, QUIET, 75, "started 1 times", False),
        ("heard=USR2; finish 75", {}, PREEMPTED, 75, "Slurm does it itself", False),
        ("finish 75", {}, None, 75, "there is no scontrol on this node", False),
        ("finish 75", {}, QUIET + "; [ $1 != requeue ]", 75, "the cluster refused", True),
    ],
)
def test_only_75_is_requeued(shell, tmp_path, lines, environment, scontrol, code, said, requeued):
    done = shell(lines, environment, **({"scontrol": scontrol} if scontrol else {}))
    assert done.returncode == code and said in done.stdout, done
    calls = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
    assert ("requeue 7" in calls) == requeued


def test_an_array_task_requeues_itself_only(shell, tmp_path):
    shell("finish 75", {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}, scontrol=QUIET)
    assert "requeue 5_3" in (tmp_path / "calls").read_text()


def test_the_warning_reaches_the_step_and_its_exit_code_comes_back(shell):
    step = """trap 'echo warned; sleep 0.3; exit 75' USR2
        for ((i = 0; i < 200; i++)); do echo up > ready; sleep 0.05; done"""
    done = shell(
        """
        (while [ ! -e ready ]; do sleep 0.05; done; kill -USR2 $$) &
        run step
        echo "code $?, heard$heard" """,
        step=step,
    )
    assert "warned" in done.stdout and "code 75, heard USR2" in done.stdout, done
    assert "code 5" in shell("run bash -c 'exit 5'; echo code $?").stdout
    assert "code 137" in shell("run bash -c 'kill -9 $$'; echo code $?").stdout


def pipeline(folder, *arguments):
    return subprocess.run(
        [sys.executable, SLURM / "pipeline", *arguments],
        text=True,
        capture_output=True,
        cwd=folder,
        env={**os.environ, "PATH": "/nowhere", "OMP_NUM_THREADS": "1"},
    )


def test_pipeline_dry_run_needs_no_slurm_and_writes_nothing(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "base: quickstart\nroot: ./runs\nrollout: {members: 60}\n"
        "cluster: {profile: site.yaml, walltime: 2h, members_per_block: 20}\n"
    )
    (tmp_path / "site.yaml").write_text(
        "account: abc\nmodules: [gcc]\nmpi: pmix\nstages:\n"
        "  generate: {nodes: 2, ntasks_per_node: 8, walltime: 30m}\n"
        "  train: {gpus_per_node: 4, ntasks_per_node: 4}\n"
    )
    before = sorted(tmp_path.rglob("*"))
    done = pipeline(tmp_path, "mine.yaml", "train.steps=7", "--dry-run")
    assert done.returncode == 0, done.stderr
    costs = [line for line in done.stdout.splitlines() if line.startswith(STAGES)]
    assert costs == [
        "generate: 2 nodes x 0.5 h x 8 cores <= 8 core-hours",
        "train: 1 node x 2 h x 4 GPUs <= 8 GPU-hours",
        "rollout: 3 tasks x 2 h x 1 core <= 6 core-hours",
        "evaluate: 1 node x 2 h x 1 core <= 2 core-hours",
    ]
    commands = [
        line.split()
        for line in done.stdout.splitlines()
        if "sbatch" in line and "--parsable" in line
    ]
    assert [Path(words[-3]).name for words in commands] == [f"{stage}.sbatch" for stage in STAGES]
    for words in commands:
        assert words[-2:] == [str(tmp_path / "mine.yaml"), "train.steps=7"]
        assert "--account=abc" in words and "--signal=B:USR2@300" in words
    assert "--dependency" not in " ".join(commands[0])
    assert "--array=1-3%64" in commands[2] and "--time=02:00:00" in commands[2]
    assert "--time=00:30:00" in commands[0] and "--ntasks-per-node=8" in commands[0]
    assert "HPC_CLOSURE_SETUP='module load gcc'" in done.stdout
    assert "SLURM_MPI_TYPE=pmix" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_pipeline_chooses_stages_and_says_what_is_wrong(tmp_path):
    done = pipeline(tmp_path, "quickstart", "--stages", "evaluate", "--after", "12", "--dry-run")
    assert re.findall(r"dependency=(\S+)", done.stdout) == ["afterok:12"]
    for arguments, message in (
        (["quickstart", "--stages", "fly"], "expected some of generate"),
        (["quickstat"], "did you mean quickstart"),
        (["quickstart", "cluster.profile=nowhere"], "profile nowhere"),
        (["quickstart", "root=/tmp/no_such"], "node's own disk"),
    ):
        done = pipeline(tmp_path, *arguments)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    done = pipeline(tmp_path, "quickstart", "cluster.profile=testbed", "--stages", "train")
    assert done.returncode == 1 and "no sbatch here" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_testbed_says_in_one_line_why_not():
    command = [SLURM / "testbed" / "up"]
    if os.geteuid() == 0:
        command = ["setpriv", "--reuid=65534", "--clear-groups", *command]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines() == [
        "testbed/up: needs root (run: sudo slurm/testbed/up)"
    ]
    helped = subprocess.run([SLURM / "testbed" / "up", "--help"], capture_output=True, text=True)
    assert "--no-accounting" in helped.stdout
