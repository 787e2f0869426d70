"""Read block files: the data set of ``generate`` and the coupled ensemble of ``rollout``."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpc_closure.data.layout import COUNTED, STATE, BlockHeader, data_sets
from hpc_closure.work.hdf5 import hdf5_errors, open_hdf5
from hpc_closure.work.header import BLOCK

OPEN_FILES = 64  # largest number of files of a data set that are open at once
# ensembles of a rollout other than the model and the rungs
BESIDE = ("oracle", "mean_gp")
RUNG = "rung_"  # prefix of the names of bare solvers on other grids


class DataSet:
    """The trajectories of a folder of block files, read lazily.

    Attributes:
        members: sorted global member indices.
        times: stored times common to all blocks, (T,).
        grid: points per side of the stored fields.
        dimensions: dimensions of the flow, 1 to 3.
        channels: names of the fields of the state; empty if it has one.
        recipe: plain dict of the physics and numerics that made them.
        lost: members that diverged before their end.

    Raises:
        ValueError: the folder has no data files.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._rows: dict[int, tuple[Path, int]] = {}
        self._open: dict[Path, tuple[contextlib.ExitStack, h5py.File]] = {}
        paths = sorted(path for path in self.folder.glob("*.h5") if BLOCK.fullmatch(path.name))
        if not paths:
            raise ValueError(f"{self.folder}: no data files; run `hpc-closure generate` first")
        headers = []
        for path in paths:
            with hdf5_errors(path):
                header = BlockHeader.from_file(self._file(path), path)
            headers.append(header)
            self._rows |= {member: (path, row) for row, member in enumerate(header.members)}
        self.members: Sequence[int] = sorted(self._rows)
        self.lost = sorted({member for header in headers for member in header.lost_members})
        self.times: np.ndarray = min((header.times for header in headers), key=len)
        self.grid, self.dimensions = headers[0].grid, headers[0].dimensions
        self.channels = headers[0].channels
        self.recipe = headers[0].settings

    def _file(self, path: Path) -> h5py.File:
        if path not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open)))[0].close()
            closing = contextlib.ExitStack()
            self._open[path] = closing, closing.enter_context(open_hdf5(path))
        return self._open[path][1]

    def read(
        self, member: int, index: int | slice, field: str = STATE, grid: int | None = None
    ) -> np.ndarray:
        """Return a field of one trajectory: (n, n) at a time ``index``, (t, n, n) for a slice.

        Fields have as many sides as the flow, (n,) on a line. States and closures of C channels
        are (C, n, n) and (t, C, n, n).

        Args:
            member: global index of the trajectory.
            index: index of the stored time, or a slice.
            field: ``state``, the state of any flow, ``closure``, a name in ``t0_fields``, or a
                path (``t1_fields/velocity``, ``filtered/sharp_0.05``).
            grid: points per side; a number below the stored one takes every other point (strided,
                as published; for ``t0_fields``).
        """
        path, row = self._rows[member]
        file = self._file(path)
        with hdf5_errors(path):
            if "/" in field:
                values = file[field][row, index]
            else:
                values = _channels(file["t0_fields"], field, self, (row, index))
        return values if grid is None else strided_to(values, self.grid, grid, self.dimensions)

    @property
    def whole(self) -> list[int]:
        """Return the trajectories that did not diverge."""
        return sorted(set(self.members) - set(self.lost))

    def split(self, shares: Sequence[float]) -> dict[str, list[int]]:
        """Split the trajectories that did not diverge, by :func:`split_members`."""
        return split_members(self.whole, shares)

    def starts(self, shares: Sequence[float], cases: int) -> list[int]:
        """Return the first ``cases`` test trajectories, to start from.

        Raises:
            ValueError: there are fewer.
        """
        test = self.split(shares)["test"]
        if len(test) < cases:
            raise ValueError(
                f"rollout.initial_conditions={cases}, but the data hold {len(test)} test "
                f"trajectories{f' ({self.loss})' if self.loss else ''}; lower it, raise "
                "generate.members or the test share in train.split"
            )
        return test[:cases]

    @property
    def loss(self) -> str:
        """Return a sentence on the trajectories that diverged; empty if none did."""
        if not self.lost:
            return ""
        examples = ", ".join(map(str, self.lost[:5])) + (", ..." if len(self.lost) > 5 else "")
        return (
            f"{len(self.lost)} of {len(self.members)} trajectories diverged and are left out "
            f"(members {examples})"
        )

    def time_index(self, time: float) -> int:
        """Return the index of a stored time; ValueError if it was not stored."""
        index = int(np.argmin(np.abs(self.times - time)))
        if abs(self.times[index] - time) > 1e-6 * max(1.0, abs(time)):
            raise ValueError(
                f"{self.folder}: time {time:g} is not stored; "
                f"stored are {self.times[0]:g} to {self.times[-1]:g}, {len(self.times)} times"
            )
        return index

    def window(self, start: float, stop: float) -> range:
        """Return the indices of the stored times in [start, stop]."""
        inside = np.flatnonzero((self.times >= start - 1e-9) & (self.times <= stop + 1e-9))
        return range(int(inside[0]), int(inside[-1]) + 1) if len(inside) else range(0)

    def with_past(self, indices: range, lead: int, spacing: float) -> np.ndarray:
        """Return those of ``indices`` that follow ``lead`` stored times ``spacing`` apart."""
        steps = np.diff(self.times, prepend=-np.inf)
        at_spacing = np.abs(steps - spacing) <= 1e-6 * max(1.0, abs(float(self.times[-1])))
        length = np.array(list(itertools.accumulate(at_spacing, lambda n, ok: n + 1 if ok else 0)))
        chosen = np.asarray(indices, dtype=np.int64)
        return chosen[length[chosen] >= lead]

    def blocks(
        self, members: Sequence[int], indices: range, grid: int | None = None
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (member, state (t, n, n), closure (t, n, n)) trajectory by trajectory."""
        chosen = slice(indices.start, indices.stop)
        for member in members:
            state = self.read(member, chosen, STATE, grid)
            yield member, state, self.read(member, chosen, "closure", grid)

    def close(self) -> None:
        for closing, _ in self._open.values():
            closing.close()
        self._open.clear()


class CoupledEnsemble:
    """Blocks of the rollout, or of the replicas, as one ensemble.

    Attributes:
        cases: test trajectories that the runs started from.
        members: members that every case has.
        times: stored times, (T,).
        counted: ``model`` and those of BESIDE for which the rescaled draws are counted.
        start: time at lead 0: the first stored time; for replicas the time of their release.
        shared: those of ``names`` that are the same for all members of a case.
        names: names that can be read: ``model``, ``truth`` and, if they ran, ``none``, those of
            BESIDE and the rungs; for replicas ``closure``.
        rungs: names of the rungs, in the order of the file.
        channels: names of the fields of the state; empty if it has one.
        whole_times: times at which the starts are stored with all modes; empty if they are not.

    Raises:
        ValueError: there are no files.
    """

    FIELDS = (*BESIDE, "none", "closure")
    REFERENCES = ("truth", "none")

    def __init__(self, paths: Sequence[Path]):
        if not paths:
            raise ValueError("no rollout files; run `hpc-closure rollout` first")
        self._rows: dict[tuple[int, int], tuple[Path, int]] = {}
        self._cases: dict[int, tuple[Path, int]] = {}
        times: list[np.ndarray] = []
        names: set[str] | None = None
        self.counted = set(COUNTED)
        for path in paths:
            with open_hdf5(path) as file:
                header = BlockHeader.from_file(file, path)
                for row, key in enumerate(zip(file.attrs["row_case"], file.attrs["row_member"])):
                    self._rows[int(key[0]), int(key[1])] = (path, row)
                for row, case in enumerate(file.attrs["cases"]):
                    self._cases.setdefault(int(case), (path, row))
                times.append(header.times)
                self.dimensions, self.channels = header.dimensions, header.channels
                self.start = float(file.attrs.get("released", header.times[0]))
                available = {"model"}
                available |= {name for name in self.FIELDS if self._paths(name)[0] in file}
                self.rungs = self._rungs_in(file)
                available |= set(self.rungs)
                self.whole_times = file.get("dimensions/whole_time", np.empty(0))[:]
                self.shared = {
                    name for name in self.REFERENCES if self._paths(name, "references")[0] in file
                }
                available |= self.shared
                names = available if names is None else names & available
                self.counted -= {
                    name for name, series in COUNTED.items() if f"series/{series}" not in file
                }
        self.times, self.names = min(times, key=len), names or set()
        self.rungs = [name for name in self.rungs if name in self.names]
        self.select(sorted(self._cases))

    def _rungs_in(self, file: h5py.File) -> list[str]:
        """List the names of the rungs of an open file."""
        end = f"_{self.channels[0]}" if self.channels else ""
        stored = (name for name in file["t0_fields"] if name.startswith(RUNG))
        return [name.removesuffix(end) for name in stored if name.endswith(end)]

    def select(self, cases: Sequence[int]) -> None:
        """Restrict the ensemble to these cases, in this order."""
        self.cases = list(cases)
        counts = [{m for c, m in self._rows if c == case} for case in self.cases]
        self.members = sorted(set.intersection(*counts))

    def read(self, name: str, index: int) -> np.ndarray:
        """Return states at time ``index``, (M, cases, n, n); those in ``shared`` have M = 1.

        States of C channels are (M, cases, C, n, n).
        """
        if name not in self.shared:
            keys = [[self._rows[case, member] for case in self.cases] for member in self.members]
            return self._fields(self._paths(name), index, keys)
        keys = [[self._cases[case] for case in self.cases]]
        return self._fields(self._paths(name, "references"), index, keys)

    def read_rows(self, name: str, rows: Sequence[tuple[int, int]], index: int) -> np.ndarray:
        """Return a field of (case, member) pairs at time ``index``, (rows, n, n).

        Of C channels it is (rows, C, n, n).
        """
        keys = [[self._rows[row] for row in rows]]
        return self._fields(self._paths(name), index, keys)[0]

    def rescaled_counts(self, name: str, index: int) -> np.ndarray:
        """Return counts of draws from the start to time ``index``, (M, C, 2 + shells).

        The columns are the number of draws, of draws that were rescaled in any shell, and of
        draws that were rescaled in each shell. ``name`` is in ``counted``.
        """
        keys = [[self._rows[case, member] for case in self.cases] for member in self.members]
        return self._read(f"series/{COUNTED[name]}", index, keys)

    def _fields(
        self, paths: Sequence[str], index: int, keys: Sequence[Sequence[tuple[Path, int]]]
    ) -> np.ndarray:
        """Return fields of rows at time ``index``; several paths are channels, (..., C, n, n)."""
        return self._stacked([self._read(path, index, keys) for path in paths])

    def _stacked(self, fields: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack(fields, axis=-1 - self.dimensions) if self.channels else fields[0]

    @staticmethod
    def _read(
        dataset_path: str, index: int, keys: Sequence[Sequence[tuple[Path, int]]]
    ) -> np.ndarray:
        """Return rows of a data set at time ``index`` by file and row."""
        requests: dict[Path, list[tuple[int, int, int]]] = {}
        for m, line in enumerate(keys):
            for c, (path, row) in enumerate(line):
                requests.setdefault(path, []).append((m, c, row))
        states: dict[tuple[int, int], np.ndarray] = {}
        for path, rows in requests.items():
            with open_hdf5(path) as file:
                dataset = file[dataset_path]
                states |= {(m, c): dataset[row, index] for m, c, row in rows}
        return np.array([[states[m, c] for c in range(len(keys[0]))] for m in range(len(keys))])

    def _paths(self, name: str, group: str = "t0_fields") -> list[str]:
        """List the data sets of a run's fields, one per channel."""
        field = STATE if name == "model" else name
        names = data_sets(field, self.channels, self.dimensions)
        return [f"{group}/{each}" for each in names]

    def read_whole(self, case: int, time: float) -> np.ndarray:
        """Return the state of a start with all modes of the DNS: (N, N), of C channels (C, N, N).

        Raises:
            ValueError: it was not stored.
        """
        if case not in self._cases:
            raise ValueError(
                f"start {case} has no replicas, which store its state with all modes; starts with "
                f"replicas: {', '.join(map(str, sorted(self._cases)))}"
            )
        path, row = self._cases[case]
        matching = np.flatnonzero(np.abs(self.whole_times - time) < 1e-6 * max(1.0, abs(time)))
        if not len(matching):
            raise ValueError(
                f"{path}: the state of start {case} with all modes at t = {time:g} is missing: "
                f"remove {path.parent}, and run `hpc-closure generate` again"
            )
        with open_hdf5(path) as file:
            return self._stacked(
                [file[each][row, matching[0]] for each in self._paths("model", "whole")]
            )

    def read_case(self, name: str, case: int, index: int) -> np.ndarray:
        """Return a field of the ensemble of one case at time ``index``, (M, n, n).

        Of C channels it is (M, C, n, n).
        """
        keys = [[self._rows[case, member] for member in self.members]]
        return self._fields(self._paths(name), index, keys)[0]

    def index(self, lead_time: float) -> int:
        """Return the index of a lead time; ValueError if it was not stored."""
        time = self.start + lead_time
        index = int(np.argmin(np.abs(self.times - time)))
        if abs(self.times[index] - time) > 1e-6 * max(1.0, abs(time)):
            raise ValueError(f"lead time {lead_time:g} was not stored by rollout")
        return index


def _channels(
    group: h5py.Group, field: str, data: DataSet, index: tuple[int, int | slice]
) -> np.ndarray:
    """Return ``index`` of a field (..., n, n); of C channels (..., C, n, n)."""
    each = [group[name][index] for name in data_sets(field, data.channels, data.dimensions)]
    return np.stack(each, axis=-1 - data.dimensions) if len(each) > 1 else each[0]


def strided(values: np.ndarray, stride: int, dimensions: int) -> np.ndarray:
    """Return every ``stride``-th point of each side of fields (..., n, n), a view."""
    index: tuple[Any, ...] = (..., *[slice(None, None, stride)] * dimensions)
    return values[index]


def strided_to(values: np.ndarray, size: Any, grid: Any, dimensions: int) -> np.ndarray:
    """Return fields (..., n, n) of ``size`` points per side at ``grid`` of them, a view.

    A number of points per side divides the stored one; points of unequal sides are those stored.
    """
    return values if grid == size else strided(values, size // grid, dimensions)


def split_members(members: Sequence[int], shares: Sequence[float]) -> dict[str, list[int]]:
    """Split members into train, valid and test.

    Member ``i`` joins a held-out part if the cumulated share passes an integer at ``i``. So a
    growing ensemble leaves every earlier member in its part.
    """
    _, valid, test = shares
    parts: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    for member in members:
        tests = int((member + 1) * test + 1e-9) - int(member * test + 1e-9)
        held_out = int((member + 1) * (test + valid) + 1e-9) - int(member * (test + valid) + 1e-9)
        if tests:
            parts["test"].append(member)
        elif held_out:
            parts["valid"].append(member)
        else:
            parts["train"].append(member)
    return parts
