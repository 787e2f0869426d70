r"""How the residual is drawn from its base noise: by a score, in one pass, or as it is.

A trigonometric flow from (conditioned) base noise to data,
:math:`x_t = \cos t\,x_0 + \sin t\,z`, :math:`x_0 = q - k`, learns what is not Gaussian. Its
velocity is :math:`F = A\,Q^{1/2} f_\theta`, A = 1 - KH the kriging projector, so f = 0 is exact
for a Gaussian law, with or without kriged sensors, in any number of steps. The one-pass ensemble
(Lang et al. 2024, AIFS-CRPS) adds such a velocity once, trained by an almost-fair score.
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
from hpc_closure.closure.gaussian.conditioning import Posterior
from hpc_closure.closure.gaussian.residual_coordinates import Frame
from hpc_closure.closure.networks.blocks import Encoded, ScoreNetwork
from hpc_closure.closure.sampling import Trigonometric, build_sampler

__all__ = ["Drawn", "Effort", "Gaussian", "Generator", "Modes", "OnePass", "Residual", "Score"]


@dataclass(frozen=True)
class Effort:
    """How a sample is made: ``method`` and number of ``evaluations``; None = the model's own."""

    method: str | None = None
    evaluations: int | None = None


@dataclass
class Drawn:
    """Residuals (M, ...), and the mean that their law has.

    Attributes:
        q: spectra (M, ...).
        mean: (M or 1, ...) of the law; 0 where it is not known.
        sharp: the mean is the same for every member: spreads are taken about it. One that is told
            by the first step from a member's own noise has an error that the member shares.
    """

    q: Tensor
    mean: Tensor | float = 0.0
    sharp: bool = False

    def spread(self, factor: Tensor | float) -> Tensor:
        """The residuals with another spread."""
        if not self.sharp:
            return self.q * factor
        return self.mean + factor * (self.q - self.mean)

    def held(self, scaled: Callable[[Tensor, float], Tensor], held: float) -> Tensor:
        """The residuals as means over ``held`` intervals: what is known of them stays.

        Args:
            scaled: residuals (M, ...) and how long they are held, to those of that spread.
            held: in trained intervals.
        """
        return self.q if held == 1 else self.mean + scaled(self.q - self.mean, held)


class Residual(nn.Module, ABC):
    """Draws of q, less their posterior mean, from (conditioned) base noise."""

    @abstractmethod
    def draw(
        self, frame: Frame, given: Posterior, z: Tensor, shells: Tensor, effort: Effort
    ) -> Drawn:
        """Carry base noise z (M, ...) to residuals.

        Args:
            frame: coordinates of q.
            given: conditions of B states, each of M / B members in a row.
            z: base noise.
            shells: gain at every mode.
            effort: of the sampler.
        """


class Gaussian(Residual):
    """The base law itself: what the generators must beat."""

    def draw(self, frame, given, z, shells, effort):
        return Drawn(z)


class Modes(Gaussian):
    """A Gaussian law with a covariance for each wavevector (:mod:`mode_law`)."""


