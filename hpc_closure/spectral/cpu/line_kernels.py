"""The nonlinear term on the CPU, compiled: line FFTs, products and pruning, member by member.

In two dimensions a right-hand side consists of FFTs along x, FFTs along y, products, and the way
back. As library calls each of these reads and writes full fields. Here, for each member,

1. eight columns at a time are multiplied by their factors, transformed along x to physical space
    and stored next to each other: a *mixed* field (rows x, modes ky);
2. eight rows of the mixed field at a time are transformed along y to physical space, multiplied
    and transformed back while they are in the first-level cache, so no physical field is ever in
    memory. u and v are one complex line, ``u + i v``, and so are their products;
3. eight columns at a time are transformed back along x, and the retained modes are stored.

The FFT is Stockham's with radices 2, 3, 4, 5 and 8 (Van Loan, Computational Frameworks for the
Fast Fourier Transform, 1992, sec. 1.7), on eight lines side by side, real and imaginary parts
apart, so that every operation works on full vector registers. The arithmetic of a line does not
depend on the lines beside it, and multiplications and additions are not fused. So bits depend
neither on members and ranks nor on the width of the processor's registers.

**Templates.** Numba compiles the functions below once per grid size. Names in capitals are
numbers, or other compiled functions, that :func:`specialise` inserts. To the compiler they are
constants: it vectorises a loop only if it sees that reads and writes do not overlap. Where it does
not, :mod:`tiles` has the vector instructions. The result is cached on disk. All templates are in
this file, because the cache is stale only if this file changes, or the names of functions do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np

from hpc_closure.spectral.cpu import jit
from hpc_closure.spectral.cpu.tiles import (
    LANES,
    TILE,
    VERSION,
    add_linear,
    combine,
    load_flow,
    load_pairs,
    load_rotated,
    separate,
    store_flux,
    store_layer,
    transpose,
)
from hpc_closure.spectral.modes.resolution import retained_modes

# LANES lines are side by side: one cache line of float64
PADDING = 3  # rows of LANES between real and imaginary parts, to avoid equal addresses mod 4096
MOST_PASSES = 7

BASDEVANT, FLUX = "basdevant", "flux"
LAYERS = "layers"  # the flux form of two layers of quasi-geostrophic flow

# Set by specialise. For lines: N points, K retained modes, APART numbers from real to imaginary
# parts, PASSES passes of the transform. For a pass: M length after it, S stride, AT first twiddle.
N = K = APART = PASSES = M = S = AT = 0
FORM = ""
P0: Any = None
P1 = P2 = P3 = P4 = P5 = P6 = GET = PUT = PASSES_OF = FORWARD = OF_PRODUCTS = OF_EXCHANGE = P0
LOAD = PACK = UNPACK = STORE = TO_ROWS = MULTIPLY = TO_COLUMNS = FLUX_OUT = LOAD_FLOW = P0
STORE_LAYER = ADD_LINEAR = P0

# Constants of the passes: sqrt(1/2), 1/2, sin(pi/3), cos of 2 pi/5 and 4 pi/5, sin of the same.
FIFTHS = 2 * np.pi / 5 * np.array([1, 2])
CONSTANTS = np.array([0.5**0.5, 0.5, 0.75**0.5, *np.cos(FIFTHS), *np.sin(FIFTHS)])


# -- passes: (radix, M, S) to (M, radix, S), each times its twiddle -------------------------------
#
# x and y hold real parts, and imaginary parts APART numbers later. ``lanes`` equals LANES, but as
# an argument: the compiler would unroll loops of a known length before it vectorises them.
# The first pass may read products of lines x and v, which so are never in memory.


def _get(x, v, i):
    return x[i], x[i + APART]


def _get_squares(z, v, i):
    """Multiply u + i v, exchanged, to u v + i (v^2 - u^2)."""
    u, v = z[i + APART], z[i]
    return u * v, (v - u) * (v + u)


def _get_flux(z, w, i):
    """Multiply u + i v, exchanged, and w to u w + i v w."""
    return z[i + APART] * w[i], z[i] * w[i]


def _get_exchange(z, v, i):
    """Multiply two lines u + i v, exchanged, to u v' - v u', which is real."""
    product = z[i + APART] * v[i] - z[i] * v[i + APART]
    return product, product - product


def _put(y, o, tr, ti, wr, wi):
    if M > 1:
        y[o] = tr * wr - ti * wi
        y[o + APART] = tr * wi + ti * wr
    else:  # the last pass has no twiddles
        y[o] = tr
        y[o + APART] = ti


def _pass2(x, v, y, w, c, lanes):
    count = S // LANES * lanes
    for p in range(M):
        t = AT + 2 * p
        w1r, w1i = w[t], w[t + 1]
        for q in range(count):
            i, o = p * S + q, 2 * p * S + q
            ar, ai = GET(x, v, i)
            br, bi = GET(x, v, i + M * S)
            y[o] = ar + br
            y[o + APART] = ai + bi
            tr, ti = ar - br, ai - bi
            PUT(y, o + S, tr, ti, w1r, w1i)


def _pass3(x, v, y, w, c, lanes):
    count = S // LANES * lanes
    half, root = c[1], c[2]
    for p in range(M):
        t = AT + 4 * p
        w1r, w1i, w2r, w2i = w[t], w[t + 1], w[t + 2], w[t + 3]
        for q in range(count):
            i, o = p * S + q, 3 * p * S + q
            a0r, a0i = GET(x, v, i)
            a1r, a1i = GET(x, v, i + M * S)
            a2r, a2i = GET(x, v, i + 2 * M * S)
            sr, si = a1r + a2r, a1i + a2i
            dr, di = root * (a1i - a2i), root * (a2r - a1r)
            er, ei = a0r - half * sr, a0i - half * si
            y[o] = a0r + sr
            y[o + APART] = a0i + si
            tr, ti = er + dr, ei + di
            PUT(y, o + S, tr, ti, w1r, w1i)
            tr, ti = er - dr, ei - di
            PUT(y, o + 2 * S, tr, ti, w2r, w2i)


def _pass4(x, v, y, w, c, lanes):
    count = S // LANES * lanes
    for p in range(M):
        t = AT + 6 * p
        w1r, w1i, w2r, w2i = w[t], w[t + 1], w[t + 2], w[t + 3]
        w3r, w3i = w[t + 4], w[t + 5]
        for q in range(count):
            i, o = p * S + q, 4 * p * S + q
            a0r, a0i = GET(x, v, i)
            a1r, a1i = GET(x, v, i + M * S)
            a2r, a2i = GET(x, v, i + 2 * M * S)
            a3r, a3i = GET(x, v, i + 3 * M * S)
            br, bi, cr, ci = a0r + a2r, a0i + a2i, a0r - a2r, a0i - a2i
            dr, di, er, ei = a1r + a3r, a1i + a3i, a1i - a3i, a3r - a1r
            y[o] = br + dr
            y[o + APART] = bi + di
            tr, ti = cr + er, ci + ei
            PUT(y, o + S, tr, ti, w1r, w1i)
            tr, ti = br - dr, bi - di
            PUT(y, o + 2 * S, tr, ti, w2r, w2i)
            tr, ti = cr - er, ci - ei
            PUT(y, o + 3 * S, tr, ti, w3r, w3i)


def _pass5(x, v, y, w, c, lanes):
    count = S // LANES * lanes
    c1, c2, s1, s2 = c[3], c[4], c[5], c[6]
    for p in range(M):
        t = AT + 8 * p
        w1r, w1i, w2r, w2i = w[t], w[t + 1], w[t + 2], w[t + 3]
        w3r, w3i, w4r, w4i = w[t + 4], w[t + 5], w[t + 6], w[t + 7]
        for q in range(count):
            i, o = p * S + q, 5 * p * S + q
            a0r, a0i = GET(x, v, i)
            a1r, a1i = GET(x, v, i + M * S)
            a2r, a2i = GET(x, v, i + 2 * M * S)
            a3r, a3i = GET(x, v, i + 3 * M * S)
            a4r, a4i = GET(x, v, i + 4 * M * S)
            br, bi, dr, di = a1r + a4r, a1i + a4i, a1r - a4r, a1i - a4i
            er, ei, fr, fi = a2r + a3r, a2i + a3i, a2r - a3r, a2i - a3i
            y[o] = a0r + (br + er)
            y[o + APART] = a0i + (bi + ei)
            gr, gi = a0r + (c1 * br + c2 * er), a0i + (c1 * bi + c2 * ei)
            hr, hi = s1 * di + s2 * fi, -(s1 * dr + s2 * fr)
            tr, ti = gr + hr, gi + hi
            PUT(y, o + S, tr, ti, w1r, w1i)
            tr, ti = gr - hr, gi - hi
            PUT(y, o + 4 * S, tr, ti, w4r, w4i)
            gr, gi = a0r + (c2 * br + c1 * er), a0i + (c2 * bi + c1 * ei)
            hr, hi = s2 * di - s1 * fi, s1 * fr - s2 * dr
            tr, ti = gr + hr, gi + hi
            PUT(y, o + 2 * S, tr, ti, w2r, w2i)
            tr, ti = gr - hr, gi - hi
            PUT(y, o + 3 * S, tr, ti, w3r, w3i)


def _pass8(x, v, y, w, c, lanes):
    count = S // LANES * lanes
    root = c[0]
    for p in range(M):
        t = AT + 14 * p
        w1r, w1i, w2r, w2i, w3r, w3i = w[t], w[t + 1], w[t + 2], w[t + 3], w[t + 4], w[t + 5]
        w4r, w4i, w5r, w5i, w6r, w6i = w[t + 6], w[t + 7], w[t + 8], w[t + 9], w[t + 10], w[t + 11]
        w7r, w7i = w[t + 12], w[t + 13]
        for q in range(count):
            i, o = p * S + q, 8 * p * S + q
            a0r, a0i = GET(x, v, i)
            a1r, a1i = GET(x, v, i + M * S)
            a2r, a2i = GET(x, v, i + 2 * M * S)
            a3r, a3i = GET(x, v, i + 3 * M * S)
            a4r, a4i = GET(x, v, i + 4 * M * S)
            a5r, a5i = GET(x, v, i + 5 * M * S)
            a6r, a6i = GET(x, v, i + 6 * M * S)
            a7r, a7i = GET(x, v, i + 7 * M * S)
            # four points of even number
            br, bi, cr, ci = a0r + a4r, a0i + a4i, a0r - a4r, a0i - a4i
            dr, di, er, ei = a2r + a6r, a2i + a6i, a2i - a6i, a6r - a2r
            e0r, e0i, e1r, e1i = br + dr, bi + di, cr + er, ci + ei
            e2r, e2i, e3r, e3i = br - dr, bi - di, cr - er, ci - ei
            # four points of odd number, each rotated by an eighth of a turn
            br, bi, cr, ci = a1r + a5r, a1i + a5i, a1r - a5r, a1i - a5i
            dr, di, er, ei = a3r + a7r, a3i + a7i, a3i - a7i, a7r - a3r
            f0r, f0i, f2r, f2i = br + dr, bi + di, bi - di, dr - br
            tr, ti = cr + er, ci + ei
            f1r, f1i = root * (tr + ti), root * (ti - tr)
            tr, ti = cr - er, ci - ei
            f3r, f3i = root * (ti - tr), -(root * (tr + ti))
            y[o] = e0r + f0r
            y[o + APART] = e0i + f0i
            tr, ti = e1r + f1r, e1i + f1i
            PUT(y, o + S, tr, ti, w1r, w1i)
            tr, ti = e2r + f2r, e2i + f2i
            PUT(y, o + 2 * S, tr, ti, w2r, w2i)
            tr, ti = e3r + f3r, e3i + f3i
            PUT(y, o + 3 * S, tr, ti, w3r, w3i)
            tr, ti = e0r - f0r, e0i - f0i
            PUT(y, o + 4 * S, tr, ti, w4r, w4i)
            tr, ti = e1r - f1r, e1i - f1i
            PUT(y, o + 5 * S, tr, ti, w5r, w5i)
            tr, ti = e2r - f2r, e2i - f2i
            PUT(y, o + 6 * S, tr, ti, w6r, w6i)
            tr, ti = e3r - f3r, e3i - f3i
            PUT(y, o + 7 * S, tr, ti, w7r, w7i)


PASS = {2: _pass2, 3: _pass3, 4: _pass4, 5: _pass5, 8: _pass8}


def _passes_of(first, second, x, y, out, tables):
    """Transform LANES lines of N points (unnormalised FFT), which GET reads from two sources.

    Args:
        first, second: the sources; may be y.
        x, y: work arrays.
        out: the spectra; may be x if PASSES is odd, y if it is even.
        tables: twiddles, constants, LANES, and the places of columns in mixed fields.
    """
    w, c, lanes, _ = tables
    P0(first, second, out if PASSES == 1 else x, w, c, lanes)
    if PASSES > 1:
        P1(x, x, out if PASSES == 2 else y, w, c, lanes)
    if PASSES > 2:
        P2(y, y, out if PASSES == 3 else x, w, c, lanes)
    if PASSES > 3:
        P3(x, x, out if PASSES == 4 else y, w, c, lanes)
    if PASSES > 4:
        P4(y, y, out if PASSES == 5 else x, w, c, lanes)
    if PASSES > 5:
        P5(x, x, out if PASSES == 6 else y, w, c, lanes)
    if PASSES > 6:
        P6(y, y, out, w, c, lanes)


def _forward(source, x, y, out, tables):
    """Transform LANES lines of N points; parts are ``(N, LANES)``; see _passes_of."""
    PASSES_OF(source, source, x, y, out, tables)


# -- the three stages of a member -----------------------------------------------------------------
#
# Spectra are pairs of reals, ``(2K + 1, 2 columns)``. Mixed fields are blocks of LANES columns, as
# transforms along x write them: ``(F, blocks, 2 parts of (rows, LANES))``; the blocks of several
# ranks follow each other. An inverse transform is a forward one with real and imaginary parts
# exchanged before and after. "Exchanged" below means that the parts are in this order. ``work``
# is two buffers for lines, one for a field, and four tiles.


def _to_rows(stream, carried, factors, mixed, work, tables):
    """Transform spectra to mixed fields, exchanged: u, v and, in flux form, the carried field."""
    x, y = work[:2]
    lanes = tables[2]
    for f in range(mixed.shape[0]):
        for block in range(mixed.shape[1]):
            LOAD(stream if f < 2 else carried, factors, f, block, x, lanes)
            FORWARD(x, y, x, mixed[f, block], tables)


def _load(spectrum, factors, f, block, x, lanes):
    """Load a block of a spectrum times i and a real factor; without a factor, the block itself."""
    first, columns = block * LANES, spectrum.shape[1] // 2
    width, count = min(lanes, columns - first), (2 * K + 1) * columns
    for row in range(2 * K + 1):
        o = (row if row <= K else row + N - 2 * K - 1) * LANES
        if width == LANES:
            at = row * columns + first
            if f < len(factors):
                load_rotated(spectrum, 2 * at, factors, f * count + at, x, o, APART)
            else:
                load_pairs(spectrum, 2 * at, x, o, APART)
            continue
        re, im, line = x[o:], x[o + APART :], spectrum[row, 2 * first :]
        if f < len(factors):
            factor = factors[f, row, first:]
            for q in range(width):
                re[q] = factor[q] * line[2 * q]
                im[q] = -(factor[q] * line[2 * q + 1])
        else:
            for q in range(width):
                re[q] = line[2 * q + 1]
                im[q] = line[2 * q]
    for o in range((K + 1) * LANES, (N - K) * LANES):
        x[o] = 0
        x[o + APART] = 0


def _multiply(mixed, rows, work, tables):
    """Replace mixed fields of ``rows`` rows, exchanged, by twice those of their two products."""
    x, y, vorticity, tiles = work
    places = tables[3]
    z, other = (y, x) if PASSES % 2 else (x, y)
    for first in range(0, rows, LANES):
        if FORM == FLUX:
            PACK(mixed[2], mixed[2], first, places, x, tiles)
            FORWARD(x, y, x, z, tables)
            vorticity[:APART] = z[APART:]
        PACK(mixed[0], mixed[1], first, places, x, tiles)
        FORWARD(x, y, x, z, tables)
        OF_PRODUCTS(z, vorticity, other, z, x, tables)
        UNPACK(x, mixed[0], mixed[1], first, places, tiles)


def _pack(a, b, first, places, x, tiles):
    """Combine rows of two mixed fields to complex lines u + i v, exchanged.

    The modes -k, which are not stored, are the conjugates of those at k.
    """
    apart, at = a.shape[1] // 2, first * LANES
    k = 0
    for block in range(a.shape[0]):
        transpose(a[block], at, tiles, 0)
        transpose(a[block], at + apart, tiles, TILE)
        transpose(b[block], at, tiles, 2 * TILE)
        transpose(b[block], at + apart, tiles, 3 * TILE)
        while k <= K and places[k] // LANES == block:
            row = places[k] % LANES * LANES
            combine(tiles, row, x, k * LANES, (N - k) * LANES if k else 0, APART)
            if k == 0:
                x[:LANES] = tiles[3 * TILE : 3 * TILE + LANES]
                x[APART : APART + LANES] = tiles[TILE : TILE + LANES]
            k += 1
    for o in range((K + 1) * LANES, (N - K) * LANES):
        x[o] = 0
        x[o + APART] = 0


def _unpack(z, a, b, first, places, tiles):
    """Split spectra of complex lines a + i b in twice those of a and of b, rows of mixed fields.

    ``z(k) + conj z(-k) = 2 a(k)``, and the difference is ``2 i b(k)``.
    """
    apart, at = a.shape[1] // 2, first * LANES
    k = 0
    for block in range(a.shape[0]):
        while k <= K and places[k] // LANES == block:
            row = places[k] % LANES * LANES
            separate(z, k * LANES, (N - k) * LANES if k else 0, APART, tiles, row)
            k += 1
        transpose(tiles, 0, a[block], at)
        transpose(tiles, TILE, a[block], at + apart)
        transpose(tiles, 2 * TILE, b[block], at)
        transpose(tiles, 3 * TILE, b[block], at + apart)


def _to_columns(mixed, factors, spectrum, work, tables):
    """Transform two mixed fields to one spectrum, the sum of both times their factors."""
    for block in range(mixed.shape[1]):
        FLUX_OUT(mixed[0, block], mixed[1, block], factors, block, spectrum, work, tables)


def _flux_out(first, second, factors, block, spectrum, work, tables):
    """Transform a block of two mixed fields, and store the sum of both times their factors."""
    x, y, v = work[:3]
    columns = spectrum.shape[1] // 2
    # the transform of the first field is in one buffer; the other one and v serve the second
    z, other = (x, y) if PASSES % 2 else (y, x)
    a, b = (v, other) if PASSES % 2 else (other, v)
    FORWARD(first, x, y, z, tables)
    FORWARD(second, a, b, v, tables)
    if FORM == BASDEVANT or columns - block * LANES < LANES:
        STORE(z, factors, 0, block, spectrum, tables[2])
        STORE(v, factors, 1, block, spectrum, tables[2])
        return
    for row in range(2 * K + 1):
        o = (row if row <= K else row + N - 2 * K - 1) * LANES
        at = row * columns + block * LANES
        store_flux(z, v, o, APART, factors, at, (2 * K + 1) * columns, spectrum)


def _store(z, factors, f, block, spectrum, lanes):
    """Store the retained modes of a block times a real factor; the second field is added."""
    first = block * LANES
    width = min(lanes, spectrum.shape[1] // 2 - first)
    for row in range(2 * K + 1):
        o = (row if row <= K else row + N - 2 * K - 1) * LANES
        re, im, line = z[o:], z[o + APART :], spectrum[row, 2 * first :]
        factor = factors[f, row, first:]
        for q in range(width):
            a, b = factor[q] * re[q], factor[q] * im[q]
            if FORM != BASDEVANT:  # -i (kx F_x + ky F_y)
                a, b = b, -a
            line[2 * q] = a if f == 0 else line[2 * q] + a
            line[2 * q + 1] = b if f == 0 else line[2 * q + 1] + b


# -- two layers -----------------------------------------------------------------------------------
#
# Each layer carries its own vorticity in Basdevant's form, by two products of its velocities. The
# layers exchange potential vorticity by one more product, J(psi, psi') = u v' - v u', which both
# share. So a step has nine transforms of columns for the ten of two layers in flux form. Mixed
# fields are u and v of the upper layer, u and v of the lower one, and on the way back the
# exchange. Streamfunctions exist in registers only.


def _layers_to_rows(state, factors, mixed, work, tables):
    """Transform both layers' spectra (2, 2K + 1, 2 columns) to four mixed fields, exchanged."""
    x, y, v = work[:3]
    for block in range(mixed.shape[1]):
        for layer in range(2):
            LOAD_FLOW(state, factors[0], factors[1], layer, block, x, v, tables[2])
            FORWARD(x, y, x, mixed[2 * layer, block], tables)
            FORWARD(v, y, v, mixed[2 * layer + 1, block], tables)


