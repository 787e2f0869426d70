r"""The networks of a closure model: Fourier neural operators with product paths, convolutions.

A block adds to its input

.. math:: W_o\,[\,\mathrm{gelu}(Kx + Wx + b)\cdot(1 + g)\,;\ (Px)\cdot(P'x)\,]

with K a spectral convolution. The product path makes quadratic laws such as
:math:`-u\cdot\nabla w` one block deep; b and g come from the conditions. Regimes are seen in few
numbers: of the flow, its modes |kx|, |ky| <= 2, alone and over its rms, and that; of a noisy
residual, the same modes, and how large it is in all. Small perceptrons make of these b and g of
every block, and the largest modes of the output, which come and go with a regime.
"""

import itertools
import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, pad

from hpc_closure.closure.band import LARGEST
from hpc_closure.closure.fno import Layered, Pointwise, SpectralConv2d
from hpc_closure.closure.shared import for_members

__all__ = ["Encoded", "FieldNetwork", "LocalNetwork", "ScoreNetwork"]

SUMMARY = 2 * LARGEST + 1  # of a state: those, the same over its rms, log rms
HARMONICS = 8  # of the noise level's angle
NOISY = 2 * HARMONICS + LARGEST + 2 + SUMMARY  # numbers of a noisy residual and its state
PLACES = 2  # condition channels that tell the place, of each dimension
LOW = 128  # hidden numbers of what answers for the largest modes


