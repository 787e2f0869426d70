"""Closed-form statistics by several processes: each reads a share; sums are over all of them."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_closure.closure.reductions import Reader
from hpc_closure.data.samples import TrainingSet
from hpc_closure.train.processes import Processes

__all__ = ["SharedReader"]


class SharedReader(Reader):
    """Reader of one process's share of samples, a contiguous range; see the base class.

    Batches start and end at the same samples as for a single process, and at the ends of a share.
    A process with an empty share takes part in the sums.

    Args:
        processes: processes that share the samples.
        part: the samples.
        numbers: numbers of the samples to be read, in order.
        size: samples per batch.
        together: size of groups of consecutive samples, such as those of a trajectory, that are
            not split.
    """

    def __init__(
        self,
        processes: Processes,
        part: TrainingSet,
        numbers: np.ndarray,
        size: int,
        together: int = 1,
    ):
        super().__init__(self._share)
        self.processes, self.part, self.numbers, self.size = processes, part, numbers, size
        rank, count = processes.rank, len(numbers) // together
        self.first, self.end = (
            count * number // processes.size * together for number in (rank, rank + 1)
        )
        self.others = len(numbers) - (self.end - self.first)
        self.first_batch = self.first // size

    def _share(self) -> Iterator[dict[str, Any]]:
        begin = self.first
        while begin < self.end:
            end = min(self.end, (begin // self.size + 1) * self.size)
            yield self.part.gather(self.numbers[begin:end])
            begin = end

    def sum(self, *values: Tensor | float) -> tuple[Any, ...]:
        return self._reduced(self.processes.sum, values)

    def largest(self, *values: Tensor | float) -> tuple[Any, ...]:
        return self._reduced(self.processes.largest, values)

    def _reduced(self, reduce: Callable, values: tuple[Tensor | float, ...]) -> tuple[Any, ...]:
        """Reduce all values in one call, in float64 on the host."""
        self.processes.check()
        flat = [torch.as_tensor(value, dtype=torch.float64).cpu().flatten() for value in values]
        reduced_values = reduce(torch.cat(flat)).split([len(value) for value in flat])
        return tuple(
            part.reshape(value.shape).clone() if isinstance(value, Tensor) else type(value)(part)
            for part, value in zip(reduced_values, values)
        )

    def every(self, values: list) -> list:
        self.processes.check()
        return list(chain.from_iterable(self.processes.gather(values)))
