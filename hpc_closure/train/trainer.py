"""Training, from the first batch to model.safetensors.

The model's phases (:class:`hpc_closure.closure.model.ClosureModel`) run in order. Each has its
closed-form statistics, its trainable weights and a cycle of the learning rate; a phase may have no
steps. The training members are split alternately into ``fit`` and ``hold``. After a phase the
averaged weights become the model's.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_closure.closure.model import ClosureModel, Phase
from hpc_closure.closure.part_report import describe
from hpc_closure.data.samples import Share, TrainingSet
from hpc_closure.experiment import renames
from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.schema import TRANSIENT_TRAIN, Train
from hpc_closure.train import checkpoint, deepspeed, engine, validate
from hpc_closure.train.checkpoint import Checkpoint, Position
from hpc_closure.train.engine import Engine, TorchEngine
from hpc_closure.train.metrics import Metrics
from hpc_closure.train.processes import Processes
from hpc_closure.train.shares import SharedReader
from hpc_closure.work import log
from hpc_closure.work.stop import Stop, Stopped

RUN_AT_ONCE = 16  # starts of coupled ensembles that run together in a validation
READ_EVERY = 10  # steps between reads of losses and stop flag on a GPU, each of which waits for it
JUDGED_TIMES = 12  # validations of a training through the solver,
JUDGED_AFTER = 10  # with at least so many steps between them
ROW_EVERY = 10  # steps averaged in a row of the metrics
WARM_UP = 0.02  # share of a phase's steps in which the cosine schedule rises


@dataclass(frozen=True)
class Plan:
    """Settings and output of a training.

    Attributes:
        settings: section ``train`` of the experiment.
        seed: seed of batches, augmentation and the model's noise.
        run: run folder for restart points, metrics and the model.
        recipe: hash of all settings that determine the model, including those of the data. A
            restart point with another hash is refused.
    """

    settings: Train
    seed: int
    run: Run
    recipe: str = ""

    @property
    def learned(self) -> dict:
        """Settings that determine the losses; they must not change when a training continues."""
        settings = self.settings.model_dump(mode="json", exclude=set(TRANSIENT_TRAIN))
        return {**settings, "seed": self.seed, "recipe": self.recipe[:12]}


@dataclass
class TrainData:
    """Training samples, and validation samples of other members."""

    train: TrainingSet
    valid: TrainingSet

    def of(self, kind: str) -> TrainingSet:
        """Return the samples of a kind of members: fit, hold, valid or train."""
        if kind in ("fit", "hold"):
            return self.train.part(("fit", "hold").index(kind), 2)
        return getattr(self, kind)


def fit(
    model: ClosureModel,
    data: TrainData,
    plan: Plan,
    export: Callable[[ClosureModel, Path], None],
    *,
    processes: Processes | None = None,
    stop: Stop | None = None,
) -> None:
    """Train ``model`` on ``data``, or continue from the newest restart point, then export it.

    Args:
        model: model, built equally on every process.
        data: data, read equally on every process.
        plan: settings and output of the training.
        export: writes the model (averaged weights, float32, on the CPU) to a path.
        processes: from :func:`hpc_closure.train.processes.join`; None = this process alone.
        stop: stop flag, read between steps.

    Raises:
        Stopped: a stop was requested. Everything is saved, and the same call continues.
        ValueError: settings, data and restart point do not fit together.
        RuntimeError: the loss is not finite.
    """
    trainer = Trainer(model, data, plan, processes or Processes(), stop or Stop())
    try:
        trainer.restore()
        for number, (phase, steps) in enumerate(trainer.phases):
            if number >= trainer.position.phase:
                trainer.train_phase(phase, steps)
        trainer.on_first(lambda: export(trainer.model.cpu(), plan.run.model))
    finally:
        trainer.close()


class Trainer:
    """State of a training; :func:`fit` calls its methods in order."""

    def __init__(
        self,
        model: ClosureModel,
        data: TrainData,
        plan: Plan,
        processes: Processes,
        stop: Stop,
    ):
        self.plan, self.processes, self.stop = plan, processes, stop
        self.model, self.data = model, data
        self.seed, self.run = plan.seed, plan.run
        self.logger = log.get()
        for phase in model.phases:
            key = "train.rollout_training.batch" if phase.through else "train.batch"
            engine.check(model, _settings_of(phase, plan.settings), processes, key)
        model.to(processes.device)
        data.train.to(processes.device)
        data.valid.to(processes.device)
        self.phases = _steps_of(model.phases, plan.settings.steps)
        self.learned = {**plan.learned, "samples": len(data.train)}
        self.position = Position(settings=self.learned)
        self.restored: Checkpoint | None = None
        self.metrics: Metrics | None = None
        self.best: dict[str, Tensor] = {}
        self.unread: list[Tensor] = []
        self.steps_now = 0

    # Restart points

    def restore(self) -> None:
        """Continue from the newest complete restart point, if there is one."""
        newest = self.on_first(lambda: checkpoint.newest(self.run.checkpoints), share=True)
        if newest:
            self.restored = restored = checkpoint.load(newest)
            self.position = restored.position
            self._check_restored(newest, restored.tensors["weights"])
            self.best = restored.tensors.get("best", {})
            self.model.load_state_dict({**self.model.state_dict(), **restored.tensors["weights"]})
            self.model.load_statistics(restored.tensors.get("statistics", {}))
            if self.processes.first:
                self.logger.info(f"continuing from restart point {newest.name}")
        self.started = time.monotonic() - self.position.seconds
        if self.processes.first:
            self.metrics = Metrics(self.run.metrics, self.run.tensorboard, self.position.step)

    def _check_restored(self, path: Path, weights: dict[str, Tensor]) -> None:
        then = renames.updated(self.position.settings, "train", warn=False)
        changed = [
            f"{key}: {then[key]} -> {value}"
            for key, value in self.learned.items()
            if key in then and then[key] != _known(value, then[key])
        ]
        if changed:
            raise ValueError(
                f"{path} was made with other settings ({', '.join(changed)}); "
                "change `name`, or run `train --overwrite`"
            )
        reason = checkpoint.same_weights(weights, self.model.state_dict())
        if reason:
            raise ValueError(f"{path} holds another model ({reason}); run `train --overwrite`")

    def save(self) -> None:
        """Write a restart point (collective)."""
        whole = self.engine.whole
        buffers = dict(self.model.named_buffers())
        saved_buffers = {key: buffers[key] for key in self.shadow.state_dict() if key in buffers}
        tensors = {
            "weights": {**whole(self.engine.held()), **saved_buffers},
            "statistics": self.model.saved_statistics(),
            "average": whole(self.average.tensors),
            "best": self.best,
            "optimizer": self.engine.save(),
        }
        self._publish(tensors)

    def _publish(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        self.position.seconds = time.monotonic() - self.started
        self.on_first(
            lambda: checkpoint.save(self.run.checkpoints, Checkpoint(self.position, tensors))
        )
        if self.metrics:
            self.metrics.flush()

    def on_first(self, work: Callable[[], Any], share: bool = False) -> Any:
        """Call ``work`` on the first process only; if it fails, all fail with its message."""
        value = self.processes.together(lambda: work() if self.processes.first else None)
        return self.processes.share(value) if share else value

    # One phase

    def train_phase(self, phase: Phase, steps: int) -> None:
        """Take all (remaining) steps of a phase; then the averaged weights become the model's."""
        position = self.position
        self._begin(phase)
        settings = self.settings
        if not steps:
            return self._end(phase)
        self._prepare(phase)
        if self.through and position.phase_step == 0:
            self._validate()  # reference of the best weights
        with log.Progress(
            steps, f"train {phase.name}", initial=position.phase_step, show=self.processes.first
        ) as bar:
            while position.phase_step < steps:
                lr = learning_rate(settings, position.phase_step, steps)
                self.unread.append(self.engine.step(self._micro_batches(), lr))
                position.step += 1
                position.phase_step += 1
                self.steps_now += 1
                self.average.update(self.engine.held(), position.phase_step)

                last = position.phase_step == steps
                validating = last or position.phase_step % settings.validate_every == 0
                saving = not last and position.step % settings.checkpoint_every == 0
                row = position.step % ROW_EVERY == 0 or validating
                stopping = self._read(force=row or saving)
                if row:
                    loss = self._write_row(phase.name, lr, self._validate() if validating else {})
                    bar.update(position.phase_step - bar.done, f"loss {loss:.4g}")
                if self._out_of_patience():
                    break
                if saving or (stopping and not last):
                    self.save()
                if stopping and not last:
                    raise Stopped(self.stop.reason)
        self._end(phase)

    def _begin(self, phase: Phase) -> None:
        """Compute or restore a phase's statistics, and select the weights that it trains."""
        model, self.part, self.valid = self.model, self.data.of(phase.members), self.data.valid
        self.settings, self.through = _settings_of(phase, self.plan.settings), phase.through
        self.share = Share(self.settings.batch, self.processes.rank, self.processes.size)
        judged = validate.JUDGED
        if self.through:
            self.part, self.valid = (
                part.followed(self.through.calls[1]) for part in (self.part, self.valid)
            )
            judged = validate.JUDGED_THROUGH
        self.fixed = {"train": self.part.some(judged), "valid": self.valid.some(judged)}
        if self.position.phase_step == 0:
            report = self.processes.together(lambda: model.begin(phase.name, self._reader()))
            model.load_statistics(self.processes.share(model.saved_statistics()))
            for key, value in report.items():
                self.logger.info(f"{phase.name}: {key} {value}")
        model.resume(phase.name)

    def _reader(self) -> SharedReader:
        """Create a reader of this process's share of the snapshots for the phase's statistics."""
        if self.through:
            return SharedReader(self.processes, self.part, self.fixed["train"], RUN_AT_ONCE)
        numbers = self.part.some(0)
        size, every = self.part.pass_size, len(self.part.indices)
        return SharedReader(self.processes, self.part, numbers, size, every)

    def _prepare(self, phase: Phase) -> None:
        """Create or restore engine and average of a phase."""
        self.keeps_best = bool(self.settings.patience or self.through or phase.best)
        self.scored = phase.sampled and phase is self._last_trained()
        self.shadow = copy.deepcopy(self.model).eval()
        self.shadow_loss = engine.Loss(self.shadow, self.processes.device, self.settings.precision)
        self.engine = start_engine(self.model, self.settings, self.processes)
        self.average = Average(self.engine.held(), self.settings.ema)
        if self.restored is not None and self.position.phase_step:
            self.engine.load(self.restored.tensors.get("optimizer", {}))
            parts = self.engine.parts(self.restored.tensors["average"])
            for key, value in self.average.tensors.items():
                value.copy_(parts[key])
        self.restored = None
        if self.processes.first and not self.steps_now:
            self._announce()

    def _last_trained(self) -> Phase:
        """Return the last phase with steps; before it, samples are not informative."""
        return [phase for phase, steps in self.phases if steps][-1]

    def _announce(self) -> None:
        count = sum(weight.numel() for weight in self.shadow.parameters())
        held = "in memory" if self.data.train.resident else "streamed"
        self.logger.info(
            f"{self.engine.name} engine, {self.processes.size} process(es), ZeRO stage "
            f"{self.settings.zero_stage}, {self.settings.precision}; {count} weights; "
            f"{len(self.data.train)} training samples ({held}), {len(self.data.valid)} held out"
        )

    def _micro_batches(self) -> list[tuple[dict, int, int]]:
        """Load this process's slice of the step's global batch, split for accumulation."""
        settings, step = self.settings, self.position.step
        size = settings.batch // (self.processes.size * settings.accumulate)
        first = step * settings.batch + self.processes.rank * settings.accumulate * size
        batches = [
            self.part.batch(first + part * size, size, self.share)
            for part in range(settings.accumulate)
        ]
        if self.through:
            calls = self.through.calls_at(self.position.phase_step)
            batches = [{**batch, "ahead": batch["ahead"][:, :calls]} for batch in batches]
        return [(batch, self.seed, step) for batch in batches]

    def _read(self, force: bool) -> bool:
        """Read the losses of the last steps, averaged over the processes.

        Returns:
            Whether a stop was requested on any process; all processes return this at the same
            step.
        """
        if self.processes.device.type == "cuda" and len(self.unread) < READ_EVERY and not force:
            return False
        wanted = torch.tensor(float(self.stop.requested), device=self.processes.device)
        values = self.processes.mean(torch.stack([wanted, *self.unread])).tolist()
        self.unread.clear()
        self.position.pending += values[1:]
        for back, loss in enumerate(reversed(values[1:])):
            if loss != loss or abs(loss) == float("inf"):
                key = "train.rollout_training.lr" if self.through else "train.lr"
                raise RuntimeError(
                    f"loss is {loss} at step {self.position.step - back}: lower {key} or set "
                    "train.clip; earlier restart points are kept"
                )
        if values[0] > 0:
            self.stop.request("another process received a stop request")
        return values[0] > 0

    def _write_row(self, name: str, lr: float, extra: dict[str, float]) -> float:
        loss = sum(self.position.pending) / len(self.position.pending)
        self.position.pending = []
        if self.metrics:
            seconds = round(time.monotonic() - self.started, 3)
            row = {"phase": name, "loss": loss, "lr": lr, "seconds": seconds, **extra}
            self.metrics.write({"step": self.position.step, **row})
        return loss

    # Judging

    def _validate(self) -> dict[str, float]:
        """Compute training loss, validation loss and scores of the averaged weights."""
        settings, processes = self.settings, self.processes
        averaged = self.engine.whole(self.average.tensors)
        self.shadow.load_state_dict({**self.shadow.state_dict(), **averaged})
        size = max(1, settings.batch // (processes.size * settings.accumulate))
        row = {}
        for part, samples in (("train", self.part), ("valid", self.valid)):
            numbers = self.fixed[part]
            row[f"{part}_loss"] = validate.mean_loss(
                self.shadow_loss, samples, numbers, size, self.seed + 1, processes
            )
            if self.scored:
                few = samples.some(min(validate.SCORED, len(numbers)))
                scores = validate.scores(self.shadow, samples, few, self.seed + 1, processes)
                row.update({f"{part}_{key}": value for key, value in scores.items()})
        self._judge(row["valid_loss"], averaged)
        return row

    def _judge(self, loss: float, averaged: dict[str, Tensor]) -> None:
        position = self.position
        if position.first is None:
            position.first = loss
        if position.best is None or loss < position.best:
            position.best, position.strikes = loss, 0
            if self.keeps_best:
                self.best = {key: value.cpu().clone() for key, value in averaged.items()}
        else:
            position.strikes += 1

    def _out_of_patience(self) -> bool:
        patience = self.settings.patience
        if not patience or self.position.strikes < patience:
            return False
        if self.processes.first:
            self.logger.info(
                f"early stop at step {self.position.step}: no better held-out loss than "
                f"{self.position.best:.6g} in {patience} validations"
            )
        return True

    def _end(self, phase: Phase) -> None:
        """Set the model's averaged (or best) weights and mark the phase as done."""
        position = self.position
        if position.phase_step:
            averaged = self.best or self.engine.whole(self.average.tensors)
            self.shadow.load_state_dict({**self.shadow.state_dict(), **averaged})
            self.engine.close()
            self.model, self.best = self.shadow.train(), {}
        if self.through and position.phase_step and self.processes.first:
            self.logger.info(
                f"{phase.name}: coupled score of validation trajectories {position.first:.4g} "
                f"before, {position.best:.4g} after; {describe(self.model.parts())}"
            )
        self.part.close()
        self.valid.close()
        position.phase += 1
        position.phase_step, position.strikes = 0, 0
        position.first = position.best = None
        statistics = self.model.saved_statistics()
        self._publish({"weights": self.model.state_dict(), "statistics": statistics})

    def close(self) -> None:
        if self.metrics:
            self.metrics.close()
        self.data.train.close()
        self.data.valid.close()


class Average:
    """Exponential average of this process's weights, in float32.

    a <- a + (1 - d) (w - a) with d = min(decay, (1 + t) / (10 + t)), so that the start is
    forgotten.

    Args:
        weights: weights by name.
        decay: largest d; 0 makes the average the latest weights.
    """

    def __init__(self, weights: dict[str, Tensor], decay: float):
        self.decay = decay
        self.tensors = {key: value.detach().float().clone() for key, value in weights.items()}

    @torch.no_grad()
    def update(self, weights: dict[str, Tensor], step: int) -> None:
        """Add the weights after ``step`` steps of the phase (1, 2, ...)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.tensors.values()), [weights[key] for key in self.tensors], 1 - decay
        )


def _known(value: Any, stored: Any) -> Any:
    """Return a setting without the keys that its stored form, of an older version, lacks."""
    if isinstance(value, dict) and isinstance(stored, dict):
        return {key: part for key, part in value.items() if key in stored}
    return value


def choose_engine(settings: Train) -> str:
    """Return the name of the engine. Raises ValueError if DeepSpeed is required and missing."""
    if settings.engine == "torch":
        return "torch"
    if deepspeed.installed():
        return "deepspeed"
    if settings.engine == "deepspeed" or settings.zero_stage or settings.deepspeed:
        raise ValueError(
            f"train.engine={settings.engine}, train.zero_stage={settings.zero_stage}: DeepSpeed "
            "is not installed; pip install deepspeed, or set train.engine=torch train.zero_stage=0"
        )
    return "torch"


def start_engine(model: ClosureModel, settings: Train, processes: Processes) -> Engine:
    """Create the engine for ``model``, which is on its device and equal on every rank."""
    if choose_engine(settings) == "torch":
        return TorchEngine(model, settings, processes)
    return deepspeed.DeepSpeedEngine(model, settings, processes)


def learning_rate(settings: Train, step: int, steps: int) -> float:
    """Compute the learning rate of step ``step`` of a phase of ``steps`` steps.

    "cosine" decreases to zero after a linear rise. "published" is halved after every fifth of the
    steps (Dong, Chen, Wu 2025: every 200 of 1000 epochs).
    """
    if settings.schedule == "constant":
        return settings.lr
    if settings.schedule == "published":
        return settings.lr * 0.5 ** (5 * step // steps)
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return settings.lr * (step + 1) / warm
    falling = (step - warm) / max(1, steps - warm)
    return 0.5 * settings.lr * (1 + math.cos(math.pi * falling))


def _settings_of(phase: Phase, settings: Train) -> Train:
    """Return the settings of a phase.

    A phase through the solver has its own batch and learning rate, and is validated and saved
    often.
    """
    through = phase.through
    if through is None:
        return settings
    often = max(JUDGED_AFTER, through.steps // JUDGED_TIMES)
    changes: dict[str, Any] = {
        "batch": through.batch,
        "lr": through.lr,
        "validate_every": min(often, settings.validate_every),
        "checkpoint_every": min(often, settings.checkpoint_every),
    }
    return settings.model_copy(update=changes)


def _steps_of(phases: Sequence[Phase], steps: int) -> list[tuple[Phase, int]]:
    """Compute the steps of each phase; the shares need not sum to one."""
    total = sum(phase.share for phase in phases)
    bounds, done = [0], 0.0
    for phase in phases:
        done += phase.share
        bounds.append(round(steps * done / total) if total else 0)
    return [
        (phase, phase.through.steps if phase.through else bounds[i + 1] - bounds[i])
        for i, phase in enumerate(phases)
    ]
