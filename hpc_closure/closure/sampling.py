r"""Samplers: the base class owns the loop, a leaf owns one step.

A sampler turns base noise z into a sample of the data by way of a denoiser
:math:`D(x, t) = E[x_0 | x_t = x]`. With :math:`x_t = \alpha x_0 + \sigma z` the probability flow
is

.. math:: \dot x_t = \dot\alpha\,D + \dot\sigma\,\hat z, \quad \hat z = (x_t - \alpha D) / \sigma.

The number of evaluations of the denoiser is what is budgeted: a Heun or midpoint step costs two.
"""

import math
from abc import ABC, abstractmethod
from typing import Callable

from torch import Tensor

from hpc_closure.closure.schedule import PublishedVE, Schedule

__all__ = ["Sampler", "SAMPLERS", "build_sampler"]

Denoiser = Callable[[Tensor, float], Tensor]


class Sampler(ABC):
    """The loop over the times of a schedule.

    Args:
        schedule: alpha, sigma and the grid of times.
        evaluations: budget of denoiser evaluations; at least ``cost``.
    """

    cost = 1
    stochastic = False
    fresh: Callable[[int], Tensor]
    memory: tuple[Tensor, float] | None
    index: int

    def __init__(self, schedule: Schedule, evaluations: int):
        if evaluations < 1:
            raise ValueError(f"evaluations={evaluations}, expected at least 1")
        self.schedule = schedule
        self.evaluations = evaluations
        self.num_steps = max(1, evaluations // self.cost)

    def __call__(
        self, denoiser: Denoiser, z: Tensor, fresh: Callable[[int], Tensor] | None = None
    ) -> Tensor:
        """Sample.

        Args:
            denoiser: D(x, t), same shape as x.
            z: base noise.
            fresh: i -> further base noise for step i; stochastic samplers need it.
        """
        times = self.schedule.times(self.num_steps)
        x = z * self.schedule.norm(times[0])
        if fresh is not None:
            self.fresh = fresh
        self.memory = None
        for self.index, (t, s) in enumerate(zip(times, times[1:])):
            x = self.step(denoiser, x, t, s)
        return x

    def velocity(self, denoiser: Denoiser, x: Tensor, t: float) -> Tensor:
        """dx/dt of the probability flow."""
        c, denoised = self.schedule, denoiser(x, t)
        noise = (x - c.alpha(t) * denoised) / c.sigma(t)
        return c.alpha_dot(t) * denoised + c.sigma_dot(t) * noise

    @abstractmethod
    def step(self, denoiser: Denoiser, x: Tensor, t: float, s: float) -> Tensor:
        """From time t to time s < t."""


class Euler(Sampler):
    """x + (s - t) dx/dt."""

    def step(self, denoiser: Denoiser, x: Tensor, t: float, s: float) -> Tensor:
        return x + (s - t) * self.velocity(denoiser, x, t)


class Midpoint(Sampler):
    """Half an Euler step, then a whole one with the velocity found there."""

    cost = 2

    def step(self, denoiser: Denoiser, x: Tensor, t: float, s: float) -> Tensor:
        middle = 0.5 * (t + s)
        half = x + (middle - t) * self.velocity(denoiser, x, t)
        return x + (s - t) * self.velocity(denoiser, half, middle)


class Heun(Sampler):
    """Trapezoidal rule with an Euler predictor; the step to zero noise is Euler's (EDM alg. 1)."""

    cost = 2

    def __init__(self, schedule: Schedule, evaluations: int):
        super().__init__(schedule, evaluations)
        self.num_steps = max(1, (evaluations + 1) // 2)

    def step(self, denoiser: Denoiser, x: Tensor, t: float, s: float) -> Tensor:
        slope = self.velocity(denoiser, x, t)
        ahead = x + (s - t) * slope
        if self.schedule.sigma(s) < 1e-9:
            return ahead
        return x + 0.5 * (s - t) * (slope + self.velocity(denoiser, ahead, s))


class Adams(Sampler):
    """Two-step Adams-Bashforth: second order at one evaluation per step."""

    def step(self, denoiser: Denoiser, x: Tensor, t: float, s: float) -> Tensor:
        slope, previous = self.velocity(denoiser, x, t), self.memory
        self.memory = (slope, s - t)
        if previous is None:
            return x + (s - t) * slope
        return x + (s - t) * (slope + 0.5 * (s - t) / previous[1] * (slope - previous[0]))


class DDIM(Sampler):
    """alpha(s) D + sigma(s) z-hat: Euler for EDM noise, exact when D does not change."""

    def step(self, denoiser: Denoiser, x: Tensor, t: float, s: float) -> Tensor:
        c, denoised = self.schedule, denoiser(x, t)
        return c.alpha(s) * denoised + c.sigma(s) / c.sigma(t) * (x - c.alpha(t) * denoised)


class Ancestral(Sampler):
    """A draw from q(x_s | x_t, x_0 = D): as much fresh noise as the forward process put in."""

    stochastic = True

    def step(self, denoiser: Denoiser, x: Tensor, t: float, s: float) -> Tensor:
        c, denoised = self.schedule, denoiser(x, t)
        if c.sigma(s) < 1e-9:
            return denoised
        ratio = c.sigma(s) * c.alpha(t) / (c.alpha(s) * c.sigma(t))
        mean = c.alpha(s) * (1 - ratio**2) * denoised + ratio * c.sigma(s) / c.sigma(t) * x
        return mean + c.sigma(s) * math.sqrt(max(1 - ratio**2, 0.0)) * self.fresh(self.index)


class DPMSolver2M(Sampler):
    """DPM-Solver++(2M) of Lu et al. 2022: two-step, in log(alpha / sigma), data prediction."""

    def step(self, denoiser: Denoiser, x: Tensor, t: float, s: float) -> Tensor:
        c, denoised, previous = self.schedule, denoiser(x, t), self.memory
        if c.sigma(s) < 1e-9:
            return denoised
        # alpha = 0 at the start of some schedules: an infinite first step in log-SNR
        decay = c.sigma(s) * c.alpha(t) / (c.alpha(s) * c.sigma(t))
        width = -math.log(decay) if decay > 0 else math.inf
        target = denoised
        if previous is not None and math.isfinite(previous[1]):
            target = denoised + 0.5 * width / previous[1] * (denoised - previous[0])
        self.memory = (denoised, width)
        return c.sigma(s) / c.sigma(t) * x + c.alpha(s) * (1 - decay) * target


class EulerMaruyama(Sampler):
    """The reverse SDE as published: x + g^2 score dt + g sqrt(dt) z; returns the last mean."""

    stochastic = True

    def step(self, denoiser: Denoiser, x: Tensor, t: float, s: float) -> Tensor:
        if not isinstance(self.schedule, PublishedVE):
            raise ValueError("sampler euler_maruyama belongs to the published_ve schedule")
        g, dt = self.schedule.diffusion(t), t - s
        score = (denoiser(x, t) - x) / self.schedule.sigma(t) ** 2
        mean = x + g * g * dt * score
        last = self.index == self.num_steps - 1
        return mean if last else mean + g * math.sqrt(dt) * self.fresh(self.index)


SAMPLERS: dict[str, type[Sampler]] = {
    "euler": Euler,
    "midpoint": Midpoint,
    "heun": Heun,
    "adams": Adams,
    "ddim": DDIM,
    "ancestral": Ancestral,
    "dpmpp_2m": DPMSolver2M,
    "euler_maruyama": EulerMaruyama,
}


def build_sampler(method: str, schedule: Schedule, evaluations: int) -> Sampler:
    """A sampler by name."""
    if method not in SAMPLERS:
        raise ValueError(f"sampler {method!r}, expected one of {', '.join(SAMPLERS)}")
    return SAMPLERS[method](schedule, evaluations)
