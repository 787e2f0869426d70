"""Reading the trajectories of a folder of block files, lazily."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from hpc_closure.data.layout import check_layout
from hpc_closure.work.hdf5 import hdf5_errors, open_hdf5
from hpc_closure.work.units import BLOCK

OPEN_FILES = 64  # of a data set at once


class DataSet:
    """The trajectories of a folder of block files, read lazily.

    Attributes:
        members: sorted global member indices.
        times: stored times common to all blocks, (T,).
        grid: points per side of the stored fields.
        dimensions: of the flow, 2 or 1.
        recipe: plain dict of the physics and numerics that made them.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._rows: dict[int, tuple[Path, int]] = {}
        self._open: dict[Path, tuple[contextlib.ExitStack, h5py.File]] = {}
        paths = sorted(path for path in self.folder.glob("*.h5") if BLOCK.fullmatch(path.name))
        if not paths:
            raise ValueError(f"{self.folder}: no data files; run `hpc-closure generate` first")
        times: list[np.ndarray] = []
        for path in paths:
            file = self._file(path)
            with hdf5_errors(path):
                check_layout(file, path)
            times.append(file["dimensions/time"][:])
            for row, member in enumerate(file.attrs["members"]):
                self._rows[int(member)] = (path, row)
        self.members: Sequence[int] = sorted(self._rows)
        self.times: np.ndarray = min(times, key=len)
        first = self._file(paths[0])
        self.grid = len(first["dimensions/x"])
        self.dimensions = int(first.attrs["n_spatial_dims"])
        self.recipe = json.loads(first.attrs["recipe"])
        self.attributes = {key: first.attrs[key] for key in first.attrs}

    def _file(self, path: Path) -> h5py.File:
        if path not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open)))[0].close()
            closing = contextlib.ExitStack()
            self._open[path] = closing, closing.enter_context(open_hdf5(path))
        return self._open[path][1]

    def series(self, member: int, name: str) -> np.ndarray:
        """Diagnostic ``name`` of one trajectory, (T,)."""
        path, row = self._rows[member]
        file = self._file(path)
        with hdf5_errors(path):
            return file["scalars"][name][row, : len(self.times)]

    def read(
        self, member: int, index: int | slice, field: str = "vorticity", grid: int | None = None
    ) -> np.ndarray:
        """Field of one trajectory at time ``index``: (n, n), or (t, n, n) for a slice.

        ``field`` is a name in ``t0_fields``, or a path (``t1_fields/velocity``,
        ``filtered/sharp_0.05``). ``grid`` smaller than the stored one takes every other point
        (strided, as published; of ``t0_fields`` in two dimensions).
        """
        path, row = self._rows[member]
        file = self._file(path)
        with hdf5_errors(path):
            values = (file if "/" in field else file["t0_fields"])[field][row, index]
        if grid is None:
            return values
        stride = self.grid // grid
        return values[..., ::stride, ::stride]

    def time_index(self, time: float) -> int:
        """Index of a stored time. Raises ValueError when it was not stored."""
        index = int(np.argmin(np.abs(self.times - time)))
        if abs(self.times[index] - time) > 1e-6 * max(1.0, abs(time)):
            raise ValueError(
                f"{self.folder}: time {time:g} is not stored; "
                f"stored are {self.times[0]:g} to {self.times[-1]:g}, {len(self.times)} times"
            )
        return index

    def window(self, start: float, stop: float) -> range:
        """Indices of the stored times in [start, stop]."""
        inside = np.flatnonzero((self.times >= start - 1e-9) & (self.times <= stop + 1e-9))
        return range(int(inside[0]), int(inside[-1]) + 1) if len(inside) else range(0)

    def blocks(
        self, members: Sequence[int], indices: range, grid: int | None = None
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (member, state (t, n, n), closure (t, n, n)) trajectory by trajectory."""
        chosen = slice(indices.start, indices.stop)
        for member in members:
            state = self.read(member, chosen, "vorticity", grid)
            yield member, state, self.read(member, chosen, "closure", grid)

    def close(self) -> None:
        for closing, _ in self._open.values():
            closing.close()
        self._open.clear()


def split_members(members: Sequence[int], shares: Sequence[float]) -> dict[str, list[int]]:
    """Trajectories of train, valid and test.

    Member ``i`` joins a held-out part whenever the cumulated share passes a whole number at ``i``,
    so an ensemble that grows keeps every earlier member where it was.
    """
    _, valid, test = shares
    parts: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    for member in members:
        tests = int((member + 1) * test + 1e-9) - int(member * test + 1e-9)
        held = int((member + 1) * (test + valid) + 1e-9) - int(member * (test + valid) + 1e-9)
        if tests:
            parts["test"].append(member)
        elif held:
            parts["valid"].append(member)
        else:
            parts["train"].append(member)
    return parts