def _load_flow(state, into, inversion, layer, block, x, y, lanes):  # noqa: PLR0913 - compiled
    """Load a block of a layer's velocities, i times a real factor of its streamfunction."""
    first, columns = block * LANES, state.shape[2] // 2
    width, count = min(lanes, columns - first), (2 * K + 1) * columns
    for row in range(2 * K + 1):
        o = (row if row <= K else row + N - 2 * K - 1) * LANES
        if width == LANES:
            at = row * columns + first
            load_flow(state, at, count, inversion, 2 * layer, into, x, y, o, APART)
            continue
        ur, ui, vr, vi = x[o:], x[o + APART :], y[o:], y[o + APART :]
        upper, lower = state[0, row, 2 * first :], state[1, row, 2 * first :]
        a, b = inversion[2 * layer, row, first:], inversion[2 * layer + 1, row, first:]
        to_u, to_v = into[0, row, first:], into[1, row, first:]
        for q in range(width):
            re = a[q] * upper[2 * q] + b[q] * lower[2 * q]
            im = a[q] * upper[2 * q + 1] + b[q] * lower[2 * q + 1]
            ur[q] = to_u[q] * re
            ui[q] = -(to_u[q] * im)
            vr[q] = to_v[q] * re
            vi[q] = -(to_v[q] * im)
    for o in range((K + 1) * LANES, (N - K) * LANES):
        x[o] = 0
        x[o + APART] = 0
        y[o] = 0
        y[o + APART] = 0


