"""The training engine: DeepSpeed, or plain torch behind the same four calls.

::

    engine = initialize(model, settings, processes)
    loss = engine.step([(batch, seed, step), ...], lr)     # one entry per micro-batch
    moments = engine.save()                                # full tensors by name, on rank 0
    engine.load(moments)

beside two views of the weights, of which ZeRO stage 3 leaves each process only a part:
``engine.held()`` (this process's float32 part) and ``engine.whole(parts)``.

The losses of all engines, process counts and ZeRO stages agree to round-off, because the update is
the same: mean gradient over the global batch, its norm clipped, torch's AdamW on float32 weights.
What is saved has neither the engine's nor the process count's shape, so any may continue from any.

Only this module imports deepspeed.
"""

import json
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from hpc_closure.closure.interface import ClosureModel
from hpc_closure.experiment.schema import Train
from hpc_closure.train.processes import Processes, join_alone

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(Protocol):
    """What the trainer sees of an engine."""

    name: str

    def step(self, micro: Sequence[tuple[dict, int, int]], lr: float) -> Tensor:
        """One optimiser step; returns this process's mean loss, detached, on the device."""

    def held(self) -> dict[str, Tensor]:
        """The float32 weights this process holds, by name: views, valid until the next step."""

    def whole(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Full tensors from parts shaped like :meth:`held`. Collective."""

    def parts(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """This process's parts of full tensors: the inverse of :meth:`whole`."""

    def save(self) -> dict[str, Tensor]:
        """The optimiser's state, full: ``exp_avg/<weight>`` ... and ``step``. Collective."""

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from what any engine has saved. The weights themselves come with the model."""

    def close(self) -> None:
        """Let go of the model, whose weights may not be used afterwards."""


class Loss(nn.Module):
    """The model's loss as a forward pass, because that is where engines place their hooks."""

    def __init__(self, model: ClosureModel, device: torch.device, precision: str):
        super().__init__()
        self.model = model
        self.device_type, self.mixed = device.type, precision == "bfloat16"

    def forward(self, batch: dict, seed: int, step: int) -> Tensor:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.mixed):
            return self.model.loss(batch, seed, step).float()


def check(model: nn.Module, settings: Train, processes: Processes) -> None:
    """Raise ValueError when the batch has no equal shares, or a weight is complex.

    DeepSpeed 0.19 crashes on complex parameters or, when all are complex under ZeRO 1 and 2, sets
    every imaginary part to zero without a word.
    """
    parts = processes.size * settings.accumulate
    if settings.batch % parts:
        raise ValueError(
            f"train.batch={settings.batch} is global and does not divide into {processes.size} "
            f"processes x {settings.accumulate} micro-batches; nearest: "
            f"{max(1, round(settings.batch / parts)) * parts}"
        )
    for name, weight in model.named_parameters():
        if weight.is_complex():
            raise ValueError(
                f"weight {name} is {str(weight.dtype).removeprefix('torch.')}: store it as real "
                "(..., 2), nn.Parameter(torch.view_as_real(w)); DeepSpeed loses imaginary parts"
            )


def deepspeed_installed() -> bool:
    from importlib.util import find_spec

    return find_spec("deepspeed") is not None


def choose(settings: Train) -> str:
    """Name of the engine. Raises ValueError when DeepSpeed is asked for and absent."""
    if settings.engine == "torch":
        return "torch"
    if deepspeed_installed():
        return "deepspeed"
    if settings.engine == "deepspeed" or settings.zero_stage or settings.deepspeed:
        raise ValueError(
            f"train.engine={settings.engine}, train.zero_stage={settings.zero_stage}: DeepSpeed "
            "is not installed; pip install deepspeed, or set train.engine=torch train.zero_stage=0"
        )
    return "torch"


def initialize(model: ClosureModel, settings: Train, processes: Processes) -> Engine:
    """Prepare ``model`` (on its device, equal on every rank) for training."""
    check(model, settings, processes)
    torch.backends.cudnn.allow_tf32 = False  # float32 is meant
    if processes.size > 1:
        for value in [*model.parameters(), *model.buffers()]:
            dist.broadcast(value.data, 0)
    if choose(settings) == "torch":
        return TorchEngine(model, settings, processes)
    return DeepSpeedEngine(model, settings, processes)


