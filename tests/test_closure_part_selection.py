"""The gate: which trained parts act, judged by members and not by snapshots."""

import math

import pytest
import torch
from scipy import stats

from hpc_closure.closure.composed.part_selection import (
    LEAST,
    LEVEL,
    ByMember,
    ImprovementGate,
    PointShareGate,
    ShareGate,
    ShellGate,
    significant,
)
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.gaussian.kriging import StationaryGaussian
from hpc_closure.closure.reductions import Reader

B = band(4)
SHELLS = B.grid.num_shells
SIZE = 12  # points per side
WHITE = StationaryGaussian(B, torch.ones(len(B.group_k2)))
VARIANCE = WHITE.variance  # of a point


def spectra(*leading, seed=0):
    """Complex standard normal spectra (..., 2K + 1, K + 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, *B.shape, dtype=torch.complex128, generator=generator)


def white(number, seed=9):
    """Fields (number, 12, 12) of the stationary law WHITE."""
    return B.to_physical(WHITE.coloured(spectra(number, seed=seed)), SIZE)


def slow(number, seed=3):
    """Fields (number, 12, 12) of the largest scales, std about 1/2."""
    few = torch.where(B.grid.shell() <= 1, spectra(number, seed=seed), 0.0)
    return 0.2 * B.to_physical(few, SIZE)


def persistent(*leading, times, seed, rho=0.95):
    """Stationary AR(1) spectra (..., times, 2K + 1, K + 1) of unit variance."""
    steps = spectra(times, *leading, seed=seed)
    rows = [steps[0]]
    for step in steps[1:]:
        rows.append(rho * rows[-1] + math.sqrt(1 - rho**2) * step)
    return torch.stack(rows, dim=len(leading))


# ---- Student's t over members -------------------------------------------------------------------


@pytest.mark.parametrize("members", [8, 10, 40])
def test_a_decision_is_a_one_sided_t_test(members):
    generator = torch.Generator().manual_seed(members)
    values = torch.randn(members, 2000, dtype=torch.float64, generator=generator)
    values += 3 / members**0.5
    p = stats.ttest_1samp(values.numpy(), 0, alternative="greater").pvalue
    assert 0 < (p < LEVEL).sum() < 2000
    assert significant(values).tolist() == (p < LEVEL).tolist()
    assert not significant(-values).any()


def test_fewer_than_eight_members_decide_nothing():
    certain = 1 + 1e-6 * torch.arange(LEAST, dtype=torch.float64)[:, None]
    assert LEAST == 8
    assert bool(significant(certain))
    for few in range(LEAST):
        assert not significant(certain[:few]).any()


@pytest.mark.parametrize("gate", [ShellGate(B), ImprovementGate(B), ShareGate(WHITE)])
def test_seven_members_open_no_gate_however_many_snapshots(gate):
    for members in (torch.arange(700) % 7, None):
        if isinstance(gate, ShellGate):
            truth = spectra(700)
            gate.add(truth, truth, members)
        elif isinstance(gate, ImprovementGate):
            gate.add(torch.ones(700).double(), torch.linspace(0, 0.1, 700).double(), members)
        else:
            log = slow(700)
            gate.add(log, torch.exp(log) * white(700), members)
        decided = gate.share() if isinstance(gate, ShareGate) else gate.gains()
        # snapshots of no named member are members of their own
        assert (gate.members == 7) == (members is not None)
        assert bool(torch.as_tensor(decided != 0).all()) == (members is None)


def test_values_are_summed_by_member_whatever_their_order():
    rows = ByMember()
    rows.add(torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]), torch.tensor([5, 3, 5]))
    rows.add(torch.tensor([[8.0, 80.0]]), torch.tensor([3]))
    assert rows.members == 2
    assert rows.sums().tolist() == [[10.0, 100.0], [5.0, 50.0]]


def test_snapshots_without_a_name_are_their_own_in_every_batch():
    rows = ByMember()
    for _ in range(3):
        rows.add(torch.ones(4, 1), None)
    assert rows.members == 12 and rows.sums().shape == (12, 1)


# ---- gains --------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor, gain", [(2.0, 0.5), (1.0, 1.0), (0.8, 1.25), (0.1, 2.0)])
def test_a_gain_is_the_regression_of_the_truth_on_the_output(factor, gain):
    gate, signal = ShellGate(B), spectra(400)
    gate.add(signal + 0.5 * spectra(400, seed=1), factor * signal, torch.arange(400) % 10)
    assert torch.allclose(gate.gains(), torch.full((SHELLS,), gain).double(), rtol=0.05)


def test_shells_are_judged_one_by_one():
    """The output is right in the large scales, and wrong or nothing in the small ones."""
    truth, shell = spectra(400), B.grid.shell()
    output = torch.where(shell <= 2, truth, torch.where(shell == 3, -truth, 0 * truth))
    gate = ShellGate(B)
    gate.add(truth, output, torch.arange(400) % 8)
    gains = gate.gains()
    assert torch.allclose(gains[:3], torch.ones(3).double())
    assert not gains[3:].any()


@pytest.mark.parametrize("members", [8, 10])
def test_an_unrelated_output_does_not_act_however_slowly_it_changes(members):
    """101 snapshots of a member with correlation .95: in under 1 % of the trials.

    The control judges the same outputs by snapshots, and lets many through.
    """
    trials, times = 150, 101
    opened = by_snapshots = 0
    names = torch.arange(members).repeat_interleave(times)
    for trial in range(trials):
        truth, output = (
            persistent(members, times=times, seed=2 * (members * trials + trial) + which)
            for which in (0, 1)
        )
        truth, output = truth.flatten(0, 1), output.flatten(0, 1)
        for named in (names, None):
            gate = ShellGate(B)
            gate.add(truth, output, named)
            number = int((gate.gains() > 0).sum())
            if named is None:
                by_snapshots += number
            else:
                opened += number
    assert opened < 0.01 * trials * SHELLS
    assert by_snapshots > 0.1 * trials * SHELLS


def test_one_pass_acts_in_all_shells_or_in_none():
    better, members = torch.linspace(0, 1, 80).double(), torch.arange(80) % 8
    for sign, gain in ((1.0, 1.0), (-1.0, 0.0)):
        gate = ImprovementGate(B)
        gate.add(0 * better, -sign * (better + 0.1), members)
        assert gate.gains().tolist() == [gain] * SHELLS


# ---- shares of an amplitude ---------------------------------------------------------------------


def share(log, given, members=10, noise=None):
    """Share of ``given`` as log D where the residual has the amplitude exp(``log``)."""
    noise = white(len(log)) if noise is None else noise
    gate = ShareGate(WHITE)
    gate.add(given, torch.exp(log) * noise, torch.arange(len(log)) % members)
    return gate.share()


def test_the_share_of_an_amplitude_is_the_likeliest():
    log = slow(800)
    assert share(log, log) == 1.0
    assert share(log, 2 * log) == 0.5
    assert share(log, 4 * log) == 0.25
    assert share(log, 0.5 * log) == 1.0  # never beyond what the network says
    assert share(log, -log) == 0.0
    assert share(log, slow(800, seed=4)) == 0.0


def test_an_amplitude_that_differs_by_state_alone_counts_too():
    log = 0.5 * spectra(800, seed=3).real[:, :1, :1].expand(-1, SIZE, SIZE)
    assert share(log, log) == 1.0
    assert share(log, log.roll(1, 0)) == 0.0


def test_an_amplitude_that_is_the_same_everywhere_is_not_worth_its_cost():
    log = torch.full((800, SIZE, SIZE), 0.7).double()
    assert share(log, log) == 0.0
    slight = 0.04 * slow(800)  # significant perhaps, but worth 4e-4 nats
    assert share(slight, slight) == 0.0


def test_two_peaks_of_a_pattern_are_no_amplitude():
    """A field of D has the pointwise variance of a wave of either sign, and not its law."""
    wave = math.sqrt(2) * torch.cos(torch.arange(SIZE) * 2 * math.pi / SIZE).double()[:, None]
    sign = 2.0 * (spectra(800, seed=7).real[:, :1, :1] > 0) - 1
    noise = 0.5 * white(800) / VARIANCE**0.5
    right = 0.5 * torch.log(wave.square() + 0.25).expand(800, SIZE, SIZE)
    residual = sign * wave + noise
    pointwise = float((right + 0.5 * (residual / right.exp()).square()).mean())
    uniform = 0.5 * float(residual.square().mean().log()) + 0.5
    assert pointwise < uniform - 0.1
    assert share(torch.zeros_like(right), right, noise=residual) == 0.0


def point_share(log, proposed, members=10, noise=None, reader=None):
    """Share of ``proposed`` as log D, by the CRPS of points."""
    noise = white(len(log)) if noise is None else noise
    field, gate = torch.exp(log) * noise, PointShareGate(band(5))
    gate.measure(proposed, field)
    gate.sum(reader or Reader(()))
    gate.add(proposed, field, torch.arange(len(log)) % members)
    return gate.share()


def test_the_share_by_points_is_that_of_least_crps():
    log = slow(800)
    assert point_share(log, log) == 1.0
    assert point_share(log, 2 * log) == 0.5
    assert point_share(log, -log) == 0.0
    assert point_share(log, slow(800, seed=4)) == 0.0
    assert point_share(log, log + 0.7) == 1.0  # the level of log D does not matter
    assert point_share(log, log, members=4) == 0.0  # too few to be judged
    channels = torch.stack([log, 0 * log], dim=1)
    two = torch.stack([white(800), 100 * white(800)], dim=1)
    assert point_share(channels, channels, noise=two) == 1.0  # channels differ in their units
