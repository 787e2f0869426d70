"""Write files that are either complete or absent; turn disk errors into one clear line.

A product is written to a private ``NAME.<host>-<pid>-<random>.part``, validated by reopening it,
flushed to the disk and renamed. So a reader never sees half a file, and a killed writer leaves
only a ``.part`` that nobody reads.
"""

import contextlib
import errno
import functools
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path


class DiskError(RuntimeError):
    """The disk is full, read-only or not ours. The whole verb stops: no unit is at fault."""


class DamagedFile(ValueError):
    """A file is truncated, foreign or torn; its content must be made again."""


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
    """Return the disk-related errno of an exception, or None.

    h5py and safetensors put the number into the text only.
    """
    code = getattr(error, "errno", None)
    if code is None:
        number = re.search(r"(?:errno = |os error )(\d+)", str(error))
        code = int(number.group(1)) if number else None
    return code if code in _DISK_ERRORS else None


@contextlib.contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turn disk-full, permission and similar errors about ``path`` into one DiskError."""
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
    """Make a folder and its parents; raise DiskError if that is impossible."""
    with disk_errors(path):
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # inside /proc, say
            raise DiskError(f"cannot write {path}: {error.strerror}; change `root`") from error
        except FileExistsError as error:
            raise DiskError(f"cannot write {path}: it is a file, not a folder") from error


def make_new_folder(path: Path) -> bool:
    """Make a folder; return whether it did not exist."""
    try:
        os.mkdir(path)
        return True
    except OSError:  # it exists, its parents do not, or the disk refuses
        existed = path.is_dir()
        make_folder(path)
    return not existed


def token() -> str:
    """Return a name of this process, unique among all that ever share a file system."""
    return _token(os.getpid())


@functools.cache
def _token(pid: int) -> str:
    # The random part differs where a process number comes back, as in every container.
    return f"{socket.gethostname().split('.')[0]}-{pid}-{secrets.token_hex(4)}"


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
def publish(
    path: Path | str,
    validate: Callable[[Path], object] | None = None,
    *,
    lean: bool = False,
) -> Iterator[Path]:
    """Write a file (or folder) so that ``path`` is either the complete product or unchanged.

        with publish(run.product("generate", unit), validate=store.check) as part:
            write(part)

    Args:
        path: final name; its folder is made.
        validate: called with the written ``.part``; an exception prevents the publication.
        lean: the file is renamed, and nothing else touches the file system, because thousands of
            files are published in one folder. The caller has made the folder, ``validate`` has
            flushed the file, and the caller flushes the folder and calls :func:`remove_parts`.

    Yields:
        The private path to write to. It does not exist yet; a folder may be made there.

    Raises:
        DiskError: the disk is full, not writable, ...
        RuntimeError: another process published the file meanwhile and removed this ``.part``.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{token()}.part")
    try:
        with disk_errors(path):
            if not lean:
                make_folder(path.parent)
            yield part
            try:
                if validate is not None:
                    validate(part)
                _replace(part, path, lean)
            except FileNotFoundError as error:
                if part.exists():
                    raise
                raise RuntimeError(
                    f"{path.name}: its unfinished file was removed by another "
                    "process that published the product first"
                ) from error
    except BaseException:
        with contextlib.suppress(OSError):
            remove(part)
        raise
    if not lean:
        remove_parts(path)


def remove_parts(path: Path) -> None:
    """Remove the ``.part`` files of ``path``, which killed writers left."""
    for orphan in path.parent.glob(f"{path.name}.*.part"):
        with contextlib.suppress(OSError):
            remove(orphan)


def adopt(path: Path, target: Path) -> None:
    """Rename the newest ``.part`` of ``path``, whose writer is dead, to ``target``."""

    def modified(part):
        with contextlib.suppress(FileNotFoundError):
            return part.stat().st_mtime
        return 0.0

    for part in sorted(path.parent.glob(f"{path.name}.*.part"), key=modified):
        with contextlib.suppress(FileNotFoundError):
            os.rename(part, target)


def _replace(part: Path, path: Path, lean: bool) -> None:
    if lean:
        os.replace(part, path)
        return
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
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder, which is usually empty, if it exists."""
    try:
        os.rmdir(path)
    except FileNotFoundError:
        pass
    except OSError:  # it has files
        shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged or foreign file so that it is never read; returns the new name."""
    for number in range(1000):
        aside = path.with_name(f"{path.name}.damaged" + (f".{number}" if number else ""))
        if not aside.exists():
            break
    with disk_errors(path):
        os.rename(path, aside)
    return aside


# JSON and text


def write_text(path: Path | str, text: str) -> None:
    """Write a small text file atomically."""
    with publish(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def read_json(path: Path | str):
    """Return the content of a JSON file.

    Raises:
        FileNotFoundError, ValueError: missing or damaged; the message names the file.
        DiskError: the file cannot be read.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: not a valid JSON file ({error}); delete it and run again"
        ) from error
    except OSError as error:
        raise DiskError(f"{path}: cannot be read ({error.strerror})") from error


def append_jsonl(path: Path | str, record: dict) -> None:
    """Append one line with a single write, so that lines of several processes do not mix."""
    path = Path(path)
    line = (json.dumps(record, default=str) + "\n").encode()
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            end = os.fstat(handle).st_size
            if end and os.pread(handle, 1, end - 1) != b"\n":  # a killed writer left a torn line
                line = b"\n" + line
            os.write(handle, line)
        finally:
            os.close(handle)


def read_jsonl(path: Path | str) -> list[dict]:
    """Return all complete lines of a JSON-lines file; torn lines are skipped.

    An absent file has no lines.
    """
    lines, _ = read_lines_from(path, 0)
    return [record for line in lines if (record := json_line(line)) is not None]


def json_line(line: bytes) -> dict | None:
    """Return the object of a line of a JSON-lines file; None if the line is torn."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_lines_from(path: Path | str, offset: int) -> tuple[list[bytes], int]:
    """Return the lines of a file from a byte on, and the byte after the last complete one.

    A line that is still being written counts as read only in part: the next call begins with it.
    An absent file has no lines.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            text = file.read()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise DiskError(f"{path}: cannot be read ({error.strerror})") from error
    return text.splitlines(), offset + text.rfind(b"\n") + 1
