"""Rungs: bare solvers (no closure) on finer grids; their problems and initial states.

A *rung* knows of a start what the reduced solver knows: the resolved modes and their past. Its
other modes begin in one of these ways:

* ``empty``: at zero;
* ``moved``: as the start's modes, shifted in space by a random distance;
* ``synchronised``: as ``moved``, then the rung follows the resolved past: the resolved modes are
  overwritten at every stored time, and in between the rung runs freely. In two dimensions,
  unresolved scales that are slaved to the resolved ones recover their places in this way
  (Inubushi and Caulfield, JFM 2026, arXiv 2508.16920);
* ``mismatched``: as ``synchronised`` with the past of another start, as a control.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_closure.closure.fields import keyed_noise
from hpc_closure.spectral.ensemble import Ensemble
from hpc_closure.spectral.modes.grid import resize
from hpc_closure.spectral.modes.resolution import retained_modes
from hpc_closure.spectral.problem import Problem

FOLLOW = ("synchronised", "mismatched")  # starts that follow the resolved past


@dataclass(frozen=True)
class Known:
    """Known spectra of the starts.

    Attributes:
        now: (cases, ...) resolved modes at the start.
        whole: (cases, ...) all modes at the start, needed for ``moved``; None = not stored.
        past: resolved modes before the start, oldest first, each (cases, ...).
        other: as ``past``, of other starts; for ``mismatched``.
        every: time between neighbouring entries of ``past``, and from the last to the start.
    """

    now: Tensor
    whole: Tensor | None = None
    past: Sequence[Tensor] = ()
    other: Sequence[Tensor] = ()
    every: float = 0.0


def rung_problem(
    problem: Problem, grid: int, stride: int = 1, drain: Sequence[float] = ()
) -> Problem:
    """Return the full system on ``grid`` points per side, with the forcing that this resolves.

    The stochastic forcing is dropped if none of its wavevectors is retained.

    Args:
        problem: the full system.
        grid: points per side.
        stride: steps of the full system per step of the rung.
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
    simulation: Ensemble,
    start: str,
    known: Known,
    case_of_row: Tensor,
    step: int,
    stage: str,
    past: float = 0.0,
) -> None:
    """Set the members of a rung to their initial states.

    Args:
        simulation: the rung; its members are the ids of the random shifts, one row each.
        start: ``empty``, ``moved``, ``synchronised`` or ``mismatched``.
        known: spectra of the cases.
        case_of_row: (rows,) index of each row's start among the cases.
        step: step number of the rung at the start.
        stage: stage in the key of the random shifts.
        past: time for which ``synchronised`` and ``mismatched`` follow the resolved modes.
    """
    modes = simulation.grid.mode_counts
    if start == "empty":
        now = resize(known.now, modes)[case_of_row]
        simulation.load_state(step, now)
        return
    assert known.whole is not None
    moves = keyed_noise.moves(simulation.grid, simulation.seed, stage, simulation.members)
    moved = resize(known.whole, modes)[case_of_row]
    factors = moves.to(moved)
    if simulation.channel_shape:
        factors = factors[:, None]
    simulation.load_state(step, moved * factors)
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


def impose(simulation: Ensemble, resolved: Tensor) -> None:
    """Overwrite the resolved modes of a simulation with spectra (rows, ...)."""
    modes = simulation.grid.mode_counts
    is_resolved = resize(torch.ones_like(resolved[:1]), modes).real > 0
    spectra = resize(resolved, modes).to(simulation.state)
    torch.where(is_resolved.to(simulation.device), spectra, simulation.state, out=simulation.state)
