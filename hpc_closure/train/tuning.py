"""Constants of a functional closure, tuned in coupled runs of the validation trajectories.

Every candidate runs in the reduced solver from the state of ``rollout.t_start``, with the calls of
the coupled run. A candidate's error is the mean absolute error of the state over that of the
bare solver, averaged over lead times and over the fields of the state. The candidate of least
error is chosen among those that lose no trajectory in a longer run, because backscatter can
diverge long after the lead times at which errors differ.

The constants of a random part (:attr:`Baseline.later`) are chosen afterwards, with the others
fixed. Then ``COPIES`` members run from every start, under noise that is the same for all
candidates, and the error is their fair CRPS, which of one member is the absolute error.
"""

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hpc_closure.closure.baselines.functional import FunctionalModel
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.losses import crps
from hpc_closure.closure.targets import advance_with, reduced_problem
from hpc_closure.experiment.choices import Choices
from hpc_closure.experiment.schema import Experiment
from hpc_closure.spectral.ensemble import Ensemble
from hpc_closure.spectral.modes.grid import resize
from hpc_closure.spectral.simulation import simulation_of
from hpc_closure.work.stop import Stop

if TYPE_CHECKING:
    from hpc_closure.data.reader import DataSet

CALLS = 40  # largest number of scored closure calls; at later ones candidates do not differ
STAGE = "tuning"  # of the keys of random parts
TRAJECTORIES = 16  # largest number of trajectories
COPIES = 4  # members per trajectory of a candidate that draws
NUMBERS = 1 << 25  # largest number of values of the states that run at once
LONGER = 3  # length of the stability run over that of the scored run


def tune(
    model: FunctionalModel, experiment: Experiment, store: "DataSet", stop: Stop | None = None
) -> str:
    """Choose ``model.constants``; returns a line on their error for the log.

    Raises:
        Stopped: a stop was requested; the constants are unchanged.
    """
    options = model.baseline.candidates(model.config)
    trial = Trial(model, experiment, store)
    stop = stop or Stop()
    scores = trial.scores(options, stop)
    if model.baseline.draws and model.baseline.later:
        # the others are those of least error; without noise nothing of theirs is lost
        best = options[int(torch.where(scores.isfinite(), scores, math.inf).argmin())]
        options = model.baseline.candidates(model.config, best)
        trial.copies = COPIES
        scores = trial.scores(options, stop)
    order = torch.where(scores.isfinite(), scores, math.inf).argsort().tolist()
    lost = list(itertools.takewhile(lambda index: not trial.holds(options[index], stop), order))
    best = order[len(lost)] if len(lost) < len(order) else order[0]
    model.constants = options[best]
    named = " ".join(f"{value:g}" for value in model.constants) or "the flow's"
    span = trial.calls * trial.interval * trial.dt
    summary = (
        f"constants {named}: error {float(scores[best]):.3f} of the bare solver's over {span:g} "
        f"time units, {len(trial.members)} validation trajectories, {len(options)} choice(s)"
    )
    if lost:
        which = "all" if len(lost) == len(order) else f"{len(lost)} better choice(s)"
        summary += f"; {which} lose a trajectory within {LONGER * span:g}"
    return summary