def _layers_multiply(mixed, rows, work, tables):
    """Replace velocities of ``rows`` rows by twice their layer's products; write the exchange."""
    x, y, upper, lower, tiles = work
    places = tables[3]
    z = x if PASSES % 2 else y
    apart = mixed.shape[2] // 2
    for first in range(0, rows, LANES):
        PACK(mixed[0], mixed[1], first, places, x, tiles)
        FORWARD(x, y, x, upper, tables)
        PACK(mixed[2], mixed[3], first, places, x, tiles)
        FORWARD(x, y, x, lower, tables)
        OF_EXCHANGE(upper, lower, x, y, z, tables)
        k, at = 0, first * LANES
        for block in range(mixed.shape[1]):  # columns of a block are next to each other
            transpose(z, k * LANES, mixed[4, block], at)
            transpose(z, k * LANES + APART, mixed[4, block], at + apart)
            while k <= K and places[k] // LANES == block:
                k += 1
        OF_PRODUCTS(upper, upper, x, y, z, tables)
        UNPACK(z, mixed[0], mixed[1], first, places, tiles)
        OF_PRODUCTS(lower, lower, x, y, z, tables)
        UNPACK(z, mixed[2], mixed[3], first, places, tiles)


def _layers_to_columns(mixed, state, factors, back, out, work, tables):
    """Transform the products, and add the linear terms that couple the layers."""
    x, y, v, exchange = work[:4]
    # the transform of the first product is in one buffer; the other one and v serve the second
    z, other = (x, y) if PASSES % 2 else (y, x)
    a, b = (v, other) if PASSES % 2 else (other, v)
    for block in range(mixed.shape[1]):
        FORWARD(mixed[4, block], x, y, exchange, tables)
        for layer in range(2):
            FORWARD(mixed[2 * layer, block], x, y, z, tables)
            FORWARD(mixed[2 * layer + 1, block], a, b, v, tables)
            STORE_LAYER(z, v, exchange, back, layer, block, out, tables[2])
        ADD_LINEAR(state, factors, block, out, tables[2])


