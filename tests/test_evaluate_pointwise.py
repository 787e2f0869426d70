"""Scores against closed forms, an independent package, and laws where the answer is known."""

import math

import numpy as np
import pytest
import scoringrules
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hpc_closure.closure.fields.losses import crps, energy_score
from hpc_closure.evaluate.scores import intervals, pointwise, rank_histogram, spectra
from hpc_closure.evaluate.scores.forecast import Forecast, Truth, shell_statistics


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_crps(mean, std, y):
    """Closed form of E|X - y| - E|X - X'| / 2 for X ~ N(mean, std^2)."""
    z = (y - mean) / std
    return std * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / math.sqrt(math.pi))


def stationary(count, size, seed, length=0.1):
    """Gaussian random fields (count, size, size) with unit variance and a smooth spectrum."""
    shells = spectra.shell_numbers((size, size)).double()
    amplitude = (-((math.pi * length * shells) ** 2) / 2).exp()
    white = torch.fft.rfft2(normal(count, size, size, seed=seed), norm="ortho")
    weight = spectra.per_shell(amplitude**2, (size, size)).sum().sqrt()
    return torch.fft.irfft2(white * amplitude * size / weight, s=(size, size), norm="ortho")


# ---- deterministic scores -------------------------------------------------------------------


def test_relative_error_is_the_mean_over_snapshots_of_frobenius_ratios():
    truth = normal(5, 8, 8)
    field = normal(5, 8, 8, seed=1)
    expected = [
        torch.linalg.norm(field[i] - truth[i]) / torch.linalg.norm(truth[i]) for i in range(5)
    ]
    assert torch.allclose(pointwise.relative_error(field[None], truth), torch.stack(expected))
    both = pointwise.relative_error(torch.stack((field, truth)), truth)
    assert torch.allclose(both, torch.stack(expected) / 2)


def test_shape_mismatch_is_named():
    with pytest.raises(ValueError, match=r"\(3, 4\) is not \(members,\) \+ truth \(5,\)"):
        pointwise.mse(torch.zeros(3, 4), torch.zeros(5))


@pytest.mark.parametrize("members", [2, 5, 20])
def test_mse_of_a_perfect_ensemble(members):
    """Member error 2 s^2, mean error (1 + 1/M) s^2, variance s^2, squared bias 0."""
    s, samples = 0.7, 200_000
    ensemble, truth = s * normal(members, samples), s * normal(samples, seed=9)
    assert pointwise.mse(ensemble, truth).mean() == pytest.approx(2 * s**2, rel=0.01)
    mean_error = pointwise.mean_mse(ensemble, truth).mean()
    assert mean_error == pytest.approx((1 + 1 / members) * s**2, rel=0.01)
    assert pointwise.variance(ensemble).mean() == pytest.approx(s**2, rel=0.01)
    floor = truth**2  # the exact mean is zero
    assert pointwise.bias2(ensemble, truth, floor).mean() == pytest.approx(0, abs=0.006)
    assert pointwise.bias2(ensemble, truth).mean() == pytest.approx(s**2, rel=0.02)


def test_bias2_finds_a_known_bias_whatever_the_ensemble_size():
    samples = 200_000
    truth = normal(samples)
    for members in (2, 8):
        ensemble = normal(members, samples, seed=members) + 0.3
        value = pointwise.bias2(ensemble, truth, truth**2).mean()
        assert value == pytest.approx(0.09, abs=0.008)


# ---- CRPS and energy score --------------------------------------------------------------------


@pytest.mark.parametrize("members", [2, 3, 16, 64])
def test_crps_agrees_with_scoringrules(members):
    ensemble, truth = normal(members, 40), normal(40, seed=1)
    ours = crps(ensemble, truth)
    oracle = scoringrules.crps_ensemble(truth.numpy(), ensemble.numpy().T, estimator="fair")
    assert torch.allclose(ours, torch.as_tensor(oracle), rtol=1e-12, atol=1e-14)
    biased = scoringrules.crps_ensemble(truth.numpy(), ensemble.numpy().T, estimator="nrg")
    ours = crps(ensemble, truth, alpha=0.0)
    assert torch.allclose(ours, torch.as_tensor(biased), rtol=1e-12, atol=1e-14)


