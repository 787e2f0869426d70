"""Which process of a training this is, on which device, and how the processes find each other.

The launchers say it in different words; here they become one :class:`Processes`:

==============  ========================  ==============================  =====================
launcher        rank, size                local rank, local size          meeting point
==============  ========================  ==============================  =====================
torchrun        RANK, WORLD_SIZE          LOCAL_RANK, LOCAL_WORLD_SIZE    MASTER_ADDR, _PORT
Open MPI        OMPI_COMM_WORLD_RANK,     OMPI_COMM_WORLD_LOCAL_RANK,     a port that rank 0
                _SIZE                     _LOCAL_SIZE                     broadcasts over MPI
MPICH, Intel    PMI_RANK, PMI_SIZE        MPI_LOCALRANKID,                the same
                                          MPI_LOCALNRANKS
srun            SLURM_PROCID,             SLURM_LOCALID,                  first node of the step,
                SLURM_STEP_NUM_TASKS      SLURM_STEP_TASKS_PER_NODE       port from the job's id
none            0, 1                      0, 1                            none needed
==============  ========================  ==============================  =====================
"""

import contextlib
import os
import re
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=30)  # a rank may wait while another reads data or writes weights
closing = contextlib.ExitStack()  # what an engine has opened beside; closed by leave()


@dataclass(frozen=True)
class Processes:
    """This process among those of the training.

    Attributes:
        rank, size: global.
        local_rank, local_size: on this machine.
        device: the one this process computes on.
        launcher: "torchrun", "openmpi", "pmi", "slurm" or "none".
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = torch.device("cpu")
    launcher: str = "none"

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the processes, the same bits on each."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values

    def share(self, value):
        """``value`` of rank 0, on every rank (a plain Python object)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def _tasks_on_node(text: str, node: int) -> int:
    """Tasks on node number ``node`` of SLURM_STEP_TASKS_PER_NODE, e.g. "4(x2),1"."""
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(times or 1)
    return counts[node] if node < len(counts) else 1


def identify(environ: Mapping[str, str] = os.environ) -> Processes:
    """Rank and size from what the launcher left in the environment; no device yet."""

    def number(key: str, otherwise: int) -> int:
        try:
            return int(environ.get(key, otherwise))
        except ValueError:
            raise ValueError(f"{key}={environ[key]!r} in the environment: not a number") from None

    if "RANK" in environ and "WORLD_SIZE" in environ:
        rank, size = number("RANK", 0), number("WORLD_SIZE", 1)
        local = number("LOCAL_RANK", rank), number("LOCAL_WORLD_SIZE", size)
        launcher = "torchrun"
    elif "OMPI_COMM_WORLD_SIZE" in environ:
        rank, size = number("OMPI_COMM_WORLD_RANK", 0), number("OMPI_COMM_WORLD_SIZE", 1)
        local = (
            number("OMPI_COMM_WORLD_LOCAL_RANK", rank),
            number("OMPI_COMM_WORLD_LOCAL_SIZE", size),
        )
        launcher = "openmpi"
    elif "SLURM_STEP_NUM_TASKS" in environ and (
        # an mpirun started by hand inside one srun task is its own world
        "PMI_RANK" not in environ
        or environ.get("PMI_SIZE") == environ["SLURM_STEP_NUM_TASKS"]
    ):
        rank, size = number("SLURM_PROCID", 0), number("SLURM_STEP_NUM_TASKS", 1)
        tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", str(size))
        local = number("SLURM_LOCALID", 0), _tasks_on_node(tasks, number("SLURM_NODEID", 0))
        launcher = "slurm"
    elif "PMI_RANK" in environ:
        rank, size = number("PMI_RANK", 0), number("PMI_SIZE", 1)
        local = number("MPI_LOCALRANKID", rank), number("MPI_LOCALNRANKS", size)
        launcher = "pmi"
    else:
        return Processes()
    return Processes(rank, size, *local, launcher=launcher)


def bind(local_rank: int, num_visible: int) -> int:
    """Index of the CUDA device for a process.

    One visible device means that the scheduler has bound each task to its own; otherwise process i
    of a machine takes device i. Raises ValueError when there are more processes than devices.
    """
    if num_visible == 1:
        return 0
    if local_rank >= num_visible:
        raise ValueError(
            f"process {local_rank} of this machine has no device: {num_visible} are visible; "
            f"start at most {num_visible} processes per machine, or set cluster.device=cpu"
        )
    return local_rank


def _device(name: str, local_rank: int) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={name!r}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device here; set device=cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", bind(local_rank, torch.cuda.device_count()))


def _slurm_address(environ: Mapping[str, str]) -> tuple[str, int]:
    """First node of the step, and a port that two jobs on one node do not share by accident."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    if "[" in nodes:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"scontrol cannot expand {nodes!r}: {done.stderr.strip()}")
        nodes = done.stdout
    first = nodes.replace(",", " ").split()[0] if nodes.strip() else "127.0.0.1"
    job, step = int(environ.get("SLURM_JOB_ID", 0)), int(environ.get("SLURM_STEP_ID", 0))
    return first, 20000 + (job * 31 + step) % 20000


def _own_address(alone: bool) -> str:
    """Where other processes reach this one: the loop-back device while they are all here."""
    if alone:
        return "127.0.0.1"
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return socket.gethostname()


def _meet(found: Processes, broadcast: Callable | None) -> dist.Store | None:
    """The store through which the processes find each other; None = the environment names it."""
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return None
    if broadcast is None:
        if found.launcher == "slurm":
            host, port = _slurm_address(os.environ)
            return dist.TCPStore(host, port, found.size, found.first, TIMEOUT)
        raise RuntimeError(
            f"{found.size} processes, but neither MASTER_ADDR and MASTER_PORT nor MPI to agree on "
            "them: install mpi4py, or start with torchrun"
        )
    if not found.first:
        met = broadcast(None)
        if met is None:
            raise RuntimeError("MPI sees one process only, its launcher several; see launch/train")
        host, port = met
        return dist.TCPStore(host, port, found.size, False, TIMEOUT)
    host = _own_address(found.local_size == found.size)
    store = dist.TCPStore(host, 0, found.size, True, TIMEOUT, wait_for_workers=False)
    broadcast((host, store.port))
    return store


def join(device: str = "auto", broadcast: Callable | None = None) -> Processes:
    """Join the training's processes and bind this one to its device.

    Args:
        device: "auto", "cpu" or "cuda".
        broadcast: sends rank 0's object to all ranks of the same processes (MPI's ``bcast``);
            needed under mpirun only.

    Raises:
        ValueError: no such device, or more processes than devices.
        RuntimeError: the processes cannot find each other.
    """
    found = identify()
    found = replace(found, device=_device(device, found.local_rank))
    cuda = found.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(found.device)
    if found.size == 1 or dist.is_initialized():
        return found
    if found.local_size == found.size and os.path.exists("/sys/class/net/lo"):
        # without this gloo looks up the host's name, which need not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=_meet(found, broadcast),
        rank=found.rank,
        world_size=found.size,
        timeout=TIMEOUT,
        device_id=found.device if cuda else None,
    )
    return found


def join_alone(processes: Processes) -> None:
    """Give a single process a process group, which DeepSpeed wants; uses no port."""
    if dist.is_initialized():
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if processes.device.type == "cuda" else "gloo",
        store=dist.HashStore(),
        rank=0,
        world_size=1,
    )


def leave() -> None:
    """Close what :func:`join` and the engines have opened."""
    closing.close()
    if dist.is_initialized():
        dist.destroy_process_group()
