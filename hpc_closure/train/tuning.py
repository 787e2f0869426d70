"""Constants of a functional closure, tuned in coupled runs of the validation trajectories.

Every choice runs in the reduced solver from the state of ``rollout.t_start``, as the coupled run
would call it; the best has the least mean absolute error of the vorticity over that of the bare
solver, averaged over lead times.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hpc_closure.closure.functional import FunctionalModel, candidates
from hpc_closure.closure.targets import advance_with, reduced_problem
from hpc_closure.experiment.schema import Experiment
from hpc_closure.spectral.grid import resize
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.work.stop import Stop

if TYPE_CHECKING:
    from hpc_closure.data.reader import DataSet

CALLS = 40  # closure calls at most: farther no choice tells from another
TRAJECTORIES = 16  # at most


def tune(
    model: FunctionalModel, experiment: Experiment, store: "DataSet", stop: Stop | None = None
) -> str:
    """Choose ``model.constants``; returns in words how well they do.

    Raises:
        Stopped: asked to stop; nothing is kept.
    """
    options = candidates(model.config)
    trial = Trial(model, experiment, store)
    scores = trial.scores(options, stop or Stop())
    best = int(torch.where(scores.isfinite(), scores, math.inf).argmin())
    model.constants = options[best]
    named = " ".join(f"{value:g}" for value in model.constants) or "the flow's"
    return (
        f"constants {named}: error {float(scores[best]):.3f} of the bare solver's over "
        f"{trial.calls * trial.interval * trial.dt:g} time units, {len(trial.members)} validation "
        f"trajectories, {len(options)} choice(s)"
    )


class Trial:
    """Coupled runs of the validation trajectories.

    Args:
        model: whose tendency is called.
        experiment: of the reduced solver and its calls.
        store: the DNS.
    """

    def __init__(self, model: FunctionalModel, experiment: Experiment, store: "DataSet"):
        self.model, self.kind = model, experiment.generate.closure
        self.interval, self.dt = experiment.rollout.interval, experiment.generate.dt
        self.members = store.split(experiment.train.split)["valid"][:TRAJECTORIES]
        self.grid, self.seed = experiment.train_grid, experiment.seed
        self.problem = reduced_problem(experiment.problem, self.grid, self.kind)
        first = store.time_index(experiment.rollout.t_start)
        self.first_step = round(float(store.times[first]) / self.dt)
        every = self.interval * self.dt
        self.truth: dict[int, np.ndarray] = {}  # by closure call
        for index in range(first, len(store.times)):
            calls = (store.times[index] - store.times[first]) / every
            if calls <= CALLS and abs(calls - round(calls)) < 1e-6:
                fields = [store.read(m, index, "vorticity", self.grid) for m in self.members]
                self.truth[round(calls)] = np.stack(fields).astype(np.float64)
        self.calls = max(self.truth)

    def scores(self, options: list[tuple[float, ...]], stop: Stop) -> Tensor:
        """(options,) mean over lead times of the error over the bare solver's; NaN if it ends."""
        count, runs = len(self.members), len(options) + 1  # the last is the bare solver
        numbers = torch.tensor([*options, (0.0,) * len(options[0])], dtype=torch.float64)
        constants = numbers.repeat_interleave(count, 0).T[..., None, None]
        simulation = Simulation(self.problem, range(runs * count), self.seed)
        start = simulation.transform.to_spectral(torch.from_numpy(self.truth[0]))
        simulation.load_state(self.first_step, start.repeat(runs, 1, 1))
        acts = torch.ones(runs * count, 1, 1)
        acts[-count:] = 0
        modes, errors = simulation.grid.modes, []
        for call in range(1, self.calls + 1):
            stop.check()
            state = resize(simulation.state, self.model.band.modes)
            tendency = resize(self.model.tendency(state, list(constants)), modes) * acts
            advance_with(simulation, self.kind, self.interval, tendency)
            if call in self.truth:
                fields = simulation.transform.to_physical(simulation.state)
                error = fields.unflatten(0, (runs, count)) - torch.from_numpy(self.truth[call])
                errors.append(error.abs().mean((1, 2, 3)))
        found = torch.stack(errors)
        return (found[:, :-1] / found[:, -1:]).mean(0)
