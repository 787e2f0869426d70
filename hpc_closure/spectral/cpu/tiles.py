"""Tiles of 8 x 8 numbers and lines of 8, as vector instructions that Numba does not find (CPU).

Each function is a few instructions of LLVM on vectors of eight numbers, which every processor has
in some width. They move, add and subtract, so bits are those of loops over single numbers.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

LANES = 8
TILE = LANES * LANES
#: part of the names of compiled functions, whose cache must not outlive a change of this file
VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]


class _Vectors:
    """Loads and stores of eight numbers of a contiguous array of one axis."""

    def __init__(self, context, builder, kind, value):
        self.builder, self.data = builder, context.make_array(kind)(context, builder, value).data
        element = context.get_data_type(kind.dtype)
        self.pointer = ir.VectorType(element, LANES).as_pointer()
        self.align = kind.dtype.bitwidth // 8

    def _at(self, index, beyond):
        place = self.builder.add(index, ir.Constant(index.type, beyond))
        return self.builder.bitcast(self.builder.gep(self.data, [place]), self.pointer)

    def load(self, index, beyond=0):
        return self.builder.load(self._at(index, beyond), align=self.align)

    def store(self, value, index, beyond=0):
        self.builder.store(value, self._at(index, beyond), align=self.align)

    def load_pairs(self, index):
        """Return real and imaginary parts of eight pairs."""
        both = self.load(index), self.load(index, LANES)
        return [_shuffle(self.builder, *both, range(part, 2 * LANES, 2)) for part in (0, 1)]

    def store_pairs(self, real, imag, index):
        """Store eight pairs of real and imaginary parts."""
        for half in (0, LANES // 2):
            order = [half + i // 2 + i % 2 * LANES for i in range(LANES)]
            self.store(_shuffle(self.builder, real, imag, order), index, 2 * half)


def _splat(builder, number):
    """Return eight times a number."""
    vector = ir.VectorType(number.type, LANES)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.IntType(32)(0))
    return _shuffle(builder, one, one, [0] * LANES)


def _shuffle(builder, a, b, order):
    numbers = ir.Constant(ir.VectorType(ir.IntType(32), LANES), list(order))
    return builder.shuffle_vector(a, b, numbers)


def _transposed(builder, rows):
    """Return the columns of eight vectors: three rounds that exchange halves, quarters, pairs."""
    for width in (4, 2, 1):
        low = [i for i in range(LANES) if not i & width]
        first = [i if not i & width else i - width + LANES for i in range(LANES)]
        second = [i + width if not i & width else i + LANES for i in range(LANES)]
        out = list(rows)
        for i in low:
            a, b = rows[i], rows[i + width]
            out[i] = _shuffle(builder, a, b, first)
            out[i + width] = _shuffle(builder, a, b, second)
        rows = out
    return rows


@intrinsic
def transpose(typing_context, source, first, target, at):
    """Write the 8 x 8 numbers from ``source[first]`` on to ``target[at]`` on, transposed."""

    def generate(context, builder, signature, arguments):
        source, first, target, at = arguments
        read = _Vectors(context, builder, signature.args[0], source)
        write = _Vectors(context, builder, signature.args[2], target)
        rows = [read.load(first, LANES * row) for row in range(LANES)]
        for row, values in enumerate(_transposed(builder, rows)):
            write.store(values, at, LANES * row)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp), generate


@intrinsic
def combine(typing_context, tiles, row, line, here, there, apart):
    """Combine a row of four tiles (u and v, imaginary and real parts) to u + i v at k and at -k.

    Args:
        tiles: four tiles, one after the other; ``row`` is the place of the row in the first one.
        line: complex lines, exchanged, with the other part ``apart`` numbers later.
        here, there: places of k and -k in ``line``.
    """

    def generate(context, builder, signature, arguments):
        tiles, row, line, here, there, apart = arguments
        read = _Vectors(context, builder, signature.args[0], tiles)
        write = _Vectors(context, builder, signature.args[2], line)
        ui, ur, vi, vr = (read.load(row, TILE * part) for part in range(4))
        write.store(builder.fsub(vr, ui), there)
        write.store(builder.fadd(ur, vi), builder.add(there, apart))
        write.store(builder.fadd(ui, vr), here)
        write.store(builder.fsub(ur, vi), builder.add(here, apart))
        return context.get_dummy_value()

    signature = types.void(tiles, types.intp, line, types.intp, types.intp, types.intp)
    return signature, generate


@intrinsic
def separate(typing_context, line, here, there, apart, tiles, row):
    """Write twice the spectra of a and b, from lines a + i b at k and -k, to a row of four tiles.

    The tiles are the real and imaginary parts of a, then of b; other arguments as of ``combine``.
    """

    def generate(context, builder, signature, arguments):
        line, here, there, apart, tiles, row = arguments
        read = _Vectors(context, builder, signature.args[0], line)
        write = _Vectors(context, builder, signature.args[4], tiles)
        hr, hi = read.load(here), read.load(builder.add(here, apart))
        tr, ti = read.load(there), read.load(builder.add(there, apart))
        write.store(builder.fadd(hr, tr), row)
        write.store(builder.fsub(hi, ti), row, TILE)
        write.store(builder.fadd(hi, ti), row, 2 * TILE)
        write.store(builder.fsub(tr, hr), row, 3 * TILE)
        return context.get_dummy_value()

    signature = types.void(line, types.intp, types.intp, types.intp, tiles, types.intp)
    return signature, generate


# -- eight columns of a row of a spectrum ---------------------------------------------------------
#
# Spectra, factors and lines are contiguous arrays, and places count from their first number:
# ``at`` for the mode in a field of ``count`` modes, ``o`` in lines, whose other part is ``apart``
# numbers later. A slice of an array costs more than the eight numbers.


def _plus(builder, index, times, count):
    """Return ``index + times * count`` for a number ``times``."""
    return builder.add(index, builder.mul(count, ir.Constant(count.type, times)))


@intrinsic
def load_pairs(typing_context, pairs, at, line, o, apart):
    """Write pairs, whose place is ``at``, to lines, exchanged."""

    def generate(context, builder, signature, arguments):
        pairs, at, line, o, apart = arguments
        real, imag = _Vectors(context, builder, signature.args[0], pairs).load_pairs(at)
        write = _Vectors(context, builder, signature.args[2], line)
        write.store(imag, o)
        write.store(real, builder.add(o, apart))
        return context.get_dummy_value()

    return types.void(pairs, types.intp, line, types.intp, types.intp), generate


@intrinsic
def load_rotated(  # noqa: PLR0913 - compiled
    typing_context, pairs, at, factor, from_, line, o, apart
):
    """Write i times real factors at ``from_`` times pairs at ``at`` to lines, exchanged."""

    def generate(context, builder, signature, arguments):
        pairs, at, factor, from_, line, o, apart = arguments
        real, imag = _Vectors(context, builder, signature.args[0], pairs).load_pairs(at)
        times = _Vectors(context, builder, signature.args[2], factor).load(from_)
        write = _Vectors(context, builder, signature.args[4], line)
        write.store(builder.fmul(times, real), o)
        write.store(builder.fneg(builder.fmul(times, imag)), builder.add(o, apart))
        return context.get_dummy_value()

    arguments = pairs, types.intp, factor, types.intp, line, types.intp, types.intp
    return types.void(*arguments), generate


def _layers(builder, state, at, count):
    """Return the pairs (real, imaginary) of both layers."""
    two = ir.Constant(at.type, 2)
    return [state.load_pairs(builder.mul(two, _plus(builder, at, n, count))) for n in (0, 1)]


def _psi(builder, inversion, first, count, layers):
    """Return real and imaginary parts of a streamfunction, by factors at ``first`` and after."""
    factors = [inversion.load(_plus(builder, first, number, count)) for number in (0, 1)]
    products = [[builder.fmul(a, part) for part in q] for a, q in zip(factors, layers)]
    return [builder.fadd(*both) for both in zip(*products)]


@intrinsic
def load_flow(  # noqa: PLR0913 - compiled
    typing_context, state, at, count, inversion, number, into, x, y, o, apart
):
    """Write i times the factors of u and v times a streamfunction to lines x and y, exchanged.

    ``number`` is that of the streamfunction's first factor in ``inversion``.
    """

    def generate(context, builder, signature, arguments):
        def vectors(place):
            return _Vectors(context, builder, signature.args[place], arguments[place])

        at, count, number, o, apart = (arguments[place] for place in (1, 2, 4, 8, 9))
        first = builder.add(at, builder.mul(number, count))
        layers = _layers(builder, vectors(0), at, count)
        real, imag = _psi(builder, vectors(3), first, count, layers)
        for field, line in ((0, 6), (1, 7)):
            times = vectors(5).load(_plus(builder, at, field, count))
            vectors(line).store(builder.fmul(times, real), o)
            value = builder.fneg(builder.fmul(times, imag))
            vectors(line).store(value, builder.add(o, apart))
        return context.get_dummy_value()

    i = types.intp
    return types.void(state, i, i, inversion, i, into, x, y, i, i), generate


@intrinsic
def store_flux(  # noqa: PLR0913 - compiled
    typing_context, x, y, o, apart, factors, at, count, pairs
):
    """Write -i (factors[0] F_x + factors[1] F_y) to pairs, from lines x of F_x and y of F_y."""

    def generate(context, builder, signature, arguments):
        def vectors(place):
            return _Vectors(context, builder, signature.args[place], arguments[place])

        o, apart, at, count = (arguments[place] for place in (2, 3, 5, 6))
        parts = []
        for line in (0, 1):
            times = vectors(4).load(_plus(builder, at, line, count))
            real = builder.fmul(times, vectors(line).load(o))
            imag = builder.fmul(times, vectors(line).load(builder.add(o, apart)))
            parts.append((imag, builder.fneg(real)))
        total = [builder.fadd(*both) for both in zip(*parts)]
        vectors(7).store_pairs(*total, builder.mul(at, ir.Constant(at.type, 2)))
        return context.get_dummy_value()

    i = types.intp
    return types.void(x, y, i, i, factors, i, i, pairs), generate


@intrinsic
def store_layer(  # noqa: PLR0913 - compiled
    typing_context, x, y, z, o, apart, factors, at, count, layer, pairs
):
    """Write factors[0] times line x, factors[1] times y and factors[2 + layer] times z to pairs.

    The three are added from left to right; pairs are of several layers.
    """

    def generate(context, builder, signature, arguments):
        def vectors(place):
            return _Vectors(context, builder, signature.args[place], arguments[place])

        o, apart, at, count, layer = (arguments[place] for place in (3, 4, 6, 7, 8))
        field = builder.add(layer, ir.Constant(layer.type, 2))
        places = at, builder.add(at, count), builder.add(at, builder.mul(field, count))
        times = [vectors(5).load(place) for place in places]
        parts = []
        for part in (o, builder.add(o, apart)):
            terms = [builder.fmul(a, vectors(line).load(part)) for line, a in enumerate(times)]
            parts.append(builder.fadd(builder.fadd(terms[0], terms[1]), terms[2]))
        mode = builder.add(at, builder.mul(layer, count))
        vectors(9).store_pairs(*parts, builder.mul(mode, ir.Constant(mode.type, 2)))
        return context.get_dummy_value()

    i = types.intp
    return types.void(x, y, z, i, i, factors, i, i, i, pairs), generate


@intrinsic
def add_linear(  # noqa: PLR0913 - compiled
    typing_context, state, at, count, inversion, gradients, drag, out
):
    """Subtract each layer's gradient times i psi from ``out``; add the drag of the lower psi."""

    def generate(context, builder, signature, arguments):
        def vectors(place):
            return _Vectors(context, builder, signature.args[place], arguments[place])

        at, count = arguments[1], arguments[2]
        layers = _layers(builder, vectors(0), at, count)
        for layer in (0, 1):
            first = _plus(builder, at, 2 * layer, count)
            real, imag = _psi(builder, vectors(3), first, count, layers)
            place = _plus(builder, at, layer, count)
            gradient = vectors(4).load(place)
            place = builder.mul(place, ir.Constant(place.type, 2))
            a, b = vectors(6).load_pairs(place)
            a = builder.fadd(a, builder.fmul(gradient, imag))
            b = builder.fsub(b, builder.fmul(gradient, real))
            if layer == 1:
                rate = vectors(5).load(at)
                a = builder.fadd(a, builder.fmul(rate, real))
                b = builder.fadd(b, builder.fmul(rate, imag))
            vectors(6).store_pairs(a, b, place)
        return context.get_dummy_value()

    i = types.intp
    return types.void(state, i, i, inversion, gradients, drag, out), generate


