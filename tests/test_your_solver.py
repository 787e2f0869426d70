"""A user's numpy solver as the reduced solver of an experiment, from DNS to report."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import four_verbs, members_of

import hpc_closure
from hpc_closure.closure.fitting.rollout_training import RolloutLoss
from hpc_closure.closure.targets import reduced_problem
from hpc_closure.data.forecasts import Forecaster
from hpc_closure.data.reader import DataSet
from hpc_closure.data.writer import BlockWriter
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.generate import verb as generate
from hpc_closure.rollout import verb as rollout
from hpc_closure.rollout.block import coupled_run, start
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.tools import advise, solver_check
from hpc_closure.train import verb as train
from hpc_closure.work.options import Options, UsageError

SOLVERS = Path(__file__).parent / "user_solvers"
FLOW = Problem(  # stirred beyond the wavenumbers that the users' solvers retain
    grid=48,
    dt=0.01,
    scheme="rk4",
    viscosity=0.0,
    hyperviscosity=1e-13,
    hyperviscosity_order=4,
    drag=0.05,
    noise={"kind": "ring", "wavenumber": 7, "width": 1, "energy_rate": 1e-3},
    initial={"kind": "band", "wavenumber": 3, "width": 2, "energy": 0.02},
)
SMALL = """
name: small
root: {root}
physics:
  {{viscosity: 0, hyperviscosity: 1e-13, hyperviscosity_order: 4, drag: 0.05,
   forcing: {{kind: none}}, noise: {{kind: ring, wavenumber: 7, width: 1, energy_rate: 1e-3}},
   initial: {{kind: band, wavenumber: 3, width: 2, energy: 0.02}}}}
generate:
  {{grid: 48, dt: 0.01, scheme: rk4, members: 12, t_end: 2.44, closure: subgrid, interval: 8,
   certificate: reported, record: {{start: 1.0, every: 0.08, grid: 16}}}}
model: {{preset: gaussian, conditions: {{sensors: none, previous_closures: 1, forecast: true}}}}
train: {{split: [0.5, 0.25, 0.25], steps: 20}}
reduced: {{python: "mine.py:Reduced"}}
replicas: {{members: 3}}
rollout:
  {{members: 3, initial_conditions: 2, t_start: 1.72, t_end: 2.36, every: 0.08, interval: 8,
   baselines: [none]}}
evaluate: {{lead_times: [0.4, 0.64], samples: 8, members: 4, formats: []}}
cluster: {{members_per_block: 12, device: cpu, threads: 1}}
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solver")
    shutil.copy(SOLVERS / "vorticity_numpy.py", folder / "mine.py")
    return four_verbs(folder, SMALL)


def test_the_report_has_the_users_solver_with_and_without_the_closure(experiment):
    run = Run.of(experiment)
    scores = pd.read_csv(run.scores_csv)
    coupled = scores[scores.stage == "coupled"]
    assert {"model", "none", "oracle"} <= set(coupled.method)
    crps = coupled[(coupled.score == "crps") & (coupled.lead_time == 0.64)]
    assert crps.set_index("method")["value"].loc[["model", "none"]].notna().all()
    assert (run.folder("evaluate") / "report.html").exists()


def test_targets_and_forecasts_are_those_of_the_built_in_solver(experiment, tmp_path):
    changes = [f"root={tmp_path}", "reduced.python=", "reduced.step=2", "replicas.members=0"]
    plain = reading.load(experiment.folder.parent.parent / "experiment.yaml", changes)
    assert generate.run(plain, Options(verbosity=-1)) == 0
    ours, theirs = DataSet(Run.of(plain).data), DataSet(Run.of(experiment).data)
    for member in ours.members[:3]:
        built_in, users = (one.read(member, slice(None), "closure") for one in (ours, theirs))
        assert np.abs(built_in - users).max() < 1e-6 * np.abs(built_in).max()
    span = plain.generate.closure_interval
    states = ours.read(0, slice(0, 3)).astype(np.float64)
    after = [
        Forecaster(reduced_problem(one.problem, 16, "subgrid", 2), span).after(states)
        for one in (plain, experiment)
    ]
    assert np.abs(after[0] - after[1]).max() < 1e-12 * np.abs(after[0]).max()


