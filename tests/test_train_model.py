"""The real models through the trainer: phases, scores, restart, export."""

from dataclasses import replace

import pytest
import torch
import trajectory_case
from train_case import GRID, run_fit

from hpc_closure.closure.artifact import build
from hpc_closure.data.reader import DataSet
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.generate import verb as generate
from hpc_closure.train import checkpoint, metrics, verb
from hpc_closure.work import log
from hpc_closure.work.stop import Stopped

SETTINGS = {"steps": 24, "engine": "torch", "validate_every": 8}


def train(folder, preset="default", **settings):
    """A training of a preset; of ``trajectory`` one that ends with a phase through the solver."""
    log.setup()
    if preset == "trajectory":
        model, data = trajectory_case.model(), trajectory_case.data()
        return run_fit(folder, model=model, data=data, **settings)
    torch.manual_seed(0)
    run_fit(folder, model=build({"preset": preset, "width": 8, "modes": 4}, GRID), **settings)


def rows(folder):
    keys = ("seconds",)
    found = metrics.read(Run(folder).metrics)
    return [{key: value for key, value in row.items() if key not in keys} for row in found]


@pytest.fixture(scope="module", params=["default", "fno_score", "published", "trajectory"])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    train(folder, request.param, **SETTINGS)
    return request.param, folder


def test_phases_and_scores(trained):
    preset, folder = trained
    found = rows(folder)
    names = ["mean", "trajectory"]
    if preset != "trajectory":
        names = [phase.name for phase in build({"preset": preset}, GRID).phases if phase.share]
    assert list(dict.fromkeys(row["phase"] for row in found)) == names
    assert {"train_error", "valid_error", "valid_crps", "valid_spread_skill"} <= set(found[-1])
    assert Run(folder).model.exists()


def test_stopped_in_every_phase(trained, tmp_path):
    """Bit-equal losses, scores and statistics, wherever it was stopped."""
    preset, folder = trained
    for _ in range(8):
        try:
            train(tmp_path, preset, max_steps=6, **SETTINGS)
        except Stopped:
            continue
        break
    assert rows(tmp_path) == rows(folder)
    ours, theirs = (
        checkpoint.load(checkpoint.newest(Run(run).checkpoints)).tensors
        for run in (tmp_path, folder)
    )
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].keys() == theirs[name].keys()
        assert all((ours[name][key] == theirs[name][key]).all() for key in theirs[name])


def test_through_the_solver_the_best_is_kept(tmp_path, capfd):
    """Judged by coupled runs of members held out, the untrained model among the candidates."""
    train(tmp_path, "trajectory", **SETTINGS)
    told = capfd.readouterr().err
    found = [row for row in rows(tmp_path) if row["phase"] == "trajectory"]
    assert [row["step"] for row in found if "valid_loss" in row] == [32, 36]
    line = next(line for line in told.splitlines() if "trajectory: coupled score" in line)
    before, after = (float(line.split(word)[0].split()[-1]) for word in (" before", " after"))
    judged = [row["valid_loss"] for row in found if "valid_loss" in row]
    assert after == pytest.approx(min(before, *judged), rel=1e-3)
    kept = checkpoint.load(checkpoint.newest(Run(tmp_path).checkpoints)).tensors
    better = min(judged) < before * (1 - 1e-3)
    assert bool((kept["weights"]["adjustment.log_noise"] != 0).any()) >= better
    assert kept["statistics"]["trajectory/noise"].shape == (8,)


def test_of_a_learning_rate_that_ruins_it_nothing_is_kept(tmp_path, capfd):
    log.setup()
    model, data = trajectory_case.model(), trajectory_case.data()
    model.phases = tuple(
        replace(phase, through=replace(phase.through, lr=1.0)) if phase.through else phase
        for phase in model.phases
    )
    run_fit(tmp_path, model=model, data=data, **SETTINGS)
    kept = checkpoint.load(checkpoint.newest(Run(tmp_path).checkpoints)).tensors["weights"]
    assert not kept["adjustment.log_noise"].any() and not kept["adjustment.terms"].any()
    assert "do not act: training through the solver" in capfd.readouterr().err


def test_bfloat16(tmp_path):
    train(tmp_path / "half", precision="bfloat16", **SETTINGS)
    train(tmp_path / "full", **SETTINGS)
    one, other = ([row["loss"] for row in rows(tmp_path / name)] for name in ("full", "half"))
    assert one != other and other == pytest.approx(one, rel=3e-2)


def test_too_few_trajectories_to_decide_are_told(tiny, capfd):
    """Otherwise a training would end with parts that no one has judged, and so do not act."""
    log.setup()
    experiment = reading.load(tiny)
    assert generate.run(experiment) == 0
    store = DataSet(Run.of(experiment).data)
    try:
        for changes, told in (([], True), (["model.validate_parts=off"], False)):
            capfd.readouterr()
            verb.samples(reading.load(tiny, changes), store)
            line = "validation trajectories are too few to judge the trained parts (8 are needed)"
            assert (line in capfd.readouterr().err) == told
    finally:
        store.close()
