import errno
import json
import os
import subprocess
import sys
from multiprocessing import get_context

import h5py
import numpy as np
import pytest

from hpc_closure.work import atomic, hdf5


def write_block(path, members=(0, 1, 2), scale=1.0, **attributes):
    with h5py.File(path, "w") as file:
        file["t0_fields/vorticity"] = scale * np.arange(len(members) * 8.0).reshape(-1, 2, 2, 2)
        file["dimensions/time"] = np.arange(2.0)
        file.attrs.update({"members": list(members), "recipe": "{}", **attributes})


# publish


def test_publish_is_whole_or_absent(tmp_path):
    path = tmp_path / "new" / "x.txt"
    with atomic.publish(path) as part:
        part.write_text("whole")
        assert not path.exists() and part.name.endswith(".part")
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]


def test_publish_leaves_the_old_one_when_the_writer_fails(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(KeyError):
        with atomic.publish(path) as part:
            part.write_text("half")
            raise KeyError("bug")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_publish_does_not_publish_what_is_not_valid(tmp_path):
    def refuse(part):
        raise ValueError("not finite")

    with pytest.raises(ValueError, match="not finite"):
        with atomic.publish(tmp_path / "x", validate=refuse) as part:
            part.write_text("bad")
    assert not list(tmp_path.iterdir())


def test_a_left_part_does_no_harm(tmp_path):
    (tmp_path / "x.h5.elsewhere-1.part").write_text("junk of a killed writer")
    with atomic.publish(tmp_path / "x.h5") as part:
        assert not part.exists()
        part.write_text("good")
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5"]


def test_the_newest_part_of_dead_writers_is_adopted(tmp_path):
    atomic.adopt(tmp_path / "x.h5", tmp_path / "working.h5")
    assert not list(tmp_path.iterdir())
    for number, name in enumerate(("x.h5.one-1.part", "x.h5.two-2.part", "y.h5.one-1.part")):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (number, number))
    atomic.adopt(tmp_path / "x.h5", tmp_path / "working.h5")
    assert (tmp_path / "working.h5").read_text() == "x.h5.two-2.part"
    assert (tmp_path / "y.h5.one-1.part").exists() and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "error",
    [SystemExit(75), KeyboardInterrupt(), ValueError("NaN"), OSError(errno.ENOSPC, "full")],
)
def test_no_part_is_left_by_a_writer_that_ends_in_order(tmp_path, error):
    with pytest.raises(BaseException):
        with atomic.publish(tmp_path / "x.h5") as part:
            part.write_text("half")
            raise error
    assert not list(tmp_path.iterdir())


def test_the_slower_of_two_writers_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="published the product first"):
        with atomic.publish(tmp_path / "x") as part:
            part.write_text("slow")
            part.unlink()  # what the other one's publish does
    assert not (tmp_path / "x").exists()


def test_publish_a_folder_over_a_folder(tmp_path):
    for text in ("first", "second"):
        with atomic.publish(tmp_path / "step") as part:
            part.mkdir()
            (part / "state").write_text(text)
    assert (tmp_path / "step" / "state").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


