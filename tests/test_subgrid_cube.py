"""A small subgrid problem in three dimensions, from DNS to coupled ensembles."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from cube_case import divergence

import hpc_closure
from hpc_closure.bench.physics import stability
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.fitting import rollout_training
from hpc_closure.closure.fitting.rollout_training import RolloutLoss
from hpc_closure.closure.targets import reduced_problem
from hpc_closure.data.reader import CoupledEnsemble, DataSet
from hpc_closure.evaluate import verb as evaluate
from hpc_closure.evaluate.context import Inputs
from hpc_closure.evaluate.stages import costs
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.schema import Rollout
from hpc_closure.generate import verb as generate
from hpc_closure.rollout import verb as rollout
from hpc_closure.rollout.coupling import CoupledRun, Coupling, Memory
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.train import verb as train
from hpc_closure.work.options import Options

SMALL = """
name: cube
root: {root}
seed: 321
physics: {{equation: navier_stokes_3d, length: 6.283185307179586, viscosity: 0.02,
          forcing: {{kind: power, power: 0.2, reach: 1.5}}, noise: {{kind: none}},
          initial: {{kind: band, wavenumber: 2, width: 1.0, energy: 0.3}}}}
generate: {{grid: 16, dt: 2.0e-2, scheme: etdrk4, members: 12, t_end: 3.0, interval: 5,
           closure: subgrid, certificate: reported, record: {{start: 0.5, every: 0.1, grid: 8}}}}
model: {{preset: gaussian, conditions: {{sensors: none, previous_closures: 2}}}}
train: {{split: [0.5, 0.25, 0.25], steps: 4, batch: 8}}
replicas: {{members: 0}}
rollout: {{members: 4, initial_conditions: 3, t_start: 1.5, t_end: 3.0, every: 0.1, interval: 5,
          last_closures: own, baselines: [none], rungs: []}}
