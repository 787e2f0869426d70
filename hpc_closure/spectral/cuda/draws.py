"""Draw the modes of a half plane on a device, with the counters of the host.

:mod:`~hpc_closure.spectral.noise.counters` draws words member by member on the host. Here one
kernel draws them for all members and places them on the modes. The host sends only keys and the
number of the draw. The uniforms have the same bits as on the host.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.modes.half_plane import ModeDraws
from hpc_closure.spectral.noise.counters import WORDS_PER_COUNTER, key_of

BLOCK = 128
ENSEMBLES = 16  # largest number of ensembles whose keys are cached on the device


class DeviceDraws:
    """Draw modes (steps, members, box, 2) with their standard deviations.

    Args:
        draws: modes, and the number of the draw for each.
        std: (box) standard deviations, float64.
        device: device on which they are drawn.
    """

    def __init__(self, draws: ModeDraws, std: np.ndarray, device: torch.device):
        from hpc_closure.spectral.cuda.kernels import PHILOX_CONSTANTS

        source, sign = draws.assignment()
        self.counters = -(-draws.num_drawn // WORDS_PER_COUNTER)
        self.source = torch.from_numpy(source).to(device, torch.int32)
        self.sign = torch.from_numpy(sign).to(device, torch.int32)
        self.std = torch.from_numpy(std.ravel() * np.sqrt(0.5)).to(device)
        self.first = torch.zeros(1, dtype=torch.int64, device=device)
        self.constants = torch.tensor(PHILOX_CONSTANTS, dtype=torch.int64, device=device)

    def fill(
        self, out: Tensor, keys: Tensor, stream: int, first: int = 0, item: int = 0
    ) -> Tensor:
        """Fill ``out`` (steps, members, box, 2) with draws of steps ``first ...`` of an item."""
        from hpc_closure.spectral.cuda.kernels import draw_kernel

        self.first.fill_(first)
        size, (steps, members) = len(self.source), out.shape[:2]
        draw_kernel[(steps * members, -(-size // BLOCK))](
            out,
            keys,
            self.constants,
            self.first,
            self.source,
            self.sign,
            self.std,
            members,
            size,
            self.counters,
            stream,
            item,
            BLOCK=BLOCK,
        )
        return out


def keys_on(device: torch.device, keys: Sequence[np.ndarray]) -> Tensor:
    """Copy Philox keys (members, 2) to a device, as int64."""
    return torch.from_numpy(np.stack(keys).view(np.int64)).to(device)


@lru_cache(maxsize=ENSEMBLES)
def member_keys(seed: int, stage: str, members: tuple[int, ...], device: str) -> Tensor:
    """Compute Philox keys (members, 2) of an experiment; cached for the next calls."""
    return keys_on(torch.device(device), [key_of(seed, stage, member) for member in members])


def white_on(
    draws: ModeDraws,
    device: torch.device,
    key: tuple[int, str, Sequence[int]],
    stream: int,
    item: int,
) -> Tensor:
    """Draw white noise of unit variance, (members, box) complex128, on a device.

    Args:
        draws: the modes.
        device: the device.
        key: seed, stage and ids of the members.
        stream, item: stream and number of the draw.
    """
    seed, stage, ids = key
    keys = member_keys(seed, stage, tuple(ids), str(device))
    out = torch.empty(1, len(ids), *draws.box, 2, dtype=torch.float64, device=device)
    return torch.view_as_complex(_unit(draws, device).fill(out, keys, stream, item=item)[0])


@lru_cache(maxsize=8)
def _unit(draws: ModeDraws, device: torch.device) -> DeviceDraws:
    """Create the draws of modes with unit variance; cached by modes and device."""
    return DeviceDraws(draws, np.ones(draws.box), device)
