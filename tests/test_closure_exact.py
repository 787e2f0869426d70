"""Exact laws, those that need a generative model too, and the baselines without a network."""

import math

import pytest
import torch
from closure_case import law_of, states_of

from hpc_closure.closure.fields.sensors import Sensors, fourier_interpolation, regular_positions
from hpc_closure.closure.gaussian.exact import ExactLaw
from hpc_closure.spectral.problem import Problem


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


# Noise that follows the state, against dense Gaussian conditioning on a 12^2 grid

WIENER = {"amplitude": 5e-4, "draws": 10, "correlation": 0.01}
AMPLITUDE = {"kind": "state_amplitude", "strength": 1.5, **WIENER}
REGIMES = {"kind": "two_regimes", "hold": 1e-3, **WIENER}
LAYOUTS = pytest.mark.parametrize("noise_std", [0.0, 0.03], ids=["exact", "noisy"])


def small(noise, interval=1, size=12, kind="diffusion"):
    return ExactLaw(Problem(grid=size, noise=noise, viscosity=1e-2), kind, interval)


def noise_variance(interval=1):
    """Of the mean of beta xi over an interval, on a grid that retains all of it."""
    k = torch.arange(-20, 21, dtype=torch.float64)
    total = torch.exp(-0.01 * (2 * math.pi * k) ** 2).sum() ** 2
    return float(WIENER["amplitude"] ** 2 * WIENER["draws"] / 1e-3 * total / interval)


class Dense:
    """Covariances on the points of a small grid, by whole FFTs and sums of its own."""

    def __init__(self, law):
        n = self.n = law.grid.size
        K, x = (n - 1) // 3, torch.arange(n, dtype=torch.float64) / n
        k = torch.arange(-K, K + 1, dtype=torch.float64)
        along = torch.exp(2j * math.pi * torch.outer(x, k))
        phase = (along[:, None, :, None] * along[None, :, None, :]).reshape(n * n, -1)
        spectrum = torch.exp(-0.01 * (2 * math.pi) ** 2 * (k[:, None] ** 2 + k**2)).flatten()
        scale = WIENER["amplitude"] ** 2 * WIENER["draws"] / 1e-3
        self.covariance = scale * ((phase * spectrum) @ phase.conj().T).real
        self.cut = (phase @ phase.conj().T).real / n**2  # the projection P

    def at(self, positions):
        """Rows of the grid's points among which the sensors stand."""
        cells = torch.round(positions * self.n).long()
        return cells[:, 0] * self.n + cells[:, 1]

    def given(self, mean, covariance, sensors):
        """Conditional mean, covariance and the log density of the readings."""
        rows = self.at(sensors.positions)
        off = sensors.values[0].double() - mean[rows]
        error = (sensors.noise_std**2 + 1e-12 * float(self.covariance[0, 0])) * torch.eye(
            len(rows), dtype=torch.float64
        )
        inner = covariance[rows][:, rows] + error
        gain = torch.linalg.solve(inner, covariance[rows]).T
        density = torch.distributions.MultivariateNormal(torch.zeros(len(rows)).double(), inner)
        left = covariance - gain @ covariance[rows]
        return mean + gain @ off, left, density.log_prob(off)


def readings_of(law, state, noise_std):
    """Nine sensors that stand nowhere in particular, reading a truth."""
    points = torch.tensor(
        [[0, 1], [2, 7], [3, 3], [5, 10], [6, 0], [8, 5], [9, 9], [11, 2], [4, 6]]
    )
    truth = law.draw(state, [5], 3, 0)[0]
    values = truth[points[:, 0], points[:, 1]] + noise_std
    return Sensors(values[None], points.double() / law.grid.size, noise_std)


