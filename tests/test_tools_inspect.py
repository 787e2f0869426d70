import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.generate import verb as generate
from hpc_closure.tools import inspect
from hpc_closure.work import hdf5
from hpc_closure.work.options import Options


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run folder with the data of two blocks."""
    from conftest import TINY

    folder = tmp_path_factory.mktemp("inspect")
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(root=folder / "runs"))
    experiment = reading.load(path, ["generate.members=4"])
    assert generate.run(experiment, Options(verbosity=-1)) == 0
    return Run(experiment.folder)


@pytest.fixture
def block(made, tmp_path):
    """A copy of a data block, to damage."""
    copy = tmp_path / "block_000000-000001.h5"
    copy.write_bytes((made.data / copy.name).read_bytes())
    return copy


def told(capsys, path, code=0, **options):
    assert inspect.run(path, **options) == code
    return capsys.readouterr().out


def refused(path, words, **options):
    with pytest.raises((ValueError, OSError), match=words) as caught:
        inspect.run(path, **options)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("deep", [False, True])
def test_block(capsys, made, deep):
    path = made.data / "block_000000-000001.h5"
    found = json.loads(told(capsys, path, deep=deep, json=True))
    assert found["members"] == "0 to 1 (2)" and found["times"] == "0.2 to 0.4 (11, every 0.02)"
    assert found["data sets"]["t0_fields/vorticity"] == "float32 (2, 11, 16, 16)"
    assert found["recipe"]["generate"]["grid"] == 16
    assert found["provenance"]["host"] and "certificate" in found
    with h5py.File(path) as file:
        values = file["t0_fields/vorticity"][...].astype(float)
    statistics = found["statistics"]["vorticity"]
    if deep:
        assert statistics["rms"] == pytest.approx(np.sqrt((values**2).mean()), rel=1e-4)
        assert found["content sha256"] == hdf5.sha256_datasets(path)
    assert statistics["max"] <= values.max() * 1.0001
    text = told(capsys, path, deep=deep)
    assert "members: 0 to 1 (2)" in text and max(map(len, text.splitlines())) < 200


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, one unit of which was stopped on its way when it was made again."""
    from conftest import TINY

    from hpc_closure.data.writer import BlockWriter
    from hpc_closure.evaluate import verb as evaluate
    from hpc_closure.rollout import verb as rollout
    from hpc_closure.train import verb as train
    from hpc_closure.work.stop import Stopped

    path = tmp_path_factory.mktemp("finished") / "tiny.yaml"
    path.write_text(TINY.format(root=path.parent / "runs"))
    experiment = reading.load(path, ["cluster.checkpoint_every=1e-9"])
    for verb in (generate, train, rollout, evaluate):
        assert verb.run(experiment, Options(verbosity=-1)) == 0
    run = Run(experiment.folder)
    run.product("rollout", "000000-000001").unlink()
    write, calls = BlockWriter.write, []

    def second_stops(*words):
        calls.append(1)
        if len(calls) == 2:
            raise Stopped("a test")
        write(*words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockWriter, "write", second_stops)
        assert rollout.run(experiment, Options(verbosity=-1)) == 75
    return run


PRODUCTS = {
    "data/block_000000-000001.h5": "values read",
    "train/model.safetensors": "values read",
    "rollout/block_000002-000003.h5": "values read",
    "train/metrics.csv": "values read",
    "evaluate/scores.csv": "values read",
    "evaluate/scores.json": "provenance",
    "data": "block_000006-000007.h5",
    "rollout": "block_000002-000003.h5",
    "train": "model.safetensors",
    "evaluate": "scores.csv",
    "": "checkpoints",
    ".units/rollout/000000-000001.restart/step_*.h5": "values read",
    "train/checkpoints/step_0000004": "tensors",
}


@pytest.mark.parametrize("name, word", PRODUCTS.items())
def test_deep_reads_every_kind_of_product(capsys, finished, name, word):
    path = sorted(finished.root.glob(name))[-1] if name else finished.root
    found = json.loads(told(capsys, path, deep=True, json=True))
    assert word in json.dumps(found) and found.get("values read", 1) > 0
    text = told(capsys, path, deep=True)
    assert word in text and max(map(len, text.splitlines())) < 220


