"""HDF5 files: errors in one line, content hashes, and writers that survive a full disk.

If a write fails inside the HDF5 library (disk full, quota, file-size limit), the file can no
longer be closed in order: the library complains from its destructors and may crash the process at
its end. So here HDF5 writes through a Python file, which notes the first failure and reports
success to the library. The failure is raised as an OSError at the next flush or at closing. The
file is unfinished and never published.
"""

import atexit
import contextlib
import hashlib
import io
import os
import re
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from hpc_closure.work.atomic import DamagedFile, DiskError, disk_errors

RECIPE = ("members", "recipe", "recipe_hash")  # root attributes that are hashed as content
_CHUNK = 1 << 24  # values that are hashed at a time

_open: "weakref.WeakSet[WritableHDF5]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Close open files: HDF5 must not call a Python file after the interpreter's end."""
    for file in list(_open):
        with contextlib.suppress(Exception):
            file.close()


class GuardedFile(io.FileIO):
    """A raw file that notes failed writes instead of raising them.

    Attributes:
        failure: the first failure, or None.
    """

    failure: OSError | None = None

    def write(self, data) -> int:
        remaining = memoryview(data).cast("B")
        size = len(remaining)
        try:
            while len(remaining) and self.failure is None:
                remaining = remaining[super().write(remaining) or 0 :]
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
        """Raise the noted failure, if any."""
        if self.failure is not None:
            raise self.failure


