r"""Fourier blocks compiled for the CPU, for sampling without gradients.

In torch a block is about thirty operations on fields that fit into the first caches, and copies
between matrix products take as long as the products. Here a lift, all blocks and a head are one
compiled call, sample by sample. The arithmetic of a sample does not depend on other samples, so
results are equal bit for bit for any batch size and number of threads. The spectral convolution is
that of the matrix form (:mod:`.layers`) and uses the symmetry of real fields, in rows r of real
numbers:

.. math:: A_r = \sum_x (\cos, -\sin)(k_x x)\,f(x), \qquad
          G = \sum_y (\cos, \sin)(k_y y)\,A, \quad 0 \le k_x \le M,\ 0 \le k_y < M,

from which :math:`\hat f(\pm k_x, k_y)` follow as sums and differences. The inverse is analogous.
All products run along long rows, so that the compiler vectorises them.
"""

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hpc_closure.spectral.cpu import jit
from hpc_closure.spectral.cpu.jit import Switch

LARGEST_SIDE = 64  # points per side up to which this is faster than torch
TILE = 512  # columns of a product at a time; five rows of them fit into the L1 cache
# erf(x) = x P(x^2) / Q(x^2) for |x| <= 3.9, fitted to 1.5e-8; beyond, |erf| is 1 to within 4e-8
EDGE = np.float32(3.9)
P0, P1, P2, P3, P4, P5 = np.array(
    [1.12837903, 0.191940581, 0.0529668612, 0.00383685617, 2.87456484e-4, 2.05038707e-6], "f4"
)
Q1, Q2, Q3, Q4, Q5 = np.array(
    [0.50343469, 0.114758023, 0.0151091667, 0.00118172888, 3.82306979e-5], "f4"
)
ROOT, HALF, ONE = np.array([0.5**0.5, 0.5, 1.0], "f4")

FAST = {"contract", "nsz"}  # allows fused multiply-add, which the solver does not use
_quick = functools.partial(jit.jit, fastmath=FAST)


@_quick
def _add_product(a, b, out):
    """Compute ``out += a @ b`` with long rows of ``out`` and ``b``."""
    rows, inner = a.shape
    whole = inner // 4 * 4
    for start in range(0, b.shape[1], TILE):
        stop = min(start + TILE, b.shape[1])
        for i in range(rows):
            into = out[i, start:stop]
            for k in range(0, whole, 4):
                a0, a1, a2, a3 = a[i, k], a[i, k + 1], a[i, k + 2], a[i, k + 3]
                b0, b1 = b[k, start:stop], b[k + 1, start:stop]
                b2, b3 = b[k + 2, start:stop], b[k + 3, start:stop]
                for p in range(stop - start):
                    into[p] += a0 * b0[p] + a1 * b1[p] + a2 * b2[p] + a3 * b3[p]
            for k in range(whole, inner):
                a0, b0 = a[i, k], b[k, start:stop]
                for p in range(stop - start):
                    into[p] += a0 * b0[p]


@_quick
def _mix(sums, weights, out, mixed):
    """Multiply the channels of every retained mode by its weights; rows as in the docstring above.

    Args:
        sums: (2 M, 2 (M + 1), C): cos and sin of ky; real and imaginary parts of kx >= 0.
        weights: (2M, M, C, 2 C), real parts, then imaginary parts.
        out: as ``sums``, coefficients of the same functions in the result.
        mixed: (2, C), work array.
    """
    modes, channels = weights.shape[1], weights.shape[2]
    out[:] = 0
    real, imag = mixed[0], mixed[1]
    for row in range(2 * modes):
        kx, sign = (row, ONE) if row < modes else (2 * modes - row, -ONE)
        ix = modes + 1 + kx
        for ky in range(modes):
            real[:] = 0
            imag[:] = 0
            cos_re, cos_im = sums[ky, kx], sums[ky, ix]
            sin_re, sin_im = sums[modes + ky, kx], sums[modes + ky, ix]
            for i in range(channels):
                a = cos_re[i] + sign * sin_im[i]
                b = sign * cos_im[i] - sin_re[i]
                re, im = weights[row, ky, i, :channels], weights[row, ky, i, channels:]
                for o in range(channels):
                    real[o] += a * re[o] - b * im[o]
                    imag[o] += a * im[o] + b * re[o]
            cos_re, cos_im = out[ky, kx], out[ky, ix]
            sin_re, sin_im = out[modes + ky, kx], out[modes + ky, ix]
            for o in range(channels):
                cos_re[o] += real[o]
                sin_re[o] -= imag[o]
                cos_im[o] += sign * imag[o]
                sin_im[o] += sign * real[o]


