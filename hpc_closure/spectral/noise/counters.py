"""Random draws that depend on seed, stage, member and purpose, never on how work is arranged.

Uniform bits come from the counter-based generator Philox4x64-10 (Salmon et al., SC 2011). The key
is a digest of (seed, stage, member). The counter is (position, item, stream, 0), a word of 64 bits
each. If an item is a call, its draws may have any number; a path has steps with equal numbers of
draws, placed one after the other in item 0. So a member's draws are the same in any batch, on any
rank, in any order and after any restart, and no file stores a generator state.

Each 64-bit word gives two uniforms of 32 bits and, by Box-Muller in float64, one complex or two
real normals. The radius has 32 bits, so ``|z| <= sqrt(2 log 2^33) = 6.76``. The tail beyond is
missing; a real normal would fall there once in 7e10 draws.
"""

from __future__ import annotations

import hashlib
import threading
from functools import lru_cache

import numpy as np

WORDS_PER_COUNTER = 4
_LOCAL = threading.local()

# Streams of one (seed, stage, member): the purpose of a draw.
STREAM_INITIAL = 1
STREAM_PATH = 2
STREAM_STATIONARY = 3
STREAM_REGIME = 4
STREAM_EVENTS = 5
STREAM_BRIDGE = 1 << 16  # + level


@lru_cache(maxsize=1 << 16)  # an ensemble draws at every call
def key_of(seed: int, stage: str, member: int) -> np.ndarray:
    """Return the Philox key ``(2,)`` uint64 of a member: the first 128 bits of a SHA-256."""
    digest = hashlib.sha256(f"{int(seed)}/{stage}/{int(member)}".encode()).digest()
    key = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
    key.setflags(write=False)
    return key


def uniform_bits(
    key: np.ndarray, stream: int, first: int, num_counters: int, item: int = 0
) -> np.ndarray:
    """Return the words of counters ``(first + 1 .. first + num_counters, item, stream, 0)``.

    Args:
        key: ``(2,)`` uint64.
        stream: purpose of the draw.
        first: counters that earlier steps of a path have used.
        num_counters: counters to use now, four words each.
        item: number of a call, which has a counter word of its own; 0 for a path.

    Returns:
        ``(4 * num_counters,)`` uint64.
    """
    generator = getattr(_LOCAL, "philox", None)
    if generator is None:
        generator = _LOCAL.philox = np.random.Philox(key=0)
        _LOCAL.state = generator.state
    state = _LOCAL.state
    state["state"]["key"] = key
    state["state"]["counter"] = np.array([first, item, stream, 0], dtype=np.uint64)
    state["buffer_pos"] = WORDS_PER_COUNTER
    generator.state = state
    return generator.random_raw(num_counters * WORDS_PER_COUNTER)


def uniforms(key: np.ndarray, stream: int, item: int, first: int, counters: int) -> np.ndarray:
    """Return uniform numbers in (0, 1) of 53 bits, four per counter of an item, ``(4 counters,)``.

    Args:
        key, stream, item, first: as in :func:`uniform_bits`.
        counters: counters to use.
    """
    words = uniform_bits(key, stream, first, counters, item)
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def uniform(key: np.ndarray, stream: int, item: int) -> float:
    """Return the first uniform number of an item."""
    return float(uniforms(key, stream, item, 0, 1)[0])


# cos and sin of 2 pi j / 4096: a third of libm's cost, and the same bits with every libm.
_TURN_BITS = 12
_COS = np.cos(2 * np.pi * np.arange(1 << _TURN_BITS) / (1 << _TURN_BITS))
_SIN = np.sin(2 * np.pi * np.arange(1 << _TURN_BITS) / (1 << _TURN_BITS))


def box_muller(words: np.ndarray) -> np.ndarray:
    """Return complex normals with ``E |z|^2 = 2`` from 64-bit words, of the same shape.

    ``z = sqrt(-2 log((h + 1/2) / 2^32)) exp(2 pi i l / 2^32)``, h and l the high and low half of a
    word. Real and imaginary part are independent standard normals. The angle is the sum of a table
    entry and a remainder below 2 pi / 4096, for which short series are exact.
    """
    radius = (words >> np.uint64(32)).astype(np.float64)
    radius += 0.5
    radius *= 2.0**-32
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    low = words.astype(np.uint32)
    index = (low >> np.uint32(32 - _TURN_BITS)).astype(np.intp)
    remainder = (low & np.uint32((1 << (32 - _TURN_BITS)) - 1)).astype(np.float64)
    remainder *= 2.0 * np.pi * 2.0**-32
    square = remainder * remainder
    sin = square * (1 / 120)
    sin -= 1 / 6
    sin *= square
    sin += 1.0
    sin *= remainder
    cos = square * (1 / 24)
    cos -= 0.5
    cos *= square
    cos += 1.0
    cos *= radius
    sin *= radius
    cos_table, sin_table = _COS.take(index), _SIN.take(index)
    out = np.empty(words.shape, dtype=np.complex128)
    np.subtract(cos_table * cos, np.multiply(sin_table, sin, out=square), out=out.real)
    sin_table *= cos
    cos_table *= sin
    np.add(sin_table, cos_table, out=out.imag)
    return out


def complex_normals(key: np.ndarray, stream: int, first: int, num: int, width: int) -> np.ndarray:
    """Return complex normals of steps ``first .. first + num - 1``, ``(num, width)``.

    ``E |z|^2 = 2``. A step uses ``ceil(width / 4)`` counters, so any step can be drawn by itself.
    ``width`` must be the same for all steps of a path.
    """
    counters = -(-width // WORDS_PER_COUNTER)
    words = uniform_bits(key, stream, first * counters, num * counters)
    return box_muller(words.reshape(num, counters * WORDS_PER_COUNTER)[:, :width])


def standard_normals(
    seed: int,
    stage: str,
    member: int,
    *,
    stream: int = 0,
    first: int = 0,
    num: int = 1,
    width: int,
) -> np.ndarray:
    """Return real standard normals ``(num, width)`` of steps ``first .. first + num - 1``."""
    z = complex_normals(key_of(seed, stage, member), stream, first, num, -(-width // 2))
    return z.view(np.float64)[:, :width]
