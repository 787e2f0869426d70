"""Restart points: whole or not there, damage noticed, two kept."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_closure.train import checkpoint
from hpc_closure.train.checkpoint import Checkpoint, Position


def make(step: int) -> Checkpoint:
    weights = {"a": torch.arange(6.0).reshape(2, 3) + step, "n": torch.tensor(3)}
    statistics = {"mean/gain": torch.tensor([0.1], dtype=torch.float64)}
    moments = {"exp_avg/a": torch.ones(2, 3), "step": torch.tensor(float(step))}
    tensors = {"weights": weights, "statistics": statistics, "optimizer": moments, "best": {}}
    return Checkpoint(Position(step=step, pending=[0.1, 1 / 3], best=2.0), tensors)


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path, make(7))
    path = checkpoint.newest(tmp_path)
    assert path.name == "step_0000007"
    found = checkpoint.load(path)
    assert found.position == make(7).position
    assert "best" not in found.tensors
    for name, tensors in found.tensors.items():
        for key, value in tensors.items():
            expected = make(7).tensors[name][key]
            assert value.dtype == expected.dtype and (value == expected).all()


def test_two_are_kept_and_leftovers_removed(tmp_path):
    for step in (1, 2, 30, 4):
        checkpoint.save(tmp_path, make(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000004", "step_0000030"]
    checkpoint.save(tmp_path, make(30))  # again, as after a stop at the same step
    assert checkpoint.newest(tmp_path).name == "step_0000030"
    assert checkpoint.newest(tmp_path / "absent") is None


def test_shared_and_strided_tensors(tmp_path):
    flat = torch.arange(10.0)
    views = {"one": flat[:4], "two": flat[2:8:2], "three": flat[:4].view(2, 2).T}
    checkpoint.save(tmp_path, Checkpoint(Position(step=1), {"weights": views}))
    found = checkpoint.load(checkpoint.newest(tmp_path)).tensors["weights"]
    assert all((found[key] == views[key]).all() for key in views)


FILES = [
    "weights.safetensors",
    "statistics.safetensors",
    "optimizer.safetensors",
    "progress.json",
    "complete.json",
]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(FILES),
    how=st.sampled_from(["flip", "cut", "remove", "empty", "garbage"]),
    where=st.floats(0, 1, exclude_max=True),
)
def test_damage_is_noticed(tmp_path_factory, name, how, where):
    """Any damaged byte, cut or missing file: the older point is used, with one line."""
    folder = tmp_path_factory.mktemp("damage")
    checkpoint.save(folder, make(1))
    checkpoint.save(folder, make(2))
    victim = folder / "step_0000002" / name
    data = bytearray(victim.read_bytes())
    place = int(where * len(data))
    if how == "flip":
        data[place] ^= 0x10
    written = {"cut": bytes(data[:place]), "empty": b"", "garbage": b"\xff\x00{"}
    victim.write_bytes(written.get(how, data))
    if how == "remove":
        victim.unlink()
    assert checkpoint.newest(folder).name == "step_0000001"
    assert checkpoint.newest(folder).name == "step_0000001"
    assert (folder / "step_0000002.damaged").is_dir()


def test_other_layout_is_named(tmp_path):
    checkpoint.save(tmp_path, make(1))
    path = tmp_path / "step_0000001"
    values = json.loads((path / "progress.json").read_text())
    (path / "progress.json").write_text(json.dumps({**values, "layout": 99}))
    sums = json.loads((path / "complete.json").read_text())
    sums["progress.json"] = checkpoint._sha256(path / "progress.json")
    (path / "complete.json").write_text(json.dumps(sums))
    assert checkpoint.damage(path) == "layout 99, expected 1"


def test_loading_the_wrong_thing(tmp_path):
    with pytest.raises(ValueError, match="damaged restart point"):
        checkpoint.load(tmp_path)


def test_same_weights():
    one, other = {"a": torch.zeros(2)}, {"a": torch.zeros(3)}
    assert checkpoint.same_weights(one, one) is None
    assert checkpoint.same_weights(one, other) == "a: (2,) in the file, (3,) in the model"
    assert checkpoint.same_weights(one, {}) == "a: (2,) in the file, None in the model"