def _store_layer(z, v, exchange, factors, layer, block, out, lanes):  # noqa: PLR0913 - compiled
    """Store the sum of a layer's two products and of the exchange, each times its factor.

    The factors are those of the products of any layer, then those of the exchange by layer.
    """
    first, columns = block * LANES, out.shape[2] // 2
    width, count = min(lanes, columns - first), (2 * K + 1) * columns
    for row in range(2 * K + 1):
        o = (row if row <= K else row + N - 2 * K - 1) * LANES
        if width == LANES:
            at = row * columns + first
            store_layer(z, v, exchange, o, APART, factors, at, count, layer, out)
            continue
        line = out[layer, row, 2 * first :]
        f, g, h = factors[0, row, first:], factors[1, row, first:], factors[2 + layer, row, first:]
        for q in range(width):
            i = o + q
            line[2 * q] = (f[q] * z[i] + g[q] * v[i]) + h[q] * exchange[i]
            i = i + APART
            line[2 * q + 1] = (f[q] * z[i] + g[q] * v[i]) + h[q] * exchange[i]


def _add_linear(state, factors, block, out, lanes):
    """Subtract the mean gradients times i psi of each layer, and add the drag of the lower one."""
    _, inversion, gradients, drag = factors
    first, columns = block * LANES, state.shape[2] // 2
    width, count = min(lanes, columns - first), (2 * K + 1) * columns
    for row in range(2 * K + 1):
        if width == LANES:
            add_linear(state, row * columns + first, count, inversion, gradients, drag, out)
            continue
        upper, lower = state[0, row, 2 * first :], state[1, row, 2 * first :]
        a, b, c, d = inversion[0], inversion[1], inversion[2], inversion[3]
        a, b, c, d = a[row, first:], b[row, first:], c[row, first:], d[row, first:]
        g, h, r = gradients[0, row, first:], gradients[1, row, first:], drag[row, first:]
        above, below = out[0, row, 2 * first :], out[1, row, 2 * first :]
        for q in range(width):
            ur, ui, lr, li = upper[2 * q], upper[2 * q + 1], lower[2 * q], lower[2 * q + 1]
            re, im = a[q] * ur + b[q] * lr, a[q] * ui + b[q] * li
            above[2 * q] = above[2 * q] + g[q] * im
            above[2 * q + 1] = above[2 * q + 1] - g[q] * re
            re, im = c[q] * ur + d[q] * lr, c[q] * ui + d[q] * li
            below[2 * q] = (below[2 * q] + h[q] * im) + r[q] * re
            below[2 * q + 1] = (below[2 * q + 1] - h[q] * re) + r[q] * im


