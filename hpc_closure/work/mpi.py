"""MPI: the only module that imports mpi4py, and before torch.

A process without a launcher never starts MPI: ``world()`` is then one rank. Members are split over
groups of ranks, and each group shares its fields over a domain communicator:

    mpirun -n 4 hpc-closure generate x.yaml cluster.domain_ranks=2

    world = mpi.world()                      # World(rank=0..3, size=4)
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

_PATIENCE = 20.0  # seconds that a failing rank waits for its peers to fail as well


class World:
    """A communicator, or its serial stand-in (``comm`` is None).

    Attributes:
        rank, size: rank and number of ranks of this communicator.
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
        """Return True on all ranks if ``flag`` is true on one (collective)."""
        if self.comm is None:
            return bool(flag)
        import numpy as np
        from mpi4py import MPI

        local, total = np.array([bool(flag)], dtype=np.uint8), np.empty(1, dtype=np.uint8)
        self.comm.Allreduce(local, total, op=MPI.MAX)
        return bool(total[0])

    def groups(self, domain_ranks: int = 1) -> "Groups":
        """Split into groups of ``domain_ranks`` neighbouring ranks (collective).

        Raises:
            ValueError: the number of ranks is not a multiple of ``domain_ranks``.
        """
        if domain_ranks < 1 or self.size % domain_ranks:
            raise ValueError(
                f"cluster.domain_ranks={domain_ranks} does not divide the "
                f"{self.size} ranks; start a multiple of domain_ranks, or change it"
            )
        index, count = self.rank // domain_ranks, self.size // domain_ranks
        if self.comm is None or domain_ranks == 1:
            return Groups(self, index, count, World())
        return Groups(self, index, count, World(self.comm.Split(index, self.rank)))

    def all_arrive(self, patience: float = _PATIENCE) -> bool:
        """Return whether every rank arrives here within ``patience`` seconds (collective).

        A rank that failed calls this before it continues: a peer that waits for it inside another
        collective call never arrives. The barrier is on a private communicator, because the public
        one may be in the middle of that call.
        """
        if self.comm is None:
            return True
        request = self._private_comm().Ibarrier()
        end = time.monotonic() + patience
        while not request.Test():
            if time.monotonic() > end:
                return False
            time.sleep(0.002)
        return True

    def agree_on_error(self, error: BaseException | None) -> BaseException | None:
        """Agree on how a piece of work ended (collective).

        If some rank can never arrive, because it waits for the rank that failed, the program is
        aborted with the message.

        Returns:
            None if no rank has an error. Otherwise the error of this rank, or, on a rank without
            an error, that of the first rank with one.
        """
        if self.comm is None:
            return error
        if not self.all_arrive(float("inf") if error is None else _PATIENCE):
            self.abort(f"rank {self.rank}/{self.size}: {type(error).__name__}: {error}")
        errors = self.allgather(
            error
            if error is None or _pickles(error)
            else RuntimeError(f"{type(error).__name__}: {error}")
        )
        return error or next((other for other in errors if other is not None), None)

    def _private_comm(self):
        if self._private is None:
            raise RuntimeError("World.prepare() was not called on all ranks")
        return self._private

    def prepare(self) -> "World":
        """Make the private communicator of :meth:`all_arrive` (collective, once)."""
        if self.comm is not None and self._private is None:
            self._private = self.comm.Dup()
        return self

    def abort(self, message: str, code: int = 1) -> None:
        """Print ``message`` and end every rank of the program."""
        sys.stdout.flush()
        sys.stderr.write(message.rstrip() + "\n")
        sys.stderr.flush()
        if self.comm is None:
            raise SystemExit(code)
        from mpi4py import MPI

        time.sleep(0.2)  # the launcher must forward the line before it kills this process
        MPI.COMM_WORLD.Abort(code)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Run the body so that no rank hangs if another one fails.

            with mpi.world().guard():
                run_the_verb()

        If all ranks fail with the same error (a wrong config, say), the error leaves this context
        on every rank, and the caller lets rank 0 report it. If one fails and the others wait for
        it, the program is aborted with its message.
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
        caught = self.agree_on_error(caught)
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
        index, count: number of this group, and of all groups; group g runs units g, g + count, ...
        domain: the ranks that share one field; ``domain.root`` writes the files.
    """

    world: World
    index: int
    count: int
    domain: World


@functools.cache
def world() -> World:
    """Return the world of this program; start MPI only if an MPI launcher started the process.

    Raises:
        RuntimeError: an MPI launcher started the process, but MPI is missing or sees another
            number of ranks.
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
            f"loaded ({error}); pip install 'hpc_closure[hpc,mpi]'"
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
    """Return the version of the MPI library, or ""; MPI cannot be started afterwards."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return ""
    return MPI.Get_library_version()
