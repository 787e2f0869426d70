"""The writer of a block, alone and under a verb."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_closure.data.layout import BlockHeader, Layout, SeriesLayout
from hpc_closure.data.reader import DataSet
from hpc_closure.data.writer import BlockWriter
from hpc_closure.experiment import reading
from hpc_closure.generate import verb as generate
from hpc_closure.work import hdf5
from hpc_closure.work.hdf5 import open_hdf5
from hpc_closure.work.options import Options

LAYOUT = Layout(
    (2, 3),
    np.arange(3.0),
    8,
    precision="float64",
    vectors=("velocity",),
    filtered={"sharp": 4},
    scalars=("energy",),
    series=SeriesLayout(np.arange(5.0), {"energy": 0, "energy_spectrum": 3}),
)


def write_all(writer, last=3):
    for index in range(last):
        fields = {
            "vorticity": np.full((2, 8, 8), 1.0 + index),
            "closure": np.full((2, 8, 8), 10.0 + index),
            "velocity": np.zeros((2, 8, 8, 2)),
            "sharp": np.zeros((2, 4, 4)),
        }
        writer.write(index, fields, {"energy": np.full(2, float(index))}, {})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "block_000002-000003.h5"


def finish(writer, **attributes):
    writer.finish({"w_hat": np.ones(5)}, {"recipe_hash": "abc", "holds": "{}", **attributes})


def test_what_is_written_is_read(path):
    writer = BlockWriter(path, LAYOUT, {"dataset_name": "x", "length": 2.0, "recipe": '{"a": 1}'})
    write_all(writer)
    writer.write_series(4, {"energy": np.ones(2), "energy_spectrum": np.ones((2, 3))})
    finish(writer, provenance='{"host": "here"}')
    header = writer.check(path)
    assert (header.members, header.grid, header.dimensions) == ((2, 3), 8, 2)
    assert (header.recipe, header.settings) == ("abc", {"a": 1})
    assert header.provenance == {"host": "here"}
    with open_hdf5(path) as file:
        again = BlockHeader.from_file(file, path)
        np.testing.assert_array_equal(again.times, [0.0, 1.0, 2.0])
        np.testing.assert_array_equal(file["dimensions/x"], np.arange(8) / 4)
        assert file["t1_fields/velocity"].shape == (2, 3, 8, 8, 2)
        assert file["filtered/sharp"].shape == (2, 3, 4, 4)
        assert file["series/energy_spectrum"].shape == (2, 5, 3)
    data = DataSet(path.parent)
    assert data.members == [2, 3] and data.recipe == {"a": 1}
    assert (data.read(3, 1) == 2.0).all() and (data.read(2, 2, "closure") == 12.0).all()
    data.close()


@pytest.mark.parametrize(
    "changes, continued",
    [
        ({}, True),
        ({"members": (2, 4)}, False),
        ({"times": np.arange(4.0)}, False),
        ({"fields": ("vorticity",)}, False),
        ({"series": SeriesLayout(np.arange(5.0) / 2, LAYOUT.series.widths)}, False),
    ],
)
def test_a_file_of_the_same_layout_is_continued(path, changes, continued):
    BlockWriter(path, LAYOUT, {}).close()
    layout = Layout(**{**vars(LAYOUT), **changes})
    writer = BlockWriter(path, layout, {})
    assert writer.continued == continued
    writer.close()


@pytest.mark.parametrize("changes", [{"recipe": "b"}, {"cases": [7]}, {"dt": 0.2}, {"seed": 1}])
def test_a_file_of_other_settings_is_made_anew(path, changes):
    """Its attributes would be those of the settings that were given up."""
    attributes = {"dataset_name": "x", "recipe": "a", "cases": [3], "dt": 0.1, "seed": None}
    BlockWriter(path, LAYOUT, attributes).close()
    writer = BlockWriter(path, LAYOUT, attributes | {"dataset_name": "renamed"})
    assert writer.continued
    writer.close()
    writer = BlockWriter(path, LAYOUT, attributes | changes)
    assert not writer.continued
    assert all(np.array_equal(writer.file.attrs[key], value) for key, value in changes.items())
    writer.close()


def test_a_longer_block_goes_on_from_a_shorter_one(path, tmp_path):
    writer = BlockWriter(path, LAYOUT, {})
    write_all(writer)
    finish(writer)
    series = SeriesLayout(np.arange(9.0), LAYOUT.series.widths)
    longer = Layout(**{**vars(LAYOUT), "times": np.arange(5.0), "series": series})
    writer = BlockWriter(tmp_path / "working.h5", longer, {})
    count, state = writer.continue_from(path)
    assert count == 3 and (state["w_hat"] == 1).all()
    assert (writer.file["t0_fields/closure"][0, :3, 0, 0] == [10.0, 11.0, 12.0]).all()
    writer.close()


def test_a_block_that_is_not_finite_or_of_another_layout_is_refused(path):
    writer = BlockWriter(path, LAYOUT, {})
    write_all(writer)
    writer.file["t0_fields/closure"][1, 2, 3, 4] = np.nan
    finish(writer)
    with pytest.raises(ValueError, match="member 3: closure has non-finite values"):
        writer.check(path)
    with h5py.File(path, "r+") as file:
        del file["t0_fields/closure"]
    with pytest.raises(ValueError, match="other times or data sets than its layout"):
        writer.check(path)


def test_a_finished_block_is_not_opened_again(tiny, monkeypatch):
    """The handle that wrote it serves the check, from which the books take the header."""
    opened, original = [], h5py.File
    monkeypatch.setattr(
        h5py,
        "File",
        lambda path, *more, **options: opened.append(Path(path))
        or original(path, *more, **options),
    )
    checked, open_written = [], hdf5.WrittenHDF5.__init__
    monkeypatch.setattr(
        hdf5.WrittenHDF5,
        "__init__",
        lambda file, written: checked.append(written) or open_written(file, written),
    )
    experiment = reading.load(tiny)
    assert generate.run(experiment, Options(verbosity=-1)) == 0
    assert not [path for path in opened if path.name.startswith("block_")]
    assert len(checked) == 4 and all(isinstance(file, hdf5.GuardedFile) for file in checked)
    opened.clear()
    assert generate.run(experiment, Options(verbosity=-1)) == 0
    assert not opened  # another program: from the manifest
