"""Do unresolved scales follow the resolved ones? Growth rates and widths for several cut-offs.

A *twin* is a DNS whose modes up to a cut-off are overwritten with those of a first trajectory
after every step, under the same forcing. For each cut-off:

* ``growth``: rate at which a small difference of the other modes grows, 1/time, the conditional
  Lyapunov exponent (Pecora and Carroll, Phys. Rev. Lett. 64, 1990). Below zero the unresolved
  scales are determined by the past of the resolved ones. The difference is scaled back to its
  first size after each closure interval.
* ``width``: share of the closure's variance that this past leaves open: half the mean square
  difference between the closures of the trajectory and of a twin whose other modes began as those
  of the trajectory, shifted in space by a random distance.

``ball_eta`` (three dimensions) is the radius of the ball of as many modes as the cut-off retains,
in units of 1 / eta, the Kolmogorov length. Scales follow above 0.2 (Yoshida, Yamaguchi, Kaneda,
Phys. Rev. Lett. 94, 2005).

Averages are over members and over the last part of a run; ``growth_error`` is the standard error
over members.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from hpc_closure.bench import measure
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.targets import defect, reduced_problem
from hpc_closure.experiment.schema import Experiment
from hpc_closure.generate.rungs import impose
from hpc_closure.spectral.modes.grid import resize
from hpc_closure.spectral.modes.resolution import points_for
from hpc_closure.spectral.simulation import Simulation

COLUMNS = measure.columns("cut:d ball_eta:.3f growth:.3f growth_error:.3f width:.4f")
SMALL = 1e-6  # relative size of a small difference: squares of it are far above round-off
SETTLED = 0.4  # share of a run before its averages begin
STAGE = "pilot"  # key of trajectories that belong to no data set


@dataclass(frozen=True)
class Case:
    """Settings of a measurement.

    Attributes:
        cuts: largest retained wavenumbers, per side.
        members: number of trajectories.
        spin_up: time before the twins begin.
        span: time for which twins follow, a multiple of the closure interval.
    """

    cuts: Sequence[int]
    members: int
    spin_up: float
    span: float


def run(
    experiment: Experiment, case: Case, report: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Follow twins for all cut-offs; returns a record per cut-off.

    Raises:
        ValueError: a cut-off is not below that of the DNS, or the span is no multiple of the
            interval.
        RuntimeError: the trajectories diverged.
    """
    problem, interval = experiment.problem, experiment.generate.interval
    most = min(problem.make_grid().mode_counts)
    for cut in case.cuts:
        if not 1 <= cut < most:
            raise ValueError(f"--cuts {cut}: expected wavenumbers from 1 to {most - 1}")
    intervals = round(case.span / experiment.generate.closure_interval)
    if intervals < 1 or problem.steps_in(case.span) != intervals * interval:
        raise ValueError(
            f"--span {case.span:g}: expected a multiple of the closure interval, "
            f"{experiment.generate.closure_interval:g}"
        )
    solvers = [_reduced(experiment, case, cut) for cut in case.cuts]
    master = _simulation(experiment, case.members).initialise()
    master.advance(problem.steps_in(case.spin_up))
    twins = [_Twins(experiment, master, solver) for solver in solvers]
    for number in range(1, intervals + 1):
        master.forget()  # twins are loaded without past steps
        start = master.state.clone()
        for _ in range(interval):
            master.advance(1)
            for twin in twins:
                twin.follow(master)
        if not master.state.abs().sum().isfinite():
            raise RuntimeError("the trajectories diverged: lower generate.dt")
        for twin in twins:
            twin.measure(start, master)
        if number % max(1, intervals // 10) == 0:
            report(f"{number} of {intervals} intervals")
    eta = _kolmogorov_length(experiment, master)
    return [
        {"cut": twin.cut, "ball_eta": _radius(twin.cut) * eta, **twin.record()} for twin in twins
    ]


def _radius(cut: int) -> float:
    """Return the radius of the ball with the volume of a cube of 2 cut + 1 modes per side."""
    return (3 / (4 * math.pi)) ** (1 / 3) * (2 * cut + 1)


def _simulation(experiment: Experiment, members: int) -> Simulation:
    return Simulation(experiment.problem, range(members), experiment.seed, stage=STAGE)


def _reduced(experiment: Experiment, case: Case, cut: int) -> Simulation:
    """Return the solver that retains wavenumbers up to a cut-off, at the step of the DNS."""
    grid = points_for(cut)
    try:
        problem = reduced_problem(experiment.problem, grid, "subgrid")
    except ValidationError as error:
        raise ValueError(
            f"--cuts {cut}: {error.errors()[0]['msg'].removeprefix('Value error, ')}"
        ) from None
    return Simulation(problem, range(case.members), experiment.seed)


def _kolmogorov_length(experiment: Experiment, simulation: Simulation) -> float:
    """Return (nu^3 / dissipation)^(1/4) of the present states times 2 pi / L; NaN in the plane."""
    problem = experiment.problem
    if problem.dimensions != 3:
        return math.nan
    grid = simulation.grid
    squares = simulation.state.abs().square().sum(1)
    enstrophy = grid.shell_sum(squares * grid.k2).sum(-1).mean() / 2
    dissipation = 2 * problem.viscosity * float(enstrophy)
    return (problem.viscosity**3 / dissipation) ** 0.25 * 2 * math.pi / problem.lengths[0]


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw growth rates and widths of the records of :func:`run` to a PNG, beside it a CSV."""
    from matplotlib.figure import Figure

    from hpc_closure.evaluate.report import figures

    three = not math.isnan(records[0]["ball_eta"])
    x = [row["ball_eta"] if three else row["cut"] for row in records]
    with figures.drawing_style():
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        growth, width = figure.subplots(1, 2)
        errors = [row["growth_error"] for row in records]
        growth.errorbar(x, [row["growth"] for row in records], errors, marker="o", capsize=3)
        growth.axhline(0, color="black", linewidth=1)
        growth.set(title="growth of a small difference", ylabel="rate [1/time]")
        width.semilogy(x, [row["width"] for row in records], marker="o")
        width.set(title="share of U that the past leaves open", ylabel="of its variance")
        for axis in (growth, width):
            axis.set_xlabel("radius of the retained ball x η" if three else "cut-off [2π/L]")
    figures.save(figure, path.with_suffix(""), ("png", "csv"))


class _Twins:
    """Both twins of every trajectory for one cut-off: one nearby, one with shifted modes.

    Args:
        experiment: settings.
        master: the trajectories; the twins begin at their present states.
        solver: the reduced solver; the twins share the modes that it retains.
    """

    def __init__(self, experiment: Experiment, master: Simulation, solver: Simulation):
        members, grid = len(master.members), master.grid
        self.solver, self.cut, self.sides = solver, solver.grid.modes, grid.dimensions
        self.span = experiment.generate.closure_interval
        self.interval, self.first = experiment.generate.interval, master.step_index
        self.near, self.far, self.free = (_simulation(experiment, members) for _ in range(3))
        phases = keyed_noise.moves(grid, experiment.seed, STAGE, master.members).to(master.state)
        if master.channel_shape:
            phases = phases[:, None]
        for twin in (self.near, self.far):
            twin.load_state(master.step_index, master.state * phases)
        self._share_modes(self.far, master)
        self._share_modes(self.near, master)
        self.size_of_difference = SMALL * self._distance(master)
        self._rescale(master, self._distance(master))
        self.rates: list[Tensor] = []
        self.open: list[Tensor] = []

    def _share_modes(self, twin: Simulation, master: Simulation) -> None:
        impose(twin, resize(master.state, self.cut, self.sides))

    def _distance(self, master: Simulation) -> Tensor:
        """Return the norm of the difference of the nearby twins, (members,)."""
        squares = (self.near.state - master.state).abs().square()
        squares = squares.sum(1) if master.channel_shape else squares
        return master.grid.shell_sum(squares).sum(-1).sqrt()

    def _rescale(self, master: Simulation, distance: Tensor) -> None:
        """Scale the differences of the nearby twins to their first size."""
        factor = (self.size_of_difference / distance).view(-1, *[1] * (master.state.ndim - 1))
        difference = (self.near.state - master.state) * factor
        self.near.load_state(master.step_index, master.state + difference)

    def follow(self, master: Simulation) -> None:
        """Take the trajectories' last step; the first of an interval copies the shifted twin."""
        if (self.near.step_index - self.first) % self.interval == 0:
            self.free.load_state(self.far.step_index, self.far.state)
            self.far.forget()
        for twin in (self.near, self.far):
            twin.advance(1)
            self._share_modes(twin, master)

    def measure(self, start: Tensor, master: Simulation) -> None:
        """Add one interval, from the spectra ``start`` to the present ones, to the averages."""
        distance = self._distance(master)
        self.rates.append((distance / self.size_of_difference).log() / self.span)
        self._rescale(master, distance)
        own = self._closure(start, master.state)
        begin = self.free.state.clone()
        other = self._closure(begin, self.free.advance(self.interval).state)
        apart, square = ((part.abs().square()).sum() for part in (own - other, own))
        self.open.append(apart / (2 * square))

    def _closure(self, start: Tensor, end: Tensor) -> Tensor:
        """Return U of an interval of the DNS from its first and last spectra."""
        modes = self.solver.grid.mode_counts
        return defect(self.solver, 0, resize(start, modes), resize(end, modes), self.span)

    def record(self) -> dict[str, float]:
        """Return the averages over the last part of the run."""
        first = int(SETTLED * len(self.rates))
        rates = torch.stack(self.rates[first:]).mean(0)
        error = float(rates.std() / math.sqrt(len(rates))) if len(rates) > 1 else math.nan
        width = float(torch.stack(self.open[first:]).mean())
        return {"growth": float(rates.mean()), "growth_error": error, "width": width}
