"""MPI slabs: rows of physical fields, columns of spectra, one all-to-all between the two.

The communicator is passed in; only its methods on numpy arrays are used.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def blocks(length: int, parts: int) -> list[slice]:
    """Split ``length`` items in ``parts`` consecutive slices that differ by at most one item."""
    base, extra = divmod(length, parts)
    starts = [part * base + min(part, extra) for part in range(parts + 1)]
    return [slice(a, b) for a, b in zip(starts, starts[1:])]


class Slabs:
    """How the ranks of one communicator share fields.

    Args:
        comm: mpi4py communicator.
        num_columns: columns of a whole spectrum.
    """

    def __init__(self, comm, num_columns: int):
        self.comm, self.num_ranks, self.rank = comm, comm.Get_size(), comm.Get_rank()
        if self.num_ranks > num_columns:
            raise ValueError(
                f"{num_columns} columns of modes allow at most that many domain ranks, got "
                f"{self.num_ranks}"
            )
        self._columns = blocks(num_columns, self.num_ranks)
        self.columns = self._columns[self.rank]

    def rows(self, size: int) -> slice:
        """Rows of this rank in a field of ``size`` rows."""
        return blocks(size, self.num_ranks)[self.rank]

    def to_rows(self, lines: Tensor) -> Tensor:
        """``(..., n, local columns)`` to ``(..., local rows, all columns)``."""
        return self._exchange(lines, -2, blocks(lines.shape[-2], self.num_ranks), self._columns)

    def to_columns(self, lines: Tensor, n: int) -> Tensor:
        """``(..., local rows, all columns)`` to ``(..., n, local columns)``."""
        rows = blocks(n, self.num_ranks)
        return self._exchange(lines, -1, self._columns, rows)

    def _exchange(self, lines: Tensor, cut: int, mine: list[slice], theirs: list[slice]) -> Tensor:
        """Send piece r of axis ``cut`` to rank r; join what comes back along the other axis."""
        join = -3 - cut
        sends = [lines.narrow(cut, s.start, s.stop - s.start) for s in mine]
        shapes = []
        for part in theirs:
            shape = list(sends[self.rank].shape)
            shape[join] = part.stop - part.start
            shapes.append(shape)
        outgoing = torch.cat([piece.reshape(-1) for piece in sends]).numpy()
        counts = [int(np.prod(shape)) for shape in shapes]
        incoming = np.empty(sum(counts), dtype=outgoing.dtype)
        self.comm.Alltoallv([outgoing, [p.numel() for p in sends]], [incoming, counts])
        pieces = torch.from_numpy(incoming).split(counts)
        return torch.cat([p.reshape(s) for p, s in zip(pieces, shapes)], dim=join)

    def gather_columns(self, w_hat: Tensor) -> Tensor:
        """Whole spectra on every rank."""
        return self._gather(w_hat, self._columns, -1)

    def gather_rows(self, field: Tensor) -> Tensor:
        """Whole fields on every rank."""
        return self._gather(field, blocks(field.shape[-1], self.num_ranks), -2)

    def _gather(self, mine: Tensor, parts: list[slice], axis: int) -> Tensor:
        shapes = []
        for part in parts:
            shape = list(mine.shape)
            shape[axis] = part.stop - part.start
            shapes.append(shape)
        counts = [int(np.prod(shape)) for shape in shapes]
        outgoing = mine.contiguous().numpy().reshape(-1)
        incoming = np.empty(sum(counts), dtype=outgoing.dtype)
        self.comm.Allgatherv(outgoing, [incoming, counts])
        pieces = torch.from_numpy(incoming).split(counts)
        return torch.cat([p.reshape(s) for p, s in zip(pieces, shapes)], dim=axis)

    def maximum(self, values: np.ndarray) -> np.ndarray:
        """Largest value over the ranks, element by element (exact: no sum)."""
        everyone = np.empty((self.num_ranks, *values.shape), dtype=values.dtype)
        self.comm.Allgather(np.ascontiguousarray(values), everyone)
        return everyone.max(0)
