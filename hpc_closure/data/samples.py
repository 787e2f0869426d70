"""Training samples in an order that depends on seed and step only.

The samples seen by a training form one endless stream: epoch after epoch, each a permutation of
all samples drawn from a counter. Position p of the stream belongs to step p // batch, whatever
number of processes share the batch, so a process reads any step's samples without knowing the
earlier ones.

A set that fits ``budget`` is held in memory, on the device if that has room. A larger one is
streamed: trajectories are cut into runs of consecutive snapshots, runs are shuffled, and a window
of runs is shuffled again while the next one is read in the background, in file order.
"""

import copy
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from hpc_closure.data.symmetry import Symmetry
from hpc_closure.spectral.counters import key_of, uniform_bits

RUN = 16  # consecutive snapshots that stay together while streaming
GAP = 4  # snapshots that are rather read in vain than skipped
STREAM = 10


class Store(Protocol):
    """What is read of a :class:`hpc_closure.data.reader.DataSet`."""

    members: Sequence[int]
    times: np.ndarray
    grid: int

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

    def window_of(self, position: int) -> tuple[int, int]:
        """(epoch, window) of a stream position."""
        epoch, inside = divmod(position, self.num_samples)
        return epoch, inside // self.window

    def window_start(self, epoch: int, window: int) -> int:
        return epoch * self.num_samples + window * self.window

    def window_samples(self, epoch: int, window: int) -> np.ndarray:
        """Samples of a window in the order of the stream."""
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


class TrainingSet:
    """Samples (state, target[, history]) of some trajectories.

    Args:
        store: the data set.
        members: trajectories to use.
        indices: stored times to use.
        grid: read fields strided to this grid; None = as stored.
        history: earlier stored states given with each sample.
        budget: bytes that may be held in memory.
        seed: of order and symmetries.
    """

    def __init__(
        self,
        store: Store,
        members: Sequence[int],
        indices: range | None = None,
        *,
        grid: int | None = None,
        history: int = 0,
        budget: int = 2**32,
        seed: int = 0,
    ):
        indices = range(len(store.times)) if indices is None else indices
        first = max(indices.start, history)
        self.indices = range(first, indices.stop)
        self.members = np.asarray(members, dtype=np.int64)
        if not len(self.members) or not len(self.indices):
            raise ValueError(
                f"no samples: {len(self.members)} trajectories and {len(self.indices)} of "
                f"{len(store.times)} stored times; generate more, or widen train.split or "
                "train.window"
            )
        self.chosen = np.arange(len(self.members))
        self.store, self.grid = store, grid or store.grid
        self.history, self.seed = history, seed
        self.symmetry: Symmetry | None = None
        self.num_samples = len(self.members) * len(self.indices)
        self.sample_bytes = 4 * self.grid**2 * 2
        self.resident = self.num_samples * self.sample_bytes <= budget
        self.device = torch.device("cpu")
        self.window = 0
        if self.resident:
            self._state, self._target = self._read_all()
        else:
            self.window = max(1, budget // (2 * (2 + history) * self.grid**2 * 4) // RUN) * RUN
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        """The stream of the chosen trajectories, from its beginning."""
        self.num_samples = len(self.chosen) * len(self.indices)
        self.order = Order(self.num_samples, self.seed, RUN if self.window else 0, self.window)
        self._reader: ThreadPoolExecutor | None = None
        self._windows: dict[tuple[int, int], Future] = {}

    def __len__(self) -> int:
        return self.num_samples

    def augmented(self, symmetry: Symmetry) -> "TrainingSet":
        """The same samples, each moved by a drawn map in :meth:`batch`."""
        other = copy.copy(self)
        other.symmetry = symmetry
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
            if self.num_samples * self.sample_bytes < free // 2:
                self._state = self._state.to(device)
                self._target = self._target.to(device)
        return self

    def _read_all(self) -> tuple[torch.Tensor, torch.Tensor]:
        """States (members, lead + times, n, n) and targets (members, times, n, n), float32."""
        lead, times = self.history, len(self.indices)
        state = torch.empty(len(self.members), lead + times, self.grid, self.grid)
        target = torch.empty(len(self.members), times, self.grid, self.grid)
        earlier = slice(self.indices.start - lead, self.indices.stop)
        now = slice(self.indices.start, self.indices.stop)
        for row, member in enumerate(self.members):
            read = self.store.read
            state[row] = torch.from_numpy(
                np.ascontiguousarray(read(int(member), earlier, "vorticity", self.grid))
            )
            target[row] = torch.from_numpy(
                np.ascontiguousarray(read(int(member), now, "closure", self.grid))
            )
        return state, target

    def _rows(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(trajectory, time) of sample numbers, both from 0."""
        rows, times = np.divmod(samples, len(self.indices))
        return self.chosen[rows], times

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
        time = torch.as_tensor(times, device=where)
        fields = {
            "state": self._state[row, time + self.history],
            "target": self._target[row, time],
        }
        if self.history:
            back = torch.arange(1, self.history + 1, device=where)
            fields["history"] = self._state[row[:, None], time[:, None] + self.history - back]
        return fields

    def _read(self, rows: np.ndarray, times: np.ndarray) -> dict[str, torch.Tensor]:
        """Read samples from the files, in file order."""
        shape = (len(rows), self.grid, self.grid)
        out = {"state": np.empty(shape, np.float32), "target": np.empty(shape, np.float32)}
        if self.history:
            out["history"] = np.empty((len(rows), self.history, *shape[1:]), np.float32)
        for places in _near(rows, times):
            member, lead = int(self.members[rows[places[0]]]), self.history
            start, stop = (self.indices[times[places[end]]] for end in (0, -1))
            with self._lock:  # the store is not made for threads
                state = self.store.read(
                    member, slice(start - lead, stop + 1), "vorticity", self.grid
                )
                target = self.store.read(member, slice(start, stop + 1), "closure", self.grid)
            offset = times[places] - times[places[0]]
            out["state"][places] = state[offset + lead]
            out["target"][places] = target[offset]
            for back in range(self.history):
                out["history"][places, back] = state[offset + lead - (back + 1)]
        return {key: torch.from_numpy(value) for key, value in out.items()}

    def _finish(self, fields, rows, times, numbers) -> dict[str, Any]:
        batch = {key: value.to(self.device) for key, value in fields.items()}
        # keys of random draws are read on the CPU, one by one
        batch["sample_index"] = torch.as_tensor(numbers)
        batch["member"] = torch.as_tensor(self.members[rows])
        batch["time_index"] = torch.as_tensor(times + self.indices.start)
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
        else:
            fields = self._from_windows(positions, share or Share())
        batch = self._finish(fields, rows, times, positions)
        if self.symmetry is not None:
            elements = self.symmetry.draw(self.seed, first, count)
            for key in ("state", "target", "history"):
                if key in batch:
                    batch[key] = self.symmetry.apply(batch[key], elements)
        return batch

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

    def passes(self, size: int = 256) -> Iterator[dict[str, Any]]:
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
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
        self._reader = None
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

    def holds(self, positions: np.ndarray) -> np.ndarray:
        return (positions % self.batch) * self.size // self.batch == self.rank
