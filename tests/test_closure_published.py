"""The published model: size, loss, sampler, conditions."""

import math

import pytest
import torch

from hpc_closure.closure.interface import Request
from hpc_closure.closure.presets import build
from hpc_closure.closure.published import box_filter
from hpc_closure.closure.sensors import Sensors, regular_positions


def published(**config):
    torch.manual_seed(0)
    return build({"preset": "published", **config}, 32)


def batch_of(count=4, size=32):
    generator = torch.Generator().manual_seed(0)
    state, target = torch.randn(2, count, size, size, generator=generator)
    return {"state": state, "target": 0.1 * target, "sample_index": torch.arange(count)}


def test_size_of_the_published_network():
    full = build({"preset": "published"}, 64)
    # three branches x 4 layers x 2 x (20 x 20 x 8 x 8) complex, two more that smooth the sensors
    spectral = 2 * 2 * 20 * 20 * 8 * 8 * (3 * 4 + 2)
    assert full.num_parameters() - spectral == pytest.approx(8.3e4, rel=0.01)
    assert not any(p.is_complex() for p in full.parameters())


@pytest.mark.parametrize(
    "sensors,upscaling", [("none", "interp"), ("required", "interp"), ("required", "conv")]
)
def test_loss_and_sample(sensors, upscaling):
    model = published(conditions={"sensors": sensors}, upscaling=upscaling)
    model.begin("score", None)
    batch = batch_of()
    losses = model.loss_per_sample(batch, 0, 0)
    # score matching of an untrained network: E|z|^2 per sample, plus what the network says
    assert (losses / 32**2 > 0.8).all()
    model.loss(batch, 0, 0).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    given = None
    if sensors == "required":
        values = batch["target"][:, ::2, ::2].reshape(4, -1)
        given = Sensors(values, regular_positions(16))
    one = model.sample_batch(Request(batch["state"], members=[0, 1, 2, 3], seed=0, sensors=given))
    assert one.shape == (4, 32, 32) and torch.isfinite(one).all()
    again = model.sample_batch(
        Request(batch["state"], members=[0, 1, 2, 3], seed=0, sensors=given)
    )
    assert torch.equal(one, again)


def test_other_grid_than_trained():
    model = published(conditions={"sensors": "none"})
    out = model.sample_batch(Request(torch.randn(1, 48, 48), members=[0, 1], seed=0))
    assert out.shape == (2, 48, 48)


def test_score_of_a_known_law_is_sampled_with_the_published_steps():
    """With the exact score of N(0, s^2), s = 0.3, the ten published steps are under-dispersed."""
    model = published(conditions={"sensors": "none"})
    schedule, std = model.schedule, 0.3

    class Exact(torch.nn.Module):
        upscaling = "none"

        def forward(self, t, x, state, sensors):
            sigma = schedule.sigmas(t)[:, None, None]
            return -sigma * x / (std**2 + sigma**2)

    model.network = Exact()
    model.register_parameter("dummy", torch.nn.Parameter(torch.zeros(1)))
    out = model.sample_batch(Request(torch.zeros(1, 32, 32), members=range(50), seed=0))
    assert 0.75 < float(out.std()) / std < 0.98


def test_box_filter_keeps_a_constant_and_the_sensors_scale():
    assert torch.allclose(box_filter(torch.full((2, 8, 8), 3.0), 32), torch.full((2, 32, 32), 3.0))


def test_errors():
    with pytest.raises(ValueError, match="required or none"):
        published(conditions={"sensors": "optional"})
    with pytest.raises(ValueError, match="no history"):
        published(conditions={"sensors": "none", "history": 2})
    with pytest.raises(ValueError, match="expected interp or conv"):
        published(upscaling="nearest")
    model = published(conditions={"sensors": "none"})
    with pytest.raises(ValueError, match="another interval"):
        model.sample_batch(Request(torch.zeros(1, 32, 32), members=[0], seed=0, held=5))
    assert math.isclose(model.factor, 1.0)
