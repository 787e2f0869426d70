"""Damaged input never gives a traceback or a hang: property tests of every loader and reader."""

import contextlib
import io
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_closure import __main__
from hpc_closure.data.reader import DataSet
from hpc_closure.experiment import reading
from hpc_closure.tools import inspect
from hpc_closure.work import hdf5, units
from hpc_closure.work.header import Header

quick = settings(
    max_examples=60,
    deadline=10_000,  # milliseconds: a hang fails
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# what a reader may raise; anything else is a bug of ours
CLEAN = (ValueError, RuntimeError, OSError)


@contextlib.contextmanager
def clean(name):
    """A clean error, if any: one line that names the file."""
    try:
        yield
    except CLEAN as error:
        assert "\n" not in str(error) and name in str(error), repr(error)


@st.composite
def damage(draw, length):
    """Positions and bytes to overwrite, and a length to cut to."""
    places = st.tuples(st.integers(0, length - 1), st.integers(0, 255))
    cut = st.one_of(st.just(length), st.integers(0, length))
    # the first kilobytes hold the structure
    early = st.tuples(st.integers(0, min(4095, length - 1)), st.integers(0, 255))
    return draw(st.lists(st.one_of(places, early), max_size=12)), draw(cut)


def damaged(data, how):
    changes, cut = how
    changed = bytearray(data)
    for place, value in changes:
        changed[place] = value
    return bytes(changed[:cut])


# experiment files

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=3),
)


