r"""Stirred moisture and rain clouds on a periodic square: three channels.

.. math::
   w_t + u\cdot\nabla w &= \nu\nabla^2 w - \alpha w + \beta\xi \\
   m_t + u\cdot\nabla m &= \kappa\nabla^2 m + (1 - m)/T_m - h m \\
   h_t + u\cdot\nabla h &= \kappa\nabla^2 h - h/T_h + \sum_j A_j\,g(x - x_j)\,\delta(t - t_j)

The moisture m is restored towards 1 and rained out at the rate h of the clouds. Clouds are born at
random: at rate :math:`r\,(\max(m, 0)/m_0)^4` per area and time, with exponential sizes A of mean 1
and the shape :math:`g(x) = G\exp(-|x|^2/(2 s^2))`. Births as rare events of finite size are those
of stochastic convection (Craig and Cohen 2006, Plant and Craig 2008).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from hpc_closure.spectral.equations.base import Channel, Equation, Stirred
from hpc_closure.spectral.recipe import NonNegative, Positive

POWER = 4  # of the moisture in the rate of births
MOISTEST = 1.0  # the rate is cut at this moisture, to which m is restored


class Clouds(Equation):
    """Vorticity, moisture and rate of rain-out on a square."""

    dimensions: ClassVar[int] = 2
    channels: ClassVar[tuple[Channel, ...]] = (
        Channel("vorticity", "1/time", "pseudo-scalar"),
        Channel("moisture", "", "scalar"),
        Channel("rain", "1/time", "scalar"),
    )
    #: channels that determine the rate of births and that receive the clouds
    birth_channels: ClassVar[tuple[int, int]] = (1, 2)

    equation: Literal["clouds"] = "clouds"
    viscosity: NonNegative = Field(2e-3, description="nu, length^2/time")
    drag: NonNegative = Field(0.0, description="linear drag, 1/time")
    diffusivity: NonNegative = Field(3e-3, description="of moisture and rain, length^2/time")
    moistening_time: Positive = Field(1.5, description="T_m, time in which moisture is restored")
    rain_time: Positive = Field(0.15, description="T_h, time in which a cloud rains out")
    births: Literal["random", "mean"] = Field(
        "random", description="random: single clouds; mean: their mean rate (reduced solver)"
    )
    birth_rate: NonNegative = Field(2.0, description="r, per area and time at m = m_0")
    birth_moisture: Positive = Field(0.5, description="m_0")
    cloud_strength: NonNegative = Field(20.0, description="G, 1/time")
    cloud_width: Positive = Field(0.2, description="s, length")

    @property
    def damping(self) -> dict[int, float]:
        return {1: self.viscosity} if self.viscosity else {}

    @property
    def other_linear_terms(self) -> list[str]:
        return ["moistening_time"]

    def linear(self, grid):
        import torch

        scalar = -self.diffusivity * grid.k2
        rates = [
            -self.viscosity * grid.k2 - self.drag,
            scalar - 1 / self.moistening_time,
            scalar - 1 / self.rain_time,
        ]
        return torch.stack(rates) + 0j

    def steady(self, grid):
        out = super().steady(grid)
        out[1, 0, 0] = 1 / self.moistening_time
        return out

    def draw_initial(self, grid, members, seed, stage):
        out = super().draw_initial(grid, members, seed, stage)
        out[:, 1, 0, 0] = 1.0  # saturated, without clouds
        return out

    @property
    def largest_rate(self) -> float:
        """Return the births per area and time at which :meth:`rate` is cut."""
        return self.birth_rate * (MOISTEST / self.birth_moisture) ** POWER

    def rate(self, moisture):
        """Return births per area and time at values of the moisture (array or tensor)."""
        return self.birth_rate * (moisture.clip(0, MOISTEST) / self.birth_moisture) ** POWER

    def blob(self, grid):
        """Return the retained spectrum of a cloud of size 1 at the origin, real float64."""
        import math

        import torch

        area = 2 * math.pi * self.cloud_width**2 / grid.length**2
        return self.cloud_strength * area * torch.exp(-0.5 * self.cloud_width**2 * grid.k2)

    @property
    def is_random(self):
        return super().is_random or (self.births == "random" and self.birth_rate > 0)

    def without_noise(self):
        return {**super().without_noise(), "births": "mean"}

    def events(self, grid, dt, seed, stage):
        if self.births == "mean" or not self.birth_rate:
            return None
        from hpc_closure.spectral.noise.events import Births

        return Births(self, grid, dt, seed, stage)

    def terms(self, transform, form):
        return CloudTerms(self, transform)


class CloudTerms(Stirred):
    """Advection of the three channels, rain-out, and with ``births: mean`` the mean births."""

    def __init__(self, equation: Clouds, transform):
        super().__init__(equation, transform)
        grid = transform.grid
        self.equation = equation
        area = grid.length**2
        self.births = (
            transform.factors(area * equation.blob(grid)) if equation.births == "mean" else None
        )

    def nonlinear(self, w, out):
        transform, out = self.transform, self.carry(w, out)
        moisture, rain = transform.synthesize((w[:, 1], None), (w[:, 2], None))
        out[:, 1].sub_(transform.analyse(rain.mul_(moisture)[None])[0])
        if self.births is not None:
            rate = self.equation.rate(moisture)
            out[:, 2].add_(transform.analyse(rate[None], self.births)[0])
        return out

    def differentiable_nonlinear(self, w, transform):
        import torch

        by_channel = self.differentiable_carry(w, transform)
        moisture, rain = transform.fields(w[:, 1]), transform.fields(w[:, 2])
        by_channel[1] = by_channel[1] - transform.spectra(rain * moisture)
        if self.births is not None:
            rate = self.equation.rate(moisture)
            by_channel[2] = by_channel[2] + transform.spectra(rate) * self.births[0]
        return torch.stack(by_channel, 1)
