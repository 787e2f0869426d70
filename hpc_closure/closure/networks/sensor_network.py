r"""Score network with learned use of sensors: state, sensors and noise in three stages.

1. *State*: Fourier blocks map the features to an estimate e of :math:`E[q|V]`.
2. *Sensors*: the inputs are the readings and the readings minus e, both interpolated to the grid,
   the coverage by sensors, and their noise. Further blocks map them to :math:`m = E[q|V, y]`.
   The readings minus m are added with a learned gain per shell. From the same fields, pooled over
   the grid, follows the spread c of q about m per group of |k|^2 (not per shell, because a shell
   mixes forced and unforced modes).
3. *Noise*: from a noisy q at angle t, blocks compute a correction of m. Regimes of the flow and of
   the noise show in their largest modes. Perceptrons of these modes therefore give a separate
   correction of the largest modes, and a gain of the noisy q.

Stages 1 and 2 are evaluated once per sample, for any number of members and noise levels.
Outputs are formed by weights per mode from the hidden fields and the blocks' products, so that a
shell with 1e-3 of the amplitude is as easy to represent as the others.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpc_closure.closure.fields.members import for_members
from hpc_closure.closure.fields.modes import Band
from hpc_closure.closure.gaussian.conditioning import GeneratorConditions, Reading
from hpc_closure.closure.gaussian.residual_coordinates import ResidualCoordinates
from hpc_closure.closure.networks.blocks import (
    LARGEST,
    LOW,
    NOISY,
    SUMMARY,
    Chain,
    FourierBlock,
    Modulation,
    noisy_numbers,
    perceptron,
)
from hpc_closure.closure.networks.layers import CheckpointedModule, Conv1x1
from hpc_closure.spectral.modes.grid import resize, to_device_cached

__all__ = ["Estimate", "PosteriorNetwork"]

FAST = 4.0  # factor on small heads: their weights learn that much faster than the others
CAP = 300.0  # largest gain from fields in units of q to whitened modes
SOFT = 5e-3  # amplitude in units of q below which whitening of a reading is damped
PLACES = 2  # channels: coverage by sensors, noise of the sensors
NUMBERS = 4  # of a layout: 1 if there are sensors, log number, noise, mean coverage
HIDDEN = 64  # hidden width of the heads that output numbers
SPREAD = (-3.5, 4.0, 2.8)  # log c is within the first +- the second; it starts near -0.7


@dataclass
class Estimate:
    """Result of stages 1 and 2, for B states.

    Attributes:
        mean: whitened spectra (B, ...) of m.
        log_spread: (B, groups of the residual band) log c, in whitened units.
        maps: (B, 2 width layers, g, g) shifts and gates of the blocks of stage 3.
    """

    mean: Tensor
    log_spread: Tensor
    maps: Tensor

    def for_members(self, count: int) -> "Estimate":
        """Repeat the rows of states for ``count`` members that share them."""
        every = self.mean, self.log_spread, self.maps
        return Estimate(*(for_members(one, count) for one in every))


class Blocks(CheckpointedModule):
    """Fourier blocks whose products are part of the output."""

    passes = ("forward",)

    def __init__(self, channels: int, width: int, modes: int, layers: int, form: str):
        super().__init__()
        self.lift = Conv1x1(channels, width)
        self.blocks = nn.ModuleList(
            FourierBlock(width, modes, width // 2, form) for _ in range(layers)
        )
        self.chain = Chain(self.lift, self.blocks)
        self.outputs = width + layers * (width // 2)

    def forward(self, x: Tensor, *maps: Tensor) -> tuple[Tensor, Tensor]:
        """Map fields (B, C, n, n) to hidden fields, and to these followed by all products."""
        return self.chain.with_products(self, x, *maps)


class ModeHead(nn.Module):
    """Linear map from hidden fields (B, C, n, n) to a whitened spectrum, with weights per mode.

    There are two sets of weights, for hidden fields that are white and for those in units of q.
    """

    def __init__(self, modes: int, channels: int):
        super().__init__()
        shape = (channels, 2 * modes + 1, modes + 1, 2)
        self.white = nn.Parameter(torch.zeros(shape))
        self.plain = nn.Parameter(torch.zeros(shape))

    def forward(self, hidden: Tensor, frame: ResidualCoordinates) -> Tensor:
        kept = frame.kept
        gain = (frame.law.modes("whiten", hidden) * math.sqrt(frame.law.variance)).clamp(max=CAP)
        # view_as_complex fails here: engines place weights at odd offsets of a long buffer
        white, plain = (
            resize(torch.complex(*one.unbind(-1)), kept.modes) for one in (self.white, self.plain)
        )
        weights = white * (kept.modes + 0.5) + plain * gain
        out = (kept.to_spectral(hidden) * weights).sum(1)
        return out * frame.law.modes("mask", hidden)


class PosteriorNetwork(nn.Module):
    """Posterior network; see the module's docstring.

    Args:
        channels: condition channels of the state.
        config: ``width``, ``modes``, ``layers``, ``form``.
        own: the model's band, an upper bound of the residual's band.
    """

    def __init__(self, channels: int, config: dict[str, Any], own: Band):
        super().__init__()
        width, modes, layers = config["width"], config["modes"], config["layers"]
        few, form = max(1, layers - 1), config["spectral_convolution"]
        self.modulate = Modulation(SUMMARY, width, layers)
        self.state = Blocks(channels + 1, width, modes, layers, form)
        self.state_head = ModeHead(own.modes, self.state.outputs)
        self.state_map = nn.Parameter(torch.zeros(2 * own.modes + 1, own.modes + 1, 2))
        self.sensors = Blocks(width + 2 + 4 + PLACES, width, modes, few, form)
        self.sensors_head = ModeHead(own.modes, self.sensors.outputs)
        self.group_k2 = own.group_k2
        self._groups: dict[Band, Tensor] = {}
        self.low_state = perceptron(SUMMARY, LARGEST, LOW)
        self.spread_head = perceptron(2 * width + NUMBERS, len(own.group_k2), HIDDEN)
        self.gain_head = perceptron(2 * width + NUMBERS, own.grid.num_shells, HIDDEN)
        self.maps = Conv1x1(width, 2 * width * few, gain=0.3)
        self.modulate_noisy = Modulation(NOISY, width, few)
        self.noisy = Blocks(2, width, min(modes, 8), few, form)
        self.noisy_head = ModeHead(own.modes, self.noisy.outputs)
        self.low_noisy = perceptron(NOISY + LARGEST, LARGEST + 1, LOW)

    def estimate(self, frame: ResidualCoordinates, given: GeneratorConditions) -> Estimate:
        """Evaluate stages 1 and 2 for B states.

        Args:
            frame: coordinates of q.
            given: conditions, with the whitened state and the readings.
        """
        kept, law, fields = frame.kept, frame.law, given.fields
        white_state, readings = given.white_state, given.readings
        assert white_state is not None
        rms = math.sqrt(law.variance)
        soft = law.modes("std", fields) / rms
        soft = soft / (soft.square() + SOFT**2) * law.modes("mask", fields)
        inputs = torch.cat([fields, _white_field(frame, white_state)[:, None]], dim=1)
        hidden, outputs = self.state(inputs, self.modulate(given.summary))
        weights = resize(torch.view_as_complex(self.state_map * FAST), kept.modes)
        mean = self.state_head(outputs, frame)
        low = kept.place_largest(self.low_state(given.summary))
        mean = mean + (white_state * weights + low) * law.modes("mask", fields)

        count = len(hidden)
        numbers = hidden.new_zeros(count, NUMBERS)
        places = hidden.new_zeros(count, PLACES, *hidden.shape[2:])
        for reading in readings:
            rows = reading.rows_of(count)
            numbers[rows] = reading.carrier.numbers
            places[rows] = reading.carrier.places
        read = carried(frame, readings, mean, False)
        beyond = carried(frame, readings, mean, True)
        both = torch.stack([read, beyond], dim=1)
        whitened = _white_field(frame, kept.to_spectral(both) * soft)
        own = torch.stack([_plain_field(frame, mean), _white_field(frame, mean)], dim=1)
        inputs = torch.cat([hidden, own, both, whitened, places], dim=1)
        hidden, outputs = self.sensors(inputs)
        mean = mean + self.sensors_head(outputs, frame)

        power = hidden.square().mean((-2, -1)).clamp(min=1e-12).sqrt()
        pooled = torch.cat([hidden.mean((-2, -1)), power, numbers], dim=1)
        # in training also without readings: all processes need gradients of the same weights
        if readings or torch.is_grad_enabled():
            gain = 0.5 + FAST * self.gain_head(pooled)
            left = kept.to_spectral(carried(frame, readings, mean, True)) * soft
            mean = mean + gain[:, to_device_cached(kept.grid.shell(), gain)] * left
        middle, reach, start = SPREAD
        spread = (
            FAST
            * self.spread_head(pooled.detach())[:, to_device_cached(self._groups_of(kept), pooled)]
        )
        log_spread = middle + reach * torch.tanh((spread + start) / reach)
        return Estimate(mean, log_spread, self.maps(hidden))

    def _groups_of(self, kept: Band) -> Tensor:
        """Return the index among the model's groups of each group of a residual band."""
        if kept not in self._groups:
            self._groups[kept] = torch.searchsorted(self.group_k2, kept.group_k2)
        return self._groups[kept]

    def posterior(
        self,
        frame: ResidualCoordinates,
        x: Tensor,
        angle: Tensor,
        given: GeneratorConditions,
        told: Estimate,
    ) -> Tensor:
        """Evaluate stage 3; returns whitened spectra (B, ...).

        The result is the mean of the Gaussian law whose denoiser equals the network's denoiser.

        Args:
            frame: coordinates of q.
            x: (B, ...) noisy q, whitened.
            angle: (B,) or (1,) in [0, pi/2].
            given: conditions of B or 1 states.
            told: result of stages 1 and 2 for B or 1 states.
        """
        inputs = torch.stack([_plain_field(frame, x), _white_field(frame, x)], dim=1)
        numbers = noisy_numbers(angle, frame.kept.largest(x).float(), inputs, given.summary)
        _, outputs = self.noisy(inputs, self.modulate_noisy(numbers), told.maps)
        known = frame.kept.largest(told.mean).float().expand(len(x), -1)
        largest = self.low_noisy(torch.cat([numbers, known], dim=1))
        low = frame.kept.place_largest(largest[:, :-1]) + largest[:, -1:, None] * x
        added = self.noisy_head(outputs, frame) + low * frame.law.modes("mask", inputs)
        return told.mean + angle.cos()[:, None, None] * added


