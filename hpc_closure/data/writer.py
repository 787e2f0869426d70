"""Trajectories on disk: The Well's HDF5 layout, one file per block of members.

::

    /                    attributes: dataset_name, grid_type, n_spatial_dims, n_trajectories,
                         simulation_parameters, members, stage_hash, recipe, provenance, complete
    /dimensions          time (T,), x (n,), y (n,)
    /boundary_conditions x_periodic, y_periodic
    /scalars             one (B, T) series per diagnostic
    /t0_fields           vorticity, closure, streamfunction: (B, T, n, n); on a line (B, T, n)
    /t1_fields           velocity: (B, T, n, n, 2)
    /filtered            one (B, T, m, m) field per filter, on its own grid
    /series              one (B, S) or (B, S, shells) series per diagnostic, at series_time
    /restart             what the solver needs to go on from the last stored time

Storage is contiguous and allocated when the file is made. Writing a snapshot then moves raw bytes
only and never the file's structure, so a file whose writer was killed still opens, and is
continued from its last restart point. A reader takes a snapshot, or a whole trajectory, in one
piece.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from hpc_closure.data.layout import check_layout
from hpc_closure.work.hdf5 import open_hdf5

LAYOUT_VERSION = 1
FIELDS = ("vorticity", "closure")
SNAPSHOTS = ("t0_fields", "t1_fields", "filtered", "scalars", "references")  # (B, T, ...) each


@dataclass(frozen=True)
class SeriesLayout:
    """Diagnostics with a time axis of their own.

    Attributes:
        times: (S,).
        widths: name of each series and the number of its values per member and time (0: one
            number, stored as (B, S)).
    """

    times: np.ndarray
    widths: Mapping[str, int] = field(default_factory=dict)


class BlockWriter:
    """Writes the block file of ``members`` snapshot by snapshot.

    Args:
        path: the unfinished file (``*.part``); an existing one is continued when it holds the same
            members, times and data sets, else made anew.
        members: global member indices, one trajectory each.
        times: stored times, (T,).
        grid: points per side.
        attributes: plain values for the root (strings, numbers, lists of them).
        fields: names of the (B, T, n, n) fields.
        series: names of the (B, T) diagnostics.
        references: rows by name of fields that are not one per member, (rows, T, n, n).
        vectors: names of the (B, T, n, n, 2) fields.
        filtered: points per side by name of (B, T, m, m) fields.
        running: diagnostics with a time axis of their own.
        precision: of the fields.
        dimensions: 2, or 1 for fields on a line, (B, T, n).

    Attributes:
        continued: whether the file was there and is gone on with.
    """

    def __init__(
        self,
        path: Path,
        members: Sequence[int],
        times: np.ndarray,
        grid: int,
        attributes: dict,
        *,
        fields: Sequence[str] = FIELDS,
        series: Sequence[str] = (),
        references: dict[str, int] | None = None,
        vectors: Sequence[str] = (),
        filtered: Mapping[str, int] | None = None,
        running: SeriesLayout | None = None,
        precision: str = "float32",
        dimensions: int = 2,
    ):
        self.path = Path(path)
        self.dimensions, self.running = dimensions, running
        self._closing = contextlib.ExitStack()
        block, side = (len(members), len(times)), (grid,) * dimensions
        self._shapes = {f"t0_fields/{name}": (*block, *side) for name in fields}
        self._shapes |= {f"t1_fields/{name}": (*block, *side, dimensions) for name in vectors}
        for name, points in (filtered or {}).items():
            self._shapes[f"filtered/{name}"] = (*block, *(points,) * dimensions)
        self._shapes |= {f"scalars/{name}": block for name in series}
        for name, rows in (references or {}).items():
            self._shapes[f"references/{name}"] = (rows, len(times), *side)
        if running is not None:
            for name, width in running.widths.items():
                more = (width,) if width else ()
                self._shapes[f"series/{name}"] = (len(members), len(running.times), *more)
        self.file = self._continue(members, times)
        self.continued = self.file is not None
        if not self.continued:
            length = float(attributes.get("length", 1.0))
            self.file = self._keep(open_hdf5(self.path, "w"))
            with contextlib.ExitStack() as unless_made:
                unless_made.callback(self.close)
                self._header(members, times, grid, length, attributes)
                for name, shape in self._shapes.items():
                    number = name.startswith(("scalars/", "series/"))
                    self._allocate(name, shape, "float64" if number else precision)
                self.file.flush()
                unless_made.pop_all()

    def _continue(self, members, times):
        if not self.path.exists():
            return None
        try:
            file = self._keep(open_hdf5(self.path, "r+"))
        except ValueError:  # its writer was killed while it made the file
            return None
        try:
            same = (
                list(file.attrs["members"]) == list(members)
                and np.array_equal(file["dimensions/time"][:], times)
                and _shapes_in(file) == self._shapes
                and (
                    self.running is None
                    or np.array_equal(file["dimensions/series_time"][:], self.running.times)
                )
            )
        except KeyError:
            same = False
        if same:
            return file
        self._closing.close()
        return None

    def _keep(self, opened) -> h5py.File:
        return self._closing.enter_context(opened)

    def _header(self, members, times, grid, length, attributes):
        root = self.file
        plain = {key: value for key, value in attributes.items() if value is not None}
        numbers = sorted(key for key, value in plain.items() if isinstance(value, (int, float)))
        root.attrs["layout_version"] = LAYOUT_VERSION
        root.attrs["grid_type"] = "cartesian"
        root.attrs["n_spatial_dims"] = self.dimensions
        root.attrs["n_trajectories"] = len(members)
        root.attrs["members"] = np.asarray(members, dtype=np.int64)
        root.attrs["simulation_parameters"] = numbers
        for key, value in plain.items():
            root.attrs[key] = value
        points = np.arange(grid) * (length / grid)
        sides = ["x", "y"][: self.dimensions]
        axes = {"time": times, **dict.fromkeys(sides, points)}
        if self.running is not None:
            axes["series_time"] = self.running.times
        dimensions = root.create_group("dimensions")
        dimensions.attrs["spatial_dims"] = sides
        for name, values in axes.items():
            dataset = dimensions.create_dataset(name, data=np.asarray(values, dtype=np.float64))
            dataset.attrs["sample_varying"] = False
            dataset.attrs["time_varying"] = False
        for axis in sides:
            boundary = root.create_group(f"boundary_conditions/{axis}_periodic")
            boundary.attrs["associated_dims"] = [axis]
            boundary.attrs["associated_fields"] = []
            boundary.attrs["bc_type"] = "periodic"
            boundary.attrs["sample_varying"] = False
            boundary.attrs["time_varying"] = False
            ends = np.zeros(grid, dtype=bool)
            ends[[0, -1]] = True
            boundary["mask"] = ends
        for group in ("t0_fields", "t1_fields", "t2_fields", "scalars"):
            names = [name for where, name in map(_parts, self._shapes) if where == group]
            root.create_group(group).attrs["field_names"] = names or np.array([], dtype="S1")

    def _allocate(self, name, shape, dtype):
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_layout(h5py.h5d.CONTIGUOUS)
        creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        group, own = _parts(name)
        low = h5py.h5d.create(
            self.file.require_group(group).id,
            own.encode(),
            h5py.h5t.py_create(np.dtype(dtype)),
            h5py.h5s.create_simple(shape),
            creation,
        )
        dataset = h5py.Dataset(low)
        dataset.attrs["sample_varying"] = True
        dataset.attrs["time_varying"] = True
        if group not in ("scalars", "series"):
            dataset.attrs["dim_varying"] = [True] * self.dimensions

    def write(self, index: int, fields: dict, series: dict, references: dict) -> None:
        """Store snapshot ``index``.

        Args:
            index: of the stored time.
            fields: (B, n, n) by name, in ``t0_fields``, ``t1_fields`` or ``filtered``.
            series: (B,) by name.
            references: (rows, n, n) by name.
        """
        for name, values in fields.items():
            groups = (group for group in SNAPSHOTS[:3] if f"{group}/{name}" in self._shapes)
            self.file[next(groups)][name][:, index] = values
        for group, entries in (("scalars", series), ("references", references)):
            for name, values in entries.items():
                self.file[group][name][:, index] = values

    def write_series(self, index: int, entries: dict) -> None:
        """Store entry ``index`` of the running series: (B,) or (B, width) by name."""
        for name, values in entries.items():
            self.file["series"][name][:, index] = values

    def copy_from(self, other: Path, count: int) -> None:
        """Take the first ``count`` snapshots, and the series, from a shorter file of the same
        members."""
        with open_hdf5(other, "r") as source:
            for name in self._shapes:
                stop = source[name].shape[1] if name.startswith("series/") else count
                self.file[name][:, :stop] = source[name][:, :stop]

    def flush(self) -> None:
        self.file.flush()

    def finish(self, restart: dict | None = None, attributes: dict | None = None) -> None:
        """Add restart arrays and last attributes, mark the file complete and close it."""
        if "restart" in self.file:
            del self.file["restart"]
        group = self.file.create_group("restart")
        for name, value in (restart or {}).items():
            group[name] = value
        for key, value in (attributes or {}).items():
            self.file.attrs[key] = value
        self.file.attrs["complete"] = 1
        self.close()

    def close(self) -> None:
        self._closing.close()


def validate_block(path: Path, members: Sequence[int] | None = None) -> None:
    """Check that a finished block can be used. Raises ValueError with the reason, in one line."""
    with open_hdf5(path, "r") as file:
        check_layout(file, path)
        if members is not None and list(file.attrs["members"]) != list(members):
            raise ValueError(
                f"{path}: holds members {list(file.attrs['members'])[:4]}..., "
                f"expected {list(members)[:4]}..."
            )
        for group in ("t0_fields", "t1_fields", "filtered", "series"):
            for name, dataset in file.get(group, {}).items():
                for row in range(dataset.shape[0]):
                    if not np.isfinite(dataset[row]).all():
                        member = file.attrs["members"][row]
                        raise ValueError(f"{path}: member {member}: {name} has non-finite values")


def _parts(name: str) -> tuple[str, str]:
    group, _, own = name.partition("/")
    return group, own


def _shapes_in(file) -> dict[str, tuple[int, ...]]:
    """Shapes of the data sets of a block, as :class:`BlockWriter` lays them out."""
    return {
        f"{group}/{name}": dataset.shape
        for group in (*SNAPSHOTS, "series")
        for name, dataset in file.get(group, {}).items()
    }
