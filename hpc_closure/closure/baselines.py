"""Baselines without a network; every table prints them beside the model."""

import math

import torch
from torch import Tensor

from hpc_closure.closure.conditions import Sensors
from hpc_closure.closure.exact import ExactLaw

__all__ = ["fourier", "physics"]


def fourier(sensors: Sensors, size: int) -> Tensor:
    """Periodic Fourier interpolation of a regular layout alone, (B, n, n).

    Raises:
        ValueError: the sensors are not a regular layout that starts at the origin.
    """
    count = len(sensors.positions)
    side = math.isqrt(count)
    values = sensors.values.double().reshape(-1, count)
    if side * side != count or not _is_regular(sensors.positions, side):
        raise ValueError(
            f"{count} sensors are not a regular square layout: nothing to interpolate"
        )
    full = torch.fft.fft2(values.reshape(-1, side, side), norm="forward")
    out = full.new_zeros(len(full), size, size)
    # an even layout's highest mode is shared equally by +k and -k, so that the field is real
    index = torch.fft.fftfreq(side, 1 / side).long()
    for row in (1, -1):
        for column in (1, -1):
            rows, columns = (
                torch.where(2 * index.abs() == side, sign * side // 2, index) % size
                for sign in (row, column)
            )
            out[:, rows[:, None], columns[None, :]] += 0.25 * full
    return torch.fft.ifft2(out, norm="forward").real


def _is_regular(positions: Tensor, side: int) -> bool:
    length = float(positions.max()) * side / max(1, side - 1)
    x = torch.arange(side, dtype=torch.float64) * (length / side)
    return bool(torch.allclose(positions, torch.cartesian_prod(x, x), atol=1e-9 * max(1, length)))


def physics(law: ExactLaw, states: Tensor, sensors: Sensors | None = None) -> Tensor:
    """The known term granted, plus the Fourier interpolation of what sensors see beyond it."""
    known = law.mean(states)
    if sensors is None:
        return known
    size = states.shape[-1]
    cells = torch.round(sensors.positions * (size / law.problem.length)).long() % size
    beyond = sensors.values.double() - known[..., cells[:, 0], cells[:, 1]]
    return known + fourier(Sensors(beyond, sensors.positions), size)
