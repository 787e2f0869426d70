"""Trajectories of others: every format gives the same training, read where the files are."""

import numpy as np
import outside_case as case
import pytest
from safetensors.numpy import load_file

from hpc_closure.data import held_out
from hpc_closure.data.opening import open_data
from hpc_closure.data.samples import TrainingSet
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.sources.faults import DataFault
from hpc_closure.generate import verb as generate
from hpc_closure.rollout import verb as rollout
from hpc_closure.tools import status
from hpc_closure.train import verb as train

STATE, CLOSURE = case.fields()
HDF5 = {"closure": {"q": "forcing"}, "length": case.LENGTH}


def files_of_members(folder, state, closure):
    for member in range(len(state)):
        case.netcdf(
            folder / f"run_{member:02d}.nc",
            state[member],
            closure[member],
            dims=("time", "x", "y"),
        )
    return folder / "run_*.nc"


def pieces_in_time(folder, state, closure):
    for number, times in enumerate((slice(0, 5), slice(5, 12))):
        path = folder / f"piece_{number}.h5"
        case.hdf5(path, state[:, times], closure[:, times])
        import h5py

        with h5py.File(path, "r+") as file:
            file["time"][:] = case.axes(12)[0][times]
    return folder / "piece_*.h5"


FORMATS = {
    "hdf5": (
        lambda f, s, c: case.hdf5(f / "a.h5", s, c),
        {**HDF5, "dims": case.DIMS},
    ),
    "float64": (
        lambda f, s, c: case.hdf5(f / "a.h5", s, c, "f8"),
        {**HDF5, "dims": case.DIMS},
    ),
    "big endian": (
        lambda f, s, c: case.hdf5(f / "a.h5", s, c, ">f4"),
        {**HDF5, "dims": case.DIMS},
    ),
    "transposed": (
        lambda f, s, c: case.hdf5(f / "a.h5", s, c, order=(3, 1, 2, 0)),
        {**HDF5, "dims": ("y", "time", "x", "member")},
    ),
    "netcdf4": (lambda f, s, c: case.netcdf(f / "a.nc", s, c), {}),
    "netcdf3": (lambda f, s, c: case.netcdf(f / "a.nc", s, c, "NETCDF3_64BIT_OFFSET"), {}),
    "zarr2": (lambda f, s, c: case.zarr(f / "a.zarr", s, c, 2), {}),
    "zarr3": (lambda f, s, c: case.zarr(f / "a.zarr", s, c, 3), {}),
    "the well": (lambda f, s, c: case.well(f / "well", s, c), {}),
    "files": (files_of_members, {}),
    "pieces": (pieces_in_time, {**HDF5, "dims": case.DIMS}),
}


def trained(folder, name):
    """Statistics of a closed form trained on a format."""
    write, more = FORMATS[name]
    inside = folder / name.replace(" ", "_")
    inside.mkdir()
    path = write(inside, STATE, CLOSURE)
    experiment = case.experiment(inside, {**case.section(path), **_plain(more)})
    assert train.run(experiment) == 0
    run = Run.of(experiment)
    return (
        experiment,
        load_file(run.model),
        run.metrics.read_text() if run.metrics.exists() else "",
    )


def _plain(more):
    return {key: list(value) if isinstance(value, tuple) else value for key, value in more.items()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("reference"), "hdf5")


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "hdf5"])
def test_every_format_trains_the_same_closure(name, tmp_path, reference):
    _, wanted, losses = reference
    experiment, found, other = trained(tmp_path, name)
    assert set(found) == set(wanted)
    for key, values in wanted.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-6, atol=1e-9, err_msg=key)
    assert other.splitlines()[:1] == losses.splitlines()[:1]
    assert experiment.generate.members == 12 and experiment.generate.record.every == 0.1


def test_a_closure_is_learned(reference):
    """The closed form explains the part of the closure that follows the state."""
    experiment, _, _ = reference
    import hpc_closure

    closure = hpc_closure.load(Run.of(experiment).model)
    draws = closure.sample(STATE[0, 3], members=64, seed=0, call=0)
    mean = np.asarray(draws).mean(0)
    known = 0.3 * np.roll(STATE[0, 3], 1, 0) + 0.1 * STATE[0, 3]
    assert np.corrcoef(mean.ravel(), known.ravel())[0, 1] > 0.97


def test_values_and_orders_of_a_transposed_file(tmp_path):
    path = case.hdf5(tmp_path / "a.h5", STATE, CLOSURE, order=(3, 1, 2, 0))
    more = {"dims": ["y", "time", "x", "member"], "length": 1.0, "closure_sign": -1}
    data = open_data(case.experiment(tmp_path, {**case.section(path), **more}))
    np.testing.assert_array_equal(data.read(7, 3), STATE[7, 3])
    np.testing.assert_array_equal(data.read(7, slice(2, 9, 3)), STATE[7, 2:9:3])
    np.testing.assert_array_equal(data.read(2, slice(None), "closure"), -CLOSURE[2])
    np.testing.assert_array_equal(data.read(7, 3, "state", 8), STATE[7, 3, ::2, ::2])
    assert data.times[0] == 0 and data.grid == 16 and data.dimensions == 2
    data.close()


