r"""Networks of a closure model: Fourier neural operators with product paths, and convolutions.

A block adds to its input

.. math:: W_o\,[\,\mathrm{gelu}(Kx + Wx + b)\cdot(1 + g)\,;\ (Px)\cdot(P'x)\,]

with K a spectral convolution. With the product path, a single block can represent quadratic laws
such as :math:`-u\cdot\nabla w`. The shift b and the gate g depend on the conditions.

Fields are written as those of a square, (B, C, n, n). On a line they are (B, C, n), on a cube
(B, C, n, n, n), and the numbers in parentheses are others, see :class:`Counts`.

Regimes show in a few numbers: the flow's modes |kx|, |ky| <= 2, these over its rms, and its log
rms; for a noisy residual, the same modes and its mean square. Small perceptrons map these numbers
to b and g of every block, and to the largest modes of the output, whose amplitude depends on the
regime.
"""

import functools
import itertools
import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv3d, gelu, pad

from hpc_closure.closure.fields.members import for_members
from hpc_closure.closure.fields.modes import LARGEST, largest_count
from hpc_closure.closure.networks import compiled
from hpc_closure.closure.networks.layers import CheckpointedModule, Conv1x1, SpectralConv
from hpc_closure.spectral.cpu.jit import compare

__all__ = ["Encoded", "FieldNetwork", "LocalNetwork", "LocalScoreNetwork", "ScoreNetwork"]

# numbers of a state, for each of its fields: largest modes, these over the rms, log rms
SUMMARY = 2 * LARGEST + 1  # on a square
HARMONICS = 8  # harmonics of the angle of the noise level
NUMBERS = LARGEST + 2 + SUMMARY  # numbers of a noisy residual and its state, for each field
NOISY = 2 * HARMONICS + NUMBERS  # with those of the noise level, for one field
PLACES = 2  # coordinate channels per dimension
LOW = 128  # hidden width of the perceptron for the largest modes
ENCODERS = 2  # blocks of the encoder of a score network


class Counts(NamedTuple):
    """Numbers that networks read, for each field of a state.

    Attributes:
        largest: largest modes, 25 on a square.
        summary: numbers of a state, 51 on a square.
        noisy: numbers of a noisy residual and its state.
    """

    largest: int
    summary: int
    noisy: int

    @classmethod
    def of(cls, dimensions: int) -> "Counts":
        """Return the counts of a flow in ``dimensions`` dimensions."""
        largest = largest_count(dimensions)
        return cls(largest, 2 * largest + 1, largest + 2 + 2 * largest + 1)


def at_points(numbers: Tensor, like: Tensor) -> Tensor:
    """Give numbers (B, C) an axis per side of fields ``like``, (B, C, 1, 1) on a square."""
    return numbers[(..., *[None] * (like.ndim - 2))]


