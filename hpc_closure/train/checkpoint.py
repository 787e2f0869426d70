"""Restart points of a training: RUN/train/checkpoints/step_0002000/.

::

    weights.safetensors     weights and buffers of the model, whole, float32
    statistics.safetensors  the model's closed-form parts, float64
    average.safetensors     their exponential average
    best.safetensors        averaged weights of the best validation, where it decides
    optimizer.safetensors   Adam's moments by weight name, whole
    progress.json           phase, step, history of the validation, settings
    complete.json           sha256 of the others; written last

Everything is whole and named, so another number of processes, ZeRO stage or engine can go on from
it, and nothing is pickled. No generator state: batches and noise are functions of (seed, step).
A folder without a right ``complete.json`` is skipped with one line. Two are kept.
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

KEPT = 2
TENSORS = ("weights", "statistics", "average", "best", "optimizer")
LAYOUT = 1


@dataclass
class Position:
    """Where a training stands.

    Attributes:
        step: optimiser steps done, over all phases.
        phase, phase_step: number of the phase and steps done in it.
        pending: losses since the last row of the metrics.
        first, best: first and lowest validation loss of the phase.
        strikes: validations since the lowest.
        seconds: of computing so far.
        settings: what must not change between stop and resume, for the message when it has.
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
    position: Position
    tensors: dict[str, dict[str, Tensor]]


def name_of(step: int) -> str:
    return f"step_{step:07d}"


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Publish a restart point and drop all but the newest two. Call on one process."""
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
    for old in _found(folder)[KEPT:]:
        atomic.remove(old)


def _plain(value: Tensor) -> Tensor:
    """An own, contiguous CPU copy: safetensors refuses views of shared memory."""
    return value.detach().to("cpu", copy=True).contiguous()


def _found(folder: Path) -> list[Path]:
    """Restart points, newest first."""
    return sorted(
        (path for path in folder.glob("step_*") if path.name[5:].isdigit()), reverse=True
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def newest(folder: Path) -> Path | None:
    """The newest restart point that is whole; damaged ones are named and set aside."""
    for path in _found(folder):
        reason = damage(path)
        if reason is None:
            return path
        aside = atomic.set_aside(path)
        log.get().warning(f"restart point {path.name} is skipped: {reason} (kept as {aside.name})")
    return None


def damage(path: Path) -> str | None:
    """Why a restart point cannot be used; None when it can."""
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
    """Read a restart point. Raises ValueError when it is damaged."""
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
        raise ValueError(f"{path}: damaged restart point ({error}); delete it and go on") from None


def same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> str | None:
    """What differs between the names and shapes of two sets of weights; None when nothing."""
    shapes = [
        {key: tuple(value.shape) for key, value in weights.items()} for weights in (one, other)
    ]
    for key in [*shapes[0], *shapes[1]]:
        if shapes[0].get(key) != shapes[1].get(key):
            return f"{key}: {shapes[0].get(key)} in the file, {shapes[1].get(key)} in the model"
    return None
