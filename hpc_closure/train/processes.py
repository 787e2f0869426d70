"""The processes of a training: their rendezvous and their collective operations.

:mod:`hpc_closure.work.launch` finds rank and size. The meeting point depends on the launcher:

==============  ===========================================
torchrun        MASTER_ADDR, MASTER_PORT
mpirun          a port that rank 0 broadcasts over MPI
srun            the same; without MPI, the first node of the step and a port from the job's number
none            none needed
==============  ===========================================
"""

import contextlib
import gc
import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hpc_closure.work.launch import Launch, launch

TIMEOUT = timedelta(minutes=30)  # a rank may wait while another reads its share or writes weights
closing = contextlib.ExitStack()  # resources that an engine opened; closed by leave()


class Elsewhere(RuntimeError):
    """Failure of another process, with its message."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the training: its rank, their number, its device."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, with the same bits on each."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Average over the processes, with the same bits on each."""
        return self.sum(values) / self.size

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """Take elementwise maxima over the processes."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: torch.Tensor, how: dist.ReduceOp.RedOpType) -> torch.Tensor:
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values, how)
        return values

    def gather(self, value) -> list:
        """Gather the values of all processes by rank, on every process; tensors on the host."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share(self, value):
        """Broadcast ``value`` of rank 0 to every rank (a plain Python object)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def together(self, work: Callable[[], Any]) -> Any:
        """Return ``work()``; if it fails on one process, it fails on all.

        Work in which the processes wait for each other calls :meth:`check` before each wait.

        Raises:
            Elsewhere: it failed on another process.
        """
        try:
            value = work()
        except Elsewhere:
            raise
        except Exception as error:
            self.check(f"{error}")
            raise
        self.check()
        return value

    def check(self, error: str | None = None) -> None:
        """Send an error to the other processes, or raise Elsewhere for theirs (collective)."""
        for rank, message in enumerate(self.gather(error)):
            if message is not None and error is None:
                raise Elsewhere(f"process {rank}/{self.size} failed: {message}")

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


def _slurm_address(environ: Mapping[str, str]) -> tuple[str, int]:
    """Return the step's first node, and a port that two jobs on a node are unlikely to share."""
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


def _address(alone: bool) -> str:
    """Return this process's address: the loop-back device if all processes are on this node."""
    if alone:
        return "127.0.0.1"
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return socket.gethostname()


def _meet(started: Launch, broadcast: Callable | None) -> dist.Store | None:
    """Create the store for the rendezvous; None if the environment names the meeting point."""
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return None
    if broadcast is None:
        if started.launcher == "slurm":
            host, port = _slurm_address(os.environ)
            return dist.TCPStore(host, port, started.size, started.rank == 0, TIMEOUT)
        raise RuntimeError(
            f"{started.size} processes, but neither MASTER_ADDR and MASTER_PORT nor MPI to agree "
            "on them: install mpi4py, or start with torchrun"
        )
    if started.rank:
        met = broadcast(None)
        if met is None:
            raise RuntimeError(
                "MPI sees one process only, its launcher several: use the mpirun of the MPI "
                "library, srun --mpi=pmi2 (MPICH) or --mpi=pmix (Open MPI), or torchrun"
            )
        host, port = met
        return dist.TCPStore(host, port, started.size, False, TIMEOUT)
    host = _address(started.local_size == started.size)
    store = dist.TCPStore(host, 0, started.size, True, TIMEOUT, wait_for_workers=False)
    broadcast((host, store.port))
    return store


def join(device: str = "cpu", broadcast: Callable | None = None) -> Processes:
    """Join the training's processes and bind this process to its device.

    Args:
        device: device of this process, as torch names it.
        broadcast: sends rank 0's object to all ranks of the same processes (MPI's ``bcast``);
            needed under mpirun only.

    Raises:
        RuntimeError: the processes cannot find each other.
    """
    started = launch()
    joined = Processes(started.rank, started.size, torch.device(device))
    cuda = joined.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(joined.device)
    if joined.size == 1 or dist.is_initialized():
        return joined
    if started.local_size == started.size and os.path.exists("/sys/class/net/lo"):
        # otherwise gloo looks up the host's name, which may not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=_meet(started, broadcast),
        rank=joined.rank,
        world_size=joined.size,
        timeout=TIMEOUT,
        device_id=joined.device if cuda else None,
    )
    return joined


def join_alone(processes: Processes) -> None:
    """Create a process group for a single process, as DeepSpeed needs one; uses no port."""
    if dist.is_initialized():
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if processes.device.type == "cuda" else "gloo",
        store=dist.HashStore(),
        rank=0,
        world_size=1,
    )


def leave() -> None:
    """Close everything that :func:`join` and the engines have opened."""
    # If a thread of gloo drops the last reference to a tensor while Python ends, the process
    # aborts ("terminate called without an active exception", pytorch#179291). Therefore engines of
    # DeepSpeed, which are reference cycles that hold groups, are collected now, and the threads
    # get time to finish.
    gc.collect()
    time.sleep(0.05)
    closing.close()
    if dist.is_initialized():
        dist.destroy_process_group()