class Generator(Residual):
    """A network that makes residuals of base noise, and how it is trained and judged."""

    #: whether unseen members decide where it acts, in a model that has a gate
    judged = True

    #: base draws for each sample of the training
    noises = 1

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config

    @property
    def own(self) -> Effort:
        """The model's own effort."""
        return Effort(self.config["method"], self.config["evaluations"])

    @abstractmethod
    def loss(
        self, frame: Frame, given: Posterior, x0: Tensor, z: Tensor, uniform: Tensor
    ) -> Tensor:
        """Loss (B,).

        Args:
            frame: coordinates of q.
            given: conditions of the batch.
            x0: (B, ...) q less its posterior mean.
            z: (noises, B, ...) base noise.
            uniform: (B,) in (0, 1), for the noise level.
        """

    @abstractmethod
    def gate(self, frame: Frame) -> ShellGate | ImprovementGate:
        """What decides in which shells it acts."""

    @abstractmethod
    def evidence(
        self, frame: Frame, given: Posterior, x0: Tensor, z: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the gate takes in of unseen snapshots; arguments as of :meth:`loss`."""


class FlowNetwork(Generator):
    """What the generators that start from kriged noise share."""

    def __init__(self, channels: int, config: dict[str, Any]):
        super().__init__(config)
        sizes = (config["width"], config["modes"], config["layers"])
        self.network = ScoreNetwork(channels, *sizes, form=config["form"])

    def encode(self, given: Posterior) -> Encoded:
        """What the noisy branch needs of the conditions; once for all noise levels."""
        return self.network.encode(given.fields, given.summary)

    def velocity(self, frame: Frame, x_hat: Tensor, angle: Tensor, encoded: Encoded) -> Tensor:
        """Network output, spectra (B, ...) in whitened units, at unit-norm noisy x."""
        side = 2 * frame.kept.modes + 1
        both = x_hat[:, None] * frame.law.modes("inputs", x_hat)
        largest = side * frame.kept.largest(both[:, 0]).float()
        inputs = frame.field(both).float()
        out, low = self.network(inputs, largest, angle.float(), encoded)
        # in fields of unit variance, as the inputs are: weights need not grow to be seen
        return frame.kept.to_spectral(out) * side + frame.kept.place_largest(low)


class Score(FlowNetwork):
    r"""Score matching as a velocity, :math:`|F(x_t, t) - (\cos t\,z - \sin t\,x_0)|^2`.

    The loss is 1 where the network adds nothing to a Gaussian law without sensors.
    """

    def __init__(self, channels: int, config: dict[str, Any]):
        super().__init__(channels, config)
        self.schedule = Trigonometric()

    def loss(self, frame, given, x0, z, uniform):
        guess, truth = self._both(frame, given, x0.to(torch.complex64), z[0], uniform)
        error = (guess - truth) * frame.law.modes("whiten", guess)
        return spectral_square(frame.kept, error, frame.law.modes("importance", error))

    def _both(self, frame, given, x0, z, uniform) -> tuple[Tensor, Tensor]:
        """Velocity guessed and true, spectra (B, ...) in units of q."""
        z = z.to(x0)
        angle = (uniform * (math.pi / 2)).to(x0.real)
        cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
        white = self.velocity(frame, cos * x0 + sin * z, angle, self.encode(given))
        return given.project(frame, white), cos * z - sin * x0

    def gate(self, frame):
        return ShellGate(frame.kept)

    def evidence(self, frame, given, x0, z, uniform):
        guess, truth = self._both(frame, given, x0.to(torch.complex64), z[0], uniform)
        whiten = frame.law.modes("whiten", truth)
        return (truth * whiten).to(torch.complex128), (guess * whiten).to(torch.complex128)

    def draw(self, frame, given, z, shells, effort):
        z, encoded = z.to(torch.complex64), self.encode(given).for_members(len(z))
        schedule, shells = self.schedule, shells.to(z.real)

        def denoise(x: Tensor, t: float) -> Tensor:
            angle, norm = schedule.angle(t), schedule.norm(t)
            unit = x if norm == 1 else x / norm
            angles = torch.full((1,), angle, device=z.device)
            white = self.velocity(frame, unit, angles, encoded) * shells
            step = given.project(frame, white)
            return torch.add(math.cos(angle) * unit, step, alpha=-math.sin(angle))

        method = effort.method or self.own.method
        evaluations = effort.evaluations or self.own.evaluations
        sampler = build_sampler(method, schedule, evaluations)
        return Drawn(sampler(denoise, z), sampler.first)


class OnePass(FlowNetwork):
    """One evaluation, trained by almost-fair CRPS plus a spectral energy score."""

    noises = 4

    def loss(self, frame, given, x0, z, uniform):
        x0 = x0.to(torch.complex64)
        members = self._members(frame, given, z.to(x0))
        whiten = frame.law.modes("whiten", x0)
        importance = frame.law.modes("importance", x0)
        return self._crps(frame, members, x0, ALMOST_FAIR) + spectral_energy_score(
            frame.kept, members * whiten, x0 * whiten, importance, ALMOST_FAIR
        )

    def _members(self, frame: Frame, given: Posterior, z: Tensor) -> Tensor:
        encoded, angle = self.encode(given), self._angle(z)
        guesses = [self.velocity(frame, one, angle, encoded) for one in z]
        return torch.stack([one + given.project(frame, f) for one, f in zip(z, guesses)])

    def _angle(self, like: Tensor) -> Tensor:
        return torch.full((1,), math.pi / 2, device=like.device)

    def _crps(self, frame: Frame, members: Tensor, x0: Tensor, alpha: float) -> Tensor:
        scale = math.sqrt(frame.law.variance)
        return crps(frame.field(members) / scale, frame.field(x0) / scale, alpha)

    def gate(self, frame):
        return ImprovementGate(frame.kept)

    def evidence(self, frame, given, x0, z, uniform):
        x0 = x0.to(torch.complex64)
        z = z.to(x0)
        members = self._members(frame, given, z)
        return self._crps(frame, z, x0, 1.0), self._crps(frame, members, x0, 1.0)

    def draw(self, frame, given, z, shells, effort):
        z = z.to(torch.complex64)
        encoded = self.encode(given).for_members(len(z))
        white = self.velocity(frame, z, self._angle(z), encoded)
        return Drawn(z + given.project(frame, white * shells.to(z.real)))
