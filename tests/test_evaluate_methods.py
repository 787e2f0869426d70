"""Who answers in the tables of a run: each method's rows against what it draws."""

from types import SimpleNamespace

import pandas
import pytest
import torch
from conftest import TINY

from hpc_closure.closure import draws
from hpc_closure.data.reader import CoupledEnsemble
from hpc_closure.evaluate import rows, scores
from hpc_closure.evaluate import verb as evaluate
from hpc_closure.evaluate.inputs import Inputs
from hpc_closure.evaluate.methods import Methods
from hpc_closure.evaluate.rows import find, select
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.generate import verb as generate
from hpc_closure.rollout import verb as rollout
from hpc_closure.train import verb as train
from hpc_closure.work import atomic
from hpc_closure.work.options import Options

QUIET = Options(verbosity=-1)
REFERENCES = "rollout.references=[none,oracle,mean_gp]"


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A run through the four verbs."""
    path = tmp_path_factory.mktemp("methods") / "tiny.yaml"
    path.write_text(TINY.format(root=path.parent / "runs"))
    experiment = reading.load(path, [REFERENCES])
    for verb in (generate, train, rollout, evaluate):
        assert verb.run(experiment, QUIET) == 0
    return experiment


def written(experiment):
    """The score rows of a run, and its absent methods."""
    run = Run.of(experiment)
    table = pandas.read_csv(
        run.scores_csv, dtype=rows.COLUMNS, keep_default_na=False, na_values=""
    )
    return table, atomic.read_json(run.scores_json)["absent"]


def inputs_of(experiment):
    stop = SimpleNamespace(check=lambda: None)
    return Inputs(experiment, SimpleNamespace(run=Run.of(experiment), stop=stop, device="cpu"))


def test_mean_gp_is_the_models_own_law_without_the_generator(experiment):
    table, _ = written(experiment)
    inputs = inputs_of(experiment)
    snapshots = inputs.snapshots(16)
    drawn = [
        inputs.closure.sample(
            state, members=[draws.pair(m, row) for m in range(4)], seed=0, method="mean_gp"
        )
        for row, state in enumerate(snapshots.states)
    ]
    truth = snapshots.closures.double()
    expected = scores.relative_error(torch.stack(drawn, 1).double(), truth).mean()
    row = find(
        select(table, stage="generated", sensors="none"),
        method="mean_gp",
        score="relative_error",
        shell=None,
    )
    assert row.value == pytest.approx(float(expected), rel=1e-6)
    assert (row.evaluations, row.members) == (0, 4)


def test_mean_gp_is_run_stored_and_scored_in_the_coupled_run(experiment):
    table, _ = written(experiment)
    own = select(table, stage="coupled", method="mean_gp", shell=None)
    model = select(table, stage="coupled", method="model", shell=None)
    skipped = {"cost_ms", "cost_ratio"}
    assert set(own["score"]) == set(model["score"]) - skipped
    assert set(own["lead_time"].dropna()) == {0.1, 0.2}
    stored = CoupledEnsemble(sorted(Run.of(experiment).rollout.glob("*.h5")))
    index = stored.index(0.2)
    ensemble, truth = (torch.from_numpy(stored.read(k, index)) for k in ("mean_gp", "truth"))
    expected = scores.relative_error(ensemble.double(), truth[0].double()).mean()
    row = find(own, score="relative_error", lead_time=0.2)
    assert row.value == pytest.approx(float(expected), rel=1e-9)
    assert (own["evaluations"] == 0).all()


def test_what_the_coupled_run_leaves_out_is_absent(experiment):
    from hpc_closure.evaluate.coupled import absent_references

    reasons = {note.method: note.reason for note in absent_references(inputs_of(experiment), ())}
    assert reasons["mean_gp"] == "rollout.references leaves it out"
    inputs = inputs_of(experiment)
    inputs.closure.config["preset"] = "published"
    reasons = {note.method: note.reason for note in absent_references(inputs, ())}
    assert reasons["mean_gp"] == "the published network has no mean and Gaussian law of its own"
    methods = Methods(inputs, inputs.snapshots(16), None, inputs.climatology(16))
    assert methods.absent["mean_gp"] == reasons["mean_gp"]
    assert "mean_gp" not in methods.samplers
