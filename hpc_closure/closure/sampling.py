r"""Noise schedules and samplers; the base class runs the loop, each subclass defines one step.

A sampler transforms base noise z into a sample of the data with a denoiser
:math:`D(x, t) = E[x_0 | x_t = x]`. With :math:`x_t = \alpha x_0 + \sigma z` the probability flow
is

.. math:: \dot x_t = \dot\alpha\,D + \dot\sigma\,\hat z, \quad \hat z = (x_t - \alpha D) / \sigma.

The base noise z is drawn from the law of the residual, so both ends have the same covariance, and
the trigonometric schedule preserves it at every t. For a Gaussian law the velocity
:math:`E[\dot x_t | x_t]` is zero, so any number of steps is exact. The budget counts evaluations
of the denoiser: a Heun step costs two.

References: Song et al. 2021 (VE); Karras et al. 2022 (Heun's rule); Lu et al. 2022
(DPM-Solver++); Lu and Song 2024 (trigonometric form); Dong, Chen, Wu 2025 (the published closure
model).
"""

import math
from abc import ABC, abstractmethod
from typing import Callable

import torch
from torch import Tensor

__all__ = [
    "GaussianStep",
    "PublishedVE",
    "SAMPLERS",
    "Sampler",
    "Schedule",
    "Trigonometric",
    "build_sampler",
]

Denoiser = Callable[[Tensor, float], Tensor]


class Schedule(ABC):
    """Schedule alpha(t), sigma(t): factors of data and noise in x_t."""

    @abstractmethod
    def alpha(self, t: float) -> float:
        """Return the factor of the data."""

    @abstractmethod
    def sigma(self, t: float) -> float:
        """Return the factor of the noise."""

    @abstractmethod
    def alpha_dot(self, t: float) -> float:
        """Return d alpha / dt."""

    @abstractmethod
    def sigma_dot(self, t: float) -> float:
        """Return d sigma / dt."""

    @abstractmethod
    def times(self, num_steps: int) -> list[float]:
        """Return num_steps + 1 decreasing times of a sampler; at the last there is no noise."""

    def angle(self, t: float) -> float:
        """Return atan2(sigma, alpha), the only function of t that the network reads."""
        return math.atan2(self.sigma(t), self.alpha(t))

    def norm(self, t: float) -> float:
        """Return sqrt(alpha^2 + sigma^2), the std of x_t if data and noise have unit variance."""
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


class PublishedVE(Schedule):
    """Schedule of the published SDE, :math:`dx = 26^t dW`: sigma(t)^2 = (26^{2t} - 1) / (2 ln 26).

    It is sampled on a rho = 7 grid of the SDE time from 0.1 to 1e-3.
    """

    def __init__(self, base: float = 26.0, t_max: float = 0.1, t_min: float = 1e-3):
        self.base, self.t_max, self.t_min = base, t_max, t_min

    def alpha(self, t: float) -> float:
        return 1.0

    def sigma(self, t: float) -> float:
        return math.sqrt(max(self.base ** (2 * t) - 1, 0.0) / (2 * math.log(self.base)))

    def sigmas(self, t: Tensor) -> Tensor:
        """Return sigma of a tensor of times."""
        return torch.sqrt((self.base ** (2 * t) - 1) / (2 * math.log(self.base)))

    def norm(self, t: float) -> float:
        # as published, the start has the noise's std, without the variance of the data
        return self.sigma(t)

    def alpha_dot(self, t: float) -> float:
        return 0.0

    def sigma_dot(self, t: float) -> float:
        return self.base ** (2 * t) / (2 * self.sigma(t))

    def diffusion(self, t: float) -> float:
        """Return g(t) of the SDE."""
        return self.base**t

    def times(self, num_steps: int) -> list[float]:
        high, low = self.t_max ** (1 / 7), self.t_min ** (1 / 7)
        last = max(num_steps - 1, 1)
        return [(high + i / last * (low - high)) ** 7 for i in range(num_steps)] + [0.0]


class Sampler(ABC):
    """Loop over the times of a schedule.

    Args:
        schedule: alpha, sigma and the times.
        evaluations: budget of denoiser evaluations.

    Attributes:
        first: result of the first evaluation of the denoiser. Its input is (nearly) pure noise, so
            it is the mean of the data.
    """

    first: Tensor
    fresh: Callable[[int], Tensor]
    previous: tuple[Tensor, float] | None
    index: int

    def __init__(self, schedule: Schedule, evaluations: int):
        if evaluations < 1:
            raise ValueError(f"evaluations={evaluations}, expected at least 1")
        self.schedule = schedule
        self.num_steps = evaluations

    def __call__(
        self, denoiser: Denoiser, z: Tensor, fresh: Callable[[int], Tensor] | None = None
    ) -> Tensor:
        """Transform base noise into a sample.

        Args:
            denoiser: D(x, t), same shape as x.
            z: base noise.
            fresh: function from the step number i to further base noise; only Euler-Maruyama needs
                it.
        """
        times = self.schedule.times(self.num_steps)
        x = z * self.schedule.norm(times[0])
        if fresh is not None:
            self.fresh = fresh
        self.previous = None

        def recorded(x: Tensor, t: float) -> Tensor:
            denoised = denoiser(x, t)
            if self.index == 0 and t == times[0]:
                self.first = denoised
            return denoised

        for self.index, (t, s) in enumerate(zip(times, times[1:])):
            x = self.step(recorded, x, t, s)
        return x

    def velocity(self, denoiser: Denoiser, x: Tensor, t: float) -> Tensor:
        """Compute dx/dt of the probability flow."""
        # alpha' D + sigma' (x - alpha D) / sigma, in few operations: they are the cost of a draw
        c, denoised = self.schedule, denoiser(x, t)
        growth = c.sigma_dot(t) / c.sigma(t)
        return torch.add(growth * x, denoised, alpha=c.alpha_dot(t) - growth * c.alpha(t))

    def halfway(self, value: Tensor, width: float) -> Tensor:
        """Extrapolate a value to the middle of this step, from its values at this and the last.

        The value is returned unchanged in the first step, and after a step of infinite width.
        """
        previous, self.previous = self.previous, (value, width)
        if previous is None or not math.isfinite(previous[1]):
            return value
        return value + 0.5 * width / previous[1] * (value - previous[0])

    @abstractmethod
    def step(self, denoiser: Denoiser, x: Tensor, t: float, s: float) -> Tensor:
        """Step from time t to time s < t."""


