"""A state that several members share: what is made of it once goes to each of them."""

from torch import Tensor

__all__ = ["each_member", "for_members"]


def for_members(rows: Tensor, count: int) -> Tensor:
    """Rows (B, ...) of states as those of ``count`` members, B times as many in a row each.

    One row for all members, and one for each, are left as they are.
    """
    if len(rows) in (1, count):
        return rows
    return rows.repeat_interleave(count // len(rows), 0)


def each_member(rows: Tensor, count: int) -> Tensor:
    """The same, where one row for all members is seen ``count`` times, too."""
    return for_members(rows, count).expand(count, *rows.shape[1:])
