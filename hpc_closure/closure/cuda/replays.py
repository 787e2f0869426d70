"""Draws as CUDA graphs: those of few members are priced by their launches, not by arithmetic.

A draw is some thousand operations, the same ones in every call. They are recorded once and
replayed, with states and noise as arguments, so a call costs one launch. What is recorded may
touch nothing of the host, and numbers in it are those of the first call: whatever may change from
call to call is an argument, or in the key.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from hpc_closure.spectral.cuda.graph import record
from hpc_closure.work import log

KEPT = 4  # graphs: each has memory of its own
LARGE = 1 << 20  # numbers of the arguments, from which arithmetic counts and memory is dear

#: tensors to tensors, of their shapes and numbers alone
Function = Callable[..., tuple[Tensor, ...]]


class Recorded:
    """One function of tensors of some shapes, recorded.

    Args:
        function: what is recorded.
        inputs: arguments, whose values do not matter.
    """

    def __init__(self, function: Function, inputs: tuple[Tensor, ...]):
        self.inputs = [tensor.clone() for tensor in inputs]
        self.outputs: tuple[Tensor, ...] = ()

        def run() -> None:
            self.outputs = function(*self.inputs)

        self.replay = record(run, run, self.inputs[0].device)

    def __call__(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for kept, tensor in zip(self.inputs, inputs):
            kept.copy_(tensor)
        self.replay()
        return tuple(tensor.clone() for tensor in self.outputs)


class Replayed:
    """Functions of tensors on a CUDA device, each recorded when it is called first.

    Their weights must stay as they are and where they are. Calls of several threads take turns.
    What cannot be recorded is said once and called as it is.
    """

    def __init__(self):
        self._recorded: OrderedDict[Hashable, Recorded | None] = OrderedDict()
        self._made: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __call__(self, function: Function, key: Hashable, *inputs: Tensor) -> tuple[Tensor, ...]:
        """``function(*inputs)``; ``key`` says all that it depends on besides."""
        if sum(tensor.numel() for tensor in inputs) >= LARGE:
            return function(*inputs)
        key = (key, *((tensor.shape, tensor.dtype) for tensor in inputs))
        with self._lock:
            if key not in self._recorded:
                self._recorded[key] = self._record(function, inputs)
                while len(self._recorded) > KEPT:
                    self._recorded.popitem(last=False)
            self._recorded.move_to_end(key)
            recorded = self._recorded[key]
            if recorded is not None:
                return recorded(inputs)
        return function(*inputs)

    def __deepcopy__(self, memo: dict) -> "Replayed":
        return Replayed()  # of a copy other weights are read

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What follows from weights alone, and may need the host."""
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
