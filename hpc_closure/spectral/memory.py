"""What the C library does with memory that was freed."""

from __future__ import annotations

import ctypes
import functools


@functools.cache
def keep_freed_memory() -> None:
    """Ask the C library to keep freed work arrays instead of returning their pages.

    FFTs return new arrays at every step; handing a megabyte back and faulting it in again costs as
    much as the transform. glibc only; elsewhere nothing happens.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, 32 << 20)
    mallopt(M_TRIM_THRESHOLD, 512 << 20)
