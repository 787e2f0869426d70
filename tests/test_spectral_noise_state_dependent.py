"""Forcings that follow the state: their conditional laws, and bits that nothing moves."""

import hashlib
import math

import numpy as np
import pytest
import torch

from hpc_closure.experiment.schema import Experiment
from hpc_closure.spectral import simulation
from hpc_closure.spectral.diagnostics import Diagnostics
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

WIENER = {"amplitude": 5e-4, "draws": 10, "correlation": 0.01}
AMPLITUDE = {"kind": "state_amplitude", "strength": 2.0, **WIENER}
REGIMES = {"kind": "two_regimes", "hold": 5e-3, "pattern": 1.5, "scale": 0.2, **WIENER}
KINDS = pytest.mark.parametrize("noise", [AMPLITUDE, REGIMES], ids=["amplitude", "regimes"])


def problem_of(noise, **more):
    return Problem(**{"grid": 16, "noise": noise, "forcing": {"kind": "published"}, **more})


def digest(state):
    return hashlib.sha256(state.contiguous().numpy().tobytes()).hexdigest()


def from_one_state(problem, members, seed=5, step=0):
    """Many members in the state of member 0."""
    one = Simulation(problem, [0], seed).initialise().state
    everyone = Simulation(problem, range(members), seed)
    return everyone.load_state(step, one.expand(members, -1, -1))


def physical(sim, spectra):
    return sim.transform.to_physical(spectra)


# The conditional law of a step, by dense matrices of its own


def dense_projection(n):
    """(n^2, n^2) cut to the modes |k| <= K, by whole FFTs."""
    K = (n - 1) // 3
    k = np.abs(np.fft.fftfreq(n, 1 / n))
    keep = (k[:, None] <= K) & (k[None, :] <= K)
    fields = np.eye(n * n).reshape(-1, n, n)
    return np.fft.ifft2(np.fft.fft2(fields) * keep).real.reshape(n * n, n * n).T


def dense_noise_covariance(n, dt):
    """Of beta xi, from its covariance function, a sum over all wavevectors that a grid retains."""
    K = (n - 1) // 3
    k = np.arange(-K, K + 1)
    x = np.arange(n) / n
    phase = np.exp(2j * np.pi * np.outer(x, k))
    spectrum = np.exp(-WIENER["correlation"] * (2 * np.pi) ** 2 * np.add.outer(k**2, k**2))
    along = (phase[:, None, :, None] * phase[None, :, None, :]).reshape(n * n, -1)
    scale = WIENER["amplitude"] ** 2 * WIENER["draws"] / dt
    return scale * ((along * spectrum.ravel()) @ along.conj().T).real


def test_amplitude_has_the_covariance_d_q_d():
    members, problem = 6000, problem_of(AMPLITUDE)
    sim = from_one_state(problem, members)
    w = sim.fields(["vorticity"])["vorticity"][0].numpy()
    factor = 1 + 2.0 * np.abs(w) / np.sqrt((w**2).mean())
    shape = dense_projection(16) * factor.ravel()
    expected = shape @ dense_noise_covariance(16, problem.dt) @ shape.T
    drawn = physical(sim, sim.noise_hat()).flatten(1).numpy()
    std = np.sqrt(np.diag(expected))
    assert std.max() > 2 * std.min()
    assert np.abs(drawn.mean(0) / std).max() < 5 / members**0.5
    # an entry of a sample covariance has variance (C_ij^2 + C_ii C_jj) / N
    error = drawn.T @ drawn / members - expected
    bars = np.sqrt((expected**2 + np.outer(std**2, std**2)) / members)
    assert np.abs(error / bars).max() < 6


