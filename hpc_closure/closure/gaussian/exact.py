r"""Closed-form laws of the closure, used as reference for calibration.

With the published stochastic forcing, the closure of one step is Gaussian given the state,

.. math:: U_\mathrm{diffusion} \sim N(\tfrac{\nu}{2}\Delta w,\ \beta^2 Q), \qquad
          U_\mathrm{convection} \sim N(-u\cdot\nabla w,\ \beta^2 Q),

(G = 2U in Dong, Chen, Wu, JCP 2025). An m-step mean has 1/m of the variance, and point sensors
condition the law exactly by kriging. :mod:`~hpc_closure.closure.gaussian.fluctuation` has the laws
for state-dependent noise.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.fields.sensors import Sensors, fourier_interpolation, values_at
from hpc_closure.closure.gaussian.fluctuation import FLUCTUATIONS, Seen
from hpc_closure.closure.gaussian.kriging import StationaryGaussian
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.problem import REMOVABLE, Problem

__all__ = ["ExactLaw"]


class ExactLaw:
    """Exact law p(U | V, sensors) with white stochastic forcing: known term + fluctuation.

    Args:
        problem: the full system on the grid of the states.
        kind: ``diffusion`` or ``convection``.
        interval: solver steps over which a closure is a mean.

    Raises:
        ValueError: no closed form is known.
    """

    def __init__(self, problem: Problem, kind: str, interval: int = 1):
        refusal = self.refusal(problem, kind, interval)
        if refusal is not None:
            raise ValueError(refusal)
        self.problem, self.kind = problem, kind
        self.grid = problem.make_grid()
        self.transform = Transform(self.grid)
        self.equation = problem.make_equation(self.transform)
        self.band = band(self.grid.modes, problem.length)
        noise = problem.make_noise(0)
        assert noise is not None
        spectrum = self.band.by_group(noise.std_hat.double() ** 2) / interval
        self.law = StationaryGaussian(self.band, spectrum / self.band.group_size)
        shape = FLUCTUATIONS[problem.physics.noise.kind]
        self.fluctuation = shape(self.law, noise, self.transform)

    @staticmethod
    def refusal(problem: Problem, kind: str, interval: int = 1) -> str | None:
        """Return why no closed form is known; None if one is."""
        noise = problem.physics.noise
        if kind not in REMOVABLE or noise.kind not in FLUCTUATIONS:
            return f"no exact law is known for closure {kind!r} with noise {noise.kind!r}"
        why = FLUCTUATIONS[noise.kind].refusal(noise, problem.dt, interval)
        return why and f"no exact law is known for {why}"

    @classmethod
    def of(cls, problem: Problem, kind: str, interval: int = 1) -> "ExactLaw | None":
        """Return the law; None if no closed form is known."""
        if cls.refusal(problem, kind, interval) is not None:
            return None
        return cls(problem, kind, interval)

    @property
    def homogeneous(self) -> bool:
        """Whether U - E[U | V] is Gaussian with one covariance for all states."""
        return self.fluctuation.homogeneous

    @property
    def variance(self) -> float:
        """Pointwise variance of the noise's mean over the interval, before it depends on V.

        If the law is homogeneous, this is the variance of U without sensors; otherwise see
        :meth:`variance_at`.
        """
        return self.law.variance

    # for fields

    def mean(self, states: Tensor, sensors: Sensors | None = None) -> Tensor:
        """Compute E[U | V, sensors], (B, n, n) float64, for states (B, n, n)."""
        w_hat = self.spectra(states)
        known, seen = self._seen(w_hat, sensors)
        return self.transform.to_physical(known + self.fluctuation.mean_hat(w_hat, seen))

    def variance_at(self, states: Tensor) -> Tensor:
        """Compute Var[U | V] without sensors, (B, n, n) float64, for states (B, n, n)."""
        return self.fluctuation.variance_at(self.spectra(states))

    def known_term(self, states: Tensor, sensors: Sensors | None = None) -> Tensor:
        """Compute the baseline ``physics``, (B, n, n): E[U | V] plus interpolated innovations.

        Innovations are readings minus E[U | V]. They are interpolated by Fourier modes between the
        sensors of a regular layout; the covariance of the law is not used.
        """
        known = self.mean(states)
        if sensors is None:
            return known
        at_sensors = values_at(known, sensors.positions, self.problem.length)
        beyond = Sensors(sensors.values.double() - at_sensors, sensors.positions)
        return known + fourier_interpolation(beyond, states.shape[-1])

    def sample(
        self,
        states: Tensor,
        *,
        members: Sequence[int],
        seed: int,
        call: int = 0,
        sensors: Sensors | None = None,
    ) -> Tensor:
        """Draw U, (members, B, n, n) float64, independently for each member and state."""
        rows, w_hat = range(len(states)), self.spectra(states)
        keys = [[keyed_noise.pair(member, row) for row in rows] for member in members]
        drawn = self._draws(
            w_hat, [keyed_noise.Key(seed, "oracle", ids, call) for ids in keys], sensors
        )
        return self.transform.to_physical(torch.stack(drawn))

    def draw(
        self,
        states: Tensor,
        ids: Sequence[int],
        seed: int,
        call: int,
        sensors: Sensors | None = None,
    ) -> Tensor:
        """Draw a U per state, (B, n, n) float64; ``ids`` (B,) key the draws."""
        drawn = self.draw_hat(self.spectra(states), ids, seed, call, sensors)
        return self.transform.to_physical(drawn)

    def spectra(self, states: Tensor) -> Tensor:
        """Transform states (B, n, n) to retained spectra, complex128 on the CPU."""
        return self.transform.to_spectral(states.double().cpu())

    # for retained spectra

    def mean_hat(self, w_hat: Tensor) -> Tensor:
        """Compute spectra of E[U | V] without sensors from spectra of states, on the CPU."""
        w_hat = _plain(w_hat)
        return self._removed(w_hat) + self.fluctuation.mean_hat(w_hat, None)

    def draw_hat(
        self,
        w_hat: Tensor,
        ids: Sequence[int],
        seed: int,
        call: int,
        sensors: Sensors | None = None,
    ) -> Tensor:
        """Draw a U per state, spectra (B, 2K + 1, K + 1); ``ids`` (B,) key the draws."""
        return self._draws(_plain(w_hat), [keyed_noise.Key(seed, "oracle", ids, call)], sensors)[0]

    def posterior_variance(self, sensors: Sensors) -> float:
        """Compute the variance of U given readings, averaged over the grid.

        Raises:
            ValueError: the variance depends on the state.
        """
        if not self.homogeneous:
            kind = self.problem.physics.noise.kind
            raise ValueError(f"with noise {kind!r} the variance given sensors differs by state")
        seen = Seen(sensors, torch.zeros(1, len(sensors.positions), dtype=torch.float64))
        share = self.fluctuation.kriging(seen)[0].std(self.grid.size)
        return float(share.square().mean() * self.law.variance)

    # parts

    def _removed(self, w_hat: Tensor) -> Tensor:
        """Compute spectra of the removed term, the known part of U."""
        if self.kind == "diffusion":
            return w_hat * (-0.5 * self.problem.viscosity * self.grid.k2)
        pairs = torch.view_as_real(w_hat.contiguous())
        out = torch.zeros_like(pairs)
        return torch.view_as_complex(self.equation.nonlinear(pairs, out))

    def _seen(self, w_hat: Tensor, sensors: Sensors | None) -> tuple[Tensor, Seen | None]:
        """Compute the removed term, and the readings minus it (None without sensors)."""
        known = self._removed(w_hat)
        if sensors is None:
            return known, None
        values = sensors.values.double().cpu().reshape(-1, len(sensors.positions))
        there = self.band.values(known, sensors.positions)
        return known, Seen(sensors, values - there)

    def _draws(
        self, w_hat: Tensor, keys: Sequence[keyed_noise.Key], sensors: Sensors | None
    ) -> list[Tensor]:
        """Draw, for each key, a U per state, spectra (B, 2K + 1, K + 1)."""
        known, seen = self._seen(w_hat, sensors)
        return [known + drawn for drawn in self.fluctuation.draw_hat(w_hat, keys, seen)]


def _plain(w_hat: Tensor) -> Tensor:
    return w_hat.to(device="cpu", dtype=torch.complex128)
