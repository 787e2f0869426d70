"""``hpc-closure bench solver``: what the package adds to the steps of a user's solver.

Both contenders take n steps from the same states: the solver alone, from arrays of its own
library, and the members of a coupled run, from spectra to spectra.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from hpc_closure.bench import measure
from hpc_closure.bench.measure import Advance, Timing
from hpc_closure.closure.targets import users_solver
from hpc_closure.spectral.outside.arrays import to_library
from hpc_closure.spectral.outside.problem import OutsideProblem
from hpc_closure.spectral.outside.simulation import OutsideSimulation
from hpc_closure.spectral.problem import Problem

COLUMNS = measure.columns("grid:d members:d interval:d method microseconds:.2f ratio:.3f")


def run(
    python: str, grid: int, members: int, intervals: Sequence[int], timing: Timing
) -> list[dict[str, Any]]:
    """Time all intervals; returns records of microseconds per step and member, with ratios.

    Args:
        python: the solver, ``file.py:Name`` or ``module:Name``.
        grid: points per side, of a plane and one field.
        members: number of members.
        intervals: steps between two calls of a closure.
        timing: settings of the comparison.
    """
    return [
        {
            "grid": grid,
            "members": members,
            "interval": interval,
            "method": name,
            "microseconds": 1e6 * statistics.median(seconds) / (members * interval),
            "ratio": measure.ratio(taken["solver alone"], seconds),
            **timing.columns,
        }
        for interval in intervals
        for taken in [measure.interleave(_contenders(python, grid, members, interval), timing)]
        for name, seconds in taken.items()
    ]


def _contenders(python: str, grid: int, members: int, interval: int) -> dict[str, Advance]:
    """Return functions that take a number of intervals, each from the same states."""
    solver = users_solver(python, "solver")
    problem = OutsideProblem.of_solver(Problem(equation="external", grid=grid), grid, solver)
    simulation = OutsideSimulation(problem, range(members), 0)
    angle = torch.arange(grid, dtype=torch.float64) * (2 * torch.pi / grid)
    moved = angle + torch.arange(members)[:, None]  # each member has its own phase
    start = simulation.spectra_of(moved.sin()[:, :, None] + (2 * moved).cos()[:, None, :])
    simulation.load_state(0, start).advance(interval)
    fields = to_library(simulation.fields_of(start), solver.library)

    def alone() -> Any:
        ends = solver.solver.step(fields, interval)
        return ends.block_until_ready() if solver.library == "jax" else ends

    def coupled() -> None:
        simulation.state.copy_(start)
        simulation.forget().advance(interval)

    return {
        "solver alone": measure.repeat(alone),
        "in the package": measure.repeat(coupled),
    }
