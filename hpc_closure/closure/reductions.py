"""Readers of closed-form statistics: snapshots of a phase's members, and sums over processes.

Statistics are written once for any number of processes. Each process reads its own share of the
snapshots and passes its results through the reader's reductions before it uses them. The reader of
this module is that of a single process, so its reductions return their arguments.
:mod:`hpc_closure.train.shares` has the reader for several processes.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

__all__ = ["Batches", "Reader"]

Batches = Callable[[], Iterable] | Iterable


class Reader:
    """Reader of all snapshots by this process.

    Args:
        batches: a callable that returns a fresh iterator, or a collection that can be iterated
            repeatedly.

    Attributes:
        first: number of the first snapshot of this process, in the order of all.
        others: number of snapshots that other processes read.
        first_batch: number of the batch that contains the first snapshot.
    """

    first = others = first_batch = 0

    def __init__(self, batches: Batches):
        self._batches = batches

    @classmethod
    def of(cls, source: Batches) -> "Reader":
        """Return a reader unchanged, or make one of a source of batches."""
        return source if isinstance(source, Reader) else cls(source)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches() if callable(self._batches) else self._batches)

    def in_memory(self) -> "Reader":
        """Return a reader with the batches in memory, for repeated use."""
        in_memory = copy.copy(self)
        in_memory._batches = list(self)
        return in_memory

    def sum(self, *values: Tensor | float) -> tuple[Any, ...]:
        """Sum tensors and numbers over the processes; returns them in their shapes."""
        return values

    def largest(self, *values: Tensor | float) -> tuple[Any, ...]:
        """Take elementwise maxima of tensors and numbers over the processes, in their shapes."""
        return values

    def every(self, values: list) -> list:
        """Join the lists of all processes in the order of their snapshots; tensors on the host."""
        return values
