"""Write a block file, snapshot by snapshot; :mod:`hpc_closure.data.layout` defines its content.

Storage is contiguous and allocated when the file is made. Writing a snapshot then moves raw bytes
and never changes the file's structure. So a file whose writer was killed still opens, and is
continued from its last restart point. A reader reads a snapshot, or a full trajectory, in one
piece.
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from hpc_closure.data.layout import STATE, VERSION, BlockHeader, Layout, by_data_set
from hpc_closure.spectral.modes.resolution import per_side
from hpc_closure.work.hdf5 import GuardedFile, WritableHDF5, open_hdf5
from hpc_closure.work.header import expect

# groups of data sets with a row per member, whose values are checked
FIELDS_BY_MEMBER = ("t0_fields", "t1_fields", "filtered", "series")


class BlockWriter:
    """Writes a block file.

    Args:
        path: the unfinished file. An existing file of the same layout and attributes is continued,
            another one is made anew: that of other settings would keep their attributes.
        layout: members, times and data sets.
        attributes: plain values for the root (strings, numbers, lists of them).

    Attributes:
        continued: whether the file existed and is continued.
    """

    def __init__(self, path: Path, layout: Layout, attributes: dict):
        self.path, self.layout = Path(path), layout
        self._closing = contextlib.ExitStack()
        self._written: GuardedFile | None = None  # the finished file, until it is checked
        file = self._continue(attributes)
        self.continued = file is not None
        self.file = file or self._make(attributes)

    def _continue(self, attributes: dict) -> WritableHDF5 | None:
        if not self.path.exists():
            return None
        try:
            file = self._enter(open_hdf5(self.path, "r+"))
        except ValueError:  # its writer was killed while it made the file
            return None
        same = all(
            np.array_equal(file.attrs.get(key), value)
            for key, value in attributes.items()
            if value is not None and key != "dataset_name"
        )
        if same and self.layout.matches(file):
            return file
        self._closing.close()
        return None

    def _make(self, attributes: dict) -> WritableHDF5:
        file = self._enter(open_hdf5(self.path, "w"))
        with contextlib.ExitStack() as unless_made:
            unless_made.callback(self.close)
            self._write_header(file, attributes)
            for name, shape in self._stored().items():
                number = name.startswith(("scalars/", "series/"))
                self._allocate(file, name, shape, "float64" if number else self.layout.precision)
            for name, parts in self.layout.views.items():
                self._make_view(file, name, parts)
            file.flush()
            unless_made.pop_all()
        return file

    def _stored(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the data sets with room of their own."""
        views = [f"t1_fields/{name}" for name in self.layout.views]
        return {name: shape for name, shape in self.layout.shapes().items() if name not in views}

    def _enter(self, opened) -> WritableHDF5:
        return self._closing.enter_context(opened)

    def _write_header(self, file: h5py.File, attributes: dict) -> None:
        layout = self.layout
        plain = {key: value for key, value in attributes.items() if value is not None}
        numbers = sorted(key for key, value in plain.items() if isinstance(value, (int, float)))
        file.attrs["layout_version"] = VERSION
        file.attrs["grid_type"] = "cartesian"
        file.attrs["n_spatial_dims"] = layout.dimensions
        if layout.channels:
            file.attrs["channels"] = list(layout.channels)
        file.attrs["n_trajectories"] = len(layout.members)
        file.attrs["members"] = np.asarray(layout.members, dtype=np.int64)
        file.attrs["simulation_parameters"] = numbers
        for key, value in plain.items():
            file.attrs[key] = value
        length = plain.get("length", 1.0)
        lengths = per_side(length, layout.dimensions, "length")
        points = {
            name: np.arange(size) * (float(side) / size)
            for name, size, side in zip(layout.sides, layout.points, lengths)
        }
        dimensions = file.create_group("dimensions")
        dimensions.attrs["spatial_dims"] = layout.sides
        for name, values in {**layout.axes(), **points}.items():
            dataset = dimensions.create_dataset(name, data=np.asarray(values, dtype=np.float64))
            dataset.attrs["sample_varying"] = False
            dataset.attrs["time_varying"] = False
        for axis in layout.sides:
            boundary = file.create_group(f"boundary_conditions/{axis}_periodic")
            boundary.attrs["associated_dims"] = [axis]
            boundary.attrs["associated_fields"] = []
            boundary.attrs["bc_type"] = "periodic"
            boundary.attrs["sample_varying"] = False
            boundary.attrs["time_varying"] = False
            ends = np.zeros(len(points[axis]), dtype=bool)
            ends[[0, -1]] = True
            boundary["mask"] = ends
        paths = [name.split("/") for name in layout.shapes()]
        for group in ("t0_fields", "t1_fields", "t2_fields", "scalars"):
            names = [name for where, name in paths if where == group]
            file.create_group(group).attrs["field_names"] = names or np.array([], dtype="S1")

    def _allocate(self, file: h5py.File, name: str, shape: tuple[int, ...], dtype: str) -> None:
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_layout(h5py.h5d.CONTIGUOUS)
        creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        group, _, short = name.partition("/")
        low = h5py.h5d.create(
            file.require_group(group).id,
            short.encode(),
            h5py.h5t.py_create(np.dtype(dtype)),
            h5py.h5s.create_simple(shape),
            creation,
        )
        self._describe(h5py.Dataset(low), group)

    def _make_view(self, file: h5py.File, name: str, parts: Sequence[str]) -> None:
        """Make a vector whose components, along the last axis, are fields of the same file."""
        shape, precision = self.layout.shapes()[f"t1_fields/{name}"], self.layout.precision
        view = h5py.VirtualLayout(shape=shape, dtype=precision)
        for number, part in enumerate(parts):
            source = h5py.VirtualSource(".", f"t0_fields/{part}", shape[:-1], precision)
            view[..., number] = source
        group = file.require_group("t1_fields")
        self._describe(group.create_virtual_dataset(name, view), "t1_fields")

    def _describe(self, dataset: h5py.Dataset, group: str) -> None:
        """Write which axes a data set varies along."""
        dataset.attrs["sample_varying"] = True
        dataset.attrs["time_varying"] = True
        if group not in ("scalars", "series"):
            dataset.attrs["dim_varying"] = [True] * self.layout.dimensions

    def write(self, index: int, fields: dict, scalars: dict, references: dict) -> None:
        """Store snapshot ``index``; a row with a non-finite value becomes NaN everywhere.

        Args:
            index: index of the stored time.
            fields: (B, n, n) by name, in ``t0_fields``, ``t1_fields`` or ``filtered``.
            scalars: (B,) by name.
            references: (rows, n, n) by name.
        """
        for name, values in fields.items():
            groups = (self.file.get(group, {}) for group in ("t0_fields", "t1_fields", "filtered"))
            dataset = next(group for group in groups if name in group)[name]
            dataset[:, index] = _whole_or_nan(values)
        for name, values in scalars.items():
            self.file["scalars"][name][:, index] = values
        for name, values in references.items():
            self.file["references"][name][:, index] = _whole_or_nan(values)

    def write_series(self, index: int, entries: dict) -> None:
        """Store entry ``index`` of the series: (B,) or (B, width) by name."""
        for name, values in entries.items():
            self.file["series"][name][:, index] = values

    def write_whole(self, index: int, states: np.ndarray) -> None:
        """Store states of the starts with all modes, (cases, N, N), at their time ``index``.

        Of C channels they are (cases, C, N, N).
        """
        layout = self.layout
        fields = by_data_set(STATE, states, layout.channels, layout.dimensions)
        for name, values in fields.items():
            self.file["whole"][name][:, index] = _whole_or_nan(values)

    def continue_from(self, product: Path) -> tuple[int, dict]:
        """Copy the data of a finished block of the same members with an earlier end.

        Returns:
            The number of its snapshots and its restart arrays.

        Raises:
            ValueError: the block lacks a data set.
        """
        with open_hdf5(product) as source:
            count = len(source["dimensions/time"])
            for name in self._stored():
                defect = f"it has no {name}: remove it, and generate again"
                expect(product, name in source, defect)
                has_other_times = name.startswith(("series/", "whole/"))
                stop = source[name].shape[1] if has_other_times else count
                self.file[name][:, :stop] = source[name][:, :stop]
            return count, {name: values[()] for name, values in source["restart"].items()}

    def flush(self) -> None:
        self.file.flush()

    def finish(self, restart: dict, attributes: dict) -> None:
        """Add restart arrays and last attributes, mark the file complete, close it for writing."""
        if "restart" in self.file:
            del self.file["restart"]
        group = self.file.create_group("restart")
        for name, value in restart.items():
            group[name] = value
        for key, value in attributes.items():
            self.file.attrs[key] = value
        self.file.attrs["lost"] = json.dumps(self._lost(), sort_keys=True)
        self.file.attrs["complete"] = 1
        self._written = self.file.finish()
        self._closing.callback(self._written.close)

    def _lost(self) -> dict[str, dict[int, int]]:
        """Return the index of the first NaN time by data set and member that diverged."""
        lost_by_dataset: dict[str, dict[int, int]] = {}
        for group in FIELDS_BY_MEMBER:
            for name, values in self.file.get(group, {}).items():
                corner = values[(slice(None), slice(None), *[0] * (values.ndim - 2))]
                rows = zip(self.layout.members, np.isnan(corner))
                lost = {
                    int(member): int(is_nan.argmax()) for member, is_nan in rows if is_nan.any()
                }
                lost_by_dataset |= {f"{group}/{name}": lost} if lost else {}
        return lost_by_dataset

    def close(self) -> None:
        self._closing.close()

    def check(self, path: Path) -> BlockHeader:
        """Return the header of the finished file, now at ``path``, after reading every value.

        The file is flushed to the disk.

        Raises:
            ValueError: the file is unusable; the reason, in one line.
        """
        written, self._written = self._written, None
        with open_hdf5(path, flush=True, written=written) as file:
            header = BlockHeader.from_file(file, path)
            expect(
                path, self.layout.matches(file), "it has other times or data sets than its layout"
            )
            for group in FIELDS_BY_MEMBER:
                for name, values in file.get(group, {}).items():
                    lost = header.lost.get(f"{group}/{name}", {})
                    for member, row in zip(header.members, values):
                        before = row[: lost.get(str(member), len(row))]
                        after = row[len(before) :]
                        if not (np.isfinite(before).all() and np.isnan(after).all()):
                            raise ValueError(
                                f"{path}: member {member}: {name} has non-finite values"
                            )
        return header


def _whole_or_nan(rows: np.ndarray) -> np.ndarray:
    lost = ~np.isfinite(rows).reshape(len(rows), -1).all(1)
    if lost.any():
        rows = rows.copy()
        rows[lost] = np.nan
    return rows
