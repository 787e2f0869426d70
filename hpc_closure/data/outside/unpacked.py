"""Values of others that are unpacked once: a nameless file on a local disk holds them afterwards.

A set that is streamed is read in every epoch. Compressed files and Zarr in small chunks take
several times as long to unpack as the values take to be read from a disk or its cache.
"""

import os
import tempfile

import numpy as np

from hpc_closure.experiment.sources.source import Source
from hpc_closure.work import log


class Unpacked:
    """Fields of a source, read from the source once and from a nameless file from then on.

    The file disappears with the process, however that ends. Each process has a file of its own,
    with what it has read; the rest takes no space.

    Args:
        source: the files.
        folder: folder of the nameless file.

    Raises:
        ValueError: the folder cannot be written.
    """

    def __init__(self, source: Source, folder: str):
        self.source, self.folder = source, folder
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed in close
        except OSError as error:
            raise ValueError(
                f"data.unpack={folder}: {error.strerror}; expected a folder that can be written"
            ) from None
        self._fields = [(name, one) for name, each in source.fields.items() for one in each]
        shape = len(self._fields), source.members, len(source.times)
        self._holds = np.zeros(shape, dtype=bool)
        self._dtype: np.dtype | None = None
        self._full = False

    def read(self, member: int, times: slice, name: str, channel: str) -> np.ndarray:
        """Return a field of a trajectory; arguments and result as of ``Source.read``."""
        if self._full or (times.step or 1) != 1:
            return self.source.read(member, times, name, channel)
        field = self._fields.index((name, channel))
        held = self._holds[field, member, times]
        if held.all() and self._dtype is not None:
            values = np.empty((len(held), *self.source.points), self._dtype)
            target, done = memoryview(values.reshape(-1).data).cast("B"), 0
            while done < len(target):  # a system call may return less
                done += os.preadv(
                    self._file.fileno(), [target[done:]], self._place(field, member, times) + done
                )
            return values
        values = np.ascontiguousarray(self.source.read(member, times, name, channel))
        if self._dtype is None:
            self._dtype = values.dtype
        if values.dtype == self._dtype:
            self._write(field, member, times, values)
        return values

    def _write(self, field: int, member: int, times: slice, values: np.ndarray) -> None:
        source, done = memoryview(values.reshape(-1).data).cast("B"), 0
        try:
            while done < len(source):
                done += os.pwrite(
                    self._file.fileno(), source[done:], self._place(field, member, times) + done
                )
        except OSError as error:  # the disk is full: go on without it
            self._full = True
            self._file.truncate(0)
            log.warn_once(
                f"data.unpack={self.folder}: {error.strerror}; values are unpacked in every epoch"
            )
            return
        self._holds[field, member, times] = True

    def _place(self, field: int, member: int, times: slice) -> int:
        assert self._dtype is not None
        row = (field * self._holds.shape[1] + member) * self._holds.shape[2] + times.start
        return row * int(np.prod(self.source.points)) * self._dtype.itemsize

    def close(self) -> None:
        """Close the source and remove the file."""
        self._file.close()
        self.source.close()