class Trial:
    """Coupled runs of the validation trajectories.

    Args:
        model: the closure.
        experiment: experiment with the reduced solver and its calls.
        store: the DNS.
    """

    def __init__(self, model: FunctionalModel, experiment: Experiment, store: "DataSet"):
        self.model, self.kind = model, experiment.generate.closure
        self.interval, self.dt = experiment.rollout.interval, experiment.generate.dt
        self.members = store.split(experiment.train.split)["valid"][:TRAJECTORIES]
        self.grid, self.seed = experiment.train_grid, experiment.seed
        stride = Choices(experiment).stride
        self.problem = reduced_problem(experiment.problem, self.grid, self.kind, stride)
        first = store.time_index(experiment.rollout.t_start)
        self.first_step = round(float(store.times[first]) / self.dt)
        time_per_call = self.interval * self.dt
        self.truth: dict[int, np.ndarray] = {}  # by closure call
        for index in range(first, len(store.times)):
            calls = (store.times[index] - store.times[first]) / time_per_call
            if calls <= CALLS and abs(calls - round(calls)) < 1e-6:
                fields = [store.read(m, index, "state", self.grid) for m in self.members]
                self.truth[round(calls)] = np.stack(fields).astype(np.float64)
        self.calls = max(self.truth)
        self.copies = 1

    def scores(self, options: list[tuple[float, ...]], stop: Stop) -> Tensor:
        """Compute errors (options,) over the bare solver's, mean over lead times.

        A diverged run gives NaN.
        """
        most = NUMBERS // (self.copies * self.truth[0].size) - 1
        if len(options) > max(1, most):
            parts = [options[i : i + max(1, most)] for i in range(0, len(options), max(1, most))]
            return torch.cat([self.scores(part, stop) for part in parts])
        # the last run is the bare solver
        runs, errors = len(options) + 1, []
        for call, simulation in self._run([*options, (0.0,) * len(options[0])], True, stop):
            if call in self.truth:
                fields = simulation.transform.to_physical(simulation.state)
                errors.append(self._errors(fields.unflatten(0, (runs, self.copies, -1)), call))
            if call == self.calls:
                break
        stacked = torch.stack(errors)
        ratios = (stacked[:, :-1] / stacked[:, -1:]).mean(0)
        return ratios if ratios.ndim == 1 else ratios.mean(1)

    def _errors(self, fields: Tensor, call: int) -> Tensor:
        """Compute errors (runs,), or (runs, C), of fields (runs, copies, trajectories, ...)."""
        error = fields - torch.from_numpy(self.truth[call])
        axes = tuple(range(-self.problem.dimensions, 0))
        if self.copies == 1:
            return error[:, 0].abs().mean((1, *axes))
        # one score per run, trajectory and channel
        each = error.movedim(1, 0)
        shape = each.shape[1 : axes[0]]
        each = each.flatten(1, axes[0] - 1)
        return crps(each, torch.zeros_like(each[0])).view(shape).mean(1)

    def holds(self, option: tuple[float, ...], stop: Stop) -> bool:
        """Return whether no trajectory is lost in a longer run."""
        for call, simulation in self._run([option], False, stop):
            if call % self.calls == 0 and bool(simulation.diverged().any()):
                return False
            if call == LONGER * self.calls:
                break
        return True

    def _run(
        self, options: list[tuple[float, ...]], last_is_bare: bool, stop: Stop
    ) -> Iterator[tuple[int, Ensemble]]:
        """Run every option from every start; yields the closure calls taken and the simulation."""
        count, runs = len(self.members) * self.copies, len(options)
        simulation = simulation_of(self.problem, range(runs * count), self.seed)
        start = simulation.transform.to_spectral(torch.from_numpy(self.truth[0]))
        one = [1] * (start.ndim - 1 - self.model.layered)
        constants = [
            torch.tensor(values, dtype=torch.float64).repeat_interleave(count).view(-1, *one)
            for values in zip(*options)
        ]
        simulation.load_state(self.first_step, torch.cat([start] * (runs * self.copies)))
        acts = torch.ones(runs * count, *(1,) * (start.ndim - 1))
        if last_is_bare:
            acts[-count:] = 0
        grid = simulation.grid
        for call in itertools.count(1):
            stop.check()
            state = self.model.band.resized(simulation.state)
            tendency = self.model.tendency(state, constants)
            if self.model.baseline.draws:
                tendency = tendency + self._noise(state, options, constants, call)
            tendency = resize(tendency, grid.mode_counts) * acts
            advance_with(simulation, self.kind, self.interval * self.dt, tendency)
            yield call, simulation

    def _noise(
        self, state: Tensor, options: list[tuple[float, ...]], constants: list[Tensor], call: int
    ) -> Tensor:
        """Draw the random parts of all runs; a trajectory's copy has the same noise in each."""
        copies, members = range(self.copies), self.members
        ids = [keyed_noise.pair(member, copy) for copy in copies for member in members]
        each, out = len(ids), torch.zeros_like(state)
        for run, option in enumerate(options):
            rows = slice(run * each, (run + 1) * each)
            key = keyed_noise.Key(self.seed, STAGE, ids, call)
            own, memory = [one[rows] for one in constants], self.model.baseline.memory(*option)
            out[rows] = self.model.random_part(state[rows], key, own, memory)
        return out
