"""Networks in training as CUDA graphs: a step of few samples is priced by its launches.

Forward and backward pass of a network are some hundred operations, the same ones in every step.
They are recorded once and replayed as two launches, with what the network reads as arguments; the
draws, sensors and losses around them, which the host chooses, stay as they are. To an engine it
looks the same: gradients reach the weights, and its hooks, though all of a network at once.

What is recorded wrongly would train wrongly without a word. So the first step after a recording
does both, with other inputs and weights than were recorded, and compares outputs and gradients.
"""

import copy
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from hpc_closure.closure.networks.layers import Layered
from hpc_closure.experiment.schema import Train
from hpc_closure.spectral.cpu.jit import Switch
from hpc_closure.spectral.cuda.graph import recording
from hpc_closure.work import log

__all__ = ["Captures", "capture", "possible", "replaying"]

KEPT = 16  # graphs of one pass: each keeps what its backward pass needs
FIRST = 2  # the step that is recorded first: by then it is known what a step takes
SHARE = 3  # a step, its graphs and what is between are to fit into memory so many times over
FAR = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # relative, for what differs by round-off

#: off: networks are called as they are
replaying = Switch()


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
    """The networks of a model, replayed until :meth:`close`.

    Attributes:
        recording: whether what is called may be recorded.
    """

    def __init__(self, model: nn.Module):
        self.steps, self.recording = 0, False
        self.passes = [
            Captured(self, module, name)
            for module in model.modules()
            if isinstance(module, Layered)
            for name in module.passes
        ]
        for one in self.passes:
            setattr(one.network, one.name, one)

    def begin(self) -> None:
        """Another forward pass of the model begins, and the backward pass of the last is done."""
        self.steps += 1
        if self.steps == FIRST:
            self.recording = _room()
        for one in self.passes:
            one.calls = 0

    def give_up(self, why: str) -> None:
        """Call all networks as they are from now on: after a recording that failed it is not sure
        that another one can be trusted."""
        self.recording = False
        for one in self.passes:
            one.forget()
        log.get().warning(f"networks are not replayed from CUDA graphs ({why}): slower")

    def close(self) -> None:
        """Leave the networks as they were, and free what the graphs hold."""
        for one in self.passes:
            one.forget()
            delattr(one.network, one.name)
        self.passes = []


def _room() -> bool:
    """Whether a step takes little of the device's memory: graphs take as much, and stay."""
    if not torch.cuda.is_available():
        return True
    _, whole = torch.cuda.mem_get_info()
    return SHARE * torch.cuda.max_memory_allocated() < whole


class Pass(nn.Module):
    """One method of a network as a module that reads tensors, the form in which torch records.

    Args:
        network: whose method it is.
        method: of its class.
        form: of its arguments; None among them are none of the tensors.
        present: which of the form's leaves are tensors.
    """

    def __init__(self, network: nn.Module, method: Callable, form: TreeSpec, present: list[bool]):
        super().__init__()
        self.network, self.method = network, method
        self.form, self.present = form, present

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        leaves = [next(given) if here else None for here in self.present]
        return self.method(self.network, *tree_unflatten(leaves, self.form))


class Captured:
    """A method of a network, in its place: recorded, compared, then replayed.

    Several calls in one forward pass of the model have graphs of their own, for what one keeps for
    its backward pass the next must not overwrite.

    Args:
        owner: of all that are replayed.
        network: whose method it is.
        name: of the method, a function of tensors, or of lists and tuples of them.
    """

    def __init__(self, owner: Captures, network: Layered, name: str):
        self.owner, self.network, self.name = owner, network, name
        self.method: Callable[..., Any] = getattr(type(network), name)
        self.calls = 0
        self._graphs: dict[Hashable, Pass] = {}
        self._compared: set[Hashable] = set()

    def __deepcopy__(self, memo: dict) -> Callable[..., Any]:
        return partial(self.method, copy.deepcopy(self.network, memo))  # a copy has no graphs

    def __call__(self, *inputs: Any) -> Any:
        leaves, form = tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if leaf is not None]
        if not self._worth(tensors):
            return self.method(self.network, *inputs)
        key = self._key(tensors, form)
        self.calls += 1
        graph = self._graphs.get(key)
        if graph is not None and key in self._compared:
            return graph(*tensors)
        if graph is None:
            if self.owner.recording and len(self._graphs) < KEPT:
                own = Pass(self.network, self.method, form, [leaf is not None for leaf in leaves])
                self._record(key, own, tensors)
        elif self._agrees(graph, tensors):
            self._compared.add(key)
        else:
            self.owner.give_up(f"{type(self.network).__name__} differs from what was recorded")
        return self.method(self.network, *inputs)

    def forget(self) -> None:
        """Let go of the graphs: each refers to itself."""
        for graph in self._graphs.values():
            del graph.forward
        self._graphs.clear()
        self._compared.clear()

    def _worth(self, tensors: list) -> bool:
        """Whether there is a backward pass, and nothing but tensors."""
        if not replaying.on or not torch.is_grad_enabled():
            return False
        trained = any(weight.requires_grad for weight in self.network.parameters())
        return trained and all(isinstance(one, Tensor) for one in tensors)

    def _key(self, tensors: list[Tensor], form: TreeSpec) -> Hashable:
        """All that may differ from call to call and is no number of a tensor."""
        mixed = torch.is_autocast_enabled(tensors[0].device.type)
        told = ((one.shape, one.dtype, one.requires_grad) for one in tensors)
        weights = ((one.data_ptr(), one.requires_grad) for one in self.network.parameters())
        return self.calls, mixed, form, tuple(told), tuple(weights)

    def _record(self, key: Hashable, own: Pass, tensors: list[Tensor]) -> None:
        kind = tensors[0].device.type
        # weights that were cast outside are not those that the next step will have
        uncached = torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        )
        inputs = tuple(_alone(one.clone(), one) for one in tensors)
        try:
            with recording(), uncached:
                # it changes the module's own forward pass
                torch.cuda.make_graphed_callables(own, inputs, allow_unused_input=True)
        except RuntimeError as error:
            self.owner.give_up(str(error).splitlines()[0])
        else:
            self._graphs[key] = own

    def _agrees(self, graph: Pass, tensors: list[Tensor]) -> bool:
        """Whether outputs and gradients are those of the network as it is."""
        mixed = torch.is_autocast_enabled(tensors[0].device.type)
        far = FAR[torch.bfloat16 if mixed else torch.float32]
        plain = Pass(self.network, self.method, graph.form, graph.present)
        ours, theirs = (self._outcome(one, tensors) for one in (graph, plain))
        close = [
            (one - other).norm() <= far * other.norm()
            for one, other in zip(ours, theirs, strict=True)
            if one is not None and other is not None
        ]
        both = all((one is None) == (other is None) for one, other in zip(ours, theirs))
        return both and bool(torch.stack(close).all())

    def _outcome(self, function: Pass, tensors: list[Tensor]) -> list[Tensor | None]:
        """Outputs, and the gradients of their sum."""
        own = [_alone(one, one) for one in tensors]
        outputs = tree_leaves(function(*own))
        summed = [one for one in outputs if one.requires_grad]
        wanted = [one for one in (*own, *self.network.parameters()) if one.requires_grad]
        ones = [torch.ones_like(one) for one in summed]
        return [*outputs, *torch.autograd.grad(summed, wanted, ones, allow_unused=True)]


def _alone(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor without what it was made of, which asks for a gradient where ``like`` does."""
    return tensor.detach().requires_grad_(like.requires_grad)
