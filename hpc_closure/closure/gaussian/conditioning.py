"""Conditioning of the residual q on sensors: kriging under the base law, or learned."""

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.members import for_members
from hpc_closure.closure.fields.sensors import (
    KRIGED_LAYOUTS,
    LEARNED_LAYOUTS,
    VARIANTS,
    Sensors,
    TrainingLayout,
    regular_side,
    training_layout,
)
from hpc_closure.closure.gaussian.kriging import Kriging, StationaryGaussian
from hpc_closure.closure.gaussian.residual_coordinates import ResidualCoordinates, StateConditions

__all__ = [
    "SensorInterpolator",
    "Conditioning",
    "Kriged",
    "Learned",
    "Observed",
    "GeneratorConditions",
    "Reading",
]

KRIGING_CACHE = 32  # cached gains
CARRIERS = 256  # cached carriers
FEW = 0.1  # total weight of sensors at which a point counts as half observed


class SensorInterpolator:
    """Interpolation between the sensors of a layout and the generator's grid.

    A regular layout is interpolated by its Fourier modes. Values of a scattered layout are spread
    by a normalised Gaussian of half the sensors' mean distance.

    Args:
        frame: coordinates of q.
        positions: (S, 2).
        noise: standard deviation of the errors over that of q.
        device: torch device.

    Attributes:
        places: (2, g, g) how well each point is observed, 0 to 1, and the noise.
        numbers: (4,) description of the layout, see
            :mod:`~hpc_closure.closure.networks.sensor_network`.
    """

    def __init__(self, frame: ResidualCoordinates, positions: Tensor, noise: float, device: Any):
        kept, size, count = frame.kept, frame.size, len(positions)
        weights = kept.weights.flatten().repeat_interleave(2)
        self._reads = (kept.phases(positions) * weights).to(device, torch.float32)
        near, density = _interpolation(positions, size, frame.band.length)
        self._spreads = near.to(device, torch.float32).contiguous()
        self.size = size
        seen = density.to(device, torch.float32)
        self.places = torch.stack([seen, torch.full_like(seen, noise)])
        log_count = math.log(count) / math.log(256)
        self.numbers = torch.tensor([1.0, log_count, noise, float(density.mean())], device=device)

    def read(self, q_hat: Tensor) -> Tensor:
        """Evaluate spectra (B, ...) at the sensors; returns (B, S), float32."""
        pairs = torch.view_as_real(q_hat.to(torch.complex64)).flatten(1)
        return pairs @ self._reads.T

    def spread(self, values: Tensor) -> Tensor:
        """Spread sensor values (B, S) to fields (B, g, g)."""
        return (values.float() @ self._spreads).unflatten(-1, (self.size, self.size))


