"""A score that reads sensors itself: how readings reach the network, exact steps, its losses."""

import math

import pytest
import torch
from closure_case import SMALL, batches_of, law_of, states_of

from hpc_closure.closure.artifact import build
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.fields.sensors import Sensors, fourier_interpolation, regular_positions
from hpc_closure.closure.gaussian.conditioning import SensorInterpolator
from hpc_closure.closure.model import Request
from hpc_closure.closure.sampling import GaussianStep, Trigonometric


@pytest.fixture(scope="module")
def fitted():
    law = law_of()
    torch.manual_seed(0)
    model = build({**SMALL, "preset": "fno_score", "layers": 2}, law.grid.size)
    model.begin("mean", batches_of(law, 200))
    model.begin("generator", batches_of(law, 200, first=10_000))
    return law, model


def test_largest_modes_go_there_and_back():
    b = band(6)
    w_hat = b.to_spectral(torch.randn(3, 16, 16, dtype=torch.float64))
    numbers = b.largest(w_hat)
    placed = b.place_largest(numbers)
    assert torch.equal(b.largest(placed), numbers)
    assert torch.equal(placed[:, :3, :3], w_hat[:, :3, :3])
    assert torch.equal(placed[:, -2:, :3], w_hat[:, -2:, :3])
    assert float(placed[:, 3:-2].abs().max()) == float(placed[..., 3:].abs().max()) == 0


@pytest.mark.parametrize("side", [4, 7, 16])
def test_regular_readings_are_fourier_interpolated(fitted, side):
    _, model = fitted
    frame = model.frame
    carrier = SensorInterpolator(frame, regular_positions(side), 0.0, "cpu")
    values = torch.randn(2, side * side, generator=torch.Generator().manual_seed(0))
    ours = carrier.spread(values)
    theirs = fourier_interpolation(Sensors(values, regular_positions(side)), frame.size)
    assert torch.allclose(ours, theirs.float(), atol=1e-5)
    assert bool((carrier.places[0] == 1).all())


def test_a_carrier_reads_what_a_spectrum_has_there(fitted):
    _, model = fitted
    frame = model.frame
    generator = torch.Generator().manual_seed(1)
    positions = torch.rand(9, 2, generator=generator, dtype=torch.float64)
    carrier = SensorInterpolator(frame, positions, 0.2, "cpu")
    q_hat = frame.kept.to_spectral(states_of(3))
    exact = frame.kept.at(q_hat, frame.kept.phases(positions))
    assert torch.allclose(carrier.read(q_hat).double(), exact, atol=1e-5)
    # a constant comes back as one, as far as a point is seen at all
    one = carrier.spread(torch.ones(1, 9))[0]
    assert torch.allclose(one, carrier.places[0], atol=1e-6)
    assert 0 < float(one.min()) < float(one.max()) < 1
    assert float(carrier.places[1].min()) == pytest.approx(0.2)


@pytest.mark.parametrize("spread", [1e-3, 0.1, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_steps_are_exact_for_a_gaussian_law(spread, steps):
    """With the denoiser of N(mu, c^2) noise z ends at mu + c z, in any number of steps."""
    mu, z = 0.3, torch.linspace(-2, 2, 9, dtype=torch.float64)
    c = torch.full_like(z, spread)

    def denoise(x, t):
        cos, sin = math.cos(t), math.sin(t)
        rho2 = spread**2 * cos**2 + sin**2
        return mu + spread**2 * cos / rho2 * (x - cos * mu)

    sampler = GaussianStep(Trigonometric(), steps, c)
    assert torch.allclose(sampler(denoise, z), mu + spread * z, atol=1e-10)
    assert torch.allclose(sampler.first, torch.full_like(z, mu), atol=1e-10)


def test_the_spread_that_is_learned_is_that_of_the_error(fitted):
    """The likelihood of log c has its minimum where c is the error's rms, and no bias there."""
    _, model = fitted
    frame, score = model.frame, model.residual
    kept = frame.kept
    generator = torch.Generator().manual_seed(2)
    error = kept.to_spectral(torch.randn(400, 32, 32, generator=generator)) * 32 * 0.2
    zero = torch.zeros_like(error)
    slopes = []
    for c in (0.1, 0.2, 0.4):
        log = torch.full((400, len(kept.group_k2)), math.log(c), requires_grad=True)
        told = type("Told", (), {"mean": zero, "log_spread": log})
        score._spread_loss(frame, told, error).sum().backward()
        slopes.append(log.grad.mean(0)[frame.law.spectrum > 0])
    low, right, high = slopes
    seen = low != 0
    assert bool(seen.any())
    assert bool((low[seen] < 0).all()) and bool((high[seen] > 0).all())
    assert float((right[seen].abs() / high[seen]).mean()) < 0.2


def test_sensors_lower_the_error_of_an_untrained_network_by_their_gain_alone(fitted):
    """Half of what is read beyond the mean is added before anything is learned."""
    law, model = fitted
    states = states_of(4, first=5000)
    truth = law.sample(states, members=[5], seed=2)[0]
    sensors = Sensors(truth[:, ::2, ::2].reshape(4, -1), regular_positions(16))
    errors = []
    for given in (None, sensors):
        drawn = torch.stack(
            [
                model.sample_batch(Request(states, members=range(9 * i, 9 * i + 4), sensors=given))
                for i in range(8)
            ]
        )
        errors.append(float((drawn.mean(0) - truth).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_another_interval_scales_the_spread_and_not_the_mean(fitted):
    law, model = fitted
    state = states_of(1)
    one, four = (
        model.sample_batch(Request(state, members=range(40), seed=1, interval_ratio=held))
        for held in (1.0, 4.0)
    )
    assert float(four.var(0).mean() / one.var(0).mean()) == pytest.approx(0.25, rel=1e-3)
    # four is mean + (one - mean) / 2, so every member tells the same mean
    mean = 2 * four - one
    assert float(mean.var(0).mean() / one.var(0).mean()) < 1e-6


def test_every_weight_has_a_gradient_whatever_a_share_of_a_batch_reads(fitted):
    """Processes average their gradients; one that lacks some would end all of them."""
    law, model = fitted
    state, target = batches_of(law, 1)[0]
    uniform = keyed_noise.uniforms(0, "train", range(20), 0)[:, 1]
    for sample in (int(uniform.argmin()), int(uniform.argmax())):  # with sensors, without
        for weight in model.parameters():
            weight.grad = None
        model.loss({"state": state, "target": target, "sample_index": [sample]}, 0, 0).backward()
        trained = model.phase_named("generator").parameters(model)
        assert trained and all(weight.grad is not None for weight in trained)
