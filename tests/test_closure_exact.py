"""Exact laws, laws that need a generative model, and the baselines without a network."""

import math

import pytest
import torch
from closure_case import law_of, states_of

from hpc_closure.bench.laws import StateAmplitude, TwoRegimes
from hpc_closure.closure.sensors import Sensors, fourier_interpolation, regular_positions


def test_published_noise_level():
    """Pointwise standard deviation of beta xi at dt = 1e-3: 0.01995 (a = 0.005)."""
    law = law_of("diffusion", size=64, correlation=0.005)
    assert math.sqrt(law.variance) == pytest.approx(0.01995, rel=1e-3)


def test_published_posterior_with_sensors():
    """Of G = 2U: 5.45e-5, 7.63e-3 and 2.85e-2 for 16 x 16, 8 x 8 and 4 x 4 exact sensors."""
    law = law_of("diffusion", size=64, correlation=0.005)
    for side, expected in ((16, 5.45e-5), (8, 7.63e-3), (4, 2.85e-2)):
        sensors = Sensors(torch.zeros(side**2), regular_positions(side))
        assert 2 * math.sqrt(law.posterior_variance(sensors)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("kind", ["diffusion", "convection"])
def test_samples_have_the_law(kind):
    law = law_of(kind)
    states = states_of(3)
    samples = law.sample(states, members=range(200), seed=0)
    assert float(samples.var(0).mean()) == pytest.approx(law.variance, rel=0.1)
    error = (samples.mean(0) - law.mean(states)).square().mean()
    assert float(error) == pytest.approx(law.variance / 200, rel=0.5)


def test_mean_of_diffusion_is_half_of_the_published_term():
    law = law_of("diffusion")
    x = torch.arange(32, dtype=torch.float64) * (2 * math.pi / 32)
    state = (2 * x).sin()[:, None] * x.cos()[None, :]
    lap = -(4 + 1) * (2 * math.pi) ** 2 * state
    assert torch.allclose(law.mean(state[None])[0], 0.5 * 1e-3 * lap, atol=1e-12)


def test_state_dependent_amplitude():
    law = StateAmplitude(law_of(), strength=1.0)
    states = states_of(1)
    samples = law.sample(states, members=range(400), seed=0)
    std = (samples - law.mean(states)).square().mean(0).sqrt()
    exact = law.amplitude(states) * math.sqrt(law.base.variance)
    assert float((std / exact - 1).abs().mean()) < 0.07
    assert float(exact.max() / exact.min()) > 2


def test_two_regimes():
    law = TwoRegimes(law_of())
    states = states_of(40)
    probability = law.probability(states)
    assert float(probability.min()) < 0.3 and float(probability.max()) > 0.7
    samples = law.sample(states[:1], members=range(500), seed=0) - law.base.mean(states[:1])
    wave = law.pattern / law.pattern.square().mean().sqrt()
    share = (samples * wave).mean((-2, -1)) / law.pattern.square().mean().sqrt()
    assert float((share > 0).double().mean()) == pytest.approx(float(probability[0]), abs=0.1)
    assert float(
        samples.mean(0).sub(law.mean(states[:1]) - law.base.mean(states[:1])).abs().mean()
    ) < 0.1 * math.sqrt(law.base.variance)
    # bimodal: hardly anything between the two patterns
    assert float((share.abs() < 0.3).double().mean()) < 0.15


def test_fourier_interpolation_is_exact_for_band_limited_fields():
    x = torch.arange(32, dtype=torch.float64) * (2 * math.pi / 32)
    field = ((2 * x).sin()[:, None] * x.cos()[None, :] + 0.5)[None]
    sensors = Sensors(field[:, ::4, ::4].reshape(1, -1), regular_positions(8))
    assert torch.allclose(fourier_interpolation(sensors, 32), field, atol=1e-12)
    with pytest.raises(ValueError, match="regular square"):
        fourier_interpolation(Sensors(torch.zeros(5), torch.rand(5, 2)), 32)


def test_physics_adds_what_sensors_see_beyond_the_known_term():
    law = law_of()
    states = states_of(2)
    truth = law.sample(states, members=[0], seed=0)[0]
    sensors = Sensors(truth[:, ::2, ::2].reshape(2, -1), regular_positions(16))
    error = (law.known_term(states, sensors) - truth).norm() / truth.norm()
    assert float(error) < 1e-3
    assert torch.equal(law.known_term(states), law.mean(states))
