"""Replay draws from CUDA graphs: launches are what a draw of few members costs.

A draw is some thousand operations, the same ones in every call. They are recorded once and
replayed with one launch; states and noise are arguments. A recording may touch nothing of the
host, and its numbers are those of the first call: whatever may change from call to call is an
argument, or in the key.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from hpc_closure.spectral.cuda.graph import record
from hpc_closure.work import log

MOST_GRAPHS = 4  # each has its own memory
LARGE = 1 << 20  # numbers of the arguments, from which arithmetic counts and memory is dear

#: tensors to tensors, by their shapes and numbers alone
Function = Callable[..., tuple[Tensor, ...]]


class Recorded:
    """A recording of a function of tensors of some shapes.

    Args:
        function: to record.
        inputs: arguments, whose values do not matter.
    """

    def __init__(self, function: Function, inputs: tuple[Tensor, ...]):
        self.inputs = [tensor.clone() for tensor in inputs]
        self.outputs: tuple[Tensor, ...] = ()

        def run() -> None:
            self.outputs = function(*self.inputs)

        self.replay = record(run, run, self.inputs[0].device)

    def __call__(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for recorded, tensor in zip(self.inputs, inputs):
            recorded.copy_(tensor)
        self.replay()
        return tuple(tensor.clone() for tensor in self.outputs)


class Replayed:
    """Replay functions of tensors on a CUDA device; record each at its first call.

    Their weights must stay as they are and where they are. Calls of several threads take turns. A
    function that cannot be recorded is logged once and called without a recording.
    """

    def __init__(self):
        self._recorded: OrderedDict[Hashable, Recorded | None] = OrderedDict()
        self._made: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __call__(self, function: Function, key: Hashable, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return ``function(*inputs)``; ``key`` holds all that it depends on besides."""
        if sum(tensor.numel() for tensor in inputs) >= LARGE:
            return function(*inputs)
        key = (key, *((tensor.shape, tensor.dtype) for tensor in inputs))
        with self._lock:
            if key not in self._recorded:
                self._recorded[key] = self._record(function, inputs)
                while len(self._recorded) > MOST_GRAPHS:
                    self._recorded.popitem(last=False)
            self._recorded.move_to_end(key)
            recorded = self._recorded[key]
            if recorded is not None:
                return recorded(inputs)
        return function(*inputs)

    def __deepcopy__(self, memo: dict) -> "Replayed":
        return Replayed()  # a copy has other weights

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return ``make()`` of the first call: it needs weights alone, and perhaps the host."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def _record(self, function: Function, inputs: tuple[Tensor, ...]) -> Recorded | None:
        try:
            return Recorded(function, inputs)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            log.get().warning(f"draws are not replayed from a CUDA graph ({reason}): slower")
            return None
