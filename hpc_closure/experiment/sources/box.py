"""The periodic box: points and length of its sides."""

from typing import Any

import numpy as np

from hpc_closure.experiment.sources.faults import refuse
from hpc_closure.experiment.sources.formats import SIDES, Opened, Variable
from hpc_closure.experiment.sources.labels import Axes

SLACK = 1e-3  # relative difference of lengths that counts as round-off of stored coordinates
LEAST_POINTS = 8


def length_of(file: Opened, variable: Variable, axes: Axes, stated: Any) -> float:
    """Return the length of a side: the stated one, else by the coordinates.

    Args:
        file: the file.
        variable: the state.
        axes: its dimensions by role.
        stated: length of the box, a number or one per side; None if it is not stated.

    Raises:
        DataFault: there is none, it contradicts the coordinates, or the sides differ.
    """
    points = [variable.shape[axis] for axis in axes.sides]
    _check_points(variable, points)
    if isinstance(stated, (list, tuple)) and len(stated) != len(points):
        raise refuse(
            "SIDES_DIFFER",
            f"data.length={list(stated)} of {variable.name} with {len(points)} side(s)",
            f"{len(points)} number(s)",
            "state one length per side, x first",
        )
    wanted = list(stated) if isinstance(stated, (list, tuple)) else [stated] * len(points)
    lengths = []
    for number, (axis, length) in enumerate(zip(axes.sides, wanted)):
        own = _by_coordinate(file, variable, axis, axes.names[axis])
        if length is None and own is None:
            raise refuse(
                "NO_LENGTH",
                f"{file.path}: no coordinate {axes.names[axis]}({points[number]}) in units of "
                "length",
                "coordinates of the points, or data.length",
                "state data.length, the side of the periodic box",
            )
        if length is not None and own is not None and abs(own / length - 1) > SLACK:
            spacing = own / points[number]
            ends = abs(spacing * (points[number] - 1) / length - 1) < SLACK
            more = "; the last point is the first one again" if ends else ""
            raise refuse(
                "LENGTH_DIFFERS",
                f"{points[number]} points of {axes.names[axis]} {spacing:.6g} apart make "
                f"{own:.6g}, the stated length is {length:.6g}{more}",
                "points times spacing = length",
                "mend data.length, or leave out the last point" if ends else "mend data.length",
            )
        lengths.append(float(length or own or 0.0))
    if max(lengths) / min(lengths) - 1 > SLACK:
        raise refuse(
            "UNEQUAL_SIDES",
            f"sides of the lengths {', '.join(f'{one:g}' for one in lengths)}",
            "one length for all sides",
            "closures are trained on boxes with equal sides only",
        )
    return lengths[0]


def _check_points(variable: Variable, points: list[int]) -> None:
    """Check that sides have equal, even numbers of points, at least eight."""
    if len(set(points)) > 1:
        raise refuse(
            "UNEQUAL_SIDES",
            f"{variable.name} has {' x '.join(map(str, points))} points",
            "as many points on each side",
            "closures are trained on boxes with equal sides only",
        )
    if points[0] < LEAST_POINTS:
        raise refuse(
            "TINY_GRID",
            f"{variable.name} has {points[0]} points per side",
            f"at least {LEAST_POINTS}",
            "name another variable, or mend data.dims",
        )
    if points[0] % 2:
        raise refuse(
            "ODD_GRID",
            f"{variable.name} has {points[0]} points per side",
            "an even number",
            "leave out the endpoint if it is stored twice, else interpolate to an even grid",
        )


def _by_coordinate(file: Opened, variable: Variable, axis: int, name: str) -> float | None:
    """Return the length by the coordinate of a dimension; None if there is none in length."""
    folder, number = variable.name.rpartition("/")[0], variable.shape[axis]
    places = (f"{folder}/{name}" if folder else name, name, f"dimensions/{name}")
    known = (file.variables.get(place) for place in places)
    found = next((one for one in known if one is not None and one.shape == (number,)), None)
    if found is None or found.dtype.kind != "f":
        return None
    if str(found.attributes.get("units", "")).startswith("degree"):
        return None
    values = np.asarray(found.part((slice(None),)), dtype=np.float64)
    steps = np.diff(values)
    spacing = float(np.median(steps))
    slack = SLACK * abs(spacing) + 8 * np.finfo(np.float32).eps * float(np.abs(values).max())
    if not spacing > 0 or np.abs(steps - spacing).max() > slack:
        at = int(np.abs(steps - spacing).argmax())
        raise refuse(
            "GRID_UNEVEN",
            f"{file.path}: {name} has {values[at]:g} and {values[at + 1]:g} as neighbours, "
            f"elsewhere they are {spacing:g} apart",
            "evenly spaced points that increase",
            "interpolate to an even grid; walls and Chebyshev points cannot be used",
        )
    return number * float((values[-1] - values[0]) / (number - 1))


def names_of(axes: Axes) -> list[str]:
    """Return the names of the dimensions with the roles x, y, z."""
    return [f"{axes.names[axis]} as {side}" for axis, side in zip(axes.sides, SIDES)]