class WritableHDF5(h5py.File):
    """An HDF5 file open for writing; flushing and closing raise errors of the disk.

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

    def finish(self) -> GuardedFile:
        """Close the HDF5 file; return the file below it, which is still open, for its check."""
        super().close()
        try:
            self._raw.check()
        except OSError:
            self._raw.close()
            raise
        return self._raw


class WrittenHDF5(h5py.File):
    """An HDF5 file that was just written, open for its check; closing flushes it to the disk.

    One handle serves the writing, the check and the flush, because opening a file is a request to
    the server.

    Args:
        file: what :meth:`WritableHDF5.finish` returned, or the path.
    """

    def __init__(self, file: io.FileIO | Path | str):
        self._raw = file if isinstance(file, io.FileIO) else io.FileIO(file)
        try:
            super().__init__(self._raw, "r")
        except BaseException:
            self._raw.close()
            raise

    def stat(self) -> os.stat_result:
        """Return size and times of the file."""
        return os.fstat(self._raw.fileno())

    def close(self) -> None:
        if not self:
            return
        super().close()
        with self._raw:
            os.fsync(self._raw.fileno())


def _from_h5py(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "h5py" in frames[-1].filename.replace("\\", "/")


@contextlib.contextmanager
def open_hdf5(
    path: Path | str,
    mode: str = "r",
    *,
    flush: bool = False,
    written: GuardedFile | None = None,
    **options,
):
    """Open an ``h5py.File`` whose errors are one line with the file and the way out.

        with open_hdf5(path) as file:
            file["t0_fields/vorticity"][...]

    Args:
        path: the file.
        mode: ``r``, or one of :class:`WritableHDF5`.
        flush: with ``r``, flush the file to the disk when it is closed; see :class:`WrittenHDF5`.
        written: with ``flush``, the file itself, open since it was written.
        options: of ``h5py.File``.

    Raises:
        FileNotFoundError: no such file.
        DamagedFile: truncated, damaged, not an HDF5 file, or a data set is missing.
        DiskError: while writing, see :func:`~hpc_closure.work.atomic.publish`.
    """
    path = Path(path)
    # Products never change and claims separate writers, so HDF5's locks, which fail on some
    # cluster file systems, are not needed.
    with hdf5_errors(path):
        if mode == "r":
            with _open_to_read(path, flush, written, options) as file:
                yield file
        else:
            with disk_errors(path), WritableHDF5(path, mode, **options) as file:
                yield file


def _open_to_read(
    path: Path, flush: bool, written: GuardedFile | None, options: dict
) -> h5py.File:
    try:
        if flush:
            return WrittenHDF5(written or path)
        return h5py.File(path, "r", locking=False, **options)
    except OSError:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file") from None
        if path.is_dir():
            raise ValueError(f"{path}: a folder, expected an HDF5 file") from None
        raise


@contextlib.contextmanager
def hdf5_errors(path: Path | str) -> Iterator[None]:
    """Turn errors of h5py about ``path`` into one line, see :func:`open_hdf5`."""
    path = Path(path)
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, DiskError) or not _from_h5py(error):
            raise
        if isinstance(error, PermissionError) or "errno = 13" in str(error):
            raise DiskError(f"{path}: permission denied") from error
        raise DamagedFile(f"{path}: {_hdf5_reason(path, error)}") from error


def _hdf5_reason(path: Path, error: BaseException) -> str:
    way_out = "run the verb that makes it: it is set aside and made again"
    text = str(error).strip("'\"")
    if "file signature not found" in text:
        size = path.stat().st_size
        return f"not an HDF5 file ({size} bytes); {way_out}"
    if "truncated" in text:
        return f"truncated HDF5 file ({path.stat().st_size} bytes); {way_out}"
    missing = re.search(r"object '([^']*)' doesn't exist", text)
    if missing:
        return f"has no {missing.group(1)!r}: not a product of this package, or of another version"
    if isinstance(error, KeyError) and "can't locate attribute" in text.lower():
        name = re.search(r"attribute: '([^']*)'|name '([^']*)'", text)
        which = next((part for part in name.groups() if part), "") if name else ""
        return f"has no attribute {which!r}: not a product of this package, or of another version"
    return f"damaged HDF5 file ({text.splitlines()[0][:160] if text else 'unreadable'}); {way_out}"


def sha256_datasets(path: Path | str) -> str:
    """Return the content hash of a file: data sets and recipe attributes.

    Provenance and time stamps are not hashed. Two products are *equal* if their hashes are.
    """
    digest = hashlib.sha256()
    with open_hdf5(path) as file:
        for key in RECIPE:
            _hash_attribute(digest, key, file.attrs.get(key, ""))
        for name, values in _datasets(file):
            _hash_values(digest, name, values, slice(None))
    return digest.hexdigest()


def sha256_members(path: Path | str) -> dict[int, str]:
    """Return the content hash of every member of a block, equal for any block size.

    A data set belongs to the members if its first axis has their number. All others (axes, ...)
    and the attribute ``recipe`` enter the hash of every member.

    Raises:
        ValueError: the file has no list of members.
    """
    with open_hdf5(path) as file:
        try:
            members = [int(member) for member in file.attrs["members"]]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: its attribute members is not a list of numbers") from error
        digests = [hashlib.sha256(f"{member}".encode()) for member in members]
        for digest in digests:
            _hash_attribute(digest, "recipe", file.attrs.get("recipe", ""))
        for name, values in _datasets(file):
            by_member = (
                bool(values.shape)
                and values.shape[0] == len(members)
                and not name.startswith("dimensions")
            )
            for row, digest in enumerate(digests):
                _hash_values(
                    digest, name, values, slice(row, row + 1) if by_member else slice(None)
                )
    return {member: digest.hexdigest() for member, digest in zip(members, digests)}


def _datasets(file):
    """Return every data set of an open file, in sorted order."""
    items = {}
    file.visititems(
        lambda name, item: items.update({name: item}) if hasattr(item, "shape") else None
    )
    return sorted(items.items())


def _hash_attribute(digest, key, value) -> None:
    if isinstance(value, (str, bytes)):
        text = value.encode() if isinstance(value, str) else value
    else:
        value = np.asarray(value)
        text = repr(value.tolist()).encode()
    digest.update(key.encode() + b"=" + text + b"\0")


def _hash_values(digest, name, item, rows) -> None:
    shape = list(item.shape)
    if shape:
        start, stop, _ = rows.indices(shape[0])
        shape[0] = stop - start
    digest.update(f"{name} {item.dtype.str} {shape}".encode() + b"\0")
    if not item.shape:
        value = item[()]
        digest.update(value if isinstance(value, bytes) else np.asarray(value).tobytes())
        return
    per_row = max(1, int(np.prod(item.shape[1:], dtype=np.int64)))
    step = max(1, _CHUNK // per_row)
    for first in range(start, stop, step):
        values = item[first : min(stop, first + step)]
        if values.dtype == object:
            digest.update(repr([str(value) for value in values.ravel()]).encode())
        else:
            digest.update(np.ascontiguousarray(values).tobytes())
