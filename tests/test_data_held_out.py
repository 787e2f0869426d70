"""A second data set: rollout and evaluate read starts, truth and replicas from it, all of it."""

import dataclasses
import shutil

import numpy as np
import pytest
from conftest import TINY
from test_evaluate_methods import inputs_of

from hpc_closure.data import held_out
from hpc_closure.data.reader import CoupledEnsemble, DataSet
from hpc_closure.evaluate import verb as evaluate
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.generate import verb as generate
from hpc_closure.rollout import verb as rollout
from hpc_closure.tools import inspect, status
from hpc_closure.train import verb as train
from hpc_closure.work.options import Options

QUIET = Options(verbosity=-1)
SMALL = """
base: subgrid_backscatter_quick
name: small
root: {root}
physics: {{noise: {{wavenumber: 14}}}}
generate: {{grid: 48, members: 12, t_end: 2.5, interval: 25,
           record: {{start: 1.0, every: 0.5, burst: 3, grid: 24}}}}
model: {{preset: gaussian, conditions: {{previous_closures: 2}}}}
train: {{split: [0.5, 0.25, 0.25]}}
reduced: {{step: 5}}
replicas: {{members: 4}}
rollout: {{members: 4, initial_conditions: 3, t_start: 1.5, t_end: 2.5, every: 0.5, interval: 25,
          baselines: [none], rungs: [{{grid: 48, start: moved, step: 5}}]}}
evaluate: {{lead_times: [0.5, 1.0], samples: 12, members: 4, formats: []}}
cluster: {{members_per_block: 12, device: cpu, threads: 1}}
"""
SECOND = (
    "name=second",
    "seed=77",
    "train.split=[0,0,1]",
    "generate.members=5",
    "rollout.initial_conditions=5",
)
TESTED = (
    "name=tested",
    "use.data=small",
    "use.model=small",
    "use.test=second",
    "rollout.initial_conditions=5",
)


