"""What all tests share: one thread per process, and a way to start MPI ranks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
for launcher_variable in ("PMI_RANK", "PMI_SIZE", "RANK", "WORLD_SIZE"):
    os.environ.pop(launcher_variable, None)

BIN = Path(sys.executable).parent


@pytest.fixture(scope="session")
def environment():
    """Environment of child processes: the environment's own programs first on PATH."""
    return {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }


@pytest.fixture(scope="session")
def mpirun(environment):
    """Start a command on ranks: ``mpirun(2, [sys.executable, "x.py"])``, a CompletedProcess."""
    program = shutil.which("mpirun", path=environment["PATH"])
    if program is None:
        pytest.skip("no mpirun; pip install 'hpc_closure[mpi]'")
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    extra = ["--oversubscribe"] if "Open MPI" in version else []

    def start(ranks, command, timeout=120, **options):
        return subprocess.run(
            [program, *extra, "-n", str(ranks), *map(str, command)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**environment, **options.pop("env", {})},
            **options,
        )

    return start
