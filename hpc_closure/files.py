"""Files that are either whole or absent, and errors that say which file and what to do.

A product is written to a private ``NAME.<host>-<pid>.part``, validated by reopening it, flushed to
the disk and renamed, so a reader never sees half a file and a killed writer leaves only a
``.part`` that nobody reads.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

RECIPE = ("members", "recipe", "recipe_hash")  # root attributes that count as content
_CHUNK = 1 << 24  # values hashed at a time


class DiskError(RuntimeError):
    """The disk is full, read-only or not ours: no unit's fault, so the whole verb stops."""


class DamagedFile(ValueError):
    """Truncated, foreign or torn: what it held has to be made again."""


_DISK_ERRORS = {
    errno.ENOSPC: "no space left on the device; free some or change `root`, then run again",
    errno.EDQUOT: "the disk quota is used up; free some or change `root`, then run again",
    errno.EFBIG: "the file would exceed the file-size limit (ulimit -f)",
    errno.EROFS: "the file system is read-only; change `root`",
    errno.EACCES: "permission denied; change `root` or ask the owner of the folder",
    errno.EPERM: "not permitted; change `root` or ask the owner of the folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "a folder of this name is in the way",
    errno.EEXIST: "a file is in the way where a folder is to be; move it or change `root`",
    errno.EIO: "the device reports an input/output error",
    errno.ESTALE: "the file server dropped the file (stale handle); run again",
}


def _disk_errno(error: BaseException) -> int | None:
    """The disk-related errno of an exception; h5py and safetensors put it only into the text."""
    code = getattr(error, "errno", None)
    if code is None:
        found = re.search(r"(?:errno = |os error )(\d+)", str(error))
        code = int(found.group(1)) if found else None
    return code if code in _DISK_ERRORS else None


