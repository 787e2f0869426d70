"""Repeat rows of states for the members that share a state."""

from torch import Tensor

__all__ = ["each_member", "for_members"]


def for_members(rows: Tensor, count: int) -> Tensor:
    """Repeat rows (B, ...) of states for ``count`` members; returns (count, ...) or (1, ...).

    State b is repeated for members b M/B to (b + 1) M/B - 1, with M = ``count``. Rows are
    returned unchanged if B is 1 (shared by all members) or M.
    """
    if len(rows) in (1, count):
        return rows
    return rows.repeat_interleave(count // len(rows), 0)


def each_member(rows: Tensor, count: int) -> Tensor:
    """Repeat rows as :func:`for_members`, and expand a single row; returns (count, ...)."""
    return for_members(rows, count).expand(count, *rows.shape[1:])
