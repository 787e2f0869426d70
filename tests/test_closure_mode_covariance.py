"""A covariance for every wavevector: estimated, held over the base law, and drawn."""

import pytest
import torch
from closure_case import SMALL

from hpc_closure.bench.model.known import Known, fit
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.gaussian.kriging import StationaryGaussian
from hpc_closure.closure.gaussian.mode_covariance import (
    ModeCovariance,
    apply_factors,
    remove_factors,
)
from hpc_closure.closure.model import Request
from hpc_closure.closure.reductions import Reader

B = band(3)
MODES = {"preset": "gaussian_modes", "mean": ["regression"]}


def test_factors_carry_the_base_law_to_the_covariance_that_was_seen():
    spectrum = torch.linspace(1.0, 3.0, len(B.group_k2), dtype=torch.float64)
    spectrum[4] = 0.0
    law = StationaryGaussian(B, spectrum)
    white = law.coloured(keyed_noise.white_spectra(B, 0, "test", range(20_000), 0))
    pushed = white.clone()
    pushed[:, 1, 0] += 2.0 * torch.sign(
        torch.randn(len(white), generator=torch.Generator().manual_seed(0))
    )
    pushed[:, 2, 3] = 1.5 * white[:, 2, 3].real + 1j * (
        white[:, 2, 3].real + 0.5 * white[:, 2, 3].imag
    )
    seen = ModeCovariance(B)
    seen.add(pushed)
    factors = seen.factors(Reader([]), B.spread(spectrum))
    fresh = law.coloured(keyed_noise.white_spectra(B, 0, "test", range(20_000, 40_000), 0))
    drawn = apply_factors(factors, fresh)
    for row, column in ((0, 0), (1, 0), (2, 3), (5, 1)):
        for part in (torch.real, torch.imag):
            want, have = (part(one[:, row, column]).var() for one in (pushed, drawn))
            assert float(have) == pytest.approx(float(want), rel=0.05, abs=1e-9)
    pair = torch.stack([drawn[:, 2, 3].real, drawn[:, 2, 3].imag])
    assert float(torch.corrcoef(pair)[0, 1]) == pytest.approx(1 / 1.25**0.5, abs=0.02)
    assert torch.allclose(remove_factors(factors, drawn), fresh)


@pytest.fixture(scope="module")
def pushed():
    """A law that pushes one wave, with the base law and with one by wavevector."""
    known = Known("regimes", 16)
    config = {**SMALL, "conditions": {"sensors": "none"}, **MODES}
    return known, fit(known, samples=1000, steps=0, config=config)


def test_the_pushed_wave_spreads_as_it_does_and_its_neighbours_do_not(pushed):
    known, model = pushed
    states = known.states("test", 400)
    request = Request(states.float(), range(400), seed=1)
    spread = {}
    left = known.draw(states, 7_000_000) - model.sample_batch(request) * 0
    fields = {"truth": left, "modes": model.sample_batch(request)}
    fields["mean_gp"] = model.sample_batch(
        Request(states.float(), range(400), 1, method="mean_gp")
    )
    mean = model.band.to_physical(model.encode(model.frames(states)).mean_hat, 16)
    for name, one in fields.items():
        hat = model.band.to_spectral(one.double() - mean)
        spread[name] = [float(hat[:, r, c].abs().square().mean()) for r, c in ((1, 0), (0, 1))]
    wave, neighbour = spread["truth"]
    assert spread["modes"][0] == pytest.approx(wave, rel=0.15)
    assert spread["modes"][1] == pytest.approx(neighbour, rel=0.25)
    assert spread["mean_gp"][0] < 0.75 * wave  # one variance for both
    assert spread["mean_gp"][1] > 1.5 * neighbour


def test_a_member_draws_the_same_alone(pushed):
    known, model = pushed
    states = known.states("test", 3).float()
    whole = model.sample_batch(Request(states[:1], range(8), seed=3, call=2))
    alone = model.sample_batch(Request(states[:1], [5], seed=3, call=2))
    assert torch.equal(whole[5:6], alone)
    assert not torch.equal(whole[4], whole[5])
