"""Closures on a line: the code of planes, and its own answers."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import four_verbs

import hpc_closure
from hpc_closure.bench.physics import stability
from hpc_closure.closure.artifact import build
from hpc_closure.closure.compatibility import check_fits
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.features import carried, feature_spectra
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.fitting import rollout_training
from hpc_closure.closure.fitting.rollout_training import RolloutLoss
from hpc_closure.closure.process import Memory
from hpc_closure.closure.targets import reduced_problem
from hpc_closure.data.reader import CoupledEnsemble, DataSet
from hpc_closure.evaluate.scores.spectra import shell_power
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.schema import Rollout
from hpc_closure.rollout.coupling import CoupledRun, Coupling
from hpc_closure.spectral.simulation import Simulation

SMALL = """
base: burgers
name: line
root: {root}
physics: {{viscosity: 2e-2}}
generate: {{grid: 96, dt: 2e-3, members: 20, t_end: 2.0, interval: 10,
           record: {{start: 0.5, every: 0.02, grid: 24}}}}
model: {{width: 4, mean_layers: 2, validate_parts: "off"}}
train: {{split: [0.5, 0.25, 0.25], steps: 40, batch: 16,
        rollout_training: {{steps: 4, batch: 4, horizon: [2, 4], lr: 1e-3}}}}
replicas: {{members: 6, spinup: 0.1}}
rollout: {{members: 8, initial_conditions: 5, t_start: 1.0, t_end: 2.0, every: 0.1, interval: 10,
          rungs: [{{grid: 48, start: moved}}]}}
