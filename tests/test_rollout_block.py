"""Starts of coupled runs: on a rung, which knows the modes of a coarser grid, and in replicas."""

import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from test_generate_replicas import SMALL as REPLICAS
from test_generate_replicas import make

from hpc_closure.data import held_out
from hpc_closure.data.reader import CoupledEnsemble, DataSet
from hpc_closure.evaluate import verb as evaluate
from hpc_closure.experiment import reading
from hpc_closure.generate import verb as generate
from hpc_closure.rollout import verb as rollout
from hpc_closure.rollout.block import coupled_run, start
from hpc_closure.spectral.modes.grid import to_spectra
from hpc_closure.spectral.modes.resolution import retained_modes
from hpc_closure.train import verb as train

COARSE = """
base: subgrid_quick
name: coarse
root: {root}
physics: {{viscosity: 5e-4}}
generate: {{grid: 72, members: 24, t_end: 9.0, dt: 4e-3, interval: 40,
           record: {{start: 6.0, every: 0.16, grid: 24}}}}
model: {{preset: gaussian, conditions: {{previous_closures: 1}}}}
train: {{split: [0.6, 0.2, 0.2]}}
reduced: {{step: 8}}
replicas: {{members: 3, spinup: 0.96}}
rollout: {{members: 4, initial_conditions: 4, t_start: 7.92, t_end: 8.88, every: 0.16,
          interval: 40, rungs: []}}
evaluate: {{lead_times: [0.16, 0.32, 0.96], samples: 8, members: 4, formats: []}}
cluster: {{members_per_block: 24, device: cpu, threads: 1}}
"""
RUNG = ["name=rung", "generate.record.grid=36", "reduced.known=24", "reduced.step=4"]
MODES = retained_modes(24)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The experiments of a reduced solver on 24^2 and of one on 36^2 that knows as much."""
    folder = tmp_path_factory.mktemp("known")
    path = folder / "coarse.yaml"
    path.write_text(COARSE.format(root=folder / "runs"))
    rung, coarse = reading.load(path, RUNG), reading.load(path)
    for experiment in (rung, coarse):
        for verb in (generate, train, rollout):
            assert verb.run(experiment) == 0
    both = reading.load(path, ["evaluate.compare={rung: rung}"])
    assert evaluate.run(both) == 0
    return both, rung


def ensemble(experiment, stage="rollout"):
    return CoupledEnsemble(sorted((experiment.folder / stage).glob("block_*.h5")))


def resolved(fields):
    return to_spectra(torch.from_numpy(fields).double(), MODES)


def test_replicas_are_pinned_to_what_a_start_knows_and_no_more(made):
    coarse, rung = (ensemble(one, "replicas") for one in made)
    at = rung.index(0.0)
    fields = rung.read("model", at)
    known = resolved(fields)
    assert torch.allclose(known, known[:1].expand_as(known), atol=1e-6)
    assert (fields[0] - fields[1]).std() > 1e-3 * fields.std()
    same = resolved(coarse.read("model", coarse.index(0.0)))
    assert torch.allclose(known, same, atol=1e-6)


def test_a_run_begins_with_the_modes_that_a_start_knows(made):
    coarse, rung = (ensemble(one) for one in made)
    there, here = (resolved(one.read("model", 0)) for one in (rung, coarse))
    assert torch.allclose(there, here, atol=1e-5)
    fields, truth = rung.read("model", 0), rung.read("truth", 0)
    assert (fields - truth).std() > 1e-3 * truth.std()  # its further modes are its own
    assert (fields[0] - fields[1]).std() > 1e-4 * truth.std()


def test_further_modes_follow_the_resolved_past(made):
    """Synchronised they are nearer to the truth's than those of a moved start are."""
    _, rung = made
    moved = reading.load(
        rung.folder / "config.yaml",
        ["reduced.start=moved", "name=moved", "use={data: rung, model: rung}"],
    )
    assert rollout.run(moved) == 0
    errors = {}
    for name, one in (("synchronised", ensemble(rung)), ("moved", ensemble(moved))):
        errors[name] = (one.read("model", 0) - one.read("truth", 0)).std()
    assert errors["synchronised"] < 0.7 * errors["moved"]


