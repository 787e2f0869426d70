"""Triton kernels of the GPU step: draws, products of velocities, update and next velocity.

A step of the published scheme in the Basdevant form takes two library transforms and two of these
kernels; one more kernel draws the noise of many steps. :mod:`~hpc_closure.spectral.cuda.steps`
combines them.
"""

import triton
import triton.language as tl


def _signed(word: int) -> int:
    """Return the int64 with these 64 bits."""
    return word - (1 << 64) if word >= 1 << 63 else word


#: Philox4x64's two multipliers and two Weyl increments (Salmon et al. 2011) as int64
PHILOX_CONSTANTS = tuple(
    _signed(word)
    for word in (
        0xD2E7470EE14C6C93,
        0xCA5A826395121157,
        0x9E3779B97F4A7C15,
        0xBB67AE8584CAA73B,
    )
)


@triton.jit
def _philox(c0, c1, c2, k0, k1, m0, m1, w0, w1):
    """Compute Philox4x64-10 of counters ``(c0, c1, c2, 0)``."""
    c3 = c0 ^ c0
    for _ in tl.static_range(10):
        high0 = tl.umulhi(m0, c0)
        low0 = m0 * c0
        high1 = tl.umulhi(m1, c2)
        low1 = m1 * c2
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + w0
        k1 = k1 + w1
    return c0, c1, c2, c3


@triton.jit
def draw_kernel(
    out,  # (steps, members, box, 2) in the working precision
    keys,  # (members, 2) int64
    constants,  # (4,) int64: PHILOX_CONSTANTS
    first,  # (1,) int64: the first step
    source,  # (box,) int32: draw of each mode of the box; num_drawn for none
    sign,  # (box,) int32: 1, or -1 for a conjugate, or 0 for the real mean
    std,  # (box,) float64, zero for none
    members,
    size,  # modes in the box
    counters,  # counters per step
    stream,
    item,
    BLOCK: tl.constexpr,
):
    """Draw rates ``std * z`` in the box of drawn modes, with the words of :mod:`counters`."""
    row = tl.program_id(0).to(tl.int64)
    step, member = row // members, row % members
    mode = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = mode < size
    index = tl.load(source + mode, mask=inside, other=0).to(tl.int64)
    kind = tl.load(sign + mode, mask=inside, other=1)
    scale = tl.load(std + mode, mask=inside, other=0.0)
    counter = (tl.load(first) + step) * counters + index // 4 + 1
    c0 = counter.to(tl.uint64, bitcast=True)
    c1 = (counter * 0 + item).to(tl.uint64, bitcast=True)
    c2 = (counter * 0 + stream).to(tl.uint64, bitcast=True)
    k0 = tl.load(keys + 2 * member).to(tl.uint64, bitcast=True)
    k1 = tl.load(keys + 2 * member + 1).to(tl.uint64, bitcast=True)
    m0 = tl.load(constants).to(tl.uint64, bitcast=True)
    m1 = tl.load(constants + 1).to(tl.uint64, bitcast=True)
    w0 = tl.load(constants + 2).to(tl.uint64, bitcast=True)
    w1 = tl.load(constants + 3).to(tl.uint64, bitcast=True)
    a, b, c, d = _philox(c0, c1, c2, k0, k1, m0, m1, w0, w1)
    fourth = index % 4
    word = tl.where(fourth == 0, a, tl.where(fourth == 1, b, tl.where(fourth == 2, c, d)))
    high = (word >> 32).to(tl.int64).to(tl.float64)
    low = (word & 0xFFFFFFFF).to(tl.int64).to(tl.float64)
    radius = scale * tl.sqrt(-2.0 * tl.log((high + 0.5) * 2.3283064365386963e-10))
    angle = low * 1.4629180792671596e-09
    real = radius * tl.cos(angle)
    imag = radius * tl.sin(angle) * kind.to(tl.float64)
    real = tl.where(kind == 0, real * 1.4142135623730951, real)
    target = out + (row * size + mode) * 2
    tl.store(target, real, mask=inside)
    tl.store(target + 1, imag, mask=inside)


@triton.jit
def product_kernel(fields, size, BLOCK: tl.constexpr):
    """Compute ``(u, v) -> (u v, (v - u)(v + u))`` in place; ``size`` points per field."""
    point = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = point < size
    u = tl.load(fields + point, mask=inside)
    v = tl.load(fields + size + point, mask=inside)
    tl.store(fields + point, u * v, mask=inside)
    tl.store(fields + size + point, (v - u) * (v + u), mask=inside)


@triton.jit(do_not_specialize=["offset"])
def update_kernel(
    w,  # (members, R, C, 2), changed in place
    products,  # (2, members, n, width, 2): transforms of u v and v^2 - u^2
    velocity,  # (2, members, n, width, 2): receives the next velocity's spectra
    symbols,  # (6, R, C): a, b, s_uv, s_difference, f_u, f_v
    base,  # (members, R, C, 2): steady forcing and closure
    rates,  # (steps, members, box rows, box columns, 2)
    step,  # (1,) int64: row of rates
    offset,  # added to step
    members,
    n,
    width,
    R,
    C,
    box_rows,
    box_columns,
    ADVANCE: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute ``w = a w + b (s_uv P + s_difference Q + base + rate)``, then ``velocity = i f w``.

    Without ADVANCE only the velocity of the present w is computed.
    """
    member = tl.program_id(0).to(tl.int64)
    mode = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    size = R * C
    inside = mode < size
    row, column = mode // C, mode % C
    line = tl.where(row <= R // 2, row, row + n - R)
    here = (member * size + mode) * 2
    real = tl.load(w + here, mask=inside)
    imag = tl.load(w + here + 1, mask=inside)
    there = ((member * n + line) * width + column) * 2
    second = members.to(tl.int64) * n * width * 2
    if ADVANCE:
        a = tl.load(symbols + mode, mask=inside)
        b = tl.load(symbols + size + mode, mask=inside)
        s = tl.load(symbols + 2 * size + mode, mask=inside)
        t = tl.load(symbols + 3 * size + mode, mask=inside)
        p_real = tl.load(products + there, mask=inside)
        p_imag = tl.load(products + there + 1, mask=inside)
        q_real = tl.load(products + second + there, mask=inside)
        q_imag = tl.load(products + second + there + 1, mask=inside)
        rate_real = s * p_real + t * q_real + tl.load(base + here, mask=inside)
        rate_imag = s * p_imag + t * q_imag + tl.load(base + here + 1, mask=inside)
        if NOISE:
            drawn = inside & (column < box_columns)
            drawn = drawn & ((row <= box_rows // 2) | (row >= R - box_rows // 2))
            box_row = tl.where(row <= box_rows // 2, row, row - R + box_rows)
            block = (tl.load(step) + offset) * members + member
            place = ((block * box_rows + box_row) * box_columns + column) * 2
            rate_real += tl.load(rates + place, mask=drawn, other=0.0)
            rate_imag += tl.load(rates + place + 1, mask=drawn, other=0.0)
        real = a * real + b * rate_real
        imag = a * imag + b * rate_imag
        tl.store(w + here, real, mask=inside)
        tl.store(w + here + 1, imag, mask=inside)
    f_u = tl.load(symbols + 4 * size + mode, mask=inside)
    f_v = tl.load(symbols + 5 * size + mode, mask=inside)
    tl.store(velocity + there, -f_u * imag, mask=inside)
    tl.store(velocity + there + 1, f_u * real, mask=inside)
    tl.store(velocity + second + there, -f_v * imag, mask=inside)
    tl.store(velocity + second + there + 1, f_v * real, mask=inside)
