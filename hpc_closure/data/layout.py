"""What readers of a block file rely on, checked once when it is opened."""

import json
from pathlib import Path

import numpy as np


def check_layout(file, path: Path) -> None:
    """Check header and shapes of an open block.

    Args:
        file: an open ``h5py.File``.
        path: for the message.

    Raises:
        ValueError: unfinished, foreign or damaged; one line that names the file.
    """

    def expect(condition: bool, what: str) -> None:
        if not condition:
            raise ValueError(
                f"{path}: {what}: not a block of this package, or damaged; delete it and run the "
                "verb that makes it again"
            )

    complete = file.attrs.get("complete", 0)
    expect("t0_fields" in file and "members" in file.attrs, "it has no t0_fields or members")
    if np.ndim(complete) or complete != 1:
        raise ValueError(f"{path}: unfinished (not marked complete); run the same verb again")
    members = np.asarray(file.attrs["members"])
    expect(members.ndim == 1 and members.dtype.kind in "iu", "its members are no list of numbers")
    expect(len(members) > 0 and len(np.unique(members)) == len(members), "its members repeat")
    for name in ("recipe", "provenance", "holds", "certificate"):
        expect(_is_json(file.attrs.get(name, "{}")), f"its {name} is not JSON")
    times = file.get("dimensions/time")
    expect(times is not None and times.ndim == 1 and times.dtype.kind == "f", "it has no times")
    shape = (len(members), len(times))
    sides = file.attrs.get("n_spatial_dims", 2)
    expect(np.ndim(sides) == 0 and sides in (1, 2), "it is of neither one nor two dimensions")
    x = file.get("dimensions/x")
    expect(x is not None and x.ndim == 1, "it has no points x")
    state = "vorticity" if sides == 2 else "state"
    expect(state in file["t0_fields"], f"it has no {state}")
    fields = ("t0_fields", 2 + sides), ("t1_fields", 3 + sides), ("filtered", 2 + sides)
    groups = [(group, ndim, shape) for group, ndim in (*fields, ("scalars", 2))]
    for group, ndim, rows in [*groups, ("references", 4, None)]:
        for name, values in file.get(group, {}).items():
            fits = hasattr(values, "dtype") and values.ndim == ndim and values.dtype.kind == "f"
            fits = fits and (values.shape[:2] == rows if rows else values.shape[1] == shape[1])
            expect(fits, f"{group}/{name} is not of {shape[0]} members and {shape[1]} times")
    moments = file.get("dimensions/series_time")
    for name, values in file.get("series", {}).items():
        fits = moments is not None and moments.ndim == 1 and hasattr(values, "dtype")
        fits = fits and values.shape[:2] == (len(members), len(moments))
        expect(fits, f"series/{name} is not of {shape[0]} members and its times")


def _is_json(text) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (TypeError, ValueError, RecursionError):
        return False
