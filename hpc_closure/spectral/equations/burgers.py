"""The viscous Burgers equation on a line and a stochastic forcing for it.

``u_t + u u_x = nu u_xx + beta xi``. One file is all that a new equation needs.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from hpc_closure.spectral.equations.base import Equation, SelfAdvection
from hpc_closure.spectral.noise.laws import Noise
from hpc_closure.spectral.recipe import Count, NonNegative


class Burgers1D(Equation):
    """u_t + u u_x = nu u_xx on a line."""

    dimensions: ClassVar[int] = 1

    equation: Literal["burgers1d"] = "burgers1d"
    viscosity: NonNegative = Field(1e-2, description="nu, length^2/time")

    @property
    def damping(self) -> dict[int, float]:
        return {1: self.viscosity} if self.viscosity else {}

    def linear(self, grid):
        return -self.viscosity * grid.k2 + 0j

    def terms(self, transform, form):
        return SelfAdvection(self, transform)


class LineNoise(Noise):
    """White forcing of the modes 1 .. wavenumber of a line.

    Every mode receives the same energy; the total mean rate is exactly ``energy_rate`` (Ito).
    Energy is ``1/2 sum |u_hat|^2`` over both signs of k, so a mode of variance rate ``s`` receives
    ``s``.
    """

    dimensions: ClassVar[tuple[int, ...]] = (1,)

    kind: Literal["modes"] = Field("modes", description="stochastic forcing")
    wavenumber: Count = Field(3, description="highest forced wavenumber, integer")
    energy_rate: NonNegative = Field(1e-3, description="exact mean energy injection rate")

    def law(self, grid):
        import numpy as np

        k = np.arange(1, self.wavenumber + 1)
        vectors = np.stack([np.zeros_like(k), k], axis=1)
        return vectors, np.full(len(k), self.energy_rate / len(k))
