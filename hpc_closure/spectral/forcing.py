"""Forcings without noise, one class per kind: retained spectra of steady ones, constant power."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from hpc_closure.spectral.modes.resolution import retained_modes
from hpc_closure.spectral.recipe import Count, Family, Finite, Positive

if TYPE_CHECKING:
    from torch import Tensor

    from hpc_closure.spectral.modes.grid import Grid


class Forcing(Family):
    """Steady forcing f."""

    default: ClassVar[str] = "published"
    #: dimensions of the flows that the forcing is for
    dimensions: ClassVar[tuple[int, ...]] = (2,)

    kind: str

    def modes(self, unit: float) -> Iterator[tuple[int, int, complex]]:
        """Yield the half-plane modes ``(kx, ky, f_hat)`` of the forcing.

        Args:
            unit: smallest wavenumber, ``2 pi / length``.
        """
        raise NotImplementedError

    def retained(self, size: int, length: float) -> list[tuple[int, int, complex]]:
        """Return :meth:`modes` as a list, after checking that a grid retains all of them.

        Args:
            size: points per side.
            length: side of the box.

        Raises:
            ValueError: the grid does not retain a mode.
        """
        modes, largest = list(self.modes(2 * math.pi / length)), retained_modes(size)
        for kx, ky, _ in modes:
            if max(abs(kx), ky) > largest:
                raise ValueError(
                    f"physics.forcing.kind={self.kind}: mode ({kx}, {ky}) is beyond the {largest} "
                    f"that a grid of {size} points per side retains; use a finer grid"
                )
        return modes

    def spectrum(self, grid: Grid) -> Tensor:
        """Return the retained spectrum of the forcing on a grid, complex128."""
        import torch

        out = torch.zeros(grid.shape, dtype=torch.complex128)
        for kx, ky, value in self.retained(min(grid.sizes), max(grid.lengths)):
            out[kx, ky] = torch.tensor(value, dtype=out.dtype)
            if ky == 0 and kx:
                out[-kx, 0] = out[kx, 0].conj()
        return out


class NoForcing(Forcing):
    """No steady forcing."""

    dimensions: ClassVar[tuple[int, ...]] = (1, 2, 3)

    kind: Literal["none"] = "none"

    def modes(self, unit):
        return iter(())


class PublishedForcing(Forcing):
    """f = amplitude (sin 2 pi (x + y) + cos 2 pi (x + y)), x, y in sides (Li et al. 2021)."""

    kind: Literal["published"] = Field(
        "published", description="steady forcing; published = amplitude (sin + cos)(2 pi (x + y))"
    )
    amplitude: Finite = Field(0.1, description="1/time^2")

    def modes(self, unit):
        yield 1, 1, self.amplitude * complex(0.5, -0.5)


class KolmogorovForcing(Forcing):
    """amplitude sin(k y) on u: f = -amplitude k cos(k y), k = 2 pi wavenumber / L."""

    kind: Literal["kolmogorov"] = Field("kolmogorov", description="steady forcing")
    amplitude: Finite = Field(0.1, description="1/time^2")
    wavenumber: Count = Field(4, description="integer wavenumber")

    def modes(self, unit):
        yield 0, self.wavenumber, complex(-0.5 * self.amplitude * unit * self.wavenumber)


class PowerForcing(Forcing):
    """Constant power in the lowest modes of a three-dimensional flow.

    f = power u_low / (2 E_low), with u_low the velocity in the modes 0 < |k| <= reach and E_low
    its energy. The equation adds it to its nonlinear term, so every stage of a scheme has it.
    """

    dimensions: ClassVar[tuple[int, ...]] = (3,)

    kind: Literal["power"] = Field("power", description="forcing that follows the state")
    power: Positive = Field(1.0, description="energy input per time, length^2/time^3")
    reach: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        1.5, description="largest |k| that is forced, integer wavenumber"
    )

    def modes(self, unit):
        return iter(())


class RingForcing(Forcing):
    """Equal coefficients with fixed random phases on all |k| within width of wavenumber.

    ``amplitude`` is the rms of the forcing.
    """

    PHASE_SEED: ClassVar[int] = 0

    kind: Literal["ring"] = Field("ring", description="steady forcing")
    amplitude: Finite = Field(0.1, description="1/time^2")
    wavenumber: Count = Field(4, description="integer wavenumber")
    width: Positive = Field(0.5, description="half width, integer wavenumbers")

    def modes(self, unit):
        from hpc_closure.spectral.modes.half_plane import ring
        from hpc_closure.spectral.noise.counters import standard_normals

        vectors = ring(self.wavenumber, self.width)
        draws = standard_normals(self.PHASE_SEED, "forcing", 0, width=2 * len(vectors))
        size = self.amplitude / math.sqrt(2 * len(vectors))
        for (kx, ky), (a, b) in zip(vectors.tolist(), draws.reshape(-1, 2).tolist()):
            yield kx, ky, size * complex(a, b) / math.hypot(a, b)

    def hash_parameters(self) -> dict:
        wavenumber = float(self.wavenumber)
        return {
            **super().hash_parameters(),
            "wavenumber": wavenumber,
            "phase_seed": self.PHASE_SEED,
        }
