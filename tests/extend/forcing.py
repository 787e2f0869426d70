"""A steady forcing in one file: Taylor-Green vortices, f = amplitude cos(k x) cos(k y)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hpc_closure.spectral.forcing import Forcing
from hpc_closure.spectral.recipe import Count, Finite


class TaylorGreen(Forcing):
    """Name it with ``physics.forcing: {kind: taylor_green}``; k = 2 pi wavenumber / L."""

    kind: Literal["taylor_green"] = "taylor_green"
    amplitude: Finite = Field(0.1, description="1/time^2")
    wavenumber: Count = Field(4, description="integer wavenumber")

    def modes(self, unit):
        """Yield (kx, ky, f_hat) with ky >= 0; the conjugate modes follow."""
        for sign in (1, -1):
            yield sign * self.wavenumber, self.wavenumber, complex(self.amplitude / 4)
