"""Constants of eddy viscosities: tuned in coupled runs, and found where one is true."""

import numpy as np
import pytest
import torch
from closure_case import states_of

from hpc_closure.closure.artifact import build
from hpc_closure.closure.baselines.kinds.dynamic_leith import DynamicLeith
from hpc_closure.closure.baselines.kinds.jansen_held import JansenHeld
from hpc_closure.closure.baselines.kinds.smagorinsky import CHOICES, Smagorinsky
from hpc_closure.closure.targets import advance_with, reduced_problem
from hpc_closure.experiment import reading
from hpc_closure.spectral.modes.grid import resize
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.train.tuning import Trial, tune
from hpc_closure.work.stop import Stop, Stopped

TRUE = CHOICES[6]
SETTINGS = """
base: subgrid_backscatter_quick
generate: {grid: 64, members: 8, dt: 4e-3, t_end: 46, interval: 25,
           record: {grid: 32, start: 45.0, every: 0.1}}
reduced: {step: 1}
model: {preset: smagorinsky, conditions: {previous_closures: 0}}
train: {split: [0.25, 0.5, 0.25]}
replicas: {members: 0}
rollout: {initial_conditions: 1, last_closures: own, t_start: 45, t_end: 46, every: 0.1,
          interval: 25,
          rungs: []}
evaluate: {lead_times: [1]}
"""


LAYERS = """
base: two_layer_quick
reduced: {step: 1}
generate: {grid: 64, members: 8, t_end: 11.0, record: {grid: 32, start: 1.0, every: 1.0}}
model: {preset: smagorinsky, conditions: {previous_closures: 0}}
train: {split: [0.25, 0.5, 0.25]}
replicas: {members: 0}
rollout: {initial_conditions: 1, t_start: 1.0, t_end: 11.0, every: 1.0, rungs: []}
evaluate: {lead_times: [4]}
"""


class Trajectories:
    """What the reduced solver makes with a Smagorinsky closure of a known constant."""

    members, calls = range(4), 10

    def __init__(self, experiment, state, **config):
        problem = reduced_problem(experiment.problem, 32, "subgrid")
        simulation = Simulation(problem, self.members, 0)
        start = simulation.transform.to_spectral(state)
        simulation.load_state(0, start)
        model = build({"preset": "smagorinsky", **config}, 32, problem.length)
        span = experiment.generate.interval * experiment.generate.dt
        fields = [simulation.transform.to_physical(start)]
        for _ in range(self.calls):
            state = resize(simulation.state, model.band.modes)
            tendency = resize(model.tendency(state, [TRUE]), simulation.grid.modes)
            advance_with(simulation, "subgrid", span, tendency)
            fields.append(simulation.transform.to_physical(simulation.state))
        self.fields = torch.stack(fields, 1).numpy()
        self.times = experiment.rollout.t_start + span * np.arange(self.calls + 1)

    def split(self, shares):
        return {"valid": list(self.members)}

    def time_index(self, time):
        return int(np.argmin(np.abs(self.times - time)))

    def read(self, member, index, field, grid):
        return self.fields[member, index]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    path = tmp_path_factory.mktemp("tuning") / "case.yaml"
    path.write_text(SETTINGS)
    experiment = reading.load(path)
    return experiment, Trajectories(experiment, 4 * states_of(4))


def test_the_true_constant_is_found(case):
    experiment, store = case
    model = build({"preset": "smagorinsky"}, 32)
    told = tune(model, experiment, store)
    assert model.constants == (TRUE,)
    assert f"constants {TRUE:g}: error 0.000 of the bare solver's" in told


def test_the_true_constant_of_two_layers_is_found(tmp_path):
    """The lower layer, in which the closure is as wrong, is ten times weaker."""
    path = tmp_path / "layers.yaml"
    path.write_text(LAYERS)
    experiment = reading.load(path)
    state = states_of(8).unflatten(0, (4, 2))
    state = state / state.std() * torch.tensor([1.0, 0.1])[:, None, None]
    equation = experiment.physics.model_dump(exclude={"forcing", "noise", "initial"})
    config = {"preset": "smagorinsky", "equation": equation}
    store = Trajectories(experiment, state, equation=equation)
    model = build(config, 32, experiment.physics.length)
    text = tune(model, experiment, store)
    assert model.constants == (TRUE,) and "error 0.000 of the bare solver's" in text
    store.fields[:, 1:, 0] *= 1.1  # the upper layer cannot be right
    trial = Trial(model, experiment, store)
    scores = trial.scores([(TRUE,), (CHOICES[0],)], Stop())
    assert scores[0] < 0.75 and scores[1] > scores[0] + 0.1


def test_it_stops_when_it_is_asked_to(case):
    experiment, store = case
    stop, model = Stop(), build({"preset": "smagorinsky"}, 32)
    stop.request("the test")
    with pytest.raises(Stopped):
        tune(model, experiment, store, stop)


def test_another_law_is_worse(case):
    experiment, store = case
    errors = {}
    for kind in ("leith", "jansen_held"):
        model = build({"preset": kind}, 32)
        errors[kind] = float(tune(model, experiment, store).split("error ")[1].split()[0])
    assert 0.02 < errors["leith"] < 1 and 0.02 < errors["jansen_held"] < 1


def test_a_choice_that_loses_a_trajectory_later_is_not_taken(case, monkeypatch):
    """Best over the lead times, and lost after them."""
    experiment, store = case
    model = build({"preset": "smagorinsky"}, 32)
    real, asked = Trial.holds, []

    def holds(self, option, stop):
        asked.append(option)
        return option != (TRUE,) and real(self, option, stop)

    monkeypatch.setattr(Trial, "holds", holds)
    told = tune(model, experiment, store)
    assert asked[0] == (TRUE,) and model.constants == asked[1] != (TRUE,)
    assert told.endswith("; 1 better choice(s) lose a trajectory within 3")


def test_a_long_run_tells_what_blows_up(case):
    experiment, store = case
    trial = Trial(build({"preset": "jansen_held"}, 32), experiment, store)
    assert trial.holds((0.3, 0.0), Stop())
    assert not trial.holds((0.6, 3.0), Stop())  # gives back more than it takes


def test_a_given_constant_stays():
    assert Smagorinsky.candidates({"coefficient": 0.25}) == [(0.25,)]
    assert DynamicLeith.candidates({}) == [()]
    both = JansenHeld.candidates({"coefficient": None, "backscatter_fraction": 0.9})
    assert len(both) == len(CHOICES) and {share for _, share in both} == {0.9}
