"""Coupled runs: the closure inside the reduced solver, beside the truth and reference solvers.

One :class:`CoupledRun` advances, from the same resolved state,

* ``model``: the reduced solver. A new sample of the closure is drawn every ``interval`` steps and
  held constant in between. The closure accounts for the interval: an m-step mean of white noise
  has 1/m of its variance, so the spread of the run does not depend on m. A subgrid closure is
  added once, after the solver's interval. It is drawn of the state before the interval or, with
  ``conditions.forecast``, of the state after it.
* ``oracle``: the full system with independent noise in every step (and a new regime in every
  interval). This is the exact law, the true ensemble. With sensors it is the reduced solver with
  draws of the exact law conditioned on the readings, once per interval as in ``model``. This is
  what a perfect closure would do.
* ``mean_gp``: the reduced solver with draws of the closure's mean plus its Gaussian law, without
  the generator. Its difference from ``model`` is the contribution of the generator.
* ``none``: the reduced solver without a closure. If members begin in different states, it is run
  from each of these states.
* rungs (:mod:`~hpc_closure.generate.rungs`): bare solvers on finer grids, with the stochastic
  forcing that they resolve. Each has its own step, initial state and drain.
* ``truth``: the test trajectory. Sensors read it: they give point values of the mean closure over
  the coming interval. For a subgrid closure it is not run again: its closures are read from the
  stored data.

If a run has no random draws, all members of a start are identical. Then one member is run, its
time counts for each member, and its fields are repeated.

States and closures are passed as retained spectra. Fields are formed where sensors read and where
states are written.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from hpc_closure.closure.compatibility import has_mean_gp, has_noise
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.sensors import Sensors, observe
from hpc_closure.closure.gaussian.exact import ExactLaw
from hpc_closure.closure.process import Memory, Process
from hpc_closure.closure.targets import Target, advance_with, corrected_by, reduced_problem
from hpc_closure.data.layout import COUNTED
from hpc_closure.experiment.choices import Choice
from hpc_closure.experiment.schema import Rollout, Rung
from hpc_closure.generate import rungs
from hpc_closure.rollout.tally import Tally
from hpc_closure.spectral.ensemble import Ensemble
from hpc_closure.spectral.modes.grid import resize
from hpc_closure.spectral.problem import REMOVABLE, Problem
from hpc_closure.spectral.simulation import Simulation, simulation_of
from hpc_closure.work import log

BY_STATE, BY_CLOSURE = 0, 1
REASONS = ("its state diverged", "its closure is not finite")
# keys in a restart file of what a process keeps, by run
KEYS = {
    "states": {"model": "past", "mean_gp": "past_mean_gp"},
    "closures": {"model": "drawn", "mean_gp": "drawn_mean_gp"},
}


@dataclass(frozen=True)
class Coupling:
    """Systems and settings of a coupled run.

    Attributes:
        problem: the full system.
        kind: closure kind.
        grid: points per side of the reduced solver.
        seed: seed of the experiment.
        rollout: the experiment's section, or an object with its ``interval`` (solver steps between
            closure calls), ``sensors``, ``sampler`` and ``references``. A requested ``oracle`` is
            run only if the exact law is known, ``mean_gp`` only if the closure has it.
        memory: earlier states and closures that the closure reads.
        device: torch device.
        stride: steps of the full system per step of the reduced solver.
        begin: initial state of those modes of the reduced solver that a start does not know, see
            :func:`~hpc_closure.generate.rungs.begin`; None if it knows all of them.
        rungs: bare solvers, each with its step and drain.
        pasts: time for which each run follows the resolved past, by name.
        stored_closures: step -> closures (cases, n, n) of the interval that begins there, of the
            test trajectories; read by sensors of a subgrid closure, else None.
        closure_rms: root mean square of each field of the closure, of which the sensors' errors
            are a multiple; None = that of the closures read.
    """

    problem: Problem
    kind: str
    grid: int
    seed: int
    rollout: Rollout
    memory: Memory = Memory()
    device: str = "cpu"
    stride: int = 1
    begin: str | None = None
    rungs: Sequence[tuple[Rung, Choice]] = ()
    pasts: Mapping[str, float] = field(default_factory=dict)
    stored_closures: Callable[[int], torch.Tensor] | None = None
    closure_rms: torch.Tensor | None = None

    @property
    def span(self) -> float:
        """Length of a closure interval in time units."""
        return self.rollout.interval * self.problem.dt


@dataclass
class Losses:
    """Lost (diverged) trajectories of a run, on its device; ``told`` is on the host.

    Attributes:
        lost: (rows,) bool.
        since: (rows,) solver step at which the loss was detected.
        reason: (rows,) BY_STATE or BY_CLOSURE.
        logged: (rows,) bool, rows whose loss has been logged.
    """

    lost: torch.Tensor
    since: torch.Tensor
    reason: torch.Tensor
    logged: torch.Tensor

    @classmethod
    def none(cls, rows: int, device: str) -> "Losses":
        """Return a record of ``rows`` trajectories of which none is lost."""
        lost = torch.zeros(rows, dtype=torch.bool, device=device)
        steps = torch.zeros(rows, dtype=torch.int64, device=device)
        return cls(lost, steps, steps.clone(), torch.zeros(rows, dtype=torch.bool))

    def add(self, diverged: torch.Tensor, step: int, reason: int) -> torch.Tensor:
        """Mark rows (rows,) bool as lost at a step; returns all lost rows."""
        new = diverged & ~self.lost
        self.since = torch.where(new, step, self.since)
        self.reason = torch.where(new, reason, self.reason)
        self.lost = self.lost | diverged
        return self.lost

    def take(self, diverged: torch.Tensor, step: int) -> None:
        """Set the lost rows, as after a restart, and count them as logged."""
        self.lost = diverged
        self.logged = diverged.cpu()

    def describe_new(self, rows: Sequence[tuple[int, int]], dt: float) -> str:
        """Describe rows lost since the last call, "" if none; the host waits for the device."""
        lost = self.lost.cpu()
        new = (lost & ~self.logged).nonzero()[:, 0]
        self.logged = lost
        if not len(new):
            return ""
        since, reason = self.since.cpu(), self.reason.cpu()
        first = int(new[since[new].argmin()])
        case, member = rows[first]
        then, why = int(since[first]) * dt, REASONS[int(reason[first])]
        return (
            f"{int(lost.sum())} of {len(lost)} trajectories lost at t = {then:g} (the first now: "
            f"start {case}, member {member}: {why})"
        )


@dataclass(frozen=True)
class Rows:
    """Simulated trajectories of a run, and their relation to the rows of the ensemble.

    Attributes:
        each: (case, member) of every simulated trajectory.
        case: (len(each),) index of its start among the cases.
        whole: (rows,) index into ``each`` of every row of the ensemble; None if all are simulated.
    """

    each: list[tuple[int, int]]
    case: torch.Tensor
    whole: torch.Tensor | None = None

    @classmethod
    def of(cls, rows: list[tuple[int, int]], cases: list[int], drawn: bool) -> "Rows":
        """Simulate all rows if members differ (``drawn``), else the first row of every start."""
        if drawn:
            return cls(rows, torch.tensor([cases.index(case) for case, _ in rows]))
        first = dict(reversed(rows))
        once = [row for row in rows if first[row[0]] == row[1]]
        place = {case: number for number, (case, _) in enumerate(once)}
        one = cls.of(once, cases, True)
        return cls(once, one.case, torch.tensor([place[case] for case, _ in rows]))

    @property
    def ids(self) -> list[int]:
        """Ids in the keys of the draws; they differ between cases and between members."""
        return [keyed_noise.pair(case, member) for case, member in self.each]

    @property
    def stand_for(self) -> float:
        """Rows of the ensemble per simulated trajectory, on average."""
        return 1.0 if self.whole is None else len(self.whole) / len(self.each)


class CoupledRun:
    """Advance model, references, rungs and truth side by side.

    Args:
        coupling: the systems and settings.
        closure: object with ``sample_hat(request)``, ``interval_ratio`` and
            ``averaging_steps``, as
            :class:`~hpc_closure.closure.artifact.Closure`; and ``config`` for ``mean_gp``.
        rows: (case, member) of every trajectory of the ensembles.
        cases: test trajectories, member indices of the data set.
    """

    def __init__(
        self, coupling: Coupling, closure, rows: Sequence[tuple[int, int]], cases: Sequence[int]
    ):
        self.coupling, self.closure, self.calls, self._first = coupling, closure, 0, 0
        self.rows, self.cases = list(rows), list(cases)
        rollout, problem, kind = coupling.rollout, coupling.problem, coupling.kind
        self.interval, self.layout, self.seed = rollout.interval, rollout.sensors, coupling.seed
        averaging_steps = closure.averaging_steps(self.interval)
        self.memory = coupling.memory
        reduced = reduced_problem(problem, coupling.grid, kind, coupling.stride)
        full = problem.replace(grid=coupling.grid)
        self.exact = kind in REMOVABLE
        self.target = Target(kind, averaging_steps) if self.exact else None
        self.seconds = {"solver": 0.0, "closure": 0.0, "references": 0.0}
        self.simulations: dict[str, Ensemble] = {}
        self.rows_of: dict[str, Rows] = {}
        self.apart = rollout.after_release > 0  # members begin in different states
        self.moved = not self.apart and rollout.last_closures == "moved"
        # further modes that a start does not know begin at another place in every member
        moved_modes = coupling.begin not in (None, "empty")
        differ = self.apart or moved_modes or self.moved and bool(self.memory.previous)
        self._run_members("model", reduced, drawn=differ or has_noise(closure.config))
        if "mean_gp" in rollout.baselines and has_mean_gp(closure.config):
            self._run_members("mean_gp", reduced)
        #: the closure of each run that has one
        self.processes = {name: self._process(name) for name in self.simulations}
        self.losses = {
            name: Losses.none(len(rows.each), coupling.device)
            for name, rows in self.rows_of.items()
        }
        shells = getattr(closure, "guarded", 0)
        self.tallies = {
            name: Tally(len(rows.each), shells, coupling.device)
            for name, rows in self.rows_of.items()
        }
        if "none" in rollout.baselines and self.apart:
            self._run_members("none", reduced)
        elif "none" in rollout.baselines:
            self.simulations["none"] = self._simulation(reduced, self.cases)
        self.rungs = {rung.name: rung for rung, _ in coupling.rungs}
        for rung, choice in coupling.rungs:
            own = rungs.rung_problem(problem, rung.grid, choice.stride, choice.drain)
            drawn = own.physics.is_random or rung.start != "empty"
            self._run_members(rung.name, own, "rollout", drawn=drawn)
            self.seconds[rung.name] = 0.0
        # law of the oracle with sensors; if it has no closed form, there is no oracle
        free = self.layout is None
        self.law = None if free else ExactLaw.of(full, kind, averaging_steps)
        if "oracle" in rollout.baselines and self.exact and (free or self.law is not None):
            driven = full if free else reduced
            self._run_members("oracle", driven, "rollout")
        if self.exact:
            self.simulations["truth"] = self._simulation(full, self.cases)

    def _run_members(self, name, problem, stage="generate", drawn=True) -> None:
        """Add a run of the ensemble's rows; ``drawn``: its members differ."""
        self.rows_of[name] = rows = Rows.of(self.rows, self.cases, drawn)
        self.simulations[name] = self._simulation(problem, rows.ids, stage)

    def _process(self, name: str) -> Process:
        """Return the closure of ``model``, or of ``mean_gp``, as a process in time."""
        sampler = self.coupling.rollout.sampler.options()
        return Process(
            self.closure,
            self.rows_of[name].ids,
            self.seed,
            self.interval,
            memory=self.memory,
            sampler={"method": "mean_gp"} if name == "mean_gp" else sampler,
            grid=self.coupling.grid,
        )

    def _simulation(self, problem, members, stage="generate") -> Ensemble:
        return simulation_of(problem, members, self.seed, device=self.coupling.device, stage=stage)

    def _initial_index(self, name: str) -> torch.Tensor:
        """Return the index of the initial state of each trajectory of a run, (rows,)."""
        if self.apart or name not in self.rows_of:
            return torch.arange(len(self.rows) if self.apart else len(self.cases))
        return self.rows_of[name].case

    @property
    def step_index(self) -> int:
        """Steps of the full system since t = 0."""
        return self._first + self.calls * self.interval

    def start(
        self,
        states: np.ndarray,
        step: int,
        earlier: Iterable[np.ndarray] = (),
        closures: Sequence[np.ndarray] = (),
        known: rungs.Known | None = None,
    ) -> None:
        """Start every run from the test trajectories' states, (cases, n, n), at ``step``.

        With ``rollout.after_release`` each row has a separate state and past, (rows, n, n).

        Args:
            states: (cases, n, n) at the start.
            step: step of the full system at the start.
            earlier: ``frames x lag`` states before it, one closure interval apart, oldest first.
            closures: the last ``previous`` closures before it, newest first.
            known: spectra of the starts that rungs read; None = ``states`` only.
        """
        spectra, self._first, self.calls = self._spectra(states), step, 0
        known = known or rungs.Known(spectra)
        begin = self.coupling.begin
        for name, simulation in self.simulations.items():
            own_step = round(step * self.coupling.problem.dt / simulation.problem.dt)
            rows = self._initial_index(name)
            how = self.rungs[name].start if name in self.rungs else begin
            if name in self.processes and how == "synchronised":
                how = "moved"  # _follow synchronises it below, with its closure
            if how is not None:
                past = self.coupling.pasts.get(name, 0.0)
                rungs.begin(simulation, how, known, rows, own_step, "rollout", past)
                continue
            simulation.load_state(own_step, resize(spectra[rows], simulation.grid.mode_counts))
        for process in self.processes.values():
            process.clear()
        for tally in self.tallies.values():
            tally.clear()
        for fields in earlier:
            frame = self._spectra(fields)
            for name, process in self.processes.items():
                process.states.append(frame[self._initial_index(name)])
        moves: torch.Tensor | float = 1.0
        if len(closures) and self.moved:
            grid, ids = self.simulations["model"].grid, self.rows_of["model"].ids
            moves = keyed_noise.moves(grid, self.seed, "rollout", ids).to(spectra)
            moves = moves[:, None] if self.simulations["model"].channel_shape else moves
        for fields in closures:
            frame = self._spectra(fields)
            for name, process in self.processes.items():
                process.closures.append(frame[self._initial_index(name)] * moves)
        if begin == "synchronised":
            self._follow(known)

    def _follow(self, known: rungs.Known) -> None:
        """Let runs with a closure follow the resolved past from a moved start.

        The closure acts, and after every interval the resolved modes are overwritten. Its draws
        advance the call number but are not counted as draws of the scored run. The correction by
        the overwriting is not added to the last closures: it is mostly the error of the unresolved
        modes, far larger than a closure of the resolved ones.
        """
        number = round(self.coupling.pasts.get("model", 0.0) / known.every)
        first, *frames = [*known.past[len(known.past) - number :], known.now]
        begun = self.simulations["model"].step_index
        self._first -= number * self.interval
        for name in self.processes:
            rungs.impose(self.simulations[name], first[self.rows_of[name].case])
        for resolved in frames:
            for name in self.processes:
                simulation, rows = self.simulations[name], self.rows_of[name].case
                self._advance_closed(name, None)
                rungs.impose(simulation, resolved[rows])
            self.calls += 1
        for name in self.processes:
            self.simulations[name].load_state(begun, self.simulations[name].state)
            self.tallies[name].clear()

    def _spectra(self, fields: np.ndarray) -> torch.Tensor:
        """Transform fields (cases, n, n) to spectra."""
        transform = self.simulations["model"].transform
        tensor = torch.as_tensor(fields, device=self.coupling.device)
        return transform.to_spectral(tensor)

    def advance(self, calls: int = 1) -> None:
        """Advance all runs by ``calls`` closure intervals, then log the members that diverged."""
        for _ in range(calls):
            self._interval()
        for name, losses in self.losses.items():
            if message := losses.describe_new(self.rows_of[name].each, self.coupling.problem.dt):
                log.get().warning(f"{name}: {message}; the others go on")

    def _interval(self) -> None:
        begun = time.perf_counter()
        sensors = self._advance_truth()
        span = self.coupling.span
        for name in ("oracle", "none"):
            if name in self.simulations:
                tendency = self._exact_hat(sensors) if name == "oracle" else None
                run = self.simulations[name]
                run.advance(run.problem.steps_in(span), tendency_hat=tendency)
        if "mean_gp" in self.simulations:
            self._advance_closed("mean_gp", sensors)
        for name in self.rungs:
            begin, run = time.perf_counter(), self.simulations[name]
            run.advance(run.problem.steps_in(span))
            spent = time.perf_counter() - begin
            self.seconds[name] += spent * self.rows_of[name].stand_for
        references = time.perf_counter()
        closure = self._advance_closed("model", sensors)
        stand_for = self.rows_of["model"].stand_for
        self.seconds["references"] += references - begun
        self.seconds["closure"] += closure * stand_for
        self.seconds["solver"] += (time.perf_counter() - references - closure) * stand_for
        self.calls += 1

    def _advance_closed(self, name: str, sensors: Sensors | None) -> float:
        """Advance ``model`` or ``mean_gp`` by an interval; returns the seconds of its closure."""
        simulation, spent = self.simulations[name], 0.0

        def draw() -> torch.Tensor:
            nonlocal spent
            begun = time.perf_counter()
            tendency = self._tendency_hat(name, sensors)
            spent = time.perf_counter() - begun
            return tendency

        if self.processes[name].reads_forecast:
            corrected_by(simulation, self.coupling.span, draw)
        else:
            advance_with(simulation, self.coupling.kind, self.coupling.span, draw())
        return spent

    def _exact_hat(self, sensors: Sensors | None) -> torch.Tensor | None:
        """Draw the oracle's closures from the exact law given the sensors; None without sensors.

        Returns (rows, ...) spectra.
        """
        if self.law is None:
            return None
        state, rows = self.simulations["oracle"].state, self.rows_of["oracle"]
        sensors = sensors and sensors.rows(rows.case)
        return self.law.draw_hat(state, rows.ids, self.seed, self.calls, sensors).to(state)

    def _tendency_hat(self, name: str, sensors: Sensors | None) -> torch.Tensor:
        """Draw a closure for every row of ``model`` or ``mean_gp``, (rows, ...) spectra.

        A row that has diverged is NaN from then on. The host reads nothing here, so that it does
        not wait for the device.
        """
        losses, rows = self.losses[name], self.rows_of[name]
        lost = losses.add(self.simulations[name].diverged(), self.step_index, BY_STATE)
        state = self.simulations[name].state
        gone_rows = lost.view(-1, *[1] * (state.ndim - 1))
        state = torch.where(gone_rows, 0.0, state)  # closures read finite states
        tally, gone, process = self.tallies[name], lost, self.processes[name]
        drawn = process.draw_hat(
            state,
            sensors and sensors.rows(rows.case),
            on_rescaled=(lambda beyond: tally.add(beyond, gone)) if tally.columns else None,
        )
        lost = losses.add(process.failed, self.step_index, BY_CLOSURE).view(gone_rows.shape)
        return torch.where(lost, torch.nan, drawn)

    def _advance_truth(self) -> Sensors | None:
        """Advance the truth by one interval; returns readings of its mean closure, (cases, S).

        If a draw is a mean over fewer steps than it is held, the mean is over the first of them.
        """
        if self.target is None:
            return None if self.layout is None else self._stored_readings()
        truth = self.simulations["truth"]
        assert isinstance(truth, Simulation)
        if self.layout is None:
            truth.advance(self.interval)
            return None
        closure = truth.transform.to_physical(self.target.compute(truth))
        truth.advance(self.interval - self.target.lookahead)
        lengths = truth.problem.lengths
        return observe(closure, self.layout, self.seed, self.cases, self.calls, lengths)

    def _stored_readings(self) -> Sensors:
        """Read the stored closures of the test trajectories over the coming interval."""
        coupling = self.coupling
        assert coupling.stored_closures is not None
        closure = coupling.stored_closures(self.step_index).to(coupling.device)
        return observe(
            closure,
            self.layout,
            self.seed,
            self.cases,
            self.calls,
            coupling.problem.lengths,
            coupling.closure_rms,
        )

    def fields(self) -> dict[str, torch.Tensor]:
        """Return the present state of every run on the reduced solver's grid.

        Shape (trajectories, n, n); on a line (trajectories, n).
        """
        model, fields = self.simulations["model"], {}
        for name, run in self.simulations.items():
            field = model.transform.to_physical(resize(run.state, model.grid.mode_counts))
            rows = self.rows_of.get(name)
            fields[name] = field if rows is None or rows.whole is None else field[rows.whole]
        return fields

    def rescaled_counts(self) -> dict[str, np.ndarray]:
        """Return the counts (rows, 2 + shells) of :class:`Tally`, by their name in products.

        Contains the runs whose draws may be rescaled, with a row for every row of the ensemble.
        """
        counted = {}
        for name, tally in self.tallies.items():
            if tally.columns:
                counts, index = tally.save(), self.rows_of[name].whole
                counted[COUNTED[name]] = counts if index is None else counts[index.numpy()]
        return counted

    def save_state(self) -> dict:
        """Return the state of all runs as numpy arrays; ``load_state`` continues bit for bit."""
        saved: dict = {"calls": np.int64(self.calls), "first": np.int64(self._first)}
        for name, tally in self.tallies.items():
            if tally.columns:
                saved[COUNTED[name]] = tally.save()
        for name, process in self.processes.items():
            state = process.state_dict()
            saved |= {key[name]: state[part] for part, key in KEYS.items() if part in state}
        for name, simulation in self.simulations.items():
            for key, value in simulation.save_state().items():
                saved[f"{name}.{key}"] = value
        return saved

    def load_state(self, state: dict) -> None:
        self.calls = int(state["calls"])
        taken = self.calls * self.interval
        # restart files written before the reduced solver had its own step have no "first"
        self._first = int(state.get("first", int(state["model.step_index"]) - taken))
        for name, tally in self.tallies.items():
            if COUNTED[name] in state:  # older restart files have no counts
                tally.load(state[COUNTED[name]])
        for name, process in self.processes.items():
            # restart files of older versions hold a line as a plane of one row
            shape = tuple(self.simulations[name].state.shape)
            parts = {
                part: np.reshape(state[key[name]], (-1, *shape))
                for part, key in KEYS.items()
                if key[name] in state
            }
            own = {"calls": self.calls, **process.identity, **parts}
            process.load_state_dict(own, self.coupling.device)
        for name, simulation in self.simulations.items():
            prefix = f"{name}."
            stored = {key: value for key, value in state.items() if key.startswith(prefix)}
            simulation.load_state(**{key.removeprefix(prefix): stored[key] for key in stored})
            if name in self.losses:
                self.losses[name].take(simulation.diverged(), self.step_index)
