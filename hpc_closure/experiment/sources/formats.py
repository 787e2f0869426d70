"""Open files of others: HDF5 and NetCDF 4 by h5py, NetCDF 3 by netCDF4, Zarr 2 and 3 by zarr.

A file is a list of variables. A variable knows its shape, its labels and its attributes, and reads
any part of itself; nothing is copied before. The libraries that only some files need are imported
when such a file is opened.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpc_closure.experiment.sources.faults import refuse
from hpc_closure.experiment.sources.zarr_chunks import reader_of

HDF5, NETCDF3, ZARR = "HDF5", "NetCDF 3", "Zarr"
ENDS = (".h5", ".hdf5", ".hdf", ".nc", ".nc4", ".cdf", ".zarr")
TENSORS = {"t0_fields": 0, "t1_fields": 1, "t2_fields": 2}  # groups of The Well's layout
SIDES = ("x", "y", "z")


@dataclass(frozen=True)
class Variable:
    """One array of a file.

    Attributes:
        name: path in the file, e.g. ``t0_fields/vorticity``.
        shape: its shape.
        dtype: type of the stored numbers.
        dims: name of each dimension; None for one that the file does not name.
        attributes: plain attributes.
        chunk: shape of a stored piece that is unpacked as a whole; None if there is none.
        part: reads a part by a tuple of integers and slices.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    dims: tuple[str | None, ...]
    attributes: dict[str, Any]
    chunk: tuple[int, ...] | None
    part: Callable[[tuple], np.ndarray] = field(repr=False, compare=False)

    @property
    def packed(self) -> tuple[float, float] | None:
        """Return (scale, offset) of packed integers; None if the numbers are not packed."""
        if "scale_factor" not in self.attributes and "add_offset" not in self.attributes:
            return None
        scale = self.attributes.get("scale_factor", 1.0)
        offset = self.attributes.get("add_offset", 0.0)
        return float(np.ravel(scale)[0]), float(np.ravel(offset)[0])

    @property
    def missing(self) -> list[float]:
        """Return the numbers that stand for missing values."""
        names = ("_FillValue", "missing_value")
        found = (np.ravel(self.attributes[name]) for name in names if name in self.attributes)
        return [float(values[0]) for values in found if values.size and values.dtype.kind in "fiu"]

    def read(self, index: tuple) -> np.ndarray:
        """Return a part as native float32 or float64; missing values are NaN."""
        stored = np.asarray(self.part(index))
        values = stored
        if self.packed is not None:
            scale, offset = self.packed
            values = stored * scale + offset
        elif not stored.dtype.isnative or stored.dtype.kind != "f" or stored.dtype.itemsize < 4:
            values = stored.astype(np.float64 if stored.dtype.itemsize > 4 else np.float32)
        for number in self.missing:
            if (stored == number).any():
                values = np.where(stored == number, np.nan, values)
        return values


@dataclass
class Opened:
    """An open file.

    Attributes:
        path: file or folder.
        kind: HDF5, NetCDF 3 or Zarr, with its version.
        variables: its arrays by name.
        attributes: plain attributes of the root.
        members: indices of the trajectories, if the file is a block of this package.
    """

    path: Path
    kind: str
    variables: dict[str, Variable]
    attributes: dict[str, Any]
    members: list[int] | None = None
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)

    def close(self) -> None:
        self.closing.close()


def format_of(path: Path) -> str:
    """Return the format of a file or folder by its first bytes; "" if it is none of the known."""
    if path.is_dir():
        marks = (".zgroup", ".zarray", ".zattrs", ".zmetadata", "zarr.json")
        return ZARR if any((path / mark).exists() for mark in marks) else ""
    with open(path, "rb") as file:
        start = file.read(8)
    if start.startswith(b"CDF"):
        return NETCDF3
    return HDF5 if start == b"\x89HDF\r\n\x1a\n" else ""


def open_file(path: Path) -> Opened:
    """Open a file or a Zarr folder.

    Raises:
        DataFault: it is truncated, or of no known format.
        ImportError: a library is missing.
    """
    try:
        kind = format_of(path)
        if not kind:
            raise ValueError("neither HDF5, NetCDF nor Zarr")
        return {HDF5: _open_hdf5, NETCDF3: _open_netcdf3, ZARR: _open_zarr}[kind](path)
    except ImportError:
        raise
    except Exception as error:  # each library has its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise refuse(
            "UNREADABLE",
            f"{path}: {reason[:160]}",
            "a whole HDF5, NetCDF or Zarr file",
            "copy it again, or leave it out of data.path",
        ) from None


