"""Who answers in the tables of a run: each method's rows against what it draws."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, four_verbs

import hpc_closure
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.part_report import describe
from hpc_closure.data.reader import CoupledEnsemble
from hpc_closure.evaluate import compare, methods, rows
from hpc_closure.evaluate import verb as evaluate
from hpc_closure.evaluate.context import Inputs
from hpc_closure.evaluate.methods import Methods
from hpc_closure.evaluate.report.summary import facts
from hpc_closure.evaluate.rows import find, select
from hpc_closure.evaluate.scores import pointwise
from hpc_closure.evaluate.scores.paired import DIFFERENCES
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.method_names import METHODS, MODELS
from hpc_closure.experiment.models import RIVALS
from hpc_closure.rollout import verb as rollout
from hpc_closure.train import verb as train
from hpc_closure.work import atomic
from hpc_closure.work.options import Options

QUIET = Options(verbosity=-1)
REFERENCES = "rollout.baselines=[none,oracle,mean_gp]"


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A run through the four verbs."""
    return four_verbs(tmp_path_factory.mktemp("methods"), TINY, [REFERENCES])


def written(experiment):
    """The score rows of a run, and its absent methods."""
    run = Run.of(experiment)
    table = rows.read(run.scores_csv)
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
            state, members=[keyed_noise.pair(m, row) for m in range(4)], seed=0, method="mean_gp"
        )
        for row, state in enumerate(snapshots.states)
    ]
    truth = snapshots.closures.double()
    expected = pointwise.relative_error(torch.stack(drawn, 1).double(), truth).mean()
    row = find(
        select(table, stage="generated", sensors="none"),
        method="mean_gp",
        score="relative_error",
        shell=None,
    )
    assert row.value == pytest.approx(float(expected), rel=1e-6)
    assert (row.evaluations, row.members) == (0, 4)


def in_batches(inputs, layout, monkeypatch):
    """Samples of every trained method in batches of two snapshots and alone, and the calls."""
    snapshots, calls = inputs.snapshots(inputs.experiment.score_grids[0]), []
    sampler = inputs.closure.sample

    def sample(state, **options):
        calls.append(len(state))
        return sampler(state, **options)

    monkeypatch.setattr(inputs.closure, "sample", sample)
    samplers = Methods(inputs, snapshots, layout, snapshots.closures).samplers
    found = {}
    for name in {"model", "mean_gp"} & set(samplers):
        for at_once in (2, 1):
            values = at_once * 4 * snapshots.states[0].numel()
            monkeypatch.setitem(methods.BATCH_VALUES, "cpu", values)
            # the third batch is not full
            found[name, at_once] = samplers[name](torch.tensor([3, 1, 2, 0, 2]), 4)
    return found, calls


@pytest.mark.parametrize("sensors", [False, True])
def test_snapshots_of_a_batch_are_sampled_as_each_alone(experiment, monkeypatch, sensors):
    layout = experiment.evaluate.sensors[0] if sensors else None
    found, calls = in_batches(inputs_of(experiment), layout, monkeypatch)
    assert calls == 2 * [2, 2, 1, 1, 1, 1, 1, 1] and len(found) == 4
    for name in ("model", "mean_gp"):
        together, alone = found[name, 2], found[name, 1]
        assert together.shape == (4, 5, 16, 16) and torch.equal(together[:, 2], together[:, 4])
        assert torch.allclose(together, alone, atol=1e-5 * float(alone.abs().max()))
        assert not torch.allclose(together[:, 0], together[:, 1], rtol=0.1)


def test_mean_gp_is_run_stored_and_scored_in_the_coupled_run(experiment):
    table, _ = written(experiment)
    own = select(table, stage="coupled", method="mean_gp", shell=None)
    model = select(table, stage="coupled", method="model", shell=None)
    skipped = {"cost_ms", "cost_us", "cost_ratio"}
    assert set(own["score"]) - set(DIFFERENCES) == set(model["score"]) - skipped
    assert set(own["lead_time"].dropna()) == {0.1, 0.2}
    stored = CoupledEnsemble(sorted(Run.of(experiment).rollout.glob("*.h5")))
    index = stored.index(0.2)
    ensemble, truth = (torch.from_numpy(stored.read(k, index)) for k in ("mean_gp", "truth"))
    expected = pointwise.relative_error(ensemble.double(), truth[0].double()).mean()
    row = find(own, score="relative_error", lead_time=0.2)
    assert row.value == pytest.approx(float(expected), rel=1e-9)
    assert (own["evaluations"] == 0).all()


