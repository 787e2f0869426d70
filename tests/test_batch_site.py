"""Site profiles: by name and by path, stage by stage, and what their errors say."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from hpc_closure.batch import site as profiles
from hpc_closure.batch.site import Profile, load_profile
from hpc_closure.cli import app
from hpc_closure.tools import config

TESTS = str(Path(__file__).parent)


@pytest.mark.parametrize("name", profiles.profiles())
def test_shipped_profiles_load(name):
    profile = load_profile(name)
    assert profile.name == name
    for stage in ("generate", "train", "rollout", "evaluate"):
        assert profile.for_stage(stage).options() is not None


def test_profiles_by_name_in_the_working_folder_and_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "slurm" / "profiles"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("account: abc\nmem: 4000\n")
    assert load_profile("mine").options() == {"account": "abc", "mem": "4000"}
    assert load_profile(folder / "mine.yaml").name == "mine"
    assert load_profile("testbed").partition == "main"  # shipped, still found
    assert load_profile(None).options() == {}


def test_a_shipped_profile_is_copied_and_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = "slurm/profiles/mine.yaml"
    result = CliRunner().invoke(app, ["config", "profile", "template", target])
    assert result.exit_code == 0 and result.output.startswith(f"{target}: copied from ")
    assert load_profile("mine").account == load_profile("template").account == "my_project"
    with pytest.raises(ValueError, match="exists already"):
        config.copy_profile("template", Path(target))
    with pytest.raises(ValueError, match="did you mean template"):
        config.copy_profile("templat", Path("other.yaml"))
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match="cannot be written"):
        config.copy_profile("template", Path("file/other.yaml"))


def test_the_profile_in_the_docs_loads(tmp_path):
    page = (Path(TESTS).parent / "docs" / "cluster.md").read_text()
    text = page.split("```text\n")[1].split("```")[0]
    (tmp_path / "site.yaml").write_text(text)
    site = load_profile(tmp_path / "site.yaml")
    assert site.for_stage("train").options() == {
        "account": "my_project",
        "partition": "gpu",
        "gpus-per-node": 4,
        "cpus-per-task": 8,
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("acount: x", "unknown key acount; did you mean account?"),
        ("stages: {train: {acount: x}}", "did you mean stages.train.account?"),
        ("stages: {train: {gpus: 4}}", "unknown key stages.train.gpus; valid here: account"),
        ("max_array: 0", "max_array=0"),
        ("stages: {trian: {}}", "stages.trian"),
        ("walltime: soon", "walltime: duration 'soon'"),
        ("stages: {train: {walltime: soon}}", "stages.train.walltime: duration 'soon'"),
        ("a: [", "not valid YAML"),
    ],
)
def test_profile_errors_name_the_key(tmp_path, text, message):
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="site.yaml") as error:
        load_profile(path)
    assert message in str(error.value)


def test_unknown_profiles_name_the_known():
    with pytest.raises(ValueError, match="did you mean testbed"):
        load_profile("testbad")
    with pytest.raises(ValueError, match="no such file"):
        load_profile("./testbed.yaml.not")


def test_a_stage_replaces_what_it_states():
    site = Profile.model_validate(
        {
            "account": "a",
            "gres": "gpu:a100:4",
            "extra": {"exclusive": True},
            "stages": {
                "generate": {"gpus_per_node": 0, "partition": "cpu"},
                "train": {"extra": {"mail-type": "END"}},
            },
        }
    )
    assert site.devices == 4
    assert site.for_stage("generate").options() == {
        "account": "a",
        "partition": "cpu",
        "exclusive": True,
    }
    assert site.for_stage("train").options() == {
        "account": "a",
        "gres": "gpu:a100:4",
        "exclusive": True,
        "mail-type": "END",
    }
    assert site.for_stage("rollout") is site


@pytest.mark.parametrize(
    "gres, devices",
    [(None, 0), ("gpu", 1), ("gpu:4", 4), ("gpu:a100", 1), ("gpu:a100:2", 2), ("shard:8", 0)],
)
def test_devices_of_gres(gres, devices):
    assert Profile(gres=gres).devices == devices
