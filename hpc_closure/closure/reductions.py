"""What closed-form statistics read: the snapshots of a phase's members, and sums over them all.

They are written once for any number of processes: each reads its own share of the snapshots, and
what it makes of them goes through the reader's reductions before it is used. Those of the reader
here, of one process that reads everything, give back what they are given;
:mod:`hpc_closure.train.shares` has those of several.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

__all__ = ["Batches", "Reader"]

Batches = Callable[[], Iterable] | Iterable


class Reader:
    """All snapshots, read by this process.

    Args:
        batches: a callable that starts over, or an iterable of use more than once.

    Attributes:
        first: number of the first snapshot that is read here, in the order of all.
        others: how many are read by other processes.
        first_batch: number of the batch that the first one is in.
    """

    first = others = first_batch = 0

    def __init__(self, batches: Batches):
        self._batches = batches

    @classmethod
    def of(cls, given: Batches) -> "Reader":
        """The reader itself, or one of what is given."""
        return given if isinstance(given, Reader) else cls(given)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches() if callable(self._batches) else self._batches)

    def kept(self) -> "Reader":
        """The same, with the batches in memory: for use more than once."""
        kept = copy.copy(self)
        kept._batches = list(self)
        return kept

    def sum(self, *values: Tensor | float) -> tuple[Any, ...]:
        """Sums of tensors and numbers over the processes, each of the shape it had."""
        return values

    def largest(self, *values: Tensor | float) -> tuple[Any, ...]:
        """The same of their largest values."""
        return values

    def every(self, values: list) -> list:
        """Values of all processes, in the order of their snapshots; tensors are on the host."""
        return values
