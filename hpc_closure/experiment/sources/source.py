"""The trajectories in files of others: found by name, read where they are."""

import difflib
import glob
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpc_closure.experiment.sources import times as clock
from hpc_closure.experiment.sources.box import length_of
from hpc_closure.experiment.sources.faults import refuse
from hpc_closure.experiment.sources.formats import ENDS, Opened, Variable, format_of, open_file
from hpc_closure.experiment.sources.labels import Axes, axes_of
from hpc_closure.experiment.sources.reference import Reference

if TYPE_CHECKING:
    from hpc_closure.experiment.data_section import Data

OPEN_FILES = 64  # largest number of files that are open at once
STATE, CLOSURE = "state", "closure"


@dataclass(frozen=True)
class Piece:
    """Consecutive stored times of one trajectory in one file.

    Attributes:
        path: the file.
        member: index along the member dimension; None if the file holds one trajectory.
        count: number of times.
    """

    path: Path
    member: int | None
    count: int


def paths_of(patterns: Sequence[str]) -> list[Path]:
    """List the files of paths and patterns; a folder stands for the files in it.

    Raises:
        DataFault: there is none for one of them.
    """
    paths: list[Path] = []
    for pattern in patterns:
        there = [Path(one) for one in sorted(glob.glob(pattern, recursive=True))]
        found = [one for path in there for one in _files_in(path)]
        if not found:
            folder = Path(glob.escape(pattern) if not there else pattern)
            while not folder.is_dir():
                folder = folder.parent
            names = sorted(one.name for one in folder.iterdir())[:3]
            raise refuse(
                "NO_FILE",
                f"data.path={pattern}: nothing there",
                f"a file, folder or pattern; {folder} holds {', '.join(names) or 'nothing'}",
                "mend data.path; a relative path is searched beside the experiment, then in the "
                "working folder",
            )
        paths += [one for one in found if one not in paths]
    return paths


def _files_in(path: Path) -> list[Path]:
    """Return a file, or the data files of a folder that is not itself a Zarr store."""
    if path.is_file() or format_of(path):
        return [path]
    inside = sorted(one for one in path.iterdir() if one.suffix.lower() in ENDS)
    return inside or sorted(one for one in path.glob("data/*/*") if one.suffix.lower() in ENDS)


