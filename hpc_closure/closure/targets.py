"""Closure targets: what the reduced solver lacks, in one convention, dV/dt = M~(V) + U.

``diffusion``
    G = nu Lap w + 2 beta xi of Dong, Chen, Wu (JCP 2025) enters the published Crank-Nicolson
    scheme with weight 1/2 and leaves the implicit half of the viscosity in the solver, so here
    U = G / 2.
``convection``
    U = H = -(u . grad w) + beta xi.
``subgrid``
    the defect of the map that the reduced solver runs, U = [K v(t + D) - Phi_D(K v(t))] / D with
    D = interval * dt, Phi the reduced solver, which takes steps of its own, and K the cut to its
    retained modes.

For ``interval`` m > 1 the first two are means over the m coming steps. Intervals and strides count
steps of the full system. All functions take and return retained spectra.
"""

from collections.abc import Callable

import torch

from hpc_closure.spectral.differentiable import TracedSolver
from hpc_closure.spectral.modes.grid import resize
from hpc_closure.spectral.modes.resolution import retained_modes
from hpc_closure.spectral.problem import REMOVABLE, Problem
from hpc_closure.spectral.simulation import Simulation

QUOTED_FACTOR = {"diffusion": 2.0, "convection": 1.0, "subgrid": 1.0}


def reduced_problem(problem: Problem, grid: int, kind: str, stride: int = 1) -> Problem:
    """What the reduced solver runs, M~: without the term that the closure supplies.

    Args:
        problem: the full system.
        grid: points per side of the reduced solver.
        kind: of the closure.
        stride: steps of the full system that one step of the reduced solver takes (subgrid).
    """
    if kind in REMOVABLE:
        return problem.replace(grid=grid, removed=kind)
    return problem.replace(grid=grid, dt=stride * problem.dt, noise={"kind": "none"})


def advance_with(
    simulation: Simulation, kind: str, span: float, tendency_hat: torch.Tensor
) -> None:
    """Advance the reduced solver by a time ``span`` under a closure (B, ...) that is held.

    The subgrid target is the defect of the reduced map, so it is added after that map, and the
    map is the one that the target was taken of: its scheme begins anew in every interval.
    """
    steps = simulation.problem.steps_in(span)
    if kind in REMOVABLE:
        simulation.advance(steps, tendency_hat=tendency_hat)
    else:
        simulation.forget().advance(steps)
        simulation.state.add_(tendency_hat, alpha=span)


def traced_with(
    solver: TracedSolver,
    kind: str,
    span: float,
    state: torch.Tensor,
    tendency_hat: torch.Tensor,
    past: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`advance_with`, with gradients; returns the state and what the scheme keeps."""
    steps = solver.problem.steps_in(span)
    if kind in REMOVABLE:
        return solver.advance(state, steps, tendency_hat, past)
    state, _ = solver.advance(state, steps)
    return state + tendency_hat * span, None


def quoted(closure, kind: str):
    """The closure as the published tables quote it: G = 2 U for diffusion, U otherwise."""
    return QUOTED_FACTOR[kind] * closure


def removed_terms_hat(simulation: Simulation, kind: str) -> torch.Tensor:
    """U of this very step, (B, 2K+1, K+1): removed term plus the noise that the step uses."""
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
        interval: steps of the full system that one target stands for.
        reduced: the problem that the reduced solver runs (subgrid only).
    """

    def __init__(self, kind: str, interval: int, reduced: Problem | None = None):
        self.kind, self.interval, self.reduced = kind, interval, reduced
        self._solver: Simulation | None = None  # of the reduced problem, made at the first use

    @property
    def lookahead(self) -> int:
        """Steps beyond the snapshot that the target needs."""
        return 0 if self.interval == 1 and self.kind != "subgrid" else self.interval

    def compute(
        self, simulation: Simulation, advance: Callable[[int], object] | None = None
    ) -> torch.Tensor:
        """U_hat at the present time; advances ``simulation`` by :attr:`lookahead` steps.

        Args:
            simulation: the full system.
            advance: what to call instead of ``simulation.advance``.
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
        modes, gather = retained_modes(self.reduced.grid), simulation.transform.gather
        start = resize(gather(simulation.state), modes, simulation.grid.dimensions)
        if self._solver is None or self._solver.members != simulation.members:
            self._solver = Simulation(
                self.reduced, simulation.members, simulation.seed, device=simulation.device
            )
        span = self.interval * simulation.problem.dt
        reduced = self._solver.load_state(simulation.step_index, start)
        reduced.advance(self.reduced.steps_in(span))
        advance(self.interval)
        end = resize(gather(simulation.state), modes, simulation.grid.dimensions)
        return (end - reduced.state) / span
