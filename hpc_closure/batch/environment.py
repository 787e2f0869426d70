"""Print the environment variables that srun needs for one MPI program, as shell lines:

    eval "$(python3 -m hpc_closure.batch.environment)"

Run it inside the job: only there the MPI library and the nodes are known.
"""

import os
import shlex
import socket
import subprocess
from collections.abc import Mapping

from hpc_closure.work import mpi


def settings(library: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to export.

    Args:
        library: version text of the MPI library; "" without one.
        environ: the job's environment.
    """
    variables = {
        # After a stop signal, ranks exit one after another; srun must not kill the rest. A
        # crashed rank aborts the program through MPI.
        "SLURM_KILL_BAD_EXIT": "0",
        "SLURM_WAIT": "300",
        "SLURM_MPI_TYPE": environ.get("SLURM_MPI_TYPE") or mpi_type(library),
        **meeting_point(environ),
    }
    # MPICH publishes UCX addresses in lines of up to 1100 characters, but Slurm reads 1024, so
    # MPI_Init sometimes fails. The addresses of ofi, the pip wheel's other transport, are short.
    if "CRAY" not in library and all(word in library for word in ("MPICH", "ucx", "ofi")):
        variables["MPIR_CVAR_CH4_NETMOD"] = environ.get("MPIR_CVAR_CH4_NETMOD") or "ofi"
    return variables


def mpi_type(library: str) -> str:
    """Choose the value of ``srun --mpi=...``; the MPI library decides it, not the site."""
    if "Open MPI" in library:
        return "pmix"
    if "CRAY" in library:
        return "cray_shasta"
    return "pmi2" if any(name in library for name in ("MPICH", "Intel", "MVAPICH")) else "none"


def meeting_point(environ: Mapping[str, str]) -> dict[str, str]:
    """Choose the rendezvous of the training processes: a port of the job's first node.

    It needs neither ssh nor a host file. A requeued job takes another port, because the old one
    may still be in use.
    """
    try:
        nodes = subprocess.run(
            ["scontrol", "show", "hostnames", environ.get("SLURM_JOB_NODELIST", "")],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):
        nodes = []
    job, restarts = environ.get("SLURM_JOB_ID", 0), environ.get("SLURM_RESTART_COUNT") or 0
    return {
        "MASTER_ADDR": (nodes or [socket.gethostname()])[0],
        "MASTER_PORT": str(10000 + (int(job) * 31 + int(restarts)) % 20000),
    }


if __name__ == "__main__":
    for name, value in settings(mpi.library(), os.environ).items():
        print(f"export {name}={shlex.quote(value)}")
