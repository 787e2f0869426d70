"""A state that several members share: what is made of it once goes to each of them."""

from torch import Tensor

__all__ = ["for_members"]


def for_members(rows: Tensor, count: int) -> Tensor:
    """Rows (B, ...) of states as those of ``count`` members, B times as many in a row each.

    One row for all members, and one for each, are left as they are.
    """
    if len(rows) in (1, count):
        return rows
    return rows.repeat_interleave(count // len(rows), 0)
