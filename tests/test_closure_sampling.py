"""Samplers on laws whose denoiser is known: Gaussian fields and a two-point mixture."""

import math

import pytest
import torch

from hpc_closure.closure.sampling import (
    SAMPLERS,
    GaussianStep,
    PublishedVE,
    Trigonometric,
    build_sampler,
)


def gaussian(schedule, std, mean=0.0):
    """D(x, t) of N(mean, std^2) with unit base noise."""

    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)

    return denoise


def fresh(shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return lambda index: torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("method", [m for m in SAMPLERS if m != "euler_maruyama"])
def test_every_sampler_converges(method):
    s = Trigonometric()
    z = fresh(20000, seed=0)(0)
    errors = []
    for evaluations in (8, 128):
        sampler = build_sampler(method, s, evaluations)
        x = sampler(gaussian(s, 0.5, 0.3), z, fresh(20000))
        errors.append(abs(float(x.std()) / 0.5 - 1) + abs(float(x.mean()) - 0.3))
    assert errors[1] < 0.06
    assert errors[1] < errors[0] + 0.02


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("evaluations", [1, 2, 4])
def test_matched_base_is_exact_in_any_number_of_steps(method, evaluations):
    s = Trigonometric()
    z = fresh(100, seed=0)(0)
    x = build_sampler(method, s, evaluations)(gaussian(s, 1.0), z)
    assert torch.allclose(x, z, atol=1e-12)


def test_budget_is_the_number_of_calls():
    for method, sampler in SAMPLERS.items():
        schedule = PublishedVE() if method == "euler_maruyama" else Trigonometric()
        for evaluations in (2, 5, 10):
            calls = []

            def denoise(x, t):
                calls.append(t)
                return x * 0

            build_sampler(method, schedule, evaluations)(denoise, torch.ones(2), fresh(2))
            assert len(calls) <= evaluations
            assert len(calls) >= evaluations - 1
            assert all(a >= b for a, b in zip(calls, calls[1:]))


def test_order_of_accuracy():
    s = Trigonometric()
    z = torch.ones(1, dtype=torch.float64)

    def error(method, evaluations):
        x = build_sampler(method, s, evaluations)(gaussian(s, 0.7), z)
        return abs(float(x) - 0.7)

    assert error("euler", 64) / error("euler", 128) == pytest.approx(2, rel=0.3)
    assert error("heun", 64) / error("heun", 128) == pytest.approx(4, rel=0.5)


@pytest.mark.parametrize("probability", [0.1, 0.2, 0.5, 0.9])
def test_steps_that_are_exact_for_a_gaussian_law_find_the_weights_of_two_regimes(probability):
    """One number of either sign, and 250 whose size goes with it, which shows early.

    Steps that did not look at how the law's mean changes came too soon for it, by up to .085.
    """
    s, count, sizes = Trigonometric(), 250, (0.6, 1.0)
    weights = (probability, 1 - probability)
    z = torch.cat([fresh((3000, 1))(0), fresh((3000, count), seed=2)(0)], dim=1)
    base = torch.tensor([1.0] + [0.68] * count, dtype=torch.float64)  # variances
    centres = [(sign - (2 * probability - 1)) * (base == 1.0) for sign in (1, -1)]
    within = [torch.where(base == 1.0, 0.01, size**2) for size in sizes]

    def denoise(x, t):
        alpha, sigma = s.alpha(t), s.sigma(t)
        odds, means = [], []
        for centre, inside, weight in zip(centres, within, weights):
            variance = alpha**2 * inside + sigma**2 * base
            left = x - alpha * centre
            odds.append(math.log(weight) - 0.5 * (left**2 / variance + variance.log()).sum(1))
            means.append(centre + alpha * inside / variance * left)
        first = torch.sigmoid(odds[0] - odds[1])[:, None]
        return first * means[0] + (1 - first) * means[1]

    def white(x, t):
        return denoise(x * base.sqrt(), t) / base.sqrt()

    variance = sum(w * (one + c**2) for w, one, c in zip(weights, within, centres))
    wave = GaussianStep(s, 6, (variance / base).sqrt())(white, z)[:, 0]
    found = float((wave > 1 - 2 * probability).double().mean())
    assert abs(found - probability) < 0.05


def test_two_points_are_found():
    s = Trigonometric()

    def denoise(x, t):
        return torch.tanh(x * s.alpha(t) / max(s.sigma(t) ** 2, 1e-9))

    x = build_sampler("euler", s, 32)(denoise, fresh(5000, seed=0)(0))
    assert float((x.abs() - 1).abs().mean()) < 0.1
    assert abs(float(x.mean())) < 0.05


def test_published_schedule():
    s = PublishedVE()
    assert s.sigma(0.1) == pytest.approx(0.375, abs=2e-3)
    assert s.sigma(1e-3) == pytest.approx(0.0317, abs=1e-3)
    times = s.times(10)
    assert len(times) == 11 and times[0] == pytest.approx(0.1) and times[9] == pytest.approx(1e-3)
    assert float(s.sigmas(torch.tensor(0.1))) == pytest.approx(s.sigma(0.1), rel=1e-5)
    step = 1e-5
    slope = (s.sigma(0.05 + step) - s.sigma(0.05)) / step
    assert s.sigma_dot(0.05) == pytest.approx(slope, rel=1e-3)


def test_errors():
    with pytest.raises(ValueError, match="expected one of euler"):
        build_sampler("ddpm", Trigonometric(), 4)
    with pytest.raises(ValueError, match="evaluations=0"):
        build_sampler("euler", Trigonometric(), 0)
    with pytest.raises(ValueError, match="published_ve"):
        build_sampler("euler_maruyama", Trigonometric(), 4)(
            lambda x, t: x, torch.ones(1), fresh(1)
        )
    assert math.isclose(Trigonometric().norm(0.7), 1.0)
