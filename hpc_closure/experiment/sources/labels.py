"""Say which dimension of a variable is the member, the time, a side or a component."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hpc_closure.experiment.sources.faults import refuse
from hpc_closure.experiment.sources.formats import SIDES, Opened, Variable
from hpc_closure.experiment.sources.reference import Reference

MEMBER, TIME, COMPONENT = "member", "time", "component"
#: names by which a dimension is recognised, in lower case
NAMES: dict[str, tuple[str, ...]] = {
    MEMBER: (
        *("member", "members", "ensemble", "ens", "realization", "realisation", "run", "number"),
        *("trajectory", "traj", "n_trajectories", "sample", "simulation"),
    ),
    TIME: ("time", "times", "t", "step", "steps", "snapshot", "snapshots", "frame"),
    "x": ("x", "nx", "xc", "x_c", "xi", "lon", "longitude", "rlon", "i"),
    "y": ("y", "ny", "yc", "y_c", "eta", "lat", "latitude", "rlat", "j"),
    "z": ("z", "nz", "zc", "z_c", "height", "altitude", "k"),
    COMPONENT: (
        *("component", "components", "channel", "channels", "variable", "field", "fields"),
        *("layer", "layers", "lev", "level", "levels", "depth", "dim"),
    ),
}
AXIS = {"X": "x", "Y": "y", "Z": "z", "T": TIME}  # attribute axis of CF


@dataclass(frozen=True)
class Axes:
    """The dimensions of a variable by role.

    Attributes:
        member, time: dimension of the variable, or None.
        sides: dimension of x, y and z, as many as there are.
        components: the other dimensions.
        names: name or role of each dimension, for messages.
    """

    member: int | None
    time: int | None
    sides: tuple[int, ...]
    components: tuple[int, ...]
    names: tuple[str, ...]


def role_of(name: str | None, file: Opened | None = None) -> str | None:
    """Return the role of a dimension by its name, or by attribute ``axis`` of its coordinate."""
    if not name:
        return None
    lower = name.lower()
    for role, known in NAMES.items():
        if lower in known:
            return role
    if re.fullmatch(r"component\d+", lower):
        return COMPONENT
    coordinate = file.variables.get(name) if file else None
    axis = coordinate.attributes.get("axis") if coordinate else None
    return AXIS.get(str(axis).upper()) if axis is not None else None


def axes_of(
    variable: Variable, file: Opened, dims: Sequence[str] | None, reference: Reference
) -> Axes:
    """Return the dimensions of a variable by role.

    Args:
        variable: the variable.
        file: its file, whose coordinates may say more.
        dims: names that the experiment states, one per dimension; None: those of the file.
        reference: how the experiment names the variable.

    Raises:
        DataFault: a dimension has no role, or two have the same.
    """
    shape = "x".join(map(str, variable.shape))
    if dims is None and None in variable.dims:
        raise refuse(
            "NO_DIMS",
            f"{file.path}: {variable.name} ({shape}) has dimensions without names",
            "names such as member, time, y, x",
            f"state data.dims, {len(variable.shape)} names in the order of the file",
        )
    names = [str(name) for name in (variable.dims if dims is None else dims)]
    if len(names) != len(variable.shape):
        raise refuse(
            "DIMS_COUNT",
            f"data.dims={names}, but {variable.name} has {len(variable.shape)} ({shape})",
            f"{len(variable.shape)} names",
            "state one name per dimension, in the order of the file",
        )
    roles: dict[str, int] = {}
    components: list[int] = []
    for axis, name in enumerate(names):
        role = role_of(name, file)
        if role is None and dims is not None:
            role = COMPONENT
        if role is None and (variable.shape[axis] == 1 or reference.components):
            role = COMPONENT
        if role is None:
            raise refuse(
                "NO_ROLE",
                f"{file.path}: dimension {name} ({variable.shape[axis]}) of {variable.name}",
                f"one of {MEMBER}, {TIME}, {', '.join(SIDES)}, or a component chosen by "
                f"{variable.name}[0]",
                f"state data.dims, in place of {names}",
            )
        if role == COMPONENT:
            components.append(axis)
        elif role in roles:
            raise refuse(
                "SAME_ROLE",
                f"{variable.name}: dimensions {names[roles[role]]} and {name} are both {role}",
                "one of each",
                f"state data.dims, in place of {names}",
            )
        else:
            roles[role] = axis
    sides = tuple(roles[side] for side in SIDES if side in roles)
    used = [side for side in SIDES if side in roles]
    if not sides or used != list(SIDES[: len(sides)]):
        raise refuse(
            "NO_SIDE",
            f"{variable.name} ({', '.join(names)}) has the sides {', '.join(used) or 'none'}",
            "x, or x and y, or x, y and z",
            f"state data.dims, in place of {names}",
        )
    _check_components(variable, [variable.shape[axis] for axis in components], reference)
    return Axes(roles.get(MEMBER), roles.get(TIME), sides, tuple(components), tuple(names))


def _check_components(variable: Variable, sizes: list[int], reference: Reference) -> None:
    """Check that a reference chooses one of each component; a single one needs no choice."""
    chosen = reference.components
    if not chosen and all(size == 1 for size in sizes):
        return
    fits = len(chosen) == len(sizes) and all(one < size for one, size in zip(chosen, sizes))
    if not fits:
        counts = " x ".join(map(str, sizes)) or "no"
        raise refuse(
            "NO_COMPONENT",
            f"{variable.name}[{','.join(map(str, chosen))}] of {counts} components",
            f"{len(sizes)} number(s) below {', '.join(map(str, sizes)) or 'none'}",
            "choose a component by NAME[number], or state data.dims",
        )