# -- a multistep update ---------------------------------------------------------------------------


@intrinsic
def adams_bashforth(  # noqa: PLR0913 - compiled
    typing_context, w, rate, before, first, held, real, imag, filter_, j, weights, dt
):
    """Advance eight modes of ``w`` from mode j on by a step, and both past rates by one.

    ``w``, the rates and ``held`` are pairs; the linear symbol ``(real, imag)`` and the filter have
    a number per mode; ``weights`` are a tuple of three.
    """

    def generate(context, builder, signature, arguments):
        def vectors(place):
            return _Vectors(context, builder, signature.args[place], arguments[place])

        def total(*each):
            return functools.reduce(builder.fadd, each)

        j, step = arguments[8], _splat(builder, arguments[10])
        times = [
            _splat(builder, builder.extract_value(arguments[9], number)) for number in range(3)
        ]
        pair = builder.mul(j, ir.Constant(j.type, 2))
        (x, y), now, last, oldest, added = (vectors(each).load_pairs(pair) for each in range(5))
        real, imag, factor = (vectors(each).load(j) for each in (5, 6, 7))
        linear = (
            builder.fsub(builder.fmul(x, real), builder.fmul(y, imag)),
            builder.fadd(builder.fmul(y, real), builder.fmul(x, imag)),
        )
        rates = [builder.fadd(*both) for both in zip(now, linear)]
        advanced = []
        for part, state in enumerate((x, y)):
            past = rates[part], last[part], oldest[part]
            change = total(*(builder.fmul(*both) for both in zip(past, times)), added[part])
            advanced.append(builder.fmul(builder.fadd(state, builder.fmul(change, step)), factor))
        vectors(3).store_pairs(*last, pair)
        vectors(2).store_pairs(*rates, pair)
        vectors(0).store_pairs(*advanced, pair)
        return context.get_dummy_value()

    return (
        types.void(w, rate, before, first, held, real, imag, filter_, types.intp, weights, dt),
        generate,
    )
