"""The share of the mean's network that long coupled runs bear."""

from dataclasses import replace

import pytest
import torch
from closure_case import SMALL
from test_learning import CLOSED, GRID, chain, with_previous
from trajectory_case import GRID as COARSE
from trajectory_case import INTERVAL, PROBLEM, REDUCED, SEED, data

from hpc_closure.closure.artifact import build
from hpc_closure.closure.fitting.coupled_phases import choose_share
from hpc_closure.closure.fitting.steady import HEAVY, STEP, LongRuns, RunResult, lower
from hpc_closure.closure.model import Request
from hpc_closure.closure.reductions import Reader
from hpc_closure.spectral.simulation import Simulation

SHELLS = REDUCED.replace(grid=COARSE).make_grid().num_shells


def found(rescaled=0.0, lost=0, ratio=1.0, error=0.01, judged=True, shells=4):
    ratios = torch.full((shells,), float(ratio))
    return RunResult(
        rescaled,
        lost,
        ratios,
        torch.full((shells,), error),
        torch.full((shells,), judged, dtype=torch.bool),
    )


def test_what_holds_is_left_as_it_is():
    share = torch.ones(5).double()
    assert lower(share, found(rescaled=0.019), expected=0.04) is None
    assert lower(share, found(ratio=1.08, error=0.02), expected=0.04) is None  # chance
    assert lower(share, found(ratio=2.0, judged=False), expected=0.04) is None


def test_too_many_rescaled_draws_take_the_share_of_all_shells_down():
    share = torch.ones(5).double()
    for one in (found(rescaled=0.021), found(lost=1)):
        assert torch.allclose(lower(share, one, expected=0.04), share - STEP)


def test_a_shell_with_too_much_loses_a_share_of_its_own():
    one = found()
    one.ratio[2] = 1.2  # shell 3
    less = lower(torch.ones(5).double(), one, expected=0.04)
    assert torch.allclose(less, torch.tensor([1, 1, 1, 1 - HEAVY, 1]).double())
    assert torch.equal(lower(torch.zeros(5).double(), one, 0.0), torch.zeros(5).double())


class Scripted:
    """A closure that draws nothing, and tells that its first ``far`` rows were rescaled."""

    device, guarded = torch.device("cpu"), SHELLS

    def __init__(self, far=0, push=0.0):
        self.far, self.push, self.asked = far, push, []

    def sample_hat(self, request):
        self.asked.append(request)
        if request.on_rescaled is not None:
            beyond = torch.zeros(len(request.members), SHELLS, dtype=torch.bool)
            beyond[: self.far, 3] = True
            request.on_rescaled(beyond)
        return torch.full_like(request.state, self.push)


def long_runs(calls=6, members=2):
    return LongRuns(REDUCED, "subgrid", INTERVAL * PROBLEM.dt, calls, members, SEED)


def valid_reader():
    samples = data().valid
    return Reader([samples.gather(samples.some(0))])


def test_a_long_run_starts_from_every_trajectory_and_counts_its_second_half():
    closure = Scripted(far=2)
    one = long_runs().run(closure, valid_reader())
    batch = next(iter(valid_reader()))
    trajectories = batch["member"].unique().tolist()
    assert len(closure.asked) == 6
    assert [request.on_rescaled is not None for request in closure.asked] == 3 * [False] + 3 * [
        True
    ]
    rows = 2 * len(trajectories)
    assert len(closure.asked[0].members) == rows == len(set(closure.asked[0].members))
    assert one.rescaled == pytest.approx(2 / rows)
    assert one.lost == 0


def test_a_long_run_without_closure_is_the_bare_solver():
    one = long_runs(calls=2, members=1).run(Scripted(), valid_reader())
    batch = next(iter(valid_reader()))
    first = [batch["member"].tolist().index(m) for m in batch["member"].unique().tolist()]
    simulation = Simulation(REDUCED, range(len(first)), SEED)
    start = batch["state"][first].double()
    simulation.load_state(0, simulation.transform.to_spectral(start))
    for _ in range(2):  # the scheme begins anew in every interval
        simulation.forget().advance(INTERVAL)
    grid = simulation.grid
    ours = grid.shell_sum(simulation.state.abs().square()).mean(0)
    whole = simulation.transform.to_spectral(batch["state"].double())
    theirs = grid.shell_sum(whole.abs().square()).mean(0)
    assert torch.allclose(one.ratio, (ours / theirs)[1:], rtol=1e-9)


def test_trajectories_that_end_are_lost_and_in_no_mean():
    one = long_runs().run(Scripted(push=float("nan")), valid_reader())
    assert one.lost == 2 * len(next(iter(valid_reader()))["member"].unique())
    assert not bool(one.ratio.isnan().any())


# ---- the phase ----------------------------------------------------------------------------------


