"""Interface of a training engine, and the engine of plain torch.

::

    engine = TorchEngine(model, settings, processes)
    loss = engine.step([(batch, seed, step), ...], lr)     # one entry per micro-batch
    moments = engine.save()                                # full tensors by name, on rank 0
    engine.load(moments)

In ZeRO stage 3 each process has only a part of the weights, so there are two views:
``engine.held()`` (this process's float32 parts) and ``engine.whole(parts)`` (full tensors).

The losses of all engines, process counts and ZeRO stages agree to round-off, because the update is
the same: mean gradient over the global batch, its norm clipped, torch's AdamW on float32 weights.
Saved states depend on neither the engine nor the number of processes, so any engine can continue
from any state.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from hpc_closure.closure.model import ClosureModel
from hpc_closure.closure.networks.layers import CheckpointedModule
from hpc_closure.experiment.schema import Train
from hpc_closure.spectral import switches
from hpc_closure.spectral.modes.line_fft import keep_freed_memory
from hpc_closure.train.processes import Processes

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(Protocol):
    """Interface of an engine to the trainer."""

    name: str

    def step(self, micro: Sequence[tuple[dict, int, int]], lr: float) -> Tensor:
        """Take an optimiser step; returns this process's mean loss, detached, on the device."""

    def held(self) -> dict[str, Tensor]:
        """Return this process's float32 weights, by name: views, valid until the next step."""

    def whole(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gather full tensors from parts shaped like :meth:`held`. Collective."""

    def parts(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this process's parts of full tensors, the inverse of :meth:`whole`."""

    def save(self) -> dict[str, Tensor]:
        """Return the optimiser's full state: ``exp_avg/<weight>`` ... and ``step``. Collective."""

    def load(self, state: dict[str, Tensor]) -> None:
        """Load the optimiser's state from any engine. The model has the weights already."""

    def close(self) -> None:
        """Release the model, whose weights must not be used afterwards."""


class Captures(Protocol):
    """CUDA graphs of a model's networks that a training replays."""

    def begin(self) -> None:
        """Start another forward pass of the model."""

    def close(self) -> None:
        """Restore the networks and free the graphs."""


def capture(
    model: ClosureModel, settings: Train, processes: Processes, stage: int = 0
) -> Captures | None:
    """Replay the networks of a model from CUDA graphs if the switch ``captured`` is on.

    Args:
        model: model to be trained.
        settings: settings of the training.
        processes: the processes that share a batch.
        stage: stage of ZeRO.
    """
    if not switches.is_on(switches.CAPTURED):
        return None
    from hpc_closure.train.cuda import cuda_graph_training

    return cuda_graph_training.capture(model, settings, processes.device, stage, processes.size)


class Loss(nn.Module):
    """The model's loss as a forward pass, on which engines place their hooks."""

    def __init__(
        self,
        model: ClosureModel,
        device: torch.device,
        precision: str,
        captures: Captures | None = None,
    ):
        super().__init__()
        self.model, self.captures = model, captures
        self.device_type, self.mixed = device.type, precision == "bfloat16"

    def forward(self, batch: dict, seed: int, step: int) -> Tensor:
        if self.captures:
            self.captures.begin()
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.mixed):
            return self.model.loss(batch, seed, step).float()


def check(
    model: nn.Module, settings: Train, processes: Processes, key: str = "train.batch"
) -> None:
    """Raise ValueError if the batch has no equal shares, or a weight is complex.

    ``key`` names the batch in an experiment.

    DeepSpeed 0.19 crashes on complex parameters. If all are complex under ZeRO 1 and 2, it sets
    every imaginary part to zero without a warning.
    """
    parts = processes.size * settings.accumulate
    if settings.batch % parts:
        raise ValueError(
            f"{key}={settings.batch} is global and does not divide into {processes.size} "
            f"processes x {settings.accumulate} micro-batches; nearest: "
            f"{max(1, round(settings.batch / parts)) * parts}"
        )
    for name, weight in model.named_parameters():
        if weight.is_complex():
            raise ValueError(
                f"weight {name} is {str(weight.dtype).removeprefix('torch.')}: store it as real "
                "(..., 2), nn.Parameter(torch.view_as_real(w)); DeepSpeed loses imaginary parts"
            )


