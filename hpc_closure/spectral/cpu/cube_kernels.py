r"""The nonlinear term in three dimensions on the CPU, compiled: FFTs, products and projection.

The term is :math:`-P\,\partial_j(u_i u_j)`, P the projection on solenoidal fields. Any
multiple of the unit tensor may be subtracted from u_i u_j, for its divergence is a gradient.
Without w w five products are left (Basdevant, J. Comput. Phys. 50, 1983), so a right-hand side
takes 3 inverse and 5 forward transforms. For each member,

1. eight columns (kx) at a time are transformed along x to physical space and stored by planes of
   equal x;
2. plane by plane, eight columns (ky) at a time are transformed along y, then eight rows (kz) at a
   time along z, multiplied and transformed back, and at last back along y. A plane with its
   products stays in the second-level cache. u and v are one complex line, two neighbouring rows of
   w are another, and so are the products;
3. eight columns (kx) at a time are transformed back along x; divergence and projection follow from
   the five spectra while they are in the first-level cache.

Passes, templates and layouts of lines are those of :mod:`line_kernels`. *Planes* are
``(x, 5 fields, blocks of kz, (2K + 1) ky, 2 parts, LANES)``; a *mixed* plane is one of them after
the transform along y, ``(5 fields, blocks, 2 parts of (rows, LANES))``. Fields are first u, v, w
and then the products uu - ww, vv - ww, uv, uw, vw. On slabs planes are exchanged between the
stages, on pencils mixed planes as well.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_closure.spectral.cpu import jit, line_kernels
from hpc_closure.spectral.cpu.line_kernels import LANES, add_transform, specialise, with_names
from hpc_closure.spectral.modes.resolution import retained_modes

VELOCITIES, PRODUCTS = 3, 5
PAIRS = 2 * LANES  # rows that are multiplied at once

# The disk cache of a function notices only changes of this file, so its names hold the other one.
_FORM = "cube" + hashlib.sha256(Path(line_kernels.__file__).read_bytes()).hexdigest()[:8]

# Set by specialise, see line_kernels.
N = K = APART = PASSES = 0
P0: Any = None
FORWARD = LOAD = SPREAD = FILL = KEEP = PACK = MULTIPLY_LINES = UNPACK = COLLECT = PROJECT = P0
TO_PLANES = TO_ROWS = MULTIPLY = FROM_ROWS = TO_SPECTRA = PLANES = P0


# -- stage 1: spectra to planes -------------------------------------------------------------------


def _to_planes(spectra, planes, work, tables):
    """Transform spectra (3, 2K + 1, ky, 2 kz) along x; planes are exchanged (parts swapped)."""
    x, y = work[0], work[1]
    lanes = tables[2]
    z = y if PASSES % 2 else x
    for f in range(VELOCITIES):
        for row in range(spectra.shape[2]):
            for block in range(planes.shape[2]):
                LOAD(spectra[f], row, block, x, lanes)
                FORWARD(x, y, x, z, tables)
                SPREAD(z, planes, f, block, row)


def _load(spectrum, column, block, x, lanes):
    """Load a block of columns, parts exchanged."""
    first = block * LANES
    width = min(lanes, spectrum.shape[2] // 2 - first)
    for row in range(2 * K + 1):
        o = (row if row <= K else row + N - 2 * K - 1) * LANES
        re, im, line = x[o:], x[o + APART :], spectrum[row, column, 2 * first :]
        for q in range(width):
            re[q] = line[2 * q + 1]
            im[q] = line[2 * q]
    for o in range((K + 1) * LANES, (N - K) * LANES):
        x[o] = 0
        x[o + APART] = 0


def _spread(z, planes, f, block, row):
    """Store LANES lines of N points to one row ky of all planes."""
    o = 2 * LANES * row
    for i in range(N):
        out = planes[i, f, block, o:]
        re, im = z[i * LANES :], z[i * LANES + APART :]
        for q in range(LANES):
            out[q] = re[q]
            out[q + LANES] = im[q]


# -- stage 2: a plane -----------------------------------------------------------------------------


def _to_rows(plane, mixed, work, tables):
    """Transform the three velocities of a plane along y to a mixed plane."""
    x, y = work[0], work[1]
    for f in range(VELOCITIES):
        for block in range(plane.shape[1]):
            FILL(plane[f, block], x)
            FORWARD(x, y, x, mixed[f, block], tables)


def _fill(rows, x):
    """Load the retained rows ky of a block."""
    for row in range(2 * K + 1):
        o = (row if row <= K else row + N - 2 * K - 1) * LANES
        re, im, line = x[o:], x[o + APART :], rows[2 * LANES * row :]
        for q in range(LANES):
            re[q] = line[q]
            im[q] = line[q + LANES]
    for o in range((K + 1) * LANES, (N - K) * LANES):
        x[o] = 0
        x[o + APART] = 0


def _multiply(mixed, rows, work, tables):
    """Replace a mixed plane of velocities, exchanged, by twice that of the five products."""
    x, y, w, t, s = work[0], work[1], work[2], work[3], work[4]
    places = tables[3]
    z = y if PASSES % 2 else x
    for first in range(0, rows, PAIRS):
        PACK(mixed[2], mixed[2], first, first + 1, places, x)
        FORWARD(x, y, x, z, tables)
        for o in range(N * LANES):
            w[o] = z[o + APART]
            w[o + APART] = z[o]
        for odd in range(2):
            PACK(mixed[0], mixed[1], first + odd, first + odd, places, x)
            FORWARD(x, y, x, z, tables)
            MULTIPLY_LINES(z, w[odd * APART :], x, t, s[odd * APART :])
            FORWARD(x, y, x, z, tables)
            UNPACK(z, mixed[0], mixed[1], first + odd, first + odd, places)
            FORWARD(t, y, t, y if PASSES % 2 else t, tables)
            UNPACK(y if PASSES % 2 else t, mixed[3], mixed[4], first + odd, first + odd, places)
        FORWARD(s, y, s, y if PASSES % 2 else s, tables)
        UNPACK(y if PASSES % 2 else s, mixed[2], mixed[2], first, first + 1, places)


def _pack(a, b, at_a, at_b, places, x):
    """Combine every second row of two mixed fields to complex lines a + i b, exchanged.

    The modes -k, which are not stored, are the conjugates of those at k.
    """
    apart = a.shape[1] // 2
    for k in range(K + 1):
        block, lane = places[k] // LANES, places[k] % LANES
        i, j = at_a * LANES + lane, at_b * LANES + lane
        ui, ur, vi, vr = a[block, i:], a[block, i + apart :], b[block, j:], b[block, j + apart :]
        here, there = x[k * LANES :], x[(N - k) * LANES if k else 0 :]
        for q in range(LANES):
            j = 2 * q * LANES
            there[q] = vr[j] - ui[j]
            there[q + APART] = ur[j] + vi[j]
            here[q] = ui[j] + vr[j]
            here[q + APART] = ur[j] - vi[j]
    for q in range(LANES):
        x[q] = b[0, (at_b + 2 * q) * LANES + apart]
        x[q + APART] = a[0, (at_a + 2 * q) * LANES + apart]
    for o in range((K + 1) * LANES, (N - K) * LANES):
        x[o] = 0
        x[o + APART] = 0


def _multiply_lines(z, w, x, t, s):
    """Multiply: u + i v, exchanged, and w to (uu - ww) + i (vv - ww), uw + i vw and uv."""
    for o in range(N * LANES):
        u, v, c = z[o + APART], z[o], w[o]
        x[o] = (u - c) * (u + c)
        x[o + APART] = (v - c) * (v + c)
        t[o] = u * c
        t[o + APART] = v * c
        s[o] = u * v


def _unpack(z, a, b, at_a, at_b, places):
    """Split spectra of complex lines a + i b in twice those of a and of b, every second row.

    ``z(k) + conj z(-k) = 2 a(k)``, and the difference is ``2 i b(k)``.
    """
    apart = a.shape[1] // 2
    for k in range(K + 1):
        block, lane = places[k] // LANES, places[k] % LANES
        i, j = at_a * LANES + lane, at_b * LANES + lane
        ar, ai, br, bi = a[block, i:], a[block, i + apart :], b[block, j:], b[block, j + apart :]
        here, there = z[k * LANES :], z[(N - k) * LANES if k else 0 :]
        for q in range(LANES):
            j = 2 * q * LANES
            ar[j] = here[q] + there[q]
            ai[j] = here[q + APART] - there[q + APART]
            br[j] = here[q + APART] + there[q + APART]
            bi[j] = there[q] - here[q]


def _from_rows(mixed, plane, work, tables):
    """Transform the five products of a mixed plane back along y to a plane."""
    x, y = work[0], work[1]
    z = x if PASSES % 2 else y
    for f in range(PRODUCTS):
        for block in range(plane.shape[1]):
            FORWARD(mixed[f, block], x, y, z, tables)
            KEEP(z, plane[f, block])


def _keep(z, rows):
    """Store the retained rows ky of a block."""
    for row in range(2 * K + 1):
        o = (row if row <= K else row + N - 2 * K - 1) * LANES
        re, im, line = z[o:], z[o + APART :], rows[2 * LANES * row :]
        for q in range(LANES):
            line[q] = re[q]
            line[q + LANES] = im[q]


def _planes(planes, mixed, work, tables):
    """Replace planes of velocities by planes of products."""
    for i in range(planes.shape[0]):
        TO_ROWS(planes[i], mixed, work, tables)
        MULTIPLY(mixed, N, work, tables)
        FROM_ROWS(mixed, planes[i], work, tables)


# -- stage 3: planes to spectra -------------------------------------------------------------------


def _to_spectra(planes, factors, out, work, tables):
    """Transform the products back along x and store -P div, (3, 2K + 1, ky, 2 kz)."""
    x, y = work[0], work[1]
    lanes = tables[2]
    kx, ky, kz, inverse = factors
    for row in range(out.shape[2]):
        for block in range(planes.shape[2]):
            for f in range(PRODUCTS):
                COLLECT(planes, f, block, row, x)
                FORWARD(x, y, x, work[2 + f], tables)
            PROJECT(work, kx, ky[row], kz, inverse, row, block, out, lanes)


def _collect(planes, f, block, row, x):
    """Load LANES lines of N points from one row ky of all planes."""
    o = 2 * LANES * row
    for i in range(N):
        line = planes[i, f, block, o:]
        re, im = x[i * LANES :], x[i * LANES + APART :]
        for q in range(LANES):
            re[q] = line[q]
            im[q] = line[q + LANES]


def _project(work, kx, y, kz, inverse, column, block, out, lanes):  # noqa: PLR0913 - a kernel
    """Store -P div of five spectra. The wavenumbers kz are zero beyond the last block's end."""
    first = block * LANES
    width = min(lanes, out.shape[3] // 2 - first)
    real, imag, z = work[0], work[1], kz[first:]
    for row in range(2 * K + 1):
        o = (row if row <= K else row + N - 2 * K - 1) * LANES
        x = kx[row]
        for part in range(2):
            a = o + part * APART
            xx, yy, xy = work[2][a:], work[3][a:], work[4][a:]
            xz, yz = work[5][a:], work[6][a:]
            target = imag if part == 0 else real
            for q in range(LANES):
                fx = x * xx[q] + y * xy[q] + z[q] * xz[q]
                fy = x * xy[q] + y * yy[q] + z[q] * yz[q]
                fz = x * xz[q] + y * yz[q]
                p = (x * fx + y * fy + z[q] * fz) * inverse[row, column, first + q]
                target[q] = x * p - fx
                target[q + LANES] = y * p - fy
                target[q + 2 * LANES] = z[q] * p - fz
        for c in range(3):
            line = out[c, row, column, 2 * first :]
            for q in range(width):
                line[2 * q] = -real[q + c * LANES]
                line[2 * q + 1] = imag[q + c * LANES]


# -- loops over members, the leading axis ---------------------------------------------------------


def _whole(spectra, planes, mixed, factors, out, work, tables):
    for i in range(spectra.shape[0]):
        TO_PLANES(spectra[i], planes, work, tables)
        PLANES(planes, mixed, work, tables)
        TO_SPECTRA(planes, factors, out[i], work, tables)


def _all_to_planes(spectra, planes, work, tables):
    for i in range(spectra.shape[0]):
        TO_PLANES(spectra[i], planes[i], work, tables)


def _all_planes(planes, mixed, work, tables):
    for i in range(planes.shape[0]):
        PLANES(planes[i], mixed, work, tables)


def _all_to_rows(planes, mixed, work, tables):
    for i in range(planes.shape[0]):
        for x in range(planes.shape[1]):
            TO_ROWS(planes[i, x], mixed[i, x], work, tables)


def _multiply_all(mixed, rows, work, tables):
    for i in range(mixed.shape[0]):
        for x in range(mixed.shape[1]):
            MULTIPLY(mixed[i, x], rows, work, tables)


def _all_from_rows(mixed, planes, work, tables):
    for i in range(planes.shape[0]):
        for x in range(planes.shape[1]):
            FROM_ROWS(mixed[i, x], planes[i, x], work, tables)


def _all_to_spectra(planes, factors, out, work, tables):
    for i in range(out.shape[0]):
        TO_SPECTRA(planes[i], factors, out[i], work, tables)


@dataclass(frozen=True)
class Programs:
    """Compiled functions of one size; each is compiled at its first call."""

    whole: Any
    to_planes: Any
    planes: Any
    to_rows: Any
    multiply: Any
    from_rows: Any
    to_spectra: Any


@functools.cache
def programs(size: int) -> Programs:
    """Return the functions for cubes of ``size`` points per side, which must have radices."""
    names: dict[str, Any] = {"N": size, "K": retained_modes(size), "APART": apart(size)}
    names["FORM"] = _FORM
    add_transform(names)
    parts = (_load, _spread, _fill, _keep, _pack, _multiply_lines, _unpack, _collect, _project)
    stages = (_to_planes, _to_rows, _multiply, _from_rows, _to_spectra, _planes)
    for part in (*parts, *stages):
        names[part.__name__[1:].upper()] = specialise(part, names)
    on_pencils = (_all_to_rows, _multiply_all, _all_from_rows)
    members = (_whole, _all_to_planes, _all_planes, *on_pencils, _all_to_spectra)
    return Programs(*[jit.cached(with_names(template, names)) for template in members])


def apart(rows: int) -> int:
    """Return how many numbers the imaginary parts of ``(rows, LANES)`` are after the real ones."""
    return line_kernels.apart(-(-rows // PAIRS) * PAIRS)
