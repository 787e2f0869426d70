"""The settings of a training are the experiment's section ``train``, whole and alone."""

import ast
from pathlib import Path

import pytest

import hpc_closure.train
from hpc_closure.experiment import opponents
from hpc_closure.experiment.schema import RolloutTraining, Train
from hpc_closure.train.trainer import WARM_UP, learning_rate

FOLDER = Path(hpc_closure.train.__file__).parent


def settings_read() -> set[str]:
    """Keys read from what the wing calls ``settings``, ``section``, ``rollout_training``, or
    from ``experiment.train``."""
    names = set()
    for path in (*FOLDER.glob("*.py"), Path(opponents.__file__)):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value
                word = getattr(owner, "attr", getattr(owner, "id", ""))
                whole = (
                    word == "train"
                    and getattr(getattr(owner, "value", None), "id", "") == "experiment"
                )
                if whole or word in ("settings", "section", "rollout_training"):
                    names.add(node.attr)
                if node.attr == "train_grid":  # train.grid, or the grid of the data
                    names.add("grid")
    return names - set(dir(Train))


def test_every_key_is_read_and_nothing_else():
    assert settings_read() == set(Train.model_fields) | set(RolloutTraining.model_fields)


@pytest.mark.parametrize("section", [Train, RolloutTraining])
def test_every_key_is_explained(section):
    assert all(key.description for key in section.model_fields.values())


def test_sharding_needs_deepspeed():
    with pytest.raises(ValueError, match="zero_stage=1 needs DeepSpeed, but engine=torch"):
        Train(engine="torch", zero_stage=1)


def test_learning_rates():
    steps = 1000
    constant = Train(lr=0.5, schedule="constant")
    assert {learning_rate(constant, step, steps) for step in range(steps)} == {0.5}
    published = Train(lr=0.8, schedule="published")
    rates = [learning_rate(published, step, steps) for step in (0, 199, 200, 999)]
    assert rates == [0.8, 0.8, 0.4, 0.05]
    cosine = [learning_rate(Train(lr=1.0), step, steps) for step in range(steps)]
    peak = round(WARM_UP * steps)
    assert cosine[0] == pytest.approx(1 / peak) and cosine[peak] == max(cosine) == 1.0
    assert cosine[peak:] == sorted(cosine[peak:], reverse=True) and cosine[-1] < 1e-4
