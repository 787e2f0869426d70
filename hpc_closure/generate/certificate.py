"""A certificate per block of members: what vouches for its trajectories.

Run at the end of a block, on copies of its state, of the members that have not diverged; it
changes nothing. The checks:

* the CFL number is below its limit;
* the energy budget closes, the scheme's own term included (:meth:`Diagnostics.budget`);
* the smallest scale is resolved: ``k_max eta`` with ``eta = (nu^3 / chi)^(1/6)``, chi the
  enstrophy dissipation (for hyperviscosity of order p, ``eta = (nu_h^3 / chi)^(1 / 6p)``);
* the enstrophy spectrum falls off: its last shells against its highest;
* aliasing and truncation are small: the same members, from the same state and on the same noise
  path, advanced on a grid 1.5 times finer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from hpc_closure.spectral.diagnostics import Diagnostics
from hpc_closure.spectral.modes.grid import resize
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

#: largest values allowed (``kmax_eta``: smallest); a figure that does not apply is None
LIMITS = {"cfl": 1.0, "budget": 1e-3, "kmax_eta": 0.5, "tail": 0.1, "aliasing": 0.05}


@dataclass
class Certificate:
    """Worst figures over the members of a block, and the reasons why it fails, if any."""

    figures: dict[str, float | None]
    limits: dict[str, float]
    steps: int
    reasons: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """True when no figure is beyond its limit."""
        return not self.reasons

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a file."""
        return {"passed": self.passed, **asdict(self)}

    def check(self) -> Certificate:
        """Return itself.

        Raises:
            RuntimeError: the block must not be kept; the message says why and what to do.
        """
        if self.reasons:
            raise RuntimeError("certificate failed: " + "; ".join(self.reasons))
        return self


def certify(
    simulation: Simulation,
    *,
    steps: int = 10,
    max_members: int = 4,
    limits: dict[str, float] | None = None,
) -> Certificate:
    """Certify the present state of a simulation.

    Args:
        simulation: left as it is, but that a diverged member is all NaN. On slabs every rank
            must call.
        steps: steps of the budget and of the aliasing probe.
        max_members: members that the budget and the probe run on (the first ones); CFL,
            spectrum tail and ``k_max eta`` are checked on all.
        limits: limits that differ from ``LIMITS``.
    """
    allowed = {**LIMITS, **(limits or {})}
    unknown = set(allowed) - set(LIMITS)
    if unknown:
        raise ValueError(f"unknown limits {sorted(unknown)}; known: {sorted(LIMITS)}")
    figures: dict[str, float | None] = dict.fromkeys(LIMITS)
    certificate = Certificate(figures, allowed, steps)
    problem, lost = simulation.problem, simulation.mark_lost()
    if lost.all():
        certificate.reasons.append(
            f"all {len(lost)} members are lost at step {simulation.step_index}: lower dt"
        )
        return certificate
    if lost.any():
        simulation = _copy(simulation, problem, np.flatnonzero(~lost), simulation.save_state())
    diagnostics = Diagnostics(simulation)
    if not problem.cfl:
        figures["cfl"] = float(diagnostics.cfl().max())
    figures["tail"] = _tail(diagnostics)
    figures["kmax_eta"] = _kmax_eta(diagnostics, problem)
    saved = simulation.save_state()
    few = np.arange(len(simulation.members))[:max_members]
    if not problem.cfl and problem.removed == "none":
        budget = Diagnostics(_copy(simulation, problem, few, saved)).budget(steps)
        figures["budget"] = _budget_ratio(budget, diagnostics, len(few), steps)
    figures["aliasing"] = _aliasing(simulation, few, saved, steps)
    for name, value in figures.items():
        if value is None:
            continue
        limit = allowed[name]
        if not (value >= limit if name == "kmax_eta" else value <= limit):
            certificate.reasons.append(f"{name} {value:.3g}, limit {limit:g}: {_ADVICE[name]}")
    return certificate