def test_components_make_channels(tmp_path):
    path = tmp_path / "v.h5"
    case.hdf5(path, STATE, CLOSURE, velocity=np.stack([STATE, 2 * STATE], -1))
    data = {
        "path": str(path),
        "state": {"u": "velocity[0]", "v": "velocity[1]"},
        "closure": {"u": "velocity[1]", "v": "velocity[0]"},
        "dims": [*case.DIMS, "component"],
        "length": 1.0,
        "closure_factor": 3.0,
    }
    kinds = {"fields": {"u": "vector x", "v": "vector y"}}
    experiment = case.experiment(tmp_path, data, physics=kinds)
    store = open_data(experiment)
    assert store.channels == ("u", "v")
    np.testing.assert_array_equal(store.read(1, 2), np.stack([STATE[1, 2], 2 * STATE[1, 2]]))
    closure = store.read(1, slice(2, 4), "closure")
    np.testing.assert_allclose(closure[:, 0], 6 * STATE[1, 2:4], rtol=1e-6)
    np.testing.assert_array_equal(store.read(1, 2, "v"), 2 * STATE[1, 2])
    assert [one.kind for one in experiment.physics.channels] == ["vector x", "vector y"]


@pytest.mark.parametrize("sides", [1, 3])
def test_lines_and_cubes(sides, tmp_path):
    state, closure = case.fields(10, 4, 8, sides=sides)
    dims = ["member", "time", *"xyz"[:sides]]
    names = {"q": "q"} if sides == 1 else {"u": "q", "v": "q", "w": "q"}
    closures = dict.fromkeys(names, "sub/forcing")
    path = case.hdf5(tmp_path / "a.h5", state, closure, order=range(2 + sides))
    data = {"path": str(path), "state": names, "closure": closures, "dims": dims, "length": 1.0}
    kinds = {"u": "vector x", "v": "vector y", "w": "vector z"} if sides == 3 else {"q": "scalar"}
    store = open_data(case.experiment(tmp_path, data, physics={"fields": kinds}))
    assert store.dimensions == sides
    field = store.read(2, 1)
    np.testing.assert_array_equal(field if sides == 1 else field[1], state[2, 1])


def test_one_run_is_divided_with_gaps(tmp_path):
    state, closure = case.fields(1, 600)
    path = case.netcdf(tmp_path / "a.nc", state, closure)
    experiment = case.experiment(tmp_path, case.section(path))
    found = experiment.data.found
    assert found.parts >= 10 and 5 <= found.gap <= 15  # memory 0.9: 1 / e after 9.5 times
    store = open_data(experiment)
    parts = store.split(experiment.train.split)
    assert len(store.members) == found.parts and all(parts.values())
    length = len(store.times)
    assert found.parts * length + (found.parts - 1) * found.gap <= 600
    for part in (0, 1, found.parts - 1):
        first = part * (length + found.gap)
        own = store.read(part, slice(None))
        np.testing.assert_array_equal(own, state[0, first : first + length])


def test_larger_sets_are_streamed(tmp_path):
    path = case.zarr(tmp_path / "a.zarr", STATE, CLOSURE)
    store = open_data(case.experiment(tmp_path, case.section(path)))
    budget = STATE.nbytes // 2
    streamed = TrainingSet(store, store.members, budget=budget, seed=1)
    held = TrainingSet(store, store.members, seed=1)
    assert not streamed.resident and held.resident
    numbers = np.array([3, 77, 140])
    for name in ("state", "target"):
        assert (streamed.gather(numbers)[name] == held.gather(numbers)[name]).all()


def test_validation_adds_a_quarter_to_the_memory_of_a_training(tmp_path):
    path = case.netcdf(tmp_path / "a.nc", STATE, CLOSURE)
    section = {"steps": 5, "batch": 8, "split": [0.6, 0.3, 0.1]}
    held = {}
    for name, factor in (("streams", 0.99), ("holds", 2.0)):
        one = case.experiment(tmp_path, case.section(path), "x", train=section)
        train_set, _ = train.samples(one, open_data(one))
        gib = factor * train_set.bytes / 2**30
        one = case.experiment(
            tmp_path, case.section(path), "x", train=section | {"memory_gib": gib}
        )
        held[name] = [part.resident for part in train.samples(one, open_data(one))]
    assert held == {"streams": [False, False], "holds": [True, True]}


def test_changed_files_are_noticed(tmp_path):
    path = case.netcdf(tmp_path / "a.nc", STATE, CLOSURE)
    experiment = case.experiment(tmp_path, case.section(path))
    before = experiment.stage_hash("train")
    case.netcdf(path, STATE[:, :-1], CLOSURE[:, :-1])
    with pytest.raises(DataFault, match="CHANGED: .*restore the files"):
        open_data(experiment)
    assert reading.load(tmp_path / "case.yaml").stage_hash("train") != before
    assert case.experiment(tmp_path, case.section(path), train={"seed": 1}).stage_hash(
        "generate"
    ) == reading.load(tmp_path / "case.yaml").stage_hash("generate")


