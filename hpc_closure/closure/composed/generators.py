r"""Draws of the residual from base noise: by a score, in one pass, or the base noise itself.

A trigonometric flow from (conditioned) base noise to data,
:math:`x_t = \cos t\,x_0 + \sin t\,z`, :math:`x_0 = q - k` with the kriged mean k, learns the
non-Gaussian part. Its velocity is :math:`F = A\,Q^{1/2} f_\theta` with the kriging projector
A = 1 - KH. Then f = 0 is exact for a Gaussian law, with or without kriged sensors, in any number
of steps. The one-pass ensemble (Lang et al. 2024, AIFS-CRPS) adds such a velocity once, and is
trained by an almost-fair score.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpc_closure.closure.composed.part_selection import ImprovementGate, ShellGate
from hpc_closure.closure.fields.losses import (
    ALMOST_FAIR,
    crps,
    spectral_energy_score,
    spectral_square,
)
from hpc_closure.closure.gaussian.conditioning import GeneratorConditions, Kriged
from hpc_closure.closure.gaussian.residual_coordinates import ResidualCoordinates
from hpc_closure.closure.networks.blocks import (
    PLACES,
    Encoded,
    LocalScoreNetwork,
    ScoreNetwork,
)
from hpc_closure.closure.sampling import Trigonometric, build_sampler
from hpc_closure.experiment.kinds import channel_shape_of, fields_of

__all__ = [
    "Drawn",
    "SamplerSettings",
    "Gaussian",
    "Generator",
    "Modes",
    "Resampled",
    "CRPSGenerator",
    "Residual",
    "Score",
]


FARTHEST = 50.0  # bound of a noisy residual and of its velocity, in standard deviations


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of a sampler: ``method`` and number of ``evaluations``; None = the model's."""

    method: str | None = None
    evaluations: int | None = None


@dataclass
class Drawn:
    """Residuals (M, ...) and the mean of their law.

    Attributes:
        q: spectra (M, ...).
        mean: spectra (M or 1, ...) of the law's mean; 0 if unknown.
        sharp: whether the mean is exact, so that spreads are taken about it. Otherwise it is
            estimated by the first step from the member's base noise, with an error that the member
            shares.
    """

    q: Tensor
    mean: Tensor | float = 0.0
    sharp: bool = False

    def spread(self, factor: Tensor | float) -> Tensor:
        """Scale the spread of the residuals about their mean by a factor."""
        if not self.sharp:
            return self.q * factor
        return self.mean + factor * (self.q - self.mean)

    def rescaled(self, scaled: Callable[[Tensor, float], Tensor], interval_ratio: float) -> Tensor:
        """Rescale the random part to another averaging interval; the mean is unchanged.

        Args:
            scaled: function from residuals (M, ...) and averaging time to rescaled residuals.
            interval_ratio: averaging time in trained intervals.
        """
        if interval_ratio == 1:
            return self.q
        return self.mean + scaled(self.q - self.mean, interval_ratio)


class Residual(nn.Module, ABC):
    """Base class of draws of q, minus their posterior mean, from (conditioned) base noise."""

    @abstractmethod
    def draw(
        self,
        frame: ResidualCoordinates,
        conditions: GeneratorConditions,
        z: Tensor,
        shells: Tensor,
        effort: SamplerSettings,
    ) -> Drawn:
        """Transform base noise z (M, ...) into residuals.

        Args:
            frame: coordinates of q.
            conditions: conditions of B states; state b belongs to members b M/B to (b + 1) M/B -
                1.
            z: base noise.
            shells: gain at every mode.
            effort: settings of the sampler.
        """


class Gaussian(Residual):
    """The base noise itself, the baseline of the generators."""

    def draw(self, frame, conditions, z, shells, effort):
        return Drawn(z)


class Modes(Gaussian):
    """Gaussian law with a covariance per wavevector.

    The base noise has this law already (:mod:`~hpc_closure.closure.gaussian.mode_covariance`).
    """