class FourierBlock(nn.Module):
    """One residual Fourier block.

    Args:
        width: channels.
        modes: retained modes.
        products: channels of the product path.
        form: form of the spectral convolution.
        dimensions: dimensions of the flow.
    """

    def __init__(
        self, width: int, modes: int, products: int, form: str = "auto", dimensions: int = 2
    ):
        super().__init__()
        self.products = products
        self.spectral = SpectralConv(width, width, modes, form, 0.7, dimensions)
        self.local = Conv1x1(width, width + 2 * products, gain=0.7)
        self.out = Conv1x1(width + products, width, bias=False, gain=0.5)

    def forward(
        self, x: Tensor, shift: Tensor | None = None, gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the output (B, width, n, n) and the products (B, products, n, n).

        ``shift`` is added before the activation; ``1 + gate`` multiplies its result.
        """
        # a split instead of slices: the gradient of a slice is a mostly zero array of full size
        sizes = (x.shape[1], self.products, self.products)
        local, one, other = self.local(x).split(sizes, dim=1)
        hidden = self.spectral(x) + local
        hidden = gelu(hidden if shift is None else hidden + shift)
        if gate is not None:
            hidden = hidden + hidden * gate
        product = one * other
        return x + self.out(torch.cat([hidden, product], dim=1)), product


class Modulation(nn.Module):
    """Map numbers (B, inputs) to maps (B, 2 width layers, 1, 1) of a :class:`Chain`.

    On a line and on a cube the maps have an axis per side, too.
    """

    def __init__(self, inputs: int, width: int, layers: int, dimensions: int = 2):
        super().__init__()
        self.sides = dimensions
        self.net = nn.Sequential(
            nn.Linear(inputs, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, 2 * width * layers),
        )
        self.reader = Perceptrons(self.net)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.reader(numbers)[0][(..., *[None] * self.sides)]


class Chain:
    """Lift, Fourier blocks in sequence, and an optional head.

    Conditions enter as *maps* (B, 2 width layers, n, n): shift and gate of the first block, of the
    second, and so on. Maps of shape (B, 2 width layers, 1, 1) are the same at every point.

    Args:
        lift: map to the channels of the blocks.
        blocks: Fourier blocks of equal width.
        head: map from the hidden fields to the output; None = no head.
    """

    def __init__(self, lift: Conv1x1, blocks: nn.ModuleList, head: Conv1x1 | None = None):
        self.lift, self.blocks, self.head = lift, blocks, head
        self._packed = compiled.Packed(compiled.weights_of, lift, blocks, head)

    def __call__(self, network: CheckpointedModule, x: Tensor, *maps: Tensor) -> Tensor:
        """Compute the output (B, channels, n, n) of the head.

        Args:
            network: owner of the layers, which decides on checkpoints.
            x: (B, C, n, n).
            maps: maps, to be added.
        """
        assert self.head is not None
        if self._compiled_for(x):
            return compiled.chain(self._packed(), x, maps)
        return self.head(self._by_torch(network, x, maps)[0])

    def with_products(
        self, network: CheckpointedModule, x: Tensor, *maps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the hidden fields without a head, and these followed by all products.

        Returns (B, width, n, n) and (B, width + layers products, n, n).
        """
        if self._compiled_for(x):
            outputs = compiled.chain(self._packed(), x, maps)
            return outputs[:, : len(self.lift.weight)], outputs
        x, products = self._by_torch(network, x, maps)
        return x, torch.cat([x, *products], dim=1)

    def _compiled_for(self, x: Tensor) -> bool:
        block = self.blocks[0]
        assert isinstance(block, FourierBlock)
        size = x.shape[-1]
        if x.ndim != 4 or x.shape[-2] != size:  # compiled for squares only
            return False
        few = size <= compiled.LARGEST_SIDE and block.spectral.by_matrices(size)
        return few and self._packed.whole() and _compiled_and_right(x)

    def _by_torch(
        self, network: CheckpointedModule, x: Tensor, maps: tuple[Tensor, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute hidden fields and the blocks' products by torch operations."""
        x, all_products = self.lift(x), []
        every = [one.chunk(2 * len(self.blocks), dim=1) for one in maps]
        for number, block in enumerate(self.blocks):
            shift, gate = (
                functools.reduce(torch.add, parts) if parts else None
                for parts in ([one[2 * number + i] for one in every] for i in (0, 1))
            )
            x, product = network.through(block, x, shift, gate)
            all_products.append(product)
        return x, all_products


def noisy_numbers(angle: Tensor, largest: Tensor, fields: Tensor, summary: Tensor) -> Tensor:
    """Assemble the perceptrons' input for a noisy residual, (B, NOISY).

    Args:
        angle: (B,) or (1,) in [0, pi/2], noise level.
        largest: (B, 25) largest modes of the noisy residual, whitened.
        fields: (B, 2, n, n) the noisy residual, whitened and plain; the logarithm of each mean
            square enters.
        summary: (B or 1, 51) numbers of the state.
    """
    if _compiled_and_right(fields):
        return compiled.noisy_numbers(angle, largest, fields, summary, HARMONICS)
    count = len(fields)
    order = torch.arange(1, HARMONICS + 1, device=angle.device, dtype=angle.dtype)
    phase = (angle[:, None] * order).expand(count, -1)
    power = fields.square().mean(tuple(range(2, fields.ndim))).clamp(min=1e-12).log()
    return torch.cat([phase.sin(), phase.cos(), largest, power, summary.expand(count, -1)], dim=1)


class Perceptrons:
    """Perceptrons of two hidden layers with the same input, (B, inputs) -> [(B, outputs), ...]."""

    def __init__(self, *nets: nn.Sequential):
        self.nets = nets
        self._packed = compiled.Packed(compiled.perceptron_weights, *nets)

    def __call__(self, numbers: Tensor) -> list[Tensor]:
        if self._packed.whole() and _compiled_and_right(numbers):
            return compiled.perceptrons(self._packed(), numbers)
        return [net(numbers) for net in self.nets]


def perceptron(inputs: int, outputs: int, hidden: int) -> nn.Sequential:
    """Build a perceptron with two hidden layers, whose output layer starts at zero."""
    last = nn.Linear(hidden, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), last
    )


class FieldNetwork(CheckpointedModule):
    """Network from conditions to a field: the whitened mean correction, or the log-amplitude.

    The last layer starts at zero, so an untrained network has no effect. A network of ``fields``
    C > 1 maps to (B, C, n, n).
    """

    passes = ("forward",)

    def __init__(
        self,
        channels: int,
        width: int,
        modes: int,
        layers: int,
        form: str = "auto",
        fields: int = 1,
        dimensions: int = 2,
    ):
        super().__init__()
        self.fields = fields
        numbers = Counts.of(dimensions).summary * fields
        self.lift = Conv1x1(channels, width)
        self.modulation = Modulation(numbers, width, layers, dimensions)
        self.blocks = nn.ModuleList(
            FourierBlock(width, modes, width // 2, form, dimensions) for _ in range(layers)
        )
        self.head = Conv1x1(width, fields)
        nn.init.zeros_(self.head.weight)
        self.chain = Chain(self.lift, self.blocks, self.head)

    def forward(self, conditions: Tensor, summary: Tensor) -> Tensor:
        """Map condition fields (B, ..., n, n) and numbers (B, 51) to a field (B, n, n)."""
        out = self.chain(self, conditions, self.modulation(summary))
        return out if self.fields > 1 else out[:, 0]


class Convolution(nn.Module):
    """3 x 3 convolution on a periodic square: (B, in, n, n) -> (B, out, n, n).

    On a line (B, in, n) the kernel has 3 points, on a cube (B, in, n, n, n) 3 x 3 x 3. The weights
    of a line are stored as those of a square of one row, (out, in, 1, 3).
    """

    def __init__(self, in_channels: int, out_channels: int, dimensions: int = 2):
        super().__init__()
        size = (1, 3) if dimensions == 1 else (3,) * dimensions
        scale = 1 / math.sqrt(math.prod(size) * in_channels)
        self.weight = nn.Parameter(scale * torch.randn(out_channels, in_channels, *size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.beyond = [each // 2 for each in reversed(size) for _ in range(2)]

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:  # a line as a row
            return self(x.unsqueeze(-2)).squeeze(-2)
        convolve = conv2d if x.ndim == 4 else conv3d
        return convolve(pad(x, self.beyond, mode="circular"), self.weight, self.bias)


def _activated(layer: nn.Module, x: Tensor) -> Tensor:
    return gelu(layer(x))


class LocalNetwork(CheckpointedModule):
    """Network as :class:`FieldNetwork`, but local and translation-invariant.

    If the closure depends on neighbouring points only, it needs few weights and few samples.

    Args:
        channels: channels of the conditions; the last ones, the coordinates, are not read.
        width: hidden channels.
        layers: convolutions before the last one.
        dimensions: dimensions of the flow.
        fields: number C of output fields; for C > 1 the output is (B, C, n, n).
    """

    passes = ("forward",)

    def __init__(
        self, channels: int, width: int, layers: int, dimensions: int = 2, fields: int = 1
    ):
        super().__init__()
        self.fields = fields
        self.read = channels - PLACES * dimensions
        sizes = [self.read, *[width] * layers]
        self.layers = nn.ModuleList(
            Convolution(read, made, dimensions) for read, made in itertools.pairwise(sizes)
        )
        self.head = Convolution(width, fields, dimensions)
        nn.init.zeros_(self.head.weight)

    def forward(self, conditions: Tensor, summary: Tensor) -> Tensor:
        """Map fields (B, C, n, n) to a field (B, n, n); ``summary`` is not used."""
        x = conditions[:, : self.read]
        for layer in self.layers:
            x = self.through(functools.partial(_activated, layer), x)
        out = self.head(x)
        return out if self.fields > 1 else out[:, 0]


class Encoded(NamedTuple):
    """Encoded conditions of the noisy branch.

    Attributes:
        maps: (B, 2 width layers, n, n) shifts and gates of its blocks.
        summary: (B, 51) numbers of the state.
    """

    maps: Tensor
    summary: Tensor

    def for_members(self, count: int) -> "Encoded":
        """Repeat the rows of states for ``count`` members that share them."""
        return Encoded(for_members(self.maps, count), for_members(self.summary, count))


class ScoreNetwork(CheckpointedModule):
    """Network for the velocity of the trigonometric flow, F(x_t, angle, conditions), whitened.

    Conditions are encoded once (:meth:`encode`) for all noise levels and members.

    Args:
        channels: channels of the conditions.
        width: hidden channels.
        modes: retained modes.
        layers: blocks of the noisy branch.
        form: form of the spectral convolutions.
        fields: number C of fields of the residual.
        dimensions: dimensions of the flow.
    """

    passes = ("encoded_maps", "forward")

    def __init__(
        self,
        channels: int,
        width: int,
        modes: int,
        layers: int,
        form: str = "auto",
        fields: int = 1,
        dimensions: int = 2,
    ):
        super().__init__()
        self.width, self.fields = width, fields
        counts = Counts.of(dimensions)
        numbers = 2 * HARMONICS + counts.noisy * fields
        self.encode_lift = Conv1x1(channels, width)
        self.encode_blocks = nn.ModuleList(
            FourierBlock(width, modes, width // 2, form, dimensions) for _ in range(ENCODERS)
        )
        # a shift and a gate per point for every block of the noisy branch
        self.encode_head = Conv1x1(width, 2 * width * layers, gain=0.3)
        self.modulation = Modulation(numbers, width, layers, dimensions)
        # the effect of a regime on all scales together, and on the largest modes
        self.gain = perceptron(numbers, 2 * fields, 2 * width)
        self.low = perceptron(numbers, counts.largest * fields, LOW)
        self.lift = Conv1x1(2 * fields, width)
        self.blocks = nn.ModuleList(
            FourierBlock(width, modes, width // 2, form, dimensions) for _ in range(layers)
        )
        self.head = Conv1x1(width, fields)
        nn.init.zeros_(self.head.weight)
        self.encoder = Chain(self.encode_lift, self.encode_blocks, self.encode_head)
        self.chain = Chain(self.lift, self.blocks, self.head)
        self.readers = Perceptrons(self.modulation.net, self.gain, self.low)

    def encode(self, conditions: Tensor, summary: Tensor) -> Encoded:
        """Encode condition fields (B, C, n, n) and numbers (B, 51)."""
        return Encoded(self.encoded_maps(conditions), summary)

    def encoded_maps(self, conditions: Tensor) -> Tensor:
        """Compute the maps (B, 2 width layers, n, n) of the noisy branch's blocks."""
        return self.encoder(self, conditions)

    def forward(
        self, x: Tensor, largest: Tensor, angle: Tensor, encoded: Encoded
    ) -> tuple[Tensor, Tensor]:
        """Compute the velocity in whitened units.

        Args:
            x: (B, 2, n, n), the noisy residual whitened, and in units of its standard deviation;
                of C fields (B, 2 C, n, n), first all of them whitened.
            largest: (B, 25) largest modes of x, whitened; (B, 25 C).
            angle: (B,) or (1,) in [0, pi/2].
            encoded: encoded conditions, with batch B or 1.

        Returns:
            Fields (B, n, n) or (B, C, n, n), and (B, 25) or (B, 25 C) largest modes to be added.
        """
        numbers = noisy_numbers(angle, largest, x, encoded.summary)
        maps, gain, low = self.readers(numbers)
        out = self.chain(self, x, encoded.maps, at_points(maps, x))
        scaled = at_points(gain, x) * x
        if self.fields > 1:
            return out + scaled.unflatten(1, (2, -1)).sum(1), low
        return out[:, 0] + scaled.sum(1), low


class LocalScoreNetwork(CheckpointedModule):
    """Network as :class:`ScoreNetwork`, but local and translation-invariant: 3 x 3 convolutions.

    It reads no coordinates and no numbers of the state. If the law of a point depends on the
    neighbourhood alone, it needs far fewer samples than Fourier blocks.

    Args:
        channels: channels of the conditions; the coordinates are not read.
        places: indices of the channels that are coordinates.
        width: hidden channels.
        layers: convolutions of the noisy branch and of the encoder.
        fields: number C of fields of the residual.
        dimensions: dimensions of the flow.
    """

    passes = ("encoded_maps", "forward")

    def __init__(
        self,
        channels: int,
        places: range,
        width: int,
        layers: int,
        fields: int = 1,
        dimensions: int = 2,
    ):
        super().__init__()
        self.width, self.fields = width, fields
        self.largest = Counts.of(dimensions).largest * fields
        self.read = [number for number in range(channels) if number not in places]
        sizes = [len(self.read), *[width] * layers]
        self.encoder = nn.ModuleList(
            Convolution(read, made, dimensions) for read, made in itertools.pairwise(sizes)
        )
        # a shift and a gate per point for every convolution of the noisy branch
        self.encode_head = Conv1x1(width, 2 * width * layers, gain=0.3)
        numbers = 2 * HARMONICS + 2 * fields
        self.modulation = Modulation(numbers, width, layers, dimensions)
        self.gain = perceptron(numbers, 2 * fields, 2 * width)
        self.lift = Conv1x1(2 * fields, width)
        self.layers = nn.ModuleList(Convolution(width, width, dimensions) for _ in range(layers))
        self.mix = nn.ModuleList(Conv1x1(width, width, gain=0.5) for _ in range(layers))
        self.head = Convolution(width, fields, dimensions)
        nn.init.zeros_(self.head.weight)

    def encode(self, conditions: Tensor, summary: Tensor) -> Encoded:
        """Encode condition fields (B, C, n, n); the numbers (B, 51) are not read."""
        return Encoded(self.encoded_maps(conditions), summary)

    def encoded_maps(self, conditions: Tensor) -> Tensor:
        """Compute the maps (B, 2 width layers, n, n) of the noisy branch."""
        x = conditions[:, self.read]
        for layer in self.encoder:
            x = self.through(functools.partial(_activated, layer), x)
        return self.encode_head(x)

    def forward(
        self, x: Tensor, largest: Tensor, angle: Tensor, encoded: Encoded
    ) -> tuple[Tensor, Tensor]:
        """Compute the velocity in whitened units; arguments as of :class:`ScoreNetwork`."""
        order = torch.arange(1, HARMONICS + 1, device=angle.device, dtype=angle.dtype)
        phase = (angle[:, None] * order).expand(len(x), -1)
        power = x.square().mean(tuple(range(2, x.ndim))).clamp(min=1e-12).log()
        numbers = torch.cat([phase.sin(), phase.cos(), power], dim=1)
        maps = encoded.maps + self.modulation(numbers)
        steps = maps.chunk(2 * len(self.layers), dim=1)
        hidden = self.lift(x)
        for number, (layer, mix) in enumerate(zip(self.layers, self.mix)):
            shift, gate = steps[2 * number : 2 * number + 2]
            made = gelu(self.through(layer, hidden) + shift)
            hidden = hidden + mix(made + made * gate)
        scaled = at_points(self.gain(numbers), x) * x
        out = self.head(hidden) + scaled.unflatten(1, (2, -1)).sum(1)
        low = largest.new_zeros(len(x), self.largest)
        return (out if self.fields > 1 else out[:, 0]), low


def _compiled_and_right(x: Tensor) -> bool:
    """Return whether compiled functions are used for ``x``; compares them with torch first."""
    if not compiled.usable(x):
        return False
    with _comparing:
        _compare()
    return True


_comparing = threading.Lock()


@functools.cache
def _compare() -> None:
    """Compare compiled functions with torch in double precision on small test networks.

    Runs once per process.

    Raises:
        RuntimeError: the results differ.
    """
    width, modes, layers, size = 5, 2, 2, 6
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(0)
        blocks = nn.ModuleList(FourierBlock(width, modes, 3) for _ in range(layers)).float()
        lift, head = Conv1x1(2, width).float(), Conv1x1(width, 2).float()
        nets = [Modulation(4, width, last).net.float() for last in (1, 2)]
        maps = 2 * width * layers
        shapes = [(2, 2, size, size), (1, maps, size, size), (2, maps, 1, 1), (2, 4), (2, LARGEST)]
        x, local, everywhere, read, largest = (torch.randn(one).float() for one in shapes)
        noisy = torch.full((1,), 0.7, dtype=torch.float32), largest, x, read[:1]
        found = [
            compiled.chain(compiled.weights_of(lift, blocks, head), x, (local, everywhere)),
            *compiled.perceptrons(compiled.perceptron_weights(*nets), read),
            compiled.noisy_numbers(*noisy, HARMONICS),
        ]
        whole = Chain(lift.double(), blocks.double(), head.double())
        expected = [
            whole(CheckpointedModule(), x.double(), local.double(), everywhere.double()),
            *(net.double()(read.double()) for net in nets),
            noisy_numbers(*(one.double() for one in noisy)),
        ]
    for one, other in zip(found, expected, strict=True):
        compare(one, other, 1e-5, "networks", __file__)
