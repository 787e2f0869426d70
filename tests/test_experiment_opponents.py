"""Opponents of a run: experiments of their own, on its data and from its starts."""

import pandas as pd
import pytest
from conftest import TINY, four_verbs

from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.opponents import folder_of, opponents_of
from hpc_closure.experiment.schema import Experiment

NAMES = ["gaussian_modes", "gaussian_state", "mixture"]
ALL = f"train.opponents=[{','.join(NAMES)}]"


def test_they_change_no_hash_and_have_their_own(tiny):
    plain, beside = reading.load(tiny), reading.load(tiny, [ALL])
    for stage in ("generate", "train", "rollout"):
        assert plain.stage_hash(stage) == beside.stage_hash(stage)
    assert opponents_of(plain) == {}
    found = opponents_of(beside)
    assert list(found) == NAMES
    hashes = {one.stage_hash("train") for one in (beside, *found.values())}
    assert len(hashes) == 4
    for name, one in found.items():
        assert one.stage_hash("generate") == plain.stage_hash("generate")
        assert one.folder == folder_of(beside, name) == beside.folder / "opponents" / name
        assert one.rollout.model_dump(include={"initial_conditions", "t_start", "members"}) == (
            plain.rollout.model_dump(include={"initial_conditions", "t_start", "members"})
        )
        assert one.train.opponents == () and one.rollout.baselines == ()
    assert found["mixture"].use.mean == found["gaussian_state"].use.mean == "gaussian_modes"
    assert found["gaussian_modes"].use.mean is None
    lone = reading.load(tiny, ["train.opponents=[mixture]"])
    assert opponents_of(lone)["mixture"].use.mean is None
    assert opponents_of(reading.load(tiny, [ALL, "use.model=diffusion"])) == {}


def test_only_an_opponent_of_the_same_mean_reuses_it(tiny):
    found = opponents_of(reading.load(tiny, ["train.opponents=[point_mixture,gaussian_modes]"]))
    assert list(found) == ["gaussian_modes", "point_mixture"]
    points = found["point_mixture"]
    assert points.use.mean is None and points.train.steps == found["gaussian_modes"].train.steps


def test_presets_with_a_generator_that_acts_have_them():
    assert [reading.load(name).train.opponents for name in ("quickstart", "diffusion_64")] == [
        tuple(NAMES),
        (),
    ]


def test_on_a_line_there_are_none():
    with pytest.raises(ValueError, match="are for flows in two dimensions"):
        reading.load("burgers", [ALL])


def test_of_several_fields_there_is_one():
    found = opponents_of(reading.load("clouds", ["train.opponents=[point_mixture]"]))
    assert list(found) == ["point_mixture"] and found["point_mixture"].model.width == 24
    with pytest.raises(ValueError, match=r"train.opponents=\['mixture'\] is for equations of one"):
        reading.load("clouds", ["train.opponents=[mixture,point_mixture]"])


def test_they_stand_in_every_table(tmp_path):
    changes = [
        ALL,
        "evaluate.sensors=[]",
        "rollout.initial_conditions=2",
        "model.conditions.sensors=none",
    ]
    changes += [
        "model.width=8",
        "model.modes=4",
        "model.mean_layers=1",
        "model.layers=1",
    ]
    experiment: Experiment = four_verbs(tmp_path, TINY, changes)
    for name in NAMES:
        run = Run(folder_of(experiment, name))
        assert run.model.exists() and list(run.rollout.glob("block_*.h5"))
    scores = pd.read_csv(Run.of(experiment).scores_csv)
    for stage in ("generated", "coupled"):
        rows = scores[scores.stage == stage]
        assert set(NAMES) <= set(rows.method)
        paired = rows[rows.score == "energy_score_difference"]
        assert set(NAMES) <= set(paired.method) and "model" not in set(paired.method)
    joint = scores[scores.score == "energy_score_joint_difference"]
    assert set(NAMES) <= set(joint.method)
