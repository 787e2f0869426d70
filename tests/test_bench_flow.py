"""Measurements of three-dimensional flow."""

import numpy as np
import pytest
from typer.testing import CliRunner

from hpc_closure.bench.cli import app
from hpc_closure.bench.measure import Timing
from hpc_closure.bench.physics import turbulence
from hpc_closure.bench.solver import flow


def test_speed_beside_the_rotational_form_in_scipy():
    timing = Timing(steps=1, repeats=1)
    records, remarks = flow.run(flow.Case(grid=12, members=2, against=("scipy",), timing=timing))
    assert [record["method"] for record in records] == ["ours", "scipy"]
    assert "of the change in four steps" in remarks[0]
    problem = turbulence.Case(grid=12).problem()
    assert flow.difference("scipy", problem, range(2)) < 1e-13  # another form, another transform


def test_speed_beside_exponax():
    pytest.importorskip("exponax")
    case = flow.Case(grid=16, members=2, against=("exponax",), timing=Timing(steps=1, repeats=1))
    records, remarks = flow.run(case)
    assert [record["method"] for record in records] == ["ours", "exponax"]
    assert {record["scheme"] for record in records} == {"etdrk4"}
    problem = flow.problem_of(case, "exponax")
    assert flow.difference("exponax", problem.replace(viscosity=0.1), range(2)) < 1e-12


def test_a_peer_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    records, remarks = flow.run(flow.Case(grid=12, against=("exponax",)))
    assert records == [] and remarks == ["  exponax: not installed (pip install exponax)"]


def test_turbulence_of_a_coarse_grid():
    case = turbulence.Case(grid=12, viscosity=0.1, dt=0.05, spin_up=1.0, span=2.0, every=0.1)
    record = turbulence.run(case)
    assert abs(record["balance"] - 1) < 2e-3
    assert -0.5 < record["skewness"] < -0.1 and 3 < record["flatness"] < 4
    speed = np.sqrt(2 * record["energy"] / 3)
    length = np.sqrt(15 * 0.1 / record["dissipation"]) * speed
    assert record["re_lambda"] == pytest.approx(speed * length / 0.1)


def test_bad_options_are_one_line():
    result = CliRunner().invoke(app, ["turbulence", "--grid", "12", "--dt", "0.3"])
    assert result.exit_code != 0
    result = CliRunner().invoke(app, ["flow", "--against", "nek"])
    assert "expected one of scipy, exponax" in str(result.exception)