@given(alpha=st.floats(0, 1), members=st.integers(2, 9))
def test_almost_fair_crps_interpolates(alpha, members):
    ensemble, truth = normal(members, 3, 4), normal(3, 4, seed=1)
    fair, empirical = crps(ensemble, truth), crps(ensemble, truth, alpha=0)
    between = crps(ensemble, truth, alpha=alpha)
    assert torch.allclose(between, alpha * fair + (1 - alpha) * empirical, atol=1e-13)


def test_fair_crps_expectation_is_the_closed_form_for_every_size():
    mean, std, samples = 0.4, 1.3, 200_000
    truth = normal(samples)
    expected = gaussian_crps(mean, std, truth.numpy()).mean()
    for members in (2, 4, 16):
        ensemble = mean + std * normal(members, samples, seed=members)
        assert crps(ensemble, truth).mean() == pytest.approx(expected, rel=0.01)
    small = crps(ensemble[:2], truth, alpha=0).mean()
    assert small > 1.2 * expected  # the empirical score does depend on the size


def test_crps_of_a_point_forecast_is_the_absolute_error():
    field, truth = normal(1, 6, 4), normal(6, 4, seed=1)
    assert torch.allclose(crps(field, truth), (field[0] - truth).abs().mean(1))


def test_crps_keeps_digits_under_a_large_offset_and_has_finite_gradients():
    ensemble = (1e6 + 1e-3 * normal(8, 10)).requires_grad_()
    truth = 1e6 + 1e-3 * normal(10, seed=1)
    value = crps(ensemble, truth)
    small = crps((ensemble - 1e6) * 1e3, (truth - 1e6) * 1e3)
    assert torch.allclose(value, 1e-3 * small, rtol=1e-5)
    value.sum().backward()
    assert ensemble.grad.isfinite().all() and ensemble.grad.abs().max() > 0


def test_energy_score_agrees_with_scoringrules():
    ensemble, truth = normal(7, 12, 3, 3), normal(12, 3, 3, seed=1)
    oracle = scoringrules.es_ensemble(
        truth.flatten(1).numpy(), ensemble.flatten(2).transpose(0, 1).numpy(), estimator="fair"
    )
    ours = energy_score(ensemble, truth) * 3  # root mean square instead of root sum
    assert torch.allclose(ours, torch.as_tensor(oracle), rtol=1e-10)


def test_energy_score_of_numbers_is_the_crps():
    ensemble, truth = normal(6, 30), normal(30, seed=1)
    assert torch.allclose(energy_score(ensemble, truth), crps(ensemble, truth), atol=1e-12)


def test_energy_score_sees_a_joint_law_that_the_crps_cannot():
    samples, members = 4000, 16
    shared = normal(samples, 1).expand(-1, 8)  # eight equal points
    joint = normal(members, samples, 1, seed=1).expand(-1, -1, 8)
    single = normal(members, samples, 8, seed=2)
    both = [float(crps(x, shared).mean()) for x in (joint, single)]
    assert both[1] == pytest.approx(both[0], rel=0.03)
    energy = [float(energy_score(x, shared).mean()) for x in (joint, single)]
    assert energy[1] > 1.1 * energy[0]


# ---- calibration ------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [2, 5, 40])
def test_spread_skill_is_one_for_a_calibrated_ensemble_of_any_size(members):
    """The spread varies from sample to sample: only aggregation before the ratio gives 1."""
    std = torch.linspace(0.1, 3, 100_000, dtype=torch.float64)
    ensemble, truth = std * normal(members, len(std)), std * normal(len(std), seed=1)
    variance, error = (
        pointwise.variance(ensemble).mean(),
        pointwise.mean_mse(ensemble, truth).mean(),
    )
    assert pointwise.spread_skill(variance, error, members) == pytest.approx(1, abs=0.01)
    narrow = pointwise.variance(0.5 * ensemble).mean()
    assert pointwise.spread_ratio(narrow, variance) == pytest.approx(0.5)
    assert pointwise.spread(variance) == pytest.approx(float(std.square().mean().sqrt()), rel=0.02)


@pytest.mark.parametrize("members, level", [(19, 0.9), (20, 0.9), (7, 0.5), (64, 0.95), (4, 0.2)])
def test_coverage_of_a_calibrated_ensemble_is_its_level(members, level):
    samples = 200_000
    ensemble, truth = normal(members, samples), normal(samples, seed=1)
    covered = pointwise.coverage(ensemble, truth, level).mean()
    assert covered == pytest.approx(level, abs=0.005)
    assert pointwise.coverage(0.9 * ensemble, truth, level).mean() < level - 0.01


