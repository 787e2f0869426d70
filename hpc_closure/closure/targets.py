"""Closure targets: the tendency that the reduced solver lacks, as U in dV/dt = M~(V) + U.

``diffusion``
    G = nu Lap w + 2 beta xi of Dong, Chen, Wu (JCP 2025) enters the published Crank-Nicolson
    scheme with weight 1/2 and leaves the implicit half of the viscosity in the solver, so here
    U = G / 2.
``convection``
    U = H = -(u . grad w) + beta xi.
``subgrid``
    The defect of the reduced solver's map, U = [K v(t + D) - Phi_D(K v(t))] / D. D is
    interval * dt, K the truncation to the retained modes, and Phi the reduced solver, which has
    its own time step.

For ``interval`` m > 1 the first two are means over the next m steps. Intervals and strides count
steps of the full system. All functions take and return retained spectra.
"""

from collections.abc import Callable
from functools import lru_cache

import torch

from hpc_closure.experiment.user_modules import load_python
from hpc_closure.spectral.differentiable import DifferentiableSolver
from hpc_closure.spectral.ensemble import Ensemble
from hpc_closure.spectral.modes.grid import resize
from hpc_closure.spectral.outside.problem import OutsideProblem
from hpc_closure.spectral.outside.simulation import OutsideGradient
from hpc_closure.spectral.outside.solver import EXPECTED, OutsideSolver, is_solver
from hpc_closure.spectral.problem import REMOVABLE, Problem
from hpc_closure.spectral.simulation import Simulation, simulation_of

QUOTED_FACTOR = {"diffusion": 2.0, "convection": 1.0, "subgrid": 1.0}


def reduced_problem(problem: Problem, grid: int, kind: str, stride: int = 1) -> Problem:
    """Return the problem of the reduced solver M~, without the term that the closure supplies.

    For subgrid the filter of scheme ``ab3`` is such a term: it is the dissipation at the cut-off.
    On the reduced grid it would remove modes that the full system has, and a closure would mostly
    put them back.

    Args:
        problem: the full system.
        grid: points per side of the reduced solver.
        kind: kind of the closure.
        stride: steps of the full system per step of the reduced solver (subgrid).

    Raises:
        ValueError: the user's reduced solver cannot be imported, or does not fit.
    """
    if kind in REMOVABLE:
        return problem.replace(grid=grid, removed=kind)
    if problem.reduced_python:
        solver = users_solver(problem.reduced_python)
        if hasattr(solver.solver, "coarse") and problem.physics.equation != "external":
            raise ValueError(
                f"{solver.name}: coarse(fine) is for data of others; a DNS of this package is "
                "truncated to the modes of the reduced grid: remove it"
            )
        return OutsideProblem.of_solver(problem, grid, solver)
    bare = problem.physics.without_noise()
    scheme = "ab3_plain" if problem.scheme == "ab3" else problem.scheme
    return problem.replace(grid=grid, dt=stride * problem.dt, scheme=scheme, **bare)


@lru_cache(maxsize=None)
def users_solver(python: str, key: str = "reduced.python") -> OutsideSolver:
    """Import the solver that ``file.py:Name`` or ``module:Name`` names, once per process.

    Raises:
        ValueError: there is no such solver, or it does not fit.
    """
    found = load_python(key, python, EXPECTED, is_solver)
    return OutsideSolver(found, f"{key}={python}")


def advance_with(simulation: Ensemble, kind: str, span: float, tendency_hat: torch.Tensor) -> None:
    """Advance the reduced solver by a time ``span`` under a constant closure (B, ...).

    The subgrid target is the defect of the reduced map, so it is added after that map. The map
    must equal that of the target, so the scheme starts without history in every interval.
    """
    steps = simulation.problem.steps_in(span)
    if kind in REMOVABLE:
        simulation.advance(steps, tendency_hat=tendency_hat)
    else:
        simulation.forget().advance(steps)
        simulation.state.add_(tendency_hat, alpha=span)