_ADVICE = {
    "cfl": "lower dt or set cfl",
    "budget": "lower dt",
    "kmax_eta": "take a finer grid or a larger viscosity",
    "tail": "take a finer grid or a larger viscosity",
    "aliasing": "take a finer grid or a larger viscosity",
}


def _copy(simulation: Simulation, problem: Problem, rows: np.ndarray, saved: dict) -> Simulation:
    """Another simulation of some of the members, from the same state."""
    other = Simulation(
        problem,
        [simulation.members[row] for row in rows],
        simulation.seed,
        device=simulation.device,
        comm=simulation.comm,
        stage=simulation.stage,
        threads=1,
    )
    few = {k: v if k == "step_index" else v[rows] for k, v in saved.items()}
    return other.load_state(**few)


def _budget_ratio(budget: dict, diagnostics: Diagnostics, num: int, steps: int) -> float:
    """Largest residual, less what rounding the state explains, over the sum of the terms."""
    epsilon = torch.finfo(diagnostics.simulation.transform.real).eps
    rounding = 10 * steps * epsilon * diagnostics.measure()["energy"][:num]
    residual = np.maximum(abs(budget["residual"]) - rounding, 0.0)
    return float((residual / np.where(budget["scale"] > 0, budget["scale"], 1.0)).max())


def _tail(diagnostics: Diagnostics) -> float:
    """Enstrophy of the shells in the last tenth below K over that of the highest shell."""
    grid = diagnostics.simulation.grid
    spectrum = diagnostics.spectrum("enstrophy" if grid.dimensions == 2 else "energy")
    K = grid.modes
    last = spectrum[:, max(1, int(0.9 * K)) : K + 1].max(1)
    highest = spectrum.max(1)
    return float((last / np.where(highest > 0, highest, 1.0)).max())


def _kmax_eta(diagnostics: Diagnostics, problem: Problem) -> float | None:
    """Smallest ``k_max eta`` over the members; None where nothing damps the small scales."""
    grid, damping = diagnostics.simulation.grid, problem.physics.damping
    if grid.dimensions != 2 or not damping:
        return None
    k2 = grid.k2.numpy()
    terms = {order: value * k2**order for order, value in damping.items()}
    small = sum(terms.values())
    order = max(terms, key=lambda one: terms[one].max())  # which damps the smallest scales
    w = diagnostics.state()
    density = diagnostics.weights * (w.real**2 + w.imag**2) * small
    chi = np.array([row.sum() for row in density])
    eta = (damping[order] ** 3 / np.maximum(chi, 1e-300)) ** (1 / (6 * order))
    return float((grid.modes * grid.unit * eta).min())


def _aliasing(simulation: Simulation, rows: np.ndarray, saved: dict, steps: int) -> float:
    """Relative difference, on the retained modes, from a run on a grid 1.5 times finer."""
    problem = simulation.problem
    dimensions = simulation.grid.dimensions
    finer = problem.model_copy(
        update={"grid": 2 * -(-3 * problem.grid // 4), "max_level": problem.max_level + 1}
    )
    coarse = _copy(simulation, problem, rows, saved).advance(steps)
    state = {"step_index": saved["step_index"]}
    fine_modes = finer.make_grid().modes
    for name in ("w_hat", "previous_hat"):
        if name in saved:
            whole = torch.from_numpy(saved[name])
            state[name] = resize(whole, fine_modes, dimensions).numpy()
    if "rates" in saved:
        state["rates"] = saved["rates"]
    fine = _copy(simulation, finer, rows, state).advance(steps)
    a = Diagnostics(coarse).state()
    b = resize(torch.from_numpy(Diagnostics(fine).state()), simulation.grid.modes, dimensions)
    difference = np.abs(a - b.numpy()) ** 2
    scale = np.abs(b.numpy()) ** 2
    ratios = [d.sum() / max(s.sum(), 1e-300) for d, s in zip(difference, scale)]
    return float(np.sqrt(max(ratios)))
