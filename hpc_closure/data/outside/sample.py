"""A sample of the stored states: pairs of neighbouring times, spread over members and times."""

import numpy as np

from hpc_closure.experiment.sources.source import CLOSURE, STATE, Source

BUDGET = 48 * 2**20  # bytes that are read
MOST, LEAST = 64, 8  # pairs that are read


class Sample:
    """Pairs of neighbouring stored states, with their closures if these are stored.

    Args:
        source: the files.
        channels: names of the fields, in order.
        budget: bytes to read.

    Attributes:
        members, times: member and first time of each pair, (P,).
        state: (P, 2, C, *points), float64.
        closure: the same, or None.
        ends: (member, time) of snapshots with the last times of further members, and whether they
            are finite.
    """

    def __init__(self, source: Source, channels: list[str], budget: int = BUDGET):
        self.source, self.channels = source, channels
        names = [name for name in (STATE, CLOSURE) if name in source.fields]
        size = len(names) * len(channels) * int(np.prod(source.points)) * source.dtype.itemsize
        count = int(np.clip(budget // (2 * size), LEAST, MOST))
        last = len(source.times) - 2  # first time of the last pair
        count = min(count, source.members * (last + 1))
        number = np.arange(count)
        self.times = np.round(np.linspace(0, last, count)).astype(int)
        step = max(1, round(0.618 * source.members))
        while np.gcd(step, source.members) > 1:
            step += 1
        self.members = number * step % source.members
        keys = list(zip(self.members.tolist(), self.times.tolist()))
        values = {
            name: np.stack([self._pair(name, member, time) for member, time in keys])
            for name in names
        }
        self.state: np.ndarray = values[STATE]
        self.closure: np.ndarray | None = values.get(CLOSURE)
        room = max(2, budget // (2 * size))
        everyone = np.unique(np.linspace(0, source.members - 1, min(room, source.members, 256)))
        self.further = [int(one) for one in np.round(everyone)]

    def _pair(self, name: str, member: int, time: int) -> np.ndarray:
        span = slice(time, time + 2)
        each = [self.source.read(member, span, name, one) for one in self.channels]
        return np.stack(each, axis=1).astype(np.float64)

    def one(self, name: str, member: int, time: int) -> np.ndarray:
        """Read one snapshot, (C, *points)."""
        span = slice(time, time + 1)
        each = [self.source.read(member, span, name, channel)[0] for channel in self.channels]
        return np.stack(each)

    @property
    def fields(self) -> dict[str, np.ndarray]:
        """Return state and closure, (P, 2, C, *points), by name."""
        found = {STATE: self.state}
        return found if self.closure is None else {**found, CLOSURE: self.closure}
