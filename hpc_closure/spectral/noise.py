"""Stochastic forcings: Gaussian, diagonal in Fourier space; one class per kind."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from hpc_closure.spectral.recipe import Count, Family, NonNegative, Positive

if TYPE_CHECKING:
    import numpy as np

    from hpc_closure.spectral.grid import Grid


class Noise(Family):
    """Stochastic forcing beta xi."""

    default: ClassVar[str] = "q_wiener"
    #: of the flows that it is for
    dimensions: ClassVar[tuple[int, ...]] = (2,)

    kind: str

    @property
    def memory(self) -> float:
        """Correlation time; 0 = white."""
        return 0.0

    def law(self, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
        """Drawn modes and their variance.

        Returns:
            Half-plane wavevectors ``(M, 2)`` in the order drawn (on a line ``(0, k)``), and for
            each ``E |d(beta W_hat)|^2 / dt``, with memory ``E |beta xi_hat|^2``.
        """
        raise NotImplementedError


class NoNoise(Noise):
    """No stochastic forcing."""

    dimensions: ClassVar[tuple[int, ...]] = (1, 2)

    kind: Literal["none"] = "none"


class QWiener(Noise):
    """The published forcing, covariance proportional to exp(-r^2 / 4a).

    ``E |beta xi_hat|^2 = beta^2 kappa exp(-a k^2) / dt``, the mean included. The published code
    sums kappa draws; one draw times ``sqrt(kappa)`` has the same law. (Dong, Chen, Wu 2025; Lord,
    Powell, Shardlow 2014, ch. 10.)
    """

    # Modes below this fraction of the largest amplitude are left out (1e-12 of the variance).
    CUT: ClassVar[float] = 1e-6

    kind: Literal["q_wiener"] = Field(
        "q_wiener", description="stochastic forcing; q_wiener is the published one"
    )
    amplitude: NonNegative = Field(5e-5, description="beta")
    draws: Count = Field(
        10, description="kappa: the law is that of this many summed draws (one is drawn)"
    )
    correlation: Positive = Field(5e-3, description="a in the spectrum exp(-a |2 pi k|^2)")

    def law(self, grid):
        import numpy as np

        from hpc_closure.spectral.half_plane import wavevectors_within

        reach = math.sqrt(-2.0 * math.log(self.CUT) / self.correlation) / grid.unit
        vectors = wavevectors_within(int(reach), outer=reach)
        k2 = (vectors**2).sum(1) * grid.unit**2
        return vectors, self.amplitude**2 * self.draws * np.exp(-self.correlation * k2)


class RingNoise(Noise):
    """White forcing of all modes with |k| in [wavenumber - width, wavenumber + width].

    It brings equal energy to each mode, on the average exactly ``energy_rate`` in all (Ito: half
    the quadratic variation). Energy is ``1/2 sum |w_hat|^2 / k^2`` over the full plane; white
    noise of variance rate ``s`` injects ``s / (2 k^2)`` per mode.
    """

    kind: Literal["ring"] = Field("ring", description="stochastic forcing")
    wavenumber: Positive = Field(8.0, description="integer wavenumber")
    width: Positive = Field(1.0, description="half width")
    energy_rate: NonNegative = Field(1e-3, description="exact mean energy injection rate")

    def law(self, grid):
        from hpc_closure.spectral.half_plane import ring

        vectors = ring(self.wavenumber, self.width)
        k2 = (vectors**2).sum(1) * grid.unit**2
        return vectors, 2.0 * self.energy_rate * k2 / (2 * len(vectors))


class OrnsteinUhlenbeck(Noise):
    """Time-correlated forcing of all modes with |k| in [wavenumber - width, wavenumber + width].

    Every mode has the same variance, in all ``rms^2`` at a point.
    """

    kind: Literal["ornstein_uhlenbeck"] = Field(
        "ornstein_uhlenbeck", description="stochastic forcing"
    )
    wavenumber: Positive = Field(8.0, description="integer wavenumber")
    width: Positive = Field(1.0, description="half width")
    rms: NonNegative = Field(0.1, description="pointwise rms, 1/time^2")
    correlation_time: Positive = Field(0.1, description="memory, time units")

    @property
    def memory(self) -> float:
        return self.correlation_time

    def law(self, grid):
        import numpy as np

        from hpc_closure.spectral.half_plane import ring

        vectors = ring(self.wavenumber, self.width)
        return vectors, np.full(len(vectors), self.rms**2 / (2 * len(vectors)))
