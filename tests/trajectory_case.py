"""A small subgrid problem in memory, and closures that are to be trained through its solver."""

from functools import lru_cache

import numpy as np
import torch

from hpc_closure.closure.artifact import build
from hpc_closure.closure.fitting.coupled_phases import train_through
from hpc_closure.closure.fitting.rollout_training import RolloutLoss
from hpc_closure.closure.model import RolloutTraining
from hpc_closure.closure.targets import Target, reduced_problem
from hpc_closure.data.samples import Past, TrainingSet
from hpc_closure.spectral.modes.grid import resize, to_fields
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.train.trainer import TrainData

GRID, INTERVAL, PREVIOUS, SEED = 16, 20, 2, 4
PROBLEM = Problem(
    grid=32,
    dt=4e-3,
    scheme="cn_ab2",
    viscosity=0.0,
    hyperviscosity=1e-13,
    hyperviscosity_order=4,
    drag=0.05,
    noise={"kind": "ring", "wavenumber": 9, "width": 1, "energy_rate": 1e-3},
    initial={"kind": "band", "wavenumber": 3, "width": 2, "energy": 0.01},
)
REDUCED = reduced_problem(PROBLEM, GRID, "subgrid")


class DNS:
    """Members of PROBLEM at consecutive closure calls, as a data set."""

    def __init__(self, members: int, times: int):
        self.members, self.grid, self.dimensions = range(members), GRID, 2
        self.channels: tuple = ()
        self.times = np.arange(times) * INTERVAL * PROBLEM.dt
        simulation = Simulation(PROBLEM, self.members, SEED).initialise().advance(100)
        target, states, closures = Target("subgrid", INTERVAL, REDUCED), [], []
        for _ in range(times):
            states.append(to_fields(resize(simulation.state, 5), GRID))
            closures.append(to_fields(target.compute(simulation), GRID))
        self.fields = {
            name: torch.stack(each, 1).float().numpy()
            for name, each in (("state", states), ("closure", closures))
        }

    def read(self, member, index, field="state", grid=None):
        return self.fields[field][member, index]


@lru_cache(maxsize=1)
def dns() -> DNS:
    return DNS(16, 30)


def data() -> TrainData:
    parts = (
        TrainingSet(dns(), members, past=Past(closures=PREVIOUS), seed=1)
        for members in (range(12), range(12, 16))
    )
    return TrainData(*parts)


def trajectories(members: int = 2, precision: str = "float32") -> RolloutLoss:
    made = RolloutLoss(PROBLEM, GRID, "subgrid", INTERVAL, members, energy=0.5)
    made.problem = made.problem.replace(precision=precision)
    return made


def model(preset: str = "convolutional", precision: str = "float32", **settings):
    """A model that is to be trained through the solver; nothing of it is fitted yet."""
    torch.manual_seed(0)
    conditions = {"sensors": "none", "previous_closures": PREVIOUS}
    sizes = {} if preset == "gaussian" else {"width": 4, "mean_layers": 2}
    config = {
        "preset": preset,
        "conditions": conditions,
        "adjusted": True,
        "validate_parts": "off",
    }
    config |= {**sizes, **settings}
    built = build(config, GRID)
    train_through(built, trajectories(precision=precision), RolloutTraining(12, 4, 3e-3, (2, 4)))
    return built


def fitted(preset: str = "convolutional", precision: str = "float32", **settings):
    """The same, fitted as far as closed forms go."""
    made, samples = model(preset, precision, **settings), data()
    for phase in made.phases:
        if not phase.through:
            made.begin(phase.name, samples.of(phase.members).passes)
    made.resume("trajectory")
    return made