@pytest.mark.parametrize("members, level", [(10, 0.9), (4, 0.1)])
def test_coverage_out_of_reach_is_refused(members, level):
    with pytest.raises(ValueError, match=f"{members} members"):
        pointwise.coverage(normal(members, 3), normal(3), level)


def test_ranks_break_ties_at_random():
    generator = torch.Generator().manual_seed(3)
    same = rank_histogram.ranks(torch.zeros(9, 20_000), torch.zeros(20_000), generator)
    assert rank_histogram.rank_p(rank_histogram.rank_counts(same, 9)) > 0.001
    assert set(same.unique().tolist()) == set(range(10))
    sorted_ = rank_histogram.ranks(torch.arange(4.0)[:, None], torch.tensor([-1.0]), generator)
    assert sorted_.tolist() == [0]


def test_rank_p_is_scipys_chi_squared_and_refuses_few_ranks():
    counts = torch.randint(50, 90, (10,), generator=torch.Generator().manual_seed(0))
    assert rank_histogram.rank_p(counts) == pytest.approx(
        stats.chisquare(counts.numpy()).pvalue, rel=1e-9
    )
    assert math.isnan(rank_histogram.rank_p(torch.tensor([1, 2, 1, 0])))
    merged, widths = rank_histogram.merge(torch.ones(65), 13)
    assert merged.tolist() == widths.tolist() == [5] * 13


def test_rank_p_is_uniform_under_the_law():
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, 17, (400, 2000), generator=generator)
    values = [rank_histogram.rank_p(rank_histogram.rank_counts(row, 16)) for row in drawn]
    assert stats.kstest(values, "uniform").pvalue > 0.01


@pytest.mark.parametrize("number, members", [(1000, 16), (150, 20), (60, 20)])
def test_the_spread_error_that_a_rank_test_sees_is_seen_in_four_of_five(number, members):
    generator = torch.Generator().manual_seed(1)
    error = rank_histogram.detectable_error(number, members)
    refused = 0
    for _ in range(400):
        ensemble = (1 - error) * torch.randn(members, number, generator=generator)
        drawn = rank_histogram.ranks(ensemble, torch.randn(number, generator=generator), generator)
        counts = rank_histogram.rank_counts(drawn, members)
        refused += rank_histogram.rank_p(counts) < rank_histogram.LEVEL
    assert refused / 400 == pytest.approx(rank_histogram.POWER, abs=0.06)


def test_more_ranks_see_more_and_too_few_see_nothing():
    seen = [rank_histogram.detectable_error(number, 16) for number in (60, 300, 2000, 20_000)]
    assert seen == sorted(seen, reverse=True) and seen[-1] < 0.05
    assert math.isnan(rank_histogram.detectable_error(8, 16))


def test_calibration_test_can_fail():
    """Ranks of whitened modes: the oracle passes, the oracle with 95 % of its spread fails."""
    members, samples, size = 32, 260, 16
    passed = failed = pooled = 0
    for seed in range(10):
        truth = stationary(samples, size, seed=seed)
        ensemble = stationary(members * samples, size, seed=100 + seed)
        ensemble = ensemble.unflatten(0, (members, samples))
        x, y = (rank_histogram.fourier_coordinates(fields, 5) for fields in (ensemble, truth))

        def p_value(x, y):
            drawn = rank_histogram.ranks(x, y, torch.Generator().manual_seed(0))
            return rank_histogram.rank_p(rank_histogram.rank_counts(drawn, members))

        passed += p_value(x, y) > 0.01
        failed += p_value(0.95 * x, y) < 0.001
        # pooled pixels are correlated: the same test rejects the right law
        pooled += p_value(ensemble, truth) < 0.01
    assert x[0].numel() > rank_histogram.MAX_RANKS and passed >= 9 and failed == 10
    assert pooled >= 5


def test_fourier_coordinates_are_independent_and_complete():
    coordinates = rank_histogram.fourier_coordinates(stationary(40_000, 8, seed=1), 3)
    inside = (torch.cartesian_prod(*[torch.fft.fftfreq(8) * 8] * 2).norm(dim=1).round() <= 3).sum()
    assert coordinates.shape[1] == inside  # as many real numbers as wavevectors
    correlation = torch.corrcoef(coordinates.T) - torch.eye(int(inside), dtype=torch.float64)
    assert correlation.abs().max() < 0.03
    with pytest.raises(ValueError, match="max_shell 4"):
        rank_histogram.fourier_coordinates(torch.zeros(8, 8), 4)