def _open_hdf5(path: Path) -> Opened:
    opened = Opened(path, HDF5, {}, {})
    # without locks, which fail on some cluster file systems: nothing is written here
    file = opened.closing.enter_context(h5py.File(path, "r", locking=False))
    opened.attributes = _plain(file.attrs)
    if "_NCProperties" in file.attrs or "_nc3_strict" in file.attrs:
        opened.kind = "NetCDF 4"
    well = _sides_of_the_well(file)
    if well:
        opened.kind = "The Well (HDF5)"
    if "members" in file.attrs and "recipe_hash" in file.attrs:
        opened.members = [int(one) for one in file.attrs["members"]]

    def visit(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset) or item.shape is None:
            return
        label = item.attrs.get("NAME", b"")
        label = label if isinstance(label, bytes) else str(label).encode()
        if label.startswith(b"This is a netCDF dimension but not"):  # a length, not an array
            return
        dims = _dims_of_the_well(name, item, well) if well else _scales(item)
        opened.variables[name] = Variable(
            name, item.shape, item.dtype, dims, _plain(item.attrs), item.chunks, item.__getitem__
        )

    file.visititems(visit)
    return opened


def _scales(item: h5py.Dataset) -> tuple[str | None, ...]:
    """Return the names of the dimension scales of a data set, as NetCDF 4 attaches them."""
    if item.ndim == 1 and item.is_scale:
        return (item.name.rpartition("/")[2],)
    names: list[str | None] = []
    for dimension in item.dims:
        scale = dimension[0].name if len(dimension) else None
        names.append(scale.rpartition("/")[2] if scale else dimension.label or None)
    return tuple(names)


def _sides_of_the_well(file: h5py.File) -> list[str]:
    """Return the names of the sides if a file has The Well's layout, else []."""
    if "dimensions" not in file or not any(group in file for group in TENSORS):
        return []
    names = file["dimensions"].attrs.get("spatial_dims")
    if names is None:
        return []
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _dims_of_the_well(name: str, item: h5py.Dataset, sides: list[str]) -> tuple[str | None, ...]:
    """Return the dimensions of a data set of The Well's layout."""
    group, _, short = name.partition("/")
    if group == "dimensions" and item.ndim == 1:
        return (short,)
    if group not in TENSORS:
        return (None,) * item.ndim
    varying = item.attrs.get("dim_varying", [True] * len(sides))
    names = ["member"] if item.attrs.get("sample_varying", True) else []
    names += ["time"] if item.attrs.get("time_varying", True) else []
    names += [side for side, varies in zip(sides, varying) if varies]
    names += [f"component{number}" for number in range(TENSORS[group])]
    return tuple(names) if len(names) == item.ndim else (None,) * item.ndim


def _open_netcdf3(path: Path) -> Opened:
    from netCDF4 import Dataset  # imported here: only such files need it

    opened = Opened(path, NETCDF3, {}, {})
    file = opened.closing.enter_context(Dataset(path))
    file.set_auto_maskandscale(False)
    opened.attributes = {name: file.getncattr(name) for name in file.ncattrs()}
    for name, item in file.variables.items():
        attributes = {key: item.getncattr(key) for key in item.ncattrs()}
        opened.variables[name] = Variable(
            name, item.shape, item.dtype, item.dimensions, attributes, None, item.__getitem__
        )
    return opened


def _open_zarr(path: Path) -> Opened:
    import zarr  # imported here: only such folders need it

    root = zarr.open(str(path), mode="r")
    opened = Opened(path, f"{ZARR} {root.metadata.zarr_format}", {}, dict(root.attrs))
    for name, item in _arrays(root):
        attributes = dict(item.attrs)
        dims = attributes.get("_ARRAY_DIMENSIONS")
        dims = dims or getattr(item.metadata, "dimension_names", None) or (None,) * item.ndim
        opened.variables[name] = Variable(
            name,
            item.shape,
            item.dtype,
            tuple(dims),
            attributes,
            item.chunks,
            reader_of(item, path),
        )
    return opened


def _arrays(root: Any) -> Iterator[tuple[str, Any]]:
    """Yield the arrays of a Zarr group with their paths, or the array that is the root."""
    if hasattr(root, "ndim"):
        yield "data", root
        return
    for name, item in sorted(root.members(max_depth=None), key=lambda pair: pair[0]):
        if hasattr(item, "ndim"):
            yield name, item


def _plain(attributes: Any) -> dict[str, Any]:
    """Return attributes that are numbers or text; references of scales are left out."""
    plain = {}
    for key in attributes:
        if key in ("DIMENSION_LIST", "REFERENCE_LIST", "CLASS", "NAME", "_Netcdf4Dimid"):
            continue
        with contextlib.suppress(Exception):  # types that h5py cannot read
            plain[key] = attributes[key]
    return plain