def test_kill_while_writing_leaves_no_product(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from hpc_closure.work import atomic
with atomic.publish(Path({str(tmp_path)!r}) / "x.h5") as part:
    part.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert not (tmp_path / "x.h5").exists() and len(list(tmp_path.iterdir())) == 1


# the disk


def test_full_disk_is_one_line(tmp_path):
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
from hpc_closure.work import atomic, hdf5
import numpy as np
try:
    with atomic.publish({str(tmp_path / "x.h5")!r}) as part:
        with hdf5.open_hdf5(part, "w") as file:
            file["x"] = np.zeros(100000)
except atomic.DiskError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "x.h5" in done.stdout and "file-size limit" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "code, words",
    [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only")],
)
def test_disk_errors_say_the_way_out(tmp_path, code, words):
    with pytest.raises(atomic.DiskError, match=words) as caught:
        with atomic.publish(tmp_path / "x"):
            raise OSError(code, os.strerror(code))
    assert str(tmp_path / "x") in str(caught.value) and "`root`" in str(caught.value)


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(TimeoutError):
        with atomic.disk_errors(tmp_path):
            raise TimeoutError("network")


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(atomic.DiskError, match="it is a file, not a folder"):
        with atomic.publish(tmp_path / "data" / "x.h5"):
            pass
    with pytest.raises(atomic.DiskError, match="a file is in the way where a folder is to be"):
        atomic.append_jsonl(tmp_path / "data" / "x.jsonl", {})


# HDF5


def test_foreign_truncated_missing(tmp_path):
    path = tmp_path / "x.h5"
    with pytest.raises(FileNotFoundError, match="no such file"):
        with hdf5.open_hdf5(path):
            pass
    path.write_text("hello")
    with pytest.raises(ValueError, match="x.h5: not an HDF5 file .5 bytes.; run the verb"):
        with hdf5.open_hdf5(path):
            pass
    write_block(path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match="x.h5: truncated HDF5 file"):
        with hdf5.open_hdf5(path):
            pass
    with pytest.raises(ValueError, match="a folder"):
        with hdf5.open_hdf5(tmp_path):
            pass


def test_missing_data_set_and_attribute(tmp_path):
    path = tmp_path / "x.h5"
    write_block(path)
    with pytest.raises(ValueError, match="x.h5: has no 't0_fields/pressure'|has no 'pressure'"):
        with hdf5.open_hdf5(path) as file:
            file["t0_fields/pressure"]
    with pytest.raises(ValueError, match="x.h5: has no attribute 'seed'"):
        with hdf5.open_hdf5(path) as file:
            file.attrs["seed"]


def test_errors_of_the_caller_are_his_own(tmp_path):
    path = tmp_path / "x.h5"
    write_block(path)
    with pytest.raises(KeyError):
        with hdf5.open_hdf5(path):
            {}["mine"]


@pytest.mark.parametrize("seed", range(5))
def test_damaged_bytes_never_give_a_traceback_of_h5py(tmp_path, seed):
    path = tmp_path / "x.h5"
    write_block(path)
    data = bytearray(path.read_bytes())
    random = np.random.default_rng(seed)
    for place in random.integers(0, len(data), 40):
        data[place] = random.integers(256)
    path.write_bytes(data)
    try:
        with hdf5.open_hdf5(path) as file:
            file.visititems(lambda name, item: item[...] if hasattr(item, "shape") else None)
    except ValueError as error:
        assert "x.h5" in str(error) and "\n" not in str(error)


# content hash


def test_equal_means_data_sets_and_recipe(tmp_path):
    one, two = tmp_path / "1.h5", tmp_path / "2.h5"
    write_block(one, provenance="here", created="now")
    write_block(two, provenance="there", created="then", complete=1, dataset_name="other")
    assert hdf5.sha256_datasets(one) == hdf5.sha256_datasets(two)
    write_block(two, recipe="{1}")
    assert hdf5.sha256_datasets(one) != hdf5.sha256_datasets(two)
    write_block(two, scale=1 + 1e-15)
    assert hdf5.sha256_datasets(one) != hdf5.sha256_datasets(two)


def test_members_are_equal_for_any_block_size(tmp_path):
    values = np.random.default_rng(0).normal(size=(6, 2, 3))

    def write(path, members):
        with h5py.File(path, "w") as file:
            file["t0_fields/w"] = values[members]
            file["dimensions/time"] = np.arange(3.0)
            file.attrs.update({"members": members, "recipe": "{}", "n": len(members)})
        return hdf5.sha256_members(path)

    whole = write(tmp_path / "a.h5", [0, 1, 2, 3, 4, 5])
    parts = {**write(tmp_path / "b.h5", [0, 1, 2, 3]), **write(tmp_path / "c.h5", [4, 5])}
    assert whole == parts and len(set(whole.values())) == 6
    values[3, 0, 0] += 1e-12
    assert write(tmp_path / "b.h5", [0, 1, 2, 3])[3] != whole[3]


# JSON


def test_json_round_trip_and_damage(tmp_path):
    path = tmp_path / "x.json"
    atomic.write_json(path, {"a": [1, 2]})
    assert atomic.read_json(path) == {"a": [1, 2]}
    path.write_text('{"a": ')
    with pytest.raises(ValueError, match="x.json: not a valid JSON file"):
        atomic.read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="x.json"):
        atomic.read_json(path)


def _append(path, mark):
    for number in range(200):
        atomic.append_jsonl(path, {"mark": mark, "number": number, "fill": "x" * 200})


def test_lines_of_several_processes_stay_apart(tmp_path):
    path = tmp_path / "x.jsonl"
    context = get_context("spawn")
    processes = [context.Process(target=_append, args=(path, mark)) for mark in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    records = atomic.read_jsonl(path)
    assert len(records) == 600
    assert len({(record["mark"], record["number"]) for record in records}) == 600


def test_a_torn_line_is_skipped_and_does_not_eat_the_next(tmp_path):
    path = tmp_path / "x.jsonl"
    atomic.append_jsonl(path, {"n": 1})
    with open(path, "a") as file:
        file.write('{"n": 2, "to')
    atomic.append_jsonl(path, {"n": 3})
    assert [record["n"] for record in atomic.read_jsonl(path)] == [1, 3]
    assert json.loads(path.read_text().splitlines()[-1]) == {"n": 3}


def test_set_aside_never_overwrites(tmp_path):
    for _ in range(3):
        (tmp_path / "x.h5").write_text("bad")
        atomic.set_aside(tmp_path / "x.h5")
    assert len(list(tmp_path.glob("x.h5.damaged*"))) == 3