def test_one_table_holds_solvers_on_several_grids(made):
    experiment, _ = made
    scores = pd.read_csv(experiment.folder / "evaluate" / "scores.csv")
    coupled = scores[(scores.stage == "coupled") & scores["shell"].isna()]
    assert set(coupled["grid"]) == {24}
    crps = coupled[coupled.score == "crps"].set_index(["method", "lead_time"])["value"]
    assert crps["rung", 0.16] < 0.8 * crps["none", 0.16]
    cost = coupled[coupled.score == "cost_ratio"].set_index("method")["value"]
    assert cost["rung"] > cost["model"] > 0.9
    offline = scores[(scores.stage == "generated") & (scores.method == "rung")]
    assert not len(offline)  # its closure is another solver's
    report = (experiment.folder / "evaluate" / "report.html").read_text()
    assert "it is what a solver on 36^2 lacks, not one on 24^2" in report


def test_a_later_end_goes_on_to_the_same_bits(made):
    """A restart remembers the interval of the start, though the runs began before it."""
    _, rung = made
    more = ["name=longer", "use={data: rung, model: rung}", "evaluate.lead_times=[0.16]"]
    longer = reading.load(rung.folder / "config.yaml", [*more, "rollout.t_end=8.56"])
    assert rollout.run(longer) == 0
    again = reading.load(longer.folder / "config.yaml", ["rollout.t_end=8.88"])
    assert rollout.run(again) == 0
    there, here = ensemble(again), ensemble(rung)
    assert len(there.times) == len(here.times) == 7
    for index in range(7):
        assert np.array_equal(there.read("model", index), here.read("model", index))
    assert np.isfinite(here.read("model", 6)).all()


SPARSE = [
    "generate.record.every=0.32",
    "model.conditions.previous_closures=0",
    "rollout.every=0.32",
]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["reduced.known=36"], "reduced.known=36: expected fewer points a side than the reduced"),
        (["reduced.known=40"], "reduced.known=40: expected fewer points"),
        (
            [*SPARSE, "evaluate.lead_times=[0.96]", "rollout.t_start=7.92"],
            "needs the past at every closure interval: set generate.record.every to 0.16",
        ),
        (["replicas.members=0"], "needs the starts' unresolved modes"),
        (["train.grid=18"], "reduced.known=24"),
    ],
)
def test_what_cannot_be_is_one_line(made, changes, line):
    _, rung = made
    with pytest.raises(ValueError, match=line):
        reading.load(rung.folder / "config.yaml", changes)


# ---- members that begin in the states of replicas ------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(experiment file, its run folder) with data and replicas, nothing trained."""
    folder = tmp_path_factory.mktemp("released")
    path = folder / "small.yaml"
    path.write_text(REPLICAS.format(root=folder / "runs"))
    return path, make(path)


AFTER = [
    *("name=after", "use={data: coarse, model: coarse}", "evaluate.compare={plain: coarse}"),
    *("rollout.after_release=0.32", "rollout.members=2", "evaluate.lead_times=[0.48, 0.96]"),
]


@pytest.fixture(scope="module")
def after(made):
    """The coarse run again, its members begun two stored times after the replicas' release."""
    coarse, _ = made
    experiment = reading.load(coarse.folder / "config.yaml", AFTER)
    assert rollout.run(experiment) == 0
    return experiment


def own_replicas(replicas, rows, name, lead):
    """A field of the replica of every (case, member) so long after the release."""
    fields = replicas.read(name, replicas.index(lead))
    return np.stack([fields[1 + member, replicas.cases.index(case)] for case, member in rows])


def begun(experiment, data, previous):
    """The coupled run of all rows at its start, with a closure that is not asked."""
    conditions = {"previous_states": 0, "previous_closures": previous}
    closure = SimpleNamespace(
        config={"preset": "gaussian", "conditions": conditions},
        averaging_steps=lambda interval: interval,
    )
    rows = range(experiment.rollout.trajectories)
    run = coupled_run(experiment, closure, DataSet(data), rows, "cpu")
    start(run, DataSet(data), experiment)
    return run


@pytest.mark.parametrize("last", ["own", "moved"])
def test_a_member_begins_as_its_replica_is_to_the_bit(released, last):
    """State and last closures are those stored of replica 1 + m; nothing of them is moved."""
    path, folder = released
    words = [
        "rollout.after_release=0.2",
        "evaluate.lead_times=[0.3]",
        f"rollout.last_closures={last}",
    ]
    experiment = reading.load(path, [*words, "model.conditions.previous_closures=2"])
    run, replicas = begun(experiment, folder / "data", 2), ensemble(experiment, "replicas")
    assert len(run.rows) == 6 and run.step_index == round(2.2 / 4e-3)
    for name, lead, there in (
        ("model", 0.2, run.simulations["model"].state),
        ("model", 0.2, run.simulations["none"].state),
        ("closure", 0.1, run.processes["model"].closures[0]),
        ("closure", 0.0, run.processes["model"].closures[1]),
    ):
        kept = own_replicas(replicas, run.rows, name, lead)
        assert torch.equal(there, run._spectra(kept.astype(np.float64)))
        assert (kept.std(0) > 0).all()