def _optimizer(model: ClosureModel, settings: Train) -> torch.optim.Optimizer:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(
        weights, lr=settings.lr, weight_decay=settings.weight_decay, fused=True
    )


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


class TorchEngine:
    """One AdamW over the whole model; gradients are averaged by one all-reduce."""

    name = "torch"

    def __init__(self, model: ClosureModel, settings: Train, processes: Processes):
        self.model, self.settings, self.processes = model, settings, processes
        self.loss = Loss(model, processes.device, settings.precision)
        self.weights = list(_trained(model).values())
        self.optimizer = _optimizer(model, settings)

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
        pass

    def save(self) -> dict[str, Tensor]:
        return _save_moments(self.optimizer, _trained(self.model))

    def load(self, state: dict[str, Tensor]) -> None:
        _load_moments(self.optimizer, _trained(self.model), state)


def _save_moments(optimizer: torch.optim.Optimizer, trained: dict) -> dict[str, Tensor]:
    """State of an optimiser that holds whole weights."""
    saved = {}
    for name, weight in trained.items():
        for key in MOMENTS if weight in optimizer.state else ():
            saved[f"{key}/{name}"] = optimizer.state[weight][key]
            saved["step"] = optimizer.state[weight]["step"]
    return saved


def _load_moments(optimizer: torch.optim.Optimizer, trained: dict, saved: dict) -> None:
    for name, weight in trained.items():
        if f"exp_avg/{name}" in saved:
            state = {key: saved[f"{key}/{name}"].clone().to(weight.device) for key in MOMENTS}
            state["step"] = saved["step"].clone().to(weight.device)
            optimizer.state[weight] = state


