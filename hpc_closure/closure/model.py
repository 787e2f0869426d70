"""What every closure model offers to training, rollout and the artifact.

Training runs the ``phases`` in order::

    for phase in model.phases:
        model.begin(phase.name, reader(phase.members))   # closed-form statistics
        optimise(model.loss, phase.parameters(model), share=phase.share)

``reader(kind)`` iterates over batches ``(state, target)`` or dicts with ``state``, ``target``,
``history`` and ``previous``, of the snapshots of the members of that kind, always in one order:

* ``fit``: the part of the training members that fits the mean;
* ``hold``: the rest of the training members, from which the residual's law is learned;
* ``valid``: the validation members, on which the generator must earn its place.

Of several processes each reads its share of them, whole trajectories, and the statistics are those
of all (:mod:`hpc_closure.closure.reductions`).

A trained model answers a :class:`Request`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from hpc_closure.closure.fields.sensors import Sensors
from hpc_closure.closure.part_report import PartReport
from hpc_closure.closure.reductions import Batches, Reader
from hpc_closure.experiment.kinds import ModelKind

__all__ = ["ClosureModel", "Phase", "Replays", "Request", "Through"]


@dataclass(frozen=True)
class Through:
    """How a phase trains through the solver, with settings of its own.

    Attributes:
        steps: optimiser steps.
        batch: starts in a step over all processes.
        lr: peak learning rate.
        calls: closure calls of a run, in the first step and from the middle of the phase on.
    """

    steps: int
    batch: int
    lr: float
    calls: tuple[int, int]

    def calls_at(self, step: int) -> int:
        """Closure calls of a run in a step."""
        first, last = self.calls
        return min(last, first + (last - first + 1) * 2 * step // self.steps)


@dataclass(frozen=True)
class Phase:
    """Fit a part of a model: closed forms from its members' snapshots, then weights by a loss.

    Attributes:
        name: in logs, metrics and restart points; phases of one name are the same, run again.
        share: share of all optimiser steps; 0 = closed-form work only.
        members: whose snapshots it reads: ``fit``, ``hold``, ``valid`` or ``train``.
        sampled: the model can be sampled from its beginning on.
        through: of a phase that trains through the solver, on samples with what follows them.
        best: its weights are those with the least loss on validation members, not the last ones.
    """

    name: str
    share: float
    members: str
    sampled: bool = True
    through: Through | None = None
    best: bool = False

    def begin(self, model: Any, reader: Reader) -> dict[str, Any]:
        """Compute closed-form statistics; returns what the log says of them, by name.

        Called without gradients, by all processes, each with a reader of its own share.
        """
        return {}

    def loss(self, model: Any, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        """Compute the loss (B,) of a batch, as :meth:`ClosureModel.loss_per_sample`."""
        raise ValueError(f"phase {self.name!r} has no loss")

    def parameters(self, model: Any) -> list[nn.Parameter]:
        """List the weights that the phase trains; the others are frozen."""
        return list(model.parameters())


class Replays(Protocol):
    """Record functions of tensors and replay them (:mod:`hpc_closure.closure.cuda.replays`)."""

    def __call__(
        self, function: Callable[..., tuple[Tensor, ...]], key: Hashable, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Return ``function(*inputs)``; ``key`` says all that it depends on besides."""

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return ``make()`` of the first call with this name."""


@dataclass(frozen=True)
class Request:
    """A draw of the closure: for whom, given what, and which.

    Attributes:
        state: one for all members, one for each, or each for as many in a row: fields (B, n, n)
            for ``sample_batch``, retained spectra (B, 2K + 1, K + 1) for ``sample_hat``.
        members: ids, B times as many. A member's draw depends on (seed, member, call) only.
        seed, call: a fresh draw for each call; the same for the same numbers.
        sensors: point values of the true closure, or None.
        history: earlier states (B, H, ...) in the form of ``state``, newest first.
        previous: the last closures (B, P, ...) in the form of ``state``, newest first.
        held: how long the draw is held, in trained intervals.
        evaluations, method: of the sampler; None = the model's own.
        grid: points per side of the caller's grid where ``state`` is a spectrum; None = the
            fewest that retain its modes.
        stage: of the draws; those of another stage are others.
        tell: called with (members, shells) bool: which shells of each draw were brought back,
            where the model looks at them (:attr:`ClosureModel.guarded`); None = nobody is told.
    """

    state: Tensor
    members: Sequence[int]
    seed: int = 0
    call: int = 0
    sensors: Sensors | None = None
    history: Tensor | None = None
    previous: Tensor | None = None
    held: float = 1.0
    evaluations: int | None = None
    method: str | None = None
    grid: int | None = None
    stage: str = "sample"
    tell: Callable[[Tensor], None] | None = None


class ClosureModel(nn.Module, ModelKind, ABC):
    """Base class: p(U | state, sensors, history, previous closures).

    Parameters and closed-form statistics together are the whole model. Statistics are no buffers,
    so that no engine casts them. An experiment may name a class outside the package by its path,
    ``model.preset: package.module:Class``; keys of its own, declared in ``Options``, stand in
    ``model.options`` and are passed as ``config["options"]``.
    """

    phases: Sequence[Phase] = ()
    #: a draw that is held for another interval than the trained one is rescaled
    rescaled: ClassVar[bool] = True

    @classmethod
    def build(cls, config, grid, length):
        return cls(config, grid, length)

    def __init__(self, config: dict[str, Any], grid: int, length: float):
        super().__init__()
        self.config, self.grid, self.length = dict(config), int(grid), float(length)
        self.phase: Phase | None = None  # the one that trains now
        # a closed form has no weights that tell where it computes
        self.register_buffer("_place", torch.zeros(()), persistent=False)
        self._place: Tensor
        self._brought_back = torch.zeros((), dtype=torch.int64)  # where it is counted
        #: set where weights do not change any more: draws on a GPU are then replayed
        self.replayed: Replays | None = None

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._place.device

    @property
    def brought_back(self) -> int:
        """Draws so far that were made smaller, to stay within the training's range."""
        return int(self._brought_back)

    @property
    def guarded(self) -> int:
        """Shells of a draw that are looked at, and may be brought back; 0 = none ever is."""
        return 0

    @property
    def expected_back(self) -> Tensor | None:
        """(1 + shells,) share of the training's closures that would be brought back.

        In any shell, and in each; None where that is not known.
        """
        return None

    @abstractmethod
    def parts(self) -> list[PartReport]:
        """Its parts, in a row."""

    def compact(self) -> "ClosureModel":
        """The model without the weights that no sample evaluates; itself where all act."""
        return self

    # training

    def phase_named(self, name: str) -> Phase:
        """Find a phase. Raises ValueError where the model has none of that name."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        names = ", ".join(dict.fromkeys(phase.name for phase in self.phases)) or "none"
        raise ValueError(f"phase {name!r}, expected one of {names}")

    def begin(self, name: str, reader: Batches) -> dict[str, Any]:
        """Start a phase: closed-form statistics, then its weights; returns lines for the log.

        Called by all processes of a training, each with a reader of its own share.
        """
        self.phase = phase = self.phase_named(name)
        with torch.no_grad():
            report = phase.begin(self, Reader.of(reader))
        self.resume(name)
        return report

    def resume(self, name: str) -> None:
        """Make a phase the present one, whose weights alone have gradients."""
        self.phase = phase = self.phase_named(name)
        trained = {id(weight) for weight in phase.parameters(self)}
        for weight in self.parameters():
            weight.requires_grad_(id(weight) in trained)

    def loss_per_sample(self, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        """Compute the loss (B,) of the present phase.

        Args:
            batch: ``state``, ``target`` (B, n, n), ``sample_index`` (B,) global indices of the
                samples, ``history`` (B, H, n, n) and ``previous`` (B, P, n, n) when the model
                reads them, ``ahead`` (B, L, n, n) in a phase through the solver.
            seed: seed of the training's draws, keyed by (seed, step, sample index).
            step: optimiser step.
        """
        if self.phase is None:
            raise ValueError("no phase has begun: call begin(name, reader) first")
        return self.phase.loss(self, batch, seed, step)

    def loss(self, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        """Compute the mean loss of the batch, as :meth:`loss_per_sample`.

        Equal parts of a global batch average to the global loss.
        """
        return self.loss_per_sample(batch, seed, step).mean()

    def forward(self, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        """Compute the loss: engines call the module."""
        return self.loss(batch, seed, step)

    def weight_decay(self, name: str) -> float:
        """Decoupled weight decay of a named weight, beyond that of the experiment."""
        return 0.0

    def num_parameters(self) -> int:
        """Count real parameters. Raises ValueError if one is complex: DeepSpeed loses those."""
        for name, weight in self.named_parameters():
            if weight.is_complex():
                raise ValueError(f"parameter {name} is complex; store it as real (..., 2)")
        return sum(weight.numel() for weight in self.parameters())

    # sampling

    @property
    def score_active(self) -> bool:
        """Whether the generator is evaluated at all."""
        return True

    @abstractmethod
    def sample_batch(self, request: Request) -> Tensor:
        """Draw U (members, n, n) given fields.

        Raises:
            ValueError: grid, history or sensors are not those of the training.
        """

    @abstractmethod
    def sample_hat(self, request: Request) -> Tensor:
        """Draw U (members, 2K + 1, K + 1) given retained spectra; otherwise the same."""

    # what a file holds beside the parameters

    def saved_statistics(self, spacing: float | None = None) -> dict[str, Tensor]:
        """The closed-form results as float64 CPU tensors.

        Args:
            spacing: trained intervals from one snapshot of the training to the next, for a file;
                None = as the model knows it.
        """
        return {}

    def load_statistics(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`saved_statistics` gave."""