def _layers_whole(state, factors, back, out, mixed, work, tables):
    for i in range(state.shape[0]):
        TO_ROWS(state[i], factors, mixed, work, tables)
        MULTIPLY(mixed, N, work, tables)
        TO_COLUMNS(mixed, state[i], factors, back, out[i], work, tables)


def _layers_all_to_rows(state, factors, mixed, work, tables):
    for i in range(state.shape[0]):
        TO_ROWS(state[i], factors, mixed[i], work, tables)


def _layers_multiply_all(mixed, rows, work, tables):
    for i in range(mixed.shape[0]):
        MULTIPLY(mixed[i], rows, work, tables)


def _layers_all_to_columns(mixed, state, factors, back, out, work, tables):
    for i in range(out.shape[0]):
        TO_COLUMNS(mixed[i], state[i], factors, back, out[i], work, tables)


# -- loops over members, the leading axis ---------------------------------------------------------


def _whole(spectra, into, back, out, mixed, work, tables):
    stream, carried = spectra
    for i in range(stream.shape[0]):
        TO_ROWS(stream[i], carried[i], into, mixed, work, tables)
        MULTIPLY(mixed, N, work, tables)
        TO_COLUMNS(mixed, back, out[i], work, tables)


def _all_to_rows(spectra, into, mixed, work, tables):
    stream, carried = spectra
    for i in range(stream.shape[0]):
        TO_ROWS(stream[i], carried[i], into, mixed[i], work, tables)


