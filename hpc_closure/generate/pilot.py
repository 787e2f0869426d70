"""Choose time steps and drains of bare solvers on the pilot's trajectories; score the rungs.

The pilot's trajectories belong to no data set: no model is trained or scored on them. Each start
has several DNS (:class:`~hpc_closure.generate.replicas.ReplicaBlock`). The first is the truth, the
others are the true ensemble. Errors are the fair CRPS of the state on the reduced solver's grid.
If a state has several fields, each is in units of its standard deviation over the starts.
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
from hpc_closure.spectral.modes.grid import resize, to_fields, to_spectra
from hpc_closure.spectral.modes.resolution import retained_modes
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.work import atomic, log
from hpc_closure.work.units import Ledger

# largest relative difference of errors at a longer step: reduced solver (either sign), rung (mean)
EQUAL, NO_WORSE = (0.01, 0.02)
INFORMATIVE = 0.5  # a lead time counts while its error is below this share of the saturated error
STRENGTHS = (0.5, 1.0, 2.0)  # multiples of the fitted drain that are tried
# Largest CFL number, by sides: no scheme of the package is stable at a longer step. In three
# dimensions rk4 was stable at 5 on 12^3 and at 2.7 on 24^3, where few points are as fast.
FASTEST = {1: 1.5, 2: 1.5, 3: 6.0}
LEAST = 0.02  # smallest factor by which a drain damps a mode over one interval
JUDGED = 1e-10  # shells with a smaller share of the enstrophy get no drain


def find(experiment: Experiment) -> None:
    """Find the missing steps and drains and write them to the file of choices.

    The pilot must be complete.
    """
    choices = Choices(experiment)
    missing = choices.missing()
    if not missing:
        return
    trials = Trials(experiment)
    for key, rung in missing.items():
        choice = trials.reduced() if rung is None else trials.rung(rung)
        choices.known[key] = asdict(choice)
        drain_text = f", drain {choice.strength:g} times the fit" if choice.drain else ""
        log.get().info(
            f"pilot: {key.split()[0]} takes {choice.stride} step(s) of the DNS in one "
            f"(CFL {choice.cfl:.2g}){drain_text}"
        )
    atomic.write_json(choices.path, choices.as_json())


class Trials:
    """Run bare solvers from the pilot's starts and score them against the pilot's DNS.

    Args:
        experiment: an experiment whose pilot is complete.
    """

    def __init__(self, experiment: Experiment):
        self.experiment, self.problem = experiment, experiment.problem
        products = Ledger.of(experiment, STAGE).products()
        self.pilot = CoupledEnsemble([product.path for product in products])
        self.cases, self.grid = self.pilot.cases, experiment.known_grid
        self.sides = self.problem.dimensions
        self.axes = tuple(range(-self.sides, 0))  # of the points of fields
        self.modes = retained_modes(self.grid)
        self.interval = experiment.generate.interval
        self.span = self.interval * self.problem.dt
        self.leads = sorted(experiment.evaluate.lead_times)
        several = bool(self.problem.physics.channel_shape)
        self.scale: Tensor | float = self._scale() if several else 1.0
        self.truth = {lead: self._fields(self.pilot.read("model", i)[0]) for lead, i in self._at()}
        self.whole = [self._whole(time) for time in self.pilot.whole_times]
        self.saturated = self._saturated()

    def _at(self) -> Iterator[tuple[float, int]]:
        return ((lead, self.pilot.index(lead)) for lead in self.leads)

    def _fields(self, values: np.ndarray) -> Tensor:
        """Resample stored fields (..., n, n) to the grid on which starts are known."""
        spectra = to_spectra(torch.from_numpy(values).double(), self.modes, self.sides)
        return to_fields(spectra, self.grid, self.sides) / self.scale

    def _scale(self) -> Tensor:
        """Return the standard deviation of each field at the first lead time, (C, 1, 1)."""
        self.scale = 1.0
        fields = self._fields(self.pilot.read("model", self.pilot.index(self.leads[0]))[0])
        std = fields.var((0, *self.axes), correction=0).sqrt()
        return std[(slice(None), *[None] * self.sides)]

    def _whole(self, time: float) -> Tensor:
        """Read the spectra (cases, ...) with all modes at a stored time."""
        stored = np.stack([self.pilot.read_whole(case, time) for case in self.cases])
        return to_spectra(torch.from_numpy(stored).double(), self.problem.make_grid().mode_counts)

    def _saturated(self) -> float:
        """Average |difference| of states of different starts, at the first lead time."""
        first = next(iter(self.truth.values()))
        number = len(first)
        pairs = [(first[i] - first[j]).abs().mean() for i in range(number) for j in range(i)]
        return float(torch.stack(pairs).mean())

    def true_ensemble(self) -> dict[float, Tensor]:
        """Read the true ensemble, (members - 1, cases, n, n) by lead time.

        Its members are DNS that share with the truth only what a start knows.
        """
        return {lead: self._fields(self.pilot.read("model", i)[1:]) for lead, i in self._at()}

    def known(self, past: float) -> Known:
        """Return what is known of the starts, with the last ``past`` time units before them.

        Raises:
            ValueError: the pilot does not reach back that far.
        """
        resolved = [resize(whole, self.modes, self.sides) for whole in self.whole]
        before = round(past / self.span)
        if before >= len(resolved):
            raise ValueError(
                f"a rung reads {past:g} of the resolved past, the pilot holds "
                f"{(len(resolved) - 1) * self.span:g} before the start: raise pilot.spinup"
            )
        stretch = resolved[-1 - before : -1] if before else []
        other = [resolved_at.roll(1, 0) for resolved_at in stretch]
        return Known(resolved[-1], self.whole[-1], stretch, other, self.span)

    def run(
        self, problem: Problem, start: str = "empty", past: float = 0.0, members: int = 1
    ) -> dict[float, Tensor]:
        """Run a bare solver; returns (members, cases, n, n) by lead time.

        Args:
            problem: the solver.
            start: see :func:`~hpc_closure.generate.rungs.begin`.
            past: time for which the resolved past is followed before the start.
            members: runs of each start.
        """
        number = len(self.cases)
        ids = [keyed_noise.pair(case, member) for member in range(members) for case in self.cases]
        simulation = Simulation(problem, ids, self.experiment.seed, stage="rollout")
        rows = torch.arange(number).repeat(members)
        first = round(self.experiment.rollout.t_start / problem.dt)
        begin(simulation, start, self.known(past), rows, first, "rollout", past)
        results, now = {}, 0.0
        for lead in self.leads:
            simulation.advance(problem.steps_in(lead - now))
            now = lead
            resolved = resize(simulation.state, self.modes, self.sides)
            fields = to_fields(resolved, self.grid, self.sides) / self.scale
            results[lead] = fields.unflatten(0, (members, number))
        return results

    def errors(self, ensembles: Mapping[float, Tensor]) -> Tensor:
        """Compute the fair CRPS, (leads, cases); infinite where a member is lost."""
        rows = [crps(fields, self.truth[lead]) for lead, fields in ensembles.items()]
        return torch.stack(rows).nan_to_num(nan=math.inf)

    def spread(self, ensembles: Mapping[float, Tensor]) -> Tensor:
        """Compute the members' standard deviation (leads,), rms over starts and points."""
        return torch.stack([fields.var(0).mean().sqrt() for fields in ensembles.values()])

    def twins(self) -> tuple[Tensor, Tensor]:
        """Compare closures of twins, DNS that are nudged to the same resolved flow.

        Returns:
            Times (T,) since the nudging began, and differences (T,): rms difference of the twins'
            closures over the rms of the closure, rms over the fields of the state.
        """
        times, pilot = self.pilot.times, self.pilot
        nudged = [index for index, time in enumerate(times) if time < pilot.start - 1e-9]
        results = []
        for index in nudged:
            closures = np.stack([pilot.read_case("closure", case, index) for case in self.cases])
            fields = torch.from_numpy(closures).double()  # (cases, members, ...)
            apart = fields.var(1).mean((0, *self.axes))  # of each field of the state
            square = fields.square().mean((0, 1, *self.axes))
            results.append((2 * apart / square).mean().sqrt())
        since = torch.from_numpy(times[nudged] - times[nudged[0]])
        return since, torch.stack(results)

    def informative(self, errors: Tensor) -> Tensor:
        """Select lead times (leads,), bool, at which errors are well below saturation.

        The first lead time is always selected.
        """
        selected = errors.mean(1) < INFORMATIVE * self.saturated
        selected[0] = True
        return selected

    def reduced(self) -> Choice:
        """Find the reduced solver's longest step that changes its errors by at most ``EQUAL``."""
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
        """Choose step and drain of a rung."""
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
        """Choose the longest acceptable stride among the divisors of the closure interval.

        Args:
            run: stride -> ensembles by lead time.
            problem_at: stride -> problem.
            good: (leads,) errors over those at stride 1 -> whether they are acceptable.
        """
        baseline = self.errors(run(1))
        selected = self.informative(baseline)
        strides = [n for n in range(self.interval, 1, -1) if self.interval % n == 0]
        base_cfl = self.cfl(problem_at(1))
        for stride in (n for n in strides if n * base_cfl <= FASTEST[self.sides]):
            errors = self.errors(run(stride))
            if errors.isfinite().all() and good((errors.mean(1) / baseline.mean(1))[selected]):
                return self._choice(problem_at(stride), stride, errors)
        return self._choice(problem_at(1), 1, baseline)

    def _choice(self, problem: Problem, stride: int, errors: Tensor) -> Choice:
        return Choice(stride, self.cfl(problem), errors=self._by_lead(errors))

    def _by_lead(self, errors: Tensor) -> dict[str, float]:
        return {f"{lead:g}": float(error) for lead, error in zip(self.leads, errors.mean(1))}

    def bare(self) -> Problem:
        """Return the reduced solver at its chosen step."""
        stride = Choices(self.experiment).stride
        return reduced_problem(self.problem, self.experiment.train_grid, "subgrid", stride)

    def started(self, problem: Problem, members: int) -> Simulation:
        """Return a solver whose members stand at the starts, cut to the modes of its grid."""
        simulation = Simulation(problem, range(members), self.experiment.seed)
        whole = resize(self.whole[-1], simulation.grid.modes, self.sides)
        rows = torch.arange(members) % len(whole)
        return simulation.load_state(0, whole[rows])

    def any_state(self) -> Tensor:
        """Score the other starts' truths as an uninformed ensemble: fair CRPS, (leads,)."""
        results = []
        for truth in self.truth.values():
            others = [truth.roll(shift, 0) for shift in range(1, len(truth))]
            results.append(crps(torch.stack(others), truth).mean())
        return torch.stack(results)

    def cfl(self, problem: Problem) -> float:
        """Compute the largest CFL number of a solver at the starts."""
        simulation = self.started(problem, len(self.cases))
        grid = simulation.grid
        return float(simulation.speed().max()) * problem.dt * grid.size / grid.length

    def fit_drain(self, grid: int, stride: int) -> list[float]:
        r"""Fit a damping rate to each shell by regressing a solver's defect on its state.

        The defect is the DNS after one interval of length D minus the solver after the same
        interval. If it is, per shell, b times the state, the damping rate is -log(1 + b) / D. All
        fields of a state have the same rates; each counts by its share of its own variance.
        """
        problem = rung_problem(self.problem, grid, stride)
        simulation = Simulation(problem, range(len(self.cases)), 0)
        modes, grid_of_solver = simulation.grid.modes, simulation.grid
        product = power = torch.zeros(())
        for before, after in zip(self.whole[:-1], self.whole[1:]):
            start, end = (resize(spectra, modes, self.sides) for spectra in (before, after))
            simulation.load_state(0, start).advance(problem.steps_in(self.span))
            defect = end - simulation.state
            product = product + grid_of_solver.shell_sum((defect * start.conj()).real).sum(0)
            power = power + grid_of_solver.shell_sum(start.abs().square()).sum(0)
        if product.ndim > 1:  # channels have units of their own
            total = power.sum(-1, keepdim=True).clamp(min=1e-300)
            product, power = ((part / total).sum(0) for part in (product, power))
        energetic = power > JUDGED * power.sum()
        factor = torch.where(energetic, 1 + product / power.clamp(min=1e-300), 1.0)
        return (-factor.clamp(min=LEAST).log() / self.span).tolist()