def carried(
    frame: ResidualCoordinates, readings: list[Reading], mean: Tensor, beyond: bool
) -> Tensor:
    """Interpolate readings to fields (B, g, g), in units of q.

    Args:
        frame: coordinates of q.
        readings: readings of the sensors.
        mean: whitened spectra (B, ...).
        beyond: subtract the mean's values at the sensors first.
    """
    out = mean.real.new_zeros(len(mean), frame.size, frame.size)
    for reading in readings:
        rows = reading.rows_of(len(mean))
        values = reading.values.to(out).expand(len(rows), -1)
        if beyond:
            values = values - reading.carrier.read(_units_of_q(frame, mean[rows]))
        out = out.index_copy(0, rows, reading.carrier.spread(values))
    return out


def _units_of_q(frame: ResidualCoordinates, white: Tensor) -> Tensor:
    """Convert whitened spectra to spectra of q over its standard deviation."""
    return white * (frame.law.modes("std", white.real) / math.sqrt(frame.law.variance))


def _plain_field(frame: ResidualCoordinates, white: Tensor) -> Tensor:
    """Convert whitened spectra to fields in units of q."""
    return frame.field(_units_of_q(frame, white))


def _white_field(frame: ResidualCoordinates, white: Tensor) -> Tensor:
    """Convert whitened spectra to fields of unit variance."""
    return frame.field(white) / (2 * frame.kept.modes + 1)
