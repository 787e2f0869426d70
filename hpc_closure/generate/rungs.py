"""Bare solvers on grids of their own, without closure: how they begin and how they run.

A *rung* knows of a start what the reduced solver knows: the resolved modes, and how they came
about. Its further modes are none (``empty``), the start's own moved in space by a random distance
(``moved``), or these after they have followed the resolved past (``synchronised``): the resolved
modes are put in at every stored time, and in between the rung runs on its own. In two dimensions
unresolved scales that follow the resolved ones find their places so (Inubushi and Caulfield, JFM
2026, arXiv 2508.16920). ``mismatched`` is the control: the past of another start.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_closure.closure.fields import keyed_noise
from hpc_closure.spectral.modes.grid import from_row, resize, retained_modes
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

FOLLOW = ("synchronised", "mismatched")  # starts that read the past


@dataclass(frozen=True)
class Known:
    """What is known of starts, as spectra of the solver (on a line without a row).

    Attributes:
        now: (cases, ...) resolved modes at the start.
        whole: (cases, ...) all modes at the start, for those that are moved; None = not there.
        past: resolved modes before the start, oldest first, ``every`` apart, each (cases, ...).
        other: the same of other starts; for ``mismatched``.
        every: time from one to the next, and to the start.
    """

    now: Tensor
    whole: Tensor | None = None
    past: Sequence[Tensor] = ()
    other: Sequence[Tensor] = ()
    every: float = 0.0


def rung_problem(
    problem: Problem, grid: int, stride: int = 1, drain: Sequence[float] = ()
) -> Problem:
    """The full system on ``grid`` points a side, with the stochastic forcing that it resolves.

    Args:
        problem: the full system.
        grid: points per side.
        stride: steps of the full system in one of its own.
        drain: damping rate of each integer shell.
    """
    rung = problem.replace(grid=grid, dt=stride * problem.dt, drain=tuple(drain))
    if rung.physics.noise.kind == "none":
        return rung
    vectors, _ = rung.physics.noise.law(rung.make_grid())
    modes = retained_modes(grid)
    if (abs(vectors) <= modes).all(axis=1).any():
        return rung
    return rung.replace(noise={"kind": "none"})


def begin(
    simulation: Simulation,
    start: str,
    known: Known,
    case_of_row: Tensor,
    step: int,
    stage: str,
    past: float = 0.0,
) -> None:
    """Put the members of a rung at their starts.

    Args:
        simulation: the rung; members are ids of draws, one row each.
        start: ``empty``, ``moved``, ``synchronised`` or ``mismatched``.
        known: of the cases.
        case_of_row: (rows,) place of each row's start among the cases.
        step: the rung's own step at the start.
        stage: of the draws by which members differ.
        past: time for which they follow the resolved modes, where they do.
    """
    modes, sides = simulation.grid.modes, simulation.grid.dimensions
    if start == "empty":
        now = resize(known.now, modes, sides)[case_of_row]
        simulation.load_state(step, now)
        return
    assert known.whole is not None
    moves = keyed_noise.moves(simulation.grid, simulation.seed, stage, simulation.members)
    moved = resize(known.whole, modes, sides)[case_of_row]
    simulation.load_state(step, moved * from_row(moves, sides).to(moved))
    if start in FOLLOW:
        frames = known.past if start == "synchronised" else known.other
        frames = frames[len(frames) - round(past / known.every) :]
        steps = simulation.problem.steps_in(known.every)
        simulation.load_state(max(step - steps * len(frames), 0), simulation.state)
        for resolved in frames:
            impose(simulation, resolved[case_of_row])
            simulation.forget().advance(steps)
    simulation.load_state(step, simulation.state)
    impose(simulation, known.now[case_of_row])


def impose(simulation: Simulation, resolved: Tensor) -> None:
    """Put in the resolved modes, (rows, ...) spectra."""
    modes, sides = simulation.grid.modes, simulation.grid.dimensions
    inside = resize(torch.ones_like(resolved[:1]), modes, sides).real > 0
    whole = resize(resolved, modes, sides).to(simulation.state)
    torch.where(inside.to(simulation.device), whole, simulation.state, out=simulation.state)