@_quick
def _convolve(x, weights, tables, work, out):
    """Compute the spectral convolution of a sample.

    Args:
        x: (C, n, n).
        weights: see :func:`_mix`.
        tables: from :func:`_tables`.
        work: work arrays from :class:`_Work`.
        out: (n, C n), result; axes x and (channel, y).
    """
    from_x, from_y, to_y, to_x = tables
    lines, along_x, turned, sums, mixed = work
    channels, size, _ = x.shape
    rows = len(along_x)
    for c in range(channels):
        for i in range(size):
            lines[i, c * size : (c + 1) * size] = x[c, i]
    along_x[:] = 0
    _add_product(from_x, lines, along_x)
    for r in range(rows):
        for j in range(size):
            for c in range(channels):
                turned[j, r * channels + c] = along_x[r, c * size + j]
    sums[:] = 0
    _add_product(from_y, turned, sums[0])
    shape = len(from_y), rows, channels
    _mix(sums[0].reshape(shape), weights, sums[1].reshape(shape), mixed)
    turned[:] = 0
    _add_product(to_y, sums[1], turned)
    for r in range(rows):
        for c in range(channels):
            for j in range(size):
                along_x[r, c * size + j] = turned[j, r * channels + c]
    out[:] = 0
    _add_product(to_x, along_x, out)


@_quick
def _gelu(value):
    x = ROOT * value
    t = min(max(x, -EDGE), EDGE)
    s = t * t
    above = ((((P5 * s + P4) * s + P3) * s + P2) * s + P1) * s + P0
    below = ((((Q5 * s + Q4) * s + Q3) * s + Q2) * s + Q1) * s + ONE
    error = t * above / below
    error = -ONE if x < -EDGE else error  # a rest of 4e-8 would matter at large |value|
    return HALF * value * (ONE + error)


@_quick
def _activate(spectral, local, channel, maps, hidden):
    """Compute ``gelu(spectral + local + shift) (1 + gate)`` of a channel.

    Args:
        spectral: (n, C n); axes x and (channel, y).
        local: (n n,) of the channel.
        channel: number of the channel.
        maps: shift and gate of the channel, (n n or 0,) each, and a number added to each of them.
        hidden: (n n,), result.
    """
    size, points = len(spectral), len(hidden)
    shift, gate, shift_everywhere, gate_everywhere = maps
    for i in range(size):
        for j in range(size):
            hidden[i * size + j] = spectral[i, channel * size + j] + local[i * size + j]
    if len(shift):
        for p in range(points):
            hidden[p] += shift[p]
    for p in range(points):
        hidden[p] = _gelu(hidden[p] + shift_everywhere)
    factor = ONE + gate_everywhere
    if len(gate):
        for p in range(points):
            hidden[p] *= factor + gate[p]
    else:
        for p in range(points):
            hidden[p] *= factor


def _fourier_chain(x, maps, everywhere, weights, tables, work, out):
    """Evaluate lift, blocks and head of samples, one after another.

    Args:
        x: (B, C, n n).
        maps: (B or 1, 2 width layers or 0, n n), shifts and gates per point.
        everywhere: (B or 1, 2 width layers), shifts and gates that are equal at every point.
        weights: see :class:`Weights`.
        tables: from :func:`_tables`.
        work: work arrays from :class:`_Work`.
        out: result (B, heads, n n); without a head (B, width + layers P, n n), hidden fields and
            the products of all layers.
    """
    lift, lift_bias, convolutions, local_weights, biases, out_weights, head, head_bias = weights
    convolution, spectral, local, hidden, field = work
    layers, width = len(convolutions), len(lift)
    count, empty = hidden.shape[0] - width, hidden[0, :0]
    size = len(spectral)
    for b in range(len(x)):
        local_maps, uniform_maps = (
            maps[min(b, len(maps) - 1)],
            everywhere[min(b, len(everywhere) - 1)],
        )
        for c in range(width):
            field[c] = lift_bias[c]
        _add_product(lift, x[b], field)
        for layer in range(layers):
            for o in range(width + 2 * count):
                local[o] = biases[layer, o]
            _add_product(local_weights[layer], field, local)
            square = field.reshape(width, size, size)
            _convolve(square, convolutions[layer], tables, convolution, spectral)
            for c in range(width):
                s, g = 2 * layer * width + c, (2 * layer + 1) * width + c
                shift, gate = (local_maps[s], local_maps[g]) if len(local_maps) else (empty, empty)
                every = shift, gate, uniform_maps[s], uniform_maps[g]
                _activate(spectral, local[c], c, every, hidden[c])
            for c in range(count):
                one, other = local[width + c], local[width + count + c]
                for p in range(len(one)):
                    hidden[width + c, p] = one[p] * other[p]
            _add_product(out_weights[layer], hidden, field)
            if not len(head):
                first = width + layer * count
                out[b, first : first + count] = hidden[width:]
        if len(head):
            for c in range(len(head)):
                out[b, c] = head_bias[c]
            _add_product(head, field, out[b])
        else:
            out[b, :width] = field


