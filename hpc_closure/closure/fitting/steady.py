r"""Share of the mean's network at which long coupled runs are stable, chosen on unseen starts.

A network that reads previous closures is trained one call ahead, where the largest slopes that
help are best. In a coupled run its output is read again and again, and closures grow. More and
more of them leave the range of the training and are rescaled into it, and each jump feeds the
flow. A smaller share of the network costs little one call ahead: with a share :math:`\kappa` of
its output it still explains :math:`1-(1-\kappa)^2` of what it can. So the reduced solver runs from
states of the validation trajectories, with draws of the closure, far longer than in training. The
share of the network is reduced, in all shells or in single ones, until

* the rate of rescaled draws is at most half of what it would be for the DNS's closures (of so few
  trajectories the rate is known to about a third, and it grows with time), and
* no shell's enstrophy exceeds that of the DNS by 5 %, beyond two standard errors.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hpc_closure.closure.composed.statistics import Batch
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.model import Request
from hpc_closure.closure.reductions import Reader
from hpc_closure.closure.targets import advance_with
from hpc_closure.spectral.modes.grid import resize, to_spectra
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import simulation_of

__all__ = ["RunResult", "LongRuns", "lower"]

STAGE = "steady"
ROUNDS = 8  # largest number of trial runs
CROWDED = 0.5  # largest rate of rescaled draws, over the rate for the DNS's closures
STEP = 0.1  # decrease of the share of all shells after a round with too many rescaled draws,
HEAVY = 0.3  # and of a shell with too much enstrophy
MOST = 0.05  # largest relative excess of a shell's enstrophy over the DNS
JUDGED = 1e-3  # least share of the total enstrophy in a shell that is judged
ERRORS = 2.0  # standard errors within which an excess may be chance


class Drawing(Protocol):
    """Interface of a closure in a long run."""

    @property
    def device(self) -> torch.device: ...

    @property
    def guarded(self) -> int:
        """Number of shells of a draw that may be rescaled."""

    def sample_hat(self, request: Request) -> Tensor:
        """Draw from retained spectra."""


@dataclass(frozen=True)
class RunResult:
    """Results of a long run, from its second half.

    Attributes:
        rescaled: share of the draws that were rescaled into range.
        lost: number of trajectories that diverged.
        ratio: (shells,) enstrophy over the DNS's, from shell 1 on.
        error: (shells,) standard error of the ratio.
        judged: (shells,) bool: shells with enough enstrophy to be judged.
    """

    rescaled: float
    lost: int
    ratio: Tensor
    error: Tensor
    judged: Tensor

    @property
    def heavy(self) -> Tensor:
        """Shells (shells,) bool with too much enstrophy."""
        return self.judged & (self.ratio - ERRORS * self.error > 1 + MOST)


def lower(share: Tensor, found: RunResult, expected: float) -> Tensor | None:
    """Compute the next share (1 + shells,) of the network; None if this share is stable.

    Args:
        share: share of each shell, from shell 0 on.
        found: results of the run with this share.
        expected: share of the DNS's closures that would be rescaled.
    """
    crowded = found.rescaled > CROWDED * expected or found.lost > 0
    heavy = torch.cat([found.heavy.new_zeros(1), found.heavy])
    if not crowded and not bool(heavy.any()):
        return None
    return (share - STEP * float(crowded) - HEAVY * heavy.to(share)).clamp(min=0.0)


class LongRuns:
    """Long coupled runs from stored states, without a DNS beside them.

    Args:
        problem: problem of the reduced solver, on the grid of the training fields.
        kind: kind of the closure.
        span: time between calls, as in training.
        calls: closure calls of a run.
        members: trajectories per start.
        seed: seed of the draws.
    """

    def __init__(
        self,
        problem: Problem,
        kind: str,
        span: float,
        calls: int,
        members: int,
        seed: int,
    ):
        self.problem, self.kind, self.span = problem, kind, span
        self.calls, self.members, self.seed = calls, members, seed
        self.grid = self.problem.make_grid()

    def run(self, model: Drawing, reader: Reader) -> RunResult:
        """Run from the first snapshot of every trajectory of ``reader``."""
        starts, truth = self._read(reader)
        draws_, rescaled, lost = 0, 0, 0
        means = torch.zeros(0, self.grid.num_shells, dtype=torch.float64)
        if starts:
            draws_, rescaled, means = self._run(model, starts)
            lost = int((~means.isfinite().all(1)).sum())
            means = means[means.isfinite().all(1)]
        sums = [self._sums(each) for each in (means, truth)]
        draws_, rescaled, lost, *numbers = reader.sum(draws_, rescaled, lost, *sums[0], *sums[1])
        (ours, error), (theirs, their_error) = (
            self._mean(*numbers[3 * i : 3 * i + 3]) for i in (0, 1)
        )
        ratio = ours / theirs.clamp(min=1e-300)
        error = ratio * torch.hypot(
            error / ours.clamp(min=1e-300), their_error / theirs.clamp(min=1e-300)
        )
        return RunResult(
            rescaled / max(draws_, 1),
            round(lost),
            ratio[1:],
            error[1:],
            (theirs > JUDGED * theirs.sum())[1:],
        )

    def _read(self, reader: Reader) -> tuple[list[tuple[int, Tensor, Tensor]], Tensor]:
        """Read starts (member, state, previous closures) and mean enstrophy (members, shells)."""
        starts: dict[int, tuple[int, Tensor, Tensor]] = {}
        sums: dict[int, Tensor] = {}
        counts: dict[int, int] = {}
        for batch in Batch.read(reader):
            members = torch.arange(len(batch.state)) if batch.tags is None else batch.tags[0]
            power = self._enstrophy(self._spectra(batch.state))
            for row, member in enumerate(members.tolist()):
                if batch.previous is not None:
                    starts.setdefault(member, (member, batch.state[row], batch.previous[row]))
                sums[member] = sums.get(member, 0.0) + power[row]
                counts[member] = counts.get(member, 0) + 1
        rows = [sums[member] / counts[member] for member in sums]
        empty = torch.zeros(0, self.grid.num_shells, dtype=torch.float64)
        return list(starts.values()), torch.stack(rows) if rows else empty

    def _spectra(self, fields: Tensor) -> Tensor:
        return to_spectra(fields.double(), self.grid.mode_counts)

    def _enstrophy(self, w_hat: Tensor) -> Tensor:
        """Compute enstrophy (B, shells) of retained spectra; of a velocity its energy."""
        power = w_hat.abs().square().double()
        if self.problem.physics.channel_shape:
            power = power.sum(1)
        return 0.5 * self.grid.shell_sum(power).cpu()

    def _run(
        self, model: Drawing, starts: list[tuple[int, Tensor, Tensor]]
    ) -> tuple[int, int, Tensor]:
        """Run all members; returns over the second half draws, rescaled draws and mean enstrophy.

        The mean enstrophy is (rows, shells).
        """
        device = model.device
        ids = [
            keyed_noise.pair(start[0], member)
            for member in range(self.members)
            for start in starts
        ]
        simulation = simulation_of(self.problem, ids, self.seed, device=device)
        like = simulation.state
        states = self._spectra(torch.stack([start[1] for start in starts]))
        states = states.repeat(self.members, *[1] * (states.ndim - 1))
        simulation.load_state(0, states.to(like))
        past = self._spectra(torch.stack([start[2] for start in starts])).to(like)
        drawn = list(past.repeat(self.members, *[1] * (past.ndim - 1)).unbind(1))
        sizes = torch.zeros(len(ids), self.grid.num_shells, dtype=torch.float64)
        rescaled: list[Tensor] = []
        half = self.calls // 2
        for call in range(self.calls):
            diverged_rows = simulation.diverged()[(slice(None), *[None] * (states.ndim - 1))]
            state = torch.where(diverged_rows, 0.0, simulation.state)
            request = Request(
                state,
                ids,
                self.seed,
                call,
                previous=torch.stack(drawn, 1),
                grid=self.grid.size,
                stage=STAGE,
                on_rescaled=rescaled.append if call >= half else None,
            )
            closure = resize(model.sample_hat(request), self.grid.mode_counts).to(like)
            drawn = [torch.where(diverged_rows, 0.0, closure), *drawn[:-1]]
            held = torch.where(diverged_rows, torch.nan, closure)
            advance_with(simulation, self.kind, self.span, held)
            if call >= half:
                sizes += self._enstrophy(simulation.state)
        beyond = (
            torch.stack(rescaled) if rescaled else torch.zeros(0, len(ids), 1, dtype=torch.bool)
        )
        return (
            len(ids) * (self.calls - half),
            int(beyond.any(-1).sum()),
            sizes / (self.calls - half),
        )

    @staticmethod
    def _sums(rows: Tensor) -> tuple[int, Tensor, Tensor]:
        return len(rows), rows.sum(0), rows.square().sum(0)

    @staticmethod
    def _mean(count: float, total: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the mean over trajectories and its standard error."""
        mean = total / max(count, 1)
        variance = (squares / max(count, 1) - mean.square()).clamp(min=0)
        return mean, (variance / max(count - 1, 1)).sqrt()


def in_words(tried: Iterable[tuple[Tensor, RunResult]]) -> list[dict[str, Any]]:
    """Describe each tried share and its results, for the log."""
    return [
        {
            "share": [round(float(value), 2) for value in share[1:].unique()],
            "rescaled_share": round(found.rescaled, 4),
            "lost": found.lost,
            "enstrophy": [round(float(value), 2) for value in found.ratio],
        }
        for share, found in tried
    ]