class Source:
    """The trajectories of an experiment's ``data``, read lazily.

    Attributes:
        paths: the files.
        kind: their format.
        fields: reference to the variable of each channel, by ``state`` and ``closure``.
        axes: dimensions of each variable by role, by reference.
        trajectories: pieces of each trajectory, in the order of time.
        times: stored times that are used, (T,), times ``data.time_factor``.
        points: points of each side.
        length: length of a side.
        dtype: type of the stored states.

    Raises:
        DataFault: the files cannot be read as trajectories.
        ImportError: a library for their format is missing.
    """

    def __init__(self, data: "Data", length: Any = None):
        self.data = data
        self._open: dict[Path, Opened] = {}
        self.paths = paths_of(data.patterns)
        first = self.file(self.paths[0])
        self.kind = first.kind
        self.fields = {
            name: {channel: Reference.of(text) for channel, text in variables.items()}
            for name, variables in ((STATE, data.state), (CLOSURE, data.closure))
            if variables
        }
        self.axes: dict[Reference, Axes] = {}
        for references in self.fields.values():
            for reference in references.values():
                variable = variable_of(first, reference.name)
                check_numbers(first, variable)
                self.axes[reference] = axes_of(variable, first, data.dims, reference)
        main = next(iter(self.fields[STATE].values()))
        variable = variable_of(first, main.name)
        self.dtype = variable.dtype
        self.points = tuple(variable.shape[axis] for axis in self.axes[main].sides)
        self._check_shapes(main)
        self._arrange(main)
        stated = data.length if data.length is not None else length
        self.length = length_of(first, variable, self.axes[main], stated)

    def file(self, path: Path) -> Opened:
        """Return a file, open."""
        if path not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            self._open[path] = open_file(path)
        return self._open[path]

    def close(self) -> None:
        for opened in self._open.values():
            opened.close()
        self._open.clear()

    # -- what is there ---------------------------------------------------------------------------

    def _check_shapes(self, main: Reference) -> None:
        """Check that all variables of the first file have the grid and the times of the state."""
        first = self.file(self.paths[0])
        wanted = self._extent(first, main)
        for name, references in self.fields.items():
            for channel, reference in references.items():
                have = self._extent(first, reference)
                what = f"{name} {channel} ({reference.name})"
                if have[0] != wanted[0]:
                    raise refuse(
                        "CLOSURE_GRID",
                        f"{what} has the points {_by(have[0])}, {main.name} {_by(wanted[0])}",
                        "one grid for all fields, that of the reduced solver",
                        "filter the state to the grid of the closure before it is stored",
                    )
                if have[1:] != wanted[1:]:
                    raise refuse(
                        "CLOSURE_TIMES",
                        f"{what} has {have[1]} member(s) and {have[2]} time(s), {main.name} "
                        f"{wanted[1]} and {wanted[2]}",
                        "a closure for each state",
                        "store both at the same times",
                    )
        own, other = (self._times(first, one) for one in (main, self._last()))
        if not np.array_equal(own, other):
            far = int(np.argmax(own != other))
            raise refuse(
                "CLOSURE_TIMES",
                f"time {far} is {own[far]:g} in the state and {other[far]:g} in the closure",
                "the same times",
                "store both at the same times",
            )

    def _last(self) -> Reference:
        return list(list(self.fields.values())[-1].values())[-1]

    def _extent(self, file: Opened, reference: Reference) -> tuple:
        """Return (points, members, times) of a variable."""
        shape = variable_of(file, reference.name).shape
        axes = self.axes[reference]
        sides = tuple(shape[axis] for axis in axes.sides)
        members = 1 if axes.member is None else shape[axes.member]
        return sides, members, 1 if axes.time is None else shape[axes.time]

    def _times(self, file: Opened, reference: Reference) -> np.ndarray:
        variable = variable_of(file, reference.name)
        return clock.times_of(file, variable, self.axes[reference], self.data)

    def _arrange(self, main: Reference) -> None:
        """Find the trajectories and their times."""
        files = []
        for path in self.paths:
            file = self.file(path)
            extent = self._extent(file, main)
            self._check_file(file, extent, main)
            files.append((path, extent[1], self._times(file, main)))
        how: str = self.data.files
        if how == "auto":
            how = clock.what_files_are([times for _, _, times in files], self.paths)
        has_members = self.axes[main].member is not None
        self.trajectories: list[list[Piece]]
        if how == "members":
            times = min((times for _, _, times in files), key=len)
            clock.check_equal([times for _, _, times in files], self.paths)
            self.trajectories = [
                [Piece(path, member if has_members else None, len(times))]
                for path, number, _ in files
                for member in range(number)
            ]
        else:
            files.sort(key=lambda one: float(one[2][0]))
            if len({number for _, number, _ in files}) > 1:
                counts = [number for _, number, _ in files]
                raise refuse(
                    "FILES_DIFFER",
                    f"pieces of a run with {counts} members",
                    "the same members in each piece",
                    "list only files of one run in data.path",
                )
            times = np.concatenate([times for _, _, times in files])
            self.trajectories = [
                [Piece(path, member if has_members else None, len(own)) for path, _, own in files]
                for member in range(files[0][1])
            ]
        self.times = clock.check(times, self.data)

    def _check_file(self, file: Opened, extent: tuple, main: Reference) -> None:
        """Check that a file has all variables, on the grid of the first file."""
        for references in self.fields.values():
            for reference in references.values():
                variable = variable_of(file, reference.name)
                axes = axes_of(variable, file, self.data.dims, reference)
                if axes != self.axes[reference]:
                    raise refuse(
                        "FILES_DIFFER",
                        f"{file.path}: {reference.name} has the dimensions "
                        f"{', '.join(axes.names)}, in {self.paths[0].name} "
                        f"{', '.join(self.axes[reference].names)}",
                        "one order of dimensions",
                        "list only files of one form in data.path",
                    )
        if extent[0] != self.points:
            raise refuse(
                "FILES_DIFFER",
                f"{file.path}: {main.name} has the points {_by(extent[0])}, in "
                f"{self.paths[0].name} {_by(self.points)}",
                "one grid in all files",
                "list only files of one grid in data.path",
            )

    @property
    def sha256(self) -> str:
        """Return the hash of names, sizes, shapes and times of the files."""
        record = []
        for path in self.paths:
            file = self.file(path)
            size = path.stat().st_size if path.is_file() else 0
            shapes = [
                [one.name, list(variable_of(file, one.name).shape)]
                for references in self.fields.values()
                for one in references.values()
            ]
            record.append([path.name, size, shapes])
        text = json.dumps([record, [float(time) for time in self.times]])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def members(self) -> int:
        """Return the number of trajectories."""
        return len(self.trajectories)

    @property
    def bytes(self) -> int:
        """Return the bytes of all fields at all stored times, as stored."""
        number = sum(len(references) for references in self.fields.values())
        stored = sum(piece.count for pieces in self.trajectories for piece in pieces)
        return number * stored * int(np.prod(self.points)) * self.dtype.itemsize

    # -- reading ---------------------------------------------------------------------------------

    def read(self, member: int, times: slice, name: str, channel: str) -> np.ndarray:
        """Return a field of a trajectory, (t, *points), axes in the order x, y, z.

        Args:
            member: index of the trajectory.
            times: indices among :attr:`times`, with start and stop.
            name: ``state`` or ``closure``.
            channel: name of the field.
        """
        reference, stride = self.fields[name][channel], self.data.stride
        wanted = range(times.start * stride, times.stop * stride, stride * (times.step or 1))
        parts, before = [], 0
        for piece in self.trajectories[member]:
            inside = [one - before for one in wanted if before <= one < before + piece.count]
            before += piece.count
            if inside:
                span = slice(inside[0], inside[-1] + 1, wanted.step)
                parts.append(self._part(piece, span, reference))
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        sign = self.data.closure_sign * self.data.closure_factor
        return values * values.dtype.type(sign) if name == CLOSURE and sign != 1 else values

    def _part(self, piece: Piece, span: slice, reference: Reference) -> np.ndarray:
        axes = self.axes[reference]
        file = self.file(piece.path)
        variable = file.variables[reference.name]
        index: list[Any] = [slice(None)] * len(variable.shape)
        chosen = reference.components or (0,) * len(axes.components)
        for axis, number in zip(axes.components, chosen):
            index[axis] = number
        if axes.member is not None:
            index[axes.member] = piece.member
        if axes.time is not None:
            index[axes.time] = span
        try:
            values = variable.read(tuple(index))
        except OSError as error:
            raise unreadable(file.path, variable, error) from None
        left = [axis for axis, one in enumerate(index) if isinstance(one, slice)]
        order = [left.index(axis) for axis in axes.sides]
        if axes.time is None:
            return values.transpose(order)[None]
        return values.transpose([left.index(axes.time), *order])


