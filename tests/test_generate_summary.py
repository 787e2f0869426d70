"""What is said of an ensemble: a drift that is there, and the closure's size."""

from types import SimpleNamespace

import numpy as np
import pytest

from hpc_closure.experiment.schema import Experiment
from hpc_closure.generate import summary
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.simulation import Simulation

SUBGRID = {
    "generate": {
        "grid": 64, "t_end": 60, "closure": "subgrid", "interval": 5,
        "record": {"start": 1.0, "grid": 32},
    },
    "model": {"conditions": {"sensors": "none"}},
    "physics": {"noise": {"kind": "none"}},
}  # fmt: skip


class Series:
    """Diagnostics of members as a data set; one member diverged."""

    members, lost, whole, times = range(21), [20], range(20), np.arange(8.0)

    def __init__(self, drift):
        rng = np.random.default_rng(3)
        steps = np.arange(8) >= 4
        self.values = 2.0 + rng.normal(0, 0.2, (21, 8)) + drift * steps
        self.values[20] = np.nan

    def read(self, member, index, field):
        assert field == "scalars/enstrophy"
        return self.values[member, index]


@pytest.mark.parametrize(
    "drift, verdict", [(0.0, ": stationary"), (0.2, ": not stationary, record later")]
)
def test_a_drift_is_told_where_it_is_certain(drift, verdict):
    told = summary.drift(Series(drift), "enstrophy")
    assert verdict in told and "enstrophy 2" in told
    change = float(told.split("changes by ")[1].split(" %")[0])
    assert change == pytest.approx(100 * drift / 2.0, abs=4)


def test_the_closures_share_is_over_the_reduced_solvers_own_tendency():
    experiment = Experiment(**SUBGRID)
    problem = experiment.problem.replace(grid=32)
    solver = Simulation(problem, [0, 1], 0).initialise()
    start = solver.state.clone()
    solver.advance(5)
    moved = (solver.state - start) / (5 * problem.dt)
    transform = Transform(problem.make_grid())
    fields = {
        "state": transform.to_physical(start).numpy(),
        "closure": 0.25 * transform.to_physical(moved).numpy(),
    }
    data = SimpleNamespace(
        members=[0, 1],
        whole=[0, 1],
        times=np.zeros(1),
        grid=32,
        dimensions=2,
        channels=(),
        read=lambda m, t, name: fields[name][m],
    )
    said = summary.share(experiment, data, 1)
    assert said.startswith("closure: 0.25 times the reduced solver's")
    assert len(summary.lines(experiment, data, 1)) == 1
