"""Base class of closure models, and its interface to training, rollout and model files.

Training runs the ``phases`` in order::

    for phase in model.phases:
        model.begin(phase.name, reader(phase.members))   # closed-form statistics
        optimise(model.loss, phase.parameters(model), share=phase.share)

``reader(kind)`` iterates over the snapshots of the members of a kind, always in the same order.
Its batches are pairs ``(state, target)`` or dicts with ``state``, ``target``, ``history`` and
``previous``. The kinds are:

* ``fit``: the part of the training members on which the mean is fitted;
* ``hold``: the other training members, on which the residual's law is fitted;
* ``valid``: the validation members, on which the generator is judged.

Several processes each read a share of them, in whole trajectories; the statistics are those of all
(:mod:`hpc_closure.closure.reductions`).

A trained model draws closures for a :class:`Request`.
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
from hpc_closure.spectral.modes.resolution import alike

__all__ = ["ClosedFormPhase", "ClosureModel", "Phase", "Replays", "Request", "RolloutTraining"]


@dataclass(frozen=True)
class RolloutTraining:
    """Settings of a phase that trains through the solver.

    Attributes:
        steps: optimiser steps.
        batch: starts per step, over all processes.
        lr: peak learning rate.
        calls: closure calls of a run, in the first step and from the middle of the phase on.
    """

    steps: int
    batch: int
    lr: float
    calls: tuple[int, int]

    def calls_at(self, step: int) -> int:
        """Return the number of closure calls of a run in a step."""
        first, last = self.calls
        return min(last, first + (last - first + 1) * 2 * step // self.steps)


@dataclass(frozen=True)
class Phase:
    """Fit a part of a model: closed-form statistics from snapshots, then weights by a loss.

    Attributes:
        name: name in logs, metrics and restart points. Phases of equal name are the same phase,
            run again.
        share: share of all optimiser steps; 0 = closed-form statistics only.
        members: kind of members whose snapshots it reads: ``fit``, ``hold``, ``valid`` or
            ``train``.
        sampled: whether the model can be sampled from the beginning of the phase on.
        through: settings of training through the solver, on samples with the states that follow
            them; None = the phase trains one call ahead.
        best: whether the weights with the least validation loss are used, instead of the last.
    """

    name: str
    share: float
    members: str
    sampled: bool = True
    through: RolloutTraining | None = None
    best: bool = False

    def begin(self, model: Any, reader: Reader) -> dict[str, Any]:
        """Compute closed-form statistics; returns results for the log, by name.

        Called without gradients, by all processes, each with a reader of its own share.
        """
        return {}

    def loss(self, model: Any, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        """Compute the loss (B,) of a batch, as :meth:`ClosureModel.loss_per_sample`."""
        raise ValueError(f"phase {self.name!r} has no loss")

    def parameters(self, model: Any) -> list[nn.Parameter]:
        """List the weights that the phase trains; all others are frozen."""
        return list(model.parameters())


class ClosedFormPhase(Phase):
    """Compute closed-form statistics; train no weights."""

    def parameters(self, model: Any) -> list[nn.Parameter]:
        """Return an empty list: no weight is trained."""
        return []


class Replays(Protocol):
    """Record functions of tensors and replay them (:mod:`hpc_closure.closure.cuda.replays`)."""

    def __call__(
        self, function: Callable[..., tuple[Tensor, ...]], key: Hashable, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Return ``function(*inputs)``; ``key`` holds all else that the result depends on."""

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the result of ``make()`` at the first call with this name."""


@dataclass(frozen=True)
class Request:
    """States, members and key of a draw of the closure.

    Attributes:
        state: fields (B, n, n) for ``sample_batch``, retained spectra (B, 2K + 1, K + 1) for
            ``sample_hat``; of C fields (B, C, ...), here and below. For M members, B is 1 (shared
            by all members), M (one per member), or a divisor of M: state b is used for members
            b M/B to (b + 1) M/B - 1.
        members: M ids. A member's draw depends on (seed, member, call) only.
        seed, call: key of the draws; equal keys give equal draws.
        sensors: point values of the true closure, or None.
        history: earlier states (B, H, ...) in the form of ``state``, newest first.
        previous: previous closures (B, P, ...) in the form of ``state``, newest first.
        interval_ratio: averaging time of the draw, in trained intervals.
        evaluations, method: settings of the sampler; None = the model's.
        grid: points per side of the caller's grid, a tuple if sides have different numbers, if
            ``state`` is a spectrum; None = the smallest that retains its modes.
        stage: part of the key: draws of different stages are independent.
        on_rescaled: called with (members, shells) bool, the shells of each draw that were
            rescaled, if the model checks them (:attr:`ClosureModel.guarded`); None = no call.
    """

    state: Tensor
    members: Sequence[int]
    seed: int = 0
    call: int = 0
    sensors: Sensors | None = None
    history: Tensor | None = None
    previous: Tensor | None = None
    interval_ratio: float = 1.0
    evaluations: int | None = None
    method: str | None = None
    grid: Any = None
    stage: str = "sample"
    on_rescaled: Callable[[Tensor], None] | None = None


class ClosureModel(nn.Module, ModelKind, ABC):
    """Base class of models of p(U | state, sensors, history, previous closures).

    Parameters and closed-form statistics together define the model. Statistics are not buffers, so
    that no engine casts them to another precision. An experiment may name a class outside the
    package by its path, ``model.preset: package.module:Class``. Keys that its ``Options`` declare
    are read from ``model.options`` and passed as ``config["options"]``.
    """

    phases: Sequence[Phase] = ()
    #: whether a draw is rescaled if held for another interval than the trained one
    rescaled: ClassVar[bool] = True

    @classmethod
    def build(cls, config, grid, length):
        return cls(config, grid, length)

    def __init__(self, config: dict[str, Any], grid: Any, length: Any):
        super().__init__()
        #: points per side of the trained grid and length of each side; tuples if sides differ
        self.config, self.grid, self.length = dict(config), alike(grid), alike(length)
        self.phase: Phase | None = None  # the current phase
        # shows the device also of a model without weights
        self.register_buffer("_place", torch.zeros(()), persistent=False)
        self._place: Tensor
        self._num_rescaled = torch.zeros((), dtype=torch.int64)  # on the device of the draws
        #: replays draws on a GPU; set only if the weights no longer change
        self.replayed: Replays | None = None

    @property
    def device(self) -> torch.device:
        """Device on which the model computes."""
        return self._place.device

    @property
    def num_rescaled(self) -> int:
        """Number of draws so far that were rescaled into the range of the training closures."""
        return int(self._num_rescaled)

    @property
    def guarded(self) -> int:
        """Number of shells of a draw that are checked and may be rescaled; 0 = none."""
        return 0

    @property
    def expected_rescaled(self) -> Tensor | None:
        """Shares (1 + shells,) of the training closures that would be rescaled; None if unknown.

        The first is the share with any such shell, then follow those of each shell.
        """
        return None

    @property
    def has_range(self) -> bool:
        """Whether the model knows the range of its training states (:meth:`beyond_training`)."""
        return False

    def beyond_training(self, state_hat: Tensor) -> Tensor | None:
        """Mark shells (B, shells) in which states are outside the range of the training.

        The range of a shell reaches from the least to the largest power of a training state.

        Args:
            state_hat: (B, ...) retained spectra of any number of modes.

        Returns:
            bool, or None if the model does not know the range, as that of an older file.
        """
        return None

    @abstractmethod
    def parts(self) -> list[PartReport]:
        """List the parts of the model in order."""

    def compact(self) -> "ClosureModel":
        """Return the model without weights that no sample evaluates; itself if all act."""
        return self

    # training

    def phase_named(self, name: str) -> Phase:
        """Return a phase by name. Raises ValueError if the model has no phase of that name."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        names = ", ".join(dict.fromkeys(phase.name for phase in self.phases)) or "none"
        raise ValueError(f"phase {name!r}, expected one of {names}")

    def begin(self, name: str, reader: Batches) -> dict[str, Any]:
        """Start a phase: compute its statistics, select its weights; returns results for the log.

        Called by all processes of a training, each with a reader of its own share.
        """
        self.phase = phase = self.phase_named(name)
        with torch.no_grad():
            report = phase.begin(self, Reader.of(reader))
        self.resume(name)
        return report

    def resume(self, name: str) -> None:
        """Make a phase the current one; only its weights have gradients."""
        self.phase = phase = self.phase_named(name)
        trained = {id(weight) for weight in phase.parameters(self)}
        for weight in self.parameters():
            weight.requires_grad_(id(weight) in trained)

    def loss_per_sample(self, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        """Compute the loss (B,) of the current phase.

        Args:
            batch: ``state``, ``target`` (B, n, n); ``sample_index`` (B,), global indices of the
                samples; ``history`` (B, H, n, n) and ``previous`` (B, P, n, n) if the model reads
                them; ``ahead`` (B, L, n, n) in a phase through the solver.
            seed: seed of the training draws, which are keyed by (seed, step, sample index).
            step: optimiser step.
        """
        if self.phase is None:
            raise ValueError("no phase has begun: call begin(name, reader) first")
        return self.phase.loss(self, batch, seed, step)

    def loss(self, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        """Compute the mean loss of the batch, with arguments of :meth:`loss_per_sample`.

        Means over equal parts of a global batch average to the global loss.
        """
        return self.loss_per_sample(batch, seed, step).mean()

    def forward(self, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        """Compute the loss; engines call the module."""
        return self.loss(batch, seed, step)

    def weight_decay(self, name: str) -> float:
        """Return the decoupled weight decay of a named weight, beyond that of the experiment."""
        return 0.0

    def num_parameters(self) -> int:
        """Count real parameters; raises ValueError for a complex one.

        DeepSpeed loses the imaginary part of complex parameters.
        """
        for name, weight in self.named_parameters():
            if weight.is_complex():
                raise ValueError(f"parameter {name} is complex; store it as real (..., 2)")
        return sum(weight.numel() for weight in self.parameters())

    # sampling

    @property
    def score_active(self) -> bool:
        """Whether the generator acts; otherwise it is not evaluated."""
        return True

    @abstractmethod
    def sample_batch(self, request: Request) -> Tensor:
        """Draw U (members, n, n) for states given as fields.

        Raises:
            ValueError: grid, history or sensors differ from those of the training.
        """

    @abstractmethod
    def sample_hat(self, request: Request) -> Tensor:
        """Draw U (members, 2K + 1, K + 1) for states given as retained spectra."""

    # contents of a file beside the parameters

    def saved_statistics(self, spacing: float | None = None) -> dict[str, Tensor]:
        """Return the closed-form statistics as float64 CPU tensors.

        Args:
            spacing: trained intervals between training snapshots, for a file; None = as the model
                has it.
        """
        return {}

    def load_statistics(self, tensors: dict[str, Tensor]) -> None:
        """Load what :meth:`saved_statistics` returned."""
