r"""The default model: closed-form mean, learned correction and amplitude, score-based residual.

.. math:: U = m(V) + D(V)\,q, \qquad q \sim p(q\,|\,V, y)

* m: library regression (:mod:`regression`) plus a Fourier neural operator for what it leaves;
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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hpc_closure.closure import draws
from hpc_closure.closure.band import band
from hpc_closure.closure.interface import Phase, Reader, Request
from hpc_closure.closure.law import BaseLaw, Kriging
from hpc_closure.closure.losses import (
    ALMOST_FAIR,
    crps,
    spectral_energy_score,
    spectral_square,
)
from hpc_closure.closure.mean import Encoder, Encoding
from hpc_closure.closure.network import Encoded, ScoreNetwork
from hpc_closure.closure.residual_memory import position
from hpc_closure.closure.sampling import SCHEDULES, build_sampler
from hpc_closure.closure.sensors import choose_layouts, training_layout
from hpc_closure.closure.statistics import shell_gain
from hpc_closure.spectral.grid import hermitian, resize

__all__ = ["DefaultModel"]

CHECK_SEED = 20240807
CRPS_MEMBERS = 4


class Posterior(NamedTuple):
    """What sensors tell of q: their gain, and the posterior mean, spectra (B or 1, ...)."""

    gain: Kriging
    mean: Tensor


class DefaultModel(Encoder):
    """See the module's docstring; ``config`` as resolved by :func:`~.presets.resolve`."""

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

    def begin(self, phase: str, reader: Reader) -> dict[str, Any]:
        """Start ``mean``, ``generator`` or ``check`` (see :class:`~.interface.ClosureModel`)."""
        work = {"mean": self.fit_mean, "generator": self.fit_law, "check": self.check_generator}
        if phase not in work:
            raise ValueError(f"phase {phase!r}, expected one of {', '.join(work)}")
        self.phase = phase
        with torch.no_grad():
            report = work[phase](reader)
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
        gain = self.statistics.score_gain
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

    # ---- base noise -----------------------------------------------------------------------------

    def base_noise(
        self, law: BaseLaw, key: draws.Key, stream: int, device: torch.device
    ) -> Tensor:
        """Draws of a base law, spectra (ids, ...) complex128."""
        white = draws.white_spectra(self.residual_band, *key, stream)
        return law.coloured(white.to(device))

    def noise_of_call(self, request: Request, law: BaseLaw) -> Tensor:
        """Base noise of a call, with the residual's memory (:mod:`residual_memory`) if any."""
        device = request.state.device
        key = draws.Key(request.seed, "sample", request.members, request.call)
        fresh = self.base_noise(law, key, draws.STREAM_BASE, device)
        if not bool((self.knots > 0).any()):
            return fresh
        shell = self.residual_band.grid.shell().to(device)
        for knots in sorted(set(self.knots[self.knots > 0].tolist())):
            first, cos, sin = position(request.call * request.held, knots)
            stream = draws.STREAM_MEMORY + round(math.log2(knots))
            one, two = (
                self.base_noise(law, key._replace(item=first + i), stream, device) for i in (0, 1)
            )
            rows = (self.knots == knots).to(device)[shell]
            fresh = torch.where(rows, cos * one + sin * two, fresh)
        return fresh

    def scale_of(self, held: float) -> float:
        """Factor of the residual's std for another interval: the white part averages out."""
        shares = (
            (self.knots.clamp(min=1.0) / held).clamp(max=1.0)
            if held > 1
            else (torch.where(self.knots > 0, 1.0, 1.0 / held))
        )
        power = self.residual_band.by_group(self.residual_band.spread(self.law.spectrum))
        shares = shares[self.residual_band.group_shell]
        return math.sqrt(float((power * shares).sum() / power.sum()))

    # ---- learning the generator -----------------------------------------------------------------

    def loss_per_sample(self, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        if self.phase == "mean":
            return self.mean_loss(batch)
        if self.phase == "generator":
            return self.generator_loss(batch, seed, step)
        raise ValueError(f"phase {self.phase!r} has no loss; call begin('mean', reader) first")

    def generator_loss(self, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        r"""Loss (B,) of the generator; 1 where it adds nothing to a Gaussian law without sensors.

        Score matching as a velocity, :math:`|F(x_t, t) - (\cos t\,z - \sin t\,x_0)|^2` in
        whitened units, with base noise z and residual :math:`x_0` conditioned on the same sensors;
        or, for the one-pass ensemble, almost-fair CRPS plus a spectral energy score. Half of the
        samples see sensors, in layouts drawn from a fixed list, so that one model serves with and
        without them. Every draw is keyed by (seed, step, sample).
        """
        key = draws.Key(seed, "train", [int(i) for i in batch["sample_index"]], step)
        score = self.config["generator"] == "score"
        with torch.no_grad():
            encoding = self.encode(self.frames(batch["state"], batch.get("history")))
            residual = self.band.to_spectral(batch["target"]) - encoding.mean_hat
            x0 = self.standardise(residual, encoding.log_amplitude).to(torch.complex128)
            choice = draws.uniforms(*key).to(x0.device)
            z = torch.stack(
                [
                    self.base_noise(self.law, key, draws.STREAM_STEP + i, x0.device)
                    for i in range(1 if score else CRPS_MEMBERS)
                ]
            )
            layouts = choose_layouts(choice[:, 1].cpu(), self.sensors_allowed)
            kriged, std, gains = self._observe_training(encoding, x0, z, layouts, key)
            x0, z = (x0 - kriged).to(torch.complex64), z.to(torch.complex64)
        encoded = self.encode_conditions(encoding, kriged, std)
        whiten, importance = self.law.modes("whiten", x0), self.law.modes("importance", x0)
        if score:
            angle = (choice[:, 0] * (math.pi / 2)).to(x0.real)
            cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
            guess = self.whitened_velocity(cos * x0 + sin * z[0], angle, encoded)
            guess = self._project_groups(guess, gains)
            error = (guess - (cos * z[0] - sin * x0)) * whiten
            return spectral_square(self.residual_band, error, importance)
        angle = torch.full((1,), math.pi / 2, device=x0.device)
        members = torch.stack(
            [
                one + self._project_groups(self.whitened_velocity(one, angle, encoded), gains)
                for one in z
            ]
        )
        scale = math.sqrt(self.law.variance)
        fields = self.residual_band.to_physical(members, self.size) / scale
        truth = self.residual_band.to_physical(x0, self.size) / scale
        return crps(fields, truth, ALMOST_FAIR) + spectral_energy_score(
            self.residual_band, members * whiten, x0 * whiten, importance, ALMOST_FAIR
        )

    def _observe_training(
        self, encoding: Encoding, x0: Tensor, z: Tensor, layouts: Tensor, key: draws.Key
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Kriging]]]:
        """Condition a batch on the training layouts; ``z`` (N, B, ...) is conditioned in place.

        Returns:
            kriged fields (B, ...), posterior std (B, g, g), list of (rows, gain).
        """
        kriged = torch.zeros_like(x0)
        std = torch.ones(len(x0), self.size, self.size, dtype=torch.float64, device=x0.device)
        gains = []
        for number in sorted(set(layouts.tolist()) - {0}):
            rows = torch.nonzero(layouts == number)[:, 0].to(x0.device)
            log = None if encoding.log_amplitude is None else encoding.log_amplitude[rows]
            sensors = training_layout(number, self.length, math.sqrt(self.law.variance))
            gain = self.kriging(sensors, log, x0.device)
            error = gain.error.sqrt().expand(len(rows), -1)
            mine = key._replace(ids=[key.ids[i] for i in rows.tolist()])
            noise = draws.normals(*mine, (1 + len(z)) * error.shape[-1])
            first, *others = noise.to(error).chunk(1 + len(z), dim=-1)
            kriged[rows] = gain.field(gain.at_sensors(x0[rows]) + first * error)
            std[rows] = gain.std(self.size)
            for one, other in zip(z, others):
                one[rows] = gain.remove(one[rows], other * error)
            gains.append((rows, gain))
        return kriged, std, gains

    def _project_groups(self, white_hat: Tensor, gains: list[tuple[Tensor, Kriging]]) -> Tensor:
        """:meth:`project` where every layout has its own rows of the batch."""
        out = self.project(white_hat, None)
        for rows, gain in gains:
            out = out.index_copy(0, rows, gain.remove(out[rows]).to(out.dtype))
        return out

    def check_generator(self, reader: Reader) -> dict[str, Any]:
        """Gains of the generator's velocity and of its samples' spread (``valid``)."""
        self.statistics = replace(self.statistics, score_gain=None, score_spread=None)
        if self.config["generator"] != "score":
            return {}
        kept, law = self.residual_band, self.law
        products, squares, first = [], [], 0
        for _ in range(2):
            for frames_hat, target_hat, _ in self.snapshots(reader):
                encoding = self.encode(frames_hat)
                q_hat = self.standardise(target_hat - encoding.mean_hat, encoding.log_amplitude)
                key = draws.Key(CHECK_SEED, "check", range(first, first + len(q_hat)), 0)
                first += len(q_hat)
                uniform = draws.uniforms(*key).to(q_hat.device)
                z = self.base_noise(law, key, draws.STREAM_BASE, q_hat.device)
                angle = uniform[:, 0] * (math.pi / 2)
                cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
                x = (cos * q_hat + sin * z).to(torch.complex64)
                velocity = (cos * z - sin * q_hat) * law.modes("whiten", q_hat)
                encoded = self.encode_conditions(encoding, None, None)
                output = self.whitened_velocity(x, angle, encoded).to(torch.complex128)
                output = output * law.modes("mask", q_hat)
                products.append(kept.grid.shell_sum((velocity.conj() * output).real).cpu())
                squares.append(kept.grid.shell_sum(output.abs().square()).cpu())
        gain = shell_gain(torch.cat(products), torch.cat(squares))
        self.statistics = replace(self.statistics, score_gain=gain)
        report = {"score_gain": [round(float(g), 3) for g in gain], "snapshots": first // 2}
        if self.score_active:
            spread = self._spread_gain(reader)
            self.statistics = replace(self.statistics, score_spread=spread)
            report["spread_gain"] = [round(float(s), 3) for s in spread]
        return report

    def _spread_gain(self, reader: Reader) -> Tensor:
        """Standard deviation of the residual over that of the generator's samples, per shell."""
        kept, first = self.residual_band, 0
        seen = torch.zeros(kept.grid.num_shells, dtype=torch.float64)
        drawn = torch.zeros_like(seen)
        for frames_hat, target_hat, _ in self.snapshots(reader):
            encoding = self.encode(frames_hat)
            q_hat = self.standardise(target_hat - encoding.mean_hat, encoding.log_amplitude)
            key = draws.Key(CHECK_SEED, "check", range(first, first + len(q_hat)), 1)
            first += len(q_hat)
            z = self.base_noise(self.law, key, draws.STREAM_BASE, q_hat.device)
            x = self.generate(encoding, z)
            seen += kept.grid.shell_sum(q_hat.abs().square()).sum(0).cpu()
            drawn += kept.grid.shell_sum(x.abs().square().double()).sum(0).cpu()
        ratio = (seen / drawn.clamp(min=1e-300)).sqrt()
        return torch.where((seen > 0) & (drawn > 0), ratio.clamp(0.5, 2.0), 1.0)

    # ---- sampling -------------------------------------------------------------------------------

    def project(self, white_hat: Tensor, gain: Kriging | None) -> Tensor:
        """A Q^(1/2) f: colour a whitened spectrum and take the kriged part out of it."""
        coloured = white_hat * self.law.modes("colour", white_hat)
        return coloured if gain is None else gain.remove(coloured).to(coloured.dtype)

    @torch.no_grad()
    def sample_batch(self, request: Request) -> Tensor:
        """See :class:`~.interface.ClosureModel`.

        ``method="mean_gp"`` is the baseline of that name: mean plus a stationary Gaussian process.
        """
        frames_hat = self.frames(request.state, request.history)
        return self.band.to_physical(self._draw(frames_hat, request), request.state.shape[-1])

    @torch.no_grad()
    def sample_hat(self, request: Request) -> Tensor:
        modes = request.state.shape[-1] - 1
        size = request.grid or band(modes).grid.size
        self.band.check_grid(size, size)
        u_hat = self._draw(self.frames_hat(request.state, request.history), request)
        # no transform has made the column ky = 0 that of a real field
        return hermitian(resize(u_hat, modes))

    def _draw(self, frames_hat: Tensor, request: Request) -> Tensor:
        """Spectra of U (members, ...) in the model's band."""
        sensors, method = request.sensors, request.method
        if sensors is None and self.sensors_allowed == "required":
            raise ValueError("this model was trained with conditions.sensors=required: give some")
        if sensors is not None and self.sensors_allowed == "none":
            raise ValueError("this model was trained with conditions.sensors=none: give none")
        scale = self.scale_of(request.held)
        encoding = self.encode(frames_hat)
        law = self.plain if method == "mean_gp" else self.law
        if method == "mean_gp":
            encoding = replace(encoding, log_amplitude=None)
        posterior = None
        z = self.noise_of_call(request, law)
        if sensors is not None:
            gain, kriged, error = self.observe(encoding, sensors, scale, law)
            key = draws.Key(request.seed, "sample", request.members, request.call)
            errors = draws.normals(*key, error.shape[-1])
            z = gain.remove(z, errors.to(error) * error)
            posterior = Posterior(gain, kriged)
        x = z
        if self.score_active and method != "mean_gp":
            x = self.generate(encoding, z, posterior, method, request.evaluations)
        q_hat = x if posterior is None else x + posterior.mean
        q_hat = (q_hat * scale).to(encoding.mean_hat.dtype)
        return encoding.mean_hat + self.amplify(q_hat, encoding.log_amplitude)

    def generate(
        self,
        encoding: Encoding,
        z: Tensor,
        posterior: Posterior | None = None,
        method: str | None = None,
        evaluations: int | None = None,
    ) -> Tensor:
        """Carry base noise z (M, ...) to residuals, less their posterior mean, by the sampler."""
        gain, kriged = posterior or (None, None)
        std = None if gain is None else gain.std(self.size)
        encoded = self.encode_conditions(encoding, kriged, std)
        z = z.to(torch.complex64)
        if self.config["generator"] == "crps":
            angle = torch.full((1,), math.pi / 2, device=z.device)
            return z + self.project(self.whitened_velocity(z, angle, encoded), gain)
        schedule = SCHEDULES[self.config["schedule"]]()
        shells = self._modes_of(self.statistics.score_gain, z)
        kept = 1.0 if shells is None else shells

        def denoise(x: Tensor, t: float) -> Tensor:
            angle, norm = schedule.angle(t), schedule.norm(t)
            unit = x / norm
            angles = torch.full((1,), angle, device=z.device)
            white = self.whitened_velocity(unit, angles, encoded) * kept
            return math.cos(angle) * unit - math.sin(angle) * self.project(white, gain)

        own = (self.config["method"], self.config["evaluations"])
        chosen = (method or own[0], evaluations or own[1])
        x = build_sampler(chosen[0], schedule, chosen[1])(denoise, z)
        # the spread was made up for the model's own sampler, without sensors
        known = chosen == own and gain is None
        spread = self._modes_of(self.statistics.score_spread, z) if known else None
        return x if spread is None else x * spread
