"""What every closure model offers to training, rollout and the artifact.

Training runs the ``phases`` in order::

    for phase in model.phases:
        model.begin(phase.name, reader(phase.members))   # closed-form statistics, trainable parts
        optimise(model.parameters_of(phase.name), share=phase.share)

``reader(kind)`` iterates over batches ``(state, target)`` or dicts with ``state``, ``target`` and
``history``, of all snapshots of the members of that kind, always in the same order:

* ``fit``: the part of the training members that fits the mean;
* ``hold``: the rest of the training members, from which the residual's law is learned;
* ``valid``: the validation members, on which the generator must earn its place.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from hpc_closure.closure.network import num_parameters
from hpc_closure.closure.sensors import Sensors

__all__ = ["ClosureModel", "Phase", "build", "PRESETS"]


@dataclass(frozen=True)
class Phase:
    """A part of the training.

    Args:
        name: passed to ``begin`` and ``parameters_of``.
        share: share of all optimizer steps; 0 = closed-form work only.
        members: whose snapshots it reads: ``fit``, ``hold`` or ``valid``.
    """

    name: str
    share: float
    members: str


class ClosureModel(nn.Module, ABC):
    """Base class: p(U | state, sensors, history).

    ``statistics`` holds every closed-form result as float64 CPU tensors; with the parameters it is
    the whole model. It is no buffer, so that no engine casts it.
    """

    phases: Sequence[Phase]

    def __init__(self, config: dict[str, Any], grid: int, length: float):
        super().__init__()
        self.config, self.grid, self.length = dict(config), int(grid), float(length)
        self.statistics: dict[str, Tensor] = {}
        self.phase = ""

    @abstractmethod
    def begin(self, phase: str, reader: Callable[[], Iterable] | Iterable) -> dict[str, Any]:
        """Start a phase: closed-form statistics from its members; returns what was found."""

    @abstractmethod
    def loss_per_sample(self, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        """Loss (B,) of the current phase.

        Args:
            batch: ``state``, ``target`` (B, n, n), ``sample_index`` (B,) global indices of the
                samples, ``history`` (B, H, n, n) when the model has one.
            seed: seed of the training's draws, keyed by (seed, step, sample index).
            step: optimizer step.
        """

    def loss(self, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        """Mean loss of the batch; equal parts of a global batch average to the global loss."""
        return self.loss_per_sample(batch, seed, step).mean()

    def forward(self, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        """The loss: engines call the module."""
        return self.loss(batch, seed, step)

    def parameters_of(self, phase: str) -> list[nn.Parameter]:
        """Parameters that the phase trains; the others are frozen."""
        return list(self.parameters())

    @abstractmethod
    def sample_batch(
        self,
        state: Tensor,
        *,
        members: Sequence[int],
        seed: int,
        call: int = 0,
        sensors: Sensors | None = None,
        history: Tensor | None = None,
        interval: float | None = None,
        evaluations: int | None = None,
        method: str | None = None,
    ) -> Tensor:
        """Draw U (members, n, n) given states (1 or members, n, n)."""

    def load_statistics(self, statistics: dict[str, Tensor]) -> None:
        """Take over saved statistics."""
        self.statistics = {key: value.double().cpu() for key, value in statistics.items()}

    def num_parameters(self) -> int:
        """Real parameters; raises ValueError if one is complex."""
        return num_parameters(self)


def unpack(batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """(state, target, history or None) of a reader's batch."""
    if isinstance(batch, dict):
        parts = [batch["state"], batch["target"], batch.get("history")]
    else:
        parts = [batch[0], batch[1], None]
    history = None if parts[2] is None else torch.as_tensor(parts[2])
    return torch.as_tensor(parts[0]), torch.as_tensor(parts[1]), history


def iterate(reader: Callable[[], Iterable] | Iterable) -> Iterable:
    """A reader is a callable that starts over, or an iterable that can be iterated again."""
    return reader() if callable(reader) else iter(reader)


DEFAULT: dict[str, Any] = {
    "preset": "default",
    "conditions": {"sensors": "optional", "history": 0, "physics": False},
    "library": "quadratic",
    "generator": "score",
    "width": 24,
    "modes": 8,
    "layers": 3,
    "mean_layers": 3,
    "amplitude": True,
    "base_noise": "matched",
    "schedule": "trigonometric",
    "method": "euler",
    "evaluations": 4,
    "shares": [0.4, 0.6],
    "form": "auto",
}

PAPER: dict[str, Any] = {
    "preset": "paper",
    "conditions": {"sensors": "required", "history": 0, "physics": False},
    "width": 20,
    "modes": 8,
    "layers": 4,
    "upscaling": "interp",
    "target_factor": 1.0,
    "method": "euler_maruyama",
    "evaluations": 10,
    "form": "fft",
}

ONE_PASS: dict[str, Any] = {**DEFAULT, "preset": "one_pass", "generator": "crps", "evaluations": 1}
PRESETS = {"default": DEFAULT, "one_pass": ONE_PASS, "paper": PAPER}


def resolve(model: dict[str, Any]) -> dict[str, Any]:
    """A preset with the differences of ``model``; None means the preset's value.

    Raises:
        ValueError: unknown preset or key.
    """
    name = model.get("preset", "default")
    if name not in PRESETS:
        raise ValueError(f"model.preset={name!r}, expected one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    given = {key: value for key, value in model.items() if value is not None}
    unknown = sorted(set(given) - set(preset))
    if unknown:
        raise ValueError(
            f"model.{unknown[0]}: unknown key for preset {name}; valid: {', '.join(preset)}"
        )
    conditions = {**preset["conditions"], **(given.pop("conditions", None) or {})}
    return {**preset, **given, "conditions": conditions}


def build(model: dict[str, Any], grid: int, length: float = 1.0) -> ClosureModel:
    """A fresh model.

    Args:
        model: the experiment's ``model`` section; keys left out or None come from the preset.
        grid: points per side of the training fields; sets the band, |k| <= (grid - 1) // 3.
        length: side of the periodic square.
    """
    config = resolve(model)
    if config["preset"] == "paper":
        from hpc_closure.closure.published import PaperModel

        out: ClosureModel = PaperModel(config, grid, length)
    else:
        from hpc_closure.closure.default import DefaultModel

        out = DefaultModel(config, grid, length)
    out.num_parameters()
    return out