# ---- spectra ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 9, 64])
def test_shell_power_of_one_wave_and_parseval(size):
    x = torch.arange(size, dtype=torch.float64) / size
    wave = torch.cos(2 * math.pi * (2 * x[:, None] + 2 * x))  # |k| = 2.83
    power = spectra.shell_power(wave)
    assert power[3] == pytest.approx(0.5) and power.sum() == pytest.approx(0.5)
    noise = normal(3, size, size)
    assert torch.allclose(spectra.shell_power(noise).sum(-1), noise.square().mean((1, 2)))


@pytest.mark.parametrize("members", [1, 6])
def test_shell_statistics_sum_to_the_grid_statistics(members):
    ensemble, truth = normal(members, 5, 12, 12), normal(5, 12, 12, seed=1)
    parts = shell_statistics(Forecast(ensemble, Truth(truth)))
    assert torch.allclose(parts["variance"].sum(-1), pointwise.variance(ensemble))
    assert torch.allclose(parts["mean_mse"].sum(-1), pointwise.mean_mse(ensemble, truth))
    assert torch.allclose(parts["energy"].sum(-1), ensemble.square().mean((0, 2, 3)))
    single = spectra.shell_power(ensemble).mean(0)
    assert torch.allclose(parts["energy"], single)


@pytest.mark.parametrize(
    "points, lengths",
    [((12,), ()), ((8, 8), ()), ((12, 8), (1.5, 1.0)), ((6, 9, 8), ()), ((6, 4, 8), (1, 0.5, 2))],
)
def test_shells_of_any_sides_are_those_of_a_sum_over_modes(points, lengths):
    """The power of each shell is that of all its modes in the full transform."""
    field = normal(2, *points)
    full = torch.fft.fftn(field, dim=tuple(range(1, field.ndim)), norm="forward").abs().square()
    sides = lengths or (1.0,) * len(points)
    waves = [torch.fft.fftfreq(n, d=1 / n) * (max(sides) / one) for n, one in zip(points, sides)]
    k = sum(one**2 for one in torch.meshgrid(*waves, indexing="ij")).sqrt()
    power = spectra.shell_power(field, len(points), lengths)
    expected = [full[:, (k + 0.5 + 1e-6).floor() == s].sum(1) for s in range(power.shape[1])]
    assert torch.allclose(power, torch.stack(expected, 1), atol=1e-12)
    assert torch.allclose(power.sum(1), field.square().flatten(1).mean(1))


def test_spread_per_shell_sees_what_the_total_hides():
    """Halving the spread of shells that hold little variance hardly shows in total."""
    fields = stationary(20 * 50, 32, seed=2, length=0.2).unflatten(0, (20, 50))
    damped = torch.fft.rfft2(fields)
    damped = damped * torch.where(spectra.shell_numbers((32, 32)) >= 4, 0.5, 1.0)
    damped = torch.fft.irfft2(damped, s=(32, 32))
    truth = torch.zeros(50, 32, 32, dtype=torch.float64)
    full = shell_statistics(Forecast(fields, Truth(truth)))["variance"].mean(0)
    half = shell_statistics(Forecast(damped, Truth(truth)))["variance"].mean(0)
    ratio = pointwise.spread_ratio(half, full)
    assert ratio[3] == pytest.approx(1) and ratio[5] == pytest.approx(0.5)
    assert pointwise.spread_ratio(half.sum(), full.sum()) > 0.95


# ---- time, distributions, intervals -------------------------------------------------------------


def test_valid_time_interpolates_and_is_censored():
    times = torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    error = torch.tensor(
        [[0.1, 0.3, 0.4, 0.8], [0.0, 0.1, 0.1, 0.2], [0.9, 1, 1, 1], [0, 0.2, math.inf, math.nan]],
        dtype=torch.float64,
    )
    expected = torch.tensor([2.5, 4.0, 0.0, 1.0], dtype=torch.float64)
    assert torch.allclose(pointwise.valid_time(error, times, 0.5), expected)


