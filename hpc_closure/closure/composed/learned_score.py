r"""A score whose network reads sensors, sampled by steps that are exact for any Gaussian law.

A single model has narrow posteriors (with sensors) and wide ones (without). For these neither a
velocity nor a denoiser is a good target of learning, and few steps of either give a wrong spread.
Here the network (:mod:`~hpc_closure.closure.networks.sensor_network`) predicts the spread c of q
given the conditions, per group of |k|^2. It learns the mean :math:`\mu` for which a Gaussian law
of that spread has the true denoiser:

.. math:: D(x_t, t) = g\,x_t + (1 - g\cos t)\,\mu, \qquad
          g = c^2\cos t / \rho_t^2,\quad \rho_t^2 = c^2\cos^2 t + \sin^2 t .

At t = pi/2 this is E[q | V, y]. The sampler's step is exact if :math:`\mu` is constant,

.. math:: x_s = \cos s\,\mu + (\rho_s / \rho_t)\,(x_t - \cos t\,\mu).

It becomes the rotation of DDIM for c = 0 and Euler's rule for c = 1, so four evaluations suffice
for both.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hpc_closure.closure.composed.generators import Drawn, Generator, GeneratorConditions
from hpc_closure.closure.composed.part_selection import ImprovementGate
from hpc_closure.closure.fields.members import for_members
from hpc_closure.closure.fields.modes import Band
from hpc_closure.closure.gaussian.residual_coordinates import ResidualCoordinates
from hpc_closure.closure.networks.sensor_network import Estimate, PosteriorNetwork
from hpc_closure.closure.sampling import GaussianStep, Trigonometric, build_sampler

__all__ = ["PosteriorScore"]

HALF = math.pi / 2
FIRST = 0.25  # share of training samples at t = pi/2, at which the posterior mean is learned
LEAST_ANGLE = 0.05
FLOOR = 1e-3  # least spread
STEEPEST = 9.0  # largest slope of the likelihood of log c
OUTLIER = 4.0  # ratio of error to expected error beyond which the error is scaled down


@dataclass
class Levels:
    """Angles (B, 1, 1) of noisy samples, with a Gaussian law's constants at them."""

    cos: Tensor
    sin: Tensor
    spread: Tensor

    @property
    def rho2(self) -> Tensor:
        """Variance of x_t about cos t mu."""
        return self.spread.square() * self.cos.square() + self.sin.square()

    @property
    def slope(self) -> Tensor:
        """Factor g of x_t in the denoiser."""
        return self.spread.square() * self.cos / self.rho2

    def denoised(self, x: Tensor, mu: Tensor) -> Tensor:
        """Compute D of a Gaussian law with mean mu."""
        return self.slope * x + (1 - self.slope * self.cos) * mu


