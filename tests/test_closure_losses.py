"""Losses against closed forms."""

import math

import pytest
import torch

from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.losses import (
    ALMOST_FAIR,
    crps,
    energy_score,
    gaussian_likelihood,
    spectral_energy_score,
    spectral_square,
)
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.gaussian.kriging import StationaryGaussian

B = band(5)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("members", [2, 4, 16])
def test_fair_crps_does_not_depend_on_the_number_of_members(members):
    """E of the fair score for equal normal laws: 1 / sqrt(pi) at any size."""
    score = crps(normals(members, 1, 200_000), normals(1, 200_000, seed=1), alpha=1.0)
    assert float(score[0]) == pytest.approx(1 / math.sqrt(math.pi), rel=0.01)


def test_ensemble_crps_is_the_limit_alpha_zero():
    x, y = normals(5, 1, 50), normals(1, 50, seed=1)
    spread = (x[:, None] - x[None]).abs().mean((0, 1)) / 2
    expected = ((x - y).abs().mean(0) - spread).mean(1)
    assert torch.allclose(crps(x, y, alpha=0.0), expected)


def test_crps_prefers_the_right_spread():
    y = normals(1, 100_000, seed=1)
    x = normals(4, 1, 100_000)
    right = float(crps(x, y, ALMOST_FAIR))
    assert right < float(crps(0.8 * x, y, ALMOST_FAIR)) and right < float(
        crps(1.2 * x, y, ALMOST_FAIR)
    )


def test_likelihood_is_least_at_the_true_amplitude():
    residual = 0.5 * normals(1, 400, 400)
    values = [
        float(gaussian_likelihood(residual, torch.full_like(residual, log)))
        for log in (math.log(0.4), math.log(0.5), math.log(0.6))
    ]
    assert values[1] < values[0] and values[1] < values[2]
    assert values[1] == pytest.approx(math.log(0.5) + 0.5, abs=0.01)


def test_base_law_scores_one():
    spectrum = torch.exp(-0.3 * B.group_k2.double())
    law = StationaryGaussian(B, spectrum)
    q_hat = keyed_noise.white_spectra(B, 0, "test", range(3000), 0)
    like = torch.zeros(1, dtype=torch.float64)
    white = q_hat * law.modes("std", like) * law.modes("whiten", like)
    score = spectral_square(B, white, law.modes("importance", like))
    assert float(score.mean()) == pytest.approx(1, rel=0.03)


def test_energy_score_prefers_the_right_spread_and_has_a_gradient():
    truth = keyed_noise.white_spectra(B, 1, "test", range(500), 0)
    samples = torch.stack(
        [keyed_noise.white_spectra(B, 2, "test", range(500), i) for i in range(4)]
    )
    weight = torch.ones(B.shape, dtype=torch.float64)

    def score(factor):
        return spectral_energy_score(B, factor * samples, truth, weight, ALMOST_FAIR).mean()

    assert float(score(1.0)) < float(score(0.7)) and float(score(1.0)) < float(score(1.3))
    factor = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    score(factor).backward()
    assert torch.isfinite(factor.grad) and abs(float(factor.grad)) < 0.1
    zero = torch.zeros_like(samples).requires_grad_(True)
    spectral_energy_score(B, zero, truth, weight, ALMOST_FAIR).sum().backward()
    assert torch.isfinite(torch.view_as_real(zero.grad)).all()


def test_the_energy_score_of_fields_sees_two_peaks_of_a_pattern():
    """Two signs of one field: the law scores 0.5, a Gaussian of the same covariance worse."""
    wave = torch.cos(torch.arange(12, dtype=torch.float64) * (2 * torch.pi / 12))[:, None]
    one = wave.expand(12, 12) * 2**0.5
    generator = torch.Generator().manual_seed(1)

    def drawn(signs):
        return signs[..., None, None] * one

    sign = torch.randint(0, 2, (9, 4000), generator=generator) * 2.0 - 1
    normal = torch.randn(8, 4000, generator=generator)
    own, plain = (float(energy_score(drawn(x), drawn(sign[8])).mean()) for x in (sign[:8], normal))
    assert own == pytest.approx(0.5, abs=0.02)
    assert plain - own > 0.08
