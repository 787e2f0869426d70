"""Training samples in an order that depends on seed and step only.

The samples seen by a training form one endless stream: epoch after epoch, each a permutation of
all samples drawn from a counter. Position p of the stream belongs to step p // batch, whatever
number of processes share the batch, so a process reads any step's samples without knowing the
earlier ones.

A set that fits ``budget`` is held in memory, on the device if that has room. A larger one is
streamed: trajectories are cut into runs of consecutive snapshots, runs are shuffled, and a window
of runs is shuffled again while the next one is read in the background, in file order. For a GPU
the next batch is put together in the background, too, in pinned memory, from where it is copied
while the GPU computes.
"""

import copy
import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from hpc_closure.data.symmetry import Symmetry
from hpc_closure.spectral.noise.counters import key_of, uniform_bits
from hpc_closure.spectral.switches import pinning

RUN = 16  # consecutive snapshots that stay together while streaming
PASS = 256  # samples that are read together where all of them are
GAP = 4  # snapshots that are rather read in vain than skipped
STREAM = 10


class Store(Protocol):
    """What is read of a :class:`hpc_closure.data.reader.DataSet`."""

    members: Sequence[int]
    times: np.ndarray
    grid: int
    dimensions: int

    def read(
        self, member: int, index: int | slice, field: str = "vorticity", grid: int | None = None
    ) -> np.ndarray: ...


