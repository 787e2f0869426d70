"""Who am I, on which device, with how many threads: for every launcher."""

import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch

from hpc_closure.bench import claims as claims_bench
from hpc_closure.work import atomic, hdf5, launch, loop
from hpc_closure.work.stop import Stop

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


# the GPUs of an allocation

NODES, GPUS, PER_GPU = 2, 3, 4
WORKERS = NODES * GPUS


def work_on_a_gpu(folder, index, seconds):
    """A worker as srun starts it; FAKE_GPUS is the number of GPUs of its node."""
    node, place = divmod(index, GPUS)
    os.environ |= {
        launch.WORKER: "auto",
        "SLURM_PROCID": str(index),
        "SLURM_STEP_NUM_TASKS": str(WORKERS),
        "SLURM_LOCALID": str(place),
        "SLURM_NODEID": str(node),
        "SLURM_STEP_TASKS_PER_NODE": f"{GPUS}(x{NODES})",
    }
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: int(os.environ["FAKE_GPUS"])
    device = launch.choose_device("auto", shared=True)
    ledger = claims_bench.ledger_of(folder, WORKERS * PER_GPU, 1)

    def run_unit(unit, claim):
        begin = time.monotonic()
        time.sleep(seconds)
        with ledger.publish(unit, claim=claim) as part, hdf5.open_hdf5(part, "w") as file:
            file.attrs.update({**ledger.attributes(unit), "complete": 1})
        record = {"node": node, "device": device, "begin": begin, "end": time.monotonic()}
        atomic.append_jsonl(folder / "units.jsonl", {**record, "worker": index})

    loop.work(ledger, ledger.plan(), run_unit, stop=Stop())
    os._exit(0)


@pytest.mark.parametrize("gpus", [GPUS, 1])
def test_workers_share_the_gpus_of_their_nodes_and_units_take_turns(tmp_path, monkeypatch, gpus):
    """A worker per GPU; where Slurm shows each process one GPU only, that is number 0."""
    monkeypatch.setenv("FAKE_GPUS", str(gpus))
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=work_on_a_gpu, args=(tmp_path, index, 0.2))
        for index in range(WORKERS)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    units = atomic.read_jsonl(tmp_path / "units.jsonl")
    assert len(units) == WORKERS * PER_GPU
    places = {unit["worker"]: (unit["node"], unit["device"]) for unit in units}
    numbers = range(GPUS) if gpus > 1 else GPUS * [0]
    expected = [(node, f"cuda:{number}") for node in range(NODES) for number in numbers]
    assert [places[index] for index in range(WORKERS)] == expected
    for index in range(WORKERS):
        mine = sorted((unit["begin"], unit["end"]) for unit in units if unit["worker"] == index)
        assert len(mine) >= 2
        assert all(end <= begin for (_, end), (begin, _) in zip(mine, mine[1:]))


def test_workers_of_a_plain_shell_spread_over_the_gpus():
    places = [launch.launch({"HPC_CLOSURE_WORKER": f"{index}/8"}) for index in range(8)]
    assert [launch.gpu_of(one.local_rank, 4, shared=True) for one in places] == 2 * [0, 1, 2, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_workers_use_all_gpus_of_this_machine():
    """The real ones, in processes of their own: one worker per GPU, then two."""
    number = torch.cuda.device_count()
    for workers in (number, 2 * number):
        code = (
            "import torch; from hpc_closure.work import launch\n"
            "device = launch.choose_device('cuda', shared=True)\n"
            "assert float(torch.ones(8, device=device).sum()) == 8\n"
            "print(device)"
        )
        found = [
            subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, launch.WORKER: f"{index}/{workers}"},
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
            for index in range(workers)
        ]
        assert found == [f"cuda:{index % number}" for index in range(workers)]
