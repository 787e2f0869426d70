"""Who this process is among those started with it, and what it computes on.

Each launcher says it in variables of its own; no other module reads them. MPI is not touched, and
nothing but the standard library is imported before a device or a number of threads is asked for.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

_LAUNCHERS = (
    # launcher, rank, size, local rank, local size
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    (
        "openmpi",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
    ("hydra", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("pmix", "PMIX_RANK", "", "", ""),
)
# Values of an activation (samples x points x channels) that keep a thread busy. Measured on two
# cores, 16 channels on 64^2, threads that wait passively: a training step takes 38 ms on one
# thread and 46 on two with 32 samples, 70 and 70 with 64, 136 and 114 with 128.
VALUES_PER_THREAD = 2**22


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        rank, size: among all processes; size 0 = only MPI itself knows.
        local_rank, local_size: among those on this machine.
        launcher: name in the table, "" = none.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = ""

    @property
    def mpi(self) -> bool:
        """Whether MPI connects the processes."""
        return self.launcher not in ("", "torchrun")


def launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """How this process was started, from the environment alone.

    A batch script also sees SLURM_PROCID, but only a job step has SLURM_STEP_NUM_TASKS; an mpirun
    inside one task of a step is a world of its own.

    Raises:
        ValueError: a variable of the launcher is no number.
    """

    def number(key: str, otherwise: int) -> int:
        try:
            return int(environ.get(key, otherwise))
        except ValueError:
            raise ValueError(f"{key}={environ[key]!r} in the environment: not a number") from None

    for name, rank, size, local_rank, local_size in _LAUNCHERS:
        if rank not in environ or (size and size not in environ):
            continue
        if name == "slurm" and environ.get("PMI_SIZE", environ[size]) != environ[size]:
            continue
        found_rank, found_size = number(rank, 0), number(size, 0)
        tasks = _tasks_here(environ) if name == "slurm" else found_size or 1
        return Launch(
            found_rank,
            found_size,
            number(local_rank, 0 if name == "pmix" else found_rank),
            number(local_size, tasks),
            name,
        )
    return Launch()


def _tasks_here(environ: Mapping[str, str]) -> int:
    """Tasks of the step on this node, of SLURM_STEP_TASKS_PER_NODE, e.g. "4(x2),1"."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", environ["SLURM_STEP_NUM_TASKS"])
    node = int(environ.get("SLURM_NODEID", 0))
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(times or 1)
    return counts[node] if node < len(counts) else 1


def choose_device(wanted: str, *, shared: bool) -> str:
    """``cpu`` or ``cuda:<number>``, for ``wanted`` "auto", "cpu" or "cuda".

    Args:
        shared: several processes may take one GPU: right for members of an ensemble, which know
            nothing of each other; wrong for a training, whose processes wait for each other at
            every step.

    Raises:
        RuntimeError: a GPU is asked for in vain, or there are more processes than GPUs.
    """
    if wanted == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return f"cuda:{gpu_of(launch().local_rank, torch.cuda.device_count(), shared=shared)}"
    if wanted == "cuda":
        raise RuntimeError("cluster.device=cuda, but torch sees no CUDA device; use cpu or auto")
    return "cpu"


def gpu_of(local_rank: int, num_visible: int, *, shared: bool) -> int:
    """Number of the GPU for a process of this machine: process i takes GPU i.

    One visible GPU means that the scheduler has bound each process to its own.
    """
    if num_visible > 1 and local_rank >= num_visible and not shared:
        raise RuntimeError(
            f"process {local_rank} of this machine has no GPU: {num_visible} are visible; "
            f"start at most {num_visible} processes per machine, or set cluster.device=cpu"
        )
    return local_rank % num_visible


def device_name(device: str) -> str:
    """``cpu``, or the model of the GPU."""
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def num_threads() -> int:
    """Number of torch's threads in this process."""
    import torch

    return torch.get_num_threads()


def set_threads(wanted: int, values: float | None = None) -> str:
    """Set the number of torch's threads in this process.

    ``wanted`` (``cluster.threads``) or OMP_NUM_THREADS are obeyed. Else it is this process's share
    of the cores, and of those no more than there is work for. Nothing is timed: the same process
    on the same kind of machine takes the same number, and networks give the same bits.

    Args:
        wanted: 0 = decide.
        values: of one activation of a network; None = work that is apart, as members are.

    Returns:
        The number and why, for the log.
    """
    import torch

    told = "cluster.threads" if wanted else "OMP_NUM_THREADS"
    if not wanted and not os.environ.get("OMP_NUM_THREADS"):
        share = max(1, len(os.sched_getaffinity(0)) // max(1, launch().local_size))
        useful = share if values is None else max(1, int(values // VALUES_PER_THREAD))
        wanted, told = min(share, useful), f"{share} core(s) here, work for {useful}"
    if wanted:
        torch.set_num_threads(wanted)
    return f"{torch.get_num_threads()} thread(s) ({told})"