def test_the_report_and_the_log_begin_with_what_acts(experiment, capsys):
    run = Run.of(experiment)
    told = describe(hpc_closure.load(run.model).parts())
    again = reading.load(run.config, ["evaluate.seed=1"])
    capsys.readouterr()
    assert evaluate.run(again, Options()) == 0
    last = capsys.readouterr().err.splitlines()[-4:]
    assert last[0].endswith(told) and "the model's CRPS is " in last[2]
    assert "scored on the 2 test trajectories that train.split holds back" in last[1]
    assert "report: " in last[3]
    page = run.report.read_text()
    assert page.index(told[1:20]) < page.index("<h2>Headlines")


def test_the_generator_is_described_by_grid_modes_and_evaluations(experiment):
    inputs = inputs_of(experiment)
    model = inputs.closure.model
    assert facts(inputs)["Model"]["parts"] == describe(inputs.closure.parts())
    words = facts(inputs)["Model"]["generator"]
    number = inputs.closure.evaluations(None)
    size, modes = model.frame.size, model.frame.kept.modes
    on = f"on a {size}x{size} grid, {modes} modes, {number} evaluation"
    assert words.startswith(on) if number else words == "does not act"
    inputs.closure.evaluations = lambda asked: 4
    assert facts(inputs)["Model"]["generator"] == (
        f"on a {size}x{size} grid, {modes} modes, 4 evaluations"
    )


# ---- further closures -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def others(experiment, tmp_path_factory):
    """Runs beside the first: on its data another model, with a coupled run, and one without."""
    path = tmp_path_factory.mktemp("others") / "tiny.yaml"
    path.write_text(TINY.format(root=experiment.folder.parent))
    data = f"use.data={experiment.folder.name}"
    words = ["train.window=[0.2,0.3]", "model.conditions.sensors=none"]
    other = reading.load(path, [REFERENCES, data, "name=other", "evaluate.sensors=[]", *words])
    for verb in (train, rollout):
        assert verb.run(other, QUIET) == 0
    return path, data


def test_a_compared_closure_answers_the_same_snapshots_and_starts(experiment, others):
    path, data = others
    words = [REFERENCES, data, f"use.model={experiment.folder.name}"]
    model = Run.of(experiment).model
    chosen = f"evaluate.compare={{early: other, file: {model}, same: {experiment.folder}}}"
    both = reading.load(path, [*words, "name=both", chosen])
    assert rollout.run(both, QUIET) == 0 and evaluate.run(both, QUIET) == 0
    table, absent = written(both)
    for stage in ("generated", "coupled"):
        part = select(table, stage=stage, shell=None)
        part = part[~part["score"].isin(["cost_ms", "cost_us", "cost_ratio", "wasserstein1"])]
        apart = part[part["score"].isin(DIFFERENCES)]
        assert (select(apart, method="same")["value"] == 0).all()
        assert len(select(apart, method="early")) and not len(select(apart, method="model"))
        part = part[~part["score"].isin(DIFFERENCES)]
        rows_of = {
            name: part[part["method"] == name].drop(columns="method").reset_index(drop=True)
            for name in ("model", "file", "same", "early", "mean_gp")
        }
        own = rows_of["model"]
        assert len(own) > 20
        # the same closure under another name has the same rows
        assert rows_of["same"].equals(own)
        if stage == "generated":
            assert rows_of["file"].equals(own)
        assert len(rows_of["early"]) and not rows_of["early"]["value"].equals(own["value"])
        assert set(rows_of["early"]["sensors"]) == {"none"}
    reasons = {(note["stage"], note["method"], note["sensors"]): note["reason"] for note in absent}
    sensors = next(name for name in set(table["sensors"]) if name != "none")
    assert "conditions.sensors=none: pass sensors=None" in reasons["generated", "early", sensors]
    assert reasons["coupled", "file", None].startswith("a model file has no coupled run")
    # all of it is in the hash, and in what a second evaluation looks at
    alone = reading.load(path, [*words, "name=both"])
    assert alone.stage_hash("evaluate") != both.stage_hash("evaluate")
    assert alone.stage_hash("rollout") == both.stage_hash("rollout")
    before = Run.of(both).report.stat().st_mtime_ns
    assert evaluate.run(both, QUIET) == 0
    assert Run.of(both).report.stat().st_mtime_ns == before
    one = next(one for one in compare.chosen(both) if one.name == "early")
    assert one.path in one.paths and len(one.paths) == 5


