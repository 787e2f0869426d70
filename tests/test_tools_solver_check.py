"""``hpc-closure solver check``: each rule sees the fault that it is for."""

from pathlib import Path

import numpy as np
import pytest

from hpc_closure.spectral.modes.grid import Grid
from hpc_closure.spectral.outside.solver import OutsideSolver
from hpc_closure.tools import solver_check
from hpc_closure.work.options import UsageError

SOLVERS = Path(__file__).parent / "user_solvers"


class Good:
    """Decay of each mode by itself, and its adjoint."""

    dt = 0.1
    k2 = np.fft.fftfreq(16, 1 / 16)[:, None] ** 2 + np.arange(9) ** 2

    def step(self, v, n):
        return np.fft.irfft2(np.fft.rfft2(v) * np.exp(-0.01 * n * self.k2), s=(16, 16))

    def vjp(self, v, n, g):
        return self.step(g, n)


class WritesIntoItsInput(Good):
    def step(self, v, n):
        v *= 0.9**n
        return v

    def vjp(self, v, n, g):
        return g * 0.9**n


class Remembers(Good):
    calls = 0

    def step(self, v, n):
        self.calls += 1
        return super().step(v, n) * (1 + 0.1 * self.calls)


class BeginsWithAnotherStep(Good):
    def step(self, v, n):
        return v * 0.5 * 0.9 ** (n - 1)


class MixesMembers(Good):
    def step(self, v, n):
        for _ in range(n):
            v = v + 0.1 * v.mean(0)
        return v


class KnowsItsPlace(Good):
    def step(self, v, n):
        return v * (1 + 0.1 * np.sin(np.arange(16) * np.pi / 8)) ** n


class BlowsUp(Good):
    def step(self, v, n):
        return v * np.inf


class HasAWrongAdjoint(Good):
    def vjp(self, v, n, g):
        return 1.01 * self.step(g, n)


def verdicts(solver):
    states = solver_check.test_states(Grid(16), 1, 1.0, 0)
    found = solver_check.lines(OutsideSolver(solver, "x"), states, 2)
    return {line.rule: line.verdict for line in found}


def test_a_good_solver_passes_every_rule():
    found = verdicts(Good)
    assert found.pop("modes beyond 5") == found.pop("speed") == "--"
    assert set(found.values()) == {"OK"} and len(found) == 9


@pytest.mark.parametrize(
    "solver, rule",
    [
        (WritesIntoItsInput, "input untouched"),
        (Remembers, "same call, same result"),
        (BeginsWithAnotherStep, "step(v, 2n) twice step n"),
        (MixesMembers, "members are independent"),
        (KnowsItsPlace, "translations commute"),
        (BlowsUp, "finite"),
        (HasAWrongAdjoint, "gradient"),
    ],
)
def test_each_fault_fails_its_rule(solver, rule):
    found = verdicts(solver)
    assert found[rule] == "FAIL"
    if solver is not Remembers:
        assert [one for one, verdict in found.items() if verdict == "FAIL"] == [rule]


def test_states_are_of_the_stated_size_and_fields():
    states = solver_check.test_states(Grid(16, 2.0, 2), 3, 0.5, 0)
    assert states.shape == (8, 3, 16, 16)
    assert float(states.square().mean().sqrt()) == pytest.approx(0.5)


def test_it_prints_a_line_a_rule_and_its_exit_code(capsys, tmp_path):
    assert solver_check.run(f"{SOLVERS / 'vorticity_torch.py'}:Reduced", grid=16) == 0
    out = capsys.readouterr().out
    assert "OK    gradient" in out and "microseconds per member and step" in out
    (tmp_path / "broken.py").write_text("dt = 1.0\ndef step(v, n):\n    return v[0]\n")
    assert solver_check.run(str(tmp_path / "broken.py"), grid=16) == 1
    assert "step returned shape" in capsys.readouterr().out


def test_options_out_of_range_are_refused():
    with pytest.raises(UsageError, match="--sides 4: expected 1, 2 or 3"):
        solver_check.run("x.py", sides=4)
