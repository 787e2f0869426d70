"""What srun is told: the MPI library's words, and where the processes of a training meet."""

import os
import socket
import subprocess
import sys

import pytest

from hpc_closure.batch import environment

pytest_plugins = ["fake_programs"]


@pytest.mark.parametrize(
    "library, mpi, netmod",
    [
        ("Open MPI v5.0.7, package: Debian OpenMPI", "pmix", None),
        ("MPICH Version: 5.0.2 MPICH Device: ch4:ucx ofi", "pmi2", "ofi"),
        ("MPICH Version: 4.2.0 MPICH Device: ch4:ofi", "pmi2", None),
        ("MPI VERSION : CRAY MPICH version 8.1 MPICH Device: ch4:ucx ofi", "cray_shasta", None),
        ("Intel(R) MPI Library 2021.18", "pmi2", None),
        ("MVAPICH Version : 4.0", "pmi2", None),
        ("", "none", None),
    ],
)
def test_srun_is_told_what_the_mpi_library_speaks(programs, library, mpi, netmod):
    found = environment.settings(library, {})
    assert (found["SLURM_MPI_TYPE"], found.get("MPIR_CVAR_CH4_NETMOD")) == (mpi, netmod)
    own = {"SLURM_MPI_TYPE": "pmix_v5", "MPIR_CVAR_CH4_NETMOD": "ucx"}
    told = environment.settings(library, own)
    assert told["SLURM_MPI_TYPE"] == "pmix_v5"
    assert told.get("MPIR_CVAR_CH4_NETMOD") == ("ucx" if netmod else None)


def test_processes_meet_on_the_first_node_at_another_port_after_a_requeue(programs):
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]"}
    assert environment.meeting_point(job)["MASTER_ADDR"] == socket.gethostname()  # no scontrol
    programs("scontrol", '[ "$*" = "show hostnames node[1-2]" ] && echo node1 && echo node2')
    first = environment.meeting_point(job)
    again = environment.meeting_point(job | {"SLURM_RESTART_COUNT": "1"})
    assert first == {"MASTER_ADDR": "node1", "MASTER_PORT": "10217"}
    assert again == {"MASTER_ADDR": "node1", "MASTER_PORT": "10218"}


def test_a_shell_takes_what_is_printed(tmp_path):
    """With the MPI library that is installed, and a word that a shell would split."""
    line = f'eval "$({sys.executable} -m hpc_closure.batch.environment)"'
    asked = line + '; echo "$SLURM_MPI_TYPE/$MPIR_CVAR_CH4_NETMOD/$SLURM_WAIT"'
    known = {**os.environ, "MPIR_CVAR_CH4_NETMOD": "", "SLURM_MPI_TYPE": ""}
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, env=known)
    kind, netmod, wait = done.stdout.strip().split("/")
    assert kind in ("pmi2", "pmix", "cray_shasta") and netmod in ("", "ofi") and wait == "300"
    own = known | {"SLURM_MPI_TYPE": "two words; exit 3"}
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, env=own)
    assert done.stdout.startswith("two words; exit 3/")
