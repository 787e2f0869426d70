"""The state that the picture ``closure`` shows, and the number that it draws of every sample."""

import math

import pytest
import torch
from test_evaluate_pointwise import normal

from hpc_closure.closure.gaussian.exact import ExactLaw
from hpc_closure.evaluate.report import example_state
from hpc_closure.spectral.problem import Problem

N, DT = 16, 1e-2
ANGLE = 2 * math.pi * torch.arange(N, dtype=torch.float64) / N
COSINE = ANGLE.cos()[:, None].expand(N, N)  # the pattern of the regimes, along x
PROBE = ANGLE.sin()[None].expand(N, N)  # what their probability looks at, along y


def law(kind, **noise):
    noise = {"kind": kind, "amplitude": 0.05, **noise}
    problem = Problem(grid=N, dt=DT, forcing={"kind": "none"}, noise=noise)
    found = ExactLaw.of(problem, "diffusion", 1)
    assert found is not None
    return found


def test_a_state_is_shown_in_which_both_regimes_are_likely():
    regimes = law("two_regimes", hold=DT, scale=0.2)
    other = normal(1, N, N)[0]
    other = other - 2 * (other * PROBE).mean() * PROBE
    states = torch.stack([other + share * PROBE for share in (2, 0.6, 0.02, -0.3, -2)])
    index, words = example_state.choose(regimes, states)
    assert index == 2
    likely = float(regimes.fluctuation.probability(regimes.spectra(states))[2])
    assert 0.4 < likely < 0.6 and f"{100 * likely:.0f} %" in words
    assert example_state.choose(law("q_wiener"), states)[0] == 0


def test_the_number_is_the_amplitude_of_the_pattern_and_has_two_peaks():
    regimes = law("two_regimes", hold=DT, pattern=3.0)
    weights, words = example_state.functional(regimes, torch.ones(N, N, dtype=torch.float64))
    assert float((weights * (0.7 * COSINE + 5 * PROBE + 2)).sum()) == pytest.approx(0.7)
    assert words == "amplitude of cos(2πx/L)"
    state = COSINE.T[None]  # says nothing on the regime: both are equally likely
    drawn = regimes.sample(state, members=range(200), seed=1)[:, 0]
    values = (weights * drawn).sum((-2, -1))
    peak = 3.0 * math.sqrt(2 * regimes.variance)
    assert float(values.abs().mean()) == pytest.approx(peak, rel=0.1)
    assert float(values.abs().min()) > 0.3 * peak
    assert 60 < int((values > 0).sum()) < 140


def test_without_regimes_the_number_is_the_value_where_the_law_spreads_most():
    spread = torch.ones(N, N, dtype=torch.float64)
    spread[4, 8] = 2
    weights, words = example_state.functional(law("q_wiener"), spread)
    field = normal(1, N, N)[0].double()
    assert float((weights * field).sum()) == float(field[4, 8])
    assert words == "value at x, y = 0.25, 0.5 L"
