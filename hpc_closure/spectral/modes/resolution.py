"""Points and modes: products of two retained fields must be free of aliasing (2/3 rule).

This module imports no torch, because experiments are read without it.
"""

from collections.abc import Sequence
from typing import Any


def alike(values: Any) -> Any:
    """Return the number that all sides share, or else a tuple with one per side.

    ``values`` are a number, which is returned unchanged, or numbers per side.
    """
    if not isinstance(values, Sequence):
        return values
    return values[0] if len(set(values)) == 1 else tuple(values)


def points_of(shape: Sequence[int], dimensions: int) -> Any:
    """Return the points per side of fields of this shape; a tuple if sides differ."""
    return alike(tuple(shape[-dimensions:]))


def retained_modes(size: Any) -> Any:
    """Return the largest ``K`` with ``size >= 3 K + 1``; of points per side, one per side."""
    if isinstance(size, Sequence):
        return alike([retained_modes(points) for points in size])
    return (size - 1) // 3


def points_for(modes: int) -> int:
    """Return the points per side of the smallest even grid that retains ``modes``."""
    return 2 * -(-(3 * modes + 1) // 2)


def smallest_grid(trained: Any) -> Any:
    """Return the points per side that carry the modes of a model trained on ``trained`` points.

    Of points per side, return one number per side.
    """
    if isinstance(trained, Sequence):
        return alike([smallest_grid(points) for points in trained])
    return 2 * retained_modes(trained) + 2


def pencils(ranks: int, columns: int, halves: int) -> tuple[int, int]:
    """Return into how many parts ``ranks`` divide the columns ky and the modes kz.

    Args:
        ranks: number of ranks.
        columns, halves: numbers of columns and of modes kz of a full spectrum.

    Raises:
        ValueError: there is no such division.
    """
    for first in range(min(ranks, columns), 0, -1):
        if ranks % first == 0 and ranks // first <= halves:
            return first, ranks // first
    raise ValueError(
        f"{ranks} domain ranks are not a product of at most {columns} (ky) and {halves} (kz): "
        "choose another number"
    )


def per_side(value, dimensions: int, name: str = "value") -> tuple:
    """Return a number, or one per side, as a tuple with an entry per side.

    Raises:
        ValueError: a sequence has another number of entries.
    """
    if not isinstance(value, Sequence):
        return (value,) * dimensions
    if len(value) != dimensions:
        raise ValueError(f"{name} {tuple(value)} has {len(value)} entries, expected {dimensions}")
    return tuple(value)
