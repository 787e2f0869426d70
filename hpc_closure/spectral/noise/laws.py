"""Laws of stochastic forcings: Gaussian, diagonal in Fourier space; one class per kind.

The noise of a step may also depend on the state.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from hpc_closure.spectral.recipe import Count, Family, NonNegative, Positive

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from hpc_closure.spectral.modes.grid import Grid
    from hpc_closure.spectral.noise.state_dependent import Response


class Noise(Family):
    """Stochastic forcing beta xi."""

    default: ClassVar[str] = "q_wiener"
    #: dimensions of the flows that the forcing is for
    dimensions: ClassVar[tuple[int, ...]] = (2,)
    #: whether the noise of a step depends on the state at its start
    depends_on_state: ClassVar[bool] = False

    kind: str

    @property
    def memory(self) -> float:
        """Return the correlation time; 0 = white."""
        return 0.0

    def law(self, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
        """Return the drawn modes and their variance.

        Returns:
            Half-plane wavevectors ``(M, 2)`` in the order drawn (on a line ``(0, k)``, in three
            dimensions ``(M, 3)``), and the variance ``(M,)``: ``E |d(beta W_hat)|^2 / dt`` of
            white noise, ``E |beta xi_hat|^2`` of noise with a correlation time. In three
            dimensions it is that of all components of a solenoidal vector.
        """
        raise NotImplementedError

    def response(self, model, members: Sequence[int]) -> Response | None:
        """Return the map from draw and state to the noise of a step; None if noise = draw.

        Args:
            model: the :class:`~hpc_closure.spectral.noise.draws.NoiseModel` that draws.
            members: ids of the ensemble.
        """
        return None

    def check(self, dt: float, cfl: float | None) -> None:
        """Raise ValueError if the forcing cannot be computed with these steps."""

    def symmetry_fields(self, grid: Grid) -> list[Tensor]:
        """Return fields ``(n, n)`` whose symmetries are those of the law.

        A map of the square that leaves them unchanged leaves the law unchanged. There are none if
        the law is homogeneous and as isotropic as a square is.
        """
        return []


class NoNoise(Noise):
    """No stochastic forcing."""

    dimensions: ClassVar[tuple[int, ...]] = (1, 2, 3)

    kind: Literal["none"] = "none"


class QWiener(Noise):
    """The published forcing, covariance proportional to exp(-r^2 / 4a).

    ``E |beta xi_hat|^2 = beta^2 kappa exp(-a k^2) / dt``, also for the mean. The published code
    sums kappa draws; one draw times ``sqrt(kappa)`` has the same law. (Dong, Chen, Wu 2025; Lord,
    Powell, Shardlow 2014, ch. 10.)
    """

    # Modes below this fraction of the largest amplitude are not drawn (1e-12 of its variance).
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

        from hpc_closure.spectral.modes.half_plane import wavevectors_within

        reach = math.sqrt(-2.0 * math.log(self.CUT) / self.correlation) / grid.unit
        vectors = wavevectors_within(int(reach), outer=reach)
        k2 = (vectors**2).sum(1) * grid.unit**2
        return vectors, self.amplitude**2 * self.draws * np.exp(-self.correlation * k2)


class RingNoise(Noise):
    """White forcing of all modes with |k| in [wavenumber - width, wavenumber + width].

    Every mode receives the same energy; the total mean rate is exactly ``energy_rate`` (Ito: half
    the quadratic variation). Energy is ``1/2 sum |w_hat|^2 / k^2`` over the full plane; white
    noise of variance rate ``s`` injects ``s / (2 k^2)`` per mode. In three dimensions the noise is
    a solenoidal force on the velocity, which injects ``s / 2`` per mode.
    """

    dimensions: ClassVar[tuple[int, ...]] = (2, 3)

    kind: Literal["ring"] = Field("ring", description="stochastic forcing")
    wavenumber: Positive = Field(8.0, description="integer wavenumber")
    width: Positive = Field(1.0, description="half width")
    energy_rate: NonNegative = Field(1e-3, description="exact mean energy injection rate")

    def law(self, grid):
        import numpy as np

        from hpc_closure.spectral.modes.half_plane import ring

        vectors = ring(self.wavenumber, self.width, grid.dimensions)
        k2 = (vectors**2).sum(1) * grid.unit**2
        if grid.dimensions == 3:
            k2 = np.ones(len(vectors))
        return vectors, 2.0 * self.energy_rate * k2 / (2 * len(vectors))


class OrnsteinUhlenbeck(Noise):
    """Time-correlated forcing of all modes with |k| in [wavenumber - width, wavenumber + width].

    Every mode has the same variance; the pointwise variance of the sum is ``rms^2``. In three
    dimensions it is a solenoidal force on the velocity, ``rms^2`` the variance of its vector.
    """

    dimensions: ClassVar[tuple[int, ...]] = (2, 3)

    kind: Literal["ornstein_uhlenbeck"] = Field(
        "ornstein_uhlenbeck", description="stochastic forcing"
    )
    wavenumber: Positive = Field(8.0, description="integer wavenumber")
    width: Positive = Field(1.0, description="half width")
    rms: NonNegative = Field(
        0.1, description="pointwise rms, 1/time^2; in three dimensions length/time^2"
    )
    correlation_time: Positive = Field(0.1, description="memory, time units")

    @property
    def memory(self) -> float:
        return self.correlation_time

    def law(self, grid):
        import numpy as np

        from hpc_closure.spectral.modes.half_plane import ring

        vectors = ring(self.wavenumber, self.width, grid.dimensions)
        return vectors, np.full(len(vectors), self.rms**2 / (2 * len(vectors)))


class StateDependentNoise(QWiener):
    """White noise that depends on the state at the start of each step, in the sense of Ito."""

    depends_on_state: ClassVar[bool] = True

    kind: str  # type: ignore[assignment]

    def check(self, dt, cfl):
        if cfl:
            raise ValueError(
                f"generate.cfl={cfl:g}: noise {self.kind} depends on the state at the start of "
                "steps of one length; remove cfl, or choose another physics.noise.kind"
            )


class StateAmplitude(StateDependentNoise):
    """Noise whose amplitude depends on the flow: D(w) beta xi, D = 1 + c |w| / rms(w).

    w is the state at the start of the step (Ito). The product is formed on the points of the
    solver's grid and cut to its modes.
    """

    kind: Literal["state_amplitude"] = Field(
        "state_amplitude", description="stochastic forcing"
    )  # type: ignore[assignment]
    strength: NonNegative = Field(
        1.0, description="c: the noise is multiplied by 1 + c |w| / rms(w)"
    )

    def response(self, model, members):
        from hpc_closure.spectral.noise.state_dependent import Amplitude

        return Amplitude(self.strength, model)


class TwoRegimes(StateDependentNoise):
    """Noise with two regimes, drawn anew for every interval of length ``hold``.

    With probability p(w), w the state at the start of an interval, the noise in the interval is b1
    beta xi + a phi, otherwise b2 beta xi - a phi. Here phi = sqrt(2) cos(2 pi x / L) times the
    pointwise standard deviation of the interval's mean of beta xi. So the mean over the interval
    is the same mixture for any number of steps in it. p(w) = 1 / (1 + exp(-s / scale)), s the mean
    of w sqrt(2) sin(2 pi y / L) over rms(w).
    """

    kind: Literal["two_regimes"] = Field(
        "two_regimes", description="stochastic forcing"
    )  # type: ignore[assignment]
    amplitudes: tuple[Positive, Positive] = Field(
        (0.6, 1.0), description="b1, b2: factors of the noise in the two regimes"
    )
    pattern: NonNegative = Field(
        1.0, description="a: size of the pattern, in standard deviations of an interval's mean"
    )
    scale: Positive = Field(
        0.25, description="of the regimes' probability p(w): the smaller, the more it varies"
    )
    hold: Positive = Field(
        1e-2, description="time that a regime lasts, a multiple of dt: the closure's interval"
    )

    def steps(self, dt: float) -> int:
        """Return the number of steps of ``dt`` in an interval."""
        return max(1, round(self.hold / dt))

    def check(self, dt, cfl):
        super().check(dt, cfl)
        nearest = self.steps(dt) * dt
        if abs(nearest - self.hold) > 1e-6 * self.hold:
            raise ValueError(
                f"physics.noise.hold={self.hold:g} is not a multiple of generate.dt={dt:g}; "
                f"nearest: {nearest:g}"
            )

    def symmetry_fields(self, grid):
        import torch

        # the pattern phi, and the field that p(w) projects w on
        x, y = ((2 * math.pi / grid.length) * axis for axis in grid.coordinates())
        shape = (grid.size, grid.size)
        return [torch.cos(x).expand(shape), torch.sin(y).expand(shape)]

    def response(self, model, members):
        from hpc_closure.spectral.noise.state_dependent import Regimes

        return Regimes(self, model, members)