def _interpolation(positions: Tensor, size: int, length: float) -> tuple[Tensor, Tensor]:
    """Compute each sensor's weight at each point, (S, g g), and each point's coverage, (g, g)."""
    side = regular_side(positions)
    points = torch.arange(size, dtype=torch.float64) / size
    offsets = (positions / length)[:, :, None] - points  # (S, 2, g)
    if side:
        k = torch.arange(-((side - 1) // 2), side // 2 + 1, dtype=torch.float64)
        one = torch.cos(2 * math.pi * offsets[..., None] * k).sum(-1) / side
        seen = torch.ones(size, size, dtype=torch.float64)
        return (one[:, 0, :, None] * one[:, 1, None, :]).flatten(1), seen
    width = 0.5 / math.sqrt(len(positions))
    one = torch.exp(-0.5 * ((offsets - offsets.round()) / width).square())
    near = (one[:, 0, :, None] * one[:, 1, None, :]).flatten(1)
    total = near.sum(0)
    seen = (total / (total + FEW)).unflatten(-1, (size, size))
    return near / (total + FEW), seen


@dataclass
class Reading:
    """Readings of a layout, as input of a network.

    Attributes:
        rows: rows of the batch with this layout; None = all.
        carrier: interpolation of the layout.
        values: (rows or 1, S), readings minus the mean, in units of q's standard deviation.
    """

    rows: Tensor | None
    carrier: SensorInterpolator
    values: Tensor

    def rows_of(self, count: int) -> Tensor:
        """Return the rows with this layout in a batch of ``count``."""
        if self.rows is not None:
            return self.rows
        return torch.arange(count, device=self.values.device)


@dataclass
class Observed:
    """Information of sensors about q, for B states.

    Attributes:
        fields: (B or 1, C, g, g) input channels of the residual's network; empty if there is none.
        gain: the kriging gain; None if only the network uses the sensors.
        mean: posterior mean of q, spectra (B or 1, ...); None likewise.
        readings: readings for the network.
    """

    fields: Tensor
    gain: Kriging | None = None
    mean: Tensor | None = None
    readings: list[Reading] = field(default_factory=list)

    def condition(self, z: Tensor, key: keyed_noise.Key) -> Tensor:
        """Turn prior draws of q (M, ...) into posterior fluctuations; M / B draws per state."""
        if self.gain is None:
            return z
        std = self.gain.error.sqrt()
        if std.ndim == 2:  # one row per state
            std = for_members(std, len(z))
        errors = keyed_noise.normals(*key, std.shape[-1]).to(std)
        return self.gain.remove(z, errors * std)


@dataclass
class TrainingObserved:
    """Information of training layouts about the q of a batch.

    Attributes:
        fields: (B, C, g, g) input channels of the residual's network.
        mean: posterior mean of q, spectra (B, ...).
        gains: (rows, gain) of every kriged layout.
        readings: readings for the network.
    """

    fields: Tensor
    mean: Tensor
    gains: list[tuple[Tensor, Kriging]] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)


class Conditioning(ABC):
    """Method by which sensors condition the residual."""

    #: number of fields that it adds to the network's input
    channels: int
    #: layouts used in training
    layouts: tuple[TrainingLayout, ...]

    @abstractmethod
    def absent(self, frame: ResidualCoordinates, like: Tensor) -> Tensor:
        """Return the network's input (1, C, g, g) without sensors."""

    @abstractmethod
    def observe(
        self,
        frame: ResidualCoordinates,
        encoding: StateConditions,
        sensors: Sensors,
        scale: Tensor | None,
        law: StationaryGaussian,
    ) -> Observed:
        """Condition q on readings.

        Args:
            frame: coordinates of q.
            encoding: conditions from the states.
            sensors: readings of U.
            scale: (shells,) standard deviation of the readings' part of q over that of its law;
                None = 1. It differs from 1 if U is a mean over another interval than in training.
            law: law of q.
        """

    @abstractmethod
    def observe_training(
        self,
        frame: ResidualCoordinates,
        encoding: StateConditions,
        x0: Tensor,
        z: Tensor,
        layouts: Tensor,
        key: keyed_noise.Key,
    ) -> TrainingObserved:
        """Read the truth with training layouts and condition on it.

        Args:
            frame: coordinates of q.
            encoding: conditions from the states.
            x0: true q of the batch, spectra (B, ...).
            z: (N, B, ...) base noise, conditioned in place.
            layouts: (B,) layout number of each sample, 0 = none.
            key: key of the sensors' errors.
        """


class Kriged(Conditioning):
    """Kriging under the base law, at any positions; exact for a Gaussian residual."""

    channels = 2  # kriged field, posterior standard deviation over the prior's
    layouts = KRIGED_LAYOUTS

    def __init__(self) -> None:
        self._kept: OrderedDict = OrderedDict()

    def clear(self) -> None:
        """Clear the cache of gains, because the law has changed."""
        self._kept.clear()

    def absent(self, frame: ResidualCoordinates, like: Tensor) -> Tensor:
        none = like.new_zeros(1, 2, *frame.points)
        none[:, 1] = 1.0
        return none

    def gain(
        self,
        frame: ResidualCoordinates,
        sensors: Sensors,
        log_amplitude: Tensor | None,
        law: StationaryGaussian,
        device: Any,
        scale: Tensor | None = None,
    ) -> Kriging:
        """Return the gain of a layout under a law of q; cached if the same for every state."""
        shells = None if scale is None else tuple(scale.tolist())
        key = (*sensors.key, str(device), law is frame.law, shells)
        fixed = log_amplitude is None or sensors.exact
        if fixed and key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        fields = len(law.spectrum) if law.spectrum.ndim > 1 else 1
        variance = sensors.variances(fields).to(device)
        if log_amplitude is not None and not fixed:
            at_sensors = frame.at(log_amplitude, sensors.positions).flatten(1)
            variance = variance * torch.exp(-2 * at_sensors)
        seen = None if scale is None else frame.each_mode(scale, variance)
        is_plain = law is frame.plain and law is not frame.law
        channels = frame.plain_channels if is_plain else frame.channels
        out = Kriging(law, sensors.positions, variance, seen, channels)
        if fixed:
            self._kept[key] = out
            while len(self._kept) > KRIGING_CACHE:
                self._kept.popitem(last=False)
        return out

    def observe(self, frame, encoding, sensors, scale, law):
        innovation = frame.innovation(encoding, sensors)
        device = encoding.mean_hat.device
        gain = self.gain(frame, sensors, encoding.log_amplitude, law, device, scale)
        kriged = gain.field(innovation)
        if law.spectrum.ndim > 1 or frame.kept.grid.dimensions != 2:  # no network reads them
            return Observed(self.absent(frame, encoding.features), gain, kriged)
        return Observed(self._fields(frame, kriged, gain.std(frame.size)), gain, kriged)

    def _fields(self, frame: ResidualCoordinates, kriged: Tensor, std: Tensor) -> Tensor:
        mean = frame.field(kriged) / math.sqrt(frame.law.variance)
        return torch.stack([mean, std.expand_as(mean)], dim=1).float()

    def observe_training(self, frame, encoding, x0, z, layouts, key):
        kriged = torch.zeros_like(x0)
        std = torch.ones(len(x0), frame.size, frame.size, dtype=torch.float64, device=x0.device)
        gains = []
        for number, places in rows_of(layouts):
            rows = places.to(x0.device)
            log = None if encoding.log_amplitude is None else encoding.log_amplitude[rows]
            rms = math.sqrt(frame.law.variance)
            sensors = training_layout(self.layouts[number - 1], 0, frame.band.length, rms)
            gain = self.gain(frame, sensors, log, frame.law, x0.device)
            error = gain.error.sqrt().expand(len(rows), -1)
            mine = key._replace(ids=[key.ids[i] for i in places.tolist()])
            noise = keyed_noise.normals(*mine, (1 + len(z)) * error.shape[-1])
            first, *others = noise.to(error).chunk(1 + len(z), dim=-1)
            kriged[rows] = gain.field(gain.at_sensors(x0[rows]) + first * error)
            std[rows] = gain.std(frame.size)
            for one, other in zip(z, others):
                one[rows] = gain.remove(one[rows], other * error)
            gains.append((rows, gain))
        return TrainingObserved(self._fields(frame, kriged, std), kriged, gains)


class Learned(Conditioning):
    """Learned conditioning: the network receives readings and positions as input."""

    channels = 0
    layouts = LEARNED_LAYOUTS

    def __init__(self) -> None:
        self._kept: OrderedDict = OrderedDict()

    def absent(self, frame: ResidualCoordinates, like: Tensor) -> Tensor:
        return like.new_zeros(1, 0, *frame.points)

    def carrier(
        self, frame: ResidualCoordinates, sensors: Sensors, noise_std: float, device: Any
    ) -> SensorInterpolator:
        """Return the carrier of a layout; the last ones are cached."""
        key = (*sensors.key, noise_std, frame.kept.modes, frame.size, str(device))
        if key not in self._kept:
            noise = noise_std / math.sqrt(frame.law.variance)
            self._kept[key] = SensorInterpolator(frame, sensors.positions, noise, device)
            while len(self._kept) > CARRIERS:
                self._kept.popitem(last=False)
        return self._kept[key]

    def observe(self, frame, encoding, sensors, scale, law):
        # another interval changes the spread of q about its mean, but not the learned mean
        innovation = frame.innovation(encoding, sensors)
        carrier = self.carrier(frame, sensors, sensors.noise_std, innovation.device)
        values = innovation / math.sqrt(frame.law.variance)
        absent = self.absent(frame, encoding.features)
        return Observed(absent, readings=[Reading(None, carrier, values)])

    def observe_training(self, frame, encoding, x0, z, layouts, key):
        rms, readings = math.sqrt(frame.law.variance), []
        for number, places in rows_of(layouts):
            rows = places.to(x0.device)
            mine = key._replace(ids=[key.ids[i] for i in places.tolist()])
            # one set of positions per batch, because the carrier's matrices are large
            sensors = training_layout(
                self.layouts[number - 1], key.item % VARIANTS, frame.band.length, rms
            )
            carrier = self.carrier(frame, sensors, sensors.noise_std, x0.device)
            values = carrier.read(x0[rows] / rms).double()
            errors = keyed_noise.normals(*mine, values.shape[-1]).to(values)
            readings.append(Reading(rows, carrier, values + errors * (sensors.noise_std / rms)))
        absent = self.absent(frame, encoding.features)
        return TrainingObserved(absent, torch.zeros_like(x0), readings=readings)


def rows_of(layouts: Tensor) -> list[tuple[int, Tensor]]:
    """List (layout number, rows) of a batch, on the host; skips rows without sensors."""
    numbers = sorted(set(layouts.tolist()) - {0})
    return [(number, torch.nonzero(layouts == number)[:, 0]) for number in numbers]


@dataclass
class GeneratorConditions:
    """Conditions under which the generator draws q.

    Attributes:
        fields: (B or 1, C, g, g) channels of the state and the sensors.
        summary: (B or 1, 51) numbers of the state.
        gains: (rows, gain) of every kriged layout; rows None = all.
        readings: readings that the network uses itself.
        white_state: (B or 1, ...) whitened spectra of the state in the residual band; None if the
            network does not read them.
    """

    fields: Tensor
    summary: Tensor
    gains: list[tuple[Tensor | None, Kriging]]
    readings: list[Reading]
    white_state: Tensor | None = None

    def project(self, frame: ResidualCoordinates, white_hat: Tensor) -> Tensor:
        """Colour a whitened spectrum (B, ...) and remove its kriged part: (1 - KH) Q^(1/2) f."""
        out = white_hat * frame.law.modes("colour", white_hat)
        for rows, gain in self.gains:
            if rows is None:
                out = gain.project(out).to(out.dtype)
            else:
                out = out.index_copy(0, rows, gain.project(out[rows]).to(out.dtype))
        return out