evaluate: {{lead_times: [0.1, 0.5, 1.0], samples: 10, members: 8, formats: [png]}}
cluster: {{members_per_block: 20, device: cpu, threads: 1}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    experiment = four_verbs(tmp_path_factory.mktemp("line"), SMALL)
    return experiment, Run.of(experiment)


def waves(number=3, size=24, seed=0):
    """Fields (number, n) of a few modes."""
    line = band(7, 1.0, 1)
    return line.to_physical(keyed_noise.white_spectra(line, seed, "test", range(number), 0), size)


def test_draws_on_a_line_are_white_and_real():
    line = band(7, 1.0, 1)
    z = keyed_noise.white_spectra(line, 1, "test", range(4000), 0)
    power = z.abs().square().mean(0)
    assert z.shape == (4000, 8) and torch.allclose(power, torch.ones(8).double(), atol=0.08)
    field = line.to_physical(z, 24)
    assert (line.to_spectral(field) - z).abs().max() < 1e-12
    assert float(field.square().mean()) == pytest.approx(line.variance(torch.ones(8)), rel=0.03)


def test_features_and_what_the_flow_carries():
    line, x = band(7, 1.0, 1), torch.arange(24).double() / 24
    tau = 2 * torch.pi
    u, f = torch.sin(tau * x), torch.cos(2 * tau * x)
    u_hat, f_hat = (line.to_spectral(field[None]) for field in (u, f))
    state, slope = line.to_physical(feature_spectra(u_hat, line), 24)[0]
    assert torch.allclose(state, u) and torch.allclose(slope, tau * torch.cos(tau * x))
    moved = line.to_physical(carried(u_hat, f_hat[:, None], line), 24)[0, 0]
    assert torch.allclose(moved, u * 2 * tau * torch.sin(2 * tau * x), atol=1e-12)


def test_power_per_shell_of_a_line():
    x = torch.arange(24).double() / 24
    field = 2 * torch.cos(2 * torch.pi * 3 * x) + 1
    power = shell_power(field, 1)
    assert power.shape == (13,) and torch.allclose(
        power[[0, 3]], torch.tensor([1.0, 2.0]).double()
    )
    assert float(power.sum()) == pytest.approx(float(field.square().mean()))


def test_a_convolution_on_a_line_knows_no_place():
    torch.manual_seed(0)
    conditions = {"sensors": "none", "previous_closures": 1}
    model = build({"preset": "convolutional", "conditions": conditions, "dimensions": 1}, 24)
    assert set(model.library.names) == {
        "u",
        "u_x",
        "U[-1]",
        "u.grad U[-1]",
        "u*u",
        "u*u_x",
        "u_x*u_x",
    }
    batches = [(waves(40, seed=1), waves(40, seed=2))]
    model.begin("mean", [dict(state=s, target=t, previous=s[:, None]) for s, t in batches])
    torch.nn.init.normal_(model.mean.network.head.weight)
    state = waves(2)
    one, moved = (
        model.mean.field(model.encode(model.frames(w, previous=w[:, None])))
        for w in (state, state.roll(6, -1))
    )
    shift = 6 * one.shape[-1] // 24
    assert one.abs().max() > 0.1 and torch.allclose(one.roll(shift, -1), moved, atol=1e-4)


def test_the_solver_with_gradients_is_the_coupled_run(run, monkeypatch):
    experiment, folder = run
    closure = hpc_closure.load(folder.model)
    data = DataSet(folder.data)
    state = torch.from_numpy(np.stack([data.read(case, 30) for case in range(3)]))
    previous = torch.from_numpy(
        np.stack([[data.read(case, 30 - back, "closure") for back in (1, 2)] for case in range(3)])
    )
    assert state.shape == (3, 24)
    batch = {
        "state": state,
        "previous": previous,
        "sample_index": torch.arange(3),
        "ahead": state[:, None].expand(-1, 4, -1),
    }
    monkeypatch.setattr(rollout_training, "STAGE", "sample")
    through = RolloutLoss(experiment.problem, 24, "subgrid", 10, 2)
    through.problem = through.problem.replace(precision="float64")
    with torch.no_grad():
        ours = through.run(closure.model, batch, 7, 0)
    settings = Rollout(interval=10, baselines=())
    coupling = Coupling(experiment.problem, "subgrid", 24, 7, settings, Memory(previous=2))
    rows = [(case, member) for member in range(2) for case in range(3)]
    coupled = CoupledRun(coupling, closure, rows, range(3))
    coupled.start(state.double().numpy(), 0, closures=previous.double().numpy().swapaxes(0, 1))
    for call in range(4):
        coupled.advance()
        theirs = coupled.fields()["model"].unflatten(0, (2, 3))
        assert torch.allclose(ours[call], theirs, atol=1e-5)


def test_restart_files_in_which_a_line_has_a_row_load(run):
    experiment, folder = run
    closure, data = hpc_closure.load(folder.model), DataSet(folder.data)
    state, *previous = (
        np.stack([data.read(case, 30 - back, name) for case in range(2)]).astype(np.float64)
        for back, name in ((0, "state"), (1, "closure"), (2, "closure"))
    )
    settings = Rollout(interval=10, baselines=())
    coupling = Coupling(experiment.problem, "subgrid", 24, 7, settings, Memory(previous=2))
    first, second = (CoupledRun(coupling, closure, [(0, 0), (1, 0)], range(2)) for _ in range(2))
    first.start(state, 0, closures=previous)
    saved = first.advance(2) or first.save_state()
    assert saved["drawn"].shape == (2, 2, 8)
    second.load_state({**saved, "drawn": saved["drawn"][:, :, None]})
    for one in (first, second):
        one.advance(2)
    assert torch.equal(first.fields()["model"], second.fields()["model"])


def test_closures_are_what_the_reduced_solver_lacks(run):
    """The DNS's next state is the reduced solver's, and the closure for an interval."""
    experiment, folder = run
    data = DataSet(folder.data)
    now, then, closure = (
        torch.from_numpy(data.read(3, index, name)[None]).double()
        for index, name in ((20, "vorticity"), (21, "vorticity"), (20, "closure"))
    )
    solver = Simulation(reduced_problem(experiment.problem, 24, "subgrid"), [3], 0)
    transform = solver.transform
    solver.load_state(0, transform.to_spectral(now)).advance(10)
    found = transform.to_physical(solver.state) + 10 * experiment.generate.dt * closure
    assert torch.allclose(found, then, atol=2e-6 * float(then.abs().max()))
    assert float(closure.std()) > 0.1


def test_four_verbs_make_a_calibrated_ensemble(run):
    experiment, folder = run
    scores = pd.read_csv(folder.scores_csv)
    chosen = scores[(scores.stage == "coupled") & scores["shell"].isna()]

    def value(method, score, lead):
        rows = chosen[(chosen.method == method) & (chosen.score == score)]
        return float(rows[rows.lead_time == lead]["value"].iloc[0])

    for lead in (0.1, 0.5, 1.0):
        assert value("model", "diverged", lead) == 0
        assert value("model", "crps_ratio", lead) < 1.2
        assert value("none", "crps_ratio", lead) > 1.25
        assert 0.7 < value("model", "spread_ratio", lead) < 1.4  # 5 starts
    ensemble = CoupledEnsemble(sorted(folder.rollout.glob("block_*.h5")))
    assert ensemble.read("model", 1).shape == (8, 5, 24)
    assert {path.stem for path in folder.evaluate.glob("figures/state*.png")}


def test_long_runs_on_a_line_hold(run):
    records, remarks = stability.run(run[0], members=5, steps=1000)
    assert remarks[0].startswith("model: 0 of 5")
    energy = {row["shell"]: row["model"] for row in records if row["share"] > 0.05}
    assert all(0.3 < ratio < 3 for ratio in energy.values()), energy


def test_the_true_ensemble_begins_with_the_resolved_modes_of_its_start(run):
    folder = run[1]
    replicas = CoupledEnsemble(sorted(folder.folder("replicas").glob("block_*.h5")))
    data = DataSet(folder.data)
    for case in replicas.cases:
        begin = replicas.read_case("model", case, replicas.index(0.0))
        truth = data.read(case, data.time_index(1.0))
        assert all(np.array_equal(one, truth) for one in begin)
        later = replicas.read_case("model", case, replicas.index(0.5))
        assert later.std(0).mean() > 0.05


@pytest.mark.parametrize(
    "change, words",
    [
        ("generate.closure=convection", "needs subgrid or none"),
        ("model.preset=fno_score", "needs default or .* or convolutional"),
        ("model.conditions.physics_estimate=true", "needs False"),
    ],
)
def test_what_a_line_does_not_have_is_one_line(change, words):
    with pytest.raises(ValueError, match=f"{words}$") as error:
        reading.load("burgers", [change])
    assert "burgers1d" in str(error.value)


def test_a_model_of_the_plane_is_refused_on_a_line(run):
    experiment, folder = run
    assert check_fits(folder.model, experiment, "use.model=line") is None
    plane = experiment.model_copy(
        update={"physics": reading.load("subgrid_quick", ["physics.length=1"]).physics}
    )
    with pytest.raises(ValueError, match="use.model=line: its dimensions is 1, the experiment's"):
        check_fits(folder.model, plane, "use.model=line")


def test_a_closure_of_a_line_wants_lines(run):
    closure = hpc_closure.load(run[1].model)
    with pytest.raises(ValueError, match=r"shape \(2, 24, 24\), expected \(n,\) or \(M, n\)$"):
        closure.sample(torch.zeros(2, 24, 24), previous=torch.zeros(2, 24), members=2)
    with pytest.raises(ValueError, match=r"expected \(H, n\) or \(M, H, n\)$"):
        closure.sample(torch.zeros(24), previous=torch.zeros(24), members=2)
    with pytest.raises(
        ValueError, match="field is 12; a band of 7 modes on a line needs at least"
    ):
        closure.sample(torch.zeros(12), previous=torch.zeros(2, 12), members=2)
    state = torch.randn(24, dtype=torch.float64)
    drawn = closure.sample(state, previous=torch.zeros(2, 24), members=3)
    assert drawn.shape == (3, 24) and drawn.dtype == torch.float64
