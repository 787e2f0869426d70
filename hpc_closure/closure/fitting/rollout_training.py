"""Training through the solver: coupled ensembles with gradients, scored against the DNS.

From a stored state every member runs in the reduced solver with its own closures, as in
:class:`hpc_closure.rollout.coupling.CoupledRun`. The vorticity after every closure call is scored
against the DNS by the fair CRPS. This is a strictly proper score, so its minimum is the true law;
a square error over chaotic trajectories has its minimum at zero spread (Brolly, arXiv 2603.28671,
2026). Gradients pass through the solver's steps, the closures, the previous closures that these
read, and the scaling of the noise. The noise itself is drawn by keys and does not change.
"""

from collections import deque
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.losses import ALMOST_FAIR, crps
from hpc_closure.closure.model import Request
from hpc_closure.closure.reductions import Reader
from hpc_closure.closure.targets import reduced_problem, traced_with
from hpc_closure.spectral.differentiable import DifferentiableSolver, differentiable
from hpc_closure.spectral.modes.grid import (
    hermitian,
    resize,
    to_fields,
    to_spectra,
)
from hpc_closure.spectral.outside.problem import OutsideProblem
from hpc_closure.spectral.outside.simulation import OutsideGradient
from hpc_closure.spectral.problem import Problem

__all__ = ["RolloutLoss"]

STAGE = "trajectory"
MANY = 8  # members of an ensemble whose spread is measured
CALLS = 1 << 10  # largest number of closure calls of a run, so that draws of steps differ


class Scale(NamedTuple):
    """Units of a loss.

    Attributes:
        crps: (calls,) CRPS before the training.
        power: (shells - 1,) mean |w|^2 of the truth in a shell.
    """

    crps: Tensor
    power: Tensor


class Drawing(Protocol):
    """Interface of a closure in training."""

    @property
    def device(self) -> torch.device: ...

    def draw_hat(self, request: Request) -> Tensor:
        """Draw from retained spectra, with gradients."""


