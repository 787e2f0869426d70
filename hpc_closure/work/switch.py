"""Switches that are off inside a block, for one thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


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