def _perceptrons(numbers, weights, places, work, out):
    """Evaluate perceptrons of two hidden layers with the same input.

    Args:
        numbers: (B, inputs).
        weights: weights, then biases, of each layer of each perceptron, in one vector.
        places: (perceptrons, 4) sizes of input, hidden layers and output.
        work: (2, largest hidden layer), work array.
        out: (B, sum of output sizes), result.
    """
    for b in range(len(numbers)):
        first, done = 0, 0
        for net in range(len(places)):
            for layer in range(3):
                inputs, outputs = places[net, layer], places[net, layer + 1]
                layer_in = work[layer % 2, :inputs] if layer else numbers[b]
                layer_out = (
                    work[1 - layer % 2, :outputs] if layer < 2 else out[b, done : done + outputs]
                )
                bias_first = first + inputs * outputs
                layer_out[:] = weights[bias_first : bias_first + outputs]
                matrix = weights[first:bias_first].reshape(inputs, outputs)
                _add_product(layer_in.reshape(1, inputs), matrix, layer_out.reshape(1, outputs))
                if layer < 2:
                    for i in range(outputs):
                        layer_out[i] = _gelu(layer_out[i])
                first = bias_first + outputs
            done += outputs


def _noisy_numbers(angle, largest, fields, summary, harmonics, out):
    """Compute :func:`~.blocks.noisy_numbers`, with fields (B, 2, n n)."""
    count, known = largest.shape[1], summary.shape[1]
    for b in range(len(fields)):
        phase, row = angle[min(b, len(angle) - 1)], out[b]
        for h in range(harmonics):
            row[h] = np.sin(np.float32(h + 1) * phase)
            row[harmonics + h] = np.cos(np.float32(h + 1) * phase)
        first = 2 * harmonics
        row[first : first + count] = largest[b]
        first += count
        for f in range(fields.shape[1]):
            field, power = fields[b, f], 0.0
            for p in range(len(field)):
                power += field[p] * field[p]
            row[first + f] = np.log(max(power / len(field), 1e-12))
        first += fields.shape[1]
        row[first : first + known] = summary[min(b, len(summary) - 1)]


_programs: dict[Callable, Any] = {}


def _run(template: Callable, *arguments: Any) -> None:
    """Call the compiled form of a function; the first call, in the comparison, compiles it."""
    if template in _programs:
        _programs[template](*arguments)
        return
    program = jit.cached(template, fastmath=FAST)
    jit.load(program, *arguments)
    _programs[template] = program


@functools.lru_cache(maxsize=32)
def _tables(size: int, modes: int) -> tuple[np.ndarray, ...]:
    """Compute the matrices from x to kx, y to ky, ky to y, kx to x; rows as in the docstring."""
    points = np.arange(size) * (2 * np.pi / size)
    x = np.outer(np.arange(modes + 1), points)
    y = np.outer(np.arange(modes), points)
    from_x = np.concatenate([np.cos(x), -np.sin(x)])
    from_y = np.concatenate([np.cos(y), np.sin(y)])
    twice = np.tile(np.where(np.arange(modes) > 0, 2.0, 1.0), 2)[:, None]
    every = from_x, from_y / size**2, (twice * from_y).T, from_x.T
    return tuple(np.ascontiguousarray(one, np.float32) for one in every)


class _Work(threading.local):
    """Work arrays of a thread, by sizes of the chain."""

    def __init__(self):
        self.kept: dict[tuple, tuple] = {}

    def of(self, width: int, count: int, size: int, modes: int) -> tuple:
        key = width, count, size, modes
        if key not in self.kept:
            if len(self.kept) >= KEPT:
                self.kept.clear()
            rows, columns, points = 2 * (modes + 1), width * size, size * size

            def empty(*shape: int) -> np.ndarray:
                return np.empty(shape, np.float32)

            convolution = (
                empty(size, columns),
                empty(rows, columns),
                empty(size, rows * width),
                empty(2, 2 * modes, rows * width),
                empty(2, width),
            )
            fields = [empty(channels, points) for channels in (width + 2 * count, width + count)]
            self.kept[key] = convolution, empty(size, columns), *fields, empty(width, points)
        return self.kept[key]