def test_a_stored_configuration_is_not_completed_again(tmp_path):
    path = case.netcdf(tmp_path / "a.nc", STATE, CLOSURE)
    experiment = case.experiment(tmp_path, case.section(path))
    stored = tmp_path / "stored.yaml"
    stored.write_text(reading.dump(experiment))
    path.unlink()
    again = reading.load(stored, warn=False)
    assert again.stage_hash("train") == experiment.stage_hash("train")


def test_generate_checks_and_status_says_so(tmp_path, capsys):
    path = case.netcdf(tmp_path / "a.nc", STATE, CLOSURE)
    experiment = case.experiment(tmp_path, case.section(path))
    assert generate.run(experiment) == 0
    assert not list(Run.of(experiment).data.glob("*.h5"))
    status.run(experiment)
    assert "read in place: 12 trajectories of 12 times" in capsys.readouterr().out


def test_train_refuses_a_fault_unless_it_is_accepted(tmp_path):
    state = STATE.copy()
    state[3] = state[4]
    path = case.netcdf(tmp_path / "a.nc", state, CLOSURE)
    with pytest.raises(ValueError, match="SAME_MEMBERS: members 3 and 4 are equal; .*accepts"):
        train.run(case.experiment(tmp_path, case.section(path)))
    accepted = case.section(path, accept=["SAME_MEMBERS"])
    assert train.run(case.experiment(tmp_path, accepted, "accepted")) == 0


def test_without_a_solver_a_rollout_says_what_to_do(tmp_path):
    path = case.netcdf(tmp_path / "a.nc", STATE, CLOSURE)
    with pytest.raises(ValueError, match="rollout needs a reduced solver.*evaluate --partial"):
        rollout.run(case.experiment(tmp_path, case.section(path)))


def test_presets_have_no_data_and_keep_their_hashes():
    experiment = reading.load("diffusion_64")
    assert experiment.data is None and "data" not in experiment.stage_settings("evaluate")


def test_a_second_set_of_files_is_the_test_set(tmp_path):
    path = case.netcdf(tmp_path / "a.nc", STATE, CLOSURE)
    second = case.netcdf(tmp_path / "b.nc", *case.fields(seed=9))
    split = {"train": {"split": [0, 0, 1]}}
    generate.run(case.experiment(tmp_path, case.section(second), "second", **split))
    generate.run(case.experiment(tmp_path, case.section(path), "itself", **split))
    uses = {"use": {"test": "second"}, "rollout": {"initial_conditions": 12}}
    experiment = case.experiment(tmp_path, case.section(path), "first", **uses)
    held = held_out.check(experiment)
    data = open_data(held.experiment, held.run)
    assert data.starts(held.split, 12) == list(range(12))
    np.testing.assert_array_equal(data.read(3, 2), case.fields(seed=9)[0][3, 2])
    uses["use"] = {"test": "itself"}
    with pytest.raises(ValueError, match="its files are those of the training data"):
        held_out.check(case.experiment(tmp_path, case.section(path), "first", **uses))


def test_opponents_train_on_the_same_files(tmp_path):
    path = case.netcdf(tmp_path / "a.nc", STATE, CLOSURE)
    train_section = {"steps": 5, "batch": 8, "opponents": ["resampled"]}
    experiment = case.experiment(tmp_path, case.section(path), train=train_section)
    assert train.run(experiment) == 0
    assert (Run.of(experiment).opponents / "resampled" / "train" / "model.safetensors").exists()


def test_what_contradicts_the_files_is_one_line(tmp_path):
    path = case.netcdf(tmp_path / "a.nc", STATE, CLOSURE)
    for more, message in (
        ({"replicas": {"members": 4}}, "replicas.members=4 needs the DNS of this package"),
        ({"reduced": {"grid": 8}}, "reduced.grid=8: the closure in data.closure is on 16"),
        ({"rollout": {"t_end": 99.0}}, "rollout.t_end=99 is after generate.t_end"),
        ({"physics": {"fields": {"h": "scalar", "p": "scalar"}}}, "data.state has the fields q"),
    ):
        with pytest.raises(ValueError, match=message):
            case.experiment(tmp_path, case.section(path), **more)
    for more, message in (
        ({"accept": ["NO_FILE"]}, "with NO_FILE nothing can be read"),
        ({"accept": ["NONSENSE"]}, "NONSENSE is no code"),
        ({"closure": {"p": "forcing"}}, "closure has the fields p, expected those of state: q"),
        ({"filter": {"modes": 3}}, "filter is for a stored DNS"),
        ({"state": {"q": "q[one]"}}, "for a component"),
    ):
        with pytest.raises(ValueError, match=message):
            case.experiment(tmp_path, {**case.section(path), **more})