evaluate: {{lead_times: [0.2, 0.5, 1.0], samples: 6, members: 4, formats: [png]}}
cluster: {{members_per_block: 12, device: cpu, threads: 1}}
"""
NETWORK = [
    "name=network",
    "use.data=cube",
    "model.preset=convolutional",
    "model.width=4",
    "model.mean_layers=2",
    "model.validate_parts=off",
    "train.augment=true",
    "train.rollout_training={steps: 2, batch: 2, horizon: [1, 2], lr: 1.0e-3}",
    "train.stability_test={horizon: 5, members: 1, balance: true}",
]
BARE = ["use.data=cube", "model.conditions.previous_closures=0"]
B = band(2, 6.283185307179586, 3)


def run_verbs(path, changes, *verbs):
    experiment = reading.load(path, changes)
    for verb in verbs:
        assert verb.run(experiment, Options(verbosity=-1)) == 0
    return experiment, Run.of(experiment)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cube")
    path = folder / "experiment.yaml"
    path.write_text(SMALL.format(root=folder / "runs"))
    return path


@pytest.fixture(scope="module")
def run(path):
    return run_verbs(path, [], generate, train, rollout, evaluate)


@pytest.fixture(scope="module")
def network(path, run):
    return run_verbs(path, NETWORK, train, rollout)


def test_closures_are_what_the_reduced_solver_lacks_and_have_no_divergence(run):
    experiment, folder = run
    data = DataSet(folder.data)
    now, then, closure = (
        torch.from_numpy(data.read(3, index, name)[None]).double()
        for index, name in ((10, "state"), (11, "state"), (10, "closure"))
    )
    solver = Simulation(reduced_problem(experiment.problem, 8, "subgrid"), [3], 0)
    solver.load_state(0, solver.transform.to_spectral(now)).advance(5)
    found = solver.transform.to_physical(solver.state) + 0.1 * closure
    assert torch.allclose(found, then, atol=2e-6 * float(then.abs().max()))
    assert float(closure.std()) > 0.01 and divergence(B.to_spectral(closure), B) < 1e-6


def test_the_closed_form_is_better_than_no_closure_and_stays_solenoidal(run):
    experiment, folder = run
    scores = pd.read_csv(folder.scores_csv)
    chosen = scores[(scores.stage == "coupled") & scores["shell"].isna()]
    for lead in (0.2, 0.5, 1.0):
        at = chosen[chosen.lead_time == lead]
        crps = at[at.score == "crps"].groupby("method")["value"].mean()
        assert crps["model"] < 0.5 * crps["none"]
        assert (at[at.score == "diverged"]["value"] == 0).all()
    closure = hpc_closure.load(folder.model)
    assert "U[-1]" in closure.model.library.active
    ensemble = CoupledEnsemble(sorted(folder.rollout.glob("block_*.h5")))
    states = torch.from_numpy(ensemble.read("model", ensemble.times.size - 1)).double()
    assert divergence(B.to_spectral(states), B) < 1e-6


def test_long_runs_hold_and_have_the_energy_of_all_velocities(run):
    records, remarks = stability.run(run[0], members=3, steps=200)
    assert remarks[0].startswith("model: 0 of 3") and "field" not in records[0]
    data = DataSet(run[1].data)
    times = range(data.time_index(run[0].rollout.t_start), len(data.times))
    cases = data.split(run[0].train.split)["test"]
    squares = [np.square(data.read(case, i)).sum(0).mean() for case in cases for i in times]
    assert sum(row["dns"] for row in records) == pytest.approx(0.5 * np.mean(squares), rel=1e-5)


def test_a_compared_run_is_timed_at_its_own_interval(path, run):
    stop = SimpleNamespace(check=lambda: None)
    inputs = Inputs(run[0], SimpleNamespace(run=run[1], stop=stop, device="cpu"))
    changes = ["rollout.interval=10", "rollout.every=0.2", "evaluate.lead_times=[0.2]"]
    other, folder = run_verbs(path, [*BARE, *changes, "name=rare"], train)
    alone = costs._run(inputs, inputs.closure, 4)
    beside = costs._run(inputs, hpc_closure.load(folder.model), 4, other)
    assert alone.coupling.span == pytest.approx(0.1) and set(alone.simulations) == {"model"}
    clock = costs._model(beside, 4)
    assert clock.span == pytest.approx(0.2) and clock.members == len(beside.rows) == 4
    assert costs.fastest({"beside": clock})["beside"] > 0


def test_a_network_trained_with_maps_and_through_the_solver_runs_in_it(network):
    experiment, folder = network
    parts = {part.name: part for part in hpc_closure.load(folder.model).parts()}
    assert parts["mean: cnn"].acts and "training through the solver" in parts
    ensemble = CoupledEnsemble(sorted(folder.rollout.glob("block_*.h5")))
    states = torch.from_numpy(ensemble.read("model", ensemble.times.size - 1)).double()
    assert bool(states.isfinite().all()) and divergence(B.to_spectral(states), B) < 1e-6
    assert float(states.std(0).mean()) > 1e-4


def test_the_solver_with_gradients_is_the_coupled_run_in_three_dimensions(network, monkeypatch):
    experiment, folder = network
    closure, data = hpc_closure.load(folder.model), DataSet(folder.data)
    times = [torch.from_numpy(data.read(member, 12)) for member in range(3)]
    state = torch.stack(times)
    previous = torch.stack(
        [
            torch.stack(
                [torch.from_numpy(data.read(member, 12 - lag, "closure")) for lag in (1, 2)]
            )
            for member in range(3)
        ]
    )
    batch = {
        "state": state,
        "previous": previous,
        "sample_index": torch.arange(3),
        "ahead": state[:, None].expand(-1, 3, *state.shape[1:]),
    }
    monkeypatch.setattr(rollout_training, "STAGE", "sample")
    through = RolloutLoss(experiment.problem, 8, "subgrid", 5, 2)
    through.problem = through.problem.replace(precision="float64")
    with torch.no_grad():
        ours = through.run(closure.model, batch, 7, 0)
    settings = Rollout(interval=5, baselines=())
    coupling = Coupling(experiment.problem, "subgrid", 8, 7, settings, Memory(previous=2))
    rows = [(case, member) for member in range(2) for case in range(3)]
    coupled = CoupledRun(coupling, closure, rows, range(3))
    coupled.start(state.double().numpy(), 0, closures=previous.double().numpy().swapaxes(0, 1))
    for call in range(3):
        coupled.advance()
        theirs = coupled.fields()["model"].unflatten(0, (2, 3))
        assert torch.allclose(ours[call], theirs, atol=1e-5)


def test_constants_of_eddy_viscosities_are_tuned_in_coupled_runs(path, run):
    for kind in ("smagorinsky", "stochastic_smagorinsky"):
        changes = [*BARE, f"name={kind}", f"model.preset={kind}"]
        _, folder = run_verbs(path, changes, train)
        constants = hpc_closure.load(folder.model).model.constants
        assert 0.08 < constants[0] < 0.3  # Lilly's constant is 0.17
        if kind == "stochastic_smagorinsky":
            assert constants[1] > 0


@pytest.mark.parametrize(
    "changes, words",
    [
        (["model.preset=leith"], "model.preset=leith is for flows in 2 dimensions|needs .*"),
        (["model.preset=fno_score"], "model.sensors=learned is for equations of one field"),
        (["model.sensors=learned", "model.preset=default"], "two dimensions|one field"),
        (["model.conditions.physics_estimate=true"], "physics_estimate"),
        (["train.opponents=[resampled]", "model.preset=default"], "train.opponents"),
        (["generate.closure=convection"], "generate.closure=convection"),
    ],
)
def test_what_a_cube_does_not_have_is_one_line(path, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        reading.load(path, [*changes, *BARE[1:]])
    assert "\n" not in str(error.value)


def test_a_baseline_of_a_cube_is_refused_on_a_plane():
    with pytest.raises(ValueError, match="is for flows in 3 dimensions, vorticity2d has 2: use"):
        reading.load("subgrid_quick", ["model.preset=stochastic_smagorinsky"])


def test_data_with_divergence_are_refused_before_training(path, run, monkeypatch):
    read = DataSet.read

    def exchanged(self, member, index, field="state", grid=None):
        return read(self, member, index, field, grid)[[1, 0, 2]]

    monkeypatch.setattr(DataSet, "read", exchanged)
    experiment = reading.load(path, ["name=exchanged", "use.data=cube"])
    with pytest.raises(ValueError, match=r"the velocity \(u, v, w\) of member 0 .* divergence"):
        train.run(experiment, Options(verbosity=-1))
