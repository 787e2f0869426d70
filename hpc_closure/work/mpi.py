"""The door to MPI: the only module that imports mpi4py, and before torch.

A process that no launcher started never touches MPI: ``world()`` is then one rank. Members are
split over groups of ranks, and each group shares its fields over a domain communicator:

    mpirun -n 4 hpc-closure generate x.yaml cluster.domain_ranks=2

    world = parallel.world()                 # World(rank=0..3, size=4)
    groups = world.groups(domain_ranks=2)    # groups.index 0..1, groups.count 2, groups.domain
"""

import contextlib
import functools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hpc_closure.work.launch import launch

_PATIENCE = 20.0  # seconds that a failing rank waits for its peers to fail alike


class World:
    """A communicator, or its serial stand-in (``comm`` is None).

    Attributes:
        rank, size: of this communicator.
        comm: the mpi4py communicator or None; buffers are exchanged through it directly.
    """

    def __init__(self, comm=None):
        self.comm = comm
        self.rank = 0 if comm is None else comm.Get_rank()
        self.size = 1 if comm is None else comm.Get_size()
        self._private = None

    def __repr__(self) -> str:
        return f"World(rank={self.rank}, size={self.size})"

    @property
    def root(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.comm is not None:
            self.comm.Barrier()

    def bcast(self, value: Any, root: int = 0) -> Any:
        return value if self.comm is None else self.comm.bcast(value, root=root)

    def allgather(self, value: Any) -> list:
        return [value] if self.comm is None else self.comm.allgather(value)

    def any(self, flag: bool) -> bool:
        """True on all ranks when ``flag`` is true on one."""
        if self.comm is None:
            return bool(flag)
        import numpy as np
        from mpi4py import MPI

        mine, total = np.array([bool(flag)], dtype=np.uint8), np.empty(1, dtype=np.uint8)
        self.comm.Allreduce(mine, total, op=MPI.MAX)
        return bool(total[0])

    def groups(self, domain_ranks: int = 1) -> "Groups":
        """Split into groups of ``domain_ranks`` neighbouring ranks (collective).

        Raises:
            ValueError: the number of ranks is no multiple of ``domain_ranks``.
        """
        if domain_ranks < 1 or self.size % domain_ranks:
            raise ValueError(
                f"cluster.domain_ranks={domain_ranks} does not divide the "
                f"{self.size} ranks; start a multiple of it, or change it"
            )
        index, count = self.rank // domain_ranks, self.size // domain_ranks
        if self.comm is None or domain_ranks == 1:
            return Groups(self, index, count, World())
        return Groups(self, index, count, World(self.comm.Split(index, self.rank)))

    def everybody(self, patience: float = _PATIENCE) -> bool:
        """Whether every rank arrives here within ``patience`` seconds (collective).

        A rank that failed asks this before it goes on: a peer that waits for it inside another
        collective call never arrives. The meeting has a communicator of its own, because the
        other one may be in the middle of that call.
        """
        if self.comm is None:
            return True
        request = self._meeting().Ibarrier()
        end = time.monotonic() + patience
        while not request.Test():
            if time.monotonic() > end:
                return False
            time.sleep(0.002)
        return True

    def settle(self, error: BaseException | None) -> BaseException | None:
        """Agree on how a piece of work ended (collective).

        Returns:
            None when it went well on all ranks; the error of this rank, or on a rank without one
            that of the first rank that has one. When some rank can never arrive, because it
            waits for the one that failed, the program is aborted with the message.
        """
        if self.comm is None:
            return error
        if not self.everybody(float("inf") if error is None else _PATIENCE):
            self.abort(f"rank {self.rank}/{self.size}: {type(error).__name__}: {error}")
        errors = self.allgather(
            error
            if error is None or _pickles(error)
            else RuntimeError(f"{type(error).__name__}: {error}")
        )
        return error or next((other for other in errors if other is not None), None)

    def _meeting(self):
        if self._private is None:
            raise RuntimeError("World.prepare() was not called on all ranks")
        return self._private

    def prepare(self) -> "World":
        """Make the private communicator of :meth:`everybody` (collective, once)."""
        if self.comm is not None and self._private is None:
            self._private = self.comm.Dup()
        return self

    def abort(self, message: str, code: int = 1) -> None:
        """End every rank of the whole program, after ``message``."""
        sys.stdout.flush()
        sys.stderr.write(message.rstrip() + "\n")
        sys.stderr.flush()
        if self.comm is None:
            raise SystemExit(code)
        from mpi4py import MPI

        time.sleep(0.2)  # the launcher must forward the line before it kills us
        MPI.COMM_WORLD.Abort(code)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """No rank hangs when another one fails.

            with parallel.world().guard():
                run_the_verb()

        When all ranks fail alike (a wrong config, say), the error leaves this context on every
        rank, and the caller lets rank 0 report it. When one fails and the others wait for it, the
        program is aborted with its message.
        """
        if self.comm is None:
            yield
            return
        self.prepare()
        caught: BaseException | None = None
        try:
            yield
        except SystemExit:
            raise
        except BaseException as error:
            caught = error
        caught = self.settle(caught)
        if caught is not None:
            raise caught


def _pickles(error: BaseException) -> bool:
    import pickle

    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False


@dataclass(frozen=True)
class Groups:
    """The member group of this rank.

    Attributes:
        world: all ranks of the program.
        index, count: which of how many groups; group g runs units g, g + count, ...
        domain: the ranks that share one field; ``domain.root`` writes the files.
    """

    world: World
    index: int
    count: int
    domain: World


@functools.cache
def world() -> World:
    """The world of this program; starts MPI only when an MPI launcher started the process.

    Raises:
        RuntimeError: started by an MPI launcher, but MPI is missing or sees another number of
            ranks.
    """
    started = launch()
    if not started.mpi:
        return World()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        if started.size == 1:
            return World()
        raise RuntimeError(
            f"started on {started.size or 'several'} ranks, but MPI cannot be "
            f"loaded ({error}); pip install 'hpc_closure[mpi]'"
        ) from error
    size = MPI.COMM_WORLD.Get_size()
    if started.size > 1 and size == 1:
        raise RuntimeError(
            f"{started.size} processes were started, but MPI sees one each: the launcher and the "
            "MPI library differ; use the library's own mpirun, or srun --mpi=pmi2 (MPICH) or "
            "--mpi=pmix (Open MPI)"
        )
    return World(MPI.COMM_WORLD).prepare() if size > 1 else World()


def library() -> str:
    """Version text of the MPI library, "" when there is none; MPI cannot be started afterwards."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return ""
    return MPI.Get_library_version()
