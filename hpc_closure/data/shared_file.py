"""One file written by all ranks that share a field, through MPI-IO.

Needs an h5py that was built with MPI (the wheels on PyPI are not). Without it the first rank
gathers whole fields and writes them alone; the files are the same.
"""

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from hpc_closure.work.atomic import DiskError


@dataclass(frozen=True)
class Rows:
    """This rank's rows of a field, (B, rows, n) or (B, rows, n, 2)."""

    values: np.ndarray
    rows: slice


def available() -> bool:
    """Whether h5py can open a file on several ranks."""
    return bool(h5py.get_config().mpi)


def write_rows(path: Path, index: int, fields: dict[str, Rows], comm) -> None:
    """Write snapshot ``index`` of data sets that exist (collective); it is on the disk at the end.

    Args:
        path: a block file that nobody has open.
        index: of the stored time.
        fields: by path in the file.
        comm: mpi4py communicator of the ranks that share the fields.

    Raises:
        DiskError: it cannot be written.
    """
    comm.Barrier()  # until the first rank has closed it
    try:
        with h5py.File(path, "r+", driver="mpio", comm=comm) as file:
            for name, part in fields.items():
                with file[name].collective:
                    file[name][:, index, part.rows] = part.values
            file.flush()
    except OSError as error:
        raise DiskError(f"cannot write {path} through MPI-IO: {error}") from error
