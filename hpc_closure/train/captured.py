"""Networks in training as CUDA graphs: a step of few samples is priced by its launches.

Forward and backward pass of a network are some hundred operations, the same ones in every step.
They are recorded once and replayed as two launches, with what the network reads as arguments; the
draws, sensors and losses around them, which the host chooses, stay as they are. To an engine it
looks the same: gradients reach the weights, and its hooks, as ever.

What is recorded wrongly would train wrongly without a word. So the first step after a recording
does both, with other inputs and weights than were recorded, and compares outputs and gradients.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from hpc_closure.closure.fno import Layered
from hpc_closure.experiment.schema import Train
from hpc_closure.work import log

__all__ = ["Captures", "capture", "possible", "uncaptured"]

KEPT = 16  # graphs of one pass: each keeps what its backward pass needs
TRIES = 3  # recordings that may fail: work of another thread can spoil one
FAR = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # relative, for what differs by round-off


def possible(settings: Train, device: torch.device) -> bool:
    """Whether networks are worth recording, and may be.

    A gradient of one graph is in the same memory in every pass, so none is added to another; and
    whoever recomputes layers has networks whose arithmetic counts.
    """
    return device.type == "cuda" and settings.accumulate == 1 and not settings.recompute


def capture(model: nn.Module, settings: Train, device: torch.device) -> "Captures | None":
    """Let the networks of a model that is to be trained be replayed, where that is possible."""
    return Captures(model) if possible(settings, device) else None


class Captures:
    """The networks of a model, replayed until :meth:`close`."""

    def __init__(self, model: nn.Module):
        self.passes = [
            Captured(module, name)
            for module in model.modules()
            if isinstance(module, Layered)
            for name in module.passes
        ]
        for one in self.passes:
            setattr(one.network, one.name, one)

    def begin(self) -> None:
        """Another forward pass of the model begins, and the backward pass of the last is done."""
        for one in self.passes:
            one.calls = 0

    def close(self) -> None:
        for one in self.passes:
            delattr(one.network, one.name)


_on = True


@contextmanager
def uncaptured() -> Iterator[None]:
    """Inside it networks are called as they are."""
    global _on
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before


class Pass(nn.Module):
    """One method of a network as a module, the form in which torch records."""

    def __init__(self, network: nn.Module, name: str):
        super().__init__()
        self.network = network
        self.method: Callable[..., Any] = getattr(type(network), name)

    def forward(self, *inputs: Any) -> Any:
        return self.method(self.network, *inputs)


class Captured:
    """A method of a network, in its place: recorded, compared, then replayed.

    Several calls in one forward pass of the model have graphs of their own, for what one keeps for
    its backward pass the next must not overwrite.

    Args:
        network: whose method it is.
        name: of the method, a function of tensors, or of lists and tuples of them.
    """

    def __init__(self, network: Layered, name: str):
        self.network, self.name = network, name
        self.plain = Pass(network, name)
        self.calls, self.tries = 0, TRIES
        self._graphs: dict[Hashable, Pass | None] = {}
        self._compared: set[Hashable] = set()

    def __call__(self, *inputs: Any) -> Any:
        leaves = tree_leaves(inputs)
        if not self._worth(leaves):
            return self.plain(*inputs)
        key = self._key(leaves)
        self.calls += 1
        graph = self._graphs.get(key)
        if graph is None:
            if key not in self._graphs and self.tries and len(self._graphs) < KEPT:
                self._record(key, inputs)
            return self.plain(*inputs)
        if key not in self._compared:
            self._compared.add(key)
            if not self._agrees(graph, inputs):
                self._graphs[key], self.tries = None, 0
                self._warn("they differ from what was recorded")
            return self.plain(*inputs)
        return graph(*inputs)

    def _worth(self, leaves: list) -> bool:
        """Whether there is a backward pass."""
        if not _on or not torch.is_grad_enabled():
            return False
        trained = any(weight.requires_grad for weight in self.network.parameters())
        return trained and all(isinstance(leaf, Tensor) for leaf in leaves)

    def _key(self, leaves: list[Tensor]) -> Hashable:
        """All that may differ from call to call and is no number of a tensor."""
        mixed = torch.is_autocast_enabled(leaves[0].device.type)
        told = ((one.shape, one.dtype, one.requires_grad) for one in leaves)
        return self.calls, mixed, *told

    def _record(self, key: Hashable, inputs: Any) -> None:
        own, kind = Pass(self.network, self.name), tree_leaves(inputs)[0].device.type
        # weights that were cast outside are not those that the next step will have
        uncached = torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        )
        try:
            with uncached:
                # it changes the module's own forward pass
                torch.cuda.make_graphed_callables(
                    own, _leaves_of_their_own(inputs, clone=True), allow_unused_input=True
                )
            self._graphs[key] = own
        except RuntimeError as error:
            self.tries -= 1
            if not self.tries:
                self._warn(str(error).splitlines()[0])

    def _agrees(self, graph: Pass, inputs: Any) -> bool:
        """Whether outputs and gradients are those of the network as it is."""
        mixed = torch.is_autocast_enabled(tree_leaves(inputs)[0].device.type)
        far = FAR[torch.bfloat16 if mixed else torch.float32]
        ours, theirs = (self._outcome(one, inputs) for one in (graph, self.plain))
        close = [
            (one - other).norm() <= far * other.norm()
            for one, other in zip(ours, theirs, strict=True)
            if one is not None and other is not None
        ]
        both = all((one is None) == (other is None) for one, other in zip(ours, theirs))
        return both and bool(torch.stack(close).all())

    def _outcome(self, function: Pass, inputs: Any) -> list[Tensor | None]:
        """Outputs, and the gradients of their sum."""
        own = _leaves_of_their_own(inputs)
        outputs = tree_leaves(function(*own))
        summed = [one for one in outputs if one.requires_grad]
        wanted = [
            one for one in (*tree_leaves(own), *self.network.parameters()) if one.requires_grad
        ]
        ones = [torch.ones_like(one) for one in summed]
        return [*outputs, *torch.autograd.grad(summed, wanted, ones, allow_unused=True)]

    def _warn(self, why: str) -> None:
        log.get().warning(
            f"passes of {type(self.network).__name__} are not replayed from CUDA graphs "
            f"({why}): slower"
        )


def _leaves_of_their_own(inputs: Any, clone: bool = False) -> Any:
    """The same inputs, without what they were made of."""
    leaves, form = tree_flatten(inputs)
    return tree_unflatten(
        [
            (one.detach().clone() if clone else one.detach()).requires_grad_(one.requires_grad)
            for one in leaves
        ],
        form,
    )