class Bearing:
    """Stands for long runs: bears a share of the network up to ``most``."""

    def __init__(self, most):
        self.most, self.seen = most, []

    def run(self, model, reader):
        share = model.statistics.mean_share
        self.seen.append((float(share.max()), sorted(batch["who"] for batch in reader)))
        return found(rescaled=float(share.max() > self.most + 1e-9), shells=len(share) - 1)


def fitted(long_runs=None, previous=1, **config):
    network = {"preset": "convolutional", "width": 4, "mean_layers": 2, "validate_parts": "off"}
    model = build(
        {
            **SMALL,
            **network,
            "conditions": {"sensors": "none", "previous_closures": previous},
            **config,
        },
        GRID,
    )
    if long_runs is not None:
        choose_share(model, long_runs)
    for phase in model.phases:
        batches = with_previous(40, 6, previous)
        for batch in batches:
            batch["who"] = phase.members
        model.begin(phase.name, batches)
        if phase.name == "mean":  # as if trained: an answer that helps nobody
            with torch.no_grad():
                for weight in model.mean.parameters():
                    weight.add_(0.05 * torch.randn(weight.shape).to(weight))
    return model


def test_the_share_is_chosen_on_validation_members_and_the_law_learned_again():
    torch.manual_seed(0)
    judge = Bearing(0.5)
    model = fitted(judge)
    assert [(phase.name, phase.members) for phase in model.phases] == [
        ("mean", "fit"),
        ("law", "hold"),
        ("steady", "valid"),
        ("law", "hold"),
    ]
    assert [round(share, 2) for share, _ in judge.seen] == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    assert all(set(who) == {"valid"} for _, who in judge.seen)
    s = model.statistics
    assert torch.allclose(s.mean_share, torch.full_like(s.mean_share, 0.5))
    assert torch.allclose(model.mean_gain, 0.5 * s.mean_gain)
    torch.manual_seed(0)
    whole = fitted()
    assert whole.statistics.mean_share is None
    # a network that helps nobody leaves more than without it, and half of it less
    assert model.statistics.law_spectrum.sum() < whole.statistics.law_spectrum.sum()


def test_a_network_that_coupled_runs_bear_is_left_whole():
    model = fitted(Bearing(1.0))
    assert model.statistics.mean_share is None
    assert torch.equal(model.mean_gain, model.statistics.mean_gain)


def test_without_a_network_that_reads_closures_there_is_nothing_to_choose():
    closed = {**SMALL, **CLOSED, "conditions": {"sensors": "none", "previous_closures": 1}}
    model = build(closed, GRID)
    before = model.phases
    choose_share(model, Bearing(0.5))
    assert model.phases == before


# ---- what a recursion draws ---------------------------------------------------------------------


def test_closures_drawn_given_their_own_last_have_the_variance_of_the_training():
    """The recursion's stationary law: per shell as large as what it was learned from."""
    torch.manual_seed(1)
    model = build(
        {**SMALL, **CLOSED, "conditions": {"sensors": "none", "previous_closures": 2}}, GRID
    )
    for phase in model.phases:
        model.begin(phase.name, with_previous(200, 12, 2))
    states, closures = chain(200, 4)
    last, b = closures[:, 1:3].flip(1).float(), model.band
    total, count = 0.0, 0
    for call in range(40):
        request = Request(states[:, 3].float(), range(200), 5, call, previous=last)
        drawn = model.sample_batch(request)
        last = torch.stack([drawn, last[:, 0]], 1)
        if call >= 10:
            total = total + b.grid.shell_sum(b.to_spectral(drawn.double()).abs().square()).mean(0)
            count += 1
    ratio = (total / count / model.statistics.target_mean)[1:6]
    assert torch.allclose(ratio, torch.ones_like(ratio), atol=0.1), ratio


def test_the_expected_share_is_that_of_other_training_members():
    model = build(
        {**SMALL, **CLOSED, "conditions": {"sensors": "none", "previous_closures": 1}}, GRID
    )
    model.begin("mean", with_previous(60, 6, 1))
    other = with_previous(60, 6, 1, first=500)
    model.begin("law", other)
    b, largest = model.band, model.statistics.target_largest
    power = torch.cat(
        [b.grid.shell_sum(b.to_spectral(one["target"].double()).abs().square()) for one in other]
    )
    far = power > largest.clamp(min=1e-9 * model.statistics.target_mean.sum())
    expected = model.expected_rescaled
    assert float(expected[0]) == pytest.approx(float(far.any(1).double().mean()))
    assert torch.allclose(expected[1:], far.double().mean(0))
    doubled = [{**one, "target": 2 * one["target"]} for one in other]
    model.begin("law", doubled)
    assert float(model.expected_rescaled[0]) > 0.9
    model.adopt(replace(model.statistics, target_largest=None))
    assert model.guarded == 0
