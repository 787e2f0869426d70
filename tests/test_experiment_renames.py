"""Renamed keys: either name gives the same experiment, and hashes are those of the old names."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

import hpc_closure
from hpc_closure.batch.site import SHIPPED, load_profile
from hpc_closure.closure.artifact import build
from hpc_closure.closure.header import read_header, shipped
from hpc_closure.experiment import reading, renames
from hpc_closure.experiment.folder import shipped_model
from hpc_closure.experiment.renames import RENAMES
from hpc_closure.experiment.schema import sha256_json
from hpc_closure.work import session

OLD_FILE = Path(__file__).with_name("old_config.yaml")  # a run's, written before the renames
STAGES = ("pilot", "generate", "replicas", "train", "rollout", "evaluate")
LEITH = ("model.preset=jansen_held", "model.conditions.previous_closures=0")
# new name -> preset, value, further overrides
EXAMPLES = {
    "generate.max_refinements": ("quickstart", 4),
    "model.conditions.previous_closures": ("subgrid_quick", 1),
    "model.conditions.previous_states": ("diffusion_64", 1),
    "model.conditions.physics_estimate": ("diffusion_64", True),
    "model.regression_terms": ("diffusion_64", "linear"),
    "model.validate_parts": ("diffusion_64", "off"),
    "model.noise_memory": ("diffusion_64", "off"),
    "model.function_evaluations": ("diffusion_64", 2),
    "model.spectral_convolution": ("diffusion_64", "fft"),
    "model.coefficient": ("subgrid_quick", 0.2, *LEITH),
    "model.backscatter_fraction": ("subgrid_quick", 0.5, *LEITH),
    "train.memory_gib": ("quickstart", 2.5),
    "train.rollout_training": ("subgrid_quick", {"steps": 9}),
    "train.rollout_training.horizon": ("subgrid_quick", [2, 3]),
    "train.rollout_training.energy_weight": ("subgrid_quick", 0.25),
    "train.stability_test": ("subgrid_quick", {"members": 3}),
    "train.stability_test.horizon": ("subgrid_quick", 100),
    "pilot.initial_conditions": ("subgrid_quick", 5),
    "pilot.spinup": ("subgrid_quick", 4.0),
    "replicas.spinup": ("subgrid_quick", 1.0),
    "rollout.initial_conditions": ("quickstart", 3),
    "rollout.baselines": ("quickstart", ["none"]),
    "rollout.sampler.function_evaluations": ("diffusion_64", 3),
    "evaluate.sampler.function_evaluations": ("diffusion_64", 3),
    "evaluate.event.threshold": ("diffusion_64", 0.5, "evaluate.event.lead_time=5"),
    "cluster.max_first_failures": ("quickstart", 1),
    "cluster.claim_timeout": ("quickstart", 60.0),
    "cluster.max_running_tasks": ("quickstart", 5),
    "cluster.signal_before_end": ("quickstart", "2m"),
}
# overrides of OLD_FILE by the old names -> hashes before the renames
OLD_HASHES = {
    "as it was": (
        [],
        "b8f7b6a77f2b e3f549adc6b2 f8ed9e9f0c22 7f05519320f6 6528b0dadc10 fc3aa2f47399",
    ),
    "through the solver": (
        ["train.steady={calls: 100}", "train.trajectory={calls: [2, 6], energy: 0.25}"],
        "b8f7b6a77f2b e3f549adc6b2 f8ed9e9f0c22 5102ced9262a e46fb3572556 b94a5d880d1d",
    ),
    "model": (
        [
            "model.conditions={history: 1, previous: 2, physics: true}",
            "model.library=linear",
            "model.gate=off",
            "model.form=fft",
        ],
        "b8f7b6a77f2b e3f549adc6b2 f8ed9e9f0c22 835b99a06c25 6cd983da1b0b 1d5a8f2536b3",
    ),
    "white noise": (
        [
            "model.preset=default",
            "model.conditions={previous: 0, sensors: none}",
            "train.steady=null",
            "model.memory=off",
            "model.evaluations=2",
            "rollout.sampler.evaluations=3",
            "evaluate.sampler.evaluations=5",
        ],
        "b8f7b6a77f2b e3f549adc6b2 f8ed9e9f0c22 0d14d5775196 43761a65f221 b61de641388f",
    ),
    "eddy viscosity": (
        [
            "model={preset: jansen_held, conditions: {previous: 0}, constant: 0.2, returned: 0.5}",
            "train.steady=null",
        ],
        "b8f7b6a77f2b e3f549adc6b2 f8ed9e9f0c22 2ba30ca7e78b 6bcadb1d8e5f 33753bb5e8b2",
    ),
    "starts": (
        [
            "pilot={cases: 4, watched: 3.2}",
            "replicas.pinned=1.6",
            "rollout.cases=9",
            "rollout.references=[none, mean_gp]",
            "evaluate.event={above: 0.5, lead_time: 2}",
        ],
        "261bc24b09ad e3f549adc6b2 790309e76fa0 7f05519320f6 d60443055659 03c7bc6e17e8",
    ),
}
ADAPTIVE = [
    "generate.closure=none",
    "generate.scheme=etdrk4",
    "generate.cfl=0.5",
    "generate.max_level=4",
    "reduced.step=1",
    "replicas.members=0",
    "rollout.rungs=[]",
]


@pytest.fixture(autouse=True)
def told(caplog, monkeypatch):
    """The log, without what other tests have warned of."""
    renames._warn.cache_clear()
    monkeypatch.setattr(logging.getLogger("hpc_closure"), "propagate", True)
    caplog.set_level(logging.WARNING, "hpc_closure")
    return lambda: [record.getMessage() for record in caplog.records]


def old_name_of(new: str) -> str:
    """The old name of a key in its section as it is called now."""
    [old] = [old for old, each in RENAMES.items() if each == new]
    return ".".join([*new.split(".")[:-1], old.split(".")[-1]])


def nested(path: str, value):
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def written(folder: Path, path: str, value, preset: str) -> Path:
    """A file that states one key."""
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({"base": preset, "name": "mine", **nested(path, value)}))
    return file


def hashes(experiment) -> str:
    return " ".join(
        experiment.stage_hash(stage)[:12] for stage in STAGES if stage in experiment.stages
    )


def test_every_renamed_key_has_an_example():
    assert list(EXAMPLES) == list(RENAMES.values())


@pytest.mark.parametrize("new", EXAMPLES)
@pytest.mark.parametrize("by_override", [False, True], ids=["file", "override"])
def test_an_old_name_is_the_new_one_with_one_warning(tmp_path, told, new, by_override):
    (preset, value, *more), old = EXAMPLES[new], old_name_of(new)

    def load(name):
        if not by_override:
            return reading.load(written(tmp_path, name, value, preset), more)
        text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
        return reading.load(preset, [*more, f"{name}={text}"])

    expected = load(new)
    assert not told()
    found = load(old)
    assert found == expected
    assert hashes(found) == hashes(expected)
    [warning] = told()
    [full] = [each for each, name in RENAMES.items() if name == new]
    assert warning.endswith(f": {full} is now {new}; the old name is read until 1.0")
    assert "\n" not in warning
    load(old)
    assert len(told()) == 1  # once per process


def test_a_key_in_a_section_by_its_old_name(told):
    found = reading.load("subgrid_quick", ["train.trajectory={steps: 9, calls: [2, 3]}"])
    expected = ["train.rollout_training={steps: 9, horizon: [2, 3]}"]
    assert found == reading.load("subgrid_quick", expected)
    assert len(told()) == 2


@pytest.mark.parametrize("new", EXAMPLES)
def test_both_names_of_a_key_are_an_error(tmp_path, new):
    preset, value, *_ = EXAMPLES[new]
    file, (*section, last) = tmp_path / "mine.yaml", new.split(".")
    both = {last: value, old_name_of(new).split(".")[-1]: value}
    values = nested(".".join(section), both)
    file.write_text(yaml.safe_dump({"base": preset, **values}))
    with pytest.raises(ValueError) as refused:
        reading.load(file)
    assert re.fullmatch(
        rf"{file}: \S+ and {new} are two names of one key: remove \S+, the old one",
        str(refused.value),
    )


def test_an_override_replaces_the_old_name_of_a_file(tmp_path):
    file = written(tmp_path, "rollout.cases", 3, "quickstart")
    assert reading.load(file, ["rollout.initial_conditions=2"]).rollout.initial_conditions == 2
    (tmp_path / "last.yaml").write_text("base: mine.yaml\nrollout: {initial_conditions: 4}\n")
    assert reading.load(tmp_path / "last.yaml").rollout.initial_conditions == 4


def test_values_of_a_wrong_kind_are_left_to_the_schema():
    with pytest.raises(ValueError, match="rollout=3: Input should be a valid dictionary"):
        reading.load("quickstart", ["rollout=3"])
    assert reading.load("subgrid_quick", ["train.steady=null"]).train.stability_test is None


@pytest.mark.parametrize("name", OLD_HASHES)
def test_hashes_are_those_of_the_old_names(name):
    words, expected = OLD_HASHES[name]
    experiment = reading.load(OLD_FILE, words)
    assert hashes(experiment) == expected
    for stage in experiment.stages:
        settings, stored = experiment.stage_settings(stage), json.loads(
            experiment.stage_recipe(stage)
        )
        assert sha256_json(stored) == experiment.stage_hash(stage)
        if stage != "pilot":  # which has an entry that is no key of an experiment
            assert renames.updated(stored, warn=False) == json.loads(json.dumps(settings))


def test_the_hash_of_adaptive_steps_is_that_of_the_old_names():
    experiment = reading.load(OLD_FILE, ADAPTIVE)
    assert hashes(experiment) == "3d6348787f0f"
    assert experiment.problem.member_hash()[:12] == "64c1b7ecfaf6"


def test_a_resolved_file_of_before_loads_and_is_written_by_the_new_names(tmp_path, told):
    experiment = reading.load(OLD_FILE, warn=False)
    assert not told()
    assert experiment.rollout.initial_conditions == 20
    text = reading.dump(experiment)
    (tmp_path / "config.yaml").write_text(text)
    assert reading.load(tmp_path / "config.yaml") == experiment
    assert not told()


def test_a_run_of_before_continues_and_its_differences_have_the_new_names(tmp_path, told):
    experiment = reading.load(OLD_FILE, [f"root={tmp_path}"], warn=False)
    run = session.Run.of(experiment)
    for stage in ("pilot", "replicas", "rollout"):
        run.folder(stage).mkdir(parents=True)
        (run.folder(stage) / "block_000000-000001.h5").touch()
    run.config.write_text(OLD_FILE.read_text().replace("root: runs", f"root: {tmp_path}"))
    session.check_recipe(run, experiment, "evaluate")
    assert not told()
    for verb, word, message in (
        ("generate", "pilot.spinup=3.2", r"\(pilot.spinup: 0.96 -> 3.2\)"),
        ("generate", "replicas.spinup=1.6", "pilot.replicas_spinup: 0.0 -> 1.6"),
        ("evaluate", "rollout.initial_conditions=7", r"\(rollout.initial_conditions: 20 -> 7\)"),
        ("evaluate", "rollout.baselines=[]", r"\(rollout.baselines: \['none', 'rung_64_moved"),
    ):
        other = reading.load(OLD_FILE, [f"root={tmp_path}", word], warn=False)
        with pytest.raises(ValueError, match=message):
            session.check_recipe(run, other, verb)
    session.store_settings(run, experiment)
    assert reading.load(run.config) == experiment
    assert not told()


@pytest.mark.parametrize("name", shipped())
def test_a_model_file_of_before_draws_the_same(tmp_path, told, name):
    source, path = shipped_model(name), tmp_path / "old.safetensors"
    header = read_header(source)
    with safe_open(source, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    config = renames.as_stored({"model": header.config})["model"]
    assert {"library", "gate", "evaluations", "form"} <= set(config)
    save_file(tensors, path, metadata={**header.metadata, "config": json.dumps(config)})
    assert read_header(path).config == header.config
    closure, state = hpc_closure.load(path), torch.randn(64, 64).double()
    more = {}
    if past := closure.config["conditions"].get("previous_closures"):
        more = {"previous": torch.randn(past, 64, 64).double()}
    drawn = [one.sample(state, members=2, **more) for one in (closure, hpc_closure.load(name))]
    assert torch.equal(*drawn)
    assert not [line for line in told() if "old name" in line]


def test_a_model_built_in_python_may_have_old_names(told):
    conditions = {"sensors": "none", "previous": 2}
    model = build({"preset": "gaussian", "library": "linear", "conditions": conditions}, 32)
    assert model.previous == 2 and model.config["regression_terms"] == "linear"
    assert len(told()) == 2


def test_a_site_profile_of_before_loads(tmp_path, told):
    path = tmp_path / "site.yaml"
    path.write_text("throttle: 7\nsignal_lead: 4m\n")
    profile = load_profile(path)
    assert (profile.max_running_tasks, profile.signal_before_end) == (7, "4m")
    assert told()[0].startswith(f"{path}: throttle is now max_running_tasks;") and len(told()) == 2
    path.write_text("throttle: 7\nmax_running_tasks: 7\n")
    with pytest.raises(ValueError, match="throttle and max_running_tasks are two names"):
        load_profile(path)


def test_nothing_that_is_shipped_has_an_old_name(told):
    for name in reading.presets():
        reading.load(name)
    for path in SHIPPED.glob("*.yaml"):
        load_profile(path)
    assert not told()
