"""Closures of a stored DNS of others: the defect of a reduced solver, written in our layout."""

import h5py
import numpy as np
import outside_case as case
import pytest
import yaml

from hpc_closure.data.opening import open_data
from hpc_closure.data.reader import DataSet
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.generate import outside_block
from hpc_closure.generate import verb as generate
from hpc_closure.train import verb as train
from hpc_closure.work.options import Options
from hpc_closure.work.stop import Stopped

PHYSICS = {
    "equation": "vorticity2d",
    "viscosity": 0.01,
    "noise": {"kind": "none"},
    "initial": {"kind": "gaussian_field"},
    "length": 1.0,
}
SOLVER = {"scheme": "rk4", "dt": 0.01}
RECORD = {"start": 0.0, "every": 0.04, "precision": "float64"}
LATER = {
    "rollout": {"t_start": 0.0, "t_end": 0.16, "every": 0.08, "interval": 4, "baselines": []},
    "evaluate": {"lead_times": [0.08]},
    "model": {"preset": "gaussian", "conditions": {"sensors": "none"}},
    "train": {"split": [0.6, 0.2, 0.2], "steps": 5, "batch": 4},
    "cluster": {"device": "cpu", "threads": 1, "members_per_block": 2},
}


def run(folder, name, more, options=Options()):
    values = {"name": name, "root": str(folder / "runs"), **LATER, **more}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    experiment = reading.load(path)
    assert generate.run(experiment, options) == 0
    return experiment


@pytest.fixture(scope="module")
def dns(tmp_path_factory):
    """A DNS on 32 points, whose states alone are stored, and its closures on 16."""
    folder = tmp_path_factory.mktemp("dns")
    fine = {**SOLVER, "grid": 32, "members": 5, "t_end": 0.4, "certificate": "reported"}
    with_closure = {**fine, "closure": "subgrid", "interval": 4, "record": {**RECORD, "grid": 16}}
    ours = run(folder, "ours", {"physics": PHYSICS, "generate": with_closure})
    alone = {**fine, "closure": "none", "record": RECORD}
    return folder, run(folder, "fine", {"physics": PHYSICS, "generate": alone}), ours


def section(dns, **more):
    folder = Run.of(dns[1]).data
    return {"path": str(folder), "state": {"w": "vorticity"}, "spacing": 0.04, **more}


def others(dns, name, **more):
    """An experiment that computes the closures of the stored states."""
    values = {
        "physics": PHYSICS,
        "generate": SOLVER,
        "reduced": {"grid": 16},
        "data": section(dns),
        **more,
    }
    return run(dns[0], name, values)


def test_closures_are_those_of_our_own_dns(dns):
    experiment = others(dns, "same")
    made, ours = open_data(experiment), DataSet(Run.of(dns[2]).data)
    assert experiment.generate.interval == 4 and experiment.generate.dt == 0.01
    assert made.grid == 16 and len(made.times) == 10  # the last state has no later one
    for member in (0, 4):
        for name, slack in (("state", 1e-12), ("closure", 1e-9)):
            got, want = made.read(member, slice(None), name), ours.read(member, slice(0, 10), name)
            assert np.abs(got - want).max() <= slack * np.abs(want).max()
    assert train.run(experiment) == 0


def test_a_longer_interval_uses_every_second_state(dns):
    experiment = others(dns, "longer", data=section(dns, interval=0.08))
    made = open_data(experiment)
    np.testing.assert_allclose(made.times, 0.08 * np.arange(5))
    again = open_data(others(dns, "same"))
    np.testing.assert_array_equal(made.read(2, 3), again.read(2, 6))


def test_filters(dns):
    sharp = open_data(others(dns, "sharp", data=section(dns, filter={"modes": 3})))
    state = np.fft.fft2(sharp.read(1, 2))
    waves = np.abs(np.fft.fftfreq(16, 1 / 16))
    assert np.abs(state[waves > 3]).max() < 1e-10 < np.abs(state[waves == 3]).max()
    smooth = section(dns, filter={"kind": "gaussian", "width": 0.2})
    soft = np.fft.fft2(open_data(others(dns, "gaussian", data=smooth)).read(1, 2))
    own = np.fft.fft2(open_data(others(dns, "same")).read(1, 2))
    factor = np.exp(-((2 * np.pi) ** 2) * (2**2 + 1) * 0.2**2 / 24)
    assert soft[2, 1] / own[2, 1] == pytest.approx(factor, rel=1e-9)