def corrected_by(simulation: Ensemble, span: float, draw: Callable[[], torch.Tensor]) -> None:
    """Advance by a time ``span``, and add a subgrid closure, ``draw()``, of the state reached."""
    simulation.forget().advance(simulation.problem.steps_in(span))
    simulation.state.add_(draw(), alpha=span)


def defect(
    reduced: Ensemble, step_index: int, start: torch.Tensor, end: torch.Tensor, span: float
) -> torch.Tensor:
    """Compute U (B, ...) from the first and the last resolved state of an interval.

    Args:
        reduced: the reduced solver; it is loaded with ``start`` and advanced.
        step_index: its step number at the start.
        start, end: retained spectra (B, ...) of the full system, cut to the modes of ``reduced``.
        span: length of the interval.
    """
    reduced.load_state(step_index, start).advance(reduced.problem.steps_in(span))
    return (end - reduced.state) / span


def traced_with(
    solver: DifferentiableSolver | OutsideGradient,
    kind: str,
    span: float,
    state: torch.Tensor,
    tendency_hat: torch.Tensor,
    past: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Advance as :func:`advance_with`, with gradients; returns state and scheme history."""
    steps = solver.problem.steps_in(span)
    if kind in REMOVABLE:
        return solver.advance(state, steps, tendency_hat, past)
    state, _ = solver.advance(state, steps)
    return state + tendency_hat * span, None


def quoted(closure, kind: str):
    """Convert U to the closure that the published tables quote: G = 2 U for diffusion, else U."""
    return QUOTED_FACTOR[kind] * closure


def removed_terms_hat(simulation: Simulation, kind: str) -> torch.Tensor:
    """Compute U of the present step, (B, 2K+1, K+1): removed term plus the noise of this step."""
    noise = simulation.noise_hat(simulation.step_index)
    if kind == "diffusion":
        k2 = simulation.transform.local(simulation.grid.k2)
        symbol = (-0.5 * simulation.problem.viscosity * k2).to(simulation.state.real)
        known = torch.view_as_real(simulation.state) * symbol[..., None]
    elif kind == "convection":
        known = torch.view_as_real(simulation.nonlinear_hat())
    else:
        raise ValueError(f"closure {kind!r} removes no term of the full system")
    return torch.view_as_complex(known + torch.view_as_real(noise))


class Target:
    """Computes the target of a running simulation at snapshot times.

    Args:
        kind: diffusion, convection or subgrid.
        interval: averaging time of a target, in steps of the full system.
        reduced: problem of the reduced solver (subgrid only).
    """

    def __init__(self, kind: str, interval: int, reduced: Problem | None = None):
        self.kind, self.interval, self.reduced = kind, interval, reduced
        self._solver: Ensemble | None = None  # reduced solver, created at the first use

    @property
    def lookahead(self) -> int:
        """Steps beyond the snapshot that the target needs."""
        return 0 if self.interval == 1 and self.kind != "subgrid" else self.interval

    def compute(
        self, simulation: Simulation, advance: Callable[[int], object] | None = None
    ) -> torch.Tensor:
        """Compute U_hat at the present time; advances ``simulation`` by :attr:`lookahead` steps.

        Args:
            simulation: the full system.
            advance: replacement of ``simulation.advance``.
        """
        advance = advance or simulation.advance
        if self.kind == "subgrid":
            return self._defect(simulation, advance)
        if self.interval == 1:
            return removed_terms_hat(simulation, self.kind)
        total = torch.zeros_like(simulation.state)
        for _ in range(self.interval):
            total = total + removed_terms_hat(simulation, self.kind)
            advance(1)
        return total / self.interval

    def _defect(self, simulation: Simulation, advance) -> torch.Tensor:
        assert self.reduced is not None
        modes, gather = self.reduced.make_grid().mode_counts, simulation.transform.gather
        start = resize(gather(simulation.state), modes)
        if self._solver is None or self._solver.members != simulation.members:
            self._solver = simulation_of(
                self.reduced, simulation.members, simulation.seed, device=simulation.device
            )
        span, first = self.interval * simulation.problem.dt, simulation.step_index
        advance(self.interval)
        end = resize(gather(simulation.state), modes)
        return defect(self._solver, first, start, end, span)
