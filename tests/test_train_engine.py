"""Engines: equal losses for any engine, process count and ZeRO stage; what they refuse."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from train_case import losses, needs_deepspeed, small_model, training_data

from hpc_closure.bench.model.training import backward_bytes
from hpc_closure.experiment.schema import Train
from hpc_closure.train import deepspeed, engine, trainer
from hpc_closure.train.processes import Processes

CASE = Path(__file__).with_name("train_case.py")
CONFIGS = Path(__file__).parent.parent / "launch" / "deepspeed"
VARIANTS = {
    1: ["torch:0", "deepspeed:0", "deepspeed:1", "deepspeed:3", "torch:0:4", "deepspeed:2:2"],
    2: ["torch:0", "deepspeed:0", "deepspeed:1", "deepspeed:2", "deepspeed:3", "deepspeed:1:2"],
    4: ["torch:0", "deepspeed:0", "deepspeed:1", "deepspeed:2", "deepspeed:3"],
}


@pytest.fixture(scope="module")
def reference():
    """Losses of plain torch in one process."""
    return losses("torch", 0, Processes())


@needs_deepspeed
@pytest.mark.mpi
@pytest.mark.parametrize("processes", VARIANTS)
def test_losses_are_those_of_plain_torch(processes, reference, tmp_path, mpirun):
    out = tmp_path / "losses.json"
    command = [sys.executable, CASE, "engines", out, *VARIANTS[processes]]
    done = mpirun(processes, command, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == "", "the engines are not quiet"
    for variant, seen in json.loads(out.read_text()).items():
        assert len(seen) == 50
        assert seen == pytest.approx(reference, rel=1e-6), variant


@needs_deepspeed
@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["default", "fno_score", "published", "trajectory"])
def test_losses_of_the_models(preset, tmp_path, mpirun):
    """The real networks in every ZeRO stage on two processes, and on one."""
    out = tmp_path / "losses.json"
    variants = [f"deepspeed:{stage}:1:{preset}" for stage in range(4)]
    if preset == "default":
        variants.append("deepspeed:3:1:default:recompute")
    done = mpirun(2, [sys.executable, CASE, "engines", out, *variants], timeout=300)
    assert done.returncode == 0, done.stderr
    expected = losses("torch", 0, Processes(), preset=preset)
    for variant, seen in json.loads(out.read_text()).items():
        assert seen == pytest.approx(expected, rel=1e-6), variant


@pytest.mark.parametrize(
    "preset, phases",
    [("default", 1), ("default", 2), ("fno_score", 2), ("convolutional", 1), ("published", 1)],
)
def test_recomputed_layers_have_the_same_gradients(preset, phases):
    """To the last bit, in every network, and with less kept from forward to backward."""
    model, batch = small_model(preset, phases), training_data().train.batch(0, 8)
    gradients, kept = [], []
    for recompute in (False, True):
        engine.prepare(model, Train(batch=8, recompute=recompute), Processes())
        loss = engine.Loss(model, torch.device("cpu"), "float32")
        kept.append(backward_bytes(lambda steps: loss(batch, 1, 0).backward()))
        gradients.append({key: one.grad for key, one in model.named_parameters()})
        model.zero_grad()
    plain, again = gradients
    assert any(one is not None and bool(one.any()) for one in plain.values())
    for key, one in plain.items():
        assert (one is None) == (again[key] is None)
        assert one is None or torch.equal(one, again[key]), key
    assert kept[1] < 0.9 * kept[0]


def test_complex_weights_are_refused():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, dtype=torch.cfloat))

    with pytest.raises(ValueError, match=r"weight is complex64: store it as real"):
        trainer.start_engine(Complex(), Train(), Processes())


def test_absent_deepspeed(monkeypatch):
    monkeypatch.setattr(deepspeed, "installed", lambda: False)
    assert trainer.choose_engine(Train()) == "torch"
    with pytest.raises(ValueError, match="DeepSpeed is not installed"):
        trainer.choose_engine(Train(engine="deepspeed"))
    with pytest.raises(ValueError, match="train.zero_stage=1"):
        trainer.choose_engine(Train(zero_stage=1))


def test_batch_must_divide():
    with pytest.raises(ValueError, match="train.batch=10 .* 4 processes x 1.*nearest: 8"):
        engine.check(nn.Module(), Train(batch=10), Processes(size=4))


@pytest.mark.parametrize("stage", range(4))
def test_shipped_configurations(stage):
    path = CONFIGS / f"zero{stage}.json"
    settings = Train(batch=32, accumulate=2, deepspeed=str(path))
    config = deepspeed.configuration(settings, 4)
    assert config["zero_optimization"]["stage"] == stage
    assert config["train_micro_batch_size_per_gpu"] == 4
    if deepspeed.installed():
        from deepspeed.runtime.config import DeepSpeedConfig

        DeepSpeedConfig({**config, "train_micro_batch_size_per_gpu": 16})


@pytest.mark.parametrize(
    "text, told",
    [
        ("{", "not JSON"),
        ("{}", "expected a key zero_optimization"),
        ('{"zero_optimization": {"stage": 1}, "optimizer": {}}', "belongs to the experiment file"),
    ],
)
def test_wrong_configuration(text, told, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        deepspeed.configuration(Train(deepspeed=str(path)), 1)
