"""Counter-based draws and the laws built on them."""

import numpy as np
import pytest
import torch

from hpc_closure.spectral.modes.grid import Grid
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.noise.counters import box_muller, key_of, standard_normals, uniform_bits
from hpc_closure.spectral.noise.draws import NoiseModel
from hpc_closure.spectral.noise.laws import Noise, OrnsteinUhlenbeck, QWiener, RingNoise
from hpc_closure.spectral.noise.rates import Rates

PUBLISHED = {"amplitude": 5e-5, "draws": 10, "correlation": 0.005}


def published(grid=64, dt=1e-3, **more):
    return NoiseModel(QWiener(**PUBLISHED), Grid(grid), dt, seed=1, **more)


def philox4x64(counter, key):
    """Philox4x64-10 as printed in Salmon et al. (2011), in Python integers."""
    mask = (1 << 64) - 1
    m0, m1 = 0xD2E7470EE14C6C93, 0xCA5A826395121157
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = m0 * c0, m1 * c2
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & mask, (p0 >> 64) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return [c0, c1, c2, c3]


def test_words_are_philox_of_key_and_counter():
    key = key_of(7, "generate", 3)
    words = uniform_bits(key, stream=5, first=41, num_counters=2)
    expected = philox4x64([42, 0, 5, 0], key.tolist()) + philox4x64([43, 0, 5, 0], key.tolist())
    assert words.tolist() == expected
    words = uniform_bits(key, stream=5, first=0, num_counters=1, item=2**63 + 1)
    assert words.tolist() == philox4x64([1, 2**63 + 1, 5, 0], key.tolist())


def test_keys_differ_by_seed_stage_and_member():
    keys = {key_of(*a).tobytes() for a in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]}
    assert len(keys) == 4


def test_any_item_can_be_drawn_by_itself():
    whole = standard_normals(3, "generate", 8, stream=2, first=0, num=9, width=7)
    for item in (0, 4, 8):
        one = standard_normals(3, "generate", 8, stream=2, first=item, num=1, width=7)
        assert np.array_equal(one[0], whole[item])


def test_normals_are_normal():
    z = standard_normals(0, "test", 0, num=1000, width=200).ravel()
    assert abs(z.mean()) < 4 / z.size**0.5
    assert abs(z.var() - 1) < 4 * (2 / z.size) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / z.size) ** 0.5
    extreme = box_muller(np.array([0, 2**64 - 1], dtype=np.uint64))
    assert np.isfinite(extreme).all() and abs(extreme[0]) < 6.9


def test_draws_do_not_depend_on_batch_or_block():
    noise = published()
    whole = noise.draw([4, 0, 9], 10, 6)
    assert np.array_equal(noise.draw([9], 12, 1), whole[2:3, 2:3])
    assert np.array_equal(published().draw([0, 4], 13, 3), whole[3:, [1, 0]])


def test_the_path_is_the_same_on_every_grid():
    small = published(16)
    large = published(64)
    K = Grid(16).modes
    a = small.spread(small.draw([2], 5, 1)[0])[0]
    b = large.spread(large.draw([2], 5, 1)[0])[0]
    assert torch.equal(a[: K + 1], b[: K + 1, : K + 1])
    assert torch.equal(a[-K:], b[-K:, : K + 1])


def test_published_standard_deviation():
    noise = published()
    grid = noise.grid
    std = (noise.std_hat**2 * grid.weights).sum().sqrt()
    assert abs(std - 0.01995) < 5e-6
    draws = noise.draw(range(50), 0, 20).reshape(1000, *noise.box)
    field = Transform(grid).to_physical(noise.spread(draws))
    assert abs(field.std() / 0.01995 - 1) < 0.01
    mean_share = noise.std_hat[0, 0] ** 2 / std**2
    assert abs(mean_share - 0.063) < 5e-4


def test_published_covariance():
    noise = published()
    spectrum = noise.std_hat**2
    covariance = Transform(noise.grid).to_physical(spectrum.to(torch.complex128)[None])[0]
    r = torch.arange(20, dtype=torch.float64) / 64
    expected = torch.exp(-(r**2) / (4 * 0.005))
    torch.testing.assert_close(covariance[:20, 0] / covariance[0, 0], expected, atol=2e-5, rtol=0)


