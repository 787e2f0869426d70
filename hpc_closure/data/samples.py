"""Training samples in an order that depends on seed and step only.

The samples of a training form an endless stream: epoch after epoch, each a permutation of all
samples drawn from a counter. Position p of the stream belongs to step p // batch for any number of
processes that share the batch. So a process reads the samples of any step without reading earlier
ones.

A set of at most ``budget`` bytes is held in memory, on the device if that has room. A larger set
is streamed: trajectories are cut into runs of consecutive snapshots, the runs are shuffled, and a
window of runs is shuffled again while the next window is read in the background, in file order.
For a GPU the next batch is also assembled in the background, in pinned memory, from which it is
copied while the GPU computes.
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
from hpc_closure.spectral.modes.resolution import per_side
from hpc_closure.spectral.noise.counters import key_of, uniform_bits
from hpc_closure.spectral.switches import pinning

RUN = 16  # consecutive snapshots that stay together while streaming
PASS = 256  # samples per batch of a pass over all samples, of up to PASS_POINTS points each
PASS_POINTS = 64**2
GAP = 4  # unused snapshots that are read rather than skipped by a second read
STREAM = 10


class Store(Protocol):
    """The parts of a :class:`hpc_closure.data.reader.DataSet` that a training set reads."""

    members: Sequence[int]
    times: np.ndarray
    grid: int
    dimensions: int
    channels: tuple[str, ...]

    def read(
        self, member: int, index: int | slice, field: str = "state", grid: int | None = None
    ) -> np.ndarray: ...


def permutation(seed: int, stage: str, number: int, size: int) -> np.ndarray:
    """Return permutation ``number`` of 0 ... size - 1, drawn from a counter: no state."""
    key = key_of(seed, stage, number)
    words = uniform_bits(key, STREAM, 0, -(-size // 4))[:size]
    return np.argsort(words, kind="stable")


class Order:
    """Sample numbers along the stream.

    Args:
        num_samples: number of samples, ordered trajectory by trajectory.
        seed: seed of the shuffling.
        run: consecutive samples that stay in one window; 0 = shuffle all samples together.
        window: samples per window, a multiple of ``run``.
    """

    def __init__(self, num_samples: int, seed: int, run: int = 0, window: int = 0):
        self.num_samples, self.seed, self.run = num_samples, seed, run
        self.window = window if run else num_samples
        self._cache: dict[tuple[int, int], np.ndarray] = {}
        self._lock = threading.Lock()

    def window_of(self, position: int) -> tuple[int, int]:
        """Return (epoch, window) of a stream position."""
        epoch, inside = divmod(position, self.num_samples)
        return epoch, inside // self.window

    def window_start(self, epoch: int, window: int) -> int:
        return epoch * self.num_samples + window * self.window

    def window_samples(self, epoch: int, window: int) -> np.ndarray:
        """Return the samples of a window in the order of the stream."""
        with self._lock:
            if (epoch, window) not in self._cache:
                while len(self._cache) > 3:
                    self._cache.pop(next(iter(self._cache)))
                self._cache[epoch, window] = self._draw(epoch, window)
            return self._cache[epoch, window]

    def _draw(self, epoch: int, window: int) -> np.ndarray:
        if not self.run:
            return permutation(self.seed, "order", epoch, self.num_samples)
        runs = permutation(self.seed, "runs", epoch, -(-self.num_samples // self.run))
        samples = (runs[:, None] * self.run + np.arange(self.run)).ravel()
        samples = samples[samples < self.num_samples]
        samples = samples[window * self.window :][: self.window]
        return samples[permutation(self.seed, f"window {window}", epoch, len(samples))]

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Return the sample numbers at stream positions (in increasing order)."""
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
        states: number of earlier states, ``history``.
        closures: number of earlier closures, ``previous``.
    """

    states: int = 0
    closures: int = 0

    @property
    def lead(self) -> int:
        """Return the number of stored times that must precede a sample."""
        return max(self.states, self.closures)


class TrainingSet:
    """Samples (state, target[, history, previous, ahead]) of some trajectories.

    Args:
        store: the data set.
        members: trajectories to use.
        indices: stored times to use, increasing; times without enough earlier ones are left out.
        grid: points per side to which fields are strided; None = as stored.
        past: which earlier times a sample holds.
        budget: bytes that may be held in memory.
        seed: seed of order and symmetries.

    Raises:
        ValueError: no samples.
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
        self.points = per_side(self.grid, store.dimensions)
        #: shape of a state: (n, n), or (C, n, n) of C channels
        self.shape = (*[len(names) for names in [store.channels] if names], *self.points)
        self.seed = seed
        # stored times in units of their smallest distance, so that neighbours differ by one
        spacing = np.diff(store.times).min(initial=np.inf)
        self.moments = np.round((store.times - store.times[0]) / spacing).astype(np.int64)
        self.symmetry: Symmetry | None = None  # symmetries of the samples
        self.flow: Symmetry | None = None  # symmetries of states with the states that follow
        # all stored times from the first to the last that a sample needs
        self.span = slice(int(self.indices[0]) - past.lead, int(self.indices[-1]) + 1)
        times = self.span.stop - self.span.start
        self.bytes = len(self.members) * times * 4 * math.prod(self.shape) * 2
        self.resident = self.bytes <= budget
        self.device = torch.device("cpu")
        self.budget = budget
        if self.resident:
            self._state, self._target = self._read_all()
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        """Start the stream of the chosen trajectories from its beginning."""
        self.window = 0
        if not self.resident:
            fields = 2 + self.past.states + self.past.closures + self.ahead
            size = 2 * fields * math.prod(self.shape) * 4
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
        """Return the same samples, each mapped by a drawn symmetry in :meth:`batch`.

        Args:
            symmetry: symmetries of states with their targets.
            flow: symmetries of states with the states that follow; None = ``symmetry``.
        """
        other = copy.copy(self)
        other.symmetry, other.flow = symmetry, flow or symmetry
        other._start()
        return other

    def followed(self, count: int) -> "TrainingSet":
        """Return the samples that have ``count`` following stored times, with these states.

        They are ``ahead`` in a batch.

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
                f"no stored time is followed by {count} others: generate longer, or lower "
                "train.rollout_training.horizon"
            )
        other._start()
        return other

    def part(self, index: int, count: int) -> "TrainingSet":
        """Return every ``count``-th trajectory from ``index`` on; all if there are too few."""
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
        """Return states and targets (members, times of the span, *shape), float32."""
        times = self.span.stop - self.span.start
        state = torch.empty(len(self.members), times, *self.shape)
        target = torch.empty_like(state)
        for row, member in enumerate(self.members):
            for destination, name in ((state, "state"), (target, "closure")):
                field = self.store.read(int(member), self.span, name, self.grid)
                destination[row] = torch.from_numpy(np.ascontiguousarray(field))
        return state, target

    def _rows(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (trajectory from 0, index of the stored time) of sample numbers."""
        rows, times = np.divmod(samples, len(self.indices))
        return self.chosen[rows], self.indices[times]

    def gather(self, samples: np.ndarray) -> dict[str, Any]:
        """Return the samples with these numbers, not mapped, on the device."""
        rows, times = self._rows(np.asarray(samples))
        if self.resident:
            fields = self._gather_resident(rows, times)
        else:
            fields = self._read(rows, times)
        return self._finish(fields, rows, times, np.asarray(samples))

    def _gather_resident(self, rows: np.ndarray, times: np.ndarray) -> dict[str, torch.Tensor]:
        device = self._state.device
        row = torch.as_tensor(rows, device=device)
        time = torch.as_tensor(times - self.span.start, device=device)
        fields = {"state": self._state[row, time], "target": self._target[row, time]}
        sources = {"state": self._state, "target": self._target}
        for name, (field, steps) in self._other_times.items():
            offset = torch.as_tensor(steps, device=device)
            fields[name] = sources[field][row[:, None], time[:, None] + offset]
        return fields

    @property
    def _other_times(self) -> dict[str, tuple[str, np.ndarray]]:
        """Return the entries of a batch at other times: name -> (field, offsets in times)."""
        entries = {
            "history": ("state", -np.arange(1, self.past.states + 1)),
            "previous": ("target", -np.arange(1, self.past.closures + 1)),
            "ahead": ("state", np.arange(1, self.ahead + 1)),
        }
        return {name: (field, steps) for name, (field, steps) in entries.items() if len(steps)}

    def _read(self, rows: np.ndarray, times: np.ndarray) -> dict[str, torch.Tensor]:
        """Read samples from the files, in file order."""
        shape = (len(rows), *self.shape)
        out = {"state": np.empty(shape, np.float32), "target": np.empty(shape, np.float32)}
        for name, (_, steps) in self._other_times.items():
            out[name] = np.empty((len(rows), len(steps), *shape[1:]), np.float32)
        for positions in _group_reads(rows, times):
            member = int(self.members[rows[positions[0]]])
            first = int(times[positions[0]]) - self.past.lead
            span = slice(first, int(times[positions[-1]]) + self.ahead + 1)
            with self._lock:  # the store is not thread-safe
                state, target = (
                    self.store.read(member, span, name, self.grid) for name in ("state", "closure")
                )
            offset = times[positions] - first
            sources = {"state": state, "target": target}
            for name, source in sources.items():
                out[name][positions] = source[offset]
            for name, (field, steps) in self._other_times.items():
                out[name][positions] = sources[field][offset[:, None] + steps]
        return {key: torch.from_numpy(value) for key, value in out.items()}

    def _finish(self, fields, rows, times, numbers) -> dict[str, Any]:
        batch = {key: value.to(self.device, non_blocking=True) for key, value in fields.items()}
        # the CPU reads the keys of random draws, so they stay there
        batch["sample_index"] = torch.as_tensor(numbers)
        batch["member"] = torch.as_tensor(self.members[rows])
        batch["time_index"] = torch.as_tensor(times)
        batch["moment"] = torch.as_tensor(self.moments[times])
        return batch

    def batch(self, first: int, count: int, share: "Share | None" = None) -> dict[str, Any]:
        """Return the samples at stream positions ``first ... first + count - 1``.

        ``sample_index`` is the position, which keys all draws for a sample.
        """
        positions = np.arange(first, first + count)
        samples = self.order.samples(positions)
        rows, times = self._rows(samples)
        if self.resident:
            fields = self._gather_resident(rows, times)
        elif self.device.type == "cuda":
            fields = self._prefetched(first, count, share or Share())
        else:
            fields = self._from_windows(positions, share or Share())
        batch = self._finish(fields, rows, times, positions)
        if self.symmetry is not None:
            elements = self.symmetry.draw(self.seed, first, count)
            for key in ("state", "target", *self._other_times):
                batch[key] = self.symmetry.apply(batch[key], elements)
        return batch

    def _prefetched(self, first: int, count: int, share: "Share") -> dict[str, torch.Tensor]:
        """Return a streamed batch in pinned memory, and start assembling the next one.

        Only one thread works on windows.
        """
        if self._packer is None:
            device = (self.device,)  # a new thread would use the first device
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
            positions_held, fields = self._window(window, share).result()
            selected = positions[
                (positions >= positions_held[0]) & (positions <= positions_held[-1])
            ]
            index = torch.from_numpy(np.searchsorted(positions_held, selected))
            parts.append({key: value[index] for key, value in fields.items()})
        following = self.order.window_of(
            self.order.window_start(*window) + len(self.order.window_samples(*window))
        )
        self._window(following, share)
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def _window(self, window: tuple[int, int], share: "Share") -> Future:
        """Return this process's samples of a window, read in the background.

        The last two windows are cached.
        """
        if window not in self._windows:
            if self._reader is None:
                self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")
            while len(self._windows) > 1:
                self._windows.pop(min(self._windows))
            samples = self.order.window_samples(*window)
            positions = self.order.window_start(*window) + np.arange(len(samples))
            is_mine = share.holds(positions)
            self._windows[window] = self._reader.submit(
                lambda: (positions[is_mine], self._read(*self._rows(samples[is_mine])))
            )
        return self._windows[window]

    @property
    def pass_size(self) -> int:
        """Number of samples per batch of a pass; fewer of large fields, for the sake of memory."""
        return max(16, min(PASS, PASS * PASS_POINTS // math.prod(self.points)))

    def passes(self, size: int = 0) -> Iterator[dict[str, Any]]:
        """Yield all samples once, trajectory by trajectory, in batches on the device."""
        size = size or self.pass_size
        for first in range(0, self.num_samples, size):
            yield self.gather(np.arange(first, min(first + size, self.num_samples)))

    def some(self, count: int) -> np.ndarray:
        """Return up to ``count`` sample numbers, spread evenly (0 = all)."""
        if not count or count >= self.num_samples:
            return np.arange(self.num_samples)
        return (np.arange(count) * self.num_samples) // count

    def close(self) -> None:
        """Stop reading in the background; a later batch starts it again."""
        for executor in (self._packer, self._reader):  # in this order: the packer uses the reader
            if executor is not None:
                executor.shutdown(cancel_futures=True)
        self._packer = self._reader = self._next = None
        self._windows = {}


def _group_reads(rows: np.ndarray, times: np.ndarray) -> list[np.ndarray]:
    """Group samples into reads: one trajectory, small gaps in time, file order.

    Returns:
        Positions of the samples of each read.
    """
    order = np.lexsort((times, rows))
    starts_new = (np.diff(rows[order]) != 0) | (np.diff(times[order]) > GAP)
    return np.split(order, np.flatnonzero(starts_new) + 1)


class Share:
    """The stream positions of one process: its slice of every global batch."""

    def __init__(self, batch: int = 1, rank: int = 0, size: int = 1):
        self.batch, self.rank, self.size = batch, rank, size

    def after(self, first: int, count: int) -> int:
        """Return the first position of this process's next samples.

        Args:
            first, count: position and number of the present samples.
        """
        following = first + count
        is_mine = self.holds(np.asarray(following))
        return following if is_mine else following + self.batch - self.batch // self.size

    def holds(self, positions: np.ndarray) -> np.ndarray:
        """Return whether this process holds the positions, elementwise."""
        return (positions % self.batch) * self.size // self.batch == self.rank
