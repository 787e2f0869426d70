"""Points and modes: products of two retained fields must be free of aliasing (2/3 rule).

This module imports no torch, because experiments are read without it.
"""

from collections.abc import Sequence


def retained_modes(size: int) -> int:
    """Return the largest ``K`` with ``size >= 3 K + 1``."""
    return (size - 1) // 3


def points_for(modes: int) -> int:
    """Return the points per side of the smallest even grid that retains ``modes``."""
    return 2 * -(-(3 * modes + 1) // 2)


def smallest_grid(trained: int) -> int:
    """Return the points per side that carry the modes of a model trained on ``trained`` points."""
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
