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
from dataclasses import dataclass, replace
from typing import Any, Sequence

import torch
from torch import Tensor, nn

from hpc_closure.closure import draws, fitting, training
from hpc_closure.closure.bands import band
from hpc_closure.closure.conditions import FEATURES, Sensors, coordinates, feature_spectra
from hpc_closure.closure.law import BaseLaw, Kriging
from hpc_closure.closure.library import Library
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
        largest: (B, 25) largest modes of the state, normalised.
        log_amplitude: (B, g, g) log D, or None where D = 1.
        raw: the mean network's output before gains, (B, 2, g, g), or None when not evaluated.
    """

    mean_hat: Tensor
    features: Tensor
    largest: Tensor
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
            self.plain = BaseLaw(self.residual_band, s["plain/spectrum"], float(s["law/tail"]))

    def _gain(self, name: str, like: Tensor) -> Tensor | None:
        """Per-mode gain of a learned part; None when it is zero everywhere."""
        shells = self.statistics.get(name)
        if shells is None or not bool((shells != 0).any()):
            return None
        dtype = like.real.dtype if like.is_complex() else like.dtype
        return shells[self.residual_band.grid.shell()].to(device=like.device, dtype=dtype)

    @property
    def amplitude_share(self) -> float:
        """Share of log D in use; 0 = D is 1."""
        return float(self.statistics.get("amplitude/gain", 0.0))

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
        stack = (
            state[:, None]
            if history is None
            else torch.cat([state[:, None], history.to(state)], dim=1)
        )
        frames_hat = self.band.to_spectral(stack)
        mean_hat = self.library(frames_hat)
        features = self.features(frames_hat)
        shift, scale = (self.statistics[f"largest/{name}"].to(state) for name in ("mean", "std"))
        largest = ((self.band.largest(frames_hat[:, 0]) - shift) / scale).float()
        gain = self._gain("mean/gain", features)
        share = self.amplitude_share
        out, log_amplitude = None, None
        if raw or gain is not None or share:
            out = self.mean_network(features, largest)
            if gain is not None:
                colour = self.first.modes("colour", features) * gain
                correction = self.residual_band.to_spectral(out[:, 0]) * colour
                mean_hat = mean_hat + resize(correction, self.band.modes).to(mean_hat.dtype)
            if share:
                log_amplitude = share * self.log_amplitude(out)
        return Encoding(mean_hat, features, largest, log_amplitude, out)

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

    def kriging(
        self, sensors: Sensors, log_amplitude: Tensor | None, device, law: BaseLaw | None = None
    ) -> Kriging:
        """Gain of a layout under a law (of q); kept when it is the same for every state."""
        law = law or self.law
        key = (*sensors.key, str(device), law is self.law)
        fixed = log_amplitude is None or sensors.noise_std == 0
        if fixed and key in self._kriging:
            self._kriging.move_to_end(key)
            return self._kriging[key]
        variance = torch.full(
            (len(sensors.positions),), sensors.noise_std**2, dtype=torch.float64, device=device
        )
        if log_amplitude is not None and not fixed:
            variance = variance * torch.exp(-2 * self.at(log_amplitude, sensors.positions))
        out = Kriging(law, sensors.positions, variance)
        if fixed:
            self._kriging[key] = out
            while len(self._kriging) > KRIGING_CACHE:
                self._kriging.popitem(last=False)
        return out

    def at(self, field: Tensor, positions: Tensor) -> Tensor:
        """Values (B, S), by Fourier interpolation, of fields on the generator's grid."""
        whole = band(self.size // 2 - 1, self.length)
        return whole.at(whole.to_spectral(field), whole.phases(positions, field.device))

    def observe(
        self, encoding: Encoding, sensors: Sensors, scale: float, law: BaseLaw
    ) -> tuple[Kriging, Tensor, Tensor]:
        """(gain, kriged field of q, errors' std (., S)) from sensor values; see the class."""
        device = encoding.mean_hat.device
        values = sensors.values.to(device).double().reshape(-1, len(sensors.positions))
        phases = self.band.phases(sensors.positions, device)
        innovation = (values - self.band.at(encoding.mean_hat, phases)) / scale
        scaled = (
            sensors
            if scale == 1.0
            else Sensors(sensors.values, sensors.positions, sensors.noise_std / scale)
        )
        if encoding.log_amplitude is not None:
            innovation = innovation * torch.exp(
                -self.at(encoding.log_amplitude.double(), sensors.positions)
            )
        gain = self.kriging(scaled, encoding.log_amplitude, device, law)
        return gain, gain.field(innovation), gain.error.sqrt()

    # -- generator -------------------------------------------------------------------------------

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

    def encode_conditions(self, encoding: Encoding, kriged: Tensor | None, std: Tensor | None):
        """What the noisy branch needs of the conditions; once for all noise levels."""
        fields = self.conditions(encoding, kriged, std)
        return self.score_network.encode(fields, encoding.largest)

    def whitened_velocity(self, x_hat: Tensor, angle: Tensor, encoded) -> Tensor:
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

    def loss_per_sample(self, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        losses = {"mean": training.mean_loss, "generator": training.generator_loss}
        if self.phase not in losses:
            raise ValueError(f"phase {self.phase!r} has no loss; call begin('mean', reader) first")
        return losses[self.phase](self, batch, seed, step)

    def project(self, white_hat: Tensor, gain: Kriging | None) -> Tensor:
        """A Q^(1/2) f: colour a whitened spectrum and take the kriged part out of it."""
        coloured = white_hat * self.law.modes("colour", white_hat)
        return coloured if gain is None else gain.remove(coloured).to(coloured.dtype)

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
        """See :class:`~.model.ClosureModel`; ``interval`` is relative to the trained one.

        ``method="mean_gp"`` is the baseline of that name: mean plus a stationary Gaussian process.
        """
        if sensors is None and self.sensors_allowed == "required":
            raise ValueError("this model was trained with conditions.sensors=required: give some")
        if sensors is not None and self.sensors_allowed == "none":
            raise ValueError("this model was trained with conditions.sensors=none: give none")
        scale = 1.0 if interval is None else 1.0 / math.sqrt(interval)
        encoding = self.encode(state, history)
        law = self.plain if method == "mean_gp" else self.law
        if method == "mean_gp":
            encoding = replace(encoding, log_amplitude=None)
        gain, kriged = None, None
        z = self.base_noise(seed, "sample", members, call, like=state, law=law)
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

        def fresh(index: int) -> Tensor:
            more = self.base_noise(
                seed, "sample", members, call, draws.STREAM_STEP + index, like=z
            )
            if gain is not None:
                error = gain.error.sqrt()
                stream = draws.STREAM_STEP + (1 << 10) + index
                eta = draws.normals(seed, "sample", members, call, error.shape[-1], stream)
                more = gain.remove(more, eta.to(error) * error)
            return more.to(z.dtype)

        sampler = build_sampler(
            method or self.config["method"], schedule, evaluations or self.config["evaluations"]
        )
        return sampler(denoise, z, fresh)