def test_sampled_spectrum_follows_std_hat():
    noise = published(16)
    draws = noise.spread(noise.draw([0], 0, 20000)[:, 0])
    measured = (draws.abs() ** 2).mean(0)
    ratio = measured[noise.std_hat > 0] / noise.std_hat[noise.std_hat > 0] ** 2
    assert (ratio - 1).abs().max() < 0.06


@pytest.mark.parametrize("fine", [2, 4, 8])
def test_paths_refine(fine):
    coarse = published(dt=1e-3)
    refined = published(dt=1e-3 / fine, path_dt=1e-3)
    path = coarse.draw([3], 5, 4)
    sums = refined.draw([3], 5 * fine, 4 * fine).reshape(4, fine, 1, *coarse.box).mean(1)
    np.testing.assert_allclose(sums, path, rtol=0, atol=1e-15)
    level = int(np.log2(fine))
    np.testing.assert_allclose(
        refined.draw([3], 5 * fine, 9),
        coarse.draw([3], 5 * fine, 9, level),
        rtol=1e-13,
        atol=1e-18,
    )
    ratio = refined.draw([1], 0, 400).std() / coarse.draw([1], 0, 400).std()
    assert abs(ratio / fine**0.5 - 1) < 0.05


def test_paths_coarsen():
    fine = published(dt=1e-3)
    coarse = published(dt=4e-3, path_dt=1e-3)
    sums = fine.draw([3], 8, 8).reshape(2, 4, 1, *fine.box).mean(1)
    np.testing.assert_allclose(coarse.draw([3], 2, 2), sums, rtol=0, atol=1e-16)


def test_ring_injects_what_it_says():
    grid = Grid(64, length=2.0)
    noise = NoiseModel(RingNoise(wavenumber=8, width=1, energy_rate=0.3), grid, 1e-2, 0)
    rate = (grid.weights * grid.inverse_k2 * noise.std_hat**2).sum() * 1e-2 / 2
    assert abs(rate - 0.3) < 1e-13
    assert noise.std_hat[0, 0] == 0
    lengths = grid.integer_k2[noise.std_hat > 0].double().sqrt()
    assert lengths.min() >= 7 and lengths.max() <= 9


def test_noise_on_a_line_fills_its_modes():
    """Drawn modes lie where they belong, in the spectrum and in what a step adds."""

    class Line(Noise):
        dimensions = (1,)
        kind: str = "on_a_line_for_a_test"

        def law(self, grid):
            return np.array([[0, 2], [0, 5]]), np.array([4.0, 9.0])

    grid = Grid(24, dimensions=1)
    noise = NoiseModel(Line(), grid, 1.0, 0)
    expected = torch.tensor([0.0, 0, 2, 0, 0, 3, 0, 0], dtype=torch.float64)
    assert torch.equal(noise.std_hat, expected)
    like = torch.zeros(3, *grid.shape, 2, dtype=torch.float64)
    rates = Rates(noise, [0, 4, 7], like)
    added = torch.ones_like(like)
    (rate,) = rates.steps(slice(0, 3), 5, 1)
    rates.add(like + 1, rate, added, slice(0, grid.modes + 1))
    drawn = torch.view_as_real(noise.spread(noise.draw([0, 4, 7], 5, 1)[0]))
    assert torch.equal(added, drawn + 1) and drawn[:, [2, 5]].abs().min() > 0
    Noise.kinds.pop("on_a_line_for_a_test")


def test_ornstein_uhlenbeck_is_stationary_and_correlated():
    grid = Grid(16)
    law = OrnsteinUhlenbeck(wavenumber=3, width=1, rms=2.0, correlation_time=0.5)
    noise = NoiseModel(law, grid, 0.1, 0)
    members = range(200)
    y = noise.stationary(members)
    first = y.copy()
    decay, kick = noise.relaxation(0.1)
    for z in noise.draw(members, 0, 5):
        y = y * decay + z * kick
    power = (grid.weights * noise.spread(y).abs() ** 2).sum((-2, -1)).mean()
    assert abs(power / 4 - 1) < 0.05
    correlation = (y * first.conj()).real.sum() / (abs(first) ** 2).sum()
    assert abs(correlation - np.exp(-1)) < 0.03


def test_bad_noise_is_refused():
    with pytest.raises(ValueError, match="kind"):
        Noise.model_validate({"kind": "pink"})
    with pytest.raises(ValueError, match="1 dimensions"):
        NoiseModel(RingNoise(), Grid(16, dimensions=1), 1e-3, 0)
    with pytest.raises(ValueError, match="power of two"):
        published(path_dt=2.5e-3)