def _multiply_all(mixed, rows, work, tables):
    for i in range(mixed.shape[0]):
        MULTIPLY(mixed[i], rows, work, tables)


def _all_to_columns(mixed, back, out, work, tables):
    for i in range(out.shape[0]):
        TO_COLUMNS(mixed[i], back, out[i], work, tables)


@dataclass(frozen=True)
class Programs:
    """Compiled functions of one size and form; each is compiled at its first call."""

    whole: Any
    to_rows: Any
    multiply: Any
    to_columns: Any


#: templates of the three stages of a member, and of the loops over members
ONE_FLOW = (
    (_to_rows, _multiply, _to_columns),
    (_whole, _all_to_rows, _multiply_all, _all_to_columns),
)
TWO_LAYERS = (
    (_layers_to_rows, _layers_multiply, _layers_to_columns),
    (_layers_whole, _layers_all_to_rows, _layers_multiply_all, _layers_all_to_columns),
)


@functools.cache
def programs(size: int, form: str) -> Programs:
    """Return the functions for lines of ``size`` points, which must have :func:`radices`."""
    names: dict[str, Any] = {"N": size, "K": retained_modes(size), "APART": apart(size)}
    names["FORM"] = form
    add_transform(names)
    names["OF_PRODUCTS"] = transform_of(names, _get_flux if form == FLUX else _get_squares)
    names["OF_EXCHANGE"] = transform_of(names, _get_exchange)
    parts = _load, _pack, _unpack, _store, _flux_out, _load_flow, _store_layer, _add_linear
    stages, members = ONE_FLOW if form != LAYERS else TWO_LAYERS
    for part in (*parts, *stages):
        name = part.__name__.removeprefix("_layers")[1:] if form == LAYERS else part.__name__[1:]
        names[name.upper()] = specialise(part, names)
    return Programs(*[jit.cached(with_names(template, names)) for template in members])


