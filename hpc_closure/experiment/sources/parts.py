"""Divide long trajectories into parts, so that training, validation and test share no time."""

from typing import TYPE_CHECKING

import numpy as np

from hpc_closure.experiment.sources.source import STATE, Source

if TYPE_CHECKING:
    from hpc_closure.experiment.data_section import Data

ENOUGH = 8  # members from which on trajectories stay whole
WANTED = 20  # parts in all that are aimed at
LEAST = 8  # fewest stored times of a part
LOOKED = 256  # stored times that are read for the correlation time
ROWS = 4  # rows of a field that are read for it


def correlation_time(source: Source, member: int = 0) -> float:
    """Return the lag in stored times at which the first state decorrelates to 1/e.

    It reads a few rows of at most 256 consecutive states. Half of what was read, if the state does
    not decorrelate within.
    """
    count = min(LOOKED, len(source.times))
    channel = next(iter(source.fields[STATE]))
    states = source.read(member, slice(0, count), STATE, channel)
    rows = np.linspace(0, states.shape[1], ROWS, endpoint=False, dtype=int)
    points = np.asarray(states[:, rows], dtype=np.float64).reshape(count, -1)
    points = points[:, np.isfinite(points).all(0)]
    if not points.size:
        return 1.0
    points = points - points.mean(0)
    size = float((points**2).mean())
    if not size:
        return 1.0
    before = 1.0
    for lag in range(1, count // 2):
        now = float((points[lag:] * points[:-lag]).mean()) / size
        if now < np.exp(-1):
            return lag - 1 + (before - np.exp(-1)) / (before - now)
        before = now
    return max(1.0, count / 2)


def divide(source: Source, data: "Data") -> tuple[int, int]:
    """Return (parts of each trajectory, stored times between them)."""
    number, stored = source.members, len(source.times)
    if data.parts == 1 or data.parts is None and number >= ENOUGH:
        return 1, 0
    if data.gap is not None:
        gap = round(data.gap / float(source.times[1] - source.times[0]))
    else:
        gap = int(np.ceil(correlation_time(source)))
    parts = data.parts or -(-WANTED // number)
    if data.parts is None:
        parts = max(1, min(parts, stored // max(LEAST + gap, 2 * gap)))
    while parts > 1 and length_of_part(stored, parts, gap) < 2:
        parts -= 1
    return parts, gap if parts > 1 else 0


def length_of_part(stored: int, parts: int, gap: int) -> int:
    """Return the stored times of each of ``parts`` parts."""
    return (stored - (parts - 1) * gap) // parts
