"""The subgrid problem from DNS to report, small: memory from bursts, and the true ensemble."""

import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import four_verbs
from test_evaluate_methods import in_batches, inputs_of

import hpc_closure
from hpc_closure import __main__
from hpc_closure.bench.physics import stability
from hpc_closure.closure.artifact import load
from hpc_closure.closure.compatibility import check_fits
from hpc_closure.data.reader import CoupledEnsemble, DataSet
from hpc_closure.evaluate import verb as evaluate
from hpc_closure.evaluate.scores.generated import innovations
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.generate import verb as generate
from hpc_closure.rollout import verb as rollout
from hpc_closure.rollout.block import coupled_run, start
from hpc_closure.train import verb as train
from hpc_closure.work.options import Options

SMALL = """
base: subgrid_backscatter_quick
name: small
root: {root}
physics: {{noise: {{wavenumber: 14}}}}
generate: {{grid: 48, members: 24, t_end: 4.0, interval: 25,
           record: {{start: 1.0, every: 0.5, burst: 3, grid: 24}}}}
pilot: {{initial_conditions: 4, members: 3}}
model: {{preset: gaussian, conditions: {{previous_closures: 2}}}}
train: {{split: [0.5, 0.25, 0.25]}}
replicas: {{members: 6}}
rollout: {{members: 8, initial_conditions: 5, t_start: 2.0, t_end: 3.0, every: 0.5, interval: 25,
          rungs: [{{grid: 48, start: moved}}]}}
evaluate: {{lead_times: [0.5, 1.0], samples: 12, members: 8, formats: []}}
cluster: {{members_per_block: 24, device: cpu, threads: 1}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    experiment = four_verbs(tmp_path_factory.mktemp("subgrid"), SMALL)
    return Run.of(experiment)


def test_bursts_end_at_the_stored_times(run):
    data = DataSet(run.data)
    ends = np.arange(1.0, 4.01, 0.5)
    expected = np.concatenate([[end - 0.2, end - 0.1, end] for end in ends])
    assert np.allclose(data.times, expected)
    whole = data.with_past(range(len(data.times)), 2, 0.1)
    assert np.allclose(data.times[whole], ends)


def test_the_closure_is_judged_against_the_true_ensemble(run):
    scores = pd.read_csv(run.scores_csv)

    def value(stage, method, score, lead=None):
        rows = scores[(scores.stage == stage) & (scores.method == method)]
        rows = rows[(rows.score == score) & rows["shell"].isna()]
        rows = rows[rows.lead_time.isna()] if lead is None else rows[rows.lead_time == lead]
        return float(rows["value"].iloc[0])

    methods = set(scores[scores.stage == "coupled"].method)
    assert {"model", "oracle", "none", "rung_48_moved"} <= methods
    for lead in (0.5, 1.0):
        assert value("coupled", "oracle", "spread_skill", lead) == pytest.approx(1, abs=0.25)
        assert value("coupled", "model", "crps_ratio", lead) < 1.16  # 1.22 with closures held
        assert value("coupled", "none", "crps_ratio", lead) > 1.3
        assert 0.9 < value("coupled", "model", "spread_ratio", lead) < 1.3
        assert value("coupled", "model", "diverged", lead) == 0
    assert value("generated", "oracle", "crps_ratio") == 1
    assert value("generated", "model", "crps_ratio") < value("generated", "none", "crps_ratio")
    assert value("coupled", "rung_48_moved", "cost_ratio") > 1
    assert value("coupled", "oracle", "similarity_values") > 0.4
    assert value("coupled", "model", "similarity_energy_spectrum") > 0.1
    assert value("generated", "none", "enstrophy_transfer_ratio") == 0
    assert value("generated", "oracle", "enstrophy_transfer_distance") < 1
    for share in (1, 10, 50):
        assert 0 < value("coupled", "oracle", f"growth_{share}") <= 1.0


def test_the_true_ensemble_begins_where_the_coupled_run_begins(run):
    blocks = [
        sorted(folder.glob("block_*.h5")) for folder in (run.folder("replicas"), run.rollout)
    ]
    replicas, coupled = (CoupledEnsemble(paths) for paths in blocks)
    replicas.select(coupled.cases)
    assert replicas.start == coupled.start == pytest.approx(2.0)
    there, here = (one.read("model", one.index(0.0)) for one in (replicas, coupled))
    assert np.array_equal(there, np.broadcast_to(there[:1], there.shape))
    assert np.allclose(there[0], here[0], atol=1e-5)
    later = replicas.read("model", replicas.index(1.0))
    assert later.std(0).mean() > 0.1 * later.std()


def test_long_runs_keep_the_spectrum(run):
    experiment = reading.load(run.config)
    records, remarks = stability.run(experiment, 10, 1000)
    assert "model: 0 of 10 trajectories lost in 40 closure calls (1000 steps" in remarks[0]
    carrying = [row for row in records if row["share"] > 0.01]
    assert len(carrying) > 4
    for row in carrying:
        assert 0.5 < row["model"] < 2.0
        assert 0 < row["model_error"] < 0.5
    weighted = {
        name: sum(row["share"] * row[name] for row in records) for name in ("model", "none")
    }
    assert 0.8 < weighted["model"] < 1.25
    assert weighted["none"] < 0.8 * weighted["model"]  # no ring feeds it
    assert all(0 <= row["rescaled_share"] < 0.2 for row in records)
    assert remarks[-1].startswith("draws rescaled into the range of the training: ")
    assert "of the DNS's own closures" in remarks[-1]
    valid, _ = stability.run(experiment, 6, 25, part="valid")
    assert not np.allclose([row["dns"] for row in valid], [row["dns"] for row in records])
    total = sum(row["dns"] for row in records)
    data = DataSet(run.data)
    cases = data.starts(experiment.train.split, 5)
    first = data.time_index(2.0)
    fields = np.stack([data.read(case, slice(first, None)) for case in cases])
    assert total == pytest.approx(0.5 * (fields**2).mean(), rel=0.01)


def test_rescaled_draws_are_in_the_product_and_in_the_rows(run):
    """Counted to the stored times, each row for itself: blocks and restarts change nothing."""
    experiment = reading.load(run.config)
    ensemble = CoupledEnsemble(sorted(run.rollout.glob("block_*.h5")))
    assert ensemble.counted == {"model"}
    counts = [ensemble.rescaled_counts("model", index) for index in (0, 1, 2)]
    assert [float(one[..., 0].max()) for one in counts] == [0, 5, 10]
    scores = pd.read_csv(run.scores_csv)
    rows = scores[(scores.score == "rescaled_share") & (scores.lead_time == 1.0)]
    total = counts[2].sum((0, 1))
    assert float(rows[rows["shell"].isna()]["value"].iloc[0]) == pytest.approx(total[1] / total[0])
    for shell, share in enumerate(total[2:] / total[0]):
        if shell:
            assert float(rows[rows["shell"] == shell]["value"].iloc[0]) == pytest.approx(share)
    there = scores[(scores.score == "rescaled_share_expected") & scores["shell"].isna()]
    assert 0 < float(there["value"].iloc[0]) < 0.5

    data, closure = DataSet(run.data), load(run.model)
    closure.model.adopt(narrow(closure.model.statistics))
    parts = [range(40), range(15), range(15, 40)]
    runs = [coupled_run(experiment, closure, data, part, "cpu") for part in parts]
    for one in runs:
        start(one, data, experiment)
        one.advance(4)
    again = coupled_run(experiment, closure, data, parts[0], "cpu")
    again.load_state(runs[0].save_state())
    for one in (*runs, again):
        one.advance(3)
    whole, *blocks, resumed = (one.rescaled_counts()["brought_back"] for one in (*runs, again))
    assert whole[:, 1].sum() > 40
    assert np.array_equal(np.concatenate(blocks), whole)
    assert np.array_equal(resumed, whole)


def narrow(statistics):
    """A range that many draws are beyond."""
    return replace(statistics, target_largest=statistics.target_mean)


def test_a_run_of_before_goes_on_without_counts(run, tmp_path):
    """A product that counted nothing grows as it is, and says nothing of the guard."""
    folder = tmp_path / "small"
    shutil.copytree(run.root, folder)
    experiment = reading.load(run.config, [f"root={tmp_path}"])
    for old in Run.of(experiment).rollout.glob("block_*.h5"):
        with h5py.File(old, "r+") as file:
            del file["series"], file["dimensions/series_time"], file["restart/brought_back"]
    longer = reading.load(run.config, [f"root={tmp_path}", "rollout.t_end=3.5"])
    assert rollout.run(longer, Options(verbosity=-1)) == 0
    ensemble = CoupledEnsemble(sorted(Run.of(longer).rollout.glob("block_*.h5")))
    assert len(ensemble.times) == 4 and ensemble.counted == set()


def test_a_long_run_that_ends_early_says_so(run, monkeypatch):
    from hpc_closure.rollout.coupling import CoupledRun

    advance = CoupledRun.advance

    def lose_one(self, calls=1):
        advance(self, calls)
        self.simulations["model"].pairs[3] = np.nan

    monkeypatch.setattr(CoupledRun, "advance", lose_one)
    records, remarks = stability.run(reading.load(run.config), 10, 100)
    assert remarks[0].startswith("model: 1 of 10 trajectories lost")
    assert all(np.isfinite(row["model"]) for row in records)


def test_the_budget_is_of_the_state_that_the_closure_is_added_to(run):
    """Reduced solver for an interval, then the closure: the DNS an interval later."""
    inputs = inputs_of(reading.load(run.config))
    first = range(0, len(inputs.data.times), 3)  # of every burst
    member = inputs.parts["test"][0]

    def fields(name, later=0):
        rows = [inputs.data.read(member, at + later, name) for at in first]
        return torch.from_numpy(np.stack(rows)).double()

    snapshots = SimpleNamespace(states=fields("vorticity"), trajectories=torch.zeros(len(first)))
    origin = inputs.origin(snapshots)
    assert origin.span == pytest.approx(0.1)
    after = origin.states + origin.span * fields("closure")
    assert torch.allclose(after, fields("vorticity", 1), atol=1e-5)
    assert not torch.allclose(origin.states, fields("vorticity", 1), atol=1e-2)


@pytest.mark.parametrize("last", ["own", "moved"])
def test_snapshots_of_a_batch_have_their_own_past(run, monkeypatch, last):
    """Moved, the last closures are others for each member, as if each had a state of its own."""
    inputs = inputs_of(reading.load(run.config, [f"rollout.last_closures={last}"]))
    found, calls = in_batches(inputs, None, monkeypatch)
    each = 1 if last == "own" else 4
    assert calls == [each * rows for rows in 2 * [2, 2, 1, 1, 1, 1, 1, 1]]
    for name in ("model", "mean_gp"):
        together, alone = found[name, 2], found[name, 1]
        assert torch.equal(together[:, 2], together[:, 4])
        assert torch.allclose(together, alone, atol=1e-5 * float(alone.abs().max()))
        assert not torch.allclose(together[:, 0], together[:, 1], rtol=0.1)


def test_the_closure_of_another_cut_off_is_refused(run):
    """What a solver lacks depends on its grid: no band limits carry it over."""
    experiment = reading.load(run.config)
    assert check_fits(run.model, experiment, "use.model=small") is None
    finer = reading.load(run.config, ["generate.grid=96", "generate.record.grid=48"])
    with pytest.raises(
        ValueError, match=r"corrects a solver on 24\^2, the experiment's one on 48"
    ):
        check_fits(run.model, finer, "use.model=small")


# ---- snapshots that cannot show a memory -----------------------------------------------

APART = ["generate.record.burst=1", "model.conditions.previous_closures=0", "replicas.members=0"]
APART += ["rollout.rungs=[]"]


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Data whose snapshots are five closure intervals apart."""
    folder = tmp_path_factory.mktemp("apart")
    path = folder / "apart.yaml"
    path.write_text(SMALL.format(root=folder / "runs"))
    assert generate.run(reading.load(path, APART), Options(verbosity=-1)) == 0
    return path