def test_two_regimes_are_the_mixture():
    """Frequencies, and in each regime its mean and covariance, from one state."""
    members, problem = 4000, problem_of(REGIMES)
    sim = from_one_state(problem, members)
    w = sim.fields(["vorticity"])["vorticity"][0].numpy()
    y = np.arange(16) / 16
    s = (w * math.sqrt(2) * np.sin(2 * np.pi * y)[None, :]).mean() / np.sqrt((w**2).mean())
    p = 1 / (1 + math.exp(-s / REGIMES["scale"]))
    assert 0.05 < p < 0.95
    drawn = physical(sim, sim.noise_hat()).flatten(1).numpy()
    first = sim.rates.response.state > 0
    assert abs(first.mean() - p) < 4 * math.sqrt(p * (1 - p) / members)
    covariance = dense_noise_covariance(16, problem.dt)
    held = math.sqrt(covariance[0, 0] / 5)  # of the mean over the 5 steps of an interval
    wave = math.sqrt(2) * np.cos(2 * np.pi * np.arange(16) / 16)
    pattern = (1.5 * held * wave)[:, None].repeat(16, 1).ravel()
    for chosen, sign, factor in ((first, 1, 0.6), (~first, -1, 1.0)):
        part, std = drawn[chosen] - sign * pattern, factor * math.sqrt(covariance[0, 0])
        assert np.abs(part.mean(0)).max() < 5 * std / chosen.sum() ** 0.5
        error = part.T @ part / chosen.sum() - factor**2 * covariance
        assert np.abs(error).max() < 6 * std**2 * math.sqrt(2 / chosen.sum())


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_the_mean_over_an_interval_is_the_same_mixture_for_any_number_of_steps(steps):
    members = 600
    noise = {**REGIMES, "hold": steps * 1e-3, "scale": 1.0}
    sim = from_one_state(problem_of(noise), members, step=3 * steps)
    total = torch.zeros_like(sim.state)
    for _ in range(steps):
        total += sim.noise_hat()
        sim.advance(1)
    mean = physical(sim, total / steps)
    first = torch.from_numpy(sim.rates.response.state > 0)
    std = math.sqrt(dense_noise_covariance(16, 1e-3)[0, 0] / steps)
    assert 0.3 < first.double().mean() < 0.7
    for chosen, sign, factor in ((first, 1, 0.6), (~first, -1, 1.0)):
        # <U, sqrt(2) cos> is the pattern's size plus the noise of that mode
        wave = math.sqrt(2) * torch.cos(2 * torch.pi * torch.arange(16) / 16)[:, None]
        share = (mean[chosen] * wave).mean((-2, -1)) / std
        assert abs(share.mean() - sign * 1.5) < 4 * share.std() / chosen.sum() ** 0.5
        spread = (mean[chosen] - mean[chosen].mean(0)).square().mean().sqrt() / std
        assert spread == pytest.approx(factor, rel=0.05)
    # held: the next interval draws anew, from the states then
    before = sim.rates.response.state.copy()
    sim.noise_hat()
    assert 0.2 < (before != sim.rates.response.state).mean() < 0.8


def test_regimes_of_members_and_intervals_are_independent():
    noise = {**REGIMES, "hold": 1e-3, "scale": 1e6}  # p = 1/2 always
    sim = from_one_state(problem_of(noise), 200)
    signs = []
    for _ in range(30):
        sim.noise_hat()
        signs.append(sim.rates.response.state.astype(float).copy())
        sim.advance(1)
    signs = np.array(signs)
    assert abs(signs.mean()) < 4 / signs.size**0.5
    assert abs((signs[1:] * signs[:-1]).mean()) < 4 / signs.size**0.5
    assert abs((signs[:, 1:] * signs[:, :-1]).mean()) < 4 / signs.size**0.5


# The same bits


@KINDS
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_members_do_not_depend_on_batch_threads_and_pieces(noise, precision, monkeypatch):
    problem = problem_of(noise, precision=precision)
    whole = Simulation(problem, range(7), 11, threads=1).initialise().advance(23)
    for chunk, threads in ((1, None), (3, 2), (2, 1)):
        monkeypatch.setattr(simulation, "CHUNK_POINTS", chunk * problem.grid**2)
        sim = Simulation(problem, range(7), 11, threads=threads).initialise()
        for steps in (1, 6, 0, 13, 3):
            sim.noise_hat()
            sim.advance(steps)
        assert digest(sim.state) == digest(whole.state)
    few = Simulation(problem, [5, 2], 11).initialise().advance(23)
    assert digest(few.state) == digest(whole.state[[5, 2]])


@KINDS
@pytest.mark.parametrize("scheme", ["cn_euler", "cn_ab2", "etdrk4", "imex_rk3"])
@pytest.mark.parametrize("stop", [10, 12])
def test_a_restart_inside_an_interval_is_bit_exact(noise, scheme, stop):
    problem = problem_of(noise, scheme=scheme)
    straight = Simulation(problem, range(3), 11).initialise().advance(24)
    first = Simulation(problem, range(3), 11).initialise().advance(stop)
    saved = first.save_state()
    resumed = Simulation(problem, range(3), 11).load_state(**saved).advance(24 - stop)
    assert digest(resumed.state) == digest(straight.state)


@KINDS
def test_noise_hat_is_what_the_step_used(noise):
    loud = Simulation(problem_of(noise), [4], 2).initialise()
    told = Simulation(problem_of({"kind": "none"}), [4], 2).initialise()
    for _ in range(12):
        told.advance(1, loud.noise_hat())
        loud.advance(1)
    torch.testing.assert_close(told.state, loud.state, rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match="state-dependent forcing"):
        loud.noise_hat(3)


def test_strength_zero_is_the_additive_noise():
    plain = Simulation(problem_of({"kind": "q_wiener", **WIENER}), [0, 1], 3).initialise()
    shaped = Simulation(problem_of({**AMPLITUDE, "strength": 0.0}), [0, 1], 3).initialise()
    torch.testing.assert_close(shaped.advance(9).state, plain.advance(9).state, rtol=1e-13, atol=0)


