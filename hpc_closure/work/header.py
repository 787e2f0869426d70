"""The header of a block file: what the books of a stage know of it.

The root attributes ``members``, ``recipe_hash``, ``holds`` and, written last, ``complete = 1``.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpc_closure.work.hdf5 import open_hdf5

BLOCK = re.compile(r"block_(\d{6,})-(\d{6,})\.h5")  # name of a finished block
RECORDED = ("first", "last", "recipe", "holds", "size", "mtime", "lost")  # in the manifest


@dataclass(frozen=True)
class Header:
    """Header of a finished block.

    Attributes:
        path: the file.
        first, last: its members.
        recipe: hash of what made it.
        holds: its end time and outputs, see :class:`~hpc_closure.work.units.Ledger`.
        size: bytes.
        mtime: time of change, nanoseconds.
        lost: what diverged: by data set, the number of the stored time from which a member is NaN.
    """

    path: Path
    first: int
    last: int
    recipe: str
    holds: dict
    size: int
    mtime: int
    lost: dict

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(range(self.first, self.last + 1))

    @property
    def lost_members(self) -> set[int]:
        """Members of which something diverged."""
        return {int(member) for record in self.lost.values() for member in record}

    @property
    def changed(self) -> float:
        """When it was published, seconds since the epoch."""
        return 1e-9 * self.mtime

    @classmethod
    def read(cls, path: Path | str) -> "Header":
        """Header of a block file.

        Raises:
            ValueError: unfinished, damaged or foreign; one line that names the file.
        """
        with open_hdf5(path) as file:
            return cls.of(file, Path(path))

    @classmethod
    def of(cls, file, path: Path) -> "Header":
        """The same of an open ``h5py.File``."""
        complete = file.attrs.get("complete", 0)
        if np.ndim(complete) or complete != 1:
            raise ValueError(
                f"{path}: unfinished (not marked complete); run the verb that makes it again"
            )
        members = np.atleast_1d(np.asarray(file.attrs.get("members", ())))
        integers = members.ndim == 1 and members.dtype.kind in "iu" and len(members) > 0
        expect(path, integers and (np.diff(members) == 1).all(), "it has no list of members")
        holds = json_object(file.attrs.get("holds", "{}"))
        end = (holds or {}).get("t_end", 0.0)
        expect(path, holds is not None and isinstance(end, (int, float)), "its holds is damaged")
        lost = json_object(file.attrs.get("lost", "{}"))
        expect(path, lost is not None and _is_lost(lost), "its list of what is lost is damaged")
        stat = path.stat()
        header = Header(
            path,
            int(members[0]),
            int(members[-1]),
            str(file.attrs.get("recipe_hash", "")),
            holds or {},
            stat.st_size,
            stat.st_mtime_ns,
            lost or {},
        )
        name = BLOCK.fullmatch(path.name)
        if name and (int(name.group(1)), int(name.group(2))) != (header.first, header.last):
            raise ValueError(
                f"{path}: holds members {header.first}-{header.last}, not those of its name; it "
                "was renamed or is of another run"
            )
        return header

    def as_record(self) -> dict:
        """The line of the manifest."""
        return {"name": self.path.name, **{key: getattr(self, key) for key in RECORDED}}

    @classmethod
    def from_record(cls, path: Path, record: dict) -> "Header | None":
        """Header of ``path`` from a line of the manifest; None when it is not of a header."""
        if not set(RECORDED) <= set(record):
            return None
        return cls(path, *(record[key] for key in RECORDED))


def _is_lost(record: dict) -> bool:
    """Whether a record tells stored times by data set and member."""
    return all(
        isinstance(one, dict) and all(isinstance(index, int) for index in one.values())
        for one in record.values()
    )


def expect(path: Path, condition: bool, what: str) -> None:
    """Raise ValueError with ``what`` is wrong with a block file and the way out."""
    if not condition:
        raise ValueError(
            f"{path}: {what}: not a block of this package, or damaged; delete it and run the "
            "verb that makes it again"
        )


def json_object(text) -> dict | None:
    """The object that a JSON attribute tells; None when it is none."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
