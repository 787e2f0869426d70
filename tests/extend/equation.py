"""An equation in one file: Burgers with linear drag, u_t + u u_x = nu u_xx - drag u."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from hpc_closure.spectral.equations.base import Equation, SelfAdvection
from hpc_closure.spectral.recipe import NonNegative


class DampedBurgers1D(Equation):
    """Name it with ``physics.equation: damped_burgers1d``."""

    dimensions: ClassVar[int] = 1

    equation: Literal["damped_burgers1d"] = "damped_burgers1d"
    viscosity: NonNegative = Field(1e-2, description="nu, length^2/time")
    drag: NonNegative = Field(0.1, description="linear drag, 1/time")

    @property
    def damping(self):
        """Coefficients of -nu_p (-Lap)^p by order p, for diagnostics and certificate."""
        return {1: self.viscosity} if self.viscosity else {}

    def linear(self, grid):
        """Return the eigenvalue of the linear terms per mode, complex128."""
        return -self.viscosity * grid.k2 - self.drag + 0j

    def terms(self, transform, form):
        """Return the nonlinear term; SelfAdvection is -u u_x."""
        return SelfAdvection(self, transform)
