"""The engines on one GPU: NCCL, device-resident data, restart points that cross to the CPU."""

import pytest
import torch
from train_case import StandIn, losses, run_fit, training_data

from hpc_closure.train import deepspeed, engine, metrics, processes
from hpc_closure.work import launch, log
from hpc_closure.work.stop import Stopped

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def gpu():
    found = processes.join(launch.choose_device("cuda", shared=False))
    yield found
    processes.leave()


def test_engines_agree_on_the_gpu(gpu):
    """DeepSpeed under NCCL, all ZeRO stages, and plain torch; the CPU's losses to round-off."""
    reference = losses("torch", 0, gpu)
    assert reference == pytest.approx(losses("torch", 0, processes.Processes()), rel=1e-5)
    if not deepspeed.installed():
        pytest.skip("DeepSpeed is not installed")
    for stage in range(4):
        assert losses("deepspeed", stage, gpu) == pytest.approx(reference, rel=1e-6)
    assert "nccl" in str(torch.distributed.get_backend_config())


def test_small_data_live_on_the_device(gpu):
    data = training_data()
    batch = data.train.to(gpu.device).batch(0, 8)
    assert data.train._state.is_cuda and batch["state"].is_cuda
    assert not batch["sample_index"].is_cuda


@pytest.mark.parametrize("name", ["torch", "deepspeed"])
def test_a_restart_point_crosses_devices(name, gpu, tmp_path):
    if name == "deepspeed" and not deepspeed.installed():
        pytest.skip("DeepSpeed is not installed")
    log.setup()
    settings = {"steps": 30}
    run_fit(tmp_path / "cpu", engine="torch", **settings)
    with pytest.raises(Stopped):
        run_fit(tmp_path / "both", gpu, engine=name, max_steps=13, **settings)
    run_fit(tmp_path / "both", engine="torch", **settings)
    one, other = (
        [row["loss"] for row in metrics.read(tmp_path / run / "train" / "metrics.csv")]
        for run in ("cpu", "both")
    )
    assert other == pytest.approx(one, rel=1e-4)


def test_bfloat16_on_the_gpu(gpu):
    model, data = StandIn().to(gpu.device), training_data()
    data.train.to(gpu.device)
    model.begin("all", data.train.passes)
    batch = data.train.batch(0, 8)
    exact = float(engine.Loss(model, gpu.device, "float32")(batch, 1, 0))
    assert float(engine.Loss(model, gpu.device, "bfloat16")(batch, 1, 0)) == pytest.approx(
        exact, rel=2e-2
    )
