"""The damping per shell with which long coupled runs have the energy of the DNS."""

from dataclasses import replace

import pytest
import torch
import trajectory_case
from closure_case import SMALL
from test_closure_steady import found, long_runs, valid_reader
from test_learning import CLOSED, GRID, with_previous

from hpc_closure.closure.artifact import build
from hpc_closure.closure.fitting.balance import BalanceEnergy, damp, off
from hpc_closure.closure.fitting.coupled_phases import train_through
from hpc_closure.closure.model import RolloutTraining
from hpc_closure.closure.reductions import Reader
from hpc_closure.experiment import reading

PREVIOUS = {"sensors": "none", "previous_closures": 1}


def fitted(**config):
    model = build({**SMALL, **CLOSED, "conditions": PREVIOUS, **config}, GRID)
    for phase in model.phases:
        model.begin(phase.name, with_previous(40, 6, 1))
    return model


def mean_of(model):
    batch = next(iter(with_previous(40, 6, 1)))
    frames = model.frames(batch["state"].double(), None, batch["previous"].double())
    return model.library(frames, None, model._factors()).detach(), frames[:, 0]


def test_what_may_be_chance_is_left_as_it_is():
    assert not off(found(ratio=1.05, error=0.06)).any()
    assert not off(found(ratio=1.04, error=0.001)).any()
    assert not off(found(ratio=3.0, judged=False)).any()
    assert torch.allclose(off(found(ratio=0.8)), torch.tensor(0.8).log())


@pytest.mark.parametrize("adjusted", [False, True])
def test_damping_is_a_rate_of_the_state_in_its_shell(adjusted):
    model = fitted(adjusted=adjusted)
    if adjusted:
        with torch.no_grad():
            model.adjustment.terms.fill_(0.25)
    before, state = mean_of(model)
    rates = torch.linspace(-0.1, 0.5, model.band.grid.num_shells).double()
    damp(model, model.statistics, rates)
    after, _ = mean_of(model)
    expected = before - rates[model.band.grid.shell()] * state
    assert torch.allclose(after, expected, atol=1e-6 * float(before.abs().max()))


class Drifting:
    """Stands for long runs: a shell's energy falls with its damping, and its neighbour's too."""

    span = 0.5

    def __init__(self, excess, bound=None):
        self.excess, self.bound, self.rates = excess, bound, []

    def run(self, model, reader):
        shells = model.band.grid.num_shells
        own = model.statistics.library[model.feature_set.own]
        if not self.rates:
            self.plain = own
        rate = torch.zeros(shells).double()
        rate[model.band.group_shell] = self.plain - own
        self.rates.append(rate)
        wrong = self.excess - 100 * self.span * (rate + 0.3 * rate.roll(1))
        one = found(shells=shells - 1)
        return replace(
            one,
            ratio=wrong[1:].exp(),
            lost=int(self.bound is not None and rate.max() > self.bound),
        )


def test_rates_are_found_with_which_energies_are_right():
    model = fitted()
    excess = torch.linspace(-0.2, 0.4, model.band.grid.num_shells).double()
    runs = Drifting(excess)
    report = BalanceEnergy(long_runs=runs).begin(model, Reader(with_previous(40, 6, 1)))
    last = runs.run(model, None)
    assert off(last).abs().max() < 0.1 < excess.abs().max()
    assert len(report["tried"]) > 2


def test_rates_of_a_run_that_lost_no_member_are_used():
    model = fitted()
    excess = torch.full((model.band.grid.num_shells,), 0.4).double()
    runs = Drifting(excess, bound=0.003)
    BalanceEnergy(long_runs=runs).begin(model, Reader(with_previous(40, 6, 1)))
    assert max(rate.max() for rate in runs.rates) > 0.003 and runs.run(model, None).lost == 0


def test_energies_of_real_runs_are_balanced():
    """Without it the last shells of a coupled run have half of the DNS's energy."""
    model = trajectory_case.fitted("gaussian")
    runs, reader = long_runs(calls=40), valid_reader()
    with torch.no_grad():
        before = runs.run(model, reader)
        BalanceEnergy(long_runs=runs).begin(model, reader)
        after = runs.run(model, reader)
    assert off(before).abs().max() > 0.5
    assert off(after).abs().max() < 0.2 and after.lost == 0


def test_the_phase_is_the_last_one():
    model = build({**SMALL, **CLOSED, "conditions": PREVIOUS, "adjusted": True}, GRID)
    train_through(model, None, RolloutTraining(1, 1, 1e-3, (1, 2)), BalanceEnergy(long_runs=None))
    assert [phase.name for phase in model.phases][-3:] == ["trajectory", "noise", "balance"]


@pytest.mark.parametrize(
    "changes",
    [["model.conditions.previous_closures=0"], ["model.preset=smagorinsky"]],
)
def test_a_closure_without_regression_on_closures_is_refused(changes):
    settings = ["train.rollout_training=null", "train.stability_test={balance: true}", *changes]
    with pytest.raises(ValueError, match="train.stability_test.balance=true changes the regres"):
        reading.load("turbulence_3d_quick", settings)


def test_hashes_of_runs_without_it_do_not_change():
    plain = reading.load("subgrid_quick", ["train.stability_test={horizon: 50}"])
    assert "balance" not in plain.stage_settings("train")["train"]["stability_test"]
