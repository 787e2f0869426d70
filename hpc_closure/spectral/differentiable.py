"""The solver with gradients: a reduced run through which a closure is trained.

Recipe, schemes and equations are those of :class:`~hpc_closure.spectral.simulation.Simulation`.
Results are new tensors instead of changes in place (``differentiable_step`` of a scheme,
``differentiable_nonlinear`` of an equation) and equal those of the solver to round-off.

A run is cut into stretches of a few steps. Only the state at the start of a stretch is stored; the
stretch is computed again for its gradient. So memory holds one stretch, however long the run is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_closure.spectral.modes.differentiable import MATRICES, DifferentiableTransform
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.outside.problem import OutsideProblem
from hpc_closure.spectral.outside.simulation import OutsideGradient
from hpc_closure.spectral.problem import Problem

#: steps between stored states
STRETCH = 25


class DifferentiableSolver:
    """Advances spectra of a problem; gradients flow to states, closures and past spectra.

    Args:
        problem: the recipe; steps of one length, no stochastic forcing.
        device: ``cpu`` or a CUDA device.
        matrices: points per side up to which fields are transformed by matrices.

    Raises:
        ValueError: the problem has an adaptive step, a stochastic forcing or random events.
    """

    def __init__(self, problem: Problem, device="cpu", matrices: int = MATRICES):
        if problem.cfl:
            raise ValueError(
                f"generate.cfl={problem.cfl:g}: gradients need steps of one length; remove cfl"
            )
        if problem.physics.noise.kind != "none" and problem.removed == "none":
            raise ValueError(
                "gradients need a solver without stochastic forcing: set physics.noise.kind=none"
            )
        if problem.physics.events(problem.make_grid(), problem.dt, 0, "") is not None:
            raise ValueError("gradients need a solver without random events: set births=mean")
        self.problem, self.grid, self.device = problem, problem.make_grid(), torch.device(device)
        transform = Transform(self.grid, problem.precision, device)
        self.complex = transform.complex
        self.equation = problem.make_equation(transform)
        self.scheme = problem.make_scheme(self.equation.linear, transform)
        steady = problem.physics.steady(self.grid).to(device, self.complex)
        self._steady = torch.view_as_real(steady)
        self._transform = DifferentiableTransform(self.grid, self._steady, matrices)

    def advance(
        self,
        w_hat: Tensor,
        steps: int,
        tendency_hat: Tensor | None = None,
        past: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Take ``steps`` steps and return the states and the past spectra.

        Args:
            w_hat: states ``(members, 2K + 1, K + 1)`` complex.
            steps: number of steps.
            tendency_hat: closure, of the same shape, constant over the steps; or None.
            past: past spectra that an earlier call returned; None starts anew.

        Returns:
            The states, and the past spectra that the scheme needs next (None if it needs none).
        """
        w = torch.view_as_real(w_hat.to(self.complex))
        held = self.steady(w)
        if tendency_hat is not None:
            held = held + torch.view_as_real(tendency_hat.to(self.complex))
        for first in range(0, steps, STRETCH):
            count = min(STRETCH, steps - first)
            w, past = _Stretch.apply(self, count, w, held, past)
        return torch.view_as_complex(w.contiguous()), past

    def steady(self, w: Tensor) -> Tensor:
        """Return the steady forcing of states, real pairs of the shape of ``w``."""
        return self._steady.expand_as(w)

    def stretch(self, count: int, w: Tensor, held: Tensor, past: Tensor | None):
        """Take ``count`` steps of real pairs in the solver's precision; returns ``(w, past)``."""
        with torch.autocast(w.device.type, enabled=False):
            for _ in range(count):
                w, past = self.scheme.differentiable_step(w, self._nonlinear, held, past)
        return w, past

    def _nonlinear(self, w: Tensor) -> Tensor:
        """Return the nonlinear term, or zero if the problem leaves it out."""
        if self.problem.removed == "convection":
            return torch.zeros_like(w)
        return self.equation.differentiable_nonlinear(w, self._transform)


def differentiable(problem: Problem, device="cpu") -> DifferentiableSolver | OutsideGradient:
    """Return the solver of a problem with gradients, perhaps a user's.

    Args:
        problem: the recipe.
        device: ``cpu`` or a CUDA device.
    """
    if isinstance(problem, OutsideProblem):
        return OutsideGradient(problem, device)
    return DifferentiableSolver(problem, device)


class _Stretch(torch.autograd.Function):
    """A stretch of steps; its gradient is that of a second run through it."""

    @staticmethod
    def forward(ctx, solver: DifferentiableSolver, count: int, *start):
        ctx.solver, ctx.count = solver, count
        ctx.save_for_backward(*start)
        return solver.stretch(count, *start)

    @staticmethod
    def backward(ctx, *gradients):
        needs_gradient = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            start = [
                None if saved is None else saved.detach().requires_grad_(needed)
                for saved, needed in zip(ctx.saved_tensors, needs_gradient)
            ]
            ends = ctx.solver.stretch(ctx.count, *start)
        used = [
            (end, gradient)
            for end, gradient in zip(ends, gradients)
            if end is not None and gradient is not None and end.requires_grad
        ]
        ends, gradients = zip(*used)
        inputs = [tensor for tensor, needed in zip(start, needs_gradient) if needed]
        input_gradients = iter(torch.autograd.grad(ends, inputs, gradients, allow_unused=True))
        return (
            None,
            None,
            *(next(input_gradients) if needed else None for needed in needs_gradient),
        )
