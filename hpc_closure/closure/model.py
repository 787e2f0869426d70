"""What every closure model offers to training, rollout and the artifact.

Training runs the ``phases`` in order::

    for phase in model.phases:
        model.begin(phase.name, reader(phase.members))   # closed-form statistics, trainable parts
        optimise(model.parameters_of(phase.name), share=phase.share)

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpc_closure.closure.fields.sensors import Sensors
from hpc_closure.closure.networks.blocks import num_parameters
from hpc_closure.closure.part_report import PartReport
from hpc_closure.closure.reductions import Batches

__all__ = ["ClosureModel", "Phase", "Request"]


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
    """A part of the training.

    Args:
        name: passed to ``begin`` and ``parameters_of``.
        share: share of all optimizer steps; 0 = closed-form work only.
        members: whose snapshots it reads: ``fit``, ``hold`` or ``valid``.
        sampled: the model can be sampled from its beginning on.
        best: its weights are those with the least loss on validation members, not the last ones.
        through: of a phase that trains through the solver, on samples with what follows them.
    """

    name: str
    share: float
    members: str
    sampled: bool = True
    through: Through | None = None
    best: bool = False


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


class ClosureModel(nn.Module, ABC):
    """Base class: p(U | state, sensors, history, previous closures).

    Parameters and closed-form statistics together are the whole model. Statistics are no buffers,
    so that no engine casts them.
    """

    phases: Sequence[Phase]

    def __init__(self, config: dict[str, Any], grid: int, length: float):
        super().__init__()
        self.config, self.grid, self.length = dict(config), int(grid), float(length)
        self.phase = ""
        # a closed form has no weights that tell where it computes
        self.register_buffer("_place", torch.zeros(()), persistent=False)
        self._place: Tensor
        self._brought_back = torch.zeros((), dtype=torch.int64)  # where it is counted
        #: replays draws on a GPU where weights do not change any more; None = never
        self.replayed: Any = None

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

    @abstractmethod
    def begin(self, phase: str, reader: Batches) -> dict[str, Any]:
        """Start a phase: closed-form statistics from its members; returns what came of them.

        Called by all processes of a training, each with a reader of its own share.
        """

    @abstractmethod
    def loss_per_sample(self, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        """Loss (B,) of the current phase.

        Args:
            batch: ``state``, ``target`` (B, n, n), ``sample_index`` (B,) global indices of the
                samples, ``history`` (B, H, n, n) and ``previous`` (B, P, n, n) when the model
                reads them, ``ahead`` (B, L, n, n) in a phase through the solver.
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

    def weight_decay(self, name: str) -> float:
        """Decoupled weight decay of a named weight, beyond that of the experiment."""
        return 0.0

    def num_parameters(self) -> int:
        """Real parameters; raises ValueError if one is complex."""
        return num_parameters(self)

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
