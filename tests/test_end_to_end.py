"""The experiment from the first verb to the report, small; the contracts of its products."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import four_verbs

from hpc_closure.closure.artifact import load
from hpc_closure.closure.fields.losses import crps
from hpc_closure.data.reader import DataSet
from hpc_closure.evaluate.rows import COLUMNS
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run

EXPERIMENT = """
base: diffusion_64
name: small
root: {root}
generate: {{grid: 64, members: 10, t_end: 4.0, record: {{start: 2.0, every: 0.1}}}}
train: {{grid: 32, window: null, split: [0.6, 0.2, 0.2], steps: 20, batch: 16,
        validate_every: 10, checkpoint_every: 10}}
rollout: {{members: 8, t_start: 3.0, t_end: 4.0, every: 0.25, interval: 5}}
evaluate: {{lead_times: [0.5, 1.0], grids: [32, 64], samples: 40, members: 8,
           sensors: [{{number: 8}}, {{layout: scattered, number: 20, noise: 0.1}}]}}
cluster: {{members_per_block: 5, device: cpu}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, hpc_closure_command):
    """All four verbs, run as a user does."""
    folder = tmp_path_factory.mktemp("small")
    path = folder / "small.yaml"
    path.write_text(EXPERIMENT.format(root=folder / "runs"))
    for verb in ("generate", "train", "rollout", "evaluate"):
        done = hpc_closure_command(verb, path, timeout=400)
        assert done.returncode == 0, f"{verb}: {done.stderr}"
    return path


