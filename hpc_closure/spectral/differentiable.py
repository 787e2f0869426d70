"""The solver with gradients: a reduced run through which a closure is trained.

The same recipe, schemes and equations as in :class:`~hpc_closure.spectral.simulation.Simulation`,
in new tensors instead of in place (``traced`` of a scheme and of an equation): equal to it to
round-off. Every stretch of a few steps is stored as its start alone and taken again for its
gradient, so memory holds one stretch, however long a run is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_closure.spectral.modes.differentiable import MATRICES, TracedTransform
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.problem import Problem

#: steps between stored states
STRETCH = 25


class TracedSolver:
    """Advances spectra of a problem; gradients go to states, closures and the steps before.

    Args:
        problem: the recipe; steps of one length, no stochastic forcing.
        device: ``cpu`` or a CUDA device.
        matrices: points per side up to which fields are transformed by matrices.

    Raises:
        ValueError: the problem has one of these.
    """

    def __init__(self, problem: Problem, device="cpu", matrices: int = MATRICES):
        if problem.cfl:
            raise ValueError(
                f"generate.cfl={problem.cfl:g}: gradients need steps of one length; remove it"
            )
        if problem.physics.noise.kind != "none" and problem.removed == "none":
            raise ValueError(
                "gradients go through a solver without a stochastic forcing of its own"
            )
        self.problem, self.grid, self.device = problem, problem.make_grid(), torch.device(device)
        transform = Transform(self.grid, problem.precision, device)
        self.complex = transform.complex
        self.equation = problem.make_equation(transform)
        self.scheme = problem.make_scheme(self.equation.linear, transform)
        steady = problem.physics.forcing.spectrum(self.grid).to(device, self.complex)
        self._steady = torch.view_as_real(steady)
        self._transform = TracedTransform(self.grid, self._steady, matrices)

    def advance(
        self,
        w_hat: Tensor,
        steps: int,
        tendency_hat: Tensor | None = None,
        past: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Take ``steps`` steps.

        Args:
            w_hat: states ``(members, 2K + 1, K + 1)`` complex.
            steps: number of steps.
            tendency_hat: held right-hand side of the same shape, or None.
            past: what the scheme keeps of the steps before; None begins a history.

        Returns:
            The states, and what the scheme keeps for the next steps (None where it keeps nothing).
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
        """``count`` steps of real pairs, in the solver's own precision."""
        with torch.autocast(w.device.type, enabled=False):
            for _ in range(count):
                w, past = self.scheme.traced(w, self._nonlinear, held, past)
        return w, past

    def _nonlinear(self, w: Tensor) -> Tensor:
        """The nonlinear term, as far as the problem has it."""
        if self.problem.removed == "convection":
            return torch.zeros_like(w)
        return self.equation.traced(w, self._transform)


class _Stretch(torch.autograd.Function):
    """A stretch; its gradient is that of a second run through it."""

    @staticmethod
    def forward(ctx, solver: TracedSolver, count: int, *start):
        ctx.solver, ctx.count = solver, count
        ctx.save_for_backward(*start)
        return solver.stretch(count, *start)

    @staticmethod
    def backward(ctx, *gradients):
        wanted = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            start = [
                None if one is None else one.detach().requires_grad_(want)
                for one, want in zip(ctx.saved_tensors, wanted)
            ]
            ends = ctx.solver.stretch(ctx.count, *start)
        given = [
            (end, gradient)
            for end, gradient in zip(ends, gradients)
            if end is not None and gradient is not None and end.requires_grad
        ]
        ends, gradients = zip(*given)
        sought = [one for one, want in zip(start, wanted) if want]
        found = iter(torch.autograd.grad(ends, sought, gradients, allow_unused=True))
        return None, None, *(next(found) if want else None for want in wanted)
