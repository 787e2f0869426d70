r"""Noise schedules: :math:`x_t = \alpha(t)\,x_0 + \sigma(t)\,z`, and the times at which to sample.

The base noise z is the model's: white, or drawn from the law of the residual ("matched"). With
matched noise both ends have the same covariance, the trigonometric schedule keeps it at every t,
and for a Gaussian law the velocity :math:`E[\dot x_t | x_t]` is zero: any number of steps is
exact.

References: Song et al. 2021 (VE); Karras et al. 2022 (EDM); Lipman et al. 2023 (flow matching);
Lu and Song 2024 (trigonometric form); Dong, Chen, Wu 2025 (the published closure model).
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["Schedule", "Trigonometric", "FlowMatching", "EDM", "PublishedVE", "SCHEDULES"]


class Schedule(ABC):
    """alpha, sigma, their derivatives, and ``times(n)``: n + 1 decreasing, the last clean."""

    @abstractmethod
    def alpha(self, t: float) -> float:
        """Share of the data."""

    @abstractmethod
    def sigma(self, t: float) -> float:
        """Share of the noise."""

    @abstractmethod
    def alpha_dot(self, t: float) -> float:
        """d alpha / dt."""

    @abstractmethod
    def sigma_dot(self, t: float) -> float:
        """d sigma / dt."""

    @abstractmethod
    def times(self, num_steps: int) -> list[float]:
        """Times of a sampler with ``num_steps`` steps."""

    def angle(self, t: float) -> float:
        """atan2(sigma, alpha): the only thing about t that a matched network needs to know."""
        return math.atan2(self.sigma(t), self.alpha(t))

    def norm(self, t: float) -> float:
        """sqrt(alpha^2 + sigma^2): std of x_t when data and noise have unit variance."""
        return math.hypot(self.alpha(t), self.sigma(t))


class Trigonometric(Schedule):
    r""":math:`x_t = \cos t\,x_0 + \sin t\,z`, t from pi/2 to 0, equal steps of the angle."""

    def alpha(self, t: float) -> float:
        return math.cos(t) if t < math.pi / 2 - 1e-12 else 0.0

    def sigma(self, t: float) -> float:
        return math.sin(t)

    def alpha_dot(self, t: float) -> float:
        return -math.sin(t)

    def sigma_dot(self, t: float) -> float:
        return math.cos(t) if t < math.pi / 2 - 1e-12 else 0.0

    def times(self, num_steps: int) -> list[float]:
        return [math.pi / 2 * (1 - i / num_steps) for i in range(num_steps + 1)]


class FlowMatching(Schedule):
    r""":math:`x_t = (1 - t)\,x_0 + t\,z`, t from 1 to 0, equal steps."""

    def alpha(self, t: float) -> float:
        return 1.0 - t

    def sigma(self, t: float) -> float:
        return t

    def alpha_dot(self, t: float) -> float:
        return -1.0

    def sigma_dot(self, t: float) -> float:
        return 1.0

    def times(self, num_steps: int) -> list[float]:
        return [1 - i / num_steps for i in range(num_steps + 1)]


class EDM(Schedule):
    r""":math:`x_\sigma = x_0 + \sigma z` on the grid of Karras et al. (2022), eq. 5, rho = 7.

    Args:
        sigma_max: first noise level, in units of the data.
        sigma_min: last noise level before zero.
        rho: exponent of the grid.
    """

    def __init__(self, sigma_max: float = 80.0, sigma_min: float = 2e-3, rho: float = 7.0):
        self.sigma_max, self.sigma_min, self.rho = sigma_max, sigma_min, rho

    def alpha(self, t: float) -> float:
        return 1.0

    def sigma(self, t: float) -> float:
        return t

    def alpha_dot(self, t: float) -> float:
        return 0.0

    def sigma_dot(self, t: float) -> float:
        return 1.0

    def times(self, num_steps: int) -> list[float]:
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        last = max(num_steps - 1, 1)
        return [(high + i / last * (low - high)) ** self.rho for i in range(num_steps)] + [0.0]


class PublishedVE(Schedule):
    r"""The published SDE, :math:`dx = 26^t dW`: sigma(t)^2 = (26^{2t} - 1) / (2 ln 26).

    Sampled on a rho = 7 grid of the SDE time from 0.1 to 1e-3.
    """

    def __init__(self, base: float = 26.0, t_max: float = 0.1, t_min: float = 1e-3):
        self.base, self.t_max, self.t_min = base, t_max, t_min

    def alpha(self, t: float) -> float:
        return 1.0

    def sigma(self, t: float) -> float:
        return math.sqrt(max(self.base ** (2 * t) - 1, 0.0) / (2 * math.log(self.base)))

    def sigmas(self, t: Tensor) -> Tensor:
        """sigma of a tensor of times."""
        return torch.sqrt((self.base ** (2 * t) - 1) / (2 * math.log(self.base)))

    def norm(self, t: float) -> float:
        # as published: the start has the noise's std alone, the data's variance left out
        return self.sigma(t)

    def alpha_dot(self, t: float) -> float:
        return 0.0

    def sigma_dot(self, t: float) -> float:
        return self.base ** (2 * t) / (2 * self.sigma(t))

    def diffusion(self, t: float) -> float:
        """g(t) of the SDE."""
        return self.base**t

    def times(self, num_steps: int) -> list[float]:
        high, low = self.t_max ** (1 / 7), self.t_min ** (1 / 7)
        last = max(num_steps - 1, 1)
        return [(high + i / last * (low - high)) ** 7 for i in range(num_steps)] + [0.0]


SCHEDULES = {
    "trigonometric": Trigonometric,
    "flow_matching": FlowMatching,
    "edm": EDM,
    "published_ve": PublishedVE,
}
