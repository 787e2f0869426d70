"""The header of a block file: what the books of a stage need to know about it.

It is stored as the root attributes ``members``, ``recipe_hash``, ``holds`` and, written last,
``complete = 1``.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpc_closure.experiment.folder import UNIT
from hpc_closure.work.hdf5 import GuardedFile, WrittenHDF5, open_hdf5

BLOCK = re.compile(rf"block_{UNIT}\.h5")  # name of a finished block
RECORDED = ("first", "last", "recipe", "holds", "size", "mtime", "lost")  # in the manifest


@dataclass(frozen=True)
class Header:
    """Header of a finished block.

    Attributes:
        path: the file.
        first, last: first and last member.
        recipe: hash of the recipe that made the block.
        holds: end time and outputs, see :class:`~hpc_closure.work.units.Ledger`.
        size: bytes.
        mtime: time of change, nanoseconds.
        lost: members that diverged: for each data set, the index of the stored time from which a
            member is NaN.
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
        """Return the members with something that diverged."""
        return {int(member) for record in self.lost.values() for member in record}

    @property
    def changed(self) -> float:
        """Return the time of publication, seconds since the epoch."""
        return 1e-9 * self.mtime

    @classmethod
    def read(
        cls, path: Path | str, flush: bool = False, written: GuardedFile | None = None
    ) -> "Header":
        """Return the header of a block file; ``flush``: it was just written, flush it to the disk.

        ``written``: the file itself, if it is still open since it was written.

        Raises:
            ValueError: unfinished, damaged or foreign; one line that names the file.
        """
        with open_hdf5(path, flush=flush, written=written) as file:
            return cls.from_file(file, Path(path))

    @classmethod
    def from_file(cls, file, path: Path) -> "Header":
        """Return the header of an open ``h5py.File``; see :meth:`read`."""
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
        expect(
            path,
            holds is not None and isinstance(end, (int, float)),
            "its attribute holds is damaged",
        )
        lost = json_object(file.attrs.get("lost", "{}"))
        expect(path, lost is not None and _is_lost_record(lost), "its attribute lost is damaged")
        stat = file.stat() if isinstance(file, WrittenHDF5) else path.stat()
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
        """Return the line of the manifest."""
        return {"name": self.path.name, **{key: getattr(self, key) for key in RECORDED}}

    @classmethod
    def from_record(cls, path: Path, record: dict) -> "Header | None":
        """Return the header of ``path`` from a line of the manifest; None if a key is missing."""
        if not set(RECORDED) <= set(record):
            return None
        return cls(path, *(record[key] for key in RECORDED))


def _is_lost_record(record: dict) -> bool:
    """Return whether a record maps data sets to members to indices of stored times."""
    return all(
        isinstance(by_member, dict) and all(isinstance(i, int) for i in by_member.values())
        for by_member in record.values()
    )


def expect(path: Path, condition: bool, defect: str) -> None:
    """Raise ValueError with ``defect`` and the way out, unless ``condition`` holds."""
    if not condition:
        raise ValueError(
            f"{path}: {defect}: not a block of this package, or damaged; delete it and run the "
            "verb that makes it again"
        )


def json_object(text) -> dict | None:
    """Return the object of a JSON attribute; None if it is not one."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