def test_a_filter_of_yours(dns, tmp_path):
    (tmp_path / "mine.py").write_text("def K(fields):\n    return fields[..., ::2, ::2] * 2.0\n")
    python = {"python": f"{tmp_path / 'mine.py'}:K"}
    made = open_data(others(dns, "python", data=section(dns, filter=python)))
    fine = DataSet(Run.of(dns[1]).data)
    np.testing.assert_array_equal(made.read(1, 2), 2 * fine.read(1, 2)[::2, ::2])
    (tmp_path / "other.py").write_text("def K(fields):\n    return fields\n")
    wrong = {"python": f"{tmp_path / 'other.py'}:K"}
    path = dns[0] / "wrong.yaml"
    with pytest.raises((ValueError, AssertionError, RuntimeError)):
        others(dns, "wrong", data=section(dns, filter=wrong))
    errors = list(Run.of(reading.load(path)).units("generate").glob("*.error"))
    assert "returned the shape" in errors[0].read_text()


def test_an_interrupted_unit_goes_on(dns, monkeypatch):
    record, seen = outside_block.OutsideBlock.record, []

    def stopping(self):
        if "stop" not in seen and seen[-2:] == [2, 3]:
            seen.append("stop")
            raise Stopped("the test")
        seen.append(self.step_index)
        return record(self)

    monkeypatch.setattr(outside_block.OutsideBlock, "record", stopping)
    often = {"cluster": {**LATER["cluster"], "checkpoint_every": 1e-6}}
    with pytest.raises(AssertionError, match="75"):
        others(dns, "stopped", **often)
    experiment = others(dns, "stopped", **often)
    monkeypatch.undo()
    assert seen[:5] == [0, 1, 2, 3, "stop"] and seen[5] in (3, 4)  # not from the beginning
    made, same = open_data(experiment), open_data(others(dns, "same"))
    for member in range(5):
        for name in ("state", "closure"):
            np.testing.assert_array_equal(
                made.read(member, slice(None), name), same.read(member, slice(None), name)
            )


def test_members_that_are_left_out_are_lost(dns):
    made = open_data(others(dns, "skipped", data=section(dns, skip=[2])))
    assert made.lost == [2] and made.whole == [0, 1, 3, 4]
    assert np.isfinite(made.read(3, slice(None), "closure")).all()


def test_a_solver_of_yours_and_nothing_else(tmp_path):
    """Two fields of another flow; the closure of a known step is known."""
    state, _ = case.fields(8, 6, seed=4)
    path = tmp_path / "raw.h5"
    with h5py.File(path, "w") as file:
        file["h"], file["p"], file["t"] = state, 2 * state, 0.5 * np.arange(6)
    (tmp_path / "mine.py").write_text(
        "class Reduced:\n    dt = 0.1\n    def step(self, v, n):\n        return v * 0.9**n\n"
    )
    values = {
        "data": {
            "path": "raw.h5",
            "state": ["h", "p"],
            "dims": list(case.DIMS),
            "length": 3.0,
        },
        "reduced": {"python": "mine.py:Reduced"},
    }
    for key in ("rollout", "evaluate"):
        values[key] = {}
    experiment = run(tmp_path, "mine", values)
    made = open_data(experiment)
    assert made.channels == ("h", "p") and experiment.physics.equation == "external"
    want = (state[3, 2] - 0.9**5 * state[3, 1]) / 0.5
    np.testing.assert_allclose(made.read(3, 1, "closure")[1], 2 * want, atol=2e-6)


def test_no_solver_is_one_line(dns, tmp_path):
    values = {"data": section(dns, length=1.0), "name": "none", "root": str(tmp_path)}
    (tmp_path / "none.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="no reduced solver to compute it: state reduced.python"):
        generate.run(reading.load(tmp_path / "none.yaml"))