def permutation(seed: int, stage: str, number: int, size: int) -> np.ndarray:
    """Permutation ``number`` of 0 ... size - 1, from a counter: equal everywhere, no state."""
    key = key_of(seed, stage, number)
    words = uniform_bits(key, STREAM, 0, -(-size // 4))[:size]
    return np.argsort(words, kind="stable")


class Order:
    """Sample numbers along the stream.

    Args:
        num_samples: all samples, trajectory by trajectory.
        seed: of the shuffling.
        run: samples that stay in one window; 0 = shuffle everything with everything.
        window: samples per window, a multiple of ``run``.
    """

    def __init__(self, num_samples: int, seed: int, run: int = 0, window: int = 0):
        self.num_samples, self.seed, self.run = num_samples, seed, run
        self.window = window if run else num_samples
        self._kept: dict[tuple[int, int], np.ndarray] = {}
        self._lock = threading.Lock()

    def window_of(self, position: int) -> tuple[int, int]:
        """(epoch, window) of a stream position."""
        epoch, inside = divmod(position, self.num_samples)
        return epoch, inside // self.window

    def window_start(self, epoch: int, window: int) -> int:
        return epoch * self.num_samples + window * self.window

    def window_samples(self, epoch: int, window: int) -> np.ndarray:
        """Samples of a window in the order of the stream."""
        with self._lock:
            if (epoch, window) not in self._kept:
                while len(self._kept) > 3:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[epoch, window] = self._draw(epoch, window)
            return self._kept[epoch, window]

    def _draw(self, epoch: int, window: int) -> np.ndarray:
        if not self.run:
            return permutation(self.seed, "order", epoch, self.num_samples)
        runs = permutation(self.seed, "runs", epoch, -(-self.num_samples // self.run))
        samples = (runs[:, None] * self.run + np.arange(self.run)).ravel()
        samples = samples[samples < self.num_samples]
        samples = samples[window * self.window :][: self.window]
        return samples[permutation(self.seed, f"window {window}", epoch, len(samples))]

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Sample numbers at stream positions (in increasing order)."""
        out = np.empty(len(positions), dtype=np.int64)
        done = 0
        while done < len(positions):
            epoch, window = self.window_of(int(positions[done]))
            order, start = self.window_samples(epoch, window), self.window_start(epoch, window)
            inside = positions[done:] - start
            inside = inside[inside < len(order)]
            out[done : done + len(inside)] = order[inside]
            done += len(inside)
        return out


@dataclass(frozen=True)
class Past:
    """What a sample holds of the stored times before it, newest first.

    Attributes:
        states: how many earlier states, ``history``.
        closures: how many earlier closures, ``previous``.
    """

    states: int = 0
    closures: int = 0

    @property
    def lead(self) -> int:
        """Stored times that must be before a sample."""
        return max(self.states, self.closures)


class TrainingSet:
    """Samples (state, target[, history, previous, ahead]) of some trajectories.

    Args:
        store: the data set.
        members: trajectories to use.
        indices: stored times to use, increasing; those without their past are left out.
        grid: read fields strided to this grid; None = as stored.
        past: what is given of the times before each sample.
        budget: bytes that may be held in memory.
        seed: of order and symmetries.
    """

    def __init__(
        self,
        store: Store,
        members: Sequence[int],
        indices: Sequence[int] | np.ndarray | None = None,
        *,
        grid: int | None = None,
        past: Past = Past(),
        budget: int = 2**32,
        seed: int = 0,
    ):
        indices = np.arange(len(store.times)) if indices is None else np.asarray(indices, int)
        self.past, self.ahead = past, 0
        self.indices = indices[indices >= past.lead]
        self.members = np.asarray(members, dtype=np.int64)
        if not len(self.members) or not len(self.indices):
            raise ValueError(
                f"no samples: {len(self.members)} trajectories and {len(self.indices)} of "
                f"{len(store.times)} stored times; generate more, or widen train.split or "
                "train.window"
            )
        self.chosen = np.arange(len(self.members))
        self.store, self.grid = store, grid or store.grid
        # a line is a square of one row
        self.points = (1 if store.dimensions == 1 else self.grid, self.grid)
        self.seed = seed
        # stored times in units of their least distance: neighbours differ by one
        least = np.diff(store.times).min(initial=np.inf)
        self.moments = np.round((store.times - store.times[0]) / least).astype(np.int64)
        self.symmetry: Symmetry | None = None  # of the samples
        self.flow: Symmetry | None = None  # of what follows them
        # all stored times from the first one that a sample needs to the last
        self.span = slice(int(self.indices[0]) - past.lead, int(self.indices[-1]) + 1)
        times = self.span.stop - self.span.start
        self.bytes = len(self.members) * times * 4 * math.prod(self.points) * 2
        self.resident = self.bytes <= budget
        self.device = torch.device("cpu")
        self.budget = budget
        if self.resident:
            self._state, self._target = self._read_all()
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        """The stream of the chosen trajectories, from its beginning."""
        self.window = 0
        if not self.resident:
            fields = 2 + self.past.states + self.past.closures + self.ahead
            size = 2 * fields * math.prod(self.points) * 4
            self.window = max(1, self.budget // size // RUN) * RUN
        self.num_samples = len(self.chosen) * len(self.indices)
        self.order = Order(self.num_samples, self.seed, RUN if self.window else 0, self.window)
        self._reader: ThreadPoolExecutor | None = None
        self._windows: dict[tuple[int, int], Future] = {}
        self._packer: ThreadPoolExecutor | None = None
        self._next: tuple[tuple[int, int], Future] | None = None

    def __len__(self) -> int:
        return self.num_samples

    def augmented(self, symmetry: Symmetry, flow: Symmetry | None = None) -> "TrainingSet":
        """The same samples, each moved by a drawn map in :meth:`batch`.

        Args:
            symmetry: of states with their targets.
            flow: of states with what follows them; None = that, too.
        """
        other = copy.copy(self)
        other.symmetry, other.flow = symmetry, flow or symmetry
        other._start()
        return other

    def followed(self, count: int) -> "TrainingSet":
        """The samples that ``count`` stored times follow, each with these states: ``ahead``.

        Raises:
            ValueError: there are none.
        """
        other = copy.copy(self)
        other.symmetry = self.flow
        end = self.indices + count
        inside = end < self.span.stop
        moments = self.moments[np.minimum(end, self.span.stop - 1)] - self.moments[self.indices]
        other.ahead, other.indices = count, self.indices[inside & (moments == count)]
        if not len(other.indices):
            raise ValueError(
                f"no stored time is followed by {count} others: record longer, or lower "
                "train.trajectory.calls"
            )
        other._start()
        return other

    def part(self, index: int, count: int) -> "TrainingSet":
        """Every ``count``-th trajectory from number ``index`` on; all when there are too few."""
        other = copy.copy(self)
        if len(self.chosen) >= count:
            other.chosen = self.chosen[index::count]
        other._start()
        return other

    def to(self, device: torch.device) -> "TrainingSet":
        """Hold the samples on ``device`` if they leave half of its memory free."""
        self.device = device
        if self.resident and device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if self.bytes < free // 2:
                self._state = self._state.to(device)
                self._target = self._target.to(device)
        return self

    def _read_all(self) -> tuple[torch.Tensor, torch.Tensor]:
        """States and targets (members, times of the span, n, n), float32."""
        times = self.span.stop - self.span.start
        state = torch.empty(len(self.members), times, *self.points)
        target = torch.empty_like(state)
        for row, member in enumerate(self.members):
            for into, name in ((state, "vorticity"), (target, "closure")):
                field = self.store.read(int(member), self.span, name, self.grid)
                into[row] = torch.from_numpy(np.ascontiguousarray(field))
        return state, target

    def _rows(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(trajectory from 0, index of the stored time) of sample numbers."""
        rows, times = np.divmod(samples, len(self.indices))
        return self.chosen[rows], self.indices[times]

    def gather(self, samples: np.ndarray) -> dict[str, Any]:
        """The samples by number, unchanged, on the device."""
        rows, times = self._rows(np.asarray(samples))
        if self.resident:
            fields = self._gather_resident(rows, times)
        else:
            fields = self._read(rows, times)
        return self._finish(fields, rows, times, np.asarray(samples))

    def _gather_resident(self, rows: np.ndarray, times: np.ndarray) -> dict[str, torch.Tensor]:
        where = self._state.device
        row = torch.as_tensor(rows, device=where)
        time = torch.as_tensor(times - self.span.start, device=where)
        fields = {"state": self._state[row, time], "target": self._target[row, time]}
        sources = {"state": self._state, "target": self._target}
        for name, (field, steps) in self.beside.items():
            away = torch.as_tensor(steps, device=where)
            fields[name] = sources[field][row[:, None], time[:, None] + away]
        return fields

    @property
    def beside(self) -> dict[str, tuple[str, np.ndarray]]:
        """What a batch holds of other times, by name: which field, and how many times away."""
        every = {
            "history": ("state", -np.arange(1, self.past.states + 1)),
            "previous": ("target", -np.arange(1, self.past.closures + 1)),
            "ahead": ("state", np.arange(1, self.ahead + 1)),
        }
        return {name: (field, steps) for name, (field, steps) in every.items() if len(steps)}

    def _read(self, rows: np.ndarray, times: np.ndarray) -> dict[str, torch.Tensor]:
        """Read samples from the files, in file order."""
        shape = (len(rows), *self.points)
        out = {"state": np.empty(shape, np.float32), "target": np.empty(shape, np.float32)}
        for name, (_, steps) in self.beside.items():
            out[name] = np.empty((len(rows), len(steps), *shape[1:]), np.float32)
        for places in _near(rows, times):
            member = int(self.members[rows[places[0]]])
            first = int(times[places[0]]) - self.past.lead
            span = slice(first, int(times[places[-1]]) + self.ahead + 1)
            with self._lock:  # the store is not made for threads
                state, target = (
                    self.store.read(member, span, name, self.grid)
                    for name in ("vorticity", "closure")
                )
            offset = times[places] - first
            sources = {"state": state, "target": target}
            for name, source in sources.items():
                out[name][places] = source[offset]
            for name, (field, steps) in self.beside.items():
                out[name][places] = sources[field][offset[:, None] + steps]
        return {key: torch.from_numpy(value) for key, value in out.items()}

    def _finish(self, fields, rows, times, numbers) -> dict[str, Any]:
        batch = {key: value.to(self.device, non_blocking=True) for key, value in fields.items()}
        # keys of random draws are read on the CPU, one by one
        batch["sample_index"] = torch.as_tensor(numbers)
        batch["member"] = torch.as_tensor(self.members[rows])
        batch["time_index"] = torch.as_tensor(times)
        batch["moment"] = torch.as_tensor(self.moments[times])
        return batch

    def batch(self, first: int, count: int, share: "Share | None" = None) -> dict[str, Any]:
        """Samples at stream positions ``first ... first + count - 1``.

        ``sample_index`` is the position, so everything drawn for a sample is keyed by it.
        """
        positions = np.arange(first, first + count)
        samples = self.order.samples(positions)
        rows, times = self._rows(samples)
        if self.resident:
            fields = self._gather_resident(rows, times)
        elif self.device.type == "cuda":
            fields = self._made_ready(first, count, share or Share())
        else:
            fields = self._from_windows(positions, share or Share())
        batch = self._finish(fields, rows, times, positions)
        if self.symmetry is not None:
            elements = self.symmetry.draw(self.seed, first, count)
            for key in ("state", "target", *self.beside):
                batch[key] = self.symmetry.apply(batch[key], elements)
        return batch

    def _made_ready(self, first: int, count: int, share: "Share") -> dict[str, torch.Tensor]:
        """A streamed batch in pinned memory; the process's next one is then made ready.

        One thread has all to do with windows.
        """
        if self._packer is None:
            device = (self.device,)  # of a new thread it would be the first
            self._packer = ThreadPoolExecutor(1, "pack", torch.cuda.set_device, device)

        def pack(first: int) -> tuple[tuple[int, int], Future]:
            assert self._packer is not None
            return (first, count), self._packer.submit(self._pinned, first, count, share)

        if self._next is None or self._next[0] != (first, count):
            self._next = pack(first)
        fields = self._next[1].result()
        self._next = pack(share.after(first, count))
        return fields

    def _pinned(self, first: int, count: int, share: "Share") -> dict[str, torch.Tensor]:
        fields = self._from_windows(np.arange(first, first + count), share)
        with pinning:
            return {key: value.pin_memory() for key, value in fields.items()}

    def _from_windows(self, positions: np.ndarray, share: "Share") -> dict[str, torch.Tensor]:
        parts = []
        for window in dict.fromkeys(self.order.window_of(int(p)) for p in positions):
            mine, fields = self._window(window, share).result()
            wanted = positions[(positions >= mine[0]) & (positions <= mine[-1])]
            place = torch.from_numpy(np.searchsorted(mine, wanted))
            parts.append({key: value[place] for key, value in fields.items()})
        following = self.order.window_of(
            self.order.window_start(*window) + len(self.order.window_samples(*window))
        )
        self._window(following, share)
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def _window(self, window: tuple[int, int], share: "Share") -> Future:
        """This process's samples of a window, read in the background; the last two are kept."""
        if window not in self._windows:
            if self._reader is None:
                self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")
            while len(self._windows) > 1:
                self._windows.pop(min(self._windows))
            samples = self.order.window_samples(*window)
            positions = self.order.window_start(*window) + np.arange(len(samples))
            mine = share.holds(positions)
            self._windows[window] = self._reader.submit(
                lambda: (positions[mine], self._read(*self._rows(samples[mine])))
            )
        return self._windows[window]

    def passes(self, size: int = PASS) -> Iterator[dict[str, Any]]:
        """All samples once, trajectory by trajectory, in batches on the device."""
        for first in range(0, self.num_samples, size):
            yield self.gather(np.arange(first, min(first + size, self.num_samples)))

    def some(self, count: int) -> np.ndarray:
        """Up to ``count`` sample numbers spread evenly over trajectories and times (0 = all)."""
        if not count or count >= self.num_samples:
            return np.arange(self.num_samples)
        return (np.arange(count) * self.num_samples) // count

    def close(self) -> None:
        """End the reading in the background; a later batch starts it again."""
        for executor in (self._packer, self._reader):  # the first waits for the second
            if executor is not None:
                executor.shutdown(cancel_futures=True)
        self._packer = self._reader = self._next = None
        self._windows = {}


def _near(rows: np.ndarray, times: np.ndarray) -> list[np.ndarray]:
    """Places of samples that one read fetches: one trajectory, small gaps in time; file order."""
    order = np.lexsort((times, rows))
    apart = (np.diff(rows[order]) != 0) | (np.diff(times[order]) > GAP)
    return np.split(order, np.flatnonzero(apart) + 1)


class Share:
    """Which stream positions are one process's: its slice of every global batch."""

    def __init__(self, batch: int = 1, rank: int = 0, size: int = 1):
        self.batch, self.rank, self.size = batch, rank, size

    def after(self, first: int, count: int) -> int:
        """Where this process's next samples begin, after ``count`` of them from ``first`` on."""
        following = first + count
        mine = self.holds(np.asarray(following))
        return following if mine else following + self.batch - self.batch // self.size

    def holds(self, positions: np.ndarray) -> np.ndarray:
        return (positions % self.batch) * self.size // self.batch == self.rank
