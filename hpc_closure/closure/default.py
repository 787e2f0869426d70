r"""The default model: closed-form mean, learned correction and amplitude, score-based residual.

.. math:: U = m(V) + D(V)\,q, \qquad q \sim p(q\,|\,V, y)

* m: library regression (:mod:`library`) plus a Fourier neural operator for what it leaves;
* D: amplitude field, the exponential of the same network's second output, or 1;
* q: N(0, Q) conditioned on the sensors (:mod:`law`) is the *base*; a trigonometric flow from base
  noise to data, :math:`x_t = \cos t\,x_0 + \sin t\,z`, :math:`x_0 = q - k`, learns what is not
  Gaussian. Its velocity is :math:`F = A\,Q^{1/2} f_\theta`, A = 1 - KH the kriging projector, so
  f = 0 is exact for a Gaussian law, with or without sensors, in any number of steps.

Each learned part must earn its place on members it has not seen: per shell, its output is scaled
by the regression of the truth on it, and dropped where that is not significant. What few steps and
a finite network leave of too little spread is made up on the same members: without sensors, and
with the model's own sampler, each shell of q is scaled to the variance seen.
"""

import math
from dataclasses import replace
from typing import Any, Sequence

import torch
from torch import Tensor, nn

from hpc_closure.closure import draws, losses, statistics
from hpc_closure.closure.interface import Phase
from hpc_closure.closure.law import BaseLaw, Kriging
from hpc_closure.closure.mean import Encoder, Encoding
from hpc_closure.closure.network import Encoded, ScoreNetwork
from hpc_closure.closure.residual_memory import position
from hpc_closure.closure.sampling import SCHEDULES, build_sampler
from hpc_closure.closure.sensors import Sensors

__all__ = ["DefaultModel"]


