"""Functions compiled by Numba and cached on disk, so that later processes need not compile."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
from torch import Tensor


def jit(function: Callable, **options: Any) -> Any:
    """Compile ``function``: it releases the GIL, and division by zero gives infinity."""
    return numba.njit(nogil=True, error_model="numpy", **options)(function)


def cached(function: Callable, **options: Any) -> Any:
    """Compile ``function`` and cache it on disk if a folder is writable.

    The cache is stale only if the function's own file changes, not if another one does. Numba
    identifies functions by name, so no two functions may share a name.
    """
    try:
        return jit(function, cache=True, **options)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return jit(function, **options)


def compare(
    actual: Tensor, expected: Tensor, bound: float, subject: str, source_file: str
) -> None:
    """Raise RuntimeError unless a compiled result equals the expected one.

    Called once per process, because a wrong function in the disk cache would go unnoticed.

    Args:
        actual, expected: result of compiled functions and result without them.
        bound: largest difference allowed, relative to the largest expected value.
        subject: quantity that the functions compute, for the message.
        source_file: file of the functions.
    """
    if not (actual - expected).abs().max() <= bound * expected.abs().max():
        cache = Path(source_file).with_name("__pycache__")
        raise RuntimeError(
            f"compiled functions of {subject} are wrong: remove Numba's cache of them ({cache}, "
            "or $NUMBA_CACHE_DIR) and run again"
        )


def load(program: Any, *arguments: Any) -> None:
    """Call ``program`` once, so that it is compiled or read; a damaged cache is rebuilt."""
    try:
        program(*arguments)
    except Exception:  # a damaged cache raises errors of many types
        program._cache.flush()
        program(*arguments)


class Switch(threading.local):
    """A flag that is on except inside :meth:`off`, per thread."""

    on = True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Turn the flag off inside the block, for this thread."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before
