r"""Closed-form laws of the closure, against which calibration is certified.

With the published stochastic forcing the closures of one step are Gaussian given the state,

.. math:: U_\mathrm{diffusion} \sim N(\tfrac{\nu}{2}\Delta w,\ \beta^2 Q), \qquad
          U_\mathrm{convection} \sim N(-u\cdot\nabla w,\ \beta^2 Q),

(G = 2U of Dong, Chen, Wu, JCP 2025), an m-step mean has 1/m of the variance, and point sensors
condition the law exactly (kriging).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hpc_closure.closure import draws
from hpc_closure.closure.band import band
from hpc_closure.closure.law import BaseLaw, Kriging
from hpc_closure.closure.sensors import Sensors, fourier_interpolation, values_at
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.transform import Transform

__all__ = ["ExactLaw"]


class ExactLaw:
    """p(U | V, sensors) of a problem with white stochastic forcing.

    Args:
        problem: the full system, on the grid of the states that will be given.
        kind: ``diffusion`` or ``convection``.
        interval: solver steps that one closure stands for.

    Raises:
        ValueError: no closed form is known.
    """

    def __init__(self, problem: Problem, kind: str, interval: int = 1):
        noise = problem.make_noise(0)
        if kind not in ("diffusion", "convection") or noise is None or noise.correlation_time:
            raise ValueError(
                f"no exact law is known for closure {kind!r} with noise "
                f"{problem.physics.noise.kind!r}"
            )
        self.problem, self.kind = problem, kind
        self.grid = problem.make_grid()
        self.transform = Transform(self.grid)
        self.equation = problem.make_equation(self.transform)
        self.band = band(self.grid.modes, problem.length)
        spectrum = self.band.by_group(noise.std_hat.double() ** 2) / interval
        self.law = BaseLaw(self.band, spectrum / self.band.group_size)
        self._kept: tuple[tuple, Kriging] | None = None  # of the last layout

    @classmethod
    def of(cls, problem: Problem, kind: str, interval: int = 1) -> "ExactLaw | None":
        """The law, or None where no closed form is known."""
        try:
            return cls(problem, kind, interval)
        except ValueError:
            return None

    @property
    def variance(self) -> float:
        """Pointwise variance of U without sensors."""
        return self.law.variance

    # given fields

    def mean(self, states: Tensor, sensors: Sensors | None = None) -> Tensor:
        """E[U | V, sensors], (B, n, n) float64, for states (B, n, n)."""
        return self.transform.to_physical(self._centre(self.spectra(states), sensors))

    def known_term(self, states: Tensor, sensors: Sensors | None = None) -> Tensor:
        """The baseline ``physics``, (B, n, n): E[U | V], plus what sensors see beyond it.

        That is interpolated between the sensors of a regular layout, without the law's help.
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
        """Draws of U, (members, B, n, n) float64; each member and state draws for itself."""
        rows, w_hat = range(len(states)), self.spectra(states)
        keys = [[draws.pair(member, row) for row in rows] for member in members]
        drawn = torch.stack([self.draw_hat(w_hat, ids, seed, call, sensors) for ids in keys])
        return self.transform.to_physical(drawn)

    def draw(
        self,
        states: Tensor,
        ids: Sequence[int],
        seed: int,
        call: int,
        sensors: Sensors | None = None,
    ) -> Tensor:
        """One U for each state, (B, n, n) float64; ``ids`` key the draws."""
        drawn = self.draw_hat(self.spectra(states), ids, seed, call, sensors)
        return self.transform.to_physical(drawn)

    def spectra(self, states: Tensor) -> Tensor:
        """Retained spectra, complex128 on the CPU, of states (B, n, n)."""
        return self.transform.to_spectral(states.double().cpu())

    # given retained spectra

    def mean_hat(self, w_hat: Tensor) -> Tensor:
        """Spectra of E[U | V] without sensors, of those of the states; float64 on the CPU."""
        w_hat = w_hat.to(device="cpu", dtype=torch.complex128)
        if self.kind == "diffusion":
            return w_hat * (-0.5 * self.problem.viscosity * self.grid.k2)
        pairs = torch.view_as_real(w_hat.contiguous())
        out = torch.zeros_like(pairs)
        return torch.view_as_complex(self.equation.nonlinear(pairs, out))

    def draw_hat(
        self,
        w_hat: Tensor,
        ids: Sequence[int],
        seed: int,
        call: int,
        sensors: Sensors | None = None,
    ) -> Tensor:
        """One U for each state, spectra (B, 2K + 1, K + 1); ``ids`` key the draws."""
        key = draws.Key(seed, "oracle", ids, call)
        noise = self.law.coloured(draws.white_spectra(self.band, *key))
        if sensors is not None:
            errors = None
            if sensors.noise_std:
                errors = draws.normals(*key, len(sensors.positions)) * sensors.noise_std
            noise = self._kriging(sensors).remove(noise, errors)
        return self._centre(w_hat, sensors) + noise

    def _centre(self, w_hat: Tensor, sensors: Sensors | None) -> Tensor:
        """Spectra of E[U | V, sensors]."""
        mean_hat = self.mean_hat(w_hat)
        if sensors is None:
            return mean_hat
        return mean_hat + self._kriging(sensors).field(self._innovation(mean_hat, sensors))

    def posterior_variance(self, sensors: Sensors) -> float:
        """Pointwise variance of U given exact positions, averaged over the grid."""
        share = self._kriging(sensors).std(self.grid.size)
        return float(share.square().mean() * self.law.variance)

    def _kriging(self, sensors: Sensors) -> Kriging:
        if self._kept is None or self._kept[0] != sensors.key:
            number = len(sensors.positions)
            noise = torch.full((number,), sensors.noise_std**2, dtype=torch.float64)
            self._kept = sensors.key, Kriging(self.law, sensors.positions, noise)
        return self._kept[1]

    def _innovation(self, mean_hat: Tensor, sensors: Sensors) -> Tensor:
        values = sensors.values.double().cpu().reshape(-1, len(sensors.positions))
        return values - self.band.at(mean_hat, self.band.phases(sensors.positions))
