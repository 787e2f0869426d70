r"""What the state decides: the mean m(V), the amplitude D(V), the conditions of the generator.

:class:`Encoder` is the deterministic half of the default model; :mod:`default` adds the generator.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpc_closure.closure.band import band
from hpc_closure.closure.features import (
    FEATURES,
    coordinates,
    feature_spectra,
    physics_estimate,
)
from hpc_closure.closure.interface import ClosureModel
from hpc_closure.closure.law import BaseLaw, Kriging
from hpc_closure.closure.network import MeanNetwork
from hpc_closure.closure.regression import Library
from hpc_closure.closure.residual_memory import knot_spacing
from hpc_closure.closure.sensors import Sensors
from hpc_closure.spectral.grid import resize

__all__ = ["Encoder", "Encoding"]

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


class Encoder(ClosureModel):
    """Mean, amplitude, law of the residual, kriging; ``config`` as resolved by :mod:`model`."""

    def __init__(self, config: dict[str, Any], grid: int, length: float = 1.0):
        super().__init__(config, grid, length)
        self.band = band((grid - 1) // 3, length)
        self.history = int(config["conditions"]["history"])
        self.sensors_allowed = config["conditions"]["sensors"]
        self.granted: dict | None = config["conditions"]["physics"] or None
        self.channels = len(FEATURES) + bool(self.granted) + self.history + 4
        self.mean_network = MeanNetwork(
            self.channels,
            config["width"],
            config["modes"],
            config["mean_layers"],
            config["form"],
        )
        self.library = self._library()
        self._kriging: OrderedDict = OrderedDict()

    def load_statistics(self, statistics: dict[str, Tensor]) -> None:
        super().load_statistics(statistics)
        self.refresh()

    def refresh(self) -> None:
        """Rebuild everything that follows from ``statistics``."""
        s = self.statistics
        self.library = self._library(s.get("library"))
        self._kriging.clear()
        if "generator/size" not in s:
            return
        self.size = int(s["generator/size"])
        self.residual_band = band(int(s["generator/modes"]), self.length)
        self.first = BaseLaw(self.residual_band, s["first/spectrum"], float(s["first/tail"]))
        if "law/spectrum" in s:
            self.law = BaseLaw(self.residual_band, s["law/spectrum"], float(s["law/tail"]))
            self.knots = knot_spacing(s["memory/times"], float(s.get("memory/spacing", 0.0)))
            self.plain = BaseLaw(self.residual_band, s["plain/spectrum"], float(s["law/tail"]))

    def _library(self, coefficients: Tensor | None = None) -> Library:
        kind = self.config["library"]
        estimate = self.estimate if self.granted else None
        return Library(self.band, kind, self.history, coefficients, estimate)

    def estimate(self, w_hat: Tensor) -> Tensor:
        """What physics says of the closure, where ``conditions.physics`` grants it."""
        return physics_estimate(w_hat, self.band, **(self.granted or {}))

    def present_features(self, w_hat: Tensor) -> Tensor:
        """Spectra (..., F, 2K + 1, K + 1) of the features of a state, the estimate last."""
        spectra = feature_spectra(w_hat, self.band)
        if not self.granted:
            return spectra
        return torch.cat([spectra, self.estimate(w_hat).unsqueeze(-3)], dim=-3)

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
        """Normalised condition channels (B, C, g, g), float32, on the generator's grid."""
        spectra = self.present_features(frames_hat[:, 0])
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