def told_by_train(path, monkeypatch, capfd, *changes):
    """Exit code and lines of `hpc-closure train`."""
    monkeypatch.setattr(sys, "argv", ["hpc-closure", "train", str(path), *APART, *changes, "-q"])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    return ended.value.code, capfd.readouterr().err


def test_memory_that_the_data_cannot_show_is_one_line(apart, monkeypatch, capfd):
    code, told = told_by_train(apart, monkeypatch, capfd)
    assert code == 1
    assert re.search(
        r"snapshots are 5 closure intervals apart \(generate.record.every\) and in shell \d+ "
        r"correlated by -?0\.\d\d: .* set generate.record.burst to at least 2, or record.every to "
        r"one closure interval, or model.noise_memory=off",
        told.splitlines()[-1],
    )
    assert not list(apart.parent.rglob("model.safetensors"))


def test_white_noise_is_made_where_it_is_asked_for(apart, monkeypatch, capfd):
    changes = ["model.noise_memory=off", "name=white", "use.data=small"]
    code, told = told_by_train(apart, monkeypatch, capfd, *changes)
    assert not code, told
    assert list(apart.parent.rglob("model.safetensors"))


def test_one_snapshot_of_a_trajectory_is_refused_before_anything_is_made(
    apart, monkeypatch, capfd
):
    change = "train.window=[1.0,1.4]"
    code, told = told_by_train(apart, monkeypatch, capfd, change)
    assert code == 2 and told.count("\n") == 1
    assert "generate.record.every=0.5 leaves one snapshot of a trajectory in [1, 1.4]" in told