class DeepSpeedEngine:
    """DeepSpeed with a client AdamW: its own Adam would be compiled on first use."""

    name = "deepspeed"

    def __init__(self, model: ClosureModel, settings: Train, processes: Processes):
        self.settings, self.processes = settings, processes
        deepspeed = _import_deepspeed(processes)
        self.config = deepspeed_config(settings, processes.size)
        self.stage = self.config["zero_optimization"]["stage"]
        self.engine, *_ = deepspeed.initialize(
            model=Loss(model, processes.device, settings.precision),
            optimizer=_optimizer(model, settings),
            config=self.config,
            dist_init_required=False,
        )
        self.model = model

    def step(self, micro: Sequence[tuple[dict, int, int]], lr: float) -> Tensor:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.processes.device)
        for batch, seed, step in micro:
            loss = self.engine(batch, seed, step)
            self.engine.backward(loss)  # divides by the number of micro-batches
            self.engine.step()  # steps at the last of them
            total += loss.detach()
        return total / len(micro)

    def held(self) -> dict[str, Tensor]:
        return {
            name: _sharded(weight).ds_tensor.data if self.stage == 3 else weight.data
            for name, weight in self.model.named_parameters()
        }

    def whole(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.stage < 3:
            return parts
        weights = dict(self.model.named_parameters())
        return {name: self._gather(weights[name], part) for name, part in parts.items()}

    def parts(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.stage < 3:
            return whole
        weights = dict(self.model.named_parameters())
        return {name: self._part(weights[name], tensor) for name, tensor in whole.items()}

    def close(self) -> None:
        self.engine.destroy()

    def _gather(self, weight: nn.Parameter, part: Tensor) -> Tensor:
        """A whole tensor from equal parts, the last of them padded."""
        part = part.reshape(-1).contiguous()
        parts = [torch.empty_like(part) for _ in range(self.processes.size)]
        dist.all_gather(parts, part)
        return torch.cat(parts)[: _sharded(weight).ds_numel].view(_sharded(weight).ds_shape)

    def _part(self, weight: nn.Parameter, whole: Tensor) -> Tensor:
        """This process's part of a whole tensor, padded by zeros."""
        size = _sharded(weight).ds_tensor.numel()
        flat = torch.zeros(size * self.processes.size, dtype=whole.dtype)
        flat[: whole.numel()] = whole.flatten()
        return flat[self.processes.rank * size :][:size].to(self.processes.device)

    def _inner(self) -> torch.optim.Optimizer:
        """The client's AdamW, whose weights are flat float32 parts in stages 1 to 3."""
        return self.engine.optimizer.optimizer if self.stage else self.engine.optimizer

    def _flat_parts(self) -> list[Tensor]:
        if self.stage == 3:
            return self.engine.optimizer.fp32_partitioned_groups_flat
        return self.engine.optimizer.single_partition_of_fp32_groups

    def save(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

        trained = _trained(self.model)
        if self.stage == 0:
            return _save_moments(self._inner(), trained)
        state = self._inner().state
        if not state:  # no step taken yet
            return {}
        saved = {"step": next(iter(state.values()))["step"]}
        for name, weight in trained.items():
            for key in MOMENTS:
                if self.stage == 3:
                    part = safe_get_local_optimizer_state(weight, key)
                    saved[f"{key}/{name}"] = self._gather(weight, part)
                else:
                    saved[f"{key}/{name}"] = safe_get_full_optimizer_state(weight, key)
        return saved

    def load(self, state: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        trained = _trained(self.model)
        if self.stage == 0:
            _load_moments(self._inner(), trained, state)
        if self.stage == 0 or not state:
            return
        inner = self._inner()
        for flat in self._flat_parts():  # what the first step would have made
            inner.state[flat] = {key: torch.zeros_like(flat) for key in MOMENTS}
            inner.state[flat]["step"] = state["step"].clone().to(flat.device)
        if self.stage < 3:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, weight in trained.items():
            for key in MOMENTS:
                whole = state.get(f"{key}/{name}")
                if whole is None:
                    continue
                if self.stage == 3:
                    safe_set_local_optimizer_state(weight, self._part(weight, whole), key)
                else:
                    whole = whole.to(self.processes.device)
                    safe_set_full_optimizer_state(weight, whole, key)


def _sharded(weight: nn.Parameter) -> Any:
    """A weight of ZeRO stage 3: ``ds_tensor`` is this process's part of it."""
    return weight


def deepspeed_config(settings: Train, num_processes: int) -> dict[str, Any]:
    """DeepSpeed's configuration: ours, then the keys of the file ``settings.deepspeed``.

    Batch, clipping and accumulation always are the experiment's.
    """
    config: dict[str, Any] = {
        "zero_optimization": {"stage": settings.zero_stage, **_ZERO.get(settings.zero_stage, {})}
    }
    if settings.deepspeed:
        config.update(_read_json(Path(settings.deepspeed)))
        stage = config["zero_optimization"].get("stage", 0)
        if stage == 3:
            config["zero_optimization"] = {**_ZERO[3], **config["zero_optimization"]}
    ours = {
        "train_batch_size": settings.batch,
        "train_micro_batch_size_per_gpu": settings.batch // (num_processes * settings.accumulate),
        "gradient_accumulation_steps": settings.accumulate,
        "gradient_clipping": settings.clip,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, not DeepSpeed's
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    for key in ("optimizer", "scheduler", "fp16", "bf16"):
        if key in config:
            raise ValueError(
                f"{settings.deepspeed}: key {key!r} belongs to the experiment file (train.lr, "
                "train.schedule, train.precision); remove it"
            )
    return {**config, **ours}


# Buffers for models of a few MB to GB: DeepSpeed's defaults take 2 GB per process. In stage 3 all
# weights are shared out and none kept whole, so that parts always say what the weights are.
_ZERO: dict[int, dict[str, Any]] = {
    1: {"reduce_bucket_size": 20_000_000, "allgather_bucket_size": 20_000_000},
    2: {"reduce_bucket_size": 20_000_000, "allgather_bucket_size": 20_000_000},
    3: {
        "reduce_bucket_size": 20_000_000,
        "stage3_prefetch_bucket_size": 20_000_000,
        "stage3_param_persistence_threshold": 0,
    },
}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"train.deepspeed={path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"train.deepspeed={path}: not JSON ({error})") from None
    if not isinstance(values, dict) or "stage" not in values.get("zero_optimization", {}):
        raise ValueError(f"train.deepspeed={path}: expected a key zero_optimization with a stage")
    return values


def _import_deepspeed(processes: Processes):
    """Import deepspeed quietly, bound to our device and process group, compiling nothing."""
    os.environ.setdefault("DS_ACCELERATOR", processes.device.type)
    # DeepSpeed binds by this variable; under srun each task may see one device only, its number 0
    os.environ["LOCAL_RANK"] = str(processes.device.index or 0)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # built with a C++ compiler at the first start on a CPU, for an inference call not used here
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if processes.size == 1:
        join_alone(processes)
    backend = "nccl" if processes.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False, dist_init_required=False
    )
    return deepspeed
