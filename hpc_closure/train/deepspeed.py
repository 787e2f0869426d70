"""The training engine that uses DeepSpeed; no other module imports it.

It shards gradients, optimiser state and weights by ZeRO, with the interface of
:mod:`hpc_closure.train.engine`. It accesses private attributes of DeepSpeed that hold the
optimiser's flat float32 parts; setup.cfg bounds the versions in which these exist.
"""

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpc_closure.closure.model import ClosureModel
from hpc_closure.experiment.schema import Train
from hpc_closure.train.engine import (
    MOMENTS,
    Loss,
    capture,
    load_moments,
    make_optimizer,
    prepare,
    save_moments,
    trained_weights,
)
from hpc_closure.train.processes import Processes, closing, join_alone


def installed() -> bool:
    """Return whether DeepSpeed is installed."""
    return importlib.util.find_spec("deepspeed") is not None


class DeepSpeedEngine:
    """DeepSpeed with torch's AdamW, because DeepSpeed's Adam would be compiled on first use."""

    name = "deepspeed"

    def __init__(self, model: ClosureModel, settings: Train, processes: Processes):
        prepare(model, settings, processes)
        self.processes = processes
        deepspeed = _import_deepspeed(processes)
        config = configuration(settings, processes.size)
        self.stage = config["zero_optimization"]["stage"]
        self.captures = capture(model, settings, processes, self.stage)
        self.engine, *_ = deepspeed.initialize(
            model=Loss(model, processes.device, settings.precision, self.captures),
            optimizer=make_optimizer(model, settings),
            config=config,
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
        if self.captures:
            self.captures.close()
        self.engine.destroy()

    def _gather(self, weight: nn.Parameter, part: Tensor) -> Tensor:
        """Gather a full tensor from equal parts, the last of which is padded."""
        part = part.reshape(-1).contiguous()
        parts = [torch.empty_like(part) for _ in range(self.processes.size)]
        dist.all_gather(parts, part)
        return torch.cat(parts)[: _sharded(weight).ds_numel].view(_sharded(weight).ds_shape)

    def _part(self, weight: nn.Parameter, full: Tensor) -> Tensor:
        """Return this process's part of a full tensor, padded with zeros."""
        size = _sharded(weight).ds_tensor.numel()
        flat = torch.zeros(size * self.processes.size, dtype=full.dtype)
        flat[: full.numel()] = full.flatten()
        return flat[self.processes.rank * size :][:size].to(self.processes.device)

    def _inner(self) -> torch.optim.Optimizer:
        """Return torch's AdamW, whose weights are flat float32 parts in stages 1 to 3."""
        return self.engine.optimizer.optimizer if self.stage else self.engine.optimizer

    def _flat_parts(self) -> list[Tensor]:
        if self.stage == 3:
            return self.engine.optimizer.fp32_partitioned_groups_flat
        return self.engine.optimizer.single_partition_of_fp32_groups

    def _link(self) -> None:
        """Link the parts of the moments to weight names.

        DeepSpeed 0.19 does this once, after the first step of the first group of weights, when the
        other groups have no moments yet.
        """
        if self.stage < 3:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def save(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

        trained = trained_weights(self.model)
        if self.stage == 0:
            return save_moments(self._inner(), trained)
        state = self._inner().state
        if not state:  # no step taken yet
            return {}
        saved = {"step": next(iter(state.values()))["step"]}
        self._link()
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

        trained = trained_weights(self.model)
        if self.stage == 0:
            load_moments(self._inner(), trained, state)
        if self.stage == 0 or not state:
            return
        inner = self._inner()
        for flat in self._flat_parts():  # state that the first step would have created
            inner.state[flat] = {key: torch.zeros_like(flat) for key in MOMENTS}
            inner.state[flat]["step"] = state["step"].clone().to(flat.device)
        self._link()
        for name, weight in trained.items():
            for key in MOMENTS:
                moment = state.get(f"{key}/{name}")
                if moment is None:
                    continue
                if self.stage == 3:
                    safe_set_local_optimizer_state(weight, self._part(weight, moment), key)
                else:
                    moment = moment.to(self.processes.device)
                    safe_set_full_optimizer_state(weight, moment, key)


def _sharded(weight: nn.Parameter) -> Any:
    """Return a weight of ZeRO stage 3, whose attribute ``ds_tensor`` is this process's part."""
    return weight


def configuration(settings: Train, num_processes: int) -> dict[str, Any]:
    """Assemble DeepSpeed's configuration: ours, then the keys of the file ``settings.deepspeed``.

    Batch, clipping and accumulation are always those of the experiment.
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


# Buffers for models of a few MB to GB; DeepSpeed's defaults take 2 GB per process. In stage 3 all
# weights are sharded, small ones too, so that the parts always determine the weights.
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
    """Import deepspeed without messages and compilation, bound to our device and process group."""
    os.environ.setdefault("DS_ACCELERATOR", processes.device.type)
    # DeepSpeed selects its device by this variable; under srun each task may see device 0 only
    os.environ["LOCAL_RANK"] = str(processes.device.index or 0)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # otherwise compiled at the first start on a CPU, for an inference call not used here
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if processes.size == 1:
        join_alone(processes)
    backend = "nccl" if processes.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False, dist_init_required=False
    )
    closing.callback(_forget_groups, deepspeed.comm)
    return deepspeed


def _forget_groups(comm) -> None:
    """Destroy DeepSpeed's process groups before those of the training."""
    if dist.is_initialized():
        comm.destroy_process_group()
