"""Replay draws from CUDA graphs, because kernel launches are the cost of a draw of few members.

A draw is about a thousand operations, the same in every call. They are recorded once and replayed
with one launch, with states and noise as arguments. A recording must not use the host, and all
other values in it are those of the first call. So everything that changes between calls must be an
argument or part of the key.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from hpc_closure.spectral.cuda.graph import record
from hpc_closure.work import log

MOST_GRAPHS = 4  # each has memory of its own
LARGE = 1 << 20  # argument elements from which launches are cheap and graphs take much memory

#: function from tensors to tensors that depends on nothing else
Function = Callable[..., tuple[Tensor, ...]]


class Recorded:
    """Recording of a function of tensors of fixed shapes.

    Args:
        function: function to record.
        inputs: arguments; their values are not used later.
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
    """Replay functions of tensors on a CUDA device; each is recorded at its first call.

    The weights in them must change neither value nor address. Calls of several threads run one
    after another. If a function cannot be recorded, this is logged once and it is called directly.
    """

    def __init__(self):
        self._recorded: OrderedDict[Hashable, Recorded | None] = OrderedDict()
        self._made: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __call__(self, function: Function, key: Hashable, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return ``function(*inputs)``; ``key`` holds all else that the result depends on."""
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
        return Replayed()  # without recordings, because a copy has its own weights

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the result of ``make()`` at the first call; it depends on weights alone."""
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