class RolloutLoss:
    """Coupled ensembles of a closure in training, and their loss.

    Args:
        problem: the full system.
        grid: points per side of the reduced solver, and of the training fields.
        kind: kind of the closure.
        interval: averaging time of the targets, in steps of the full system.
        members: members of each ensemble.
        energy: weight of the energy errors.
        stride: steps of the full system per step of the reduced solver.

    Raises:
        ValueError: the reduced solver is a user's without a gradient.
    """

    def __init__(
        self,
        problem: Problem,
        grid: int,
        kind: str,
        interval: int,
        members: int,
        energy: float = 0.0,
        stride: int = 1,
    ):
        reduced = reduced_problem(problem, grid, kind, stride)
        self.problem = reduced.replace(precision="float32")
        self.kind, self.span = kind, interval * problem.dt
        self.members, self.energy = members, energy
        self._solver: DifferentiableSolver | OutsideGradient | None = None
        if isinstance(self.problem, OutsideProblem):
            self.solver(torch.device("cpu"))  # one without a gradient is refused before training

    def solver(self, device: torch.device) -> DifferentiableSolver | OutsideGradient:
        """Return the reduced solver on a device."""
        if self._solver is None or self._solver.device != device:
            self._solver = differentiable(self.problem, device)
        return self._solver

    def run(self, model: Drawing, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        """Run the ensembles; returns vorticity (calls, members, B, n, n) after each call.

        Args:
            model: the closure.
            batch: batch of :class:`~hpc_closure.data.samples.TrainingSet`, with ``ahead``.
            seed, step: key of all draws, with the samples' indices.
        """
        w_hat = self.spectra(model, batch, seed, step)
        return to_fields(w_hat, self.solver(model.device).grid.sizes)

    def spectra(
        self,
        model: Drawing,
        batch: dict[str, Any],
        seed: int,
        step: int,
        members: int | None = None,
    ) -> Tensor:
        """Run the ensembles; returns retained spectra (calls, members, B, 2K + 1, K + 1).

        ``members`` replaces the number of members of each ensemble.
        """
        solver, members = self.solver(model.device), members or self.members
        modes = solver.grid.mode_counts
        numbers = batch["sample_index"].tolist()

        def spectra(fields: Tensor) -> Tensor:
            w_hat = to_spectra(fields.double(), modes).to(solver.complex)
            return w_hat.repeat(members, *[1] * (fields.ndim - 1))

        def newest_first(name: str) -> deque[Tensor]:
            frames = spectra(batch[name]).unbind(1) if name in batch else ()
            return deque(frames, maxlen=len(frames))

        state, past = spectra(batch["state"]), None
        earlier, drawn = newest_first("history"), newest_first("previous")
        ids = [keyed_noise.pair(number, member) for member in range(members) for number in numbers]
        out = []
        for call in range(batch["ahead"].shape[1]):
            request = Request(
                state,
                ids,
                seed,
                step * CALLS + call,
                history=torch.stack(list(earlier), 1) if earlier else None,
                previous=torch.stack(list(drawn), 1) if drawn else None,
                grid=solver.grid.size,
                stage=STAGE,
            )
            drawn_hat = resize(model.draw_hat(request), modes)
            closure = hermitian(drawn_hat, solver.grid.dimensions).to(state)
            earlier.appendleft(state)
            drawn.appendleft(closure)
            state, past = traced_with(solver, self.kind, self.span, state, closure, past)
            out.append(state)
        return torch.stack(out).unflatten(1, (members, len(numbers)))

    def scores(
        self, model: Drawing, batch: dict[str, Any], seed: int, step: int, alpha: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        r"""Score the ensembles: CRPS (B, calls) of the vorticity, and squared energy errors.

        The latter (B, calls, shells) are unbiased squares of the ensemble-mean enstrophy of a
        shell minus the truth's, :math:`\tfrac{1}{M(M-1)}\sum_{i\ne j} (Z_i - Z)(Z_j - Z)`, so the
        spread adds nothing on average. ``alpha`` is as in :func:`crps`.
        """
        w_hat = self.spectra(model, batch, seed, step)
        truth = batch["ahead"].swapaxes(0, 1).to(w_hat.real)
        grid = self.solver(w_hat.device).grid
        fields = to_fields(w_hat, grid.sizes)
        each = [crps(ensemble, target, alpha) for ensemble, target in zip(fields, truth)]
        errors = self.power(w_hat) - self.power(to_spectra(truth, grid.mode_counts))[:, None]
        number = errors.shape[1]
        square = errors.sum(1).square()
        if number > 1:
            square = (square - errors.square().sum(1)) / (number * (number - 1))
        return torch.stack(each, dim=1), square.swapaxes(0, 1)

    def power(self, w_hat: Tensor) -> Tensor:
        """Sum |w|^2 over shells from 1 on, (..., shells); of a velocity over all components."""
        grid = self.solver(w_hat.device).grid
        square = torch.view_as_real(w_hat).square().sum(-1)
        if self.problem.physics.channel_shape:
            square = square.sum(grid.axes[0] - 1)
        return grid.shell_sum(square)[..., 1:]

    def loss(
        self, model: Drawing, batch: dict[str, Any], scale: Scale, seed: int, step: int
    ) -> Tensor:
        """Compute the loss (B,): CRPS plus weighted energy errors, in units of ``scale``.

        Both are means over calls; the energy errors are also means over shells.
        """
        scores, errors = self.scores(model, batch, seed, step, ALMOST_FAIR)
        loss = (scores / scale.crps[: scores.shape[1]].to(scores)).mean(1)
        if self.energy:
            loss = loss + self.energy * (errors / scale.power.to(errors).square()).mean((1, 2))
        return loss

    def scale(self, model: Drawing, reader: Reader, seed: int) -> Scale:
        """Measure the units of the loss: scores before training, and the truth's spectrum."""
        modes = self.solver(model.device).grid.mode_counts
        scores, power = [], []
        for step, batch in enumerate(reader, reader.first_batch):
            scores.append(self.scores(model, batch, seed, step)[0].double().cpu())
            power.append(self.power(to_spectra(batch["ahead"].double(), modes)).cpu())
        crps_, power_ = (torch.cat(reader.every(each)) for each in (scores, power))
        return Scale(crps_.mean(0), power_.mean((0, 1)).clamp(min=1e-300))

    def spread_skill(self, model: Drawing, reader: Reader, seed: int) -> Tensor:
        """Compute spread over error of the mean, (shells - 1,), of ensembles of MANY members.

        For each call, it is the ratio of mean squares over all starts. The result is the geometric
        mean over the calls. No gradients are computed.
        """
        spread, error = [], []
        for step, batch in enumerate(reader, reader.first_batch):
            with torch.no_grad():
                w_hat = self.spectra(model, batch, seed, step, MANY)
            modes = self.solver(w_hat.device).grid.mode_counts
            truth = to_spectra(batch["ahead"].swapaxes(0, 1).to(w_hat.real), modes)
            mean = w_hat.mean(1)
            error.append(self.power(mean - truth).cpu())
            spread.append((self.power(w_hat - mean[:, None]).sum(1) * (MANY + 1) / MANY).cpu())
        spreads, errors = (
            torch.cat(reader.every(each), 1).double().mean(1) for each in (spread, error)
        )
        ratio = spreads / (MANY - 1) / errors.clamp(min=1e-300)
        return ratio.clamp(min=1e-6).sqrt().log().mean(0).exp()
