"""A CUDA graph without CUDA: operations are recorded with their memory, and done again there."""

from contextlib import contextmanager, nullcontext

import torch
import trajectory_case
from closure_case import with_generator
from rehearsal import on_device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Inside it, operations are noted; :meth:`replay` does them again on the same tensors.

    As in a graph, numbers of the host are those of the recording. With ``device`` a tensor of
    the host is refused, as by a graph: it would be copied while nobody may wait.
    """

    def __init__(self, device: bool = False):
        super().__init__()
        self.device = device
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if self.device and any(map(on_device, leaves)):
            for leaf in leaves:
                if isinstance(leaf, torch.Tensor) and leaf.ndim and not on_device(leaf):
                    raise RuntimeError(f"{func}: a tensor of the host, {tuple(leaf.shape)}")
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, tree_leaves(out)))
        return out

    def replay(self) -> None:
        """All operations once more."""
        for func, args, kwargs, made in self.operations:
            for old, new in zip(made, tree_leaves(func(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def recording(found, device=False):
    """Stands for ``replayed.record``; what is recorded is added to ``found``.

    With ``device``, where there are no numbers, nothing is done again.
    """

    def record(run, warm, place):
        warm()
        with Recorder(device) as recorder:
            run()
        found.append(recorder)
        return (lambda: None) if device else recorder.replay

    return record


class Graph:
    """Stands for ``torch.cuda.CUDAGraph``."""

    made: "list[Graph]" = []

    def __init__(self):
        self.recorder, self.replays = Recorder(), 0
        Graph.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        self.recorder.replay()


@contextmanager
def capturing(graph, pool=None):
    with graph.recorder:
        yield


def play_graphs(monkeypatch) -> None:
    """Let ``torch.cuda.make_graphed_callables`` itself record and replay on the CPU."""
    Graph.made.clear()
    for name, value in {
        "CUDAGraph": Graph,
        "graph": capturing,
        "synchronize": lambda: None,
        "current_stream": lambda: None,
        "set_stream": lambda stream: None,
        "Stream": lambda: None,
        "stream": lambda stream: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)


PRESETS = ["default", "fno_score", "one_pass", "gaussian", "convolutional"]


def model_of(preset):
    """A fitted model of each kind: with a generator that acts, or of the last closures."""
    if preset in ("gaussian", "convolutional"):
        return trajectory_case.fitted(preset).eval()
    return with_generator(preset)