def run_all(path, verbs, *changes):
    experiment = reading.load(path, list(changes))
    for verb in verbs:
        assert verb.run(experiment, QUIET) == 0
    return experiment


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A model, a second data set with replicas, and the run that scores the one on the other."""
    path = tmp_path_factory.mktemp("held") / "small.yaml"
    path.write_text(SMALL.format(root=path.parent / "runs"))
    run_all(path, [generate, train])
    run_all(path, [generate], *SECOND)
    run_all(path, [rollout, evaluate], *TESTED)
    return path


@pytest.fixture(scope="module")
def tested(path):
    return reading.load(path, list(TESTED))


def data_of(tested, name):
    return DataSet(
        dataclasses.replace(Run.of(tested), root=tested.folder.parent / name).root / "data"
    )


def test_starts_and_truth_are_of_the_second_data_set(tested):
    coupled = CoupledEnsemble(sorted(Run.of(tested).rollout.glob("block_*.h5")))
    second, training = data_of(tested, "second"), data_of(tested, "small")
    assert coupled.cases == [0, 1, 2, 3, 4]
    for lead in (0.0, 0.5, 1.0):
        truth = coupled.read("truth", coupled.index(lead))[0]
        at = second.time_index(1.5 + lead)
        assert np.array_equal(truth, np.stack([second.read(case, at) for case in range(5)]))
        other = np.stack([training.read(case, at) for case in range(5)])
        assert not np.allclose(truth, other, atol=0.1 * truth.std())
    begun = coupled.read("model", 0)
    states = np.stack([second.read(case, second.time_index(1.5)) for case in range(5)])
    assert np.allclose(begun, states[None], atol=1e-5 * np.abs(states).max())


def test_snapshots_and_true_ensemble_are_of_it_and_climatology_of_the_training(tested):
    inputs = inputs_of(tested)
    second, training = data_of(tested, "second"), data_of(tested, "small")
    assert inputs.parts["test"] == [0, 1, 2, 3, 4] == inputs.replicas.cases
    assert inputs.parts["train"] == training.split([0.5, 0.25, 0.25])["train"]
    snapshots = inputs.snapshots(24)
    assert {member for member, _ in snapshots.keys} == {0, 1, 2, 3, 4}
    for state, (member, index) in zip(snapshots.states, snapshots.keys, strict=True):
        assert np.array_equal(state, second.read(member, index))
    released = inputs.replicas.read("model", inputs.replicas.index(0.0))[0]
    states = np.stack([second.read(case, second.time_index(1.5)) for case in range(5)])
    assert np.allclose(released, states, atol=1e-5 * np.abs(states).max())
    pool = {field.numpy().tobytes() for field in inputs.climatology(24)}

    def closures(data, members):
        times = range(len(data.times))
        return {data.read(m, t, "closure").tobytes() for m in members for t in times}

    assert pool <= closures(training, inputs.parts["train"])
    assert not pool & closures(second, range(5))


def test_the_coupled_climatology_is_of_the_training_data(tested, monkeypatch):
    """The climate is what a user knows before he sees the test set."""
    from hpc_closure.evaluate.stages import coupled

    seen = {}
    monkeypatch.setattr(coupled, "score_channels", lambda *words, **keys: seen.update(all=words))
    inputs = inputs_of(tested)
    with pytest.raises(TypeError):  # what follows has nothing to go on with
        coupled.score_run(inputs)
    states = seen["all"][1]["climatology"](0)
    training, members = data_of(tested, "small"), inputs.parts["train"]
    at = training.time_index(2.0)
    assert np.array_equal(states[:, 0], np.stack([training.read(m, at) for m in members]))


def test_the_first_lines_say_which_data_set_it_is(path, tested, capsys):
    page = Run.of(tested).report.read_text()
    first = page.index("all 5 trajectories of the second data set second (seed 77)")
    assert first < page.index("Headlines</h2>")
    own = run_all(path, [rollout, evaluate], "name=own", "use.data=small", "use.model=small")
    lines = "Scored on the 3 test trajectories that train.split holds back"
    assert lines in Run.of(own).report.read_text()
    capsys.readouterr()
    for verb in (rollout, evaluate):
        assert verb.run(tested, Options(dry_run=True)) == 0
        assert "the second data set second (seed 77)" in capsys.readouterr().out


def test_a_command_without_replicas_leaves_those_of_the_run_usable(path):
    """The stored settings are then those without; the products say whose they are."""
    run_all(path, [train], "replicas.members=0", "rollout.rungs=[]")
    assert reading.load(reading.load(path).folder / "config.yaml").replicas.members == 0
    run_all(path, [generate, train])
    other = reading.load(path, ["replicas.members=5"])
    run_all(path, [train], "replicas.members=0", "rollout.rungs=[]")
    with pytest.raises(ValueError, match="replicas was made with other settings"):
        generate.run(other, QUIET)


def test_opponents_are_coupled_on_the_second_data_set_too(path):
    beside = ["name=beside", "use.data=small", "train.opponents=[resampled]"]
    tested = [*beside, "use.test=second", "rollout.initial_conditions=5"]
    run_all(path, [train], *beside)
    run = Run.of(run_all(path, [rollout, evaluate], *tested))
    lines = [line.split(",") for line in (run.evaluate / "scores.csv").read_text().splitlines()]
    assert "resampled" in {line[lines[0].index("method")] for line in lines[1:]}
    starts = CoupledEnsemble(list((run.opponents / "resampled" / "rollout").glob("*.h5"))).cases
    assert starts == CoupledEnsemble(list(run.rollout.glob("*.h5"))).cases


@pytest.mark.parametrize(
    "changes, message",
    [
        (["use.test=third"], "use.test=third: no run of this name under"),
        (["use.test=small"], r"its seed \d+ is that of the training data \(seed="),
        (["physics.drag=0.2"], "use.test=second: its physics.drag is .* the experiment's is 0.2"),
        (["generate.interval=20"], "its generate.interval is 25, the experiment's is 20"),
        (["rollout.initial_conditions=6"], "use.test=second has 5 trajectories to start from"),
        (
            ["rollout.t_start=2.0", "evaluate.lead_times=[0.5]"],
            r"replicas are made with rollout.t_start=1.5, needed is 2.0",
        ),
        (["seed=77"], r"its seed 77 is that of the training data \(seed=77\)"),
        (
            ["rollout.after_release=0.5", "rollout.rungs=[]", "evaluate.lead_times=[1.0]"],
            "one of the 4 is the truth; at most 3",
        ),
    ],
)
def test_a_test_set_that_does_not_fit_is_one_clear_line(path, changes, message):
    experiment = reading.load(path, [*TESTED, *changes])
    for verb in (rollout, evaluate):
        with pytest.raises(ValueError, match=message) as error:
            verb.run(experiment, QUIET)
        assert "\n" not in str(error.value)


def test_replicas_of_other_starts_are_refused(path):
    """Those of a split are of its test members, not of the first members of all."""
    split = ["name=halves", "seed=78", "generate.members=12", "rollout.initial_conditions=3"]
    run_all(path, [generate], *split)
    experiment = reading.load(path, [*TESTED, "use.test=halves", "rollout.initial_conditions=3"])
    with pytest.raises(ValueError, match=r"made with train.split=\[0.5, 0.25, 0.25\], needed is"):
        held_out.check(experiment)
    alone = ["replicas.members=0", "rollout.rungs=[]"]
    without = reading.load(path, [*TESTED, "use.test=halves", *alone])
    assert held_out.check(without).replicas.members == 0


def test_a_model_trained_on_the_test_set_is_refused(path):
    """Not the run's own data, but those of the model that it uses."""
    other = ["name=other", "seed=79", "use.test=small", "use.model=small"]
    experiment = reading.load(path, [*other, "replicas.members=0", "rollout.rungs=[]"])
    with pytest.raises(ValueError, match=r"that of the training data \(use.model=small\)"):
        rollout.run(experiment, QUIET)


