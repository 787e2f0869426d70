"""Draws of a coupled run that were rescaled, counted by lead, row and shell."""

import numpy as np
import torch
from trajectory_case import GRID, INTERVAL, PREVIOUS, PROBLEM, SEED

from hpc_closure.closure.process import Memory
from hpc_closure.experiment.schema import Rollout
from hpc_closure.rollout.coupling import CoupledRun, Coupling
from hpc_closure.rollout.tally import Tally

SHELLS = 8


class Scripted:
    """Draws nothing; tells what a script says of each (call, case, member) and shell."""

    config = {"preset": "gaussian"}
    guarded = SHELLS

    def __init__(self, script, lose=None):
        self.script, self.lose = script, lose

    def interval_ratio(self, interval):
        return 1.0

    def averaging_steps(self, interval):
        return interval

    def sample_hat(self, request):
        beyond = torch.zeros(len(request.members), SHELLS, dtype=torch.bool)
        for (call, row), shells in self.script.items():
            if call == request.call and row in request.members:
                beyond[request.members.index(row), shells] = True
        if request.on_rescaled is not None:
            request.on_rescaled(beyond)
        drawn = torch.zeros_like(request.state)
        if self.lose is not None and request.call >= 1 and self.lose in request.members:
            drawn[request.members.index(self.lose)] = torch.nan
        return drawn


def coupled(closure, rows):
    settings = Rollout(interval=INTERVAL, baselines=())
    cases = sorted({case for case, _ in rows})
    memory = Memory(previous=PREVIOUS)
    coupling = Coupling(PROBLEM, "subgrid", GRID, SEED, settings, memory)
    return CoupledRun(coupling, closure, rows, cases)


def started(closure, rows):
    run = coupled(closure, rows)
    generator = np.random.default_rng(0)
    cases = len(run.cases)
    fields = generator.normal(size=(cases, GRID, GRID))
    run.start(0.1 * fields, 0, closures=[0 * fields] * PREVIOUS)
    return run


ROWS = [(3, 0), (4, 0), (3, 1)]


def script_of(run):
    """Row 1 is beyond in shell 2 at call 1, in shells 2 and 5 at call 3."""
    ids = run.rows_of["model"].ids
    return {(1, ids[1]): [2], (3, ids[1]): [2, 5]}


def test_a_draw_beyond_is_counted_at_its_call_row_and_shell():
    run = started(Scripted({}), ROWS)
    run.closure.script = script_of(run)
    leads = []
    for _ in range(4):
        run.advance()
        leads.append(run.rescaled_counts()["brought_back"])
    assert [counts.shape for counts in leads] == 4 * [(3, 2 + SHELLS)]
    for call, counts in enumerate(leads):
        assert counts[:, 0].tolist() == 3 * [call + 1]
        assert counts[:, 1].tolist() == [0, (call >= 1) + (call >= 3), 0]
        assert counts[1, 2:].tolist() == [0, 0, (call >= 1) + (call >= 3), 0, 0, call >= 3, 0, 0]


def test_counts_go_on_from_a_restart_and_do_not_depend_on_the_block():
    run = started(Scripted({}), ROWS)
    run.closure.script = script = script_of(run)
    run.advance(2)
    saved = run.save_state()
    run.advance(2)
    whole = run.rescaled_counts()["brought_back"]
    again = coupled(Scripted(script), ROWS)
    again.load_state(saved)
    again.advance(2)
    assert np.array_equal(again.rescaled_counts()["brought_back"], whole)
    for part in (ROWS[:1], ROWS[1:]):
        alone = started(Scripted(script), part)
        alone.advance(4)
        there = [ROWS.index(row) for row in part]
        assert np.array_equal(alone.rescaled_counts()["brought_back"], whole[there])
    old = {name: value for name, value in saved.items() if name != "brought_back"}
    again.load_state(old)  # of before, when nothing was counted


def test_a_lost_row_draws_no_more():
    run = started(Scripted({}), ROWS)
    run.closure.script, run.closure.lose = script_of(run), run.rows_of["model"].ids[1]
    run.advance(4)
    counts = run.rescaled_counts()["brought_back"]
    assert counts[:, 0].tolist() == [4, 2, 4]
    assert counts[1, 1] == 1


def test_a_closure_that_brings_nothing_back_is_not_counted():
    closure = Scripted({})
    closure.guarded = 0
    run = coupled(closure, ROWS)
    assert run.rescaled_counts() == {}
    assert "brought_back" not in run.save_state()


def test_a_start_begins_anew():
    tally = Tally(2, 3)
    tally.add(torch.tensor([[True, False, True], [False] * 3]), torch.tensor([False, False]))
    assert tally.save().tolist() == [[1, 1, 1, 0, 1], [1, 0, 0, 0, 0]]
    tally.clear()
    assert not tally.save().any()