@quick
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=200))
def test_any_text_is_an_experiment_or_one_line(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    with clean(""):
        reading.load(path)


@quick
@given(data=st.binary(max_size=200))
def test_any_bytes_are_an_experiment_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(data)
    with clean("any.yaml"):
        reading.load(path)


def keys(values, prefix=""):
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{key}.")


KEYS = sorted(keys(reading.load("quickstart").model_dump(mode="json")))


@settings(quick, max_examples=400)
@given(key=st.sampled_from(KEYS), value=LEAVES)
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(key, value):
    text = repr(value) if not isinstance(value, str) else value
    with clean(""):
        loaded = reading.load("quickstart", [f"{key}={text}"])
        again = reading.dump(loaded)
        assert reading.parse_yaml(again, "dump")


@quick
@given(words=st.lists(st.text(max_size=12), max_size=4))
def test_any_command_line_ends_in_order(words):
    if words[:1] == ["generate"]:
        return
    told, before = io.StringIO(), sys.argv
    sys.argv = ["hpc-closure", "config", *words]
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            with pytest.raises(SystemExit):
                __main__.main()
    finally:
        sys.argv = before
    assert "Traceback" not in told.getvalue()


# products


@pytest.fixture(scope="module")
def block(tmp_path_factory):
    """A small block, as bytes."""
    from hpc_closure.data.layout import Layout
    from hpc_closure.data.writer import BlockWriter

    path = tmp_path_factory.mktemp("block") / "block_000000-000001.h5"
    layout = Layout((0, 1), np.arange(3.0), 8, scalars=("energy",))
    writer = BlockWriter(path, layout, {"dataset_name": "x", "recipe": "{}"})
    for index in range(3):
        writer.write(
            index,
            {name: np.ones((2, 8, 8)) for name in ("vorticity", "closure")},
            {"energy": np.ones(2)},
            {},
        )
    writer.finish({"w_hat": np.ones((2, 5), complex)}, {"recipe_hash": "abc", "holds": "{}"})
    return path.read_bytes()


def read_everything(path):
    with clean(path.name):
        Header.read(path)
    with clean(path.name):
        inspect.inspect(path, deep=True)
    with clean(path.name):
        hdf5.sha256_datasets(path)
    with clean(path.name):
        hdf5.sha256_members(path)
    with clean(path.name):
        data = DataSet(path.parent)
        try:
            for member in data.members:
                for index in range(len(data.times)):
                    data.read(member, index)
        finally:
            data.close()


@settings(quick, max_examples=300)
@given(how=damage(20_000))
def test_damaged_blocks(block, tmp_path, how):
    changes, cut = how
    changes = [(place % len(block), value) for place, value in changes]
    path = tmp_path / "block_000000-000001.h5"
    path.write_bytes(damaged(block, (changes, cut)))
    read_everything(path)


@quick
@given(data=st.binary(max_size=300))
def test_foreign_blocks(tmp_path, data):
    path = tmp_path / "block_000000-000001.h5"
    path.write_bytes(data)
    read_everything(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.attrs.__setitem__("members", "x"),
        lambda file: file.attrs.__setitem__("members", np.zeros(0)),
        lambda file: file.attrs.__setitem__("members", [5.5, np.nan]),
        lambda file: file.attrs.__setitem__("members", [0, 10**12]),
        lambda file: file.attrs.__setitem__("holds", "[1"),
        lambda file: file.attrs.__setitem__("holds", 3),
        lambda file: file.attrs.__setitem__("complete", "yes"),
        lambda file: file.attrs.__setitem__("complete", [1, 1]),
        lambda file: file.attrs.__setitem__("recipe", 7),
        lambda file: file.attrs.__setitem__("recipe", "{"),
        lambda file: file.attrs.__delitem__("members"),
        lambda file: file.__delitem__("dimensions"),
        lambda file: file.__delitem__("dimensions/time"),
        lambda file: file.__delitem__("t0_fields/vorticity"),
        lambda file: file.__delitem__("t0_fields"),
        lambda file: (
            file.__delitem__("dimensions/time"),
            file.__setitem__("dimensions/time", "a word"),
        ),
        lambda file: (
            file.__delitem__("t0_fields/vorticity"),
            file.__setitem__("t0_fields/vorticity", np.zeros(3)),
        ),
        lambda file: (
            file.__delitem__("t0_fields/vorticity"),
            file.__setitem__("t0_fields/vorticity", ["a", "b"]),
        ),
        lambda file: (
            file.__delitem__("scalars/energy"),
            file.__setitem__("scalars/energy", "none"),
        ),
    ],
    ids=range(19),
)
def test_wrong_but_whole_blocks(block, tmp_path, change):
    path = tmp_path / "block_000000-000001.h5"
    path.write_bytes(block)
    with h5py.File(path, "r+") as file:
        change(file)
    read_everything(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from safetensors.numpy import save_file

    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_file({"a": np.ones((4, 4), np.float32)}, path, metadata={"config": "{}"})
    return path.read_bytes()


@quick
@given(how=damage(200))
def test_damaged_models(model, tmp_path, how):
    import hpc_closure

    changes, cut = how
    path = tmp_path / "model.safetensors"
    path.write_bytes(damaged(model, ([(p % len(model), v) for p, v in changes], cut)))
    with clean(path.name):
        inspect.inspect(path, deep=True)
    with clean(path.name):
        hpc_closure.load(path)


@pytest.fixture(scope="module")
def point(tmp_path_factory):
    """A training restart point: content by file name."""
    import torch

    from hpc_closure.train import checkpoint

    folder = tmp_path_factory.mktemp("point")
    checkpoint.save(
        folder,
        checkpoint.Checkpoint(checkpoint.Position(step=3), {"weights": {"a": torch.ones(5)}}),
    )
    return {path.name: path.read_bytes() for path in (folder / "step_0000003").iterdir()}


@quick
@given(data=st.data())
def test_damaged_restart_points(point, tmp_path_factory, data):
    from hpc_closure.train import checkpoint

    folder = tmp_path_factory.mktemp("damaged") / "step_0000003"
    folder.mkdir()
    for name, content in point.items():
        (folder / name).write_bytes(content)
    name = data.draw(st.sampled_from(sorted(point)))
    content = damaged(point[name], data.draw(damage(len(point[name]))))
    (folder / name).write_bytes(content)
    reason = checkpoint.damage(folder)
    assert content == point[name] or reason is not None
    assert reason is None or "\n" not in reason
    with clean("step_0000003"):
        inspect.inspect(folder, deep=True)
    assert (checkpoint.newest(folder.parent) is None) == (reason is not None)


@quick
@given(text=st.text(max_size=100))
def test_any_text_in_the_books(tmp_path, text):
    from hpc_closure.experiment.folder import Run

    run = Run(tmp_path)
    ledger = units.Ledger(run, "generate", "abc")
    folder = run.units("generate")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (
        "manifest.jsonl",
        "000000-000001.claim",
        "000002-000003.error",
        "submissions.jsonl",
        "junk",
        "9-3.claim",
        "000009-000003.claim",
    ):
        (folder / name).write_text(text, encoding="utf-8")
    counts = ledger.survey(8, 2).counts()
    assert counts["units"] == 4 and counts["done"] == 0


@quick
@given(text=st.text(max_size=100))
def test_any_table_and_record(tmp_path, text):
    for name in ("scores.csv", "scores.json"):
        path = Path(tmp_path) / name
        path.write_text(text, encoding="utf-8")
        with clean(name):
            inspect.inspect(path)
