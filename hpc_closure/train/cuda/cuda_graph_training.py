"""Replay networks in training from CUDA graphs, as launches are the cost of a step of few samples.

The forward and backward pass of a network are some hundred operations, the same in every step.
They are recorded once and replayed with two launches, with the network's inputs as arguments.
Draws, sensors and losses, which the host chooses, are not recorded. Gradients reach the weights
and an engine's hooks as before, but for all weights of a network at once.

A wrong recording would spoil the training unnoticed. So the first step after a recording runs both
the graph and the network, with other inputs and weights than those recorded, and compares outputs
and gradients.
"""

import copy
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from hpc_closure.closure.networks.layers import CheckpointedModule
from hpc_closure.experiment.schema import Train
from hpc_closure.spectral import switches
from hpc_closure.spectral.cuda.graph import recording
from hpc_closure.work import log

__all__ = ["Captures", "capture", "possible"]

GRAPHS_PER_PASS = 16  # limit, because each holds the memory of its backward pass
FIRST = 2  # first recorded step; the step before shows how much memory a step takes
SHARE = 3  # least device memory over that of a step, for the step, its graphs and a margin
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # relative, of round-off


def possible(settings: Train, device: torch.device, stage: int = 0, processes: int = 1) -> bool:
    """Return whether recording the networks is possible and worthwhile.

    It is not possible with micro-batches: a graph writes its gradient to the same memory in every
    pass, so gradients cannot accumulate. It is not worthwhile with recomputed layers, whose cost
    is arithmetic. It is not possible in ZeRO stage 3, in which there are no weights between the
    passes of the layers. Nor is it in stages 1 and 2 on several processes, which sum gradients in
    order of
    arrival: those of a graph arrive all at once, so all processes would have to replay in the same
    steps.
    """
    ordered = stage == 0 or stage < 3 and processes == 1
    plain = settings.accumulate == 1 and not settings.recompute
    return device.type == "cuda" and plain and ordered


def capture(
    model: nn.Module, settings: Train, device: torch.device, stage: int, processes: int
) -> "Captures | None":
    """Replay the networks of a model in training if that is possible.

    Args:
        model: model to be trained.
        settings: settings of the training.
        device: device of the model.
        stage: stage of ZeRO.
        processes: number of processes that share a batch.
    """
    return Captures(model) if possible(settings, device, stage, processes) else None


class Captures:
    """The networks of a model, replayed until :meth:`close`.

    Attributes:
        recording: whether calls may be recorded.
    """

    def __init__(self, model: nn.Module):
        self.steps, self.recording = 0, False
        self.passes = [
            Captured(self, module, name)
            for module in model.modules()
            if isinstance(module, CheckpointedModule)
            for name in module.passes
        ]
        for captured in self.passes:
            setattr(captured.network, captured.name, captured)

    def begin(self) -> None:
        """Start another forward pass of the model, after the backward pass of the last."""
        self.steps += 1
        if self.steps == FIRST:
            self.recording = _has_room()
        for captured in self.passes:
            captured.calls = 0

    def give_up(self, why: str) -> None:
        """Call all networks directly from now on, and log the reason.

        After a failed recording none of the others is trusted.
        """
        self.recording = False
        for captured in self.passes:
            captured.forget()
        log.get().warning(f"networks are not replayed from CUDA graphs ({why}): slower")

    def close(self) -> None:
        """Restore the networks and free the graphs."""
        for captured in self.passes:
            captured.forget()
            delattr(captured.network, captured.name)
        self.passes = []


def _has_room() -> bool:
    """Return whether the device has memory for graphs, which take as much as a step and stay."""
    if not torch.cuda.is_available():
        return True
    _, total = torch.cuda.mem_get_info()
    return SHARE * torch.cuda.max_memory_allocated() < total


class Pass(nn.Module):
    """A method of a network as a module of tensors, which torch can record.

    Args:
        network: the network.
        method: method of its class.
        form: tree of its arguments, some of which may be None.
        present: which leaves of the tree are tensors.
    """

    def __init__(self, network: nn.Module, method: Callable, form: TreeSpec, present: list[bool]):
        super().__init__()
        self.network, self.method = network, method
        self.form, self.present = form, present

    def forward(self, *tensors: Tensor) -> Any:
        remaining = iter(tensors)
        leaves = [next(remaining) if present else None for present in self.present]
        return self.method(self.network, *tree_unflatten(leaves, self.form))


