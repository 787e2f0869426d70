"""Keyed draws: equal (seed, stage, id, item) give equal numbers in any batch, on any rank."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpc_closure.closure.band import Band
from hpc_closure.spectral.counters import complex_normals, key_of, uniform_bits

__all__ = ["Key", "pair", "uniforms", "white_spectra", "normals"]

# Streams of one (seed, stage, id): what a draw is for. Stochastic steps use STREAM_STEP + step.
STREAM_CHOICE = 101
STREAM_BASE = 102
STREAM_SENSOR = 103
STREAM_MEMORY = 1 << 7
STREAM_STEP = 1 << 8

LARGEST_INDEX = (1 << 31) - 2  # an id of two is below 2^63


class Key(NamedTuple):
    """What a draw is for; the functions below take it unpacked.

    Attributes:
        seed: of the experiment.
        stage: of its use, such as ``train`` or ``sample``.
        ids: one for each row drawn.
        item: step or call.
    """

    seed: int
    stage: str
    ids: Sequence[int]
    item: int


def pair(first: int, second: int) -> int:
    """One id for two indices, such as a case and a member, so that each draws for itself.

    ``2^32 (first + 1) + second``: different pairs have different ids, and none is an index by
    itself. An id fits a signed word and is in no file; the key of its draws is a hash of it.

    Raises:
        ValueError: an index is negative or beyond.
    """
    for index in (first, second):
        if not 0 <= index <= LARGEST_INDEX:
            raise ValueError(f"index {index} of a draw: expected 0 to {LARGEST_INDEX}")
    return ((int(first) + 1) << 32) + int(second)


def _keys(seed: int, stage: str, ids: Sequence[int]) -> list[np.ndarray]:
    return [key_of(seed, stage, int(one)) for one in ids]


def uniforms(seed: int, stage: str, ids: Sequence[int], item: int, width: int = 4) -> Tensor:
    """Uniforms in (0, 1), (len(ids), width <= 4), float64."""
    words = np.stack([uniform_bits(k, STREAM_CHOICE, item, 1) for k in _keys(seed, stage, ids)])
    return torch.from_numpy(((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)[
        :, :width
    ]


def normals(
    seed: int, stage: str, ids: Sequence[int], item: int, width: int, stream: int = STREAM_SENSOR
) -> Tensor:
    """Standard normals (len(ids), width), float64."""
    half = -(-width // 2)
    rows = [complex_normals(k, stream, item, 1, half)[0] for k in _keys(seed, stage, ids)]
    return torch.from_numpy(np.stack(rows).view(np.float64)[:, :width].copy())


def white_spectra(
    band: Band, seed: int, stage: str, ids: Sequence[int], item: int, stream: int = STREAM_BASE
) -> Tensor:
    """Spectra (len(ids), 2K + 1, K + 1), complex128, of real white noise with E|z_hat|^2 = 1."""
    width = band.half_plane.num_drawn
    rows = [complex_normals(k, stream, item, 1, width)[0] for k in _keys(seed, stage, ids)]
    return band.white(np.stack(rows))
