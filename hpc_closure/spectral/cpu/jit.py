"""Functions compiled by Numba, kept on disk: the second process reads what the first has made."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
from torch import Tensor


def jit(function: Callable, **options: Any) -> Any:
    """``function`` compiled: other threads may run, and what is divided by zero is infinite."""
    return numba.njit(nogil=True, error_model="numpy", **options)(function)


def kept(function: Callable, **options: Any) -> Any:
    """``function`` compiled, and kept on disk where there is a place for it.

    What is kept is stale when the function's own file changes, not when another does; and Numba
    knows functions by their names, so a name must be that of one function alone.
    """
    try:
        return jit(function, cache=True, **options)
    except RuntimeError:  # neither the folder of the package nor the user's cache can be written
        return jit(function, **options)


def compare(found: Tensor, expected: Tensor, bound: float, what: str, beside: str) -> None:
    """Raise RuntimeError unless what compiled functions found is what was expected.

    Once in a process: a wrong function that was kept on disk would go unseen.

    Args:
        found, expected: the same by compiled functions and without.
        bound: on the difference, as a share of the largest.
        what: they compute.
        beside: the file of the functions.
    """
    if not (found - expected).abs().max() <= bound * expected.abs().max():
        kept = Path(beside).with_name("__pycache__")
        raise RuntimeError(
            f"compiled functions of {what} are wrong: remove what Numba keeps of them ({kept}, or "
            "$NUMBA_CACHE_DIR) and start again"
        )


def load(program: Any, *arguments: Any) -> None:
    """A first call, which compiles or reads what was kept; what cannot be read is made again."""
    try:
        program(*arguments)
    except Exception:  # damage shows in many ways
        program._cache.flush()
        program(*arguments)


class Switch(threading.local):
    """On, but for the blocks of :meth:`off` of the same thread."""

    on = True

    @contextmanager
    def off(self) -> Iterator[None]:
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before
