"""The layout of a block file, after The Well: its data sets, and one check for all readers.

::

    /                    attributes: dataset_name, grid_type, n_spatial_dims, n_trajectories,
                         simulation_parameters, members, recipe_hash, holds, recipe, certificate,
                         provenance, complete
    /dimensions          time (T,), x (n,), y (n,), z (n,): one per side
    /boundary_conditions x_periodic, y_periodic, z_periodic
    /scalars             one (B, T) series per diagnostic
    /t0_fields           vorticity, closure, streamfunction: (B, T, n, n); on a line (B, T, n),
                         of three sides (B, T, n, n, n);
                         of an equation with several fields its fields, named in attribute
                         channels, and closure_NAME, ... of each (:func:`data_sets`)
    /t1_fields           velocity: (B, T, n, n, 2), of three sides (B, T, n, n, n, 3): there a view
                         of the fields u, v and w
    /filtered            one (B, T, m, m) field per filter, on the filter's grid
    /references          truth, none: (cases, T, n, n), in a rollout; truth_NAME, ... of each field
    /whole               the state of the DNS on the DNS grid at whole_time: (cases, W, N, N) of
                         each field
    /series              one (B, S) or (B, S, shells) series per diagnostic, at series_time
    /restart             arrays from which the solver continues after the last stored time
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpc_closure.spectral.modes.resolution import per_side
from hpc_closure.work.header import Header, expect, json_object

VERSION = 1
FIELDS = ("vorticity", "closure")
# Series of a rollout that count, since its start, the draws that were rescaled into the range of
# the training; by the ensemble that draws. Columns: draws, draws rescaled in any shell, and draws
# rescaled in each shell. The hashes of products depend on these names.
COUNTED = {"model": "brought_back", "mean_gp": "brought_back_mean_gp"}
STATE = "state"  # the state of any flow, in arguments
# name of the state of one field, by the dimensions of the flow
STATES = {1: "state", 2: "vorticity", 3: "state"}
SIDES = ("x", "y", "z")
SNAPSHOTS = ("t0_fields", "t1_fields", "filtered", "scalars", "references")  # (B, T, ...) each


def data_sets(name: str, channels: Sequence[str], dimensions: int = 2) -> list[str]:
    """List the data sets of a field, one per channel of the state.

    Args:
        name: ``state`` for the state of any flow, ``closure``, the name of a run, or a channel.
        channels: names of the fields of the state; empty if it has one.
        dimensions: dimensions of the flow.
    """
    if name == STATE or not channels and name == STATES[2]:
        return list(channels) or [STATES[dimensions]]
    if name in channels:
        return [name]
    return [f"{name}_{channel}" for channel in channels] or [name]


def by_data_set(
    name: str, values: np.ndarray, channels: Sequence[str], dimensions: int = 2
) -> dict[str, np.ndarray]:
    """Return fields (B, n, n), or (B, C, n, n) of C channels, as (B, n, n) by data set."""
    names = data_sets(name, channels, dimensions)
    return dict(zip(names, values.swapaxes(0, 1) if channels else values[None]))


@dataclass(frozen=True)
class SeriesLayout:
    """Diagnostics with a separate time axis.

    Attributes:
        times: (S,).
        widths: name of each series and its number of values per member and time (0: one number,
            stored as (B, S)).
    """

    times: np.ndarray
    widths: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class WholeLayout:
    """States of the starts with all modes of the DNS, at a few times.

    Attributes:
        times: (W,).
        cases: number of starts.
        grid: points per side of the DNS, a number or one per side.
    """

    times: np.ndarray
    cases: int
    grid: int | tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The data sets of a block.

    Attributes:
        members: global member indices, one trajectory each.
        times: stored times, (T,).
        grid: points per side, a number or one per side.
        dimensions: number of sides; the shapes below are those of 2.
        precision: precision of the fields.
        fields: names of the (B, T, n, n) fields.
        channels: names of the fields of the state, if it has several.
        vectors: names of the (B, T, n, n, 2) fields.
        views: fields that make up each vector that takes no room of its own, by its name.
        filtered: points per side of the (B, T, m, m) fields, by name.
        scalars: names of the (B, T) diagnostics.
        references: number of rows of the fields (rows, T, n, n) that are not one per member, by
            name.
        series: diagnostics with a separate time axis.
        whole: states of the starts with all modes.
    """

    members: Sequence[int]
    times: np.ndarray
    grid: int | tuple[int, ...]
    dimensions: int = 2
    precision: str = "float32"
    fields: Sequence[str] = FIELDS
    channels: Sequence[str] = ()
    vectors: Sequence[str] = ()
    views: Mapping[str, Sequence[str]] = field(default_factory=dict)
    filtered: Mapping[str, int] = field(default_factory=dict)
    scalars: Sequence[str] = ()
    references: Mapping[str, int] = field(default_factory=dict)
    series: SeriesLayout | None = None
    whole: WholeLayout | None = None

    @property
    def points(self) -> tuple[int, ...]:
        """Return the shape of a field."""
        return per_side(self.grid, self.dimensions, "grid")

    @property
    def sides(self) -> list[str]:
        return list(SIDES[: self.dimensions])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every data set by its path in the file."""
        block, side = (len(self.members), len(self.times)), self.points
        shapes: dict[str, tuple[int, ...]] = {}
        shapes |= {f"t0_fields/{name}": (*block, *side) for name in self.fields}
        for name in (*self.vectors, *self.views):
            shapes[f"t1_fields/{name}"] = (*block, *side, self.dimensions)
        for name, points in self.filtered.items():
            shapes[f"filtered/{name}"] = (*block, *(points,) * self.dimensions)
        shapes |= {f"scalars/{name}": block for name in self.scalars}
        for name, rows in self.references.items():
            shapes[f"references/{name}"] = (rows, len(self.times), *side)
        if self.series is not None:
            for name, width in self.series.widths.items():
                values = (width,) if width else ()
                shapes[f"series/{name}"] = (len(self.members), len(self.series.times), *values)
        if self.whole is not None:
            whole, all_points = self.whole, per_side(self.whole.grid, self.dimensions, "grid")
            for name in data_sets(STATE, self.channels, self.dimensions):
                shapes[f"whole/{name}"] = (whole.cases, len(whole.times), *all_points)
        return shapes

    def axes(self) -> dict[str, np.ndarray]:
        """Return the time axes by name."""
        return {
            "time": self.times,
            **({} if self.series is None else {"series_time": self.series.times}),
            **({} if self.whole is None else {"whole_time": self.whole.times}),
        }

    def matches(self, file) -> bool:
        """Return whether an open file, finished or not, has these members, times and data sets."""
        try:
            return (
                list(file.attrs["members"]) == list(self.members)
                and all(
                    np.array_equal(file[f"dimensions/{name}"][:], times)
                    for name, times in self.axes().items()
                )
                and _shapes_in(file) == self.shapes()
            )
        except KeyError:
            return False


def _shapes_in(file) -> dict[str, tuple[int, ...]]:
    return {
        f"{group}/{name}": dataset.shape
        for group in (*SNAPSHOTS, "series", "whole")
        for name, dataset in file.get(group, {}).items()
    }


@dataclass(frozen=True)
class BlockHeader(Header):
    """Header of a finished block whose data sets were checked as well.

    Attributes:
        times: stored times, (T,).
        grid: points per side of its fields; a tuple if sides have different numbers.
        dimensions: dimensions of the flow, 1 to 3.
        channels: names of the fields of the state; empty if it has one.
        settings: plain dict of the physics and numerics that made it.
        certificate, provenance: plain dicts.
    """

    times: np.ndarray
    grid: Any
    dimensions: int
    channels: tuple[str, ...]
    settings: dict
    certificate: dict
    provenance: dict

    @classmethod
    def from_file(cls, file, path: Path) -> "BlockHeader":
        """Return the header of an open block, after checking header and shapes.

        Raises:
            ValueError: unfinished, foreign or damaged; one line that names the file.
        """
        expect(path, "t0_fields" in file, "it has no t0_fields")
        header = Header.from_file(file, path)
        records = [json_object(file.attrs.get(name, "{}")) for name in RECORDS]
        for name, record in zip(RECORDS, records):
            expect(path, record is not None, f"its {name} is not JSON")
        settings, certificate, provenance = (record or {} for record in records)
        times = file.get("dimensions/time")
        expect(path, _is_floats(times, 1), "it has no times")
        channels = file.attrs.get("channels", ())
        named = np.ndim(channels) == 1 and all(isinstance(name, str) for name in channels)
        expect(path, named, "its channels are no names")
        sides = file.attrs.get("n_spatial_dims", 2)
        known = np.ndim(sides) == 0 and sides in STATES
        expect(path, known, "its n_spatial_dims is neither 1, 2 nor 3")
        points = []
        for name in SIDES[: int(sides)]:
            axis = file.get(f"dimensions/{name}")
            expect(path, _is_floats(axis, 1), f"it has no points {name}")
            points.append(len(axis))
        states = data_sets(STATE, list(channels), int(sides))
        _check_shapes(file, path, (len(header.members), len(times)), int(sides), states)
        return cls(
            **{name: getattr(header, name) for name in Header.__dataclass_fields__},
            times=times[:],
            grid=points[0] if len(set(points)) == 1 else tuple(points),
            dimensions=int(sides),
            channels=tuple(map(str, channels)),
            settings=settings,
            certificate=certificate,
            provenance=provenance,
        )


RECORDS = ("recipe", "certificate", "provenance")  # attributes of a block that are JSON


def _check_shapes(
    file, path: Path, shape: tuple[int, int], sides: int, states: Sequence[str]
) -> None:
    """Check that all data sets are floats of (members, times) ``shape``, and ``states`` exist."""
    for state in states:
        expect(path, state in file.get("t0_fields", {}), f"it has no t0_fields/{state}")
    defect = f"does not have {shape[0]} members and {shape[1]} times"
    ndims = {"t0_fields": 2 + sides, "t1_fields": 3 + sides, "filtered": 2 + sides, "scalars": 2}
    for group, ndim in ndims.items():
        for name, values in file.get(group, {}).items():
            fits = _is_floats(values, ndim) and values.shape[:2] == shape
            expect(path, fits, f"{group}/{name} {defect}")
    for name, values in file.get("references", {}).items():
        fits = _is_floats(values, 2 + sides) and values.shape[1] == shape[1]
        expect(path, fits, f"references/{name} {defect}")
    times = file.get("dimensions/series_time")
    for name, values in file.get("series", {}).items():
        fits = _is_floats(times, 1) and hasattr(values, "dtype")
        fits = fits and values.shape[:2] == (shape[0], len(times))
        expect(path, fits, f"series/{name} does not have {shape[0]} members and series_time")

    times = file.get("dimensions/whole_time")
    for name, values in file.get("whole", {}).items():
        fits = _is_floats(times, 1) and _is_floats(values, 2 + sides)
        fits = fits and values.shape[1] == len(times)
        expect(path, fits, f"whole/{name} does not have the times whole_time")


def _is_floats(values, ndim: int) -> bool:
    return hasattr(values, "dtype") and values.ndim == ndim and values.dtype.kind == "f"