def test_lead_times_count_from_the_release(made, after):
    coupled, replicas = ensemble(after), ensemble(made[0], "replicas")
    assert coupled.start == pytest.approx(replicas.start) and len(coupled.times) == 5
    assert coupled.index(0.32) == 0 and coupled.index(0.96) == 4
    rows = [(case, member) for member in (0, 1) for case in coupled.cases]
    kept = own_replicas(replicas, rows, "model", 0.32)
    for name in ("model", "none"):
        fields = coupled.read(name, 0)
        assert fields.shape == (2, 4, 24, 24)
        assert np.allclose(fields.reshape(kept.shape), kept, atol=1e-5 * kept.std())


def test_scores_are_against_the_same_truth_and_true_ensemble(made, after):
    assert evaluate.run(after) == 0
    scores = {
        one.name: pd.read_csv(one.folder / "evaluate" / "scores.csv") for one in (made[0], after)
    }

    def value(run, method, score, lead=0.96):
        rows = scores[run]
        rows = rows[(rows.stage == "coupled") & (rows.method == method) & (rows.score == score)]
        return rows[(rows.lead_time == lead) & rows["shell"].isna()]["value"].item()

    assert value("after", "oracle", "crps") == value("coarse", "oracle", "crps")
    for method in ("model", "none"):  # what is begun near the truth's law stays nearer to it
        assert value("after", method, "crps") < value("coarse", method, "crps")
    assert value("after", "none", "spread") > 0  # it begins in each member's state
    assert "growth_10" in set(scores["coarse"].score) - set(scores["after"].score)
    report = (after.folder / "evaluate" / "report.html").read_text()
    assert "its coupled run has rollout.after_release=0.0, here 0.32" in report


def test_of_a_second_data_set_its_own_replicas_are_read(made, after):
    coarse, _ = made
    words = ["name=second", "seed=77", "generate.members=4", "train.split=[0,0,1]"]
    second = reading.load(coarse.folder / "config.yaml", words)
    assert generate.run(second) == 0
    tested = reading.load(after.folder / "config.yaml", ["name=tested", "use.test=second"])
    held_out.check(tested)
    run = begun(tested, second.folder / "data", 1)
    kept = own_replicas(ensemble(second, "replicas"), run.rows, "model", 0.32)
    there = run.simulations["model"].state
    assert torch.equal(there, run._spectra(kept.astype(np.float64)))
    shutil.rmtree(second.folder / "replicas")
    with pytest.raises(ValueError, match="use.test=second: .*replicas are not complete"):
        held_out.check(tested)


def test_without_the_setting_no_hash_knows_it(made, after):
    plain = reading.load(after.folder / "config.yaml", ["rollout.after_release=0"])
    stages = ("generate", "replicas", "train", "rollout", "evaluate")
    assert "after_release" not in str([plain.stage_settings(stage) for stage in stages])
    differ = [one for one in stages if plain.stage_hash(one) != after.stage_hash(one)]
    assert differ == ["rollout", "evaluate"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["rollout.after_release=-1"], "Input should be greater than or equal to 0"),
        (["rollout.after_release=0.4"], "after_release=0.4 is not a multiple of 0.16; nearest"),
        (["rollout.after_release=0.96"], "begins at 8.88, not before rollout.t_end=8.88"),
        (["evaluate.lead_times=[0.32]"], "evaluate.lead_times: 0.32 is not after rollout.after_"),
        (["replicas.members=0"], "begins in the states of replicas: set replicas.members"),
        (["rollout.members=3"], "one of the 3 is the truth; at most 2"),
        (
            ["rollout.rungs=[{grid: 36, step: 4}]"],
            "excludes rollout.rungs: replicas store no unres",
        ),
        (["generate.record.grid=36", "reduced.known=24"], "excludes reduced.known: replicas "),
        (["train.opponents=[mixture]", "use.model=null"], "excludes train.opponents"),
        (["model.conditions.previous_closures=3", "use.model=null"], "release; at least 0.48"),
        (
            ["use.model=null", "rollout.every=0.32", "evaluate.lead_times=[0.96]"],
            "reads of the past=0.16 is not a multiple of 0.32",
        ),
    ],
)
def test_a_start_that_replicas_do_not_have_is_one_line(after, changes, line):
    with pytest.raises(ValueError, match=line) as error:
        reading.load(after.folder / "config.yaml", changes)
    assert "\n" not in str(error.value)
