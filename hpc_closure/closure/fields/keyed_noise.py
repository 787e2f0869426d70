"""Keyed random draws: equal (seed, stage, id, item) give equal numbers in any batch, on any rank.

Each item has a counter word of its own, so draws of different items never overlap, whatever their
width. Of two draws of the same item, the narrower one is the beginning of the wider one.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpc_closure.closure.fields.modes import Band
from hpc_closure.spectral import switches
from hpc_closure.spectral.modes.grid import Grid
from hpc_closure.spectral.noise.counters import WORDS_PER_COUNTER, box_muller, key_of, uniform_bits

__all__ = ["Key", "pair", "uniforms", "white_fields", "white_spectra", "normals"]

# Streams of a (seed, stage, id), by use of the draw. Stochastic steps use STREAM_STEP + step.
STREAM_CHOICE = 101
STREAM_BASE = 102
STREAM_SENSOR = 103
STREAM_COMPONENT = 104
STREAM_MEMORY = 1 << 7
STREAM_STEP = 1 << 8

LARGEST_INDEX = (1 << 31) - 2  # so that an id of a pair is below 2^63


class Key(NamedTuple):
    """Key of a draw; the functions below take it unpacked.

    Attributes:
        seed: seed of the experiment.
        stage: name of the use, such as ``train`` or ``sample``.
        ids: an id per row of the draw.
        item: training step or closure call.
    """

    seed: int
    stage: str
    ids: Sequence[int]
    item: int


def pair(first: int, second: int) -> int:
    """Combine two indices, such as case and member, into an id with independent draws.

    The id is ``2^32 (first + 1) + second``. Different pairs have different ids, and no id of a
    pair equals a single index. It fits a signed 64-bit word and is stored in no file; the key of
    its draws is a hash of it.

    Raises:
        ValueError: an index is negative or above ``LARGEST_INDEX``.
    """
    for index in (first, second):
        if not 0 <= index <= LARGEST_INDEX:
            raise ValueError(f"index {index} of a draw: expected 0 to {LARGEST_INDEX}")
    return ((int(first) + 1) << 32) + int(second)


def _words(stream: int, key: Key, width: int) -> np.ndarray:
    """Draw raw 64-bit words (len(ids), width) of an item."""
    if key.item < 0:
        raise ValueError(f"item {key.item} of a draw: expected a step or call from 0 on")
    counters = -(-width // WORDS_PER_COUNTER)
    keys = [key_of(key.seed, key.stage, row_id) for row_id in key.ids]
    rows = [uniform_bits(row_id, stream, 0, counters, key.item) for row_id in keys]
    return np.stack(rows)[:, :width]


def uniforms(seed: int, stage: str, ids: Sequence[int], item: int, width: int = 4) -> Tensor:
    """Draw uniforms in (0, 1), (len(ids), width), float64."""
    words = _words(STREAM_CHOICE, Key(seed, stage, ids, item), width)
    return torch.from_numpy(((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


def moves(grid: Grid, seed: int, stage: str, ids: Sequence[int]) -> Tensor:
    """Draw a random shift in space per id; returns phase factors (len(ids), 2K + 1, K + 1).

    They have the shape of the grid's spectra. On a line the second number of an id is its shift,
    of three sides the third may choose what is moved.
    """
    shifts = 2 * torch.pi * uniforms(seed, stage, ids, 0)
    places = {1: [1], 2: [0, 1], 3: [0, 1, 3]}[grid.dimensions]
    parts = [
        k * shifts[(slice(None), place, *[None] * grid.dimensions)]
        for k, place in zip(grid.integer_k, places)
    ]
    return torch.exp(1j * sum(parts[1:], parts[0]))


def normals(
    seed: int, stage: str, ids: Sequence[int], item: int, width: int, stream: int = STREAM_SENSOR
) -> Tensor:
    """Draw standard normals (len(ids), width), float64; none exceeds 6.8 in magnitude."""
    rows = box_muller(_words(stream, Key(seed, stage, ids, item), -(-width // 2)))
    return torch.from_numpy(rows.view(np.float64)[:, :width].copy())


def white_spectra(
    band: Band,
    seed: int,
    stage: str,
    ids: Sequence[int],
    item: int,
    stream: int = STREAM_BASE,
    device: torch.device = torch.device("cpu"),
) -> Tensor:
    """Draw spectra (len(ids), 2K + 1, K + 1), complex128, of white noise with E|z_hat|^2 = 1.

    The fields are real. Every device gets them from the same words. The host draws and copies
    them, unless the switch ``fused`` lets the device draw.
    """
    if device.type != "cpu" and switches.is_on(switches.FUSED):
        from hpc_closure.spectral.cuda.draws import white_on

        drawn = white_on(band.half_plane, device, (seed, stage, ids), stream, item)
        return drawn.view(-1, *band.shape)  # those of a line have a row
    words = _words(stream, Key(seed, stage, ids, item), band.half_plane.num_drawn)
    return band.white(box_muller(words)).to(device)


def white_fields(
    band: Band, key: Key, stream: int, device: torch.device, channel_shape: tuple[int, ...]
) -> Tensor:
    """Draw white noise as :func:`white_spectra`, (len(ids), *channel_shape, 2K + 1, K + 1)."""
    if not channel_shape:
        return white_spectra(band, *key, stream, device)
    width = band.half_plane.num_drawn
    words = _words(stream, key, math.prod(channel_shape) * width)
    drawn = band.white(box_muller(words.reshape(-1, width))).to(device)
    return drawn.view(len(words), *channel_shape, *band.shape)
