"""`advise`: the ladder of bare solvers, the twins, and a verdict that the numbers decide."""

import json
import math
import sys

import pytest
from test_generate_rungs import STEADY

from hpc_closure import __main__
from hpc_closure.experiment import reading
from hpc_closure.tools import advise
from hpc_closure.tools.advise import Step


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("advise")
    path = folder / "steady.yaml"
    path.write_text(STEADY.format(root=folder / "runs"))
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process: its exit code, what it prints, and its errors."""

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["hpc-closure", "advise", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            __main__.main()
        found = capsys.readouterr()
        return ended.value.code, found.out, found.err

    return command


def test_it_runs_the_pilot_and_says_what_the_ladder_shows(path, run):
    """Before any data are made; a flow whose unresolved scales follow the resolved ones."""
    code, out, _ = run(path, "--grids", "24,40")
    assert not code
    folder = reading.load(path).folder
    assert (folder / "pilot").is_dir() and not list((folder / "data").glob("*.h5"))
    found = json.loads((folder / "pilot" / "advice.json").read_text())
    assert out.splitlines() == found["lines"]
    assert found["narrow"] and "the law is narrow" in out
    pinned, apart = found["twins"]["pinned"], found["twins"]["difference"]
    assert pinned[0] == 0 and apart[0] > 1 and apart[-1] < 0.3 * apart[0]
    assert pinned[-1] < found["twins"]["time"] < 10 or apart[-1] < advise.TOGETHER
    names = [step["name"] for step in found["ladder"]]
    assert names[:2] == ["rung_24_empty_drain", "rung_40_synchronised_drain"]
    coarse, rung, dns = found["ladder"]
    assert rung["crps_ratio"][0] < 0.5 * coarse["crps_ratio"][0]
    assert coarse["cost"] < rung["cost"] < dns["cost"] and dns["crps_ratio"] == [1, 1, 1]
    assert found["verdict"] == found["lines"][-1]


def step(name, crps, spread, cost, grid=64):
    return Step(name, grid, 4, 0.3, 1.0, crps, spread, cost)


DNS = step("DNS", [1.0, 1.0], [1.0, 1.0], 100.0, 128)
EXPERIMENT = reading.load("subgrid_quick")


@pytest.mark.parametrize(
    ("steps", "narrow", "words"),
    [
        ([step("a", [1.2, 1.25], [0.95, 1.0], 8.0)], True, "a 64x64 run, synchronised for 2 time"),
        ([step("a", [1.2, 1.25], [0.95, 1.0], 8.0)], False, "a 64x64 run from a moved start is"),
        ([step("a", [1.2, 1.6], [0.95, 1.0], 8.0)], True, "train one on a rung"),
        ([step("a", [1.2, 1.6], [0.95, 1.0], 8.0)], False, "every rung below the DNS drifts"),
        # right in the mean and too sure of it
        ([step("a", [1.1, 1.1], [0.7, 0.9], 8.0)], False, "its spread within 30 %"),
        # as dear as the DNS
        ([step("a", [1.1, 1.1], [1.0, 1.0], 150.0)], False, "every rung below the DNS drifts or"),
        # the cheapest of those that are good enough
        (
            [step("a", [1.2, 1.2], [1.0, 1.0], 20.0, 96), step("b", [1.3, 1.1], [1.0, 1.0], 9.0)],
            False,
            "a 64x64 run from a moved start is within 1.30 of the true ensemble",
        ),
    ],
)
def test_the_numbers_decide_the_verdict(steps, narrow, words):
    assert words in advise.judge(EXPERIMENT, [*steps, DNS], [True, True], narrow, 1.3)


def test_a_late_lead_time_decides_nothing():
    drifts = [step("a", [1.2, 9.0], [1.0, 0.2], 8.0)]
    assert "a 64x64 run" in advise.judge(EXPERIMENT, [*drifts, DNS], [True, False], False, 1.3)
    assert "drifts" in advise.judge(EXPERIMENT, [*drifts, DNS], [True, True], False, 1.3)


def test_twins_come_together_at_the_rate_that_is_measured():
    times = [0.1 * index for index in range(13)]
    found = advise.time_to_converge(times, [math.exp(-1.5 * time) for time in times])
    assert found == pytest.approx(math.log(10) / 1.5)
    assert advise.time_to_converge(times, [1.0 + 0.01 * time for time in times]) == math.inf


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--grids", "16"], "--grids 16: expected even numbers from the reduced solver's 24"),
        (["--grids", "40,x"], "--grids 40,x: expected whole numbers, for example 48,64,80"),
        (["--within", "0.9"], "--within 0.9: expected a number above 1"),
    ],
)
def test_what_cannot_be_is_one_line(path, run, words, line):
    code, _, error = run(path, *words)
    assert code == 2 and line in error and error.count("\n") == 1


def test_other_closures_are_known_exactly(run):
    code, _, error = run("diffusion_64")
    assert code == 2 and "the law of this closure is known exactly" in error


def test_a_plan_writes_nothing(path, run, tmp_path):
    code, out, _ = run(path, f"root={tmp_path}", "--dry-run")
    assert not code and "ladder: 24^2, 36^2, 48^2, 60^2" in out and not list(tmp_path.iterdir())
