"""HDF5 files that survive a full disk.

When a write fails inside the HDF5 library (disk full, quota, file-size limit), the file can no
longer be closed in order: the library complains from its destructors and may crash the process at
its end. So HDF5 writes through a Python file here, which notes the first failure and keeps the
library content; the failure is then raised by us, as the OSError that it is, at the next flush or
at closing. The file is unfinished and never published.
"""

import atexit
import contextlib
import io
import weakref
from pathlib import Path

import h5py

_open: "weakref.WeakSet[WritableHDF5]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """HDF5 must not meet a file object of Python after the interpreter's end."""
    for file in list(_open):
        with contextlib.suppress(Exception):
            file.close()


class GuardedFile(io.FileIO):
    """A raw file whose failed writes are noted instead of raised.

    Attributes:
        failure: the first failure, or None.
    """

    failure: OSError | None = None

    def write(self, data) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while len(left) and self.failure is None:
                left = left[super().write(left) or 0:]
        except OSError as error:
            self.failure = self.failure or error
        return size

    def truncate(self, size=None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.failure = self.failure or error
            return size or 0

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.failure = self.failure or error

    def check(self) -> None:
        """Raise the failure, if there was one."""
        if self.failure is not None:
            raise self.failure


class WritableHDF5(h5py.File):
    """An HDF5 file opened for writing; flushing and closing raise what went wrong on the disk.

    Args:
        path: the file.
        mode: ``w`` (new), ``w-`` or ``x`` (must not exist), ``r+`` (must exist).
    """

    def __init__(self, path: Path | str, mode: str, **options):
        raw = {"w": "w+b", "w-": "x+b", "x": "x+b", "r+": "r+b"}[mode]
        self._raw = GuardedFile(path, raw.replace("b", ""))
        try:
            super().__init__(self._raw, "r+" if mode == "r+" else "w", **options)
        except BaseException:
            failure = self._raw.failure
            self._raw.close()
            if failure is not None:
                raise failure from None
            raise
        _open.add(self)

    def flush(self) -> None:
        super().flush()
        self._raw.check()

    def close(self) -> None:
        if not self:
            return
        super().close()
        self._raw.close()
        self._raw.check()
