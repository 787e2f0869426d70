"""Time of a gradient through the solver, in the solver's own time.

``solver`` is the simulation; ``traced`` the same steps in operations that autograd sees, without a
gradient; ``gradient`` these and the gradient of the end's enstrophy with respect to the start. The
last two by matrices, where the grid is small enough to be worth it, and by FFTs.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hpc_closure.bench import measure
from hpc_closure.bench.measure import Timing
from hpc_closure.spectral.differentiable import STRETCH, TracedSolver
from hpc_closure.spectral.modes.differentiable import MATRICES
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

COLUMNS = {
    "grid": "d",
    "members": "d",
    "precision": "",
    "method": "",
    "microseconds": ".2f",
    "ratio": ".2f",
}


def run(
    grids: Sequence[int], members: int, precisions: Sequence[str], timing: Timing
) -> list[dict[str, Any]]:
    """Records: microseconds a step and member, and over the solver's."""
    records = []
    for grid in grids:
        for precision in precisions:
            contenders = _contenders(grid, members, precision, timing.device)
            taken = measure.interleave(contenders, timing)
            for name in contenders:
                time = statistics.median(taken[name])
                records.append(
                    {
                        "grid": grid,
                        "members": members,
                        "precision": precision,
                        "method": name,
                        "microseconds": 1e6 * time / (members * STRETCH),
                        "ratio": measure.ratio(taken["solver"], taken[name]),
                        "device": timing.device,
                        "threads": torch.get_num_threads(),
                        "repeats": timing.repeats,
                    }
                )
    return records


def _contenders(
    grid: int, members: int, precision: str, device: str
) -> dict[str, Callable[[int], None]]:
    """What takes a number of stretches, each from the same developed flow."""
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

    def solver(count: int) -> None:
        for _ in range(count):
            simulation.load_state(0, start)
            simulation.advance(STRETCH)

    found: dict[str, Callable[[int], None]] = {"solver": solver}
    for way, largest in (("matrices", MATRICES), ("ffts", 0)):
        if grid > MATRICES and way == "matrices":
            continue
        traced = TracedSolver(problem, device, largest)
        found[f"traced, {way}"] = _forward(traced, start)
        found[f"gradient, {way}"] = _backward(traced, start)
    return found


def _forward(solver: TracedSolver, start: torch.Tensor) -> Callable[[int], None]:
    @torch.no_grad()
    def advance(count: int) -> None:
        for _ in range(count):
            solver.advance(start, STRETCH)

    return advance


def _backward(solver: TracedSolver, start: torch.Tensor) -> Callable[[int], None]:
    def advance(count: int) -> None:
        for _ in range(count):
            begin = start.clone().requires_grad_()
            solver.advance(begin, STRETCH)[0].abs().square().sum().backward()

    return advance
