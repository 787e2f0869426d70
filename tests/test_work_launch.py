"""Who am I, on which device, with how many threads: for every launcher."""

import os
import subprocess
import sys

import pytest
import torch

from hpc_closure.work import launch

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
        ({}, (0, 1, 0, 1, "")),
        (TORCHRUN, (5, 8, 1, 4, "torchrun")),
        (OPENMPI, (3, 4, 1, 2, "openmpi")),
        (HYDRA, (2, 4, 0, 2, "hydra")),
        (SRUN, (6, 7, 2, 3, "slurm")),
        ({"PMIX_RANK": "1"}, (1, 0, 0, 1, "pmix")),
        # srun --mpi=pmi2 speaks PMI too, but only Slurm knows the local rank
        ({**SRUN, "PMI_RANK": "6", "PMI_SIZE": "7"}, (6, 7, 2, 3, "slurm")),
        # mpirun by hand inside one task of an allocation
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", **HYDRA}, (2, 4, 0, 2, "hydra")),
        # a batch script is one process, whatever was allocated
        (BATCH, (0, 1, 0, 1, "")),
        (
            {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3(x2),1", "SLURM_NODEID": "2"},
            (6, 7, 2, 1, "slurm"),
        ),
    ],
)
def test_launch(environ, expected):
    found = launch.launch(environ)
    assert (found.rank, found.size, found.local_rank, found.local_size, found.launcher) == expected
    assert found.mpi == (found.launcher not in ("", "torchrun"))


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="RANK='x' in the environment: not a number"):
        launch.launch({"RANK": "x", "WORLD_SIZE": "2"})


def test_a_wrong_variable_is_one_line(hpc_closure_command, tiny):
    done = hpc_closure_command("status", tiny, PMI_RANK="x", PMI_SIZE="2")
    assert done.returncode == 0
    done = hpc_closure_command("generate", tiny, PMI_RANK="x", PMI_SIZE="2")
    assert done.returncode == 1
    assert done.stderr == "hpc-closure: PMI_RANK='x' in the environment: not a number\n"


def test_gpus():
    """Process i of a machine on GPU i; one visible GPU: the scheduler has bound already."""
    assert [launch.gpu_of(rank, 4, shared=False) for rank in range(4)] == [0, 1, 2, 3]
    assert [launch.gpu_of(rank, 1, shared=False) for rank in range(4)] == [0, 0, 0, 0]
    with pytest.raises(RuntimeError, match="process 2 of this machine has no GPU: 2 are visible"):
        launch.gpu_of(2, 2, shared=False)
    assert [launch.gpu_of(rank, 2, shared=True) for rank in range(4)] == [0, 1, 0, 1]


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    assert launch.choose_device("cpu", shared=False) == "cpu"
    assert launch.choose_device("auto", shared=True) == "cuda:1"
    with pytest.raises(RuntimeError, match="start at most 2 processes per machine"):
        launch.choose_device("auto", shared=False)


@pytest.fixture
def threads(monkeypatch):
    """Eight cores, and nothing said about threads."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    yield monkeypatch
    torch.set_num_threads(before)


def test_threads_are_the_share_of_the_cores(threads):
    assert launch.set_threads(0).startswith("8 thread(s)") and torch.get_num_threads() == 8
    for key, value in {**HYDRA, "MPI_LOCALNRANKS": "4"}.items():
        threads.setenv(key, value)
    launch.set_threads(0)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("samples, expected", [(1, 1), (64, 1), (128, 2), (10000, 8)])
def test_threads_are_no_more_than_there_is_work(samples, expected, threads):
    launch.set_threads(0, values=samples * 64**2 * 16)
    assert torch.get_num_threads() == expected


def test_threads_that_the_user_names(threads):
    assert launch.set_threads(3, values=1.0) == "3 thread(s) (cluster.threads)"
    assert torch.get_num_threads() == 3
    threads.setenv("OMP_NUM_THREADS", "5")
    torch.set_num_threads(5)  # as torch does when it is imported
    assert launch.set_threads(0, values=1.0) == "5 thread(s) (OMP_NUM_THREADS)"
    assert torch.get_num_threads() == 5


@pytest.mark.parametrize("said, expected", [(None, "passive"), ("active", "active")])
def test_threads_wait_passively(said, expected, environment):
    """Set before torch is there, for its OpenMP reads it once."""
    code = (
        "import os, sys, hpc_closure.__main__;"
        "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    variables = {**environment, **({"OMP_WAIT_POLICY": said} if said else {})}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables
    )
    assert done.stdout.split() == [expected, "False"]
