r"""How much of the mean's network a coupled run bears, chosen on starts it has not seen.

A network that reads the closures it has drawn is trained one call ahead, where the largest slopes
that help are the best. Read again and again, they let closures grow: more and more of them leave
the range of the training and are brought back into it, each time with a jump that feeds the flow.
Less of the network costs little one call ahead: with a share :math:`\kappa` of its answer it still
explains :math:`1-(1-\kappa)^2` of what it can. So from states of the validation trajectories the
reduced solver runs on under the closure's own draws, far beyond what is trained, and the share of
the network is taken down, in all shells or in single ones, until

* half as many draws are brought back as of the DNS's own closures would be, or fewer (of so few
  trajectories the share is known to a third or so, and it rises with the time), and
* no shell has more enstrophy than in the DNS by a twentieth, beyond two standard errors.
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
from hpc_closure.spectral.modes.grid import as_row, from_row, resize, to_spectra
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

__all__ = ["Found", "LongRuns", "lower"]

STAGE = "steady"
ROUNDS = 8  # shares that are tried
CROWDED = 0.5  # share of the draws that go back, over that of the DNS's own closures, at most
STEP = 0.1  # by which the share of all shells falls in a round in which too many draws go back,
HEAVY = 0.3  # and that of a shell which has too much
MOST = 0.05  # enstrophy of a shell above the DNS's
JUDGED = 1e-3  # share of the enstrophy that a shell must have
ERRORS = 2.0  # standard errors that are chance


class Drawing(Protocol):
    """What is asked of a closure here."""

    @property
    def device(self) -> torch.device: ...

    @property
    def guarded(self) -> int:
        """Shells of a draw that may be brought back."""

    def sample_hat(self, request: Request) -> Tensor:
        """Draws for retained spectra."""


@dataclass(frozen=True)
class Found:
    """What a long run has come to, in its second half.

    Attributes:
        back: share of the draws that were brought back.
        lost: trajectories.
        ratio: (shells,) enstrophy over the DNS's, from shell 1 on.
        error: (shells,) its standard error.
        judged: (shells,) bool: shells that have enough enstrophy to be judged.
    """

    back: float
    lost: int
    ratio: Tensor
    error: Tensor
    judged: Tensor

    @property
    def heavy(self) -> Tensor:
        """(shells,) bool: shells that have too much."""
        return self.judged & (self.ratio - ERRORS * self.error > 1 + MOST)


def lower(share: Tensor, found: Found, expected: float) -> Tensor | None:
    """The next share (1 + shells,) of the network; None where this one holds.

    Args:
        share: of each shell, from shell 0 on.
        found: of the run with it.
        expected: share of the DNS's own closures that would be brought back.
    """
    crowded = found.back > CROWDED * expected or found.lost > 0
    heavy = torch.cat([found.heavy.new_zeros(1), found.heavy])
    if not crowded and not bool(heavy.any()):
        return None
    return (share - STEP * float(crowded) - HEAVY * heavy.to(share)).clamp(min=0.0)


class LongRuns:
    """Coupled runs from stored states, without the DNS beside them.

    Args:
        problem: what the reduced solver runs, on the grid of the training fields.
        kind: of the closure.
        span: time from call to call, as in training.
        calls: closure calls of a run.
        members: trajectories from each start.
        seed: of the draws.
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

    def run(self, model: Drawing, reader: Reader) -> Found:
        """Run on from the first snapshot of every trajectory that ``reader`` has."""
        starts, truth = self._read(reader)
        draws_, back, lost = 0, 0, 0
        means = torch.zeros(0, self.grid.num_shells, dtype=torch.float64)
        if starts:
            draws_, back, means = self._run(model, starts)
            lost = int((~means.isfinite().all(1)).sum())
            means = means[means.isfinite().all(1)]
        sums = [self._sums(each) for each in (means, truth)]
        draws_, back, lost, *numbers = reader.sum(draws_, back, lost, *sums[0], *sums[1])
        (ours, error), (theirs, their_error) = (
            self._mean(*numbers[3 * i : 3 * i + 3]) for i in (0, 1)
        )
        ratio = ours / theirs.clamp(min=1e-300)
        error = ratio * torch.hypot(
            error / ours.clamp(min=1e-300), their_error / theirs.clamp(min=1e-300)
        )
        return Found(
            back / max(draws_, 1),
            round(lost),
            ratio[1:],
            error[1:],
            (theirs > JUDGED * theirs.sum())[1:],
        )

    def _read(self, reader: Reader) -> tuple[list[tuple[int, Tensor, Tensor]], Tensor]:
        """Starts (member, state, last closures) and mean enstrophy (trajectories, shells)."""
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
        return to_spectra(fields.double(), self.grid.modes)

    def _enstrophy(self, w_hat: Tensor) -> Tensor:
        """(B, shells) of retained spectra as closures read them."""
        power = from_row(w_hat.abs().square().double(), self.grid.dimensions)
        return 0.5 * self.grid.shell_sum(power).cpu()

    def _run(
        self, model: Drawing, starts: list[tuple[int, Tensor, Tensor]]
    ) -> tuple[int, int, Tensor]:
        """Draws in the second half, those brought back, and mean enstrophy (rows, shells)."""
        sides, device = self.grid.dimensions, model.device
        ids = [
            keyed_noise.pair(start[0], member)
            for member in range(self.members)
            for start in starts
        ]
        simulation = Simulation(self.problem, ids, self.seed, device=device)
        like = simulation.state
        states = self._spectra(torch.stack([start[1] for start in starts])).repeat(
            self.members, *[1] * 2
        )
        simulation.load_state(0, from_row(states.to(like), sides))
        past = self._spectra(torch.stack([start[2] for start in starts]))
        drawn = list(past.to(like).repeat(self.members, 1, 1, 1).unbind(1))
        sizes = torch.zeros(len(ids), self.grid.num_shells, dtype=torch.float64)
        told: list[Tensor] = []
        half = self.calls // 2
        for call in range(self.calls):
            state = as_row(simulation.state, sides)
            gone = simulation.diverged()
            state = torch.where(gone[:, None, None], 0.0, state)
            request = Request(
                state,
                ids,
                self.seed,
                call,
                previous=torch.stack(drawn, 1),
                grid=self.grid.size,
                stage=STAGE,
                tell=told.append if call >= half else None,
            )
            closure = resize(model.sample_hat(request), self.grid.modes).to(like)
            drawn = [torch.where(gone[:, None, None], 0.0, closure), *drawn[:-1]]
            held = torch.where(gone[:, None, None], torch.nan, closure)
            advance_with(simulation, self.kind, self.span, from_row(held, sides))
            if call >= half:
                sizes += self._enstrophy(as_row(simulation.state, sides))
        beyond = torch.stack(told) if told else torch.zeros(0, len(ids), 1, dtype=torch.bool)
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
        """Mean over trajectories, and its standard error."""
        mean = total / max(count, 1)
        variance = (squares / max(count, 1) - mean.square()).clamp(min=0)
        return mean, (variance / max(count - 1, 1)).sqrt()


def in_words(tried: Iterable[tuple[Tensor, Found]]) -> list[dict[str, Any]]:
    """Each share that was tried, with what came of it."""
    return [
        {
            "share": [round(float(one), 2) for one in share[1:].unique()],
            "brought_back": round(found.back, 4),
            "lost": found.lost,
            "enstrophy": [round(float(one), 2) for one in found.ratio],
        }
        for share, found in tried
    ]