class DefaultModel(Encoder):
    """See the module's docstring; ``config`` as resolved by :func:`~.model.resolve`."""

    def __init__(self, config: dict[str, Any], grid: int, length: float = 1.0):
        super().__init__(config, grid, length)
        self.score_network = ScoreNetwork(
            self.channels + 3,
            config["width"],
            config["modes"],
            config["layers"],
            form=config["form"],
        )
        mean_share, score_share = config["shares"]
        self.phases = (
            Phase("mean", mean_share, "fit"),
            Phase("generator", score_share, "hold"),
            Phase("check", 0.0, "valid"),
        )

    def begin(self, phase: str, reader) -> dict[str, Any]:
        """Start ``mean``, ``generator`` or ``check`` (see :class:`~.model.ClosureModel`)."""
        work = {
            "mean": statistics.fit_mean,
            "generator": statistics.fit_law,
            "check": statistics.check_generator,
        }
        if phase not in work:
            raise ValueError(f"phase {phase!r}, expected one of {', '.join(work)}")
        self.phase = phase
        with torch.no_grad():
            report = work[phase](self, reader)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for parameter in self.parameters_of(phase):
            parameter.requires_grad_(True)
        return report

    def parameters_of(self, phase: str) -> list[nn.Parameter]:
        """``mean`` trains the mean network, ``generator`` the score network."""
        part = {"mean": self.mean_network, "generator": self.score_network}.get(phase)
        return [] if part is None else list(part.parameters())

    @property
    def score_active(self) -> bool:
        """Whether the generator earned its place (it is skipped otherwise)."""
        gain = self.statistics.get("score/gain")
        return gain is None or bool((gain != 0).any())

    def conditions(self, encoding: Encoding, kriged: Tensor | None, std: Tensor | None) -> Tensor:
        """Channels (B, C + 3, g, g) of the generator: features, kriged field, its std, log D.

        Args:
            encoding: of B or 1 states.
            kriged: spectra (B or 1, ...) of the posterior mean; None without sensors.
            std: (B or 1, g, g) posterior standard deviation as a share of the prior's.
        """
        features = encoding.features
        sizes = [len(x) for x in (features, kriged, std) if x is not None]
        shape = (max(sizes), self.size, self.size)
        field = features.new_zeros(shape)
        if kriged is not None:
            field = self.residual_band.to_physical(kriged, self.size)
            field = (field / math.sqrt(self.law.variance)).to(features).expand(shape)
        std = features.new_ones(shape) if std is None else std.to(features).expand(shape)
        log = encoding.log_amplitude
        log = features.new_zeros(shape) if log is None else log.to(features).expand(shape)
        extra = torch.stack([field, std, log], dim=1)
        return torch.cat([features.expand(shape[0], -1, -1, -1), extra], dim=1)

    def encode_conditions(
        self, encoding: Encoding, kriged: Tensor | None, std: Tensor | None
    ) -> Encoded:
        """What the noisy branch needs of the conditions; once for all noise levels."""
        fields = self.conditions(encoding, kriged, std)
        return self.score_network.encode(fields, encoding.largest)

    def whitened_velocity(self, x_hat: Tensor, angle: Tensor, encoded: Encoded) -> Tensor:
        """Network output, spectra (B, ...) in whitened units, at unit-norm noisy x."""
        white_hat = x_hat * self.law.modes("whiten", x_hat)
        largest = self.residual_band.largest(white_hat).float()
        white = self.residual_band.to_physical(white_hat, self.size)
        white = white / (2 * self.residual_band.modes + 1)
        plain = self.residual_band.to_physical(x_hat, self.size) / math.sqrt(self.law.variance)
        inputs = torch.stack([white, plain], dim=1).float()
        return self.residual_band.to_spectral(
            self.score_network(inputs, largest, angle.float(), encoded)
        )

    def base_noise(
        self,
        seed: int,
        stage: str,
        ids: Sequence[int],
        item: int,
        stream: int = draws.STREAM_BASE,
        like: Tensor | None = None,
        law: BaseLaw | None = None,
    ) -> Tensor:
        """Draws of a base law, spectra (len(ids), ...) complex128."""
        white = draws.white_spectra(self.residual_band, seed, stage, ids, item, stream)
        white = white if like is None else white.to(like.device)
        return white * (law or self.law).modes("std", white)

    def noise_of_call(
        self, seed: int, ids: Sequence[int], call: int, relative: float, like: Tensor, law: BaseLaw
    ) -> Tensor:
        """Base noise of a call, with the residual's memory (:mod:`memory`) where it has one.

        ``relative``: interval between calls over the trained one.
        """
        fresh = self.base_noise(seed, "sample", ids, call, like=like, law=law)
        if not bool((self.knots > 0).any()):
            return fresh
        shell = self.residual_band.grid.shell().to(like.device)
        for knots in sorted(set(self.knots[self.knots > 0].tolist())):
            first, cos, sin = position(call * relative, knots)
            stream = draws.STREAM_MEMORY + round(math.log2(knots))
            one, two = (
                self.base_noise(seed, "sample", ids, first + i, stream, like, law) for i in (0, 1)
            )
            rows = (self.knots == knots).to(like.device)[shell]
            fresh = torch.where(rows, cos * one + sin * two, fresh)
        return fresh

    def scale_of(self, relative: float) -> float:
        """Factor of the residual's std for another interval: the white part averages out."""
        shares = (
            (self.knots.clamp(min=1.0) / relative).clamp(max=1.0)
            if relative > 1
            else (torch.where(self.knots > 0, 1.0, 1.0 / relative))
        )
        power = self.residual_band.by_group(self.residual_band.spread(self.law.spectrum))
        shell = torch.round(self.residual_band.group_k2.double().sqrt()).long()
        return math.sqrt(float((power * shares[shell]).sum() / power.sum()))

    def loss_per_sample(self, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        of_phase = {"mean": losses.mean_loss, "generator": losses.generator_loss}
        if self.phase not in of_phase:
            raise ValueError(f"phase {self.phase!r} has no loss; call begin('mean', reader) first")
        return of_phase[self.phase](self, batch, seed, step)

    def project(self, white_hat: Tensor, gain: Kriging | None) -> Tensor:
        """A Q^(1/2) f: colour a whitened spectrum and take the kriged part out of it."""
        coloured = white_hat * self.law.modes("colour", white_hat)
        return coloured if gain is None else gain.remove(coloured).to(coloured.dtype)

    @torch.no_grad()
    def sample_batch(
        self,
        state: Tensor,
        *,
        members: Sequence[int],
        seed: int,
        call: int = 0,
        sensors: Sensors | None = None,
        history: Tensor | None = None,
        interval: float | None = None,
        evaluations: int | None = None,
        method: str | None = None,
    ) -> Tensor:
        """See :class:`~.model.ClosureModel`; ``interval`` is relative to the trained one.

        ``method="mean_gp"`` is the baseline of that name: mean plus a stationary Gaussian process.
        """
        if sensors is None and self.sensors_allowed == "required":
            raise ValueError("this model was trained with conditions.sensors=required: give some")
        if sensors is not None and self.sensors_allowed == "none":
            raise ValueError("this model was trained with conditions.sensors=none: give none")
        relative = 1.0 if interval is None else float(interval)
        scale = self.scale_of(relative)
        encoding = self.encode(state, history)
        law = self.plain if method == "mean_gp" else self.law
        if method == "mean_gp":
            encoding = replace(encoding, log_amplitude=None)
        gain, kriged = None, None
        z = self.noise_of_call(seed, members, call, relative, state, law)
        if sensors is not None:
            gain, kriged, error = self.observe(encoding, sensors, scale, law)
            errors = draws.normals(seed, "sample", members, call, error.shape[-1])
            errors = errors.to(error) * error
            z = gain.remove(z, errors)
        x = z
        if self.score_active and method != "mean_gp":
            x = self.generate(encoding, gain, kriged, z, members, seed, call, evaluations, method)
        q_hat = x if kriged is None else x + kriged
        q_hat = (q_hat * scale).to(encoding.mean_hat.dtype)
        u_hat = encoding.mean_hat + self.amplify(q_hat, encoding.log_amplitude)
        return self.band.to_physical(u_hat, state.shape[-1])

    def generate(self, encoding, gain, kriged, z, members, seed, call, evaluations, method):
        """Carry base noise z (M, ...) to residuals q - k with the sampler."""
        std = None if gain is None else gain.std(self.size)
        encoded = self.encode_conditions(encoding, kriged, std)
        z = z.to(torch.complex64)
        if self.config["generator"] == "crps":
            angle = torch.full((1,), math.pi / 2, device=z.device)
            return z + self.project(self.whitened_velocity(z, angle, encoded), gain)
        schedule = SCHEDULES[self.config["schedule"]]()
        shells = self._gain("score/gain", z)
        kept = 1.0 if shells is None else shells

        def denoise(x: Tensor, t: float) -> Tensor:
            angle, norm = schedule.angle(t), schedule.norm(t)
            unit = x / norm
            angles = torch.full((1,), angle, device=z.device)
            white = self.whitened_velocity(unit, angles, encoded) * kept
            return math.cos(angle) * unit - math.sin(angle) * self.project(white, gain)

        sampler = build_sampler(
            method or self.config["method"], schedule, evaluations or self.config["evaluations"]
        )
        x = sampler(denoise, z)
        own = method in (None, self.config["method"]) and (
            evaluations in (None, self.config["evaluations"])
        )
        spread = self._gain("score/spread", z) if own and gain is None else None
        return x if spread is None else x * spread
