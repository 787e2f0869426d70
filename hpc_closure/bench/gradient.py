"""Time of a gradient through the solver, relative to the solver.

``solver`` is the simulation. ``traced`` takes the same steps in operations that autograd can
differentiate, without a gradient. ``gradient`` adds the gradient of the final enstrophy with
respect to the initial state. The last two use FFTs, and on small grids also matrices.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hpc_closure.bench import measure
from hpc_closure.bench.measure import Timing
from hpc_closure.spectral.differentiable import STRETCH, DifferentiableSolver
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
    """Time all cases; returns records of microseconds per step and member, with ratios."""
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

    def solver(count: int) -> None:
        for _ in range(count):
            simulation.load_state(0, start)
            simulation.advance(STRETCH)

    contenders_by_name: dict[str, Callable[[int], None]] = {"solver": solver}
    for way, largest in (("matrices", MATRICES), ("ffts", 0)):
        if grid > MATRICES and way == "matrices":
            continue
        traced = DifferentiableSolver(problem, device, largest)
        contenders_by_name[f"traced, {way}"] = _forward(traced, start)
        contenders_by_name[f"gradient, {way}"] = _backward(traced, start)
    return contenders_by_name


def _forward(solver: DifferentiableSolver, start: torch.Tensor) -> Callable[[int], None]:
    @torch.no_grad()
    def advance(count: int) -> None:
        for _ in range(count):
            solver.advance(start, STRETCH)

    return advance


def _backward(solver: DifferentiableSolver, start: torch.Tensor) -> Callable[[int], None]:
    def advance(count: int) -> None:
        for _ in range(count):
            begin = start.clone().requires_grad_()
            solver.advance(begin, STRETCH)[0].abs().square().sum().backward()

    return advance
