"""The processes of a training meet, whatever started them."""

import subprocess
import sys

import pytest

ASK = """
import sys, torch
from hpc_closure.work import launch, mpi
from hpc_closure.train import processes
world = mpi.world()
found = processes.join("cpu", world.bcast if world.size > 1 else None)
total = float(found.mean(torch.tensor(float(found.rank))))
word = found.share("hello" if found.first else None)
found.wait()
sys.stdout.write(f"{found.rank} {found.size} {launch.launch().local_rank} {total} {word}\\n")
processes.leave()
"""


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