def make_optimizer(model: ClosureModel, settings: Train) -> torch.optim.Optimizer:
    """Create AdamW, with a group for the weights of each decay."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, weight in trained_weights(model).items():
        groups.setdefault(settings.weight_decay + model.weight_decay(name), []).append(weight)
    parameter_groups = [
        {"params": weights, "weight_decay": decay} for decay, weights in groups.items()
    ]
    return torch.optim.AdamW(parameter_groups, lr=settings.lr, fused=True)


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that require gradients, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def prepare(model: ClosureModel, settings: Train, processes: Processes) -> None:
    """Prepare a model for an engine: checks, float32 precision, recomputation, equal weights."""
    check(model, settings, processes)
    for module in model.modules():
        if isinstance(module, CheckpointedModule):
            module.recompute = settings.recompute
    torch.backends.cudnn.allow_tf32 = False
    keep_freed_memory()
    if processes.size > 1:
        for value in [*model.parameters(), *model.buffers()]:
            dist.broadcast(value.data, 0)


class TorchEngine:
    """A single AdamW for the full model; gradients are averaged by one all-reduce."""

    name = "torch"

    def __init__(self, model: ClosureModel, settings: Train, processes: Processes):
        prepare(model, settings, processes)
        self.model, self.settings, self.processes = model, settings, processes
        self.captures = capture(model, settings, processes)
        self.loss = Loss(model, processes.device, settings.precision, self.captures)
        self.weights = list(trained_weights(model).values())
        self.optimizer = make_optimizer(model, settings)

    def step(self, micro: Sequence[tuple[dict, int, int]], lr: float) -> Tensor:
        total = torch.zeros((), device=self.processes.device)
        for batch, seed, step in micro:
            loss = self.loss(batch, seed, step) / len(micro)
            loss.backward()
            total += loss.detach()
        self._average_gradients()
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.weights, self.settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def _average_gradients(self) -> None:
        if self.processes.size == 1:
            return
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        flat = _flatten_dense_tensors(gradients)
        dist.all_reduce(flat)
        flat /= self.processes.size
        for gradient, mean in zip(
            gradients, _unflatten_dense_tensors(flat, gradients), strict=True
        ):
            gradient.copy_(mean)

    def held(self) -> dict[str, Tensor]:
        return {name: weight.data for name, weight in self.model.named_parameters()}

    def whole(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        return parts

    def parts(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        return whole

    def close(self) -> None:
        if self.captures:
            self.captures.close()

    def save(self) -> dict[str, Tensor]:
        return save_moments(self.optimizer, trained_weights(self.model))

    def load(self, state: dict[str, Tensor]) -> None:
        load_moments(self.optimizer, trained_weights(self.model), state)


def save_moments(optimizer: torch.optim.Optimizer, trained: dict) -> dict[str, Tensor]:
    """Return the state of an optimiser that has full weights."""
    saved = {}
    for name, weight in trained.items():
        for key in MOMENTS if weight in optimizer.state else ():
            saved[f"{key}/{name}"] = optimizer.state[weight][key]
            saved["step"] = optimizer.state[weight]["step"]
    return saved


def load_moments(optimizer: torch.optim.Optimizer, trained: dict, saved: dict) -> None:
    """Load the state of an optimiser that has full weights."""
    for name, weight in trained.items():
        if f"exp_avg/{name}" in saved:
            state = {key: saved[f"{key}/{name}"].clone().to(weight.device) for key in MOMENTS}
            state["step"] = saved["step"].clone().to(weight.device)
            optimizer.state[weight] = state
