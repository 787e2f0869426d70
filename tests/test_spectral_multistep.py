"""The compiled update of Adams-Bashforth 3 has the bits of the array operations."""

import pytest
import torch

from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

LAYERS = {
    "equation": "two_layer_qg",
    "length": 6.0,
    "deformation_radius": 0.5,
    "mean_flow": [0.3, 0.0],
    "beta": 0.2,
    "drag": 0.1,
    "noise": {"kind": "ring", "wavenumber": 2.5, "width": 0.5, "energy_rate": 0.1},
}
FLOWS = {
    "layers": LAYERS,
    "viscous": {"viscosity": 1e-3},
    "line": {"equation": "burgers1d", "viscosity": 0.02},
}


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("flow", FLOWS)
def test_bits_are_those_of_array_operations(flow, precision):
    problem = Problem(grid=32, dt=0.002, scheme="ab3", precision=precision, **FLOWS[flow])
    runs = [Simulation(problem, range(3), 1).initialise() for _ in range(2)]
    assert runs[0].scheme._compiled is not None
    runs[1].scheme._compiled = None
    for run in runs:
        run.advance(9)
    assert torch.equal(runs[0].state, runs[1].state) and runs[0].state.isfinite().all()
    assert torch.equal(runs[0].scheme._past, runs[1].scheme._past)
