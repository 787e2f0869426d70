"""What srun must be told before it starts the processes of one program, as lines for a shell:

    eval "$(python3 -m hpc_closure.batch.environment)"

Run inside the job, because that is where the MPI library and the nodes are known.
"""

import os
import shlex
import socket
import subprocess
from collections.abc import Mapping

from hpc_closure.work import mpi


def settings(library: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables to export.

    Args:
        library: version text of the MPI library, "" for none.
        environ: the job's environment.
    """
    found = {
        # Ranks leave one after another when they were told to stop; a crashed one aborts.
        "SLURM_KILL_BAD_EXIT": "0",
        "SLURM_WAIT": "300",
        "SLURM_MPI_TYPE": environ.get("SLURM_MPI_TYPE") or mpi_type(library),
        **meeting_point(environ),
    }
    # MPICH publishes UCX addresses in lines of up to 1100 characters, of which Slurm reads 1024:
    # now and then MPI_Init fails. The addresses of the pip wheel's other transport are short.
    if "CRAY" not in library and all(word in library for word in ("MPICH", "ucx", "ofi")):
        found["MPIR_CVAR_CH4_NETMOD"] = environ.get("MPIR_CVAR_CH4_NETMOD") or "ofi"
    return found


def mpi_type(library: str) -> str:
    """Which ``srun --mpi=...`` an MPI library speaks; that is no matter of the site."""
    if "Open MPI" in library:
        return "pmix"
    if "CRAY" in library:
        return "cray_shasta"
    return "pmi2" if any(name in library for name in ("MPICH", "Intel", "MVAPICH")) else "none"


def meeting_point(environ: Mapping[str, str]) -> dict[str, str]:
    """Where the processes of a training meet: the first node, no ssh and no host file.

    A start after a requeue takes another port, for the old one may still be held.
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
