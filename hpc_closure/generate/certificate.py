"""Certify a block of members: check that its trajectories can be trusted.

The checks run at the end of a block on copies of its state, and change nothing. Members that have
diverged are left out.

* The CFL number is below its limit: 1, in three dimensions 2 with a scheme of fourth order.
* The energy budget closes, the error term of the scheme included (:meth:`Diagnostics.budget`).
* The smallest scale is resolved: ``k_max eta`` with ``eta = (nu^3 / chi)^(1/6)``, where chi is
  the enstrophy dissipation. For hyperviscosity of order p, ``eta = (nu_h^3 / chi)^(1 / 6p)``. In
  three dimensions ``eta = (nu^3 / epsilon)^(1/4)``, epsilon the energy dissipation, and ``(nu_h^3
  / epsilon)^(1 / (6p - 2))``.
* The enstrophy spectrum falls off: its last shells are small against its highest shell.
* Aliasing and truncation are small: the same members differ little when they are advanced from
  the same state, on the same noise path, on a grid 1.5 times finer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from hpc_closure.spectral.diagnostics import Diagnostics, diagnostics_of
from hpc_closure.spectral.modes.grid import resize
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.schemes import PAST
from hpc_closure.spectral.simulation import Simulation

#: largest allowed values (``kmax_eta``: smallest); a check that does not apply has the value None
LIMITS = {"cfl": 1.0, "budget": 1e-3, "kmax_eta": 0.5, "tail": 0.1, "aliasing": 0.05}
#: limit of schemes of fourth order in three dimensions; it is that of |u| + |v| + |w|
FOURTH_ORDER_CFL = 2.0


@dataclass
class Certificate:
    """The worst values over the members of a block, and why it fails, if it does.

    Attributes:
        figures: worst value of each check; None where a check does not apply.
        limits: limit of each check.
        steps: steps of the energy budget and of the aliasing probe.
        reasons: one line per failed check.
    """

    figures: dict[str, float | None]
    limits: dict[str, float]
    steps: int
    reasons: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Return True if every value is within its limit."""
        return not self.reasons

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a file."""
        return {"passed": self.passed, **asdict(self)}

    def check(self) -> Certificate:
        """Return the certificate, or raise if a check failed.

        Raises:
            RuntimeError: the block must not be published; the message says why and what to do.
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
        simulation: unchanged, except that the state of a diverged member becomes NaN. On slabs
            every rank must call.
        steps: steps of the energy budget and of the aliasing probe.
        max_members: number of members, the first ones, for the budget and the probe. CFL number,
            spectrum tail and ``k_max eta`` are checked on all members.
        limits: limits that replace those of ``LIMITS``.

    Raises:
        ValueError: a limit has an unknown name.
    """
    allowed = {**LIMITS, **(limits or {})}
    if simulation.problem.dimensions == 3 and simulation.problem.scheme in ("rk4", "etdrk4"):
        allowed["cfl"] = (limits or {}).get("cfl", FOURTH_ORDER_CFL)
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
    diagnostics = diagnostics_of(simulation)
    if not problem.cfl:
        figures["cfl"] = float(diagnostics.cfl().max())
    figures["tail"] = _tail(diagnostics)
    if not simulation.channel_shape or problem.dimensions == 3:
        figures["kmax_eta"] = _kmax_eta(diagnostics, problem)
    saved = simulation.save_state()
    probe_rows = np.arange(len(simulation.members))[:max_members]
    if not problem.cfl and problem.removed == "none" and not simulation.channel_shape:
        budget = Diagnostics(_copy(simulation, problem, probe_rows, saved)).budget(steps)
        figures["budget"] = _budget_ratio(budget, diagnostics, len(probe_rows), steps)
    figures["aliasing"] = _aliasing(simulation, probe_rows, saved, steps)
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
    "kmax_eta": "use a finer grid or a larger viscosity",
    "tail": "use a finer grid or a larger viscosity",
    "aliasing": "use a finer grid or a larger viscosity",
}


def _copy(simulation: Simulation, problem: Problem, rows: np.ndarray, saved: dict) -> Simulation:
    """Copy the members in ``rows`` to another simulation, from the saved state."""
    other = Simulation(
        problem,
        [simulation.members[row] for row in rows],
        simulation.seed,
        device=simulation.device,
        comm=simulation.comm,
        stage=simulation.stage,
        threads=1,
    )
    selected = {k: v if k == "step_index" else v[rows] for k, v in saved.items()}
    return other.load_state(**selected)


def _budget_ratio(budget: dict, diagnostics: Diagnostics, num: int, steps: int) -> float:
    """Return the largest residual, less the round-off of the state, over the sum of the terms."""
    epsilon = torch.finfo(diagnostics.simulation.transform.real).eps
    rounding = 10 * steps * epsilon * diagnostics.measure()["energy"][:num]
    residual = np.maximum(abs(budget["residual"]) - rounding, 0.0)
    return float((residual / np.where(budget["scale"] > 0, budget["scale"], 1.0)).max())


def _tail(diagnostics: Diagnostics) -> float:
    """Return the highest shell of the last tenth below K over the highest shell of all.

    The spectrum is that of enstrophy, on a line that of energy; of several channels it is the
    variance of the worst one.
    """
    grid, ratios = diagnostics.simulation.grid, []
    K = int(round(grid.reach / grid.unit, 9))  # the highest shell that is complete
    for spectrum in diagnostics.resolved_spectra():
        last = spectrum[:, max(1, int(0.9 * K)) : K + 1].max(1)
        highest = spectrum.max(1)
        ratios.append((last / np.where(highest > 0, highest, 1.0)).max())
    return float(max(ratios))


def _kmax_eta(diagnostics: Diagnostics, problem: Problem) -> float | None:
    """Return the smallest ``k_max eta`` of all members; None if nothing damps small scales."""
    grid, damping = diagnostics.simulation.grid, problem.physics.damping
    if grid.dimensions == 1 or not damping:
        return None
    k2 = grid.k2.numpy()
    terms = {order: value * k2**order for order, value in damping.items()}
    damping_rate = sum(terms.values())
    order = max(terms, key=lambda p: terms[p].max())  # the term that damps the smallest scales
    w = diagnostics.state()
    density = diagnostics.weights * (w.real**2 + w.imag**2) * damping_rate
    chi = np.array([row.sum() for row in density])
    exponent = 6 * order if grid.dimensions == 2 else 6 * order - 2
    eta = (damping[order] ** 3 / np.maximum(chi, 1e-300)) ** (1 / exponent)
    return float((grid.reach * eta).min())


def _finer(grid):
    """Return 1.5 times the points, even, of a number or of one per side."""
    if isinstance(grid, tuple):
        return tuple(map(_finer, grid))
    return 2 * -(-3 * grid // 4)


def _aliasing(simulation: Simulation, rows: np.ndarray, saved: dict, steps: int) -> float:
    """Return the relative difference, on the retained modes, from a grid 1.5 times finer."""
    problem = simulation.problem
    finer = problem.model_copy(
        update={
            "grid": _finer(problem.grid),
            "max_refinements": problem.max_refinements + 1,
        }
    )
    coarse = _copy(simulation, problem, rows, saved).advance(steps)
    fine_state = {"step_index": saved["step_index"]}
    fine_modes = finer.make_grid().mode_counts
    for name in ("w_hat", *PAST):
        if name in saved:
            spectra = torch.from_numpy(saved[name])
            fine_state[name] = resize(spectra, fine_modes).numpy()
    if "rates" in saved:
        fine_state["rates"] = saved["rates"]
    fine = _copy(simulation, finer, rows, fine_state).advance(steps)
    a = diagnostics_of(coarse).state()
    b = resize(torch.from_numpy(diagnostics_of(fine).state()), simulation.grid.mode_counts)
    difference = np.abs(a - b.numpy()) ** 2
    scale = np.abs(b.numpy()) ** 2
    if simulation.channel_shape:  # channels have units of their own
        difference, scale = (part.reshape(-1, *part.shape[2:]) for part in (difference, scale))
    ratios = [d.sum() / max(s.sum(), 1e-300) for d, s in zip(difference, scale)]
    return float(np.sqrt(max(ratios)))