def test_bursts_show_it(run):
    """The same flow, recorded in bursts, tells a memory."""
    changes = ["model.conditions.previous_closures=0", "name=bursts", "use.data=small"]
    experiment = reading.load(run.config, changes)
    assert train.run(experiment, Options(verbosity=-1)) == 0
    model = hpc_closure.load(Run.of(experiment).model).model
    assert float(model.knots.max()) > 1


# ---- what is left to chance, and presets with a score ---------------------------------


def test_the_law_of_the_innovations_is_in_the_tables(run):
    scores = pd.read_csv(run.scores_csv)
    scores = scores[scores.stage == "generated"]
    for method in ("model", "mean_gp"):
        rows = scores[(scores.method == method) & scores["shell"].isna()].set_index("score")
        for name in (score.name for score in innovations.SCORES):
            row = rows.loc[name]
            assert row["low"] <= row["value"] <= row["high"], name
        assert 0.8 < rows.loc["variance_high_over_low", "value"] < 3
    own, law = (
        scores[(scores.method == method) & (scores.score == "kurtosis") & scores["shell"].notna()]
        for method in ("model", "mean_gp")
    )
    assert len(own) == len(law) > 4
    assert law["value"].abs().max() < 0.4  # Gaussian, with as many snapshots
    page = run.report.read_text()
    assert "Innovations: closure minus its mean (gp: draws of the Gaussian law" in page
    assert re.search(
        r"Innovations \(subgrid, no sensors, 24² grid\): closure minus its mean", page
    )