def unreadable(path: Path, variable: Variable, error: OSError) -> ValueError:
    """Return the fault of values that the library cannot unpack or read."""
    reason = " ".join(str(error).split())
    if "filter" in reason or "plugin" in reason:
        return refuse(
            "FILTER_MISSING",
            f"{path}: {variable.name} is compressed ({reason[:120]})",
            "gzip, lzf, or a filter that is installed",
            "pip install hdf5plugin and import it by use.classes, or store it with gzip",
        )
    return refuse(
        "UNREADABLE",
        f"{path}: {variable.name} cannot be read ({reason[:120]})",
        "a whole file",
        "copy it again, or leave it out of data.path",
    )


def variable_of(file: Opened, name: str) -> Variable:
    """Return a variable by its path, or by its last word if that is unique.

    Raises:
        DataFault: there is none of this name.
    """
    if name in file.variables:
        return file.variables[name]
    ends = [one for one in file.variables if one.rpartition("/")[2] == name]
    if len(ends) == 1:
        variable = file.variables[ends[0]]
        file.variables[name] = variable
        return variable
    known = sorted(one for one, variable in file.variables.items() if len(variable.shape) > 1)
    words = {one.lower(): one for one in known}
    words |= {one.rpartition("/")[2].lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), words, 1, 0.5)
    hint = f"did you mean {words[near[0]]}?" if near else "name one of them"
    listed = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    raise refuse("NO_VARIABLE", f"{file.path} has no {name}", f"one of {listed or 'none'}", hint)


def check_numbers(file: Opened, variable: Variable) -> None:
    """Check that a variable holds real numbers, or packed ones with their scale."""
    kind, what = variable.dtype.kind, f"{file.path}: {variable.name} is {variable.dtype}"
    if kind == "c":
        raise refuse(
            "COMPLEX",
            what,
            "real fields in physical space",
            "transform spectra back before they are stored",
        )
    if kind not in "fiu":
        raise refuse("NOT_NUMBERS", what, "float32 or float64", "name another variable")
    if kind in "iu" and variable.packed is None:
        raise refuse(
            "PACKED",
            f"{what} without scale_factor and add_offset",
            "floats, or integers with these attributes",
            "store floats, or add the attributes",
        )


def _by(points: Sequence[int]) -> str:
    return " x ".join(map(str, points))
