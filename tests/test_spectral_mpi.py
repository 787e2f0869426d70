"""Slabs: the same bits on 1, 2, 3, 4 and 6 ranks that share one field."""

import json
import sys

import pytest

RANKS = [2, 3, pytest.param(4, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow)]

PROGRAM = """
from mpi4py import MPI
import hashlib, json
import numpy as np, torch
torch.set_num_threads(1)
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.spectral.diagnostics import Diagnostics

world = MPI.COMM_WORLD
wiener = {"kind": "q_wiener", "amplitude": 5e-4, "draws": 10, "correlation": 0.005}
ring = {"kind": "ring", "wavenumber": 9, "width": 1, "energy_rate": 0.02}
ou = {"kind": "ornstein_uhlenbeck", "wavenumber": 4, "rms": 0.5, "correlation_time": 0.01}
cases = {
    "published": {"noise": wiener, "forcing": {"kind": "published"}},
    "published32": {"noise": wiener, "precision": "float32"},
    "grid of 48": {"noise": wiener, "grid": 48},
    "grid without compiled functions": {"noise": wiener, "grid": 28},
    "coloured": {"noise": ou},
    "flux": {"form": "flux", "forcing": {"kind": "kolmogorov", "wavenumber": 3}},
    "ab2": {"scheme": "cn_ab2", "noise": ring},
    "etdrk4": {"scheme": "etdrk4", "beta": 5.0, "drag": 0.1, "hyperviscosity": 1e-9},
    "imex_rk3": {"scheme": "imex_rk3", "noise": ring, "forcing": {"kind": "ring"}},
    "taylor green": {"viscosity": 0.02, "initial": {"kind": "taylor_green", "wavenumber": 2}},
    "amplitude": {"noise": {**wiener, "kind": "state_amplitude", "strength": 2.0}},
    "amplitude32": {"noise": {**wiener, "kind": "state_amplitude"}, "precision": "float32"},
    "regimes": {"noise": {**wiener, "kind": "two_regimes", "hold": 4e-3}, "scheme": "cn_ab2"},
    "adaptive": {"dt": 8e-3, "cfl": 0.01, "noise": wiener, "max_refinements": 5},
}
result = {}
for name, change in cases.items():
    problem = Problem(**{"grid": 32, **change})
    sim = Simulation(problem, [0, 4, 7], 3, comm=world).initialise().advance(6)
    saved = sim.save_state()
    if name == "taylor green":
        z = -0.02 * 8 * sim.grid.unit**2 * problem.dt / 2
        exact = ((1 + z) / (1 - z)) ** 6 * sim.grid.unit
        assert abs(abs(saved["w_hat"]).max() - exact) < 1e-12 * exact
    extra = sim.noise_hat() * 2
    sim.load_state(**saved).advance(2, extra)
    series = Diagnostics(sim).measure()
    field = sim.fields(["vorticity"], size=problem.grid + 6)["vorticity"]
    digest = hashlib.sha256(sim.save_state()["w_hat"].tobytes())
    digest.update(np.ascontiguousarray(field.numpy()).tobytes())
    numbers = hashlib.sha256()
    for key in sorted(series):
        numbers.update(np.ascontiguousarray(series[key]).tobytes())
    result[name] = digest.hexdigest() + numbers.hexdigest()
    if name == "adaptive":
        result["levels"] = sim.levels().tolist()
if world.rank == 0:
    print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def result(mpirun):
    """Digests of every case on a number of ranks; one run each."""
    known = {}

    def get(ranks):
        if ranks not in known:
            run = mpirun(ranks, [sys.executable, "-c", PROGRAM], timeout=600)
            assert run.returncode == 0, run.stderr[-3000:]
            known[ranks] = json.loads(run.stdout.strip().splitlines()[-1])
        return known[ranks]

    return get


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", RANKS)
def test_states_and_sums_do_not_depend_on_the_number_of_ranks(result, ranks):
    one, many = result(1), result(ranks)
    assert {name for name in one if one[name] != many[name]} == set()


@pytest.mark.mpi
def test_the_adaptive_case_adapts(result):
    assert max(result(1)["levels"]) > 0


def test_a_line_is_not_split():
    from hpc_closure.spectral.modes.grid import Grid
    from hpc_closure.spectral.modes.transform import Transform

    class TwoRanks:
        def Get_size(self):
            return 2

        def Get_rank(self):
            return 0

    with pytest.raises(ValueError, match="domain_ranks"):
        Transform(Grid(16, dimensions=1), comm=TwoRanks())
