"""How sensors enter the residual: kriged under the base law, or learned by its network."""

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hpc_closure.closure import draws
from hpc_closure.closure.frame import Encoding, Frame
from hpc_closure.closure.law import BaseLaw, Kriging
from hpc_closure.closure.sensors import (
    Sensors,
    fourier_interpolation,
    regular_side,
    training_layout,
)

__all__ = ["Conditioning", "Kriged", "Learned", "Observed"]

KRIGING_CACHE = 32


@dataclass
class Observed:
    """What sensors say of q, for B states.

    Attributes:
        fields: (B or 1, C, g, g) channels of the residual's network.
        gain: of the kriging, or None where the network alone makes use of the sensors.
        mean: posterior mean of q, spectra (B or 1, ...), or None.
    """

    fields: Tensor
    gain: Kriging | None = None
    mean: Tensor | None = None

    def condition(self, z: Tensor, key: draws.Key) -> Tensor:
        """Base noise (M, ...) of the prior to that of the posterior."""
        if self.gain is None:
            return z
        errors = draws.normals(*key, self.gain.error.shape[-1]).to(self.gain.error)
        return self.gain.remove(z, errors * self.gain.error.sqrt())


@dataclass
class TrainingObserved:
    """What training layouts say of a batch.

    Attributes:
        fields: (B, C, g, g).
        mean: posterior mean of q, spectra (B, ...).
        gains: (rows, gain) of every layout that is kriged.
    """

    fields: Tensor
    mean: Tensor
    gains: list[tuple[Tensor, Kriging]]


class Conditioning(ABC):
    """How sensors enter."""

    #: fields that it gives the network
    channels: int

    @abstractmethod
    def absent(self, frame: Frame, like: Tensor) -> Tensor:
        """Fields (1, C, g, g) where there are no sensors."""

    @abstractmethod
    def observe(
        self, frame: Frame, encoding: Encoding, sensors: Sensors, scale: float, law: BaseLaw
    ) -> Observed:
        """What readings say.

        Args:
            frame: coordinates of q.
            encoding: of the states.
            sensors: readings of U.
            scale: standard deviation of q here over that of its law.
            law: of q.
        """

    @abstractmethod
    def observe_training(
        self,
        frame: Frame,
        encoding: Encoding,
        x0: Tensor,
        z: Tensor,
        layouts: Tensor,
        key: draws.Key,
    ) -> TrainingObserved:
        """Read layouts off the truth.

        Args:
            frame: coordinates of q.
            encoding: of the states.
            x0: q of the batch, spectra (B, ...).
            z: (N, B, ...) base noise, conditioned in place.
            layouts: (B,) number of the layout of each sample, 0 = none.
            key: of the sensors' errors.
        """


class Kriged(Conditioning):
    """Kriging under the base law: exact for a Gaussian residual, at any positions."""

    channels = 2  # the kriged field, and its standard deviation over the prior's

    def __init__(self) -> None:
        self._kept: OrderedDict = OrderedDict()

    def clear(self) -> None:
        """Forget what was kept of another law."""
        self._kept.clear()

    def absent(self, frame: Frame, like: Tensor) -> Tensor:
        none = like.new_zeros(1, 2, frame.size, frame.size)
        none[:, 1] = 1.0
        return none

    def gain(
        self,
        frame: Frame,
        sensors: Sensors,
        log_amplitude: Tensor | None,
        law: BaseLaw,
        device: Any,
    ) -> Kriging:
        """Gain of a layout under a law (of q); kept when it is the same for every state."""
        key = (*sensors.key, str(device), law is frame.law)
        fixed = log_amplitude is None or sensors.noise_std == 0
        if fixed and key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        variance = torch.full(
            (len(sensors.positions),), sensors.noise_std**2, dtype=torch.float64, device=device
        )
        if log_amplitude is not None and not fixed:
            variance = variance * torch.exp(-2 * frame.at(log_amplitude, sensors.positions))
        out = Kriging(law, sensors.positions, variance)
        if fixed:
            self._kept[key] = out
            while len(self._kept) > KRIGING_CACHE:
                self._kept.popitem(last=False)
        return out

    def observe(self, frame, encoding, sensors, scale, law):
        innovation = frame.innovation(encoding, sensors, scale)
        scaled = replace(sensors, noise_std=sensors.noise_std / scale)
        device = encoding.mean_hat.device
        gain = self.gain(frame, scaled, encoding.log_amplitude, law, device)
        kriged = gain.field(innovation)
        return Observed(self._fields(frame, kriged, gain.std(frame.size)), gain, kriged)

    def _fields(self, frame: Frame, kriged: Tensor, std: Tensor) -> Tensor:
        field = frame.field(kriged) / math.sqrt(frame.law.variance)
        return torch.stack([field, std.expand_as(field)], dim=1).float()

    def observe_training(self, frame, encoding, x0, z, layouts, key):
        kriged = torch.zeros_like(x0)
        std = torch.ones(len(x0), frame.size, frame.size, dtype=torch.float64, device=x0.device)
        gains = []
        for number, rows in rows_of(layouts, x0.device):
            log = None if encoding.log_amplitude is None else encoding.log_amplitude[rows]
            rms = math.sqrt(frame.law.variance)
            sensors = training_layout(number, frame.band.length, rms)
            gain = self.gain(frame, sensors, log, frame.law, x0.device)
            error = gain.error.sqrt().expand(len(rows), -1)
            mine = key._replace(ids=[key.ids[i] for i in rows.tolist()])
            noise = draws.normals(*mine, (1 + len(z)) * error.shape[-1])
            first, *others = noise.to(error).chunk(1 + len(z), dim=-1)
            kriged[rows] = gain.field(gain.at_sensors(x0[rows]) + first * error)
            std[rows] = gain.std(frame.size)
            for one, other in zip(z, others):
                one[rows] = gain.remove(one[rows], other * error)
            gains.append((rows, gain))
        return TrainingObserved(self._fields(frame, kriged, std), kriged, gains)


