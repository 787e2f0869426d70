"""Memory of the residual: estimated from snapshots, drawn without state."""

import math

import pytest
import torch
from closure_case import SIZE, SMALL, law_of, states_of

from hpc_closure.closure.artifact import build
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.fields.persistence import position
from hpc_closure.closure.fields.sensors import read_regular
from hpc_closure.closure.gaussian.memory import LagCorrelation, knot_spacing
from hpc_closure.closure.model import Request

B = band(4)


def autoregressive(members, times, rho, seed=0):
    """AR(1) spectra (members, times, ...) of unit variance."""
    out = []
    for member in range(members):
        noise = keyed_noise.white_spectra(
            B, seed, "ar", range(1000 * member, 1000 * member + times), 0
        )
        rows = [noise[0]]
        for one in noise[1:]:
            rows.append(rho * rows[-1] + math.sqrt(1 - rho**2) * one)
        out.append(torch.stack(rows))
    return torch.stack(out)


def test_correlation_time_is_estimated_across_batches():
    series = autoregressive(20, 50, 0.8)
    memory = LagCorrelation(B)
    for member, rows in enumerate(series):
        for first in (0, 30):
            part = rows[first : first + 30]
            times = torch.arange(first, first + len(part))
            memory.add(part, (torch.full_like(times, member), times))
    tau = memory.times()
    assert torch.allclose(tau, torch.full_like(tau, -1 / math.log(0.8)), rtol=0.35)
    white = LagCorrelation(B)
    rows = keyed_noise.white_spectra(B, 1, "white", range(400), 0)
    white.add(rows, (torch.zeros(400), torch.arange(400)))
    assert float(white.times().abs().max()) == 0


def seen_every(spacing, memory, members=40, times=60):
    """Correlations of snapshots ``spacing`` intervals apart of a closure with a memory of some."""
    correlation = LagCorrelation(B)
    rho = math.exp(-spacing / memory) if memory else 0.0
    for member, rows in enumerate(autoregressive(members, times, rho)):
        correlation.add(rows, (torch.full((times,), member), torch.arange(times)))
    return correlation


@pytest.mark.parametrize("spacing, memory", [(1, 2), (1, 0), (2, 0), (2, 4), (10, 40)])
def test_a_memory_that_the_snapshots_show_or_exclude_is_taken(spacing, memory):
    seen_every(spacing, memory).demand(spacing)


@pytest.mark.parametrize("spacing, memory", [(10, 2), (10, 0), (5, 2)])
def test_a_memory_that_the_snapshots_cannot_show_is_refused(spacing, memory):
    seen = seen_every(spacing, memory)
    assert float(seen.times().max()) == 0  # white, as far as they tell
    line = rf"snapshots are {spacing} closure intervals apart .* may be 0\.\d\d from one call to"
    with pytest.raises(ValueError, match=line):
        seen.demand(spacing)
    with pytest.raises(ValueError, match="no snapshot has a neighbour .* model.noise_memory=off"):
        LagCorrelation(B).demand(1.0)


def test_knots():
    times = torch.tensor([0.0, 0.5, 4.0], dtype=torch.float64)
    assert knot_spacing(times, 1.0).tolist() == [0.0, 0.0, 4.0]
    assert knot_spacing(times, 20.0).tolist() == [0.0, 16.0, 128.0]
    assert knot_spacing(times, 0.0).tolist() == [0.0, 0.0, 0.0]
    whole, cos, sin = position(13.0, 4.0)
    assert whole == 3 and cos == pytest.approx(math.cos(math.pi / 8))
    assert cos**2 + sin**2 == pytest.approx(1)


@pytest.fixture(scope="module")
def remembering():
    """A model of a residual that remembers 5 snapshots, 4 calls apart."""
    law, rho, times = law_of(), math.exp(-1 / 5), 60
    kept, batches = law.band, []
    for member in range(8):
        state = states_of(times, first=1000 * member)
        white = keyed_noise.white_spectra(
            kept, 4, "ar", range(1000 * member, 1000 * member + times), 0
        )
        rows = [white[0]]
        for one in white[1:]:
            rows.append(rho * rows[-1] + math.sqrt(1 - rho**2) * one)
        noise = torch.stack(rows) * law.law.modes("std", white)
        target = law.mean(state) + law.transform.to_physical(noise)
        index = torch.arange(times)
        batches.append(
            {
                "state": state,
                "target": target,
                "moment": index,
                "member": torch.full_like(index, member),
            }
        )
    torch.manual_seed(0)
    model = build(SMALL, 32)
    for phase in ("mean", "generator", "check"):
        model.begin(phase, batches)
    model.load_statistics(model.saved_statistics(spacing=4.0))
    return law, model


