"""How this process was started, and what it computes on.

Each launcher has its environment variables; no other module reads them. MPI is not started. Only
the standard library is imported, until a device or a number of threads is needed.
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
# Launchers of independent workers without MPI: index and number of the processes of a step
_STEPS = (("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"))
#: says that this process is a worker without MPI: ``auto`` (the launcher says which) or ``3/512``
WORKER = "HPC_CLOSURE_WORKER"
# Values of an activation (samples x points x channels) that keep a thread busy. A training step,
# measured on two cores with 16 channels on 64^2 points and threads that wait passively, takes
# 38 ms on one thread and 46 ms on two with 32 samples, 70 and 70 ms with 64, 136 and 114 ms
# with 128.
VALUES_PER_THREAD = 2**22


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        rank, size: rank among all processes, and their number; 0 if only MPI knows the number.
        local_rank, local_size: the same among the processes of this machine.
        launcher: name in the table of launchers; "" if none.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = ""

    @property
    def mpi(self) -> bool:
        """Return whether MPI connects the processes."""
        return self.launcher not in ("", "torchrun")


def worker(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return the index of this worker among all that were started together, and their number.

    Without the variable HPC_CLOSURE_WORKER it is the only one: (0, 1).

    Raises:
        ValueError: the variable is neither ``auto`` under Slurm or Flux, nor INDEX/NUMBER.
    """
    text = environ.get(WORKER, "")
    if text == "auto":
        for index, number in _STEPS:
            if index in environ and number in environ:
                text = f"{environ[index]}/{environ[number]}"
                break
    found = re.fullmatch(r"(\d+)/(\d+)", text or "0/1")
    if not found or int(found.group(1)) >= int(found.group(2)):
        raise ValueError(
            f"{WORKER}={environ[WORKER]!r}: expected auto in a step of Slurm or Flux, or an index "
            "from 0 and a number of workers, for example 3/512"
        )
    return int(found.group(1)), int(found.group(2))


def launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Return how this process was started, from the environment alone.

    A worker (HPC_CLOSURE_WORKER) is a single process, which shares its machine with others. A
    batch script also has SLURM_PROCID, but only a job step has SLURM_STEP_NUM_TASKS. An mpirun
    inside one task of a step is a separate world.

    Raises:
        ValueError: a variable of the launcher is not a number.
    """

    def number(key: str, default: int) -> int:
        try:
            return int(environ.get(key, default))
        except ValueError:
            raise ValueError(f"{key}={environ[key]!r} in the environment: not a number") from None

    if environ.get(WORKER):
        # without a launcher that counts them per machine, the index spreads them over its GPUs
        place = number("SLURM_LOCALID", number("FLUX_TASK_LOCAL_ID", worker(environ)[0]))
        here = _tasks_here(environ) if "SLURM_STEP_NUM_TASKS" in environ else 1
        return Launch(local_rank=place, local_size=here)
    for name, rank, size, local_rank, local_size in _LAUNCHERS:
        if rank not in environ or (size and size not in environ):
            continue
        if name == "slurm" and environ.get("PMI_SIZE", environ[size]) != environ[size]:
            continue
        rank_value, size_value = number(rank, 0), number(size, 0)
        tasks = _tasks_here(environ) if name == "slurm" else size_value or 1
        return Launch(
            rank_value,
            size_value,
            number(local_rank, 0 if name == "pmix" else rank_value),
            number(local_size, tasks),
            name,
        )
    return Launch()


def _tasks_here(environ: Mapping[str, str]) -> int:
    """Return the tasks of the step on this node, from SLURM_STEP_TASKS_PER_NODE, "4(x2),1" say."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", environ["SLURM_STEP_NUM_TASKS"])
    node = int(environ.get("SLURM_NODEID", 0))
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(times or 1)
    return counts[node] if node < len(counts) else 1


def choose_device(wanted: str, *, shared: bool) -> str:
    """Return ``cpu`` or ``cuda:<number>`` for ``wanted`` "auto", "cpu" or "cuda".

    Args:
        wanted: value of ``cluster.device``.
        shared: whether several processes may use one GPU. They may for members of an ensemble,
            which are independent. They must not for a training, whose processes wait for each
            other at every step.

    Raises:
        RuntimeError: no GPU for "cuda", or more processes than GPUs.
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
    """Return the GPU of a process of this machine: process i uses GPU i.

    If one GPU is visible, the scheduler has bound each process to a GPU.

    Raises:
        RuntimeError: more processes than GPUs, and GPUs are not shared.
    """
    if num_visible > 1 and local_rank >= num_visible and not shared:
        raise RuntimeError(
            f"process {local_rank} of this machine has no GPU: {num_visible} are visible; "
            f"start at most {num_visible} processes per machine, or set cluster.device=cpu"
        )
    return local_rank % num_visible


def device_name(device: str) -> str:
    """Return ``cpu``, or the model of the GPU."""
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def num_threads() -> int:
    """Return the number of torch's threads in this process."""
    import torch

    return torch.get_num_threads()


def set_threads(wanted: int, values: float | None = None) -> str:
    """Set the number of torch's threads in this process.

    ``wanted`` (``cluster.threads``) or OMP_NUM_THREADS decide. Without them it is this process's
    share of the cores, but no more than there is work for. Nothing is timed. So the same process
    on the same kind of machine has the same number of threads, and networks give the same bits.

    Args:
        wanted: number of threads; 0 = decide here.
        values: values of one activation of a network; None if the work is independent, as members
            are.

    Returns:
        The number and the reason, for the log.
    """
    import torch

    reason = "cluster.threads" if wanted else "OMP_NUM_THREADS"
    if not wanted and not os.environ.get("OMP_NUM_THREADS"):
        share = max(1, len(os.sched_getaffinity(0)) // max(1, launch().local_size))
        useful = share if values is None else max(1, int(values // VALUES_PER_THREAD))
        wanted, reason = min(share, useful), f"{share} core(s) here, work for {useful}"
    if wanted:
        torch.set_num_threads(wanted)
    return f"{torch.get_num_threads()} thread(s) ({reason})"