ALONE = ["replicas.members=0", "rollout.rungs=[]"]
SCORES = {
    "default": ["model.preset=default", "model.width=8", "model.layers=1", "model.mean_layers=1"],
    "fno_score": ["model.preset=fno_score", "model.width=8", "model.layers=1"],
    "cnn_score": [
        "model.preset=default",
        "model.mean=[regression,cnn]",
        "model.amplitude=none",
        "model.width=8",
        "model.layers=1",
    ],
}


@pytest.mark.parametrize("name", SCORES)
def test_a_score_draws_given_the_last_closures(run, name):
    """From training to the report; the gate's decision is there shell by shell."""
    changes = [
        *SCORES[name],
        f"name={name}",
        "use.data=small",
        "train.steps=4",
        "model.validate_parts=off",
    ]
    experiment = reading.load(run.config, [*changes, "evaluate.samples=4", *ALONE])
    assert train.run(experiment, Options(verbosity=-1)) == 0
    assert evaluate.run(experiment, Options(verbosity=-1, partial=True)) == 0
    closure = hpc_closure.load(Run.of(experiment).model)
    assert closure.model.score_active and closure.config["conditions"]["previous_closures"] == 2
    scores = pd.read_csv(Run.of(experiment).scores_csv)
    gains = scores[scores.score == "gain_residual"]
    assert (gains["value"] == 1).all() and len(gains) == gains["shell"].nunique() > 4
    told = set(scores[scores.method == "model"]["score"])
    assert ("gain_mean" in told) == ("variance_high_over_low" in told) == (name != "fno_score")
    page = Run.of(experiment).report.read_text()
    assert "Gain of the generator per wavenumber shell" in page
