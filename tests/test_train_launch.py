"""launch/train picks the launcher of the place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch" / "train"


@pytest.fixture
def show(tmp_path, environment):
    """The command that launch/train would run, with these programs and variables."""

    def run(*arguments, programs=(), path=None, **environ):
        for name in programs:
            program = tmp_path / name
            program.write_text("#!/bin/sh\nexit 1\n")
            program.chmod(0o755)
        clean = {key: value for key, value in environment.items() if not key.startswith("SLURM")}
        search = os.pathsep.join([str(tmp_path), path or clean["PATH"]])
        return subprocess.run(
            [LAUNCH, "--show", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env={**clean, "PATH": search, "HPC_CLOSURE_VENV": "/nonexistent", **environ},
        )

    return run


def test_one_process(show):
    done = show("quickstart", "train.lr=1e-4", "--max-elapsed", "1h")
    assert done.stdout.endswith("-m hpc_closure train quickstart train.lr=1e-4 --max-elapsed 1h\n")
    assert "mpirun" not in done.stdout


def test_several_processes(show):
    done = show("-n", "2", "x.yaml", programs=["mpirun"])
    assert "launch/mpirun -n 2 " in done.stdout
    assert done.stdout.endswith("-m hpc_closure train x.yaml\n")


def test_without_mpi(show, tmp_path):
    for name, target in (
        ("python", sys.executable),
        *((n, f"/usr/bin/{n}") for n in ("bash", "dirname", "nproc", "sed", "env")),
    ):
        (tmp_path / name).symlink_to(target)
    done = show("-n", "2", "x.yaml", path=str(tmp_path))
    assert "torch.distributed.run --standalone --nproc-per-node 2 -m hpc_closure" in done.stdout


def test_inside_an_allocation(show):
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}
    done = show("x.yaml", programs=["srun"], SLURM_MPI_TYPE="pmix", **slurm)
    assert done.stdout.startswith("srun --mpi=pmix ") and " -n " not in done.stdout
    done = show("-n", "8", "x.yaml", programs=["srun"], **slurm)
    assert done.stdout.startswith(("srun --mpi=pmi2 -n 8 ", "srun --mpi=pmix -n 8 "))
    inside = show("x.yaml", programs=["srun"], SLURM_STEP_NUM_TASKS="1", **slurm)
    assert "srun" not in inside.stdout.split()[0]


@pytest.mark.parametrize("arguments", [(), ("-n", "x", "a.yaml"), ("-n", "0", "a.yaml")])
def test_wrong_use(show, arguments):
    done = show(*arguments)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


def test_help(environment):
    done = subprocess.run([LAUNCH, "--help"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "launch/train -n 2 quickstart" in done.stdout