@pytest.mark.parametrize("number", [170, 300])
def test_wasserstein_agrees_with_scipy(number):
    first, second = normal(300), 1.5 * normal(number, seed=1) + 0.2
    expected = stats.wasserstein_distance(first.numpy(), second.numpy())
    assert pointwise.wasserstein1(first, second) == pytest.approx(expected, rel=1e-12)
    assert pointwise.wasserstein1(first, first + 2) == pytest.approx(2)


COVERED = {"ratio": lambda s: s["a"] / s["b"], "root": lambda s: (s["a"] / s["b"]).sqrt()}


@pytest.mark.parametrize("form", COVERED)
@pytest.mark.parametrize("number", [5, 8])
def test_intervals_cover_as_often_as_they_say(number, form):
    """Skewed blocks of three samples each: 95 % of 2,000 intervals hold the truth, which is 1."""
    assert 0.93 <= coverage(number, COVERED[form], 2000) <= 0.97


def test_percentiles_of_a_bootstrap_do_not_cover():
    """Why there is no bootstrap here, and that the test above could fail."""
    assert 0.75 < coverage(5, COVERED["ratio"], 300, percentiles) < 0.87


def coverage(number, formula, repeats, interval=intervals.block_interval):
    """How often an interval from ``number`` blocks holds 1, the ratio of the true means."""
    rng = np.random.default_rng(number)
    blocks = torch.arange(number).repeat_interleave(3)
    inside = 0
    for _ in range(repeats):
        scale = np.exp(0.3 * rng.standard_normal((number, 1)))  # of a trajectory, in both
        values = {
            name: torch.from_numpy((scale * rng.gamma(4, 1 / 4, (number, 1))).repeat(3, 1).ravel())
            for name in "ab"
        }
        _, low, high = interval(values, blocks, formula)
        inside += bool(low <= 1 <= high)
    return inside / repeats


def percentiles(values, blocks, formula):
    """Percentile interval of a bootstrap over whole blocks."""
    data = [part.view(-1, 3)[:, 0].numpy() for part in values.values()]

    def statistic(a, b, axis):
        return formula({"a": torch.tensor(a.mean(axis)), "b": torch.tensor(b.mean(axis))}).numpy()

    found = stats.bootstrap(
        data, statistic, paired=True, method="percentile", n_resamples=500, random_state=0
    )
    return None, *found.confidence_interval


def test_intervals_of_a_mean_are_students():
    """Of a mean that changes sign: the textbook's; blocks of equal samples count as one sample."""
    values = normal(6) - normal(6).mean()
    expected = stats.t.interval(0.95, 5, loc=0, scale=stats.sem(values.numpy()))
    repeated = values.repeat_interleave(4)
    blocks = torch.arange(6).repeat_interleave(4)
    value, low, high = intervals.block_interval({"v": repeated}, blocks, lambda means: means["v"])
    assert value == pytest.approx(0, abs=1e-12)
    assert (float(low), float(high)) == pytest.approx(expected, rel=1e-9)
    alone = intervals.block_interval({"v": repeated}, torch.arange(24), lambda means: means["v"])
    assert alone[2] < 0.6 * high


def test_intervals_aggregate_before_the_ratio_and_need_four_blocks():
    values = {"a": normal(50).square(), "b": normal(50, seed=1).square() + 1}
    args = (values, torch.arange(50), lambda means: means["a"] / means["b"])
    value, low, high = intervals.block_interval(*args)
    assert value == pytest.approx(float(values["a"].mean() / values["b"].mean()))
    assert 0 < low < value < high
    assert intervals.block_interval(*args)[1] == low
    _, low, _ = intervals.block_interval(values, torch.arange(50) % 3, args[2])
    assert math.isnan(low)
    same = intervals.block_interval({"a": values["b"], "b": values["b"]}, args[1], args[2])
    assert [float(edge) for edge in same] == [1, 1, 1]


def test_intervals_are_taken_for_each_shell():
    values = {"v": normal(40, 3).exp()}
    value, low, high = intervals.block_interval(
        values, torch.arange(40) % 8, lambda means: means["v"]
    )
    assert value.shape == low.shape == (3,) and bool((low < value).all() & (value < high).all())
    single = intervals.block_interval(
        {"v": values["v"][:, 1]}, torch.arange(40) % 8, lambda means: means["v"]
    )
    assert [float(edge) for edge in single] == pytest.approx(
        [float(value[1]), float(low[1]), float(high[1])]
    )
