"""Points and modes: products of two retained fields must be free of aliasing (2/3 rule)."""


def retained_modes(size: int) -> int:
    """Largest ``K`` with ``size >= 3 K + 1``."""
    return (size - 1) // 3


def points_for(modes: int) -> int:
    """Points per side of the smallest even grid that retains ``modes``."""
    return 2 * -(-(3 * modes + 1) // 2)


def smallest_grid(trained: int) -> int:
    """Points per side that carry the retained modes of a model trained on ``trained`` points."""
    return 2 * retained_modes(trained) + 2