class Captured:
    """Replacement for a method of a network: records it, compares, then replays.

    Each call in one forward pass of the model has its own graph, because the next call must not
    overwrite what the backward pass of the previous one needs.

    Args:
        owner: the captures of the model.
        network: the network.
        name: name of the method, a function of tensors, or of lists and tuples of them.
    """

    def __init__(self, owner: Captures, network: CheckpointedModule, name: str):
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
            if self.owner.recording and len(self._graphs) < GRAPHS_PER_PASS:
                present = [leaf is not None for leaf in leaves]
                self._record(key, Pass(self.network, self.method, form, present), tensors)
        elif self._agrees(graph, tensors):
            self._compared.add(key)
        else:
            self.owner.give_up(f"{type(self.network).__name__} differs from what was recorded")
        return self.method(self.network, *inputs)

    def forget(self) -> None:
        """Free the graphs, each of which is a reference cycle."""
        for graph in self._graphs.values():
            del graph.forward
        self._graphs.clear()
        self._compared.clear()

    def _worth(self, tensors: list) -> bool:
        """Return whether a backward pass follows and all arguments are tensors."""
        if not switches.is_on(switches.CAPTURED) or not torch.is_grad_enabled():
            return False
        trained = any(weight.requires_grad for weight in self.network.parameters())
        return trained and all(isinstance(leaf, Tensor) for leaf in tensors)

    def _key(self, tensors: list[Tensor], form: TreeSpec) -> Hashable:
        """Return everything that may change between calls besides the values of the tensors."""
        mixed = torch.is_autocast_enabled(tensors[0].device.type)
        shapes = ((x.shape, x.dtype, x.requires_grad) for x in tensors)
        weights = ((x.data_ptr(), x.requires_grad) for x in self.network.parameters())
        return self.calls, mixed, form, tuple(shapes), tuple(weights)

    def _record(self, key: Hashable, recorded_pass: Pass, tensors: list[Tensor]) -> None:
        kind = tensors[0].device.type
        # weights cast outside the recording would be those of this step in all later ones
        uncached = torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        )
        inputs = tuple(_leaf(x.clone(), x) for x in tensors)
        try:
            with recording(), uncached:
                # replaces the forward pass of the module
                torch.cuda.make_graphed_callables(recorded_pass, inputs, allow_unused_input=True)
        except RuntimeError as error:
            self.owner.give_up(str(error).splitlines()[0])
        else:
            self._graphs[key] = recorded_pass

    def _agrees(self, graph: Pass, tensors: list[Tensor]) -> bool:
        """Return whether outputs and gradients equal those of the network without a graph."""
        mixed = torch.is_autocast_enabled(tensors[0].device.type)
        tolerance = TOLERANCE[torch.bfloat16 if mixed else torch.float32]
        plain = Pass(self.network, self.method, graph.form, graph.present)
        pairs = list(
            zip(self._outcome(graph, tensors), self._outcome(plain, tensors), strict=True)
        )
        close = [
            (replayed - called).norm() <= tolerance * called.norm()
            for replayed, called in pairs
            if replayed is not None and called is not None
        ]
        both = all((replayed is None) == (called is None) for replayed, called in pairs)
        return both and bool(torch.stack(close).all())

    def _outcome(self, function: Pass, tensors: list[Tensor]) -> list[Tensor | None]:
        """Return outputs and the gradients of their sum."""
        inputs = [_leaf(x, x) for x in tensors]
        outputs = tree_leaves(function(*inputs))
        summed = [x for x in outputs if x.requires_grad]
        wanted = [x for x in (*inputs, *self.network.parameters()) if x.requires_grad]
        ones = [torch.ones_like(x) for x in summed]
        return [*outputs, *torch.autograd.grad(summed, wanted, ones, allow_unused=True)]


def _leaf(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a detached copy; it requires a gradient if ``like`` does."""
    return tensor.detach().requires_grad_(like.requires_grad)