def test_calls_are_correlated_and_each_has_the_law(remembering):
    law, model = remembering
    assert float(model.statistics.memory_times[1:6].mean()) == pytest.approx(5, rel=0.4)
    state = states_of(1)
    mean = model.sample_batch(Request(state, members=range(300), seed=0)).mean(0)
    calls = {
        call: model.sample_batch(Request(state, members=range(300), seed=0, call=call)) - mean
        for call in (0, 2, 7, 200)
    }
    for sample in calls.values():
        assert float(sample.square().mean()) == pytest.approx(law.variance, rel=0.15)

    def correlation(one, other):
        return float((calls[one] * calls[other]).mean() / law.variance)

    assert correlation(0, 2) > 0.8
    assert 0.2 < correlation(0, 7) < correlation(0, 2)
    assert abs(correlation(0, 200)) < 0.15


def test_a_longer_interval_does_not_average_memory_away(remembering):
    _, model = remembering
    assert float(model.scale_of(4.0)[1:6].min()) > 0.95
    assert float(model.scale_of(1000.0).max()) < 0.3


def test_without_times_the_residual_is_white(remembering):
    _, model = remembering
    assert bool((model.knots > 0).any())
    model = build(SMALL, 32)
    batch = [(states_of(50), states_of(50, first=99))]
    model.begin("mean", batch)
    model.begin("generator", batch)
    assert not bool((model.knots > 0).any())
    assert torch.allclose(model.scale_of(4.0), torch.tensor(0.5).double())


# ---- some shells remember, the others are white -------------------------------------------------

SLOW, TAU, PARTS = 2, 20.0, 8  # shells with memory, its time and steps in an interval


def means_of_ou(members, intervals, seed=0):
    """Interval means (members, intervals, ...) of Ornstein-Uhlenbeck modes of unit variance."""
    rho = math.exp(-1 / (PARTS * TAU))
    out = []
    for member in range(members):
        ids = range(PARTS * intervals)
        steps = keyed_noise.white_spectra(law_of().law.band, seed, f"ou {member}", ids, 0)
        rows, last = [], steps[0]
        for step in steps:
            last = rho * last + math.sqrt(1 - rho**2) * step
            rows.append(last)
        out.append(torch.stack(rows).unflatten(0, (intervals, PARTS)).mean(1))
    return torch.stack(out)


def of_ou(held):
    """Variance of a mean of an Ornstein-Uhlenbeck process over ``held`` intervals."""
    x = held / TAU
    return 2 * (x + math.expm1(-x)) / x**2


@pytest.fixture(scope="module")
def mixed():
    """A law with memory in shells up to ``SLOW``, white beyond, and the model fitted to it."""
    law, members, intervals = law_of(), 64, 40
    kept = law.law.band
    slow = (kept.grid.shell() <= SLOW)[None, None]
    white = keyed_noise.white_spectra(kept, 5, "white", range(members * intervals), 0)
    unit = torch.where(
        slow, means_of_ou(members, intervals), white.unflatten(0, (members, intervals))
    )
    batches = []
    for member, rows in enumerate(unit * law.law.modes("std", white)):
        state, index = states_of(intervals, first=1000 * member), torch.arange(intervals)
        batches.append(
            {
                "state": state,
                "target": law.mean(state) + law.transform.to_physical(rows),
                "moment": index,
                "member": torch.full_like(index, member),
            }
        )
    torch.manual_seed(0)
    model = build({**SMALL, "preset": "gaussian"}, 32)
    for phase in ("mean", "law"):
        model.begin(phase, batches)
    model.load_statistics(model.saved_statistics(spacing=1.0))
    return law, model


@pytest.mark.parametrize("held", [1.0, 2.0, 4.0])
def test_each_shell_is_rescaled_by_its_own_memory(mixed, held):
    law, model = mixed
    state, kept = states_of(1), law.law.band
    found = model.sample_batch(Request(state, members=range(400), seed=3, interval_ratio=held))
    noise = kept.to_spectral(found - law.mean(state))
    power = kept.grid.shell_sum(noise.abs().square()).mean(0)
    like = torch.zeros(1, dtype=torch.complex128)
    one = kept.grid.shell_sum(law.law.modes("variance", like).expand(1, *kept.shape))[0]
    shares = torch.full_like(one, 1 / held)
    shares[: SLOW + 1] = of_ou(held)
    seen = one > 1e-4 * one.sum()
    assert int(seen.sum()) > 5
    assert torch.allclose(power[seen], (one * shares)[seen], rtol=0.16)
    assert torch.allclose(power[seen][3:], (one * shares)[seen][3:], rtol=0.08)


def test_sensors_see_each_shell_at_its_own_size(mixed):
    """With exact readings a held draw meets them, as a draw of the trained interval does."""
    law, model = mixed
    state = states_of(1)
    truth = law.mean(state) + 0.5 * (law.draw(state, [5], 3, 0) - law.mean(state))
    kept = law.law.band
    truth = kept.to_physical(kept.to_spectral(truth), SIZE)
    sensors = read_regular(truth, 4, 1.0)
    for held in (1.0, 4.0):
        request = Request(state, members=range(8), seed=3, interval_ratio=held, sensors=sensors)
        found = model.sample_batch(request)
        rms = float(truth.square().mean().sqrt())
        assert float((found - truth)[:, ::8, ::8].abs().max()) < 1e-3 * rms
