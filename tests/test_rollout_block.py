"""Closures on a rung: a finer reduced solver whose starts know the modes of a coarser grid."""

import numpy as np
import pandas as pd
import pytest
import torch

from hpc_closure.data.reader import CoupledEnsemble
from hpc_closure.evaluate import verb as evaluate
from hpc_closure.experiment import reading
from hpc_closure.generate import verb as generate
from hpc_closure.rollout import verb as rollout
from hpc_closure.spectral.modes.grid import retained_modes, to_spectra
from hpc_closure.train import verb as train

COARSE = """
base: subgrid_quick
name: coarse
root: {root}
physics: {{viscosity: 5e-4}}
generate: {{grid: 72, members: 24, t_end: 9.0, dt: 4e-3, interval: 40,
           record: {{start: 6.0, every: 0.16, grid: 24}}}}
model: {{preset: gaussian, conditions: {{previous: 1}}}}
train: {{split: [0.6, 0.2, 0.2]}}
reduced: {{step: 8}}
replicas: {{members: 3, pinned: 0.96}}
rollout: {{members: 4, cases: 4, t_start: 7.92, t_end: 8.88, every: 0.16, interval: 40, rungs: []}}
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


SPARSE = ["generate.record.every=0.32", "model.conditions.previous=0", "rollout.every=0.32"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["reduced.known=36"], "reduced.known=36: expected fewer points a side than the reduced"),
        (["reduced.known=40"], "reduced.known=40: expected fewer points"),
        (
            [*SPARSE, "evaluate.lead_times=[0.96]", "rollout.t_start=7.92"],
            "follows the past once a closure interval: set generate.record.every to 0.16",
        ),
        (["replicas.members=0"], "needs the starts' unresolved modes"),
        (["train.grid=18"], "reduced.known=24"),
    ],
)
def test_what_cannot_be_is_one_line(made, changes, line):
    _, rung = made
    with pytest.raises(ValueError, match=line):
        reading.load(rung.folder / "config.yaml", changes)
