r"""What the state decides: the mean m(V), the amplitude D(V), the conditions of the generator.

:class:`Encoder` is the deterministic half of the default model; :mod:`default` adds the generator.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
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
from hpc_closure.closure.interface import ClosureModel, Reader
from hpc_closure.closure.law import BaseLaw, Kriging
from hpc_closure.closure.losses import gaussian_likelihood, spectral_square
from hpc_closure.closure.network import MeanNetwork
from hpc_closure.closure.regression import Library
from hpc_closure.closure.residual_memory import LagCorrelation, Tags, knot_spacing
from hpc_closure.closure.sensors import Sensors
from hpc_closure.closure.statistics import (
    AMPLITUDE_SHARES,
    Batch,
    Statistics,
    amplitude_share,
    generator_grid,
    shell_gain,
)
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
    """Mean, amplitude, law of the residual, kriging; ``config`` as resolved by :mod:`presets`."""

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
        self.statistics = Statistics()
        self.library = self._library()
        self._kriging: OrderedDict = OrderedDict()

    def saved_statistics(self, spacing: float | None = None) -> dict[str, Tensor]:
        told = self.statistics
        if spacing is not None and told.memory_times is not None:
            told = replace(told, memory_spacing=spacing)
        return told.to_tensors()

    def load_statistics(self, tensors: dict[str, Tensor]) -> None:
        self.adopt(Statistics.from_tensors(tensors))

    def adopt(self, statistics: Statistics) -> None:
        """Take over statistics, and rebuild everything that follows from them."""
        self.statistics = s = statistics
        self.library = self._library(s.library)
        self._kriging.clear()
        if s.generator_size is None:
            return
        self.size, self.residual_band = s.generator_size, band(s.generator_modes, self.length)
        self.first = BaseLaw(self.residual_band, s.first_spectrum, s.first_tail)
        if s.law_spectrum is not None:
            self.law = BaseLaw(self.residual_band, s.law_spectrum, s.law_tail)
            self.plain = BaseLaw(self.residual_band, s.plain_spectrum, s.law_tail)
            self.knots = knot_spacing(s.memory_times, s.memory_spacing or 0.0)

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

    def _modes_of(self, shells: Tensor | None, like: Tensor) -> Tensor | None:
        """Gains (shells,) of a learned part at every mode; None when they are zero everywhere."""
        if shells is None or not bool((shells != 0).any()):
            return None
        dtype = like.real.dtype if like.is_complex() else like.dtype
        return shells[self.residual_band.grid.shell()].to(device=like.device, dtype=dtype)

    @property
    def amplitude_share(self) -> float:
        """Share of log D in use; 0 = D is 1."""
        return self.statistics.amplitude_gain or 0.0

    # ---- what a state decides -------------------------------------------------------------------

    def frames(self, state: Tensor, history: Tensor | None = None) -> Tensor:
        """Spectra (B, 1 + H, ...) in the model's band of fields (B, n, n) and (B, H, n, n)."""
        self._check_history(history)
        if state.dtype not in (torch.float32, torch.float64):
            state = state.float()
        stack = state[:, None]
        if history is not None:
            stack = torch.cat([stack, history.to(state)], dim=1)
        return self.band.to_spectral(stack)

    def frames_hat(self, state: Tensor, history: Tensor | None = None) -> Tensor:
        """The same of retained spectra (B, ...) and (B, H, ...) of any number of modes."""
        self._check_history(history)
        stack = state[:, None]
        if history is not None:
            stack = torch.cat([stack, history.to(state)], dim=1)
        return resize(stack, self.band.modes)

    def _check_history(self, history: Tensor | None) -> None:
        number = 0 if history is None else history.shape[1]
        if number != self.history:
            raise ValueError(
                f"history has {number} frames, this model was built with "
                f"conditions.history={self.history}"
            )

    def encode(self, frames_hat: Tensor, raw: bool = False) -> Encoding:
        """Mean, features and amplitude of states with their history, as :meth:`frames` gives them.

        ``raw``: evaluate the mean network even where it has no gain yet.
        """
        s, like = self.statistics, frames_hat.real
        mean_hat = self.library(frames_hat)
        features = self.features(frames_hat)
        shift, scale = s.largest_mean.to(like), s.largest_std.to(like)
        largest = ((self.band.largest(frames_hat[:, 0]) - shift) / scale).float()
        gain = self._modes_of(s.mean_gain, features)
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
        scale = self.statistics.features_rms
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

    # ---- closed-form statistics and the mean's loss ---------------------------------------------

    def snapshots(self, reader: Reader) -> Iterable[tuple[Tensor, Tensor, Tags]]:
        """(frames, target spectra, tags) of every batch, float64, on the model's device."""
        device = next(self.parameters()).device
        for batch in Batch.read(reader):
            history = None if batch.history is None else batch.history.to(device)
            frames_hat = self.frames(batch.state.to(device).double(), history)
            yield frames_hat, self.band.to_spectral(batch.target.to(device).double()), batch.tags

    def fit_mean(self, reader: Reader) -> dict[str, Any]:
        """Scales, regression, first residual spectrum and the generator's grid (``fit``)."""
        b = self.band
        active = self.library.fit((f, t) for f, t, _ in self.snapshots(reader))
        power = torch.zeros((), dtype=torch.float64)  # (features,)
        spectrum = torch.zeros(len(b.group_k2), dtype=torch.float64)
        total = torch.zeros(len(b.group_k2), dtype=torch.float64)
        num, largest = 0, []
        for frames_hat, target_hat, _ in self.snapshots(reader):
            largest.append(b.largest(frames_hat[:, 0]).cpu())
            features = b.by_group(self.present_features(frames_hat[:, 0]).abs().square())
            power = power + features.sum((0, -1)).cpu()
            residual = target_hat - self.library(frames_hat)
            spectrum += b.by_group(residual.abs().square()).sum(0).cpu()
            total += b.by_group(target_hat.abs().square()).sum(0).cpu()
            num += len(target_hat)
        rms, low, variance = (power / num).sqrt(), torch.cat(largest), spectrum / num
        if not float(total.sum()) > 0:
            raise ValueError("the closure targets are all zero: nothing to learn")
        modes, size, tail = generator_grid(b, variance, self.config["modes"])
        kept = band(modes, self.length)
        per_mode = resize(b.spread(variance / b.group_size), modes)
        self.adopt(
            Statistics(
                library=self.library.coefficients,
                features_rms=rms.clamp(min=1e-30),
                largest_mean=low.mean(0),
                largest_std=low.std(0).clamp(min=1e-6 * float(rms[2])),
                target_rms=float((total.sum() / num).sqrt()),
                first_spectrum=kept.by_group(per_mode) / kept.group_size,
                first_tail=tail,
                first_snapshots=float(num),
                generator_modes=modes,
                generator_size=size,
            )
        )
        return {
            "terms": active,
            "residual": math.sqrt(float(variance.sum()) / float(total.sum() / num)),
            "generator_grid": size,
            "generator_modes": modes,
            "snapshots": num,
        }

    def fit_law(self, reader: Reader) -> dict[str, Any]:
        """Gains of the mean network, amplitude and law of the residual (``hold``)."""
        self.statistics = replace(self.statistics, mean_gain=None, amplitude_gain=None)
        gain = self._mean_gain(reader)
        self.statistics = replace(self.statistics, mean_gain=gain)
        if self.config["amplitude"]:
            share = self._amplitude_gain(reader)
            self.statistics = replace(self.statistics, amplitude_gain=share)
        kept, s = self.residual_band, self.statistics
        power = torch.zeros(len(kept.group_k2), dtype=torch.float64)
        plain_power, tail, num = torch.zeros_like(power), 0.0, 0
        memory = LagCorrelation(kept)
        for frames_hat, target_hat, tags in self.snapshots(reader):
            encoding = self.encode(frames_hat)
            residual = target_hat - encoding.mean_hat
            q_hat = self.standardise(residual, encoding.log_amplitude)
            power += kept.by_group(q_hat.abs().square()).sum(0).cpu()
            memory.add(q_hat, tags)
            inside = resize(residual, kept.modes)
            plain_power += kept.by_group(inside.abs().square()).sum(0).cpu()
            beyond = residual - resize(inside, self.band.modes)
            tail += float(self.band.by_group(beyond.abs().square()).sum())
            num += len(q_hat)
        spectrum, tail = power / num / kept.group_size, tail / num
        if not bool((gain != 0).any()) and self.amplitude_share == 0:
            # nothing was learned by gradients: the members of ``fit`` are as good as unseen
            share = num / (num + s.first_snapshots)
            spectrum = share * spectrum + (1 - share) * s.first_spectrum
            tail = share * tail + (1 - share) * s.first_tail
        if self.config["base_noise"] == "white":
            level = kept.variance(spectrum) / float(kept.group_size.sum())
            spectrum = torch.full_like(spectrum, level)
        elif self.config["base_noise"] != "matched":
            raise ValueError(
                f"base_noise={self.config['base_noise']!r}, expected matched or white"
            )
        self.adopt(
            replace(
                s,
                law_spectrum=spectrum,
                law_tail=tail,
                plain_spectrum=plain_power / num / kept.group_size,
                memory_times=memory.times(),
                score_gain=None,
            )
        )
        return {
            "mean_gain": [round(float(g), 3) for g in gain],
            "amplitude_gain": self.amplitude_share,
            "memory": [round(float(t), 2) for t in self.statistics.memory_times],
            "residual": math.sqrt(kept.variance(spectrum) + tail) / s.target_rms,
            "snapshots": num,
        }

    def _mean_gain(self, reader: Reader) -> Tensor:
        """Gain per shell of the mean network on what the regression leaves."""
        kept, products, squares = self.residual_band, [], []
        for frames_hat, target_hat, _ in self.snapshots(reader):
            encoding = self.encode(frames_hat, raw=True)
            assert encoding.raw is not None
            output = kept.to_spectral(encoding.raw[:, 0].double())
            residual = resize(target_hat - encoding.mean_hat, kept.modes)
            white = residual * self.first.modes("whiten", residual)
            output = output * self.first.modes("mask", residual)
            products.append(kept.grid.shell_sum((white.conj() * output).real).cpu())
            squares.append(kept.grid.shell_sum(output.abs().square()).cpu())
        return shell_gain(torch.cat(products), torch.cat(squares))

    def _amplitude_gain(self, reader: Reader) -> float:
        """Share of log D that is most likely on unseen members."""
        levels, scaled = [], []
        for frames_hat, target_hat, _ in self.snapshots(reader):
            encoding = self.encode(frames_hat, raw=True)
            assert encoding.raw is not None
            residual = resize(target_hat - encoding.mean_hat, self.residual_band.modes)
            square = self.residual_band.to_physical(residual, self.size).square()
            log = self.log_amplitude(encoding.raw).double()
            powers = [
                (square * torch.exp(-2 * share * log)).mean((-2, -1))
                for share in (0.0, *AMPLITUDE_SHARES)
            ]
            levels.append(log.mean((-2, -1)).cpu())
            scaled.append(torch.stack(powers, dim=1).cpu())
        return amplitude_share(torch.cat(levels), torch.cat(scaled))

    def mean_loss(self, batch: dict[str, Any]) -> Tensor:
        """Loss (B,) of the mean network; 1 (+ 1/2 with an amplitude) where it adds nothing.

        Whitened square error of the mean plus the likelihood of its amplitude.
        """
        frames_hat = self.frames(batch["state"], batch.get("history"))
        encoding = self.encode(frames_hat, raw=True)
        assert encoding.raw is not None
        residual = self.band.to_spectral(batch["target"]) - encoding.mean_hat
        residual = resize(residual, self.residual_band.modes).to(torch.complex64)
        guess = self.residual_band.to_spectral(encoding.raw[:, 0])
        white = residual * self.first.modes("whiten", residual) - guess
        loss = spectral_square(self.residual_band, white, self.first.modes("importance", guess))
        if self.config["amplitude"]:
            left = residual - guess.detach() * self.first.modes("colour", guess)
            field = self.residual_band.to_physical(left, self.size)
            field = field / math.sqrt(self.first.variance)
            loss = loss + gaussian_likelihood(field, self.log_amplitude(encoding.raw))
        return loss

    # ---- sensors --------------------------------------------------------------------------------

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
        full = band(self.size // 2 - 1, self.length)
        return full.at(full.to_spectral(field), full.phases(positions, field.device))

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