@pytest.fixture(scope="module")
def rows(finished):
    with open(reading.load(finished).folder / "evaluate/scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def value(rows, method, score, **where):
    found = [
        float(row["value"])
        for row in rows
        if row["method"] == method
        and row["score"] == score
        and row["shell"] == ""
        and all(row[key] == str(wanted) for key, wanted in where.items())
    ]
    assert len(found) == 1, (method, score, where, found)
    return found[0]


def test_products_have_the_promised_names(finished):
    folder = reading.load(finished).folder
    for name in (
        "config.yaml",
        "provenance.jsonl",
        "train/model.safetensors",
        "train/metrics.csv",
        "evaluate/scores.csv",
        "evaluate/scores.json",
        "evaluate/report.html",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert {p.suffix for p in (folder / "evaluate/figures").iterdir()} == {".png", ".pdf", ".csv"}
    assert list((folder / "train/tensorboard").iterdir())


def test_score_rows_have_the_columns_of_the_contract(finished, rows):
    assert (
        list(rows[0])
        == list(COLUMNS)
        == (
            "stage,closure,method,grid,lead_time,shell,score,value,low,high,sensors,evaluations,"
            "interval,members,samples,split,seeds,channel"
        ).split(",")
    )
    for method in ("model", "none", "oracle", "physics", "climatology"):
        assert any(row["method"] == method and row["stage"] == "generated" for row in rows)
    assert any(row["method"] == "fourier" and row["sensors"] == "8x8" for row in rows)
    assert not any(row["method"] == "fourier" and row["sensors"] == "none" for row in rows)
    plain = json.loads((reading.load(finished).folder / "evaluate/scores.json").read_text())
    fourier = {note["sensors"] for note in plain["absent"] if note["method"] == "fourier"}
    assert "none" in fourier and "8x8" not in fourier


def test_the_oracle_is_the_exact_law_of_the_runs_own_data(rows):
    """Its error is sigma / rms(U), up to the noise that these few snapshots realised."""
    where = {"stage": "generated", "grid": 32, "sensors": "none"}
    floor = value(rows, "oracle", "floor", **where)
    realised = value(rows, "oracle", "floor_realised", **where)
    assert realised == pytest.approx(floor, rel=0.06)
    mean = value(rows, "oracle", "relative_error_mean", **where)
    assert mean == pytest.approx(realised * (1 + 1 / 8) ** 0.5, rel=0.05)


def test_the_model_is_near_the_oracle_and_far_from_nothing(rows):
    for grid in (32, 64):
        where = {"stage": "generated", "grid": grid, "sensors": "none"}
        assert value(rows, "model", "crps_ratio", **where) < 1.15
        assert 0.85 < value(rows, "model", "spread_ratio", **where) < 1.15
    where = {"stage": "generated", "grid": 32, "sensors": "8x8"}
    model, alone = (value(rows, m, "relative_error_mean", **where) for m in ("model", "fourier"))
    assert model < alone


def test_the_coupled_run_beats_no_closure_and_climatology(rows):
    where = {"stage": "coupled", "lead_time": 1.0}
    error = {
        m: value(rows, m, "relative_error_mean", **where)
        for m in ("model", "none", "climatology", "oracle")
    }
    assert error["model"] * 5 < error["none"]
    assert error["model"] < error["climatology"]
    assert error["model"] < 5 * error["oracle"]
    assert 0.6 < value(rows, "model", "spread_ratio", **where) < 1.6


def test_a_second_run_does_nothing(finished, hpc_closure_command):
    done = hpc_closure_command("generate", finished)
    assert "0 unit(s) done now, 2 before" in done.stderr
    done = hpc_closure_command("train", finished)
    assert "nothing to do" in done.stderr
    done = hpc_closure_command("status", finished)
    assert "all done" in done.stdout


@pytest.mark.parametrize(
    "change, method",
    [
        ("model.conditions.physics_estimate=true", "model+physics"),
        ("model.preset=one_pass", "model"),
        ("model={preset: default, width: 8, schedule: trigonometric}", "model"),
        ("model={preset: published, width: 8, conditions: {sensors: required}}", "model"),
    ],
)
def test_every_kind_of_model_goes_from_the_file_to_the_report(
    finished, hpc_closure_command, change, method
):
    """On the data of the other run; what was granted has a name of its own, and no certificate."""
    side = "evaluate.sensors=[{number: 16}]"
    own = [
        "name=kind",
        "evaluate.formats=[]",
        "evaluate.samples=12",
        "use.data=small",
        change,
        side,
        "evaluate.grids=[32]",
        "rollout.sensors={number: 16}",
    ]
    for verb, *more in (("train",), ("evaluate", "--partial")):
        done = hpc_closure_command(verb, finished, *own, *more, "--overwrite", "--yes")
        assert done.returncode == 0, done.stderr
    folder = reading.load(finished, own).folder / "evaluate"
    with open(folder / "scores.csv", newline="") as file:
        found = list(csv.DictReader(file))
    names = {row["method"] for row in found}
    assert method in names and {"oracle", "physics"} <= names
    assert ("model" in names) == (method == "model")
    page = (folder / "report.html").read_text()
    assert ("granted an estimate of the closure" in page) == (method != "model")
    assert ("Calibration (diffusion" in page) == (method == "model")
    assert ("held 5 steps as published, not rescaled" in page) == ("published" in change)


def test_other_settings_are_refused_with_the_keys_that_differ(finished, hpc_closure_command):
    done = hpc_closure_command("rollout", finished, "physics.viscosity=2e-3")
    assert done.returncode == 1
    assert "physics.viscosity: 0.001 -> 0.002" in done.stderr


def test_another_run_uses_its_data_and_model(finished, hpc_closure_command):
    """Other rollout settings beside the first ones; nothing is generated or trained again."""
    other = [finished, "name=other", "rollout.interval=10", "use.data=small", "use.model=small"]
    status = hpc_closure_command("status", *other)
    assert status.stdout.count("model.safetensors") == 1 and "next: hpc-closure rollout" in (
        status.stdout
    )
    assert hpc_closure_command("rollout", *other, timeout=400).returncode == 0
    folder = reading.load(finished).folder.parent / "other"
    assert list((folder / "rollout").glob("*.h5")) and not (folder / "data").exists()
    done = hpc_closure_command("generate", *other)
    assert done.returncode == 1 and "use.data=small: the data are those of another" in done.stderr
    done = hpc_closure_command("train", *other)
    assert done.returncode == 1 and "use.model=small: the model is there already" in done.stderr
    wrong = hpc_closure_command("rollout", *other, "physics.viscosity=2e-3", "name=third")
    assert wrong.returncode == 1 and "physics.viscosity: 0.001 -> 0.002" in wrong.stderr
    wrong = hpc_closure_command("rollout", *other[:-1], "use.model=nobody", "name=third")
    assert wrong.returncode == 1
    assert "use.model=nobody: no run, file or shipped model of this name" in wrong.stderr
    assert not (folder.parent / "third").exists()


def test_the_closure_answers_in_somebody_elses_solver(finished):
    import numpy as np

    import hpc_closure

    closure = hpc_closure.load(reading.load(finished).folder / "train/model.safetensors")
    state = np.random.default_rng(0).standard_normal((64, 64))
    drawn = closure.sample(state, members=[3, 9], seed=1, call=2)
    again = closure.sample(state, members=[9], seed=1, call=2)
    assert drawn.shape == (2, 64, 64) and drawn.dtype == state.dtype
    assert np.allclose(drawn[1], again[0], atol=1e-5 * drawn.std())
    assert not np.allclose(drawn, closure.sample(state, members=[3, 9], seed=1, call=3))


# ---- two layers

LAYERS = """
base: two_layer_quick
name: layers
root: {root}
model: {{conditions: {{previous_closures: 0}}}}
generate: {{grid: 48, members: 16, t_end: 110.0, dt: 0.125, interval: 8,
           record: {{start: 30.0, every: 5.0, grid: 24}}}}
train: {{split: [0.5, 0.25, 0.25], steps: 20, batch: 16}}
reduced: {{step: 1}}
replicas: {{members: 3, spinup: 5.0}}
rollout: {{members: 3, initial_conditions: 4, t_start: 50.0, t_end: 80.0, every: 5.0,
          interval: 8, rungs: [{{grid: 32, start: moved, step: 1}}]}}
evaluate: {{lead_times: [5, 10, 30], formats: [], samples: 40, members: 8}}
cluster: {{members_per_block: 16, device: cpu, threads: 1}}
"""


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    """An experiment of two layers from DNS to report."""
    return four_verbs(tmp_path_factory.mktemp("layers"), LAYERS)


def errors(layers, change):
    """CRPS (2,) of the closure of each layer over its size, given states that are changed.

    Args:
        layers: the experiment.
        change: states (B, 2, n, n) and their sizes (2, 1, 1) to the states that are given.
    """
    data, model = DataSet(layers.folder / "data"), load(Run.of(layers).model)
    test = [(m, time) for m in data.split(layers.train.split)["test"] for time in range(0, 17, 4)]
    states, targets = (
        np.stack([data.read(m, time, name, 24) for m, time in test]).astype(np.float64)
        for name in ("state", "closure")
    )
    size, scale = (np.sqrt((x**2).mean((0, 2, 3)))[:, None, None] for x in (states, targets))
    members = [list(range(8))] * len(test)
    drawn = model.sample(change(states, size).copy(), members=members, seed=1)
    ensemble = torch.from_numpy(np.asarray(drawn)).double().transpose(0, 1) / scale
    truth = torch.from_numpy(targets / scale)
    return [float(crps(ensemble[:, :, layer], truth[:, layer]).mean()) for layer in range(2)]


def test_a_model_of_layers_that_it_does_not_see_is_clearly_worse(layers):
    right = errors(layers, lambda states, size: states)
    assert right[0] < 0.5 and right[1] < 0.75
    exchanged = errors(layers, lambda states, size: (states / size)[:, ::-1] * size)
    assert exchanged[0] > 1.6 * right[0] and exchanged[1] > 1.4 * right[1]

    def of_another(layer):
        """Take this layer from another trajectory."""

        def change(states, size):
            changed = states.copy()
            changed[:, layer] = np.roll(changed[:, layer], 5, 0)
            return changed

        return change

    for layer in (0, 1):
        found = errors(layers, of_another(layer))
        assert found[0] > 2 * right[0] and found[1] > 2 * right[1]


def test_each_layer_has_scores_of_its_coupled_runs(layers):
    with open(layers.folder / "evaluate/scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for channel in ("q_upper", "q_lower"):
        chosen = [row for row in rows if row["channel"] == channel and row["stage"] == "coupled"]
        ratios = {
            method: value(chosen, method, "crps_ratio", lead_time=30.0)
            for method in ("model", "none", "rung_32_moved", "climatology")
        }
        assert ratios["model"] < 0.85 * ratios["none"] and ratios["none"] < ratios["climatology"]
        assert 0.8 < ratios["rung_32_moved"] < 1.4
