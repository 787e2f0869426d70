"""Kriging and Matheron's rule against dense Gaussian conditioning."""

import math

import pytest
import torch

from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.fields.sensors import regular_positions
from hpc_closure.closure.gaussian.channel_covariance import apply_channels, covariance
from hpc_closure.closure.gaussian.kriging import Kriging, StationaryGaussian

B = band(6)


def make_law(decay=0.02):
    spectrum = torch.exp(-decay * (2 * math.pi) ** 2 * B.group_k2.double())
    return StationaryGaussian(B, spectrum)


def correlated(law, one, other):
    """Dense covariance of the field at two sets of points."""
    k = [B.grid.kx.expand(B.shape).flatten(), B.grid.ky.expand(B.shape).flatten()]
    separation = one[:, None] - other[None]
    angle = separation[..., :1] * k[0] + separation[..., 1:] * k[1]
    return angle.cos() @ (B.weights.flatten() * B.spread(law.spectrum).flatten())


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_posterior_mean_and_std_are_the_dense_ones(noise):
    law = make_law()
    positions = keyed_noise.uniforms(0, "positions", range(9), 0, 2)
    variance = torch.full((9,), noise**2, dtype=torch.float64)
    gain = Kriging(law, positions, variance)
    grid = regular_positions(16)
    inner = correlated(law, positions, positions) + torch.diag(variance)
    cross = correlated(law, grid, positions)
    innovation = keyed_noise.normals(1, "innovation", [0, 1], 0, 9)
    dense = (cross @ torch.linalg.solve(inner, innovation.T)).T.reshape(2, 16, 16)
    assert torch.allclose(B.to_physical(gain.field(innovation), 16), dense, atol=1e-6)
    left = law.variance - (cross * torch.linalg.solve(inner, cross.T).T).sum(1)
    share = (left.clamp(min=0) / law.variance).sqrt().reshape(1, 16, 16)
    assert torch.allclose(gain.std(16), share, atol=1e-4)


def test_matheron_draws_have_the_posterior_covariance():
    law, count = make_law(), 4000
    positions = keyed_noise.uniforms(0, "positions", range(5), 0, 2)
    variance = torch.full((5,), 0.5, dtype=torch.float64)
    gain = Kriging(law, positions, variance)
    prior = keyed_noise.white_spectra(B, 3, "draw", range(count), 0) * law.modes(
        "std", torch.zeros(1, dtype=torch.complex128)
    )
    errors = keyed_noise.normals(3, "draw", range(count), 0, 5) * variance.sqrt()
    points = regular_positions(4)
    values = B.at(gain.remove(prior, errors), B.phases(points))
    inner = correlated(law, positions, positions) + torch.diag(variance)
    cross = correlated(law, points, positions)
    dense = correlated(law, points, points) - cross @ torch.linalg.solve(inner, cross.T)
    sampled = values.T @ values / count
    assert (sampled - dense).abs().max() < 0.08 * law.variance


def test_exact_sensors_are_met():
    law = make_law()
    positions = regular_positions(4)
    gain = Kriging(law, positions, torch.zeros(16, dtype=torch.float64))
    innovation = keyed_noise.normals(1, "innovation", [0], 0, 16)
    assert torch.allclose(gain.at_sensors(gain.field(innovation)), innovation, atol=1e-8)
    prior = keyed_noise.white_spectra(B, 3, "draw", range(3), 0)
    assert gain.at_sensors(gain.remove(prior)).abs().max() < 1e-8


@pytest.mark.parametrize("errors", ["none", "equal", "of each state"])
@pytest.mark.parametrize("side", [4, 10])  # few sensors and many, for 182 numbers
def test_a_projection_is_a_draw_without_errors(side, errors):
    positions = regular_positions(side)
    variance = torch.full((side**2,), 0.0 if errors == "none" else 0.3, dtype=torch.float64)
    if errors == "of each state":
        variance = variance * torch.arange(1, 4)[:, None]
    gain = Kriging(make_law(), positions, variance)
    prior = keyed_noise.white_spectra(B, 3, "draw", range(3), 0)
    expected = gain.remove(prior)
    with torch.autocast("cpu", torch.bfloat16):
        found = gain.project(prior)
    assert (found - expected).abs().max() < 1e-12 * prior.abs().max()


def test_two_sensors_at_one_place_do_not_break_it():
    positions = torch.tensor([[0.2, 0.3], [0.2, 0.3], [0.7, 0.1]])
    gain = Kriging(make_law(), positions, torch.zeros(3, dtype=torch.float64))
    assert torch.isfinite(torch.view_as_real(gain.field(torch.ones(1, 3)))).all()


