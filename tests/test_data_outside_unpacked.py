"""Compressed values of others are unpacked once, and are the same afterwards."""

import numpy as np
import outside_case as case
import pytest

from hpc_closure.data.opening import open_data
from hpc_closure.data.samples import TrainingSet

STATE, CLOSURE = case.fields()


def stores(folder, **more):
    path = case.zarr(folder / "a.zarr", STATE, CLOSURE)
    data = {**case.section(path), "closure_factor": 2.0}
    plain = case.experiment(folder, data, "plain")
    unpacked = case.experiment(folder, {**data, "unpack": str(folder)}, "plain", **more)
    return plain, unpacked


def test_later_epochs_do_not_read_the_source(tmp_path, monkeypatch):
    plain, unpacked = stores(tmp_path)
    budget = STATE.nbytes // 2
    sets = [
        TrainingSet(open_data(one), range(12), budget=budget, seed=1) for one in (plain, unpacked)
    ]
    assert not sets[1].resident
    number = len(sets[0])
    for first in range(0, 3 * number, 16):
        if first >= 2 * number:  # two epochs, and the window that is read ahead
            monkeypatch.setattr(sets[1].store.source, "read", None)
        a, b = (one.batch(first, 16) for one in sets)
        assert all((a[key] == b[key]).all() for key in ("state", "target"))
    for one in sets:
        one.close()
        one.store.close()


def test_parts_of_what_is_held_are_read_anew(tmp_path):
    store = open_data(stores(tmp_path)[1])
    for span in (slice(2, 5), slice(3, 8), slice(2, 8), slice(0, 12), slice(1, 9, 2)):
        np.testing.assert_array_equal(store.read(3, span), STATE[3, span])
        np.testing.assert_array_equal(store.read(3, span, "closure"), 2 * CLOSURE[3, span])


def test_hashes_do_not_depend_on_it(tmp_path):
    plain, unpacked = stores(tmp_path)
    for stage in ("generate", "train"):
        assert plain.stage_hash(stage) == unpacked.stage_hash(stage)


def test_a_full_disk_leaves_the_source(tmp_path, monkeypatch):
    store = open_data(stores(tmp_path)[1])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    for _ in range(2):
        np.testing.assert_array_equal(store.read(3, slice(0, 4)), STATE[3, :4])


def test_a_folder_that_is_missing_is_one_line(tmp_path):
    _, unpacked = stores(tmp_path)
    data = unpacked.data.model_copy(update={"unpack": str(tmp_path / "none")})
    with pytest.raises(ValueError, match="data.unpack=.*none: No such file.*can be written"):
        open_data(unpacked.model_copy(update={"data": data}))