class FourierBlock(nn.Module):
    """One residual Fourier block.

    Args:
        width: channels.
        modes: kept modes.
        products: channels of the product path.
        form: form of the spectral convolution.
    """

    def __init__(self, width: int, modes: int, products: int, form: str = "auto"):
        super().__init__()
        self.products = products
        self.spectral = SpectralConv2d(width, width, modes, form=form, gain=0.7)
        self.local = Pointwise(width, width + 2 * products, gain=0.7)
        self.out = Pointwise(width + products, width, bias=False, gain=0.5)

    def forward(
        self, x: Tensor, shift: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        """(B, width, n, n); ``shift`` is added before the activation, ``1 + gate`` multiplies."""
        return self.both(x, shift, gate)[0]

    def both(
        self, x: Tensor, shift: Tensor | None = None, gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output, and the products (B, products, n, n) beside it."""
        # one split: a slice of its own would have a gradient of the whole's size, mostly zeros
        sizes = (x.shape[1], self.products, self.products)
        local, one, other = self.local(x).split(sizes, dim=1)
        hidden = self.spectral(x) + local
        hidden = gelu(hidden if shift is None else hidden + shift)
        if gate is not None:
            hidden = hidden + hidden * gate
        product = one * other
        return x + self.out(torch.cat([hidden, product], dim=1)), product


class Modulation(nn.Module):
    """Numbers (B, inputs) to one (shift, gate) per block, each (B, width, 1, 1)."""

    def __init__(self, inputs: int, width: int, layers: int):
        super().__init__()
        self.layers = layers
        self.net = nn.Sequential(
            nn.Linear(inputs, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, 2 * width * layers),
        )

    def forward(self, numbers: Tensor) -> list[tuple[Tensor, Tensor]]:
        maps = self.net(numbers)[..., None, None].chunk(2 * self.layers, dim=1)
        return list(zip(maps[::2], maps[1::2]))


def noisy_numbers(angle: Tensor, largest: Tensor, fields: Tensor, summary: Tensor) -> Tensor:
    """What a noisy residual's perceptrons read, (B, NOISY).

    Args:
        angle: (B,) or (1,) in [0, pi/2].
        largest: (B, 25) its largest modes, whitened.
        fields: (B, 2, n, n) of it: how large all scales are, the logarithm of the mean square.
        summary: (B or 1, 51) numbers of the state.
    """
    count = len(fields)
    order = torch.arange(1, HARMONICS + 1, device=angle.device, dtype=angle.dtype)
    phase = (angle[:, None] * order).expand(count, -1)
    power = fields.square().mean((-2, -1)).clamp(min=1e-12).log()
    return torch.cat([phase.sin(), phase.cos(), largest, power, summary.expand(count, -1)], dim=1)


def perceptron(inputs: int, outputs: int, hidden: int) -> nn.Sequential:
    """Two hidden layers; the last one starts at zero."""
    last = nn.Linear(hidden, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), last
    )


class FieldNetwork(Layered):
    """Conditions to one field: the whitened mean correction, or the log-amplitude.

    The last layer starts at zero: an untrained network changes nothing.
    """

    passes = ("forward",)

    def __init__(self, channels: int, width: int, modes: int, layers: int, form: str = "auto"):
        super().__init__()
        self.lift = Pointwise(channels, width)
        self.modulation = Modulation(SUMMARY, width, layers)
        self.blocks = nn.ModuleList(
            FourierBlock(width, modes, width // 2, form) for _ in range(layers)
        )
        self.head = Pointwise(width, 1)
        nn.init.zeros_(self.head.weight)

    def forward(self, conditions: Tensor, summary: Tensor) -> Tensor:
        """(B, C, n, n) fields and (B, 51) numbers to (B, n, n)."""
        x = self.lift(conditions)
        for block, (shift, gate) in zip(self.blocks, self.modulation(summary)):
            x = self.through(block, x, shift, gate)
        return self.head(x)[:, 0]


class Convolution(nn.Module):
    """3 x 3 convolution on a periodic square: (B, in, n, n) -> (B, out, n, n).

    On a line, a square of one row, it has 3 weights.
    """

    def __init__(self, in_channels: int, out_channels: int, dimensions: int = 2):
        super().__init__()
        size = (1, 3) if dimensions == 1 else (3, 3)
        scale = 1 / math.sqrt(math.prod(size) * in_channels)
        self.weight = nn.Parameter(scale * torch.randn(out_channels, in_channels, *size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.beyond = (1, 1, size[0] // 2, size[0] // 2)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(pad(x, self.beyond, mode="circular"), self.weight, self.bias)


def _activated(layer: nn.Module, x: Tensor) -> Tensor:
    return gelu(layer(x))


class LocalNetwork(Layered):
    """As :class:`FieldNetwork`, of what neighbours decide, the same at every place.

    Closures that a resolved scale or two decide need few weights for it, and few samples.

    Args:
        channels: of the conditions; the last of them, which tell the place, are not read.
        width: channels inside.
        layers: convolutions before the last one.
        dimensions: of the flow.
    """

    passes = ("forward",)

    def __init__(self, channels: int, width: int, layers: int, dimensions: int = 2):
        super().__init__()
        self.read = channels - PLACES * dimensions
        sizes = [self.read, *[width] * layers]
        self.layers = nn.ModuleList(
            Convolution(read, made, dimensions) for read, made in itertools.pairwise(sizes)
        )
        self.head = Convolution(width, 1, dimensions)
        nn.init.zeros_(self.head.weight)

    def forward(self, conditions: Tensor, summary: Tensor) -> Tensor:
        """(B, C, n, n) fields, and numbers that are not read, to (B, n, n)."""
        x = conditions[:, : self.read]
        for layer in self.layers:
            x = self.through(partial(_activated, layer), x)
        return self.head(x)[:, 0]


class Encoded(NamedTuple):
    """Conditions as the noisy branch sees them: per-point maps of each block, and numbers."""

    maps: list[tuple[Tensor, Tensor]]
    summary: Tensor

    def for_members(self, count: int) -> "Encoded":
        """Those of states for members that share them."""
        maps = [(for_members(s, count), for_members(g, count)) for s, g in self.maps]
        return Encoded(maps, for_members(self.summary, count))


class ScoreNetwork(Layered):
    """Velocity of the trigonometric flow in whitened units, F(x_t, angle, conditions).

    The conditions are encoded once (:meth:`encode`), for all noise levels and members.

    Args:
        channels: channels of the conditions.
        width: channels inside.
        modes: kept modes.
        layers: blocks of the noisy branch; the encoder has ``encoder_layers``.
    """

    passes = ("encoded_maps", "forward")

    def __init__(
        self,
        channels: int,
        width: int,
        modes: int,
        layers: int,
        encoder_layers: int = 2,
        form: str = "auto",
    ):
        super().__init__()
        self.width = width
        self.encode_lift = Pointwise(channels, width)
        self.encode_blocks = nn.ModuleList(
            FourierBlock(width, modes, width // 2, form) for _ in range(encoder_layers)
        )
        # every block of the noisy branch gets a shift and a gate, per point
        self.encode_head = Pointwise(width, 2 * width * layers, gain=0.3)
        self.modulation = Modulation(NOISY, width, layers)
        # what a regime does to all scales at once, and to the largest
        self.gain = perceptron(NOISY, 2, 2 * width)
        self.low = perceptron(NOISY, LARGEST, LOW)
        self.lift = Pointwise(2, width)
        self.blocks = nn.ModuleList(
            FourierBlock(width, modes, width // 2, form) for _ in range(layers)
        )
        self.head = Pointwise(width, 1)
        nn.init.zeros_(self.head.weight)

    def encode(self, conditions: Tensor, summary: Tensor) -> Encoded:
        """Encode fields (B, C, n, n) and numbers (B, 51)."""
        return Encoded(self.encoded_maps(conditions), summary)

    def encoded_maps(self, conditions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Shift and gate of every block of the noisy branch, (B, width, n, n) each."""
        x = self.encode_lift(conditions)
        for block in self.encode_blocks:
            x = self.through(block, x)
        maps = self.encode_head(x).chunk(2 * len(self.blocks), dim=1)
        return list(zip(maps[::2], maps[1::2]))

    def forward(
        self, x: Tensor, largest: Tensor, angle: Tensor, encoded: Encoded
    ) -> tuple[Tensor, Tensor]:
        """Velocity.

        Args:
            x: (B, 2, n, n): the noisy residual whitened, and in units of its standard deviation.
            largest: (B, 25) largest modes of x, whitened.
            angle: (B,) or (1,) in [0, pi/2].
            encoded: from :meth:`encode`, with batch B or 1.

        Returns:
            Velocity in whitened units: fields (B, n, n), and (B, 25) largest modes to be added.
        """
        numbers = noisy_numbers(angle, largest, x, encoded.summary)
        h = self.lift(x)
        for block, local, everywhere in zip(self.blocks, encoded.maps, self.modulation(numbers)):
            h = self.through(block, h, local[0] + everywhere[0], local[1] + everywhere[1])
        field = self.head(h)[:, 0] + (self.gain(numbers)[..., None, None] * x).sum(1)
        return field, self.low(numbers)


def num_parameters(module: nn.Module) -> int:
    """Real parameters; refuses complex ones, which DeepSpeed would silently corrupt."""
    for name, parameter in module.named_parameters():
        if parameter.is_complex():
            raise ValueError(f"parameter {name} is complex; store it as real (..., 2)")
    return sum(math.prod(p.shape) for p in module.parameters())