def test_a_killed_rollout_goes_on_to_the_same_bits(experiment, monkeypatch):
    path = experiment.folder.parent.parent / "experiment.yaml"
    changes = ["use.data=small", "use.model=small", "cluster.checkpoint_every=0.001"]
    whole, crashed = (
        reading.load(path, [f"name={name}", *changes]) for name in ("whole", "crashed")
    )
    assert rollout.run(whole, Options(verbosity=-1)) == 0
    write = BlockWriter.write

    def fails(self, index, *rest):
        if index == 5:
            raise RuntimeError("pulled the plug")
        write(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(BlockWriter, "write", fails)
        assert rollout.run(crashed, Options(verbosity=-1)) == 3
    assert rollout.run(crashed, Options(verbosity=-1, retry_failed=True)) == 0
    expected = members_of(Run.of(whole).rollout)
    assert members_of(Run.of(crashed).rollout) == expected and expected


def test_a_stepper_of_exponax_is_a_reduced_solver(experiment, capsys):
    pytest.importorskip("exponax")
    python = str(SOLVERS / "exponax_stepper.py")
    assert solver_check.run(python, grid=16) == 0
    assert "OK    gradient                  by jax" in capsys.readouterr().out
    path = experiment.folder.parent.parent / "experiment.yaml"
    other = reading.load(path, [f"reduced.python={python}"])
    closure, data = hpc_closure.load(Run.of(experiment).model), DataSet(Run.of(experiment).data)
    coupled = coupled_run(other, closure, data, range(6), "cpu")
    start(coupled, data, other)
    coupled.advance(3)
    fields = coupled.fields()
    assert fields["model"].isfinite().all() and fields["none"].isfinite().all()
    assert not torch.equal(fields["model"][0], fields["model"][2])  # members of one start


def test_the_source_is_part_of_the_hashes_and_presets_keep_theirs(experiment, tmp_path):
    text = (SOLVERS / "vorticity_numpy.py").read_text()
    (tmp_path / "mine.py").write_text(text + "# another comment\n")
    other = experiment.model_copy(
        update={
            "reduced": experiment.reduced.model_copy(
                update={"python": f"{tmp_path / 'mine.py'}:Reduced"}
            )
        }
    )
    for stage in ("generate", "train", "rollout"):
        assert other.stage_hash(stage) != experiment.stage_hash(stage)
    (tmp_path / "mine.py").write_text(text)
    assert other.stage_hash("rollout") == experiment.stage_hash("rollout")
    assert other.problem.member_hash() == experiment.problem.member_hash()
    assert "reduced" not in reading.load("quickstart").stage_settings("rollout")


def test_numpy_without_adjoint_cannot_be_trained_through(experiment):
    changes = ["train.rollout_training={steps: 2}", "model.conditions.forecast=false"]
    path = experiment.folder.parent.parent / "experiment.yaml"
    with pytest.raises(ValueError, match=r"numpy without vjp\(v, n, g\)"):
        train.build_model(reading.load(path, changes))


class Draws:
    """A closure that is a multiple of the state."""

    device = torch.device("cpu")

    def __init__(self):
        self.factor = torch.tensor(-0.1, requires_grad=True)

    def draw_hat(self, request):
        return self.factor * request.state


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_training_through_it_has_the_loss_and_gradient_of_the_built_in_solver(experiment, library):
    if library == "jax":
        pytest.importorskip("jax")
    problem, interval = experiment.problem, experiment.generate.interval
    data = DataSet(Run.of(experiment).data)
    fields = torch.from_numpy(np.stack([data.read(member, slice(0, 4)) for member in (0, 1)]))
    batch = {
        "state": fields[:, 0],
        "ahead": fields[:, 1:],
        "sample_index": torch.arange(2),
    }
    found = []
    for python, stride in (("", 2), (f"{SOLVERS / f'vorticity_{library}.py'}:Reduced", 1)):
        model, full = Draws(), problem.replace(reduced_python=python)
        loss = RolloutLoss(full, 16, "subgrid", interval, 2, stride=stride)
        value = loss.scores(model, batch, 0, 0)[0].mean()
        value.backward()
        found.append((float(value.detach()), float(model.factor.grad)))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize(
    "change, line",
    [
        ("reduced.step=2", "reduced.step needs the solver of this package"),
        ("reduced.known=8", "reduced.known needs the solver of this package"),
        ("rollout.rungs=[{grid: 24}]", "rollout.rungs needs the solver of this package"),
        ("reduced.python=gone.py:Reduced", "a file is searched beside the experiment's"),
    ],
)
def test_what_needs_the_built_in_solver_is_refused_in_one_line(experiment, change, line):
    path = experiment.folder.parent.parent / "experiment.yaml"
    with pytest.raises(ValueError, match=line):
        reading.load(path, [change, "replicas.members=0"]).stage_hash("generate")


def test_advice_needs_the_built_in_solver(experiment):
    with pytest.raises(UsageError, match="has a solver of others"):
        advise.run(experiment)


def test_a_removed_term_needs_the_built_in_solver():
    with pytest.raises(ValueError, match="reduced.python is for closure subgrid"):
        reading.load("quickstart", ["reduced.python=mine.py:Reduced"])


def test_the_recipe_of_a_file_and_a_solver_makes_a_report(tmp_path):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("netCDF4")
    dns = Simulation(FLOW, range(10), 0, threads=1).initialise().advance(200)
    states = []
    for _ in range(20):
        states.append(dns.fields(["vorticity"])["vorticity"].numpy())
        dns.advance(8)
    x = np.arange(48) / 48
    fields = {"q": (("member", "time", "x", "y"), np.stack(states, 1))}
    coordinates = {"time": 0.08 * np.arange(20), "x": x, "y": x}
    xarray.Dataset(fields, coordinates).to_netcdf(tmp_path / "dns.nc")
    shutil.copy(SOLVERS / "vorticity_numpy.py", tmp_path / "mine.py")
    recipe = (SOLVERS.parent.parent / "docs" / "recipes" / "file_and_solver.yaml").read_text()
    assert len(recipe.splitlines()) <= 12
    recipe = recipe.replace("{", "{{").replace("}", "}}")
    changes = ["root=" + str(tmp_path), "evaluate.formats=[]", "evaluate.samples=20"]
    changes += ["rollout.initial_conditions=2", "cluster.device=cpu", "cluster.threads=1"]
    experiment = four_verbs(tmp_path, recipe, changes)
    run = Run.of(experiment)
    assert (run.folder("evaluate") / "report.html").exists()
    scores = pd.read_csv(run.scores_csv)
    coupled = scores[(scores.stage == "coupled") & scores["shell"].isna()]
    assert set(coupled.method) == {"model", "none", "climatology"}
    values = coupled.set_index(["score", "method"])["value"]
    assert values.loc["crps", "model"].min() < 0.9 * values.loc["crps", "none"].min()
    assert values.loc["spread_skill", "model"].between(0.5, 1.5).all()