def amplitude_of(law, state):
    return (1 + 1.5 * state.abs() / state.square().mean().sqrt()).flatten()


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("kind", ["diffusion", "convection"])
def test_amplitude_law_is_dense_d_q_d(kind, interval):
    law, state = small(AMPLITUDE, interval, kind=kind), states_of(1, size=12)
    dense = Dense(law)
    shape = dense.cut * amplitude_of(law, state[0])
    covariance = shape @ dense.covariance @ shape.T / interval
    at = law.variance_at(state)[0].flatten()
    torch.testing.assert_close(at, covariance.diagonal(), rtol=1e-10, atol=0)
    assert float(at.max() / at.min()) > 2
    samples = law.sample(state, members=range(2000), seed=0)[:, 0].flatten(1)
    off = samples - law.mean(state)[0].flatten()
    bars = 6 * float(at.max()) * math.sqrt(2 / 2000)
    assert float((off.T @ off / 2000 - covariance).abs().max()) < bars
    plain = ExactLaw(law.problem.replace(noise={"kind": "q_wiener", **WIENER}), kind, interval)
    assert torch.equal(law.mean(state), plain.mean(state))


@LAYOUTS
def test_amplitude_given_sensors_is_dense_conditioning(noise_std):
    law, state = small(AMPLITUDE), states_of(1, size=12)
    dense, sensors = Dense(law), readings_of(law, state, noise_std)
    shape = dense.cut * amplitude_of(law, state[0])
    covariance = shape @ dense.covariance @ shape.T
    mean, left, _ = dense.given(ExactLaw.mean(law, state)[0].flatten(), covariance, sensors)
    scale = float(covariance.diagonal().max())
    found = law.mean(state, sensors)[0].flatten()
    assert float((found - mean).abs().max()) < 1e-6 * math.sqrt(scale)
    drawn = law.sample(state, members=range(2000), seed=1, sensors=sensors)[:, 0].flatten(1)
    off = drawn - mean
    assert float((off.T @ off / 2000 - left).abs().max()) < 6 * float(
        left.diagonal().max()
    ) * math.sqrt(2 / 2000)
    assert float(left.diagonal().mean()) < 0.7 * float(covariance.diagonal().mean())


def test_regimes_without_sensors_are_the_mixture():
    law, states = small({**REGIMES, "hold": 4e-3}, 4), states_of(12, size=12)
    plain = ExactLaw(law.problem.replace(noise={"kind": "q_wiener", **WIENER}), "diffusion", 4)
    y = torch.arange(12, dtype=torch.float64) / 12
    rms = states.square().mean((-2, -1)).sqrt()
    s = (states * (math.sqrt(2) * torch.sin(2 * math.pi * y))).mean((-2, -1)) / rms
    p = 1 / (1 + torch.exp(-s / 0.25))
    assert float(p.min()) < 0.3 and float(p.max()) > 0.7
    wave = math.sqrt(2 * noise_variance(4)) * torch.cos(2 * math.pi * y)[:, None].expand(12, 12)
    tilt = law.mean(states) - plain.mean(states)
    torch.testing.assert_close(tilt, (2 * p - 1)[:, None, None] * wave, rtol=1e-9, atol=1e-12)
    samples = law.sample(states[:1], members=range(3000), seed=0)[:, 0] - plain.mean(states[:1])
    share = (samples * wave).mean((-2, -1)) / wave.square().mean()
    first = share > 0
    assert float(first.double().mean()) == pytest.approx(float(p[0]), abs=0.05)
    assert float((share.abs() < 0.3).double().mean()) < 0.1  # bimodal
    for chosen, sign, size in ((first, 1, 0.6), (~first, -1, 1.0)):
        spread = float((samples[chosen] - sign * wave).square().mean())
        assert spread == pytest.approx(size**2 * plain.variance, rel=0.06)
    at, measured = law.variance_at(states[:1])[0], samples.var(0)
    assert float((measured / at - 1).abs().max()) < 6 * math.sqrt(2 / 3000)


