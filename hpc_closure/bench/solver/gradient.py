"""Time of a gradient through the solver, relative to the solver.

``solver`` is the simulation. ``traced`` takes the same steps in operations that autograd can
differentiate, without a gradient. ``gradient`` adds the gradient of the final enstrophy with
respect to the initial state. The last two use FFTs, and on small grids also matrices.
"""

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from hpc_closure.bench import measure
from hpc_closure.bench.measure import Advance, Timing
from hpc_closure.spectral.differentiable import STRETCH, DifferentiableSolver
from hpc_closure.spectral.modes.differentiable import MATRICES
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

PRECISIONS = ("float32", "float64")
COLUMNS = measure.columns("grid:d members:d precision method microseconds:.2f ratio:.2f")


def run(
    grids: Sequence[int], members: int, timing: Timing, precisions: Sequence[str] = PRECISIONS
) -> list[dict[str, Any]]:
    """Time all cases; returns records of microseconds per step and member, with ratios."""
    return [
        {
            "grid": grid,
            "members": members,
            "precision": precision,
            "method": name,
            "microseconds": 1e6 * statistics.median(seconds) / (members * STRETCH),
            "ratio": measure.ratio(taken["solver"], seconds),
            **timing.columns,
        }
        for grid in grids
        for precision in precisions
        for taken in [
            measure.interleave(_contenders(grid, members, precision, timing.device), timing)
        ]
        for name, seconds in taken.items()
    ]


def _contenders(grid: int, members: int, precision: str, device: str) -> dict[str, Advance]:
    """Create functions that advance by a number of stretches, all from the same developed flow."""
    problem = Problem(
        grid=grid,
        viscosity=1e-4,
        dt=2e-3,
        scheme="cn_ab2",
        precision=precision,
        initial={"kind": "band", "wavenumber": 4, "width": 2, "energy": 0.01},
    )
    simulation = Simulation(problem, range(members), 0, device=device, threads=1)
    start = simulation.initialise().advance(500).state.clone()

    contenders: dict[str, Advance] = {
        "solver": measure.repeat(lambda: simulation.load_state(0, start).advance(STRETCH))
    }
    ways = {"matrices": MATRICES, "ffts": 0} if grid <= MATRICES else {"ffts": 0}
    for way, largest in ways.items():
        traced = DifferentiableSolver(problem, device, largest)
        contenders[f"traced, {way}"] = measure.repeat(partial(_forward, traced, start))
        contenders[f"gradient, {way}"] = measure.repeat(partial(_backward, traced, start))
    return contenders


@torch.no_grad()
def _forward(solver: DifferentiableSolver, start: torch.Tensor) -> None:
    solver.advance(start, STRETCH)


def _backward(solver: DifferentiableSolver, start: torch.Tensor) -> None:
    begin = start.clone().requires_grad_()
    solver.advance(begin, STRETCH)[0].abs().square().sum().backward()