def test_a_state_of_zero_has_plain_noise_and_equal_odds():
    sim = Simulation(problem_of(AMPLITUDE, initial={"kind": "zero"}), [0], 1).initialise()
    plain = Simulation(problem_of({"kind": "q_wiener", **WIENER}), [0], 1).initialise()
    torch.testing.assert_close(sim.noise_hat(), plain.noise_hat(), rtol=1e-12, atol=1e-18)
    zero = Simulation(problem_of(REGIMES, initial={"kind": "zero"}), [0], 1).initialise()
    assert zero.rates.response.probability(zero.start().full_spectra()) == [0.5]


# Paths that refine


def test_strong_order_one_half_of_the_amplitude():
    """Euler-Maruyama with noise that is multiplied by a function of the state."""
    time, coarsest, levels = 0.25, 32, 4
    noise = {**AMPLITUDE, "amplitude": 2e-2}
    ends = []
    for level in (*range(levels), levels + 3):
        steps = coarsest * 2**level
        problem = problem_of(noise, dt=time / steps, path_dt=time / coarsest, viscosity=1e-2)
        ends.append(Simulation(problem, range(12), 0).initialise().advance(steps).state)
    errors = [(end - ends[-1]).abs().square().sum().sqrt().item() for end in ends[:-1]]
    slope = np.log2(np.array(errors[:-1]) / errors[1:]).mean()
    assert 0.35 < slope < 0.75, (errors, slope)


def test_regimes_stay_when_the_path_is_refined():
    """A finer step has the same intervals, regimes, patterns and Wiener path."""
    smooth = {"kind": "band", "wavenumber": 2, "width": 1, "energy": 1e-3}
    ends, regimes = [], []
    for fine in (1, 2, 4):
        problem = problem_of(REGIMES, dt=1e-3 / fine, path_dt=1e-3, initial=smooth)
        sim = Simulation(problem, range(6), 0).initialise().advance(48 * fine)
        ends.append(sim.state)
        regimes.append(sim.rates.response.state.tolist())
    assert regimes[0] == regimes[1] == regimes[2]
    coarse, fine = ((end - ends[-1]).abs().max() for end in ends[:2])
    assert fine < 0.6 * coarse < 0.6e-2 * ends[-1].abs().max()


# What they bring, on the average


@KINDS
def test_moments_and_injection_are_those_of_the_draws(noise):
    members = 4000
    sim = from_one_state(problem_of(noise), members)
    drawn = sim.noise_hat()
    mean, variance = (torch.from_numpy(part) for part in sim.rates.response.moments(sim.start()))
    measured = (drawn - mean).abs().square().mean(0)
    expected = variance.mean(0)
    near = expected > 1e-3 * expected.max()
    bars = 6 * expected[near] * math.sqrt(2 / members)
    assert bool(((measured - expected)[near].abs() < bars).all())
    # the change of enstrophy in a step that does nothing else: <w, noise> dt + |noise|^2 dt^2 / 2
    weights, dt = sim.grid.weights, sim.problem.dt
    steady = sim.problem.physics.forcing.spectrum(sim.grid)
    work = (sim.state.conj() * (steady + drawn)).real + 0.5 * dt * drawn.abs().square()
    change = (weights * work).sum((-2, -1))
    told = Diagnostics(sim).measure()["enstrophy_injection"]
    assert abs(change.mean() - told.mean()) < 4 * change.std() / members**0.5


# Refusals


@pytest.mark.parametrize(
    "change, message",
    [
        ({"noise": AMPLITUDE, "cfl": 0.5}, "generate.cfl=0.5: noise state_amplitude"),
        ({"noise": REGIMES, "cfl": 0.5}, "generate.cfl=0.5: noise two_regimes"),
        ({"noise": {**REGIMES, "hold": 2.5e-3}}, "physics.noise.hold=0.0025 is not a multiple"),
        ({"noise": {**AMPLITUDE, "strength": -1.0}}, "strength"),
        ({"noise": {**REGIMES, "amplitudes": [1.0]}}, "amplitudes"),
    ],
)
def test_what_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        problem_of(**change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, None),
        ({"generate": {"interval": 4}}, "generate.interval=4 steps of 0.001 are not"),
        ({"rollout": {"interval": 4}}, "set rollout.interval to 5, or hold to 0.004"),
        ({"generate": {"record": {"every": 0.012}}}, "generate.record.every=0.012"),
        ({"generate": {"record": {"start": 20.002}}}, "generate.record.start=20.002"),
        ({"generate": {"interval": 4, "closure": "none"}}, None),
    ],
)
def test_closure_intervals_are_those_of_the_regimes(change, message):
    generate = {"grid": 64, "interval": 5, **change.get("generate", {})}
    rollout = {"interval": 5, **change.get("rollout", {})}
    settings = {"physics": {"noise": REGIMES}, "generate": generate, "rollout": rollout}
    if message is None:
        Experiment.model_validate(settings)
        return
    with pytest.raises(ValueError, match=message):
        Experiment.model_validate(settings)