class Resampled(Gaussian):
    """Residuals of the training, drawn at random and moved in space.

    A draw has the law of a single snapshot, whatever its shape, but none that depends on the state
    beyond its amplitude D. The base noise has this law already.
    """

    #: largest number of residuals in a model file
    MOST = 512


class Generator(Residual):
    """A trained network that transforms base noise into residuals."""

    #: whether unseen members decide in which shells it acts, if the model has a gate
    judged = True

    #: base draws per training sample
    noises = 1

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config

    @property
    def own(self) -> SamplerSettings:
        """Settings of the model's sampler."""
        return SamplerSettings(self.config["method"], self.config["function_evaluations"])

    @abstractmethod
    def loss(
        self,
        frame: ResidualCoordinates,
        conditions: GeneratorConditions,
        x0: Tensor,
        z: Tensor,
        uniform: Tensor,
    ) -> Tensor:
        """Compute the loss (B,).

        Args:
            frame: coordinates of q.
            conditions: conditions of the batch.
            x0: (B, ...) q minus its posterior mean.
            z: (noises, B, ...) base noise.
            uniform: (B,) in (0, 1), for the noise level.
        """

    @abstractmethod
    def gate(self, frame: ResidualCoordinates) -> ShellGate | ImprovementGate:
        """Create the gate that decides in which shells the generator acts."""

    @abstractmethod
    def evidence(
        self,
        frame: ResidualCoordinates,
        conditions: GeneratorConditions,
        x0: Tensor,
        z: Tensor,
        uniform: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Compute the gate's evidence from unseen snapshots; arguments as of :meth:`loss`."""


class FlowNetwork(Generator):
    """Base class of the generators that start from kriged noise."""

    def __init__(self, channels: int, config: dict[str, Any]):
        super().__init__(config)
        sizes = (config["width"], config["modes"], config["layers"])
        fields, form = fields_of(config), config["spectral_convolution"]
        self.network: ScoreNetwork | LocalScoreNetwork
        if config["generator"] == "cnn":
            size = PLACES * config["dimensions"]
            end = channels - Kriged.channels - fields  # sensors and log D follow the coordinates
            places = range(end - size, end)
            self.network = LocalScoreNetwork(
                channels,
                places,
                config["width"],
                config["layers"],
                fields,
                config["dimensions"],
            )
        else:
            self.network = ScoreNetwork(
                channels, *sizes, form=form, fields=fields, dimensions=config["dimensions"]
            )
        self.channel_shape = channel_shape_of(config)

    def encode(self, conditions: GeneratorConditions) -> Encoded:
        """Encode the conditions for the noisy branch, once for all noise levels."""
        return self.network.encode(conditions.fields, conditions.summary)

    def velocity(
        self, frame: ResidualCoordinates, x_hat: Tensor, angle: Tensor, encoded: Encoded
    ) -> Tensor:
        """Evaluate the network at unit-norm noisy x; returns whitened spectra (B, ...)."""
        root = frame.kept.white_rms
        both = x_hat[:, None] * frame.law.modes("inputs", x_hat)
        largest = root * frame.kept.largest(both[:, 0]).flatten(1).float()
        inputs = frame.field(both).flatten(1, -1 - len(frame.kept.axes))
        inputs = inputs.float().clamp(-FARTHEST, FARTHEST)
        out, low = self.network(inputs, largest, angle.float(), encoded)
        out = out.clamp(-FARTHEST, FARTHEST)
        low = low.unflatten(1, (*self.channel_shape, -1))
        # scaled to fields of unit variance, like the inputs, so that weights need not grow
        return frame.kept.to_spectral(out) * root + frame.kept.place_largest(low)


class Score(FlowNetwork):
    r"""Score matching of a velocity, with loss :math:`|F(x_t, t) - (\cos t\,z - \sin t\,x_0)|^2`.

    The loss is 1 if the network adds nothing to a Gaussian law without sensors.
    """

    def __init__(self, channels: int, config: dict[str, Any]):
        super().__init__(channels, config)
        self.schedule = Trigonometric()

    def loss(self, frame, conditions, x0, z, uniform):
        guess, truth = self._velocities(frame, conditions, x0.to(torch.complex64), z[0], uniform)
        error = (guess - truth) * frame.law.modes("whiten", guess)
        return spectral_square(frame.kept, error, frame.law.modes("importance", error))

    def _velocities(self, frame, conditions, x0, z, uniform) -> tuple[Tensor, Tensor]:
        """Compute predicted and true velocity, spectra (B, ...) in units of q."""
        z = z.to(x0)
        angle = (uniform * (math.pi / 2)).to(x0.real)
        cos, sin = (part.view(-1, *[1] * (x0.ndim - 1)) for part in (angle.cos(), angle.sin()))
        white = self.velocity(frame, cos * x0 + sin * z, angle, self.encode(conditions))
        return conditions.project(frame, white), cos * z - sin * x0

    def gate(self, frame):
        return ShellGate(frame.kept)

    def evidence(self, frame, conditions, x0, z, uniform):
        guess, truth = self._velocities(frame, conditions, x0.to(torch.complex64), z[0], uniform)
        whiten = frame.law.modes("whiten", truth)
        return (truth * whiten).to(torch.complex128), (guess * whiten).to(torch.complex128)

    def draw(self, frame, conditions, z, shells, effort):
        z, encoded = z.to(torch.complex64), self.encode(conditions).for_members(len(z))
        schedule, shells = self.schedule, shells.to(z.real)

        def denoise(x: Tensor, t: float) -> Tensor:
            angle, norm = schedule.angle(t), schedule.norm(t)
            unit = x if norm == 1 else x / norm
            angles = torch.full((1,), angle, device=z.device)
            white = self.velocity(frame, unit, angles, encoded) * shells
            step = conditions.project(frame, white)
            return torch.add(math.cos(angle) * unit, step, alpha=-math.sin(angle))

        method = effort.method or self.own.method
        evaluations = effort.evaluations or self.own.evaluations
        sampler = build_sampler(method, schedule, evaluations)
        return Drawn(sampler(denoise, z), sampler.first)


class CRPSGenerator(FlowNetwork):
    """Generator of a single evaluation, trained by almost-fair CRPS and spectral energy score."""

    noises = 4

    def loss(self, frame, conditions, x0, z, uniform):
        x0 = x0.to(torch.complex64)
        members = self._members(frame, conditions, z.to(x0))
        whiten = frame.law.modes("whiten", x0)
        importance = frame.law.modes("importance", x0)
        return self._crps(frame, members, x0, ALMOST_FAIR) + spectral_energy_score(
            frame.kept, members * whiten, x0 * whiten, importance, ALMOST_FAIR
        )

    def _members(
        self, frame: ResidualCoordinates, conditions: GeneratorConditions, z: Tensor
    ) -> Tensor:
        encoded, angle = self.encode(conditions), self._angle(z)
        guesses = [self.velocity(frame, noise, angle, encoded) for noise in z]
        return torch.stack([noise + conditions.project(frame, f) for noise, f in zip(z, guesses)])

    def _angle(self, like: Tensor) -> Tensor:
        return torch.full((1,), math.pi / 2, device=like.device)

    def _crps(
        self, frame: ResidualCoordinates, members: Tensor, x0: Tensor, alpha: float
    ) -> Tensor:
        members, truth = frame.field(members), frame.field(x0)
        scale = frame.law.rms(truth)
        return crps(members / scale, truth / scale, alpha)

    def gate(self, frame):
        return ImprovementGate(frame.kept)

    def evidence(self, frame, conditions, x0, z, uniform):
        x0 = x0.to(torch.complex64)
        z = z.to(x0)
        members = self._members(frame, conditions, z)
        return self._crps(frame, z, x0, 1.0), self._crps(frame, members, x0, 1.0)

    def draw(self, frame, conditions, z, shells, effort):
        z = z.to(torch.complex64)
        encoded = self.encode(conditions).for_members(len(z))
        white = self.velocity(frame, z, self._angle(z), encoded)
        return Drawn(z + conditions.project(frame, white * shells.to(z.real)))
