"""What is found on the pilot's trajectories: steps, drains, and how far each rung carries.

The pilot's trajectories are in no data set: nothing is trained or reported on them. Each start
has DNS of its own (:class:`~hpc_closure.generate.replicas.ReplicaBlock`), of which the first
stands for the truth; the others are the true ensemble. Errors are fair CRPS of the state on the
reduced solver's grid.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.losses import crps
from hpc_closure.closure.targets import reduced_problem
from hpc_closure.data.reader import CoupledEnsemble
from hpc_closure.experiment.choices import STAGE, Choice, Choices
from hpc_closure.experiment.schema import Experiment, Rung
from hpc_closure.generate.rungs import Known, begin, rung_problem
from hpc_closure.spectral.modes.grid import from_row, resize, retained_modes, to_fields, to_spectra
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.work import atomic, log
from hpc_closure.work.units import Ledger

EQUAL, NO_WORSE = (0.01, 0.02)  # how far errors may be apart: of the bare solver, of a rung
TELLS = 0.5  # of the error of a state of another time: beyond, a lead time tells nothing
STRENGTHS = (0.5, 1.0, 2.0)  # of a drain
FASTEST = 1.5  # CFL number: no scheme here takes a longer step
LEAST = 0.02  # what an interval leaves of a mode under the strongest drain
JUDGED = 1e-10  # of the enstrophy: shells with less have no drain


def find(experiment: Experiment) -> None:
    """Find the steps and drains that are missing, and keep them. The pilot must be complete."""
    choices = Choices(experiment)
    missing = choices.missing()
    if not missing:
        return
    trials = Trials(experiment)
    for key, rung in missing.items():
        choice = trials.reduced() if rung is None else trials.rung(rung)
        choices.known[key] = asdict(choice)
        drained = f", drain {choice.strength:g} times the fit" if choice.drain else ""
        log.get().info(
            f"pilot: {key.split()[0]} takes {choice.stride} step(s) of the DNS in one "
            f"(CFL {choice.cfl:.2g}){drained}"
        )
    atomic.write_json(choices.path, choices.as_json())


class Trials:
    """Runs of bare solvers from the pilot's starts.

    Args:
        experiment: whose pilot is complete.
    """

    def __init__(self, experiment: Experiment):
        self.experiment, self.problem = experiment, experiment.problem
        products = Ledger.of(experiment, STAGE).products()
        self.pilot = CoupledEnsemble([product.path for product in products])
        self.cases, self.grid = self.pilot.cases, experiment.known_grid
        self.sides = self.problem.dimensions
        self.modes = retained_modes(self.grid)
        self.interval = experiment.generate.interval
        self.span = self.interval * self.problem.dt
        self.leads = sorted(experiment.evaluate.lead_times)
        self.truth = {lead: self._fields(self.pilot.read("model", i)[0]) for lead, i in self._at()}
        self.whole = [self._whole(time) for time in self.pilot.whole_times]
        self.saturated = self._saturated()

    def _at(self) -> Iterator[tuple[float, int]]:
        return ((lead, self.pilot.index(lead)) for lead in self.leads)

    def _fields(self, values: np.ndarray) -> Tensor:
        """Stored fields on the grid on which starts are known."""
        fields = from_row(torch.from_numpy(values).double(), self.sides)
        spectra = to_spectra(fields, self.modes, self.sides)
        return to_fields(spectra, self.grid, self.sides)

    def _whole(self, time: float) -> Tensor:
        """(cases, ...) spectra with all modes at a stored time."""
        stored = np.stack([self.pilot.read_whole(case, time) for case in self.cases])
        fields = from_row(torch.from_numpy(stored).double(), self.sides)
        return to_spectra(fields, self.problem.make_grid().modes, self.sides)

    def _saturated(self) -> float:
        """Mean absolute difference of the states of different starts."""
        first = next(iter(self.truth.values()))
        number = len(first)
        pairs = [(first[i] - first[j]).abs().mean() for i in range(number) for j in range(i)]
        return float(torch.stack(pairs).mean())

    def true_ensemble(self) -> dict[float, Tensor]:
        """(members - 1, cases, n, n) by lead time: DNS that know as much as a start does."""
        return {lead: self._fields(self.pilot.read("model", i)[1:]) for lead, i in self._at()}

    def known(self, past: float) -> Known:
        """What is known of the starts, with a stretch of the past."""
        resolved = [resize(whole, self.modes, self.sides) for whole in self.whole]
        before = round(past / self.span)
        if before >= len(resolved):
            raise ValueError(
                f"a rung reads {past:g} of the resolved past, the pilot holds "
                f"{(len(resolved) - 1) * self.span:g} before the start: raise pilot.watched"
            )
        stretch = resolved[-1 - before : -1] if before else []
        other = [one.roll(1, 0) for one in stretch]
        return Known(resolved[-1], self.whole[-1], stretch, other, self.span)

    def run(
        self, problem: Problem, start: str = "empty", past: float = 0.0, members: int = 1
    ) -> dict[float, Tensor]:
        """(members, cases, n, n) on the reduced solver's grid, by lead time."""
        number = len(self.cases)
        ids = [keyed_noise.pair(case, member) for member in range(members) for case in self.cases]
        simulation = Simulation(problem, ids, self.experiment.seed, stage="rollout")
        rows = torch.arange(number).repeat(members)
        first = round(self.experiment.rollout.t_start / problem.dt)
        begin(simulation, start, self.known(past), rows, first, "rollout", past)
        found, now = {}, 0.0
        for lead in self.leads:
            simulation.advance(problem.steps_in(lead - now))
            now = lead
            resolved = resize(simulation.state, self.modes, self.sides)
            fields = to_fields(resolved, self.grid, self.sides)
            found[lead] = fields.unflatten(0, (members, number))
        return found

    def errors(self, ensembles: Mapping[float, Tensor]) -> Tensor:
        """Fair CRPS (leads, cases); infinite where a member is lost."""
        rows = [crps(fields, self.truth[lead]) for lead, fields in ensembles.items()]
        return torch.stack(rows).nan_to_num(nan=math.inf)

    def spread(self, ensembles: Mapping[float, Tensor]) -> Tensor:
        """Standard deviation of members, root mean square over starts and points, (leads,)."""
        return torch.stack([fields.var(0).mean().sqrt() for fields in ensembles.values()])

    def twins(self) -> tuple[Tensor, Tensor]:
        """Differences of the closures of twins that are pinned to one flow, over their size.

        Returns:
            Times for which they were pinned, and root mean square differences; (T,) each.
        """
        times, pilot = self.pilot.times, self.pilot
        begun = [index for index, time in enumerate(times) if time < pilot.start - 1e-9]
        found = []
        for index in begun:
            closures = np.stack([pilot.read_case("closure", case, index) for case in self.cases])
            fields = torch.from_numpy(closures).double()  # (cases, members, ...)
            found.append((2 * fields.var(1).mean() / fields.square().mean()).sqrt())
        since = torch.from_numpy(times[begun] - times[begun[0]])
        return since, torch.stack(found)

    def telling(self, errors: Tensor) -> Tensor:
        """(leads,) whether a lead time tells solvers apart; the first one always does."""
        tells = errors.mean(1) < TELLS * self.saturated
        tells[0] = True
        return tells

    def reduced(self) -> Choice:
        """The longest step of the reduced solver that leaves the bare solver's errors alone."""
        solver, experiment = self.experiment.solver, self.experiment
        past = experiment.past_of(solver)

        def problem_at(stride: int) -> Problem:
            return reduced_problem(self.problem, experiment.train_grid, "subgrid", stride)

        return self._longest(
            lambda stride: self.run(problem_at(stride), solver.start, past),
            problem_at,
            lambda ratio: bool((ratio - 1).abs().max() <= EQUAL),
        )

    def rung(self, rung: Rung) -> Choice:
        """Step and drain of a rung."""
        past, members = self.experiment.past_of(rung), self.experiment.pilot.members

        def run(stride: int, drain: Sequence[float] = ()) -> dict[float, Tensor]:
            problem = rung_problem(self.problem, rung.grid, stride, drain)
            return self.run(problem, rung.start, past, members)

        if rung.step == "auto":
            choice = self._longest(
                run,
                lambda stride: rung_problem(self.problem, rung.grid, stride),
                lambda ratio: bool(ratio.mean() <= 1 + NO_WORSE),
            )
        else:
            problem = rung_problem(self.problem, rung.grid, rung.step)
            choice = self._choice(problem, rung.step, self.errors(run(rung.step)))
        if not rung.drain:
            return choice
        rates = self.fit_drain(rung.grid, choice.stride)
        plain = torch.tensor(list(choice.errors.values()))
        best: tuple[float, float, list[float], Tensor] | None = None
        for strength in STRENGTHS:
            drain = [strength * rate for rate in rates]
            errors = self.errors(run(choice.stride, drain))
            score = float((errors.mean(1) / plain).mean())
            if best is None or score < best[0]:
                best = score, strength, drain, errors
        assert best is not None
        return Choice(choice.stride, choice.cfl, best[2], best[1], self._by_lead(best[3]))

    def _longest(self, run, problem_at, good) -> Choice:
        """The longest stride, of those that divide the interval, whose errors are good enough."""
        least = self.errors(run(1))
        tells = self.telling(least)
        strides = [n for n in range(self.interval, 1, -1) if self.interval % n == 0]
        own = self.cfl(problem_at(1))
        for stride in (n for n in strides if n * own <= FASTEST):
            errors = self.errors(run(stride))
            if errors.isfinite().all() and good((errors.mean(1) / least.mean(1))[tells]):
                return self._choice(problem_at(stride), stride, errors)
        return self._choice(problem_at(1), 1, least)

    def _choice(self, problem: Problem, stride: int, errors: Tensor) -> Choice:
        return Choice(stride, self.cfl(problem), errors=self._by_lead(errors))

    def _by_lead(self, errors: Tensor) -> dict[str, float]:
        return {f"{lead:g}": float(error) for lead, error in zip(self.leads, errors.mean(1))}

    def bare(self) -> Problem:
        """The reduced solver at its own step."""
        stride = Choices(self.experiment).stride
        return reduced_problem(self.problem, self.experiment.train_grid, "subgrid", stride)

    def started(self, problem: Problem, members: int) -> Simulation:
        """A solver with members at the starts, with the modes that it has."""
        simulation = Simulation(problem, range(members), self.experiment.seed)
        whole = resize(self.whole[-1], simulation.grid.modes, self.sides)
        rows = torch.arange(members) % len(whole)
        return simulation.load_state(0, whole[rows])

    def any_state(self) -> Tensor:
        """(leads,) fair CRPS of the states of the other starts, which know nothing of this one."""
        found = []
        for truth in self.truth.values():
            others = [truth.roll(shift, 0) for shift in range(1, len(truth))]
            found.append(crps(torch.stack(others), truth).mean())
        return torch.stack(found)

    def cfl(self, problem: Problem) -> float:
        """Largest CFL number of a solver at the starts."""
        simulation = self.started(problem, len(self.cases))
        grid = simulation.grid
        return float(simulation.speed().max()) * problem.dt * grid.size / grid.length

    def fit_drain(self, grid: int, stride: int) -> list[float]:
        r"""Damping rate of each shell: of the regression of a solver's defect on its state.

        Over an interval D a mode that the solver alone would leave alone is found at 1 + a D times
        itself; the rate that does this is -log(1 + a D) / D.
        """
        problem = rung_problem(self.problem, grid, stride)
        simulation = Simulation(problem, range(len(self.cases)), 0)
        modes, shell = simulation.grid.modes, simulation.grid
        product = power = torch.zeros(())
        for before, after in zip(self.whole[:-1], self.whole[1:]):
            start, end = (resize(one, modes, self.sides) for one in (before, after))
            simulation.load_state(0, start).advance(problem.steps_in(self.span))
            defect = end - simulation.state
            product = product + shell.shell_sum((defect * start.conj()).real).sum(0)
            power = power + shell.shell_sum(start.abs().square()).sum(0)
        judged = power > JUDGED * power.sum()
        kept = torch.where(judged, 1 + product / power.clamp(min=1e-300), 1.0)
        return (-kept.clamp(min=LEAST).log() / self.span).tolist()
