"""Experiment files: presets load, mistakes are one clear line, hashes cover what and not how."""

import subprocess
import sys

import pytest

from hpc_closure.experiment import reading
from hpc_closure.tools import config as verb

STAGES = ("generate", "train", "rollout", "evaluate")


@pytest.mark.parametrize("name", reading.presets())
def test_presets_load_and_survive_a_round_trip(name, tmp_path):
    experiment = reading.load(name)
    path = tmp_path / f"{name}.yaml"
    path.write_text(reading.dump(experiment))
    again = reading.load(path)
    assert again.model_dump(exclude={"base"}) == experiment.model_dump(exclude={"base"})
    assert [again.stage_hash(s) for s in STAGES] == [experiment.stage_hash(s) for s in STAGES]


def test_the_shipped_presets_are_the_promised_ones():
    promised = {
        "quickstart",
        "diffusion_256",
        "published_diffusion",
        "subgrid",
        "two_regimes_64",
        "amplitude_64",
    }
    assert promised <= set(reading.presets())


def test_reading_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from hpc_closure.experiment import reading\n"
        "reading.load('quickstart', ['physics.noise.kind=ornstein_uhlenbeck'])\n"
        "heavy = {'torch', 'numpy', 'h5py', 'mpi4py'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_old_resolved_file_loads(tmp_path):
    """It holds the keys of every kind, and those of the plane beside an equation on a line."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "name: old\nphysics: {equation: kuramoto_sivashinsky1d, length: 60.0, viscosity: 0.001, "
        "hyperviscosity: 0.0, hyperviscosity_order: 4, drag: 0.0, beta: 0.0, "
        "forcing: {kind: none, amplitude: 0.1, wavenumber: 4, width: 0.5}, "
        "noise: {kind: none, amplitude: 5.0e-05, draws: 10, correlation: 0.005, wavenumber: 8.0, "
        "width: 1.0, energy_rate: 0.001, rms: 0.1, correlation_time: 0.1}, "
        "initial: {kind: line, alpha: 2.5, tau: 7.0, wavenumber: 8.0, amplitude: 1.0, "
        "width: 2.0, energy: 0.5}}\n"
        "generate: {closure: none, scheme: etdrk4, dt: 0.025, record: {every: 0.5}}\n"
    )
    assert reading.load(path).physics.parameters() == {
        "equation": "kuramoto_sivashinsky1d",
        "length": 60.0,
        "forcing": {"kind": "none"},
        "noise": {"kind": "none"},
        "initial": {"kind": "line", "amplitude": 1.0, "wavenumber": 8.0},
    }


def test_numbers_without_a_dot_are_numbers():
    assert reading.parse_yaml("a: 1e-4\nb: off\nc: 2026-01-01", "x") == {
        "a": 1e-4,
        "b": "off",
        "c": "2026-01-01",
    }


def test_a_key_stated_twice_is_an_error():
    with pytest.raises(ValueError, match="x:2:1: not valid YAML: key 'a' stated twice"):
        reading.parse_yaml("a: 1\na: 2", "x")


def test_precedence_preset_file_override(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: quickstart\ntrain: {lr: 2e-3, batch: 20}\n")
    experiment = reading.load(path, ["train.lr=5e-4"])
    assert experiment.train.lr == 5e-4
    assert experiment.train.batch == 20
    assert experiment.generate.grid == reading.load("quickstart").generate.grid
    assert experiment.name == "quickstart" or experiment.name == "mine"


def test_a_file_may_be_the_base_of_another(tmp_path):
    (tmp_path / "one.yaml").write_text("base: quickstart\nseed: 7\n")
    (tmp_path / "two.yaml").write_text("base: one.yaml\nname: two\n")
    assert reading.load(tmp_path / "two.yaml").seed == 7
    (tmp_path / "one.yaml").write_text("base: two.yaml\n")
    with pytest.raises(ValueError, match="leads back to itself"):
        reading.load(tmp_path / "two.yaml")


@pytest.mark.parametrize(
    "key", ["cluster.members_per_block=3", "cluster.walltime=3h", "train.recompute=true"]
)
def test_how_is_in_no_hash(key):
    plain, other = reading.load("diffusion_64"), reading.load("diffusion_64", [key])
    assert all(plain.stage_hash(stage) == other.stage_hash(stage) for stage in STAGES)


@pytest.mark.parametrize(
    "key, stages",
    [
        ("physics.viscosity=2e-3", STAGES),
        ("seed=5", STAGES),
        ("train.lr=1e-4", STAGES[1:]),
        ("rollout.interval=10", STAGES[2:]),
        ("evaluate.samples=7", STAGES[3:]),
    ],
)
def test_what_is_in_the_hash_of_its_stage_and_of_those_that_read_it(key, stages):
    plain, other = reading.load("diffusion_64"), reading.load("diffusion_64", [key])
    changed = tuple(s for s in STAGES if plain.stage_hash(s) != other.stage_hash(s))
    assert changed == stages


@pytest.mark.parametrize("key", ["generate.members=41", "generate.t_end=50", "rollout.members=21"])
def test_growth_keeps_the_hashes_of_the_units(key):
    plain, other = reading.load("diffusion_64"), reading.load("diffusion_64", [key])
    assert all(plain.stage_hash(s) == other.stage_hash(s) for s in STAGES[:3])


def test_an_event_names_a_field_if_there_are_several():
    """Without a name the hash is that of files that do not know the key."""
    event = reading.load("uncertainty_study").stage_settings("evaluate")["evaluate"]["event"]
    assert set(event) == {"observable", "threshold", "lead_time", "tolerance"}
    rain, other = (
        reading.load("clouds", [f"evaluate.event.channel={c}"]) for c in ("rain", "moisture")
    )
    assert rain.stage_hash("evaluate") != other.stage_hash("evaluate")
    known = "expected a field of clouds: vorticity, moisture, rain"
    for value, shown in (("snow", "snow"), ("null", "none")):
        with pytest.raises(ValueError, match=f"evaluate.event.channel={shown}, {known}"):
            reading.load("clouds", [f"evaluate.event.channel={value}"])


def test_unknown_key_names_the_nearest_valid_one():
    with pytest.raises(ValueError) as caught:
        reading.load("quickstart", ["train.lrr=1"])
    assert "unknown key train.lrr; did you mean train.lr?" in str(caught.value)


def test_copy_keeps_comments_and_never_overwrites(tmp_path):
    target = tmp_path / "mine.yaml"
    verb.copy("quickstart", target)
    assert target.read_text().startswith("#")
    with pytest.raises(ValueError, match="exists already"):
        verb.copy("quickstart", target)


def test_documentation_of_every_key(capsys):
    verb.show(reading.load("quickstart"), doc=True)
    out = capsys.readouterr().out
    assert "generate.record.every" in out and "train.batch" in out
    assert "one of none, q_wiener, ring, ornstein_uhlenbeck, state_amplitude" in out