def test_capped_gain_leaves_weak_shells_alone():
    law = make_law(decay=0.05)
    like = torch.zeros(1, dtype=torch.float64)
    whiten, mask = law.modes("whiten", like), law.modes("mask", like)
    shell = B.grid.shell()
    power = torch.zeros(B.grid.num_shells, dtype=torch.float64).index_add_(
        0, shell.flatten(), (B.spread(law.spectrum) * B.weights).flatten()
    )
    assert torch.equal(mask.bool(), (power > 1e-6 * law.variance)[shell])
    assert bool((whiten[mask == 0] == 0).all()) and bool((mask == 0).any())


def several(sides, fields):
    """A law of some fields on a line, a plane or a cube: band, law, factors across fields."""
    b = band(2, 1.5, sides)
    spectrum = torch.exp(-0.3 * b.group_k2.double())
    law = StationaryGaussian(b, torch.stack([(1 + 3 * c) * spectrum for c in range(fields)]))
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(2, fields, fields, *b.shape, generator=generator).double()
    hermitian = b.hermitian(torch.complex(*factors))  # fields are real
    hermitian[(..., *[0] * sides)].imag.zero_()
    return b, law, torch.stack([hermitian.real, hermitian.imag])


def dense_of(b, law, factors, one, other):
    """Covariance of all fields at two sets of points by sums over modes, (C P, C P')."""
    s = covariance(factors, b.spread(law.spectrum)).flatten(2)
    k = torch.stack([side.expand(b.shape).flatten() for side in b.grid.k]).double()
    phase = torch.exp(1j * ((one[:, None] - other[None]) @ k.to(one)))
    weighted = s * b.weights.flatten()
    return torch.einsum("ijm,pqm->ipjq", weighted, phase.to(s)).real.flatten(2).flatten(0, 1)


@pytest.mark.parametrize("noise", [0.0, 0.4])
@pytest.mark.parametrize("sides, fields", [(1, 2), (2, 3), (3, 2)])
def test_several_fields_have_the_dense_posterior_of_all_of_them(sides, fields, noise):
    """A reading of one field corrects the others; factors are complex, as of phase lags."""
    b, law, factors = several(sides, fields)
    positions = 1.5 * keyed_noise.uniforms(0, "positions", range(2), 0, sides)
    variance = noise**2 * torch.arange(1.0, 1 + fields).double().repeat_interleave(2)
    gain = Kriging(law, positions, variance, channels=factors)
    grid = regular_positions(6, 1.5, sides)
    inner = dense_of(b, law, factors, positions, positions) + torch.diag(variance)
    cross = dense_of(b, law, factors, grid, positions)
    innovation = keyed_noise.normals(1, "innovation", [0, 1], 0, 2 * fields)
    dense = cross @ torch.linalg.solve(inner, innovation.T)
    expected = dense.T.reshape(2, fields, *(6,) * sides)
    found = gain.field(innovation)
    assert torch.allclose(b.to_physical(found, 6), expected, atol=1e-6 * float(expected.std()))
    prior = dense_of(b, law, factors, grid, grid).diagonal()
    left = prior - (cross * torch.linalg.solve(inner, cross.T).T).sum(1)
    share = (left.clamp(min=0) / prior).sqrt().reshape(1, fields, *(6,) * sides)
    assert torch.allclose(gain.std(6), share, atol=1e-4)
    if not noise:
        assert torch.allclose(gain.at_sensors(found), innovation, atol=1e-8)


def test_draws_of_several_fields_have_the_dense_posterior_covariance():
    b, law, factors = several(2, 2)
    count, positions = 4000, 1.5 * keyed_noise.uniforms(0, "positions", range(3), 0, 2)
    variance = torch.full((6,), 0.5, dtype=torch.float64)
    gain = Kriging(law, positions, variance, channels=factors)
    key = keyed_noise.Key(3, "draw", range(count), 0)
    white = keyed_noise.white_fields(b, key, keyed_noise.STREAM_BASE, torch.device("cpu"), (2,))
    prior = apply_channels(factors, law.coloured(white))
    values = gain.remove(prior, keyed_noise.normals(*key, 6) * variance.sqrt())
    points = regular_positions(3, 1.5)
    sampled = b.values(values, points).flatten(1)
    inner = dense_of(b, law, factors, positions, positions) + torch.diag(variance)
    cross, whole = (dense_of(b, law, factors, points, at) for at in (positions, points))
    dense = whole - cross @ torch.linalg.solve(inner, cross.T)
    assert (sampled.T @ sampled / count - dense).abs().max() < 0.08 * float(whole.max())