@pytest.mark.parametrize(
    "change, reason",
    [
        ("rollout.interval=1", "its coupled run has rollout.interval=2, here 1"),
        (
            "rollout.initial_conditions=1",
            "its coupled run has rollout.initial_conditions=2, here 1",
        ),
        ("generate.t_end=0.6", ""),
        ("rollout.members=2", ""),
        ("generate.dt=0.0025", "its data have generate.dt=0.005, here 0.0025"),
        ("rollout.t_end=0.3", ""),
    ],
)
def test_a_coupled_run_of_other_settings_is_absent(experiment, others, change, reason):
    path, data = others
    words = [REFERENCES, data, "name=another", "evaluate.lead_times=[0.1]", change]
    stored = CoupledEnsemble(sorted(Run.of(experiment).rollout.glob("*.h5")))
    one = compare.Compared("other", experiment.folder, Run(experiment.folder.parent / "other"))
    found = compare.coupled(one, reading.load(path, words), stored)
    if reason:
        assert found == reason
    else:
        assert isinstance(found, CoupledEnsemble) and found.cases == stored.cases


def test_an_unfinished_coupled_run_is_absent(experiment, others, tmp_path):
    path, data = others
    run = Run(tmp_path / "moved")
    shutil.copytree(experiment.folder.parent / "other", run.root)
    stored = CoupledEnsemble(sorted(Run.of(experiment).rollout.glob("*.h5")))
    one = compare.Compared("other", run.model, run)
    assert isinstance(compare.coupled(one, experiment, stored), CoupledEnsemble)
    sorted(run.rollout.glob("*.h5"))[0].unlink()
    assert "the rollout is not complete (3 done" in compare.coupled(one, experiment, stored)


def test_what_cannot_be_compared_is_one_line(experiment, others, tmp_path):
    path, data = others

    def refused(words, *changes):
        with pytest.raises(ValueError, match=words) as caught:
            compare.chosen(reading.load(path, [data, *changes]))
        assert "\n" not in str(caught.value)

    refused(
        "evaluate.compare.a=nowhere: no run, file or shipped model of this name",
        "evaluate.compare={a: nowhere}",
    )
    refused(
        r"evaluate.compare.a=convection: its closure is convection, the experiment's is diffusion",
        "evaluate.compare={a: convection}",
    )
    refused(
        r"evaluate.compare.a=other: its dt is 0.005, the experiment's is 0.0025",
        "evaluate.compare={a: other}",
        "generate.dt=0.0025",
    )
    refused("oracle_2 is the name of a built-in method", "evaluate.compare={oracle_2: other}")
    refused("mean_gp is the name of a built-in method", "evaluate.compare={mean_gp: other}")
    refused("should match pattern", "evaluate.compare={a b: other}")
    foreign = tmp_path / "model.safetensors"
    foreign.write_bytes(b"no model")
    refused("not a whole model file", f"evaluate.compare={{a: {foreign}}}")


def test_methods_are_described_once_and_sorted_as_they_are_listed():
    names = [method.name for method in METHODS]
    assert len(set(names)) == len(names) and all(method.meaning for method in METHODS)
    assert {*MODELS, *RIVALS, "mean_gp"} <= set(names)
    assert {one.name for one in METHODS if one.opponent} == {*RIVALS, "mean_gp"}
    found = rows.sort_methods(["none", "rung_64", "mine", "oracle_x0.9", *reversed(names)])
    assert [name for name in found if name in names] == names
    assert found.index("mixture") < found.index("mine") < found.index("mean_gp")
    assert found.index("oracle") < found.index("oracle_x0.9") < found.index("physics")
    assert found[-2:] == ["rung_64", "none"]


def test_what_the_coupled_run_leaves_out_is_absent(experiment):
    from hpc_closure.evaluate.stages.coupled import absent_references

    reasons = {note.method: note.reason for note in absent_references(inputs_of(experiment), ())}
    assert reasons["mean_gp"] == "rollout.baselines leaves it out"
    inputs = inputs_of(experiment)
    inputs.closure.config["preset"] = "published"
    reasons = {note.method: note.reason for note in absent_references(inputs, ())}
    assert reasons["mean_gp"] == "the model has no mean and Gaussian law of its own"
    own = Methods(inputs, inputs.snapshots(16), None, inputs.climatology(16))
    assert own.absent["mean_gp"] == reasons["mean_gp"]
    assert "mean_gp" not in own.samplers
