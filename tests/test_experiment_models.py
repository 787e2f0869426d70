"""Presets of the model: what they resolve to, and what is refused."""

import pytest

from hpc_closure.experiment import reading
from hpc_closure.experiment.kinds import ModelKind
from hpc_closure.experiment.models import PRESETS, RETIRED, preset_names, resolve


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_resolves_to_itself(name):
    resolved = resolve({"preset": name, "width": None})
    values = PRESETS[name] if name in PRESETS else ModelKind.known[name].defaults
    assert {key: resolved[key] for key in values if key != "method"} == {
        key: value for key, value in values.items() if key != "method"
    }
    assert resolve(resolved) == resolved


@pytest.mark.parametrize("preset,sensors", [("default", "learned"), ("fno_score", "kriging")])
def test_the_sampler_is_the_one_for_its_sensors(preset, sensors):
    resolved = resolve({"preset": preset, "sensors": sensors})
    assert resolved["method"] == {"learned": "gaussian", "kriging": "euler"}[sensors]


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="model.sensors=learned needs a residual that learns"):
        resolve({"preset": "fno_score", "residual": "gaussian"})
    with pytest.raises(ValueError, match="model.colour is no setting"):
        resolve({"colour": 1})


@pytest.mark.parametrize("key, value", RETIRED.items())
def test_what_older_files_say_of_a_retired_setting_still_loads(key, value):
    """With the hash that its training had; a run that does not say it keeps its hash, too."""
    assert resolve({"preset": "one_pass", key: value}) == resolve({"preset": "one_pass"})
    experiment = reading.load("quickstart", [f"model.{key}={value}"])
    assert experiment.stage_settings("train")["model"][key] == value
    plain = reading.load("quickstart")
    assert key not in plain.stage_settings("train")["model"]
    with pytest.raises(ValueError, match=f"model.{key}='other' was removed, {value} is the only"):
        resolve({"preset": "default", key: "other"})
    with pytest.raises(ValueError, match=f"model.{key} is no setting of model.preset=published"):
        resolve({"preset": "published", key: value})
