"""Restart points of a training: RUN/train/checkpoints/step_0002000/.

::

    weights.safetensors     full weights and buffers of the model, float32
    statistics.safetensors  closed-form statistics of the model, float64
    average.safetensors     exponential average of the weights
    best.safetensors        averaged weights of the best validation, if they are used
    optimizer.safetensors   full moments of Adam, by weight name
    progress.json           phase, step, history of the validation, settings
    complete.json           sha256 of the other files; written last

All tensors are full and named, so training can continue with another number of processes, ZeRO
stage or engine. Nothing is pickled. No state of a generator is needed, because batches and noise
are functions of (seed, step). A folder without a matching ``complete.json`` is skipped with a
warning. The newest two restart points remain.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from hpc_closure.work import atomic, log

MOST = 2
TENSORS = ("weights", "statistics", "average", "best", "optimizer")
LAYOUT = 1


@dataclass
class Position:
    """Progress of a training.

    Attributes:
        step: optimiser steps done, over all phases.
        phase, phase_step: number of the current phase and steps done in it.
        pending: losses since the last row of the metrics.
        first, best: first and lowest validation loss of the phase.
        strikes: validations since the lowest loss.
        seconds: computing time so far.
        settings: settings that must not change between stop and resume, for the error message.
    """

    step: int = 0
    phase: int = 0
    phase_step: int = 0
    pending: list[float] = field(default_factory=list)
    first: float | None = None
    best: float | None = None
    strikes: int = 0
    seconds: float = 0.0
    done: bool = False
    settings: dict = field(default_factory=dict)


@dataclass
class Checkpoint:
    """Contents of a restart point: the position, and tensors by file name and key."""

    position: Position
    tensors: dict[str, dict[str, Tensor]]


def name_of(step: int) -> str:
    """Return the name of the restart point of a step."""
    return f"step_{step:07d}"


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Publish a restart point and remove all but the newest two. Call on one process."""
    target = folder / name_of(checkpoint.position.step)
    with atomic.publish(target) as part:
        part.mkdir(parents=True)
        for name, tensors in checkpoint.tensors.items():
            if tensors:
                plain = {key: _plain(value) for key, value in tensors.items()}
                (part / f"{name}.safetensors").write_bytes(serialize(plain))
        text = json.dumps({"layout": LAYOUT, **vars(checkpoint.position)}, indent=1)
        (part / "progress.json").write_text(text, encoding="utf-8")
        sums = {path.name: _sha256(path) for path in sorted(part.iterdir())}
        (part / "complete.json").write_text(json.dumps(sums, indent=1), encoding="utf-8")
    for old in _found(folder)[MOST:]:
        atomic.remove(old)


def _plain(value: Tensor) -> Tensor:
    """Return a contiguous CPU copy, because safetensors refuses views of shared memory."""
    return value.detach().to("cpu", copy=True).contiguous()


def _found(folder: Path) -> list[Path]:
    """List the restart points, newest first."""
    return sorted(
        (path for path in folder.glob("step_*") if path.name[5:].isdigit()), reverse=True
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def newest(folder: Path) -> Path | None:
    """Find the newest complete restart point; damaged ones are logged and set aside."""
    for path in _found(folder):
        reason = damage(path)
        if reason is None:
            return path
        aside = atomic.set_aside(path)
        log.get().warning(f"restart point {path.name} is skipped: {reason} (kept as {aside.name})")
    return None


def damage(path: Path) -> str | None:
    """Describe why a restart point cannot be used; returns None if it can."""
    try:
        sums = json.loads((path / "complete.json").read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if _sha256(path / name) != expected:
                return f"{name} is damaged (its sha256 is not the one recorded)"
        if not {"weights.safetensors", "progress.json"} <= set(sums):
            return "weights or progress are not in it"
        layout = json.loads((path / "progress.json").read_text(encoding="utf-8")).get("layout")
        if layout != LAYOUT:
            return f"layout {layout}, expected {LAYOUT}"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"cannot be read ({error})"
    return None


def load(path: Path) -> Checkpoint:
    """Read a restart point. Raises ValueError if it is damaged."""
    try:
        values = json.loads((path / "progress.json").read_text(encoding="utf-8"))
        values.pop("layout")
        tensors = {
            name: load_file(str(path / f"{name}.safetensors"))
            for name in TENSORS
            if (path / f"{name}.safetensors").exists()
        }
        return Checkpoint(Position(**values), tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"{path}: damaged restart point ({error}); delete it and run again"
        ) from None


def same_weights(
    first_weights: dict[str, Tensor], second_weights: dict[str, Tensor]
) -> str | None:
    """Describe the first difference in names and shapes of two sets of weights; None if equal."""
    shapes = [
        {key: tuple(value.shape) for key, value in weights.items()}
        for weights in (first_weights, second_weights)
    ]
    for key in [*shapes[0], *shapes[1]]:
        if shapes[0].get(key) != shapes[1].get(key):
            return f"{key}: {shapes[0].get(key)} in the file, {shapes[1].get(key)} in the model"
    return None
