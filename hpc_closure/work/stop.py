"""Stop early: signals and a time limit set one flag; loops test it between steps.

    with Stop(max_elapsed=3 * 3600) as stop:
        for step in ...:
            if stop.agree(world):
                save()
                raise Stopped(stop.reason)      # exit code 75: run me again

The signal handler raises nothing at the first signal. Python runs it between any two instructions,
and an exception raised inside a destructor or the callback of a weak reference is lost there.
"""

import os
import signal
import threading
import time
from typing import Any, ClassVar

EXIT_STOPPED = 75
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP")


class Stopped(SystemExit):
    """Work was saved and the same command continues it; exit code 75."""

    def __init__(self, reason: str = "stopped"):
        super().__init__(EXIT_STOPPED)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason}; everything is saved, the same command continues"


class Stop:
    """One flag, set by SIGTERM, SIGUSR1, SIGUSR2, Ctrl-C, a closed terminal or the time limit.

    A second Ctrl-C interrupts at once. Under ``nohup`` a closed terminal does nothing.

    The handlers of before come back at the end. A program that ends once it was stopped sets
    ``Stop.process_ends``, and the signals are ignored from then on: Slurm sends SIGTERM more than
    once, and one that arrives while Python shuts down would replace exit code 75, with which the
    job is requeued.

    Args:
        max_elapsed: time limit in seconds, or None.
    """

    process_ends: ClassVar[bool] = False

    def __init__(self, max_elapsed: float | None = None):
        self.deadline = None if max_elapsed is None else time.monotonic() + max_elapsed
        self.max_elapsed = max_elapsed
        self.reason = ""
        self._interrupts = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name)
                if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            if self.process_ends and self.reason and number != signal.SIGINT:
                handler = signal.SIG_IGN
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}

    def _handle(self, number, frame) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
            # os.write, because printing inside a handler may re-enter the stream.
            os.write(2, b"\nstopping after this step; Ctrl-C again aborts\n")
        self.request("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    def request(self, reason: str) -> None:
        """Set the flag from code."""
        if not self.reason:
            self.reason = reason

    @property
    def requested(self) -> bool:
        """Return True if this process must stop."""
        if not self.reason and self.deadline is not None and time.monotonic() >= self.deadline:
            self.request(f"time limit of {self.max_elapsed:g} s reached")
        return bool(self.reason)

    def check(self) -> None:
        """Raise :class:`Stopped` if this process must stop; for loops with nothing to save."""
        if self.requested:
            raise Stopped(self.reason)

    @property
    def remaining(self) -> float:
        """Return the seconds until the time limit (infinite without one)."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def agree(self, world=None) -> bool:
        """Return True on every rank of ``world`` if one of them must stop (collective)."""
        requested = self.requested
        if world is None or world.size == 1:
            return requested
        if world.any(requested):
            self.request("another rank was asked to stop")
        return bool(self.reason)