class Learned(Conditioning):
    """Values and places of the sensors as fields: what they mean is for the network to learn.

    A regular layout is interpolated by its Fourier modes; the values of a scattered one are spread
    to the points by a normalised Gaussian of the sensors' mean distance. Beside them stand where
    sensors are, and how large their errors are.
    """

    channels = 3  # values, density of the sensors, standard deviation of their errors

    def absent(self, frame: Frame, like: Tensor) -> Tensor:
        return like.new_zeros(1, self.channels, frame.size, frame.size)

    def observe(self, frame, encoding, sensors, scale, law):
        innovation = frame.innovation(encoding, sensors, scale)
        return Observed(self._fields(frame, innovation, sensors, sensors.noise_std / scale))

    def _fields(
        self, frame: Frame, innovation: Tensor, sensors: Sensors, noise_std: float
    ) -> Tensor:
        """Channels (B, 3, g, g) of innovations (B, S)."""
        length, size = frame.band.length, frame.size
        rms = math.sqrt(frame.law.variance)
        near = splat(sensors.positions, size, length).to(innovation)
        density = near.sum(0)
        if regular_side(sensors.positions) and len(sensors.positions) <= size**2:
            values = fourier_interpolation(Sensors(innovation, sensors.positions), size)
        else:
            values = (innovation @ near / density.clamp(min=1e-12)).unflatten(-1, (size, size))
            seen = (density / density.max()).clamp(max=1.0).unflatten(-1, (size, size))
            values = values * seen
        shape = values.shape
        density = (density / density.mean()).unflatten(-1, (size, size)).expand(shape)
        error = torch.full_like(values, noise_std / rms)
        return torch.stack([values / rms, density, error], dim=1).float()

    def observe_training(self, frame, encoding, x0, z, layouts, key):
        fields = self.absent(frame, encoding.features).repeat(len(x0), 1, 1, 1)
        for number, rows in rows_of(layouts, x0.device):
            sensors = training_layout(number, frame.band.length, math.sqrt(frame.law.variance))
            values = frame.kept.at(x0[rows], frame.kept.phases(sensors.positions, x0.device))
            mine = key._replace(ids=[key.ids[i] for i in rows.tolist()])
            errors = draws.normals(*mine, values.shape[-1]).to(values) * sensors.noise_std
            fields[rows] = self._fields(frame, values + errors, sensors, sensors.noise_std)
        return TrainingObserved(fields, torch.zeros_like(x0), [])


def splat(positions: Tensor, size: int, length: float) -> Tensor:
    """Periodic Gaussians (S, n n), float64, at positions, of half the sensors' mean distance."""
    points = torch.arange(size, dtype=torch.float64) * (length / size)
    width = 0.5 * length / math.sqrt(len(positions))
    apart = (positions[:, :, None] - points + 0.5 * length) % length - 0.5 * length
    x, y = torch.exp(-0.5 * (apart / width).square()).unbind(1)
    return (x[:, :, None] * y[:, None, :]).flatten(1)


def rows_of(layouts: Tensor, device: torch.device) -> list[tuple[int, Tensor]]:
    """(layout, rows) of the layouts of a batch that have sensors."""
    numbers = sorted(set(layouts.tolist()) - {0})
    return [(number, torch.nonzero(layouts == number)[:, 0].to(device)) for number in numbers]