KEPT = 8  # sizes of chains whose work arrays a thread caches
_work = _Work()


class Weights(NamedTuple):
    """Weights in the layout that :func:`_fourier_chain` reads.

    Attributes:
        lift: (width, C).
        lift_bias: (width,).
        convolutions: (layers, 2M, M, width, 2 width), real and imaginary parts.
        local: (layers, width + 2 P, width).
        biases: (layers, width + 2 P).
        out: (layers, width, width + P).
        head: (heads, width); (0, width) without a head.
        head_bias: (heads,).
    """

    lift: np.ndarray
    lift_bias: np.ndarray
    convolutions: np.ndarray
    local: np.ndarray
    biases: np.ndarray
    out: np.ndarray
    head: np.ndarray
    head_bias: np.ndarray


def weights_of(lift: Any, blocks: Any, head: Any) -> Weights:
    """Copy the weights of a lift, Fourier blocks and a head (or None)."""

    def stacked(parts: list[Tensor]) -> np.ndarray:
        return torch.stack(parts).contiguous().numpy()

    weight, bias = (lift.weight[:0], lift.bias[:0])
    if head is not None:
        weight, bias = head.weight, head.bias
    return Weights(
        stacked([lift.weight])[0],
        stacked([lift.bias])[0],
        stacked([torch.cat(one.spectral.weight.unbind(-1), dim=-1) for one in blocks]),
        stacked([one.local.weight for one in blocks]),
        stacked([one.local.bias for one in blocks]),
        stacked([one.out.weight for one in blocks]),
        weight.reshape(-1, len(lift.weight)).clone().numpy(),
        bias.clone().numpy(),
    )


class Packed:
    """Cache of a function of the weights of some modules, valid until a weight changes.

    It caches in eval mode only, because in training an engine may change weights without a change
    of their version number.

    Args:
        make: function of the modules.
        modules: modules, or None.
    """

    def __init__(self, make: Callable[..., Any], *modules: nn.Module | None):
        self._make, self._modules = make, modules
        self._owners = [
            owner
            for one in modules
            if one is not None
            for owner in one.modules()
            if owner._parameters
        ]
        self._made: Any = None
        self._versions: list[int] = []  # addresses and versions of the weights of _made

    def whole(self) -> bool:
        """Return whether this process has all weights; an engine may have partitioned them."""
        return all(one is None or one.numel() for one in self._owners[0]._parameters.values())

    def __call__(self) -> Any:
        if self._owners[0].training:
            self._versions = []
            return self._make(*self._modules)
        weights = [
            weight
            for owner in self._owners
            for weight in owner._parameters.values()
            if weight is not None
        ]
        if weights[0].is_inference():  # inference tensors have no version
            return self._make(*self._modules)
        versions = [number for one in weights for number in (one.data_ptr(), one._version)]
        if versions != self._versions:
            self._made, self._versions = self._make(*self._modules), versions
        return self._made


#: off: networks use torch operations, as in training
compiling = Switch()


def usable(x: Tensor) -> bool:
    """Return whether compiled functions accept fields (B, C, n, n) or numbers (B, N).

    They accept float32 tensors on the CPU, without gradients and autocast.
    """
    return (
        compiling.on
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not x.requires_grad
        and not torch.is_autocast_enabled("cpu")
    )


class PerceptronWeights(NamedTuple):
    """Weights in the layout that :func:`_perceptrons` reads.

    Attributes:
        weights: weights and biases of all layers, in one vector.
        places: (perceptrons, 4) sizes of input, hidden layers and output.
        outputs: size of each output.
    """

    weights: np.ndarray
    places: np.ndarray
    outputs: list[int]


def perceptron_weights(*nets: nn.Sequential) -> PerceptronWeights:
    """Copy the weights of perceptrons with two hidden layers."""
    layers = [[one for one in net if isinstance(one, nn.Linear)] for net in nets]
    places = [[*(one.in_features for one in net), net[-1].out_features] for net in layers]
    parts = [part for net in layers for one in net for part in (one.weight.T, one.bias)]
    weights = torch.cat([part.flatten() for part in parts]).numpy()
    return PerceptronWeights(weights, np.array(places), [net[-1] for net in places])


