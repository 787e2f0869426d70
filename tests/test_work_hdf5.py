import subprocess
import sys

import h5py
import numpy as np
import pytest

from hpc_closure.work.hdf5 import WritableHDF5


def test_writes_what_h5py_writes(tmp_path):
    path = tmp_path / "x.h5"
    values = np.random.default_rng(0).normal(size=(30, 40))
    with WritableHDF5(path, "w") as file:
        file["group/values"] = values
        file.attrs["note"] = "first"
        file.flush()
    with WritableHDF5(path, "r+") as file:
        file.attrs["note"] = "second"
        file["group/values"][3] = 0.0
    values[3] = 0.0
    with h5py.File(path) as file:
        assert (file["group/values"][...] == values).all() and file.attrs["note"] == "second"


def test_modes(tmp_path):
    path = tmp_path / "x.h5"
    with pytest.raises(FileNotFoundError):
        WritableHDF5(path, "r+")
    WritableHDF5(path, "w-").close()
    with pytest.raises(FileExistsError):
        WritableHDF5(path, "x")
    path.write_text("not HDF5")
    with pytest.raises(OSError, match="signature"):
        WritableHDF5(path, "r+")


PROGRAM = """
import resource, signal, sys
import numpy as np
from hpc_closure.work.hdf5 import WritableHDF5

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path, limit, way = sys.argv[1], int(sys.argv[2]), sys.argv[3]
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
file = WritableHDF5(path, "w")
try:
    for number in range(20):
        file[f"a{number}"] = np.arange(1000.0)
        if way == "flush":
            file.flush()
    if way != "forget":
        file.close()
except OSError as error:
    print(error.errno)
"""


@pytest.mark.parametrize("limit", [0, 100, 1000, 5000, 20000, 100000])
@pytest.mark.parametrize("way", ["close", "flush", "forget"])
def test_a_full_disk_is_an_ordinary_error_and_no_crash(tmp_path, limit, way):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "x.h5", str(limit), way],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("" if way == "forget" else "27\n")
    assert done.stderr == ""
