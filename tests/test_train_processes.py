"""Who am I, on which device, and where do the others wait: for every launcher."""

import subprocess
import sys

import pytest

from hpc_closure.train.processes import bind, identify

ASK = """
import sys, torch
from hpc_closure.work import mpi
from hpc_closure.train import processes
world = mpi.world()
found = processes.join("cpu", world.bcast if world.size > 1 else None)
total = float(found.mean(torch.tensor(float(found.rank))))
word = found.share("hello" if found.first else None)
found.wait()
sys.stdout.write(f"{found.rank} {found.size} {found.local_rank} {total} {word}\\n")
processes.leave()
"""

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
SRUN = {
    "SLURM_PROCID": "6",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_NTASKS": "7",
}
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "12"}


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({}, (0, 1, 0, 1, "none")),
        (TORCHRUN, (5, 8, 1, 4, "torchrun")),
        (OPENMPI, (3, 4, 1, 2, "openmpi")),
        (HYDRA, (2, 4, 0, 2, "pmi")),
        (SRUN, (6, 7, 2, 3, "slurm")),
        # srun --mpi=pmi2 speaks PMI too, but only Slurm knows the local rank
        ({**SRUN, "PMI_RANK": "6", "PMI_SIZE": "7"}, (6, 7, 2, 3, "slurm")),
        # mpirun by hand inside one task of an allocation
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", **HYDRA}, (2, 4, 0, 2, "pmi")),
        # a batch script is one process, whatever was allocated
        (BATCH, (0, 1, 0, 1, "none")),
        (
            {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3(x2),1", "SLURM_NODEID": "2"},
            (6, 7, 2, 1, "slurm"),
        ),
    ],
)
def test_identify(environ, expected):
    found = identify(environ)
    assert (found.rank, found.size, found.local_rank, found.local_size, found.launcher) == expected


def test_identify_refuses_nonsense():
    with pytest.raises(ValueError, match="RANK='x' in the environment: not a number"):
        identify({"RANK": "x", "WORLD_SIZE": "2"})


def test_bind():
    """Process i of a machine on device i; one visible device: the scheduler has bound already."""
    assert [bind(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert [bind(rank, 1) for rank in range(4)] == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="process 2 of this machine has no device: 2 are visible"):
        bind(2, 2)


@pytest.mark.mpi
@pytest.mark.parametrize("size", [1, 2, 4])
def test_processes_of_mpirun_meet(size, mpirun):
    done = mpirun(size, [sys.executable, "-c", ASK])
    assert done.returncode == 0, done.stderr
    mean = (size - 1) / 2
    lines = sorted(done.stdout.split("\n")[:-1])
    assert lines == [f"{rank} {size} {rank} {mean} hello" for rank in range(size)]


def test_processes_of_torchrun_meet(environment, tmp_path):
    script = tmp_path / "ask.py"
    script.write_text(ASK)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    done = subprocess.run(
        [
            sys.executable,
            *command,
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:0",
            str(script),
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")[:-1]) == ["0 2 0 0.5 hello", "1 2 1 0.5 hello"]


def test_a_launcher_without_a_meeting_point_is_named(environment):
    code = "from hpc_closure.train import processes; processes.join('cpu')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**environment, "PMI_RANK": "0", "PMI_SIZE": "2"},
        timeout=60,
    )
    assert done.returncode == 1
    assert "RuntimeError: 2 processes, but neither MASTER_ADDR" in done.stderr