def test_a_test_set_that_is_not_whole_is_said(path):
    run_all(path, [generate], *SECOND, "name=part", "seed=80")
    folder = reading.load(path, ["name=part"]).folder
    shutil.rmtree(folder / "replicas")
    experiment = reading.load(path, [*TESTED, "use.test=part"])
    with pytest.raises(ValueError, match="use.test=part: .*replicas are not complete"):
        rollout.run(experiment, QUIET)


def test_states_of_another_draw_under_the_same_name_are_found(path, tmp_path):
    """The hash has the name of the test set; what the runs began with is looked at."""
    run_all(path, [generate], *SECOND, "name=again", "seed=81")
    experiment = run_all(path, [rollout], *TESTED, "name=later", "use.test=again")
    shutil.rmtree(experiment.folder.parent / "again")
    run_all(path, [generate], *SECOND, "name=again", "seed=82")
    with pytest.raises(ValueError, match="start 0 is no state of use.test=again .seed 82.: run"):
        evaluate.run(experiment, QUIET)


def test_status_and_inspect_know_it(path, tested, tmp_path, capsys):
    assert status.run(tested, ["tested.yaml"]) == 0
    told = capsys.readouterr().out
    assert "test set replicas" in told and "all done" in told and "(seed 77)" in told
    report = inspect.inspect(tested.folder)
    assert report["test set"] == "second" and report["state"]["test set"] == "1 units, 1 done"
    missing = reading.load(path, [*TESTED, "use.test=third", "name=new"])
    assert status.run(missing) == 0
    assert "no run of this name" in capsys.readouterr().out
    second = reading.load(path, list(SECOND))
    assert status.run(second) == 0 and "all done" in capsys.readouterr().out
    shutil.copytree(second.folder, tmp_path / "second")
    shutil.rmtree(tmp_path / "second" / "replicas")
    moved = reading.load(path, [*TESTED, f"use.test={tmp_path / 'second'}", "name=new"])
    assert status.run(moved) == 0
    follow = f"next: hpc-closure generate {tmp_path / 'second' / 'config.yaml'}"
    assert follow in capsys.readouterr().out


def test_a_test_set_only_generates(path, hpc_closure_command):
    for verb in ("train", "rollout", "evaluate"):
        done = hpc_closure_command(verb, path, *SECOND)
        assert done.returncode == 2
        assert "makes a test set for other runs (use.test): there is nothing to " + verb in (
            done.stderr
        )


def test_the_hash_knows_it_where_it_is_set(path):
    plain, tested = (reading.load(path, list(words)) for words in (TESTED[:3], TESTED[:4]))
    same = [
        stage
        for stage in ("generate", "replicas", "train", "rollout", "evaluate")
        if plain.stage_hash(stage) == tested.stage_hash(stage)
    ]
    assert same == ["generate", "replicas", "train"]


def test_the_truth_goes_on_with_the_noise_of_the_second_data_set(tmp_path):
    """Where the truth is run again beside the model, its noise is the seed's of its own data."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(root=tmp_path / "runs"))
    run_all(path, [generate, train])
    run_all(path, [generate], "name=second", "seed=5", "train.split=[0,0,1]")
    changes = ("name=tested", "use.data=tiny", "use.model=tiny", "use.test=second")
    tested = run_all(path, [rollout, evaluate], *changes)
    coupled = CoupledEnsemble(sorted(Run.of(tested).rollout.glob("block_*.h5")))
    second = data_of(tested, "second")
    assert coupled.cases == [0, 1]
    truth = coupled.read("truth", coupled.index(0.2))[0]
    at = second.time_index(0.4)
    there = np.stack([second.read(case, at) for case in coupled.cases])
    assert np.allclose(truth, there, atol=1e-4 * there.std())