@LAYOUTS
def test_regimes_given_sensors_are_bayes_rule_and_dense_conditioning(noise_std):
    # an odd layout and a small pattern, so that the sensors leave doubt
    law = small({**REGIMES, "pattern": 0.2, "amplitudes": (0.9, 1.0)})
    state = states_of(2, size=12)[1:]
    dense, sensors = Dense(law), readings_of(law, state, noise_std)
    plain = ExactLaw(law.problem.replace(noise={"kind": "q_wiener", **WIENER}), "diffusion")
    base, y = plain.mean(state)[0].flatten(), torch.arange(12, dtype=torch.float64) / 12
    wave = 0.2 * math.sqrt(2 * noise_variance()) * torch.cos(2 * math.pi * y)
    wave = wave[:, None].expand(12, 12).flatten()
    one = dense.given(base + wave, 0.9**2 * dense.covariance, sensors)
    two = dense.given(base - wave, dense.covariance, sensors)
    prior = float(law.fluctuation.probability(law.spectra(state))[0])
    first = prior * math.exp(float(one[2] - two[2]))
    first = first / (first + 1 - prior)
    assert abs(first - prior) > 0.05 and 0.02 < first < 0.98
    mean = first * one[0] + (1 - first) * two[0]
    scale = math.sqrt(plain.variance)
    assert float((law.mean(state, sensors)[0].flatten() - mean).abs().max()) < 1e-5 * scale
    drawn = law.sample(state, members=range(3000), seed=1, sensors=sensors)[:, 0].flatten(1)
    between = (one[0] - two[0]).square() * first * (1 - first)
    variance = first * one[1].diagonal() + (1 - first) * two[1].diagonal() + between
    assert float((drawn.mean(0) - mean).abs().max()) < 5 * float(variance.max() / 3000) ** 0.5
    there = variance > 0.01 * variance.max()
    assert float((drawn.var(0) / variance - 1)[there].abs().max()) < 6 * math.sqrt(2 / 3000)


@pytest.mark.parametrize("noise", [AMPLITUDE, REGIMES], ids=["amplitude", "regimes"])
@pytest.mark.parametrize("seen", [False, True])
def test_a_draw_is_the_same_in_any_batch_and_by_any_way(noise, seen):
    law, states = small(noise), states_of(3, size=12)
    sensors = None
    if seen:
        one = readings_of(law, states[:1], 0.02)
        sensors = Sensors(one.values.expand(3, -1), one.positions, one.noise_std)
    whole = law.draw(states, [4, 5, 6], 2, 7, sensors)
    alone = law.draw(states[1:2], [5], 2, 7, sensors and sensors.rows(slice(1, 2)))
    torch.testing.assert_close(alone[0], whole[1], rtol=0, atol=1e-10)
    spectra = law.draw_hat(law.spectra(states), [4, 5, 6], 2, 7, sensors)
    torch.testing.assert_close(law.transform.to_physical(spectra), whole, rtol=0, atol=1e-12)


def test_a_law_is_known_by_the_kind_of_noise():
    problem = Problem(grid=12, noise=REGIMES)
    assert ExactLaw.of(problem, "diffusion") is not None
    for other, kind, interval in (
        (problem.replace(noise={"kind": "none"}), "diffusion", 1),
        (problem.replace(noise={"kind": "ornstein_uhlenbeck", "wavenumber": 2}), "diffusion", 1),
        (problem, "subgrid", 1),
        (problem, "diffusion", 2),
    ):
        assert ExactLaw.of(other, kind, interval) is None
        with pytest.raises(ValueError, match="no exact law is known"):
            ExactLaw(other, kind, interval)


def test_a_bad_parameter_is_no_missing_law():
    """What goes wrong inside must come out, not read as "no law known"."""
    broken = Problem(grid=12, noise={"kind": "q_wiener", **WIENER}).model_copy(
        update={"path_dt": 3e-3}
    )
    with pytest.raises(ValueError, match="power of two"):
        ExactLaw.of(broken, "diffusion")
