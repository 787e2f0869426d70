"""Band-limited fields: round trips, point values, white noise, groups."""

import math

import pytest
import torch

from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.features import feature_spectra
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.fields.sensors import Sensors, regular_positions


def random_hat(b, count=3, seed=0):
    return keyed_noise.white_spectra(b, seed, "test", range(count), 0)


@pytest.mark.parametrize("modes,size", [(5, 12), (5, 16), (10, 32), (21, 64), (9, 20)])
def test_round_trip_on_any_grid(modes, size):
    b = band(modes)
    w_hat = random_hat(b)
    assert torch.allclose(b.to_spectral(b.to_physical(w_hat, size)), w_hat, atol=1e-12)


def test_one_spectrum_is_one_field_on_every_grid():
    b = band(6)
    w_hat = random_hat(b)
    assert torch.allclose(
        b.to_physical(w_hat, 64)[:, ::4, ::4], b.to_physical(w_hat, 16), atol=1e-12
    )


def test_values_at_points_are_those_of_the_grid():
    b = band(7, length=2.0)
    w_hat = random_hat(b)
    positions = regular_positions(16, 2.0)
    values = b.at(w_hat, b.phases(positions)).reshape(3, 16, 16)
    for few in (w_hat, w_hat[:1], w_hat[0], w_hat.repeat(2, 1, 1)):
        expected = b.at(few, b.phases(positions))
        assert torch.allclose(b.values(few, positions), expected, rtol=0, atol=1e-12)
    assert torch.allclose(values, b.to_physical(w_hat, 16), atol=1e-12)


def test_parseval_by_group():
    b = band(8)
    w_hat = random_hat(b)
    field = b.to_physical(w_hat, 32)
    power = b.by_group(w_hat.abs().square()).sum(-1)
    assert torch.allclose(power, field.square().mean((-2, -1)))
    assert float(b.group_size.sum()) == (2 * 8 + 1) ** 2


def test_white_noise_has_unit_modes_and_real_field():
    b = band(4)
    w_hat = keyed_noise.white_spectra(b, 1, "test", range(4000), 0)
    variance = w_hat.abs().square().mean(0)
    assert (variance - 1).abs().max() < 6 / math.sqrt(4000) * math.sqrt(2)
    assert torch.allclose(b.to_spectral(b.to_physical(w_hat, 10)), w_hat, atol=1e-12)


def test_draws_depend_on_their_key_only():
    b = band(4)
    whole = keyed_noise.white_spectra(b, 1, "test", [3, 7, 11], 5)
    assert torch.equal(whole[1:2], keyed_noise.white_spectra(b, 1, "test", [7], 5))
    assert not torch.equal(whole[1:2], keyed_noise.white_spectra(b, 1, "test", [7], 6))
    normals = keyed_noise.normals(1, "test", [3, 7], 0, 5)
    assert torch.equal(normals[1:], keyed_noise.normals(1, "test", [7], 0, 5))
    uniforms = keyed_noise.uniforms(1, "test", range(2000), 0)
    assert 0 < uniforms.min() and uniforms.max() < 1
    assert abs(float(uniforms.mean()) - 0.5) < 0.02


def test_features_are_derivatives():
    b, n = band(10, length=2.0), 32
    x = torch.arange(n, dtype=torch.float64) * 2.0 / n
    k = 2 * math.pi / 2.0
    # psi = sin(k x) cos(2 k y), w = -Lap psi = 5 k^2 psi, u = psi_y, v = -psi_x
    psi = torch.outer(torch.sin(k * x), torch.cos(2 * k * x))
    w = 5 * k**2 * psi
    u = -2 * k * torch.outer(torch.sin(k * x), torch.sin(2 * k * x))
    v = -k * torch.outer(torch.cos(k * x), torch.cos(2 * k * x))
    fields = b.to_physical(feature_spectra(b.to_spectral(w), b), n)
    for one, other in zip(fields, [u, v, w, -5 * k**2 * v, 5 * k**2 * u]):
        assert torch.allclose(one, other, atol=1e-10)


def test_sensors_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"2 sensor positions but values of shape \(3,\)"):
        Sensors(torch.zeros(3), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="finite"):
        Sensors(torch.tensor([math.nan]), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="noise_std=-1"):
        Sensors(torch.zeros(1), torch.zeros(1, 2), -1.0)
    with pytest.raises(ValueError, match="at least 12"):
        band(5).to_spectral(torch.zeros(8, 8))


def test_numbers_of_a_state_tell_shape_and_size_apart():
    b = band(6)
    field = torch.randn(3, 16, 16, dtype=torch.float64)
    w_hat = b.to_spectral(field)
    rms = b.to_physical(w_hat, 16).square().mean((-2, -1)).sqrt()
    modes, shape, log_rms = b.summary(w_hat).split([25, 25, 1], dim=-1)
    assert torch.equal(modes, b.largest(w_hat))
    assert torch.allclose(log_rms[:, 0], rms.log())
    assert torch.allclose(shape, modes / rms[:, None])
    assert torch.allclose(b.summary(3 * w_hat)[:, 25:50], shape)
    assert bool(b.summary(0 * w_hat).isfinite().all())