class Euler(Sampler):
    """Euler's rule, x + (s - t) dx/dt."""

    def step(self, denoiser: Denoiser, x: Tensor, t: float, s: float) -> Tensor:
        return torch.add(x, self.velocity(denoiser, x, t), alpha=s - t)


class Heun(Sampler):
    """Trapezoidal rule with an Euler predictor; the last step is Euler's (Karras et al.)."""

    def __init__(self, schedule: Schedule, evaluations: int):
        super().__init__(schedule, evaluations)
        self.num_steps = max(1, (evaluations + 1) // 2)

    def step(self, denoiser: Denoiser, x: Tensor, t: float, s: float) -> Tensor:
        slope = self.velocity(denoiser, x, t)
        ahead = x + (s - t) * slope
        if self.schedule.sigma(s) < 1e-9:
            return ahead
        return x + 0.5 * (s - t) * (slope + self.velocity(denoiser, ahead, s))


class DPMSolver2M(Sampler):
    """DPM-Solver++(2M) of Lu et al. 2022: a two-step rule in log(alpha / sigma) for D."""

    def step(self, denoiser: Denoiser, x: Tensor, t: float, s: float) -> Tensor:
        c, denoised = self.schedule, denoiser(x, t)
        if c.sigma(s) < 1e-9:
            return denoised
        # alpha = 0 at the start, so the first step is infinite in log-SNR
        decay = c.sigma(s) * c.alpha(t) / (c.alpha(s) * c.sigma(t))
        width = -math.log(decay) if decay > 0 else math.inf
        target = self.halfway(denoised, width)
        return c.sigma(s) / c.sigma(t) * x + c.alpha(s) * (1 - decay) * target


class EulerMaruyama(Sampler):
    """Reverse SDE as published: x + g^2 score dt + g sqrt(dt) z; returns the last mean."""

    def step(self, denoiser: Denoiser, x: Tensor, t: float, s: float) -> Tensor:
        if not isinstance(self.schedule, PublishedVE):
            raise ValueError("sampler euler_maruyama belongs to the published_ve schedule")
        g, dt = self.schedule.diffusion(t), t - s
        score = (denoiser(x, t) - x) / self.schedule.sigma(t) ** 2
        mean = x + g * g * dt * score
        last = self.index == self.num_steps - 1
        return mean if last else mean + g * math.sqrt(dt) * self.fresh(self.index)


class GaussianStep(Sampler):
    r"""Step that is exact for a Gaussian law of known spread c per mode, in any number of steps.

    It follows from :math:`D = g x + (1 - g\cos t)\,\mu`, see
    :mod:`~hpc_closure.closure.composed.learned_score`, for the trigonometric schedule. If
    :math:`\mu` changes, as for laws with several peaks, its value at the middle of the step is
    extrapolated from this step and the step before.
    """

    name = "gaussian"

    def __init__(self, schedule: Schedule, evaluations: int, spread: Tensor):
        super().__init__(schedule, evaluations)
        self.spread2 = spread.square()

    def step(self, denoiser: Denoiser, x: Tensor, t: float, s: float) -> Tensor:
        c = self.schedule
        before, after = (self.spread2 * c.alpha(u) ** 2 + c.sigma(u) ** 2 for u in (t, s))
        slope = self.spread2 * c.alpha(t) / before
        posterior_mean = (denoiser(x, t) - slope * x) * before / c.sigma(t) ** 2
        mean = self.halfway(posterior_mean, s - t)
        return c.alpha(s) * mean + (after / before).sqrt() * (x - c.alpha(t) * mean)


SAMPLERS: dict[str, type[Sampler]] = {
    "euler": Euler,
    "heun": Heun,
    "dpmpp_2m": DPMSolver2M,
    "euler_maruyama": EulerMaruyama,
}


def build_sampler(method: str, schedule: Schedule, evaluations: int) -> Sampler:
    """Create a sampler by name."""
    if method not in SAMPLERS:
        raise ValueError(f"sampler {method!r}, expected one of {', '.join(SAMPLERS)}")
    return SAMPLERS[method](schedule, evaluations)