def _from_h5py(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "h5py" in frames[-1].filename.replace("\\", "/")


@contextlib.contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turn disk-full, permission and similar errors about ``path`` into one clear DiskError."""
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        code = _disk_errno(error)
        if code is None:
            raise
        which = getattr(error, "filename", None) or path
        raise DiskError(f"cannot write {which}: {_DISK_ERRORS[code]}") from error


def make_folder(path: Path | str) -> None:
    """Make a folder and those above it. Raises DiskError when that cannot be."""
    with disk_errors(path):
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # inside /proc, say
            raise DiskError(f"cannot write {path}: {error.strerror}; change `root`") from error
        except FileExistsError as error:
            raise DiskError(f"cannot write {path}: it is a file, not a folder") from error


def token() -> str:
    """Name of this process, unique among the processes that share a file system."""
    return f"{socket.gethostname().split('.')[0]}-{os.getpid()}"


def fsync(path: Path | str) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems cannot flush a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def publish(path: Path | str,
            validate: Callable[[Path], object] | None = None) -> Iterator[Path]:
    """Write a file (or folder) so that ``path`` is either the whole product or what it was before.

        with publish(run.product("generate", unit), validate=store.check) as part:
            write(part)

    Args:
        path: final name; its folder is created.
        validate: called with the written ``.part``; an exception keeps the product unpublished.

    Yields:
        The private path to write to: a file that does not exist yet, or make it a folder.

    Raises:
        DiskError: disk full, not writable, ...
        RuntimeError: another process published the file meanwhile and removed our ``.part``.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{token()}.part")
    try:
        with disk_errors(path):
            make_folder(path.parent)
            remove(part)
            yield part
            if not part.exists():
                raise RuntimeError(f"{path.name}: its unfinished file was removed by another "
                                   "process that published the product first")
            if validate is not None:
                validate(part)
            _replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(part)
        raise
    for left in path.parent.glob(f"{path.name}.*.part"):  # of writers that were killed
        with contextlib.suppress(OSError):
            remove(left)


def adopt(path: Path, target: Path) -> None:
    """Rename the newest ``.part`` of ``path``, whose writer is dead, to ``target``."""

    def changed(left):
        with contextlib.suppress(FileNotFoundError):
            return left.stat().st_mtime
        return 0.0

    for left in sorted(path.parent.glob(f"{path.name}.*.part"), key=changed):
        with contextlib.suppress(FileNotFoundError):
            os.rename(left, target)


def _replace(part: Path, path: Path) -> None:
    if part.is_dir():
        for entry in sorted(part.rglob("*")):
            fsync(entry)
        fsync(part)
        if path.exists():  # rename cannot replace a folder that has entries
            old = path.with_name(f"{path.name}.{token()}.old.part")
            os.rename(path, old)
            os.rename(part, path)
            remove(old)
        else:
            os.rename(part, path)
    else:
        fsync(part)
        os.replace(part, path)
    fsync(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged or foreign file so that it stays but is never read again."""
    for number in range(1000):
        aside = path.with_name(f"{path.name}.damaged" + (f".{number}" if number else ""))
        if not aside.exists():
            break
    with disk_errors(path):
        os.rename(path, aside)
    return aside


# HDF5


@contextlib.contextmanager
def open_hdf5(path: Path | str, mode: str = "r", **options):
    """``h5py.File`` whose errors are one line that names the file and the way out.

        with open_hdf5(path) as file:
            file["t0_fields/vorticity"][...]

    Raises:
        FileNotFoundError: no such file.
        DamagedFile: truncated, damaged, or not an HDF5 file, or a data set is not in it.
        DiskError: while writing, see :func:`publish`.
    """
    import h5py

    path = Path(path)
    reading = mode == "r"
    if reading:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        if path.is_dir():
            raise ValueError(f"{path}: a folder, expected an HDF5 file")
    # Products never change and claims keep writers apart, so HDF5's own locks, which fail on some
    # cluster file systems, are not needed.
    with hdf5_errors(path):
        if reading:
            with h5py.File(path, mode, locking=False, **options) as file:
                yield file
        else:
            from .guarded import WritableHDF5

            with disk_errors(path), WritableHDF5(path, mode, **options) as file:
                yield file


@contextlib.contextmanager
def hdf5_errors(path: Path | str) -> Iterator[None]:
    """Turn what h5py raises about ``path`` into one line, see :func:`open_hdf5`."""
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
    """Content hash: data sets and recipe attributes, not provenance and time stamps.

    Two products are *equal* when this is equal.
    """
    digest = hashlib.sha256()
    with open_hdf5(path) as file:
        for key in RECIPE:
            _hash_attribute(digest, key, file.attrs.get(key, ""))
        for name, values in _datasets(file):
            _hash_values(digest, name, values, slice(None))
    return digest.hexdigest()


def sha256_members(path: Path | str) -> dict[int, str]:
    """Content hash of every member of a block: equal for any block size.

    A data set belongs to the members when its first axis has their number; all others (axes, ...)
    and the attribute ``recipe`` count for every member.
    """
    with open_hdf5(path) as file:
        try:
            members = [int(member) for member in file.attrs["members"]]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: its members are no list of numbers") from error
        digests = [hashlib.sha256(f"{member}".encode()) for member in members]
        for digest in digests:
            _hash_attribute(digest, "recipe", file.attrs.get("recipe", ""))
        for name, values in _datasets(file):
            own = bool(values.shape) and values.shape[0] == len(members) \
                and not name.startswith("dimensions")
            for row, digest in enumerate(digests):
                _hash_values(digest, name, values, slice(row, row + 1) if own else slice(None))
    return {member: digest.hexdigest() for member, digest in zip(members, digests)}


def _datasets(file):
    """Every data set of an open file, in sorted order."""
    found = {}
    file.visititems(lambda name, item: found.update({name: item})
                    if hasattr(item, "shape") else None)
    return sorted(found.items())


def _hash_attribute(digest, key, value) -> None:
    import numpy as np

    if isinstance(value, (str, bytes)):
        text = value.encode() if isinstance(value, str) else value
    else:
        value = np.asarray(value)
        text = repr(value.tolist()).encode()
    digest.update(key.encode() + b"=" + text + b"\0")


def _hash_values(digest, name, item, rows) -> None:
    import numpy as np

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
        values = item[first:min(stop, first + step)]
        if values.dtype == object:
            digest.update(repr([str(value) for value in values.ravel()]).encode())
        else:
            digest.update(np.ascontiguousarray(values).tobytes())


# JSON and text


def write_text(path: Path | str, text: str) -> None:
    """Write a small text file atomically."""
    with publish(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def read_json(path: Path | str):
    """Read a JSON file.

    Raises:
        FileNotFoundError, ValueError: missing or damaged, naming the file.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a valid JSON file ({error}); delete it and run again"
                         ) from error
    except OSError as error:
        raise DiskError(f"{path}: cannot be read ({error.strerror})") from error


def append_jsonl(path: Path | str, record: dict) -> None:
    """Append one line; a single write, so that lines of several processes stay apart."""
    path = Path(path)
    line = (json.dumps(record, default=str) + "\n").encode()
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            end = os.fstat(handle).st_size
            if end and os.pread(handle, 1, end - 1) != b"\n":  # a torn line of a killed writer
                line = b"\n" + line
            os.write(handle, line)
        finally:
            os.close(handle)


def read_jsonl(path: Path | str) -> list[dict]:
    """All whole lines of a JSON-lines file (none when it is absent); torn lines are skipped."""
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DiskError(f"{path}: cannot be read ({error.strerror})") from error
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