def perceptrons(given: PerceptronWeights, numbers: Tensor) -> list[Tensor]:
    """Evaluate perceptrons on numbers (B, inputs); returns [(B, outputs), ...]."""
    inputs = int(given.places[0, 0])
    if numbers.ndim != 2 or numbers.shape[1] != inputs:
        raise ValueError(f"numbers are {tuple(numbers.shape)}, expected (B, {inputs})")
    out = numbers.new_empty(len(numbers), sum(given.outputs))
    work = np.empty((2, int(given.places[:, 1:3].max())), np.float32)
    read = numbers.contiguous().numpy()
    _run(_perceptrons, read, given.weights, given.places, work, out.numpy())
    return list(out.split(given.outputs, dim=1))


def noisy_numbers(
    angle: Tensor, largest: Tensor, fields: Tensor, summary: Tensor, harmonics: int
) -> Tensor:
    """Compute :func:`~.blocks.noisy_numbers`."""
    for one in (angle, largest, summary):
        if len(one) not in (1, len(fields)):
            raise ValueError(f"{len(one)} rows of conditions for {len(fields)} samples")
    width = 2 * harmonics + largest.shape[1] + fields.shape[1] + summary.shape[1]
    out, flat = fields.new_empty(len(fields), width), fields.flatten(2)
    inputs = (one.contiguous().numpy() for one in (angle, largest, flat, summary))
    _run(_noisy_numbers, *inputs, harmonics, out.numpy())
    return out


def chain(weights: Weights, x: Tensor, maps: tuple[Tensor, ...]) -> Tensor:
    """Evaluate lift, blocks and head on fields (B, C, n, n), samples distributed over threads.

    Returns:
        (B, heads, n, n); without a head (B, width + layers P, n, n), the hidden fields and the
        products of all layers.
    """
    batch, size = len(x), x.shape[-1]
    layers, modes, width = weights.convolutions.shape[0], *weights.convolutions.shape[2:4]
    count, heads = weights.out.shape[2] - width, len(weights.head)
    if x.shape[1:] != (weights.lift.shape[1], size, size) or size < 2 * modes:
        raise ValueError(
            f"fields are {tuple(x.shape)}, expected {weights.lift.shape[1]} channels on a square "
            f"grid of at least {2 * modes} points per side"
        )
    out = x.new_empty(batch, heads or width + layers * count, size, size)
    fields = [one.contiguous().flatten(2).numpy() for one in (x, out)]
    local_maps, uniform_maps = _sums(maps, x, 2 * width * layers)
    tables = _tables(size, modes)

    def part(first: int, last: int) -> None:
        rows = slice(first, last)
        mine, result = (one[rows] for one in fields)
        here, there = (one if len(one) == 1 else one[rows] for one in (local_maps, uniform_maps))
        work = _work.of(width, count, size, modes)
        _run(_fourier_chain, mine, here, there, tuple(weights), tables, work, result)

    threads = min(torch.get_num_threads(), batch)
    if threads <= 1:
        part(0, batch)
    else:
        bounds = [batch * i // threads for i in range(threads + 1)]
        list(_pool(torch.get_num_threads()).map(part, bounds[:-1], bounds[1:]))
    return out


def _sums(maps: tuple[Tensor, ...], x: Tensor, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum maps per point, (B or 1, channels or 0, n n), and uniform maps, (B or 1, channels).

    Raises:
        ValueError: the shape of a map does not fit.
    """
    size = x.shape[-1]
    local: list[Tensor] = []
    everywhere: list[Tensor] = []
    for one in maps:
        points = tuple(one.shape[2:])
        if len(one) not in (1, len(x)) or one.shape[1] != channels:
            raise ValueError(f"maps are {tuple(one.shape)}, expected {channels} of each sample")
        if points not in ((size, size), (1, 1)):
            raise ValueError(f"maps are {tuple(one.shape)} for fields {tuple(x.shape)}")
        (everywhere if points == (1, 1) else local).append(one)
    local = local or [x.new_empty(1, 0, size, size)]
    everywhere = everywhere or [x.new_zeros(1, channels, 1, 1)]
    parts = [functools.reduce(torch.add, each) for each in (local, everywhere)]
    local_sum, uniform_sum = (one.contiguous().flatten(2).numpy() for one in parts)
    return local_sum, uniform_sum[..., 0]


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "chains")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has no threads
