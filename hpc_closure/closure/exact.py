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
from hpc_closure.closure.bands import band
from hpc_closure.closure.conditions import Sensors
from hpc_closure.closure.law import BaseLaw, Kriging
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
                f"no exact law is known for closure {kind!r} with noise {problem.noise['kind']!r}"
            )
        self.problem, self.kind = problem, kind
        self.grid = problem.make_grid()
        self.transform = Transform(self.grid)
        self.equation = problem.make_equation(self.transform)
        self.band = band(self.grid.modes, problem.length)
        spectrum = self.band.by_group(noise.std_hat.double() ** 2) / interval
        self.law = BaseLaw(self.band, spectrum / self.band.group_size)

    @property
    def variance(self) -> float:
        """Pointwise variance of U without sensors."""
        return self.law.variance

    def mean_hat(self, states: Tensor) -> Tensor:
        """Spectra of E[U | V] without sensors, for states (B, n, n)."""
        w_hat = self.transform.to_spectral(states.double().cpu())
        if self.kind == "diffusion":
            return w_hat * (-0.5 * self.problem.viscosity * self.grid.k2)
        pairs = torch.view_as_real(w_hat.contiguous())
        out = torch.zeros_like(pairs)
        return torch.view_as_complex(self.equation.nonlinear(pairs, out))

    def mean(self, states: Tensor, sensors: Sensors | None = None) -> Tensor:
        """E[U | V, sensors], (B, n, n) float64."""
        mean_hat = self.mean_hat(states)
        if sensors is not None:
            mean_hat = mean_hat + self._kriging(sensors).field(self._innovation(mean_hat, sensors))
        return self.transform.to_physical(mean_hat)

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
        mean_hat = self.mean_hat(states)
        kriging = errors = None
        if sensors is not None:
            kriging = self._kriging(sensors)
            mean_hat = mean_hat + kriging.field(self._innovation(mean_hat, sensors))
        std = self.law.modes("std", mean_hat)
        out = []
        for member in members:
            ids = [member * 1_000_003 + row for row in range(len(states))]
            noise = draws.white_spectra(self.band, seed, "oracle", ids, call) * std
            if sensors is not None and kriging is not None:
                if sensors.noise_std:
                    shape = len(sensors.positions)
                    errors = draws.normals(seed, "oracle", ids, call, shape) * sensors.noise_std
                noise = kriging.remove(noise, errors)
            out.append(self.transform.to_physical(mean_hat + noise))
        return torch.stack(out)

    def posterior_variance(self, sensors: Sensors) -> float:
        """Pointwise variance of U given exact positions, averaged over the grid."""
        share = self._kriging(sensors).std(self.grid.size)
        return float(share.square().mean() * self.law.variance)

    def _kriging(self, sensors: Sensors) -> Kriging:
        noise = torch.full((len(sensors.positions),), sensors.noise_std**2, dtype=torch.float64)
        return Kriging(self.law, sensors.positions, noise)

    def _innovation(self, mean_hat: Tensor, sensors: Sensors) -> Tensor:
        values = sensors.values.double().cpu().reshape(-1, len(sensors.positions))
        return values - self.band.at(mean_hat, self.band.phases(sensors.positions))
