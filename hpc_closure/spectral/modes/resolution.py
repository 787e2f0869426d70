"""Points and modes: products of two retained fields must be free of aliasing (2/3 rule).

This module imports no torch, because experiments are read without it.
"""


def retained_modes(size: int) -> int:
    """Return the largest ``K`` with ``size >= 3 K + 1``."""
    return (size - 1) // 3


def points_for(modes: int) -> int:
    """Return the points per side of the smallest even grid that retains ``modes``."""
    return 2 * -(-(3 * modes + 1) // 2)


def smallest_grid(trained: int) -> int:
    """Return the points per side that carry the modes of a model trained on ``trained`` points."""
    return 2 * retained_modes(trained) + 2