class PosteriorScore(Generator):
    """Score whose network reads sensors; see the module's docstring.

    Args:
        channels: number of input channels.
        config: configuration of the model.
        own: band of the model.
    """

    def __init__(self, channels: int, config: dict[str, Any], own: Band):
        super().__init__(config)
        self.network = PosteriorNetwork(channels, config, own)

    def spread_parameters(self) -> list[nn.Parameter]:
        """List the weights of the spread c, which are trained again, alone, on unseen members."""
        return list(self.network.spread_head.parameters())

    def estimate(self, frame: ResidualCoordinates, conditions: GeneratorConditions) -> Estimate:
        """Estimate mean and spread of q from the conditions, before any noise is added."""
        return self.network.estimate(frame, conditions)

    def _levels(self, frame: ResidualCoordinates, estimated: Estimate, angle: Tensor) -> Levels:
        cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
        cos = torch.where(cos.abs() < 1e-6, 0.0, cos)
        spread = estimated.log_spread.detach().exp().clamp(min=FLOOR)
        return Levels(cos, sin, frame.kept.spread(spread))

    def _angles(self, uniform: Tensor) -> Tensor:
        """Return angles (B,): a share is pi/2, the others are uniform above the least angle."""
        rest = (uniform - FIRST) / (1 - FIRST)
        return torch.where(uniform < FIRST, HALF, LEAST_ANGLE + rest * (HALF - LEAST_ANGLE))

    def _whitened(self, frame: ResidualCoordinates, q_hat: Tensor) -> Tensor:
        return q_hat.to(torch.complex64) * frame.law.modes("whiten", q_hat.real.float())

    def loss(self, frame, conditions, x0, z, uniform):
        x0, z = self._whitened(frame, x0), self._whitened(frame, z[0])
        estimated = self.estimate(frame, conditions)
        angle = self._angles(uniform).to(x0.real)
        at = self._levels(frame, estimated, angle)
        x = at.cos * x0 + at.sin * z
        mu = self.network.posterior(frame, x, angle, conditions, estimated)
        # 1 - g cos t is sin^2 t / rho^2
        error = mu - (x0 - at.slope * x) * at.rho2 / at.sin.square()
        square = torch.view_as_real(error).square().sum(-1)
        # equals 1 at the optimum of a Gaussian law of any spread
        relative = square * at.sin.square() / (at.spread.square() * at.rho2)
        mean = self._per_group(frame, relative.detach())
        relative = relative / frame.kept.spread((mean / OUTLIER).clamp(min=1))
        weights, variance = self._weights(frame, x0), frame.law.modes("variance", x0.real)
        size = at.spread.square() * variance * weights
        equal = (relative * weights).sum((-2, -1)) / weights.sum()
        by_size = (relative * size).sum((-2, -1)) / size.sum((-2, -1))
        return 0.5 * (equal + by_size) + self._spread_loss(frame, estimated, x0)

    def spread_loss(
        self, frame: ResidualCoordinates, conditions: GeneratorConditions, x0: Tensor
    ) -> Tensor:
        """Compute the loss (B,) of c alone."""
        with torch.no_grad():
            x0 = self._whitened(frame, x0)
        return self._spread_loss(frame, self.estimate(frame, conditions), x0)

    def _spread_loss(self, frame: ResidualCoordinates, estimated: Estimate, x0: Tensor) -> Tensor:
        """Compute the Gaussian likelihood (B,) of the mean's error per group, gradient bounded."""
        error = torch.view_as_real(estimated.mean.detach() - x0).square().sum(-1)
        error_power = self._per_group(frame, error)
        log = estimated.log_spread
        ratio = error_power * torch.exp(-2 * log.detach())
        slope = (1 - ratio).clamp(min=-STEEPEST) * (error_power > 0)
        value = (log.detach() + 0.5 * ratio) * (error_power > 0)
        return (slope * (log - log.detach()) + value).mean(-1)

    def _weights(self, frame: ResidualCoordinates, like: Tensor) -> Tensor:
        kept = frame.kept
        weights = kept.on("weights", like.device, like.real.dtype)
        return weights * frame.law.modes("mask", like.real)

    def _per_group(self, frame: ResidualCoordinates, values: Tensor) -> Tensor:
        """Average over the modelled modes of each group; returns (B, groups)."""
        mask = frame.law.modes("mask", values)
        sums = frame.kept.by_group(values * mask)
        return sums / frame.kept.by_group(mask).clamp(min=1)

    def gate(self, frame):
        return ImprovementGate(frame.kept)

    def evidence(self, frame, conditions, x0, z, uniform):
        x0, z = self._whitened(frame, x0), self._whitened(frame, z[0])
        estimated = self.estimate(frame, conditions)
        angle = LEAST_ANGLE + uniform.to(x0.real) * (HALF - LEAST_ANGLE)
        at = self._levels(frame, estimated, angle)
        x = at.cos * x0 + at.sin * z
        mu = self.network.posterior(frame, x, angle, conditions, estimated)
        weights = self._weights(frame, x0)

        def score(denoised: Tensor) -> Tensor:
            square = torch.view_as_real(denoised - x0).square().sum(-1)
            return (square * weights).sum((-2, -1)) / weights.sum()

        # without the generator the law is the base law, so D = cos t x
        return score(at.cos * x), score(at.denoised(x, mu))

    def draw(self, frame, conditions, z, shells, effort):
        estimated = self.estimate(frame, conditions).for_members(len(z))
        conditions = replace(conditions, summary=for_members(conditions.summary, len(z)))
        spread = frame.kept.spread(estimated.log_spread.exp().clamp(min=FLOOR))

        def denoise(x: Tensor, t: float) -> Tensor:
            angle = torch.full((1,), t, device=x.device)
            at = self._levels(frame, estimated, angle)
            return at.denoised(x, self.network.posterior(frame, x, angle, conditions, estimated))

        method = effort.method or self.own.method
        evaluations = effort.evaluations or self.own.evaluations
        schedule = Trigonometric()
        if method == GaussianStep.name:
            sampler = GaussianStep(schedule, evaluations, spread)
        else:
            sampler = build_sampler(method, schedule, evaluations)
        colour = frame.law.modes("colour", spread)
        q = sampler(denoise, self._whitened(frame, z)) * colour
        return Drawn(q, sampler.first * colour, sharp=True)
