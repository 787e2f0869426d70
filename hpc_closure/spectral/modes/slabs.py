"""MPI slabs: ranks hold rows of physical fields and columns of spectra.

One all-to-all exchanges the two. In three dimensions more ranks than columns form pencils: within
a group of ranks slabs divide x and ky, and between the groups slabs divide y and kz. The
communicator is an argument; only its methods on numpy arrays are used, and ``Split``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def blocks(length: int, parts: int) -> list[slice]:
    """Split ``length`` items into ``parts`` consecutive slices; sizes differ by at most one."""
    base, extra = divmod(length, parts)
    starts = [part * base + min(part, extra) for part in range(parts + 1)]
    return [slice(a, b) for a, b in zip(starts, starts[1:])]


class Slabs:
    """How the ranks of one communicator share fields.

    Args:
        comm: mpi4py communicator.
        num_columns: columns of a full spectrum.
        axis: axis of the columns in a spectrum; that of the rows in a field is the one before.

    Raises:
        ValueError: more ranks than columns.
    """

    def __init__(self, comm, num_columns: int, axis: int = -1):
        self.comm, self.num_ranks, self.rank = comm, comm.Get_size(), comm.Get_rank()
        if self.num_ranks > num_columns:
            raise ValueError(
                f"{num_columns} columns of modes allow at most {num_columns} domain ranks, got "
                f"{self.num_ranks}"
            )
        self._buffers: dict[tuple, Tensor] = {}
        self._row_axis, self._column_axis = axis - 1, axis
        #: columns of each rank, and of this one
        self.every = blocks(num_columns, self.num_ranks)
        self.columns = self.every[self.rank]

    def rows(self, size: int, rank: int | None = None) -> slice:
        """Return the rows that this rank, or ``rank``, holds of a field of ``size`` rows."""
        return blocks(size, self.num_ranks)[self.rank if rank is None else rank]

    def to_rows(self, lines: Tensor) -> Tensor:
        """Exchange ``(..., n, local columns)`` for ``(..., local rows, all columns)``."""
        rows = blocks(lines.shape[self._row_axis], self.num_ranks)
        return self._exchange(lines, self._row_axis, self._column_axis, rows, self.every)

    def to_columns(self, lines: Tensor, n: int) -> Tensor:
        """Exchange ``(..., local rows, all columns)`` for ``(..., n, local columns)``."""
        rows = blocks(n, self.num_ranks)
        return self._exchange(lines, self._column_axis, self._row_axis, self.every, rows)

    def _exchange(
        self, lines: Tensor, cut: int, join: int, sent: list[slice], received: list[slice]
    ) -> Tensor:
        """Send piece r of axis ``cut`` to rank r; join received pieces along axis ``join``."""
        pieces = [lines.narrow(cut, s.start, s.stop - s.start) for s in sent]
        shape = list(pieces[self.rank].shape)
        shape[join] = received[-1].stop
        out = lines.new_empty(shape)
        self.exchange(pieces, [out.narrow(join, s.start, s.stop - s.start) for s in received])
        return out

    def exchange(self, pieces: list[Tensor], places: list[Tensor]) -> None:
        """Send piece r to rank r, and fill place r with the piece that rank r sends here."""
        sent, received = (self._counts(tensors) for tensors in (pieces, places))
        outgoing = self._buffer("outgoing", sum(sent), pieces[0].dtype)
        incoming = self._buffer("incoming", sum(received), pieces[0].dtype)
        for rank, part in enumerate(outgoing.split(sent)):
            if rank != self.rank:
                part.view(pieces[rank].shape).copy_(pieces[rank])
        self.comm.Alltoallv([outgoing.numpy(), sent], [incoming.numpy(), received])
        for rank, part in enumerate(incoming.split(received)):
            is_local = rank == self.rank
            places[rank].copy_(pieces[rank] if is_local else part.view(places[rank].shape))

    def _counts(self, parts: list[Tensor]) -> list[int]:
        """Return the number of values per rank; a rank sends itself nothing."""
        return [0 if rank == self.rank else part.numel() for rank, part in enumerate(parts)]

    def _buffer(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        """Return a reused work array; the system would hand out new pages for each large one."""
        key = name, dtype
        if key not in self._buffers or len(self._buffers[key]) < count:
            self._buffers[key] = torch.empty(count, dtype=dtype)
        return self._buffers[key][:count]

    def gather_columns(self, w_hat: Tensor) -> Tensor:
        """Return full spectra on every rank."""
        return self._gather(w_hat, self.every, self._column_axis)

    def gather_rows(self, field: Tensor, n: int) -> Tensor:
        """Return full fields of ``n`` rows on every rank."""
        return self._gather(field, blocks(n, self.num_ranks), self._row_axis)

    def _gather(self, local: Tensor, parts: list[slice], axis: int) -> Tensor:
        shapes = []
        for part in parts:
            shape = list(local.shape)
            shape[axis] = part.stop - part.start
            shapes.append(shape)
        counts = [int(np.prod(shape)) for shape in shapes]
        outgoing = local.contiguous().numpy().reshape(-1)
        incoming = np.empty(sum(counts), dtype=outgoing.dtype)
        self.comm.Allgatherv(outgoing, [incoming, counts])
        pieces = torch.from_numpy(incoming).split(counts)
        return torch.cat([p.reshape(s) for p, s in zip(pieces, shapes)], dim=axis)

    def maximum(self, values: np.ndarray) -> np.ndarray:
        """Return the largest value over the ranks, element by element (exact: no sum)."""
        everyone = np.empty((self.num_ranks, *values.shape), dtype=values.dtype)
        self.comm.Allgather(np.ascontiguousarray(values), everyone)
        return everyone.max(0)
