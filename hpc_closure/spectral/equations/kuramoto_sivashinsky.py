"""The Kuramoto-Sivashinsky equation on a line.

``u_t + u u_x + u_xx + u_xxxx = 0``; chaotic for lengths above about 22.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from hpc_closure.spectral.equations.base import Equation, SelfAdvection


class KuramotoSivashinsky1D(Equation):
    """u_t + u u_x + u_xx + u_xxxx = 0 on a line."""

    dimensions: ClassVar[int] = 1

    equation: Literal["kuramoto_sivashinsky1d"] = "kuramoto_sivashinsky1d"

    def linear(self, grid):
        k = grid.ky
        return k**2 - k**4 + 0j

    def terms(self, transform, form):
        return SelfAdvection(self, transform)

    def hash_parameters(self) -> dict:
        plane = {"viscosity": 1e-3, "drag": 0.0, "beta": 0.0}
        return {
            **super().hash_parameters(),
            **plane,
            "hyperviscosity": 0.0,
            "hyperviscosity_order": 4,
        }
