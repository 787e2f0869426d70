r"""The default model: closed-form mean, learned correction and amplitude, score-based residual.

.. math:: U = m(V) + D(V)\,q, \qquad q \sim p(q\,|\,V, y)

* m: library regression (:mod:`library`) plus a Fourier neural operator for what it leaves;
* D: amplitude field, the exponential of the same network's second output, or 1;
* q: N(0, Q) conditioned on the sensors (:mod:`law`) is the *base*; a trigonometric flow from base
  noise to data, :math:`x_t = \cos t\,x_0 + \sin t\,z`, :math:`x_0 = q - k`, learns what is not
  Gaussian. Its velocity is :math:`F = A\,Q^{1/2} f_\theta`, A = 1 - KH the kriging projector, so
  f = 0 is exact for a Gaussian law, with or without sensors, in any number of steps.

Each learned part must earn its place on members it has not seen: per shell, its output is scaled
by the regression of the truth on it, and dropped where that is not significant.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Sequence

import torch
from torch import Tensor, nn

from hpc_closure.closure import draws, fitting
from hpc_closure.closure.bands import band
from hpc_closure.closure.conditions import FEATURES, Sensors, coordinates, feature_spectra
from hpc_closure.closure.law import BaseLaw, Kriging
from hpc_closure.closure.library import Library
from hpc_closure.closure.loss import (
    almost_fair_crps,
    gaussian_likelihood,
    spectral_energy_score,
    spectral_square,
)
from hpc_closure.closure.model import ClosureModel, Phase
from hpc_closure.closure.network import MeanNetwork, ScoreNetwork
from hpc_closure.closure.sample import build_sampler
from hpc_closure.closure.schedule import SCHEDULES
from hpc_closure.spectral.grid import resize

__all__ = ["DefaultModel", "Encoding"]

KRIGING_CACHE = 32


@dataclass
class Encoding:
    """What the state alone decides, for B states.

    Attributes:
        mean_hat: (B, ...) spectrum of m(V) in the model's band.
        features: (B, C, g, g) condition channels on the generator's grid.
        log_amplitude: (B, g, g) log D, or None where D = 1.
        raw: the mean network's output before gains, (B, 2, g, g), or None when not evaluated.
    """

    mean_hat: Tensor
    features: Tensor
    log_amplitude: Tensor | None
    raw: Tensor | None


class DefaultModel(ClosureModel):
    """See the module's docstring; ``config`` as resolved by :func:`~.model.resolve`."""

    def __init__(self, config: dict[str, Any], grid: int, length: float = 1.0):
        super().__init__(config, grid, length)
        self.band = band((grid - 1) // 3, length)
        self.history = int(config["conditions"]["history"])
        self.sensors_allowed = config["conditions"]["sensors"]
        width, modes, form = config["width"], config["modes"], config["form"]
        channels = len(FEATURES) + self.history + 4
        self.mean_network = MeanNetwork(channels, width, modes, config["mean_layers"], form)
        self.score_network = ScoreNetwork(channels + 3, width, modes, config["layers"], form=form)
        mean_share, score_share = config["shares"]
        self.phases = (
            Phase("mean", mean_share, "fit"),
            Phase("generator", score_share, "hold"),
            Phase("check", 0.0, "valid"),
        )
        self.library = Library(self.band, config["library"], self.history)
        self._kriging: OrderedDict = OrderedDict()

    # -- statistics ------------------------------------------------------------------------------

    def begin(self, phase: str, reader) -> dict[str, Any]:
        """Start ``mean``, ``generator`` or ``check`` (see :class:`~.model.ClosureModel`)."""
        work = {
            "mean": fitting.fit_mean,
            "generator": fitting.fit_law,
            "check": fitting.check_generator,
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

    def load_statistics(self, statistics: dict[str, Tensor]) -> None:
        super().load_statistics(statistics)
        self.refresh()

    def refresh(self) -> None:
        """Rebuild everything that follows from ``statistics``."""
        s = self.statistics
        kind = self.config["library"]
        self.library = Library(self.band, kind, self.history, s.get("library"))
        self._kriging.clear()
        if "generator/size" not in s:
            return
        self.size = int(s["generator/size"])
        self.residual_band = band(int(s["generator/modes"]), self.length)
        self.first = BaseLaw(self.residual_band, s["first/spectrum"], float(s["first/tail"]))
        if "law/spectrum" in s:
            self.law = BaseLaw(self.residual_band, s["law/spectrum"], float(s["law/tail"]))

    def _gain(self, name: str, like: Tensor) -> Tensor | None:
        """Per-mode gain of a learned part; None when it is zero everywhere."""
        shells = self.statistics.get(name)
        if shells is None or not bool((shells != 0).any()):
            return None
        dtype = like.real.dtype if like.is_complex() else like.dtype
        return shells[self.residual_band.grid.shell()].to(device=like.device, dtype=dtype)

    @property
    def score_active(self) -> bool:
        """Whether the generator earned its place (it is skipped otherwise)."""
        gain = self.statistics.get("score/gain")
        return gain is None or bool((gain != 0).any())

    # -- conditions ------------------------------------------------------------------------------

    def encode(self, state: Tensor, history: Tensor | None = None, raw: bool = False) -> Encoding:
        """Mean, features and amplitude of states (B, n, n) with history (B, H, n, n).

        ``raw``: evaluate the mean network even where it has no gain yet.
        """
        if (0 if history is None else history.shape[1]) != self.history:
            raise ValueError(
                f"history has {0 if history is None else history.shape[1]} frames, this model was "
                f"built with conditions.history={self.history}"
            )
        if state.dtype not in (torch.float32, torch.float64):
            state = state.float()
        stack = state[:, None] if history is None else torch.cat(
            [state[:, None], history.to(state)], dim=1)
        frames_hat = self.band.to_spectral(stack)
        mean_hat = self.library(frames_hat)
        features = self.features(frames_hat)
        gain = self._gain("mean/gain", features)
        share = float(self.statistics.get("amplitude/gain", 0.0))
        out, log_amplitude = None, None
        if raw or gain is not None or share:
            out = self.mean_network(features)
            if gain is not None:
                colour = self.first.modes("colour", features) * gain
                correction = self.residual_band.to_spectral(out[:, 0]) * colour
                mean_hat = mean_hat + resize(correction, self.band.modes).to(mean_hat.dtype)
            if share:
                log_amplitude = share * self.log_amplitude(out)
        return Encoding(mean_hat, features, log_amplitude, out)

    def features(self, frames_hat: Tensor) -> Tensor:
        """Normalised condition channels (B, 9 + H, g, g), float32, on the generator's grid."""
        spectra = feature_spectra(frames_hat[:, 0], self.band)
        spectra = torch.cat([spectra, frames_hat[:, 1:]], dim=1)
        scale = self.statistics["features/rms"]
        scale = torch.cat([scale, scale[2:3].expand(self.history)]).to(frames_hat.real)
        fields = (self.band.to_physical(spectra, self.size) / scale[:, None, None]).float()
        places = coordinates(self.size, fields).expand(len(fields), -1, -1, -1)
        return torch.cat([fields, places], dim=1)

    def log_amplitude(self, out: Tensor) -> Tensor:
        """log D (B, g, g) from the mean network's output; bounded to a factor of 20."""
        return 3.0 * torch.tanh(out[:, 1] / 3.0)

    def standardise(self, residual_hat: Tensor, log_amplitude: Tensor | None) -> Tensor:
        """Residual spectra in the model's band to q spectra (B, ...) in the residual band."""
        if log_amplitude is None:
            return resize(residual_hat, self.residual_band.modes)
        field = self.band.to_physical(residual_hat, self.size)
        return self.residual_band.to_spectral(field * torch.exp(-log_amplitude).to(field))

    def amplify(self, q_hat: Tensor, log_amplitude: Tensor | None) -> Tensor:
        """Inverse of :meth:`standardise`: spectra in the model's band."""
        if log_amplitude is None:
            return resize(q_hat, self.band.modes)
        field = self.residual_band.to_physical(q_hat, self.size)
        field = field * torch.exp(log_amplitude).to(field)
        grid_band = band(min(self.size // 2 - 1, self.band.modes), self.length)
        return resize(grid_band.to_spectral(field), self.band.modes)

    def kriging(self, sensors: Sensors, log_amplitude: Tensor | None, device) -> Kriging:
        """Gain of a layout under the law of q; kept when it is the same for every state."""
        key = (*sensors.key, str(device))
        fixed = log_amplitude is None or sensors.noise_std == 0
        if fixed and key in self._kriging:
            self._kriging.move_to_end(key)
            return self._kriging[key]
        variance = torch.full((len(sensors.positions),), sensors.noise_std**2,
                              dtype=torch.float64, device=device)
        if not fixed:
            variance = variance * torch.exp(-2 * self.at(log_amplitude, sensors.positions))
        out = Kriging(self.law, sensors.positions, variance)
        if fixed:
            self._kriging[key] = out
            while len(self._kriging) > KRIGING_CACHE:
                self._kriging.popitem(last=False)
        return out

    def at(self, field: Tensor, positions: Tensor) -> Tensor:
        """Values (B, S) of fields on the generator's grid at positions, by Fourier interpolation."""
        whole = band(self.size // 2 - 1, self.length)
        return whole.at(whole.to_spectral(field), whole.phases(positions))

    def observe(
        self, encoding: Encoding, sensors: Sensors, scale: float = 1.0
    ) -> tuple[Kriging, Tensor, Tensor]:
        """(gain, kriged field of q, errors' std (., S)) from sensor values; see the class."""
        device = encoding.mean_hat.device
        values = sensors.values.to(device).double().reshape(-1, len(sensors.positions))
        phases = self.band.phases(sensors.positions).to(device)
        innovation = (values - self.band.at(encoding.mean_hat, phases)) / scale
        scaled = sensors if scale == 1.0 else Sensors(
            sensors.values, sensors.positions, sensors.noise_std / scale)
        if encoding.log_amplitude is not None:
            innovation = innovation * torch.exp(
                -self.at(encoding.log_amplitude.double(), sensors.positions))
        gain = self.kriging(scaled, encoding.log_amplitude, device)
        return gain, gain.field(innovation), gain.error.sqrt()

    # -- generator -------------------------------------------------------------------------------

    def conditions(self, encoding: Encoding, gain: Kriging | None, kriged: Tensor | None) -> Tensor:
        """Channels (B, C + 3, g, g) of the generator: features, kriged field, its std, log D."""
        features = encoding.features
        batch = len(features) if kriged is None else max(len(features), len(kriged))
        shape = (batch, self.size, self.size)
        scale = math.sqrt(self.law.variance)
        field, std = features.new_zeros(shape), features.new_ones(shape)
        if gain is not None:
            field = (self.residual_band.to_physical(kriged, self.size) / scale).to(features)
            std = gain.std(self.size).to(features).expand(shape)
        log = features.new_zeros(shape) if encoding.log_amplitude is None else (
            encoding.log_amplitude.expand(shape))
        extra = torch.stack([field.expand(shape), std, log], dim=1)
        return torch.cat([features.expand(batch, -1, -1, -1), extra], dim=1)

    def whitened_velocity(self, x_hat: Tensor, angle: Tensor, encoded) -> Tensor:
        """Network output, spectra (B, ...) in whitened units, at noisy x of unit-norm schedule."""
        white = self.residual_band.to_physical(x_hat * self.law.modes("whiten", x_hat), self.size)
        white = white / (2 * self.residual_band.modes + 1)
        plain = self.residual_band.to_physical(x_hat, self.size) / math.sqrt(self.law.variance)
        inputs = torch.stack([white, plain], dim=1).float()
        return self.residual_band.to_spectral(self.score_network(inputs, angle.float(), encoded))

    def base_noise(self, seed: int, stage: str, ids: Sequence[int], item: int,
                   stream: int = draws.STREAM_BASE, like: Tensor | None = None) -> Tensor:
        """Draws of the base law, spectra (len(ids), ...) complex128."""
        white = draws.white_spectra(self.residual_band, seed, stage, ids, item, stream)
        white = white if like is None else white.to(like.device)
        return white * self.law.modes("std", white)

    # -- losses ----------------------------------------------------------------------------------

    def loss_per_sample(self, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        if self.phase == "mean":
            return self._mean_loss(batch)
        if self.phase != "generator":
            raise ValueError(f"phase {self.phase!r} has no loss; call begin('mean', reader) first")
        with torch.no_grad():
            encoding = self.encode(batch["state"], batch.get("history"))
            residual = self.band.to_spectral(batch["target"]) - encoding.mean_hat
            q_hat = self.standardise(residual, encoding.log_amplitude)
        ids = [int(i) for i in batch["sample_index"]]
        choice = draws.uniforms(seed, "train", ids, step)
        out = residual.new_zeros(len(ids), dtype=torch.float32)
        layout = fitting.choose_layout(choice[:, 1], self.sensors_allowed)
        for number in sorted(set(layout.tolist())):
            rows = torch.nonzero(layout == number)[:, 0]
            part = rows.to(q_hat.device)
            some = Encoding(
                encoding.mean_hat[part],
                encoding.features[part],
                None if encoding.log_amplitude is None else encoding.log_amplitude[part],
                None,
            )
            keys = [ids[i] for i in rows]
            value = self._generator_loss(some, q_hat[part], number, choice[rows], keys, seed, step)
            out = out.index_put((part,), value.float())
        return out

    def _mean_loss(self, batch: dict[str, Any]) -> Tensor:
        encoding = self.encode(batch["state"], batch.get("history"), raw=True)
        target_hat = self.band.to_spectral(batch["target"])
        residual = resize(target_hat - encoding.mean_hat, self.residual_band.modes)
        whiten = self.first.modes("whiten", encoding.features)
        guess = self.residual_band.to_spectral(encoding.raw[:, 0])
        white = (residual * whiten).to(guess.dtype) - guess
        loss = spectral_square(self.residual_band, white, self.first.modes("mask", guess))
        if self.config["amplitude"]:
            colour = self.first.modes("colour", encoding.features)
            left = residual.to(guess.dtype) - guess.detach() * colour
            field = self.residual_band.to_physical(left, self.size) / math.sqrt(self.first.variance)
            loss = loss + gaussian_likelihood(field, self.log_amplitude(encoding.raw))
        return loss

    def training_sensors(self, number: int, q_hat: Tensor, encoding: Encoding, keys, seed, step):
        """(gain, kriged field, errors) of layout ``number``, its values taken from q itself."""
        sensors = fitting.training_layout(number, self.length, math.sqrt(self.law.variance))
        gain = self.kriging(sensors, encoding.log_amplitude, q_hat.device)
        error = gain.error.sqrt().expand(len(q_hat), -1)
        noise = draws.normals(seed, "train", keys, step, 2 * error.shape[-1]).to(error)
        one, other = noise.chunk(2, dim=-1)
        kriged = gain.field(gain.at_sensors(q_hat) + one * error)
        return gain, kriged, other * error

    def _generator_loss(self, encoding, q_hat, number, choice, keys, seed, step) -> Tensor:
        gain, kriged = None, None
        with torch.no_grad():
            x0 = q_hat.to(torch.complex128)
            many = 1 if self.config["generator"] == "score" else 4
            z = [self.base_noise(seed, "train", keys, step, draws.STREAM_STEP + i, x0)
                 for i in range(many)]
            if number:
                gain, kriged, errors = self.training_sensors(
                    number, q_hat, encoding, keys, seed, step)
                x0 = x0 - kriged
                z = [gain.remove(one, errors) for one in z]
            x0 = x0.to(torch.complex64)
            z = [one.to(torch.complex64) for one in z]
        encoded = self.score_network.encode(self.conditions(encoding, gain, kriged))
        whiten, mask = self.law.modes("whiten", x0), self.law.modes("mask", x0)
        if many > 1:
            return self._one_pass_loss(x0, z, gain, encoded, whiten, mask)
        angle = (choice[:, 0] * (math.pi / 2)).to(x0.real)
        cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
        x, velocity = cos * x0 + sin * z[0], cos * z[0] - sin * x0
        guess = self.project(self.whitened_velocity(x, angle, encoded), gain)
        error = (guess - velocity) * whiten
        return spectral_square(self.residual_band, error, mask)

    def project(self, white_hat: Tensor, gain: Kriging | None) -> Tensor:
        """A Q^(1/2) f: colour a whitened spectrum and take the kriged part out of it."""
        coloured = white_hat * self.law.modes("colour", white_hat)
        return coloured if gain is None else gain.remove(coloured).to(coloured.dtype)

    def one_pass(self, z: Tensor, gain: Kriging | None, encoded) -> Tensor:
        """The one-pass generator's member from base noise z, spectra."""
        angle = torch.full((1,), math.pi / 2, device=z.device)
        return z + self.project(self.whitened_velocity(z, angle, encoded), gain).to(z.dtype)

    def _one_pass_loss(self, x0, z, gain, encoded, whiten, mask) -> Tensor:
        members = torch.stack([self.one_pass(one, gain, encoded) for one in z])
        scale = math.sqrt(self.law.variance)
        fields = self.residual_band.to_physical(members, self.size) / scale
        truth = self.residual_band.to_physical(x0, self.size) / scale
        return almost_fair_crps(fields, truth) + spectral_energy_score(
            self.residual_band, members * whiten, x0 * whiten, mask)

    # -- sampling --------------------------------------------------------------------------------

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
        """See :class:`~.model.ClosureModel`; ``interval`` is relative to the trained one."""
        if sensors is None and self.sensors_allowed == "required":
            raise ValueError("this model was trained with conditions.sensors=required: give sensors")
        if sensors is not None and self.sensors_allowed == "none":
            raise ValueError("this model was trained with conditions.sensors=none: give none")
        scale = 1.0 if interval is None else 1.0 / math.sqrt(interval)
        encoding = self.encode(state, history)
        gain, kriged, errors = None, None, None
        z = self.base_noise(seed, "sample", members, call, like=state)
        if sensors is not None:
            gain, kriged, error = self.observe(encoding, sensors, scale)
            errors = draws.normals(seed, "sample", members, call, error.shape[-1]).to(error) * error
            z = gain.remove(z, errors)
        x = z
        if self.score_active:
            x = self.generate(encoding, gain, kriged, z, members, seed, call, evaluations, method)
        q_hat = x if kriged is None else x + kriged
        q_hat = (q_hat * scale).to(encoding.mean_hat.dtype)
        u_hat = encoding.mean_hat + self.amplify(q_hat, encoding.log_amplitude)
        return self.band.to_physical(u_hat, state.shape[-1])

    def generate(self, encoding, gain, kriged, z, members, seed, call, evaluations, method):
        """Carry base noise z (M, ...) to residuals q - k with the sampler."""
        encoded = self.score_network.encode(self.conditions(encoding, gain, kriged))
        z = z.to(torch.complex64)
        if self.config["generator"] == "crps":
            return self.one_pass(z, gain, encoded)
        schedule = SCHEDULES[self.config["schedule"]]()
        shells = self._gain("score/gain", z)
        kept = 1.0 if shells is None else shells

        def denoise(x: Tensor, t: float) -> Tensor:
            angle, norm = schedule.angle(t), schedule.norm(t)
            unit = x / norm
            angles = torch.full((1,), angle, device=z.device)
            white = self.whitened_velocity(unit, angles, encoded) * kept
            return math.cos(angle) * unit - math.sin(angle) * self.project(white, gain)

        def fresh(index: int) -> Tensor:
            more = self.base_noise(
                seed, "sample", members, call, draws.STREAM_STEP + index, like=z)
            if gain is not None:
                error = gain.error.sqrt()
                stream = draws.STREAM_STEP + (1 << 10) + index
                eta = draws.normals(seed, "sample", members, call, error.shape[-1], stream)
                more = gain.remove(more, eta.to(error) * error)
            return more.to(z.dtype)

        sampler = build_sampler(
            method or self.config["method"], schedule, evaluations or self.config["evaluations"])
        return sampler(denoise, z, fresh)