def test_damaged_blocks(block):
    whole = block.read_bytes()
    block.write_bytes(whole[: len(whole) // 2])
    refused(block, "truncated HDF5 file")
    block.write_bytes(b"")
    refused(block, "not an HDF5 file")
    block.write_bytes(b"hello" * 1000)
    refused(block, "not an HDF5 file")
    block.write_bytes(whole)
    with h5py.File(block, "r+") as file:
        file.attrs["complete"] = 0
    refused(block, "unfinished")
    with h5py.File(block, "r+") as file:
        del file["t0_fields"]
    refused(block, "not a block of this package")


def test_deep_finds_what_a_glance_does_not(block):
    with h5py.File(block, "r+") as file:
        file["t0_fields/vorticity"][1, 5, 3, 3] = np.nan
    inspect.run(block)
    refused(block, "vorticity has non-finite values", deep=True)
    with h5py.File(block, "r+") as file:
        file["t0_fields/vorticity"][1, 5, 3, 3] = 0.0
        file["restart/w_hat"][0, 0, 0] = np.inf
    refused(block, "restart/w_hat has non-finite values", deep=True)


def test_model(capsys, tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "model.safetensors"
    weights = {"a": np.ones((3, 4), np.float32), "b": np.zeros(5, np.float32)}
    save_file(weights, path, metadata={"config": '{"width": 8}', "note": "plain"})
    found = json.loads(told(capsys, path, json=True, deep=True))
    assert found["parameters"] == 17 and found["config"] == {"width": 8}
    assert found["weights"]["a"] == "(3, 4)"
    parts = [
        {"name": "mean: regression", "trained": False, "acts": True, "gains": [], "note": "w"},
        {
            "name": "residual: score",
            "trained": True,
            "acts": True,
            "gains": [0.8, 1.1],
            "note": "",
        },
    ]
    for acts, words in (
        (True, "parts: parts that act: mean: regression (w), residual: score (gain 0.8 to 1.1)"),
        (False, "parts: closed form: mean: regression (w); no trained part acts"),
    ):
        parts[1]["acts"] = acts
        save_file(weights, path, metadata={"parts": json.dumps(parts)})
        first, second = told(capsys, path).splitlines()[:2]
        assert first == words and (second == "do not act: residual: score") == (not acts)
    whole = path.read_bytes()
    for damage in (whole[:-4], whole[:20], b"", b"x" * 200):
        path.write_bytes(damage)
        refused(path, "not a whole safetensors file")
    save_file({"a": np.full(3, np.nan, np.float32)}, path)
    refused(path, "weight a has non-finite values", deep=True)


def test_a_shipped_model_by_its_name():
    parts = inspect.inspect(Path("two_regimes"))["parts"]
    assert "residual: score" in parts
    with pytest.raises(FileNotFoundError, match="nor a shipped model .convection, diffusion"):
        inspect.inspect(Path("three_regimes"))


def test_checkpoint(capsys, tmp_path):
    import torch

    from hpc_closure.train import checkpoint

    point = checkpoint.Checkpoint(
        checkpoint.Position(step=7),
        {
            "weights": {"a": torch.ones(3)},
            "average": {"a": torch.ones(3)},
            "best": {},
            "optimizer": {"exp_avg/a": torch.zeros(3)},
        },
    )
    checkpoint.save(tmp_path, point)
    path = tmp_path / "step_0000007"
    found = json.loads(told(capsys, path, json=True, deep=True))
    assert found["step"] == 7 and found["weights"] == "1 tensors, 3 values"
    (path / "weights.safetensors").write_bytes(b"x")
    refused(path, "damaged restart point: weights.safetensors is damaged")
    (path / "complete.json").unlink()
    refused(path, "damaged restart point: complete.json is missing")
    assert "step_0000007" in told(capsys, tmp_path, code=1)


def test_restart_file(capsys, tmp_path):
    path = tmp_path / "step_0000000040.h5"
    with h5py.File(path, "w") as file:
        file["w_hat"] = np.zeros((2, 3), complex)
        file.attrs["next_snapshot"] = 4
    assert "next_snapshot: 4" in told(capsys, path, deep=True)


def test_tables_and_records(capsys, tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("stage,method,score,value\ncoupled,model,crps,0.1\n")
    found = json.loads(told(capsys, path, json=True))
    assert found["rows"] == 1 and found["method values"] == "model"
    path.write_text("stage,method\ncoupled\n")
    refused(path, "damaged CSV table")
    path.write_text("stage,value\ncoupled,1\ncoupled,inf\ncoupled,\n")
    assert json.loads(told(capsys, path, json=True, deep=True))["values read"] == 6
    path.write_text("stage,value\ncoupled,1\ncoupled,1.\x00\n")
    refused(path, "column value mixes numbers and words|not a readable CSV", deep=True)
    path = tmp_path / "scores.json"
    path.write_text("[1, 2]")
    assert "JSON list of 2" in told(capsys, path)
    path.write_text("[1, 2")
    refused(path, "not a valid JSON file")


def test_run_folder(capsys, made):
    text = told(capsys, made.root)
    assert "block_000000-000001.h5" in text and "generate" in text and "provenance" in text
    assert "4 units, 2 done" in text or "2 units, 2 done" in text


def test_folder_names_the_damaged(capsys, block):
    (block.parent / "block_000002-000003.h5").write_text("junk")
    text = told(capsys, block.parent, code=1)
    assert "block_000000-000001.h5: generate block" in text
    assert "block_000002-000003.h5: not an HDF5 file" in text


def test_not_ours(tmp_path):
    refused(tmp_path / "absent", "no such file or folder")
    refused(tmp_path, "no product of this package")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "not a product of this package; expected .csv, .h5")


def test_exit_codes(hpc_closure_command, made, block):
    done = hpc_closure_command("inspect", made.root)
    assert done.returncode == 0, done.stderr
    block.write_text("junk")
    done = hpc_closure_command("inspect", block)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not done.stdout
