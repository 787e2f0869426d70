"""Times of stored states: where they are, and whether they are evenly spaced."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpc_closure.experiment.sources.faults import refuse
from hpc_closure.experiment.sources.formats import Opened, Variable
from hpc_closure.experiment.sources.labels import NAMES, TIME, Axes

if TYPE_CHECKING:
    from hpc_closure.experiment.data_section import Data

EVEN = 1e-3  # largest deviation of a spacing from the median, relative to it


def times_of(file: Opened, variable: Variable, axes: Axes, data: "Data") -> np.ndarray:
    """Return the times of a variable, (T,), times ``data.time_factor``.

    Raises:
        DataFault: the file has no times.
    """
    if axes.time is None:
        return np.zeros(1)
    number = variable.shape[axes.time]
    if data.spacing is not None:
        return np.arange(number) * data.spacing
    found = _stored(file, variable, axes.names[axes.time], number, data.time)
    if found is None:
        wanted = f"data.time={data.time}" if data.time else f"times of {number} states"
        raise refuse(
            "NO_TIME",
            f"{file.path}: {wanted}: there is no such variable of one dimension",
            "a variable time(time)",
            "name it in data.time, or state data.spacing",
        )
    if found.dtype.kind not in "fiu":
        raise refuse(
            "NO_TIME",
            f"{file.path}: {found.name} is {found.dtype}",
            "numbers",
            "state data.spacing, the time between stored states",
        )
    # not times the scale of fields: the few numbers are exact in float64
    return np.asarray(found.part((slice(None),)), dtype=np.float64) * data.time_factor


def _stored(
    file: Opened, variable: Variable, dimension: str, number: int, stated: str | None
) -> Variable | None:
    """Return the variable with the times: the stated one, the coordinate, or one named as such."""
    folder = variable.name.rpartition("/")[0]
    names = [stated] if stated else [dimension, *NAMES[TIME]]
    places = [folder, "", "dimensions"]
    for name in names:
        for place in places:
            one = file.variables.get(f"{place}/{name}" if place else name)
            if one is not None and one.shape == (number,):
                return one
    return None


def what_files_are(times: Sequence[np.ndarray], paths: Sequence[Path]) -> str:
    """Return ``members`` if files have the same times, ``times`` if they follow each other.

    Raises:
        DataFault: neither.
    """
    shortest = min(len(one) for one in times)
    if all(np.allclose(one[:shortest], times[0][:shortest], rtol=1e-6) for one in times):
        return "members"
    ordered = sorted(times, key=lambda one: float(one[0]))
    if all(one[-1] < other[0] for one, other in zip(ordered, ordered[1:])):
        return "times"
    first, other = times[0], next(one for one in times if not np.array_equal(one, times[0]))
    raise refuse(
        "FILES_DIFFER",
        f"files with times {first[0]:g} to {first[-1]:g} and {other[0]:g} to {other[-1]:g}",
        "equal times (members), or times that follow each other (pieces of a run)",
        "state data.files, or list only files of one form",
    )


def check_equal(times: Sequence[np.ndarray], paths: Sequence[Path]) -> None:
    """Check that files of members begin at the same time with the same spacing."""
    shortest = min(len(one) for one in times)
    for path, one in zip(paths, times):
        if not np.allclose(np.diff(one[:shortest]), np.diff(times[0][:shortest]), rtol=1e-3):
            raise refuse(
                "FILES_DIFFER",
                f"{path} has other times than {paths[0].name}",
                "the same spacing in all files",
                "list only files of one form in data.path",
            )


def check(times: np.ndarray, data: "Data") -> np.ndarray:
    """Return the times that are used, every ``data.stride``-th, after checking them.

    Raises:
        DataFault: they do not increase evenly, or there are too few.
    """
    if len(times) < 2:
        raise refuse(
            "FEW_TIMES",
            f"{len(times)} stored time(s)",
            "trajectories of at least two",
            "state data.files=times if each file is one time of a run",
        )
    steps = np.diff(times)
    spacing = float(np.median(steps))
    # stored times may be float32
    slack = EVEN * abs(spacing) + 4 * np.finfo(np.float32).eps * float(np.abs(times).max())
    way_out = "mend the stored times, or state data.spacing if the states are evenly spaced"
    for code, wrong, expected in (
        ("TIME_DECREASES", steps < -slack, "times that increase"),
        ("TIME_DUPLICATE", np.abs(steps) <= slack, "each time once"),
        ("TIME_UNEVEN", np.abs(steps - spacing) > slack, f"a spacing of {spacing:g}"),
    ):
        if wrong.any():
            at = int(wrong.argmax())
            raise refuse(
                code,
                f"time {at} is {times[at]:g} and time {at + 1} is {times[at + 1]:g} "
                f"({int(wrong.sum())} such of {len(steps)})",
                expected,
                way_out,
            )
    used = times[:: data.stride]
    if len(used) < 2:
        raise refuse(
            "FEW_TIMES",
            f"data.stride={data.stride} uses {len(used)} of {len(times)} times",
            "at least two",
            "lower data.stride",
        )
    return used