def add_transform(names: dict[str, Any]) -> None:
    """Add the compiled FFT of N points, FORWARD, and the number of its passes to ``names``."""
    names["PASSES"] = len(radices(names["N"]))
    names["LATER"] = [compiled_pass(names, place, _get) for place in range(1, names["PASSES"])]
    names["PASSES_OF"] = transform_of(names, _get)
    names["FORWARD"] = specialise(_forward, names)


def transform_of(names: dict[str, Any], get: Callable) -> Any:
    """Return the compiled FFT of the N points that ``get`` reads from two sources."""
    passes = [compiled_pass(names, 0, get), *names["LATER"]]
    chain = {f"P{i}": passes[min(i, len(passes) - 1)] for i in range(MOST_PASSES)}
    return specialise(_passes_of, {**names, **chain, "SOURCE": get.__name__})


def compiled_pass(names: dict[str, Any], place: int, get: Callable) -> Any:
    """Return the compiled pass number ``place`` of the FFT of N points, which ``get`` reads."""
    m, s, at = names["N"], LANES, 0
    for radix in radices(names["N"])[:place]:
        m, s = m // radix, s * radix
        at += 2 * (radix - 1) * m
    radix = radices(names["N"])[place]
    of_pass = {**names, "M": m // radix, "S": s, "AT": at, "SOURCE": get.__name__}
    of_pass["GET"] = specialise(get, of_pass, inline="always")
    of_pass["PUT"] = specialise(_put, of_pass, inline="always")
    return specialise(PASS[radix], of_pass)


def with_names(template: Callable, names: dict) -> Callable:
    """Return a template with ``names`` as globals and a unique name.

    Numba identifies functions by name, both in its disk cache and where they call each other.
    """
    function = FunctionType(
        template.__code__, {**template.__globals__, **names}, template.__name__
    )
    differs = [names[name] for name in ("FORM", "N", "M", "S", "SOURCE") if name in names]
    function.__qualname__ = "_".join([template.__name__, *map(str, differs), VERSION])
    return function


def specialise(template: Callable, names: dict, **options) -> Callable:
    """Compile a template with ``names`` as globals."""
    return jit.jit(with_names(template, names), **options)


def apart(rows: int) -> int:
    """Return how many numbers the imaginary parts of ``(rows, LANES)`` are after the real ones.

    They are full squares of LANES, plus PADDING.
    """
    return (-(-rows // LANES) * LANES + PADDING) * LANES


@functools.cache
def radices(size: int) -> tuple[int, ...]:
    """Return the radices of the passes of ``size`` points; empty if it has other prime factors."""
    remainder, factors = size, []
    for radix in (8, 4, 2, 5, 3):
        while remainder % radix == 0 and not (
            radix == 8 and remainder % 32 == 16
        ):  # 4 x 4, not 2 x 8
            remainder //= radix
            factors.append(radix)
    return tuple(sorted(factors)) if remainder == 1 and len(factors) <= MOST_PASSES else ()


def twiddles(size: int) -> np.ndarray:
    """Return ``e^(-2 pi i j p / m)``, j = 1 .. radix - 1, for each p of each pass of length m."""
    out, m = [], size
    for radix in radices(size):
        turns = np.outer(np.arange(m // radix), np.arange(1, radix)) / m
        out.append(np.exp(-2j * np.pi * turns).ravel().view(np.float64))
        m //= radix
    return np.concatenate(out)
