r"""The vorticity equation on a periodic square.

.. math::
   w_t + u\cdot\nabla w + \beta_y v = \nu\Delta w - \nu_h(-\Delta)^p w - \alpha w + f + \beta\xi,
   \qquad -\Delta\psi = w,\quad u = (\psi_y, -\psi_x)
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from hpc_closure.spectral.equations.base import Equation, Terms
from hpc_closure.spectral.recipe import Finite, NonNegative


class Vorticity2D(Equation):
    """The vorticity equation on a square."""

    dimensions: ClassVar[int] = 2
    unequal_sides: ClassVar[bool] = True

    equation: Literal["vorticity2d"] = "vorticity2d"
    viscosity: NonNegative = Field(1e-3, description="nu, length^2/time")
    hyperviscosity: NonNegative = Field(0.0, description="coefficient of (-Lap)^order")
    hyperviscosity_order: Annotated[int, Field(ge=2, le=8)] = 4
    drag: NonNegative = Field(0.0, description="linear drag, 1/time")
    beta: Finite = Field(0.0, description="gradient of the planetary vorticity")

    @property
    def damping(self) -> dict[int, float]:
        terms = {1: self.viscosity, self.hyperviscosity_order: self.hyperviscosity}
        return {order: value for order, value in terms.items() if value}

    @property
    def other_linear_terms(self) -> list[str]:
        return [name for name in ("hyperviscosity", "drag", "beta") if getattr(self, name)]

    def linear(self, grid):
        import torch

        k2 = grid.k2
        damping = -self.viscosity * k2 - self.drag
        if self.hyperviscosity:
            damping = damping - self.hyperviscosity * k2**self.hyperviscosity_order
        rossby = self.beta * grid.kx * grid.inverse_k2
        return torch.complex(damping, rossby + torch.zeros_like(k2))

    def is_symmetry(self, permutation, signs):
        # beta y is part of the vorticity, so a map must change its sign as it changes that of w
        return not self.beta or (permutation == (0, 1) and signs[0] == 1)

    def terms(self, transform, form):
        return VorticityTerms(self, transform, form)


class VorticityTerms(Terms):
    """``-(u . grad w)`` in one of the forms of :mod:`~equations.advection`."""

    def __init__(self, equation: Vorticity2D, transform, form: str):
        from hpc_closure.spectral.equations.advection import FORMS

        super().__init__(equation, transform)
        self.advection = FORMS[form](transform)

    def nonlinear(self, w, out):
        return self.advection.tendency(w, out)

    def differentiable_nonlinear(self, w, transform):
        return self.advection.differentiable_tendency(w, transform)

    def speed(self, w):
        velocity = self.advection.velocity(w).abs_()
        return velocity[0].add_(velocity[1]).amax((-2, -1))
