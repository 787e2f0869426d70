"""The counter-based draws of :mod:`counters` with torch operations, for any device.

The same uniform bits as on the CPU, word for word; normals agree to the last few bits of float64
(logarithm, sine and cosine are the device's). Used where Triton is not at hand.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.counters import WORDS_PER_COUNTER

_LOW = 0xFFFFFFFF


def _signed(word: int) -> int:
    """Value of an int64 with these 64 bits."""
    return word - (1 << 64) if word >= 1 << 63 else word


MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
#: both pairs as int64, in the order that the Triton kernel reads
CONSTANTS = tuple(_signed(word) for word in (*MULTIPLIERS, *WEYL))


def keys_on(keys: list[np.ndarray], device) -> Tensor:
    """Philox keys of members, ``(members, 2)`` int64 with the bits of the uint64 keys."""
    return torch.from_numpy(np.stack(keys).view(np.int64)).to(device)


def _shift(word: Tensor) -> Tensor:
    """Logical shift by 32."""
    return (word >> 32) & _LOW


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low half of the 128-bit product; int64 products wrap, so the low half is plain."""
    low, high = word & _LOW, _shift(word)
    m_low, m_high = multiplier & _LOW, multiplier >> 32
    cross, cross2, bottom = low * m_high, high * m_low, low * m_low
    middle = _shift(bottom) + (cross & _LOW) + (cross2 & _LOW)
    top = high * m_high + _shift(cross) + _shift(cross2) + _shift(middle)
    return top, word * _signed(multiplier)


def uniform_bits_on(keys: Tensor, stream: int, first: int, num_counters: int) -> Tensor:
    """Words of counters ``first + 1 .. first + num_counters`` of each member.

    Args:
        keys: ``(members, 2)`` int64.
        stream: what the draw is for.
        first: counters already used by earlier items.
        num_counters: counters to use now.

    Returns:
        ``(members, 4 * num_counters)`` int64 with the bits of the uint64 words.
    """
    index = torch.arange(first + 1, first + 1 + num_counters, device=keys.device)
    c0 = index.expand(len(keys), -1)
    c1, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    c2 = torch.full_like(c0, stream)
    k0, k1 = keys[:, :1], keys[:, 1:]
    for _ in range(10):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + CONSTANTS[2], k1 + CONSTANTS[3]
    return torch.stack([c0, c1, c2, c3], -1).reshape(len(keys), -1)


def complex_normals_on(keys: Tensor, stream: int, first: int, num: int, width: int) -> Tensor:
    """Complex normals of items ``first .. first + num - 1``, ``(num, members, width)``."""
    counters = -(-width // WORDS_PER_COUNTER)
    words = uniform_bits_on(keys, stream, first * counters, num * counters)
    words = words.reshape(len(keys), num, -1)[..., :width].transpose(0, 1)
    radius = ((_shift(words).double() + 0.5) * 2.0**-32).log().mul(-2.0).sqrt()
    angle = (words & _LOW).double() * (2.0 * math.pi * 2.0**-32)
    return torch.complex(radius * angle.cos(), radius * angle.sin())
