"""Each fault of data of others: a tiny file that has it, and the line that says so."""

from pathlib import Path

import h5py
import numpy as np
import outside_case as case
import pytest
import yaml

from hpc_closure.experiment import reading
from hpc_closure.experiment.sources.faults import CODES, STRUCTURAL, DataFault
from hpc_closure.generate import outside
from hpc_closure.tools import data_check

STATE, CLOSURE = case.fields(10, 12)
TIMES, POINTS = case.axes(12)
N = case.N


def write(folder: Path, q=STATE, forcing=CLOSURE, name="a.h5", **more):
    """Write fields, times and points as HDF5 without labels."""
    with h5py.File(folder / name, "w") as file:
        each = {"q": q, "forcing": forcing, "time": TIMES, "x": POINTS, "y": POINTS, **more}
        for key, values in each.items():
            if values is not None:
                file[key] = values
    return folder / name


def changed(values, index, to):
    values = values.copy()
    values[index] = to
    return values


def section(path, **more):
    return case.section(path, **{"dims": list(case.DIMS), **more})


TABLE = {}


def fault(code, *words, more=None):
    """Register a fault: a function of a folder that writes a file and returns keys of ``data``."""

    def register(make):
        TABLE[make.__name__] = (code, words, make, more or {})
        return make

    return register


# files and variables


@fault("NO_FILE", "nothing there", "mend data.path")
def no_file(folder):
    return section(folder / "none*.nc")


@fault("UNREADABLE", "a whole HDF5, NetCDF or Zarr file", "copy it again")
def truncated(folder):
    path = write(folder)
    path.write_bytes(path.read_bytes()[:20000])
    return section(path)


@fault("UNREADABLE", "neither HDF5, NetCDF nor Zarr")
def no_format(folder):
    path = folder / "a.h5"
    path.write_text("hello")
    return section(path)


@fault("NO_VARIABLE", "has no forcings", "did you mean forcing?")
def no_variable(folder):
    return section(write(folder), closure={"q": "forcings"})


@fault("NO_COMPONENT", "q[2]", "choose a component by NAME[number]")
def no_component(folder):
    path = write(folder, np.stack([STATE, STATE], -1), np.stack([CLOSURE, CLOSURE], -1))
    dims = [*case.DIMS, "component"]
    return section(path, state={"q": "q[2]"}, closure={"q": "forcing[1]"}, dims=dims)


@fault("COMPLEX", "q is complex64", "real fields in physical space")
def complex_fields(folder):
    return section(write(folder, STATE.astype("c8")))


@fault("NOT_NUMBERS", "q is bool", "float32 or float64")
def no_numbers(folder):
    return section(write(folder, STATE > 0))


@fault("PACKED", "q is int16 without scale_factor", "add the attributes")
def packed(folder):
    return section(write(folder, (1000 * STATE).astype("i2")))


@fault("FILTER_MISSING", "q is compressed", "pip install hdf5plugin")
def filter_missing(folder):
    path = write(folder, None)
    with h5py.File(path, "r+") as file:
        chosen = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        chosen.set_chunk((10, 12, N, N))
        chosen.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())
        space, kind = h5py.h5s.create_simple(STATE.shape), h5py.h5t.IEEE_F32LE
        made = h5py.h5d.create(file.id, b"q", kind, space, chosen)
        made.write_direct_chunk((0, 0, 0, 0), STATE.tobytes(), 0)
    return section(path)


@fault("FILES_DIFFER", "has the points 8 x 8", "one grid in all files")
def other_grid(folder):
    write(folder)
    few = POINTS[::2]
    write(folder, STATE[..., ::2, ::2], CLOSURE[..., ::2, ::2], "b.h5", x=few, y=few)
    return section(folder / "*.h5")


@fault("FILES_DIFFER", "equal times (members)", "state data.files")
def overlapping_files(folder):
    write(folder)
    write(folder, name="b.h5", time=TIMES + 0.35)
    return section(folder / "*.h5")


# dimensions


@fault("NO_DIMS", "10x12x16x16", "state data.dims, 4 names")
def no_dims(folder):
    return {**section(write(folder)), "dims": None}


@fault("DIMS_COUNT", "q has 4", "4 names")
def dims_count(folder):
    return section(write(folder), dims=["time", "x", "y"])


@fault("NO_ROLE", "dimension west (16)", "state data.dims")
def no_role(folder):
    from netCDF4 import Dataset

    with Dataset(folder / "a.nc", "w") as file:
        dims = ("member", "time", "west", "y")
        for name, size in zip(dims, STATE.shape):
            file.createDimension(name, size)
        file.createVariable("q", "f4", dims)[:] = STATE
    return {**case.section(folder / "a.nc"), "closure": {}}


@fault("SAME_ROLE", "x and lon are both x", "one of each")
def same_role(folder):
    return section(write(folder), dims=["member", "time", "x", "lon"])


@fault("NO_SIDE", "has the sides y", "x, or x and y")
def no_side(folder):
    return section(write(folder), dims=["member", "time", "level", "y"])


@fault("SIDES_DIFFER", "physics.sides=3", "mend physics.sides", more={"physics": {"sides": 3}})
def sides_differ(folder):
    return section(write(folder))


# times


@fault("NO_TIME", "times of 12 states", "state data.spacing")
def no_time(folder):
    return section(write(folder, time=None))


@fault("TIME_DUPLICATE", "time 4 is 5.4 and time 5 is 5.4", "each time once")
def duplicate_time(folder):
    times = np.concatenate([TIMES[:5], TIMES[4:-1]])
    return section(write(folder, time=times))


@fault("TIME_DECREASES", "time 0 is 6.1", "times that increase")
def time_decreases(folder):
    return section(write(folder, time=TIMES[::-1]))


@fault("TIME_UNEVEN", "time 10 is 6 and time 11 is 6.5", "a spacing of 0.1")
def uneven_time(folder):
    return section(write(folder, time=changed(TIMES, 11, 6.5)))


@fault("TIME_STEP", "the spacing of the stored times, 0.1, is 1.25 times 0.08", "a whole number")
def no_whole_steps(folder):
    return section(write(folder), interval=0.08)


@fault("TIME_STEP", "data.interval=0.2", "state data.stride=2")
def interval_beyond_spacing(folder):
    return section(write(folder), interval=0.2)


@fault("FEW_TIMES", "1 stored time(s)", "data.files=times")
def few_times(folder):
    return section(write(folder, STATE[:, :1], CLOSURE[:, :1], time=TIMES[:1]))


# box


@fault("NO_LENGTH", "no coordinate x(16)", "state data.length")
def no_length(folder):
    return section(write(folder, x=None, y=None))


@fault("LENGTH_DIFFERS", "the stated length is 1", "mend data.length")
def length_differs(folder):
    return section(write(folder), length=1.0)


@fault("LENGTH_DIFFERS", "the last point is the first one again", "leave out the last point")
def length_with_endpoint(folder):
    points = np.linspace(0, case.LENGTH, N)
    return section(write(folder, x=points, y=points), length=case.LENGTH)


@fault("GRID_UNEVEN", "elsewhere they are", "Chebyshev")
def uneven_grid(folder):
    return section(write(folder, y=np.cos(np.pi * np.arange(N)[::-1] / (N - 1))))


@fault("UNEQUAL_SIDES", "sides of the lengths 6.28319, 12.5664", "one length")
def unequal_lengths(folder):
    return section(write(folder, y=2 * POINTS))


@fault("UNEQUAL_SIDES", "has 16 x 14 points", "as many points on each side")
def unequal_points(folder):
    return section(write(folder, STATE[..., :14], CLOSURE[..., :14], y=POINTS[:14]))


@fault("ODD_GRID", "15 points per side", "leave out the endpoint")
def odd_grid(folder):
    few = POINTS[:15]
    return section(write(folder, STATE[..., :15, :15], CLOSURE[..., :15, :15], x=few, y=few))


@fault("TINY_GRID", "6 points per side", "at least 8")
def tiny_grid(folder):
    few = POINTS[:6]
    return section(write(folder, STATE[..., :6, :6], CLOSURE[..., :6, :6], x=few, y=few))


# state and closure


@fault("CLOSURE_GRID", "has the points 8 x 8", "filter the state")
def closure_grid(folder):
    return section(write(folder, forcing=CLOSURE[..., ::2, ::2]))


@fault("CLOSURE_TIMES", "10 member(s) and 11 time(s)", "a closure for each state")
def closure_times(folder):
    return section(write(folder, forcing=CLOSURE[:, :-1]))


@fault("CLOSURE_TIMES", "time 0 is 5 in the state and 5.05 in the closure", "the same times")
def closure_at_other_times(folder):
    from netCDF4 import Dataset

    path = case.netcdf(folder / "a.nc", STATE, CLOSURE)
    with Dataset(path, "r+") as file:
        file.renameVariable("forcing", "old")
        file.createDimension("t", 12)
        file.createVariable("t", "f8", ("t",))[:] = TIMES + 0.05
        file.createVariable("forcing", "f4", ("member", "t", "x", "y"))[:] = CLOSURE
    return case.section(path)


@fault("CLOSURE_IS_STATE", "the closure equals the state", "name another variable")
def closure_is_state(folder):
    return section(write(folder), closure={"q": "q"})


# values


@fault("NOT_FINITE", "state of member 6 has NaN or Inf since time 8 of 12", "data.skip=[6]")
def not_finite(folder):
    return section(write(folder, changed(STATE, (6, slice(8, None), 3, 3), np.nan)))


@fault("FILL_VALUE", "closure holds 9.96921e+36", "no stand-ins")
def fill_value(folder):
    filled = changed(CLOSURE, (slice(None), slice(None), 2, 3), 9.96921e36)
    return section(write(folder, forcing=filled))


@fault("CONSTANT", "closure q is 0 everywhere", "name another variable")
def constant(folder):
    return section(write(folder, forcing=0 * CLOSURE))


@fault("REPEATED", "has equal states at times", "raise data.stride")
def repeated(folder):
    return section(write(folder, np.repeat(STATE[:, ::2], 2, 1), np.repeat(CLOSURE[:, ::2], 2, 1)))


@fault("SAME_MEMBERS", "members 3 and 4 are equal", "data.skip=[4]")
def same_members(folder):
    return section(write(folder, changed(STATE, 4, STATE[3])))


@fault("ENDPOINT", "the last point of x equals the first", "leave out the last point")
def endpoint(folder):
    index = np.arange(N) * (N - 1) // (N - 1)
    index[-1] = 0
    return section(write(folder, STATE[..., index, :]))


@fault("NOT_PERIODIC", "q jumps by", "store the whole box")
def not_periodic(folder):
    return section(write(folder, STATE + STATE.std() * np.linspace(0, 5, N, dtype="f4")))


@fault("LOW_PRECISION", "different values on 256 points", "with more digits")
def low_precision(folder):
    return section(write(folder, np.round(2 * STATE / STATE.std()) * 0.5))


@fault("NOT_FILTERED", "beyond wavenumber 5", "filter the state")
def not_filtered(folder):
    wave = np.cos(7 * POINTS)[:, None] * np.cos(POINTS)
    noise = np.random.default_rng(1).standard_normal((10, 12, 1, 1))
    return section(write(folder, (STATE + 0.3 * STATE.std() * noise * wave).astype("f4")))


@fault("PILE_UP", "the spectrum at wavenumber 5", "resolve the dissipation")
def pile_up(folder):
    wave = np.cos(5 * POINTS)[:, None] * np.cos(5 * POINTS) + np.sin(5 * POINTS)
    noise = np.random.default_rng(1).standard_normal((10, 12, 1, 1))
    return section(write(folder, (STATE + STATE.std() * noise * wave).astype("f4")))


@fault("INTERVAL_LONG", "apart correlate by", "shorten data.interval")
def interval_long(folder):
    closure = case.fields(10, 12, memory=0.05, seed=3)[1]
    return section(write(folder, forcing=closure))


@fault("DRIFT", "its mean square changes by", "store later times only")
def drift(folder):
    growing = np.linspace(1, 3, 12, dtype="f4")[:, None, None]
    return section(write(folder, STATE * growing))


@fault("FEW_MEMBERS", "3 trajectories", "add members")
def few_members(folder):
    return section(write(folder, STATE[:3], CLOSURE[:3]))


@fault("PARTS_SHORT", "the correlation time is", "lower data.parts")
def parts_short(folder):
    state, closure = case.fields(1, 160)
    path = write(folder, state, closure, time=case.axes(160)[0])
    return section(path, parts=8, gap=0.2)


@fault("MEMBERS_ALIKE", "members 0 and 1 correlate by", "let members run apart")
def members_alike(folder):
    return section(write(folder, (STATE[:1] + 0.01 * STATE).astype("f4")))


@fault("LARGE_CHUNKS", "is stored in chunks of", "smaller chunks")
def large_chunks(folder):
    state, closure = case.fields(8, 160)
    path = write(folder, None, closure, time=case.axes(160)[0])
    with h5py.File(path, "r+") as file:
        file.create_dataset("q", data=state, chunks=state.shape, compression="gzip")
    return section(path)


# velocities


def velocity():
    """A velocity without divergence, u and v on axes x, y."""
    u = np.fft.fft2(STATE)
    waves = np.fft.fftfreq(N, 1 / N)
    x, y = (np.fft.ifft2(factor * u).real for factor in (1j * waves, -1j * waves[:, None]))
    return x.astype("f4"), y.astype("f4")


def vectors(path, u="u", v="v"):
    return section(path, state={"u": u, "v": v}, closure={"u": "forcing", "v": "forcing"})


VECTOR = {"physics": {"fields": {"u": "vector x", "v": "vector y"}}}


@fault("DIVERGENT", "(u, v) has a divergence of", "compressible", more=VECTOR)
def divergent(folder):
    u, v = velocity()
    return vectors(write(folder, u=u + 0.1 * STATE, v=v))


@fault("XY_SWAPPED", "with x and y exchanged", "exchange x and y in data.dims", more=VECTOR)
def xy_swapped(folder):
    u, v = velocity()
    return vectors(write(folder, u=u.swapaxes(2, 3), v=v.swapaxes(2, 3)))


@fault("VECTOR_AS_SCALARS", "has no divergence", "physics.fields={u: vector x, v: vector y}")
def vector_as_scalars(folder):
    u, v = velocity()
    return vectors(write(folder, u=u, v=v))


# with a reduced solver


VORTICITY = {
    "equation": "vorticity2d",
    "viscosity": 0.02,
    "forcing": {"kind": "none"},
    "noise": {"kind": "none"},
}
SOLVER = {
    "physics": VORTICITY,
    "generate": {"interval": 4, "scheme": "rk4"},
    "rollout": {"interval": 4, "baselines": ["none"]},
}


@pytest.fixture(scope="module")
def defects(tmp_path_factory):
    """Trajectories of a reduced solver with a known closure, exact to round-off."""
    folder = tmp_path_factory.mktemp("defects")
    rough = section(write(folder, 3 * STATE), accept=list(CODES)[CODES_FROM:])
    experiment = case.experiment(folder, rough, **SOLVER)
    advance = outside.advance_of(experiment)
    state, states = 2.0 * STATE[:, 0] / STATE.std(), []
    for closure in CLOSURE.swapaxes(0, 1):
        states.append(state)
        state = advance(state[:, None], 1.0)[:, 0] + case.SPACING * closure
    assert np.isfinite(states).all()
    return np.stack(states, 1).astype("f4")


CODES_FROM = list(CODES).index("CLOSURE_IS_STATE")


@pytest.mark.parametrize(
    "code, words, changes",
    [
        (None, (), {}),
        ("CLOSURE_SIGN", ("-1 times the closure q", "data.closure_sign=-1"), {"closure": -1.0}),
        ("CLOSURE_FACTOR", ("is 10 times", "data.closure_factor=10"), {"closure": 0.1}),
        ("CLOSURE_UNRELATED", ("correlates by",), {"shuffle": True}),
        ("TIME_REVERSED", ("the smaller miss forwards", "reverse the stored order"), {"time": -1}),
        ("LENGTH_UNITS", ("on a box 2 times as long", "multiply data.length by 2"), {"length": 2}),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_faults_that_a_reduced_solver_shows(code, words, changes, defects, tmp_path):
    closure = CLOSURE * np.float32(changes.get("closure", 1.0))
    closure = np.roll(closure, 5, 0) if changes.get("shuffle") else closure
    order = slice(None, None, changes.get("time", 1))
    points = POINTS / changes.get("length", 1.0)
    state = defects[:, order]
    path = write(tmp_path, state, closure[:, order], x=points, y=points)
    checked = outside.check(case.experiment(tmp_path, section(path), **SOLVER))
    found = {one.code: one.line for one in checked.faults}
    solver = {"CLOSURE_SIGN", "CLOSURE_FACTOR", "CLOSURE_UNRELATED", "TIME_REVERSED"}
    assert (solver | {"LENGTH_UNITS"}) & set(found) == ({code} if code else set()), found
    assert all(word in found[code] for word in words)


# the table


@pytest.mark.parametrize("name", TABLE)
def test_a_fault_has_its_code_and_line(name, tmp_path):
    code, words, make, more = TABLE[name]
    keys = {key: value for key, value in make(tmp_path).items() if value is not None}
    path = tmp_path / "case.yaml"
    path.write_text(yaml.safe_dump({"name": "case", "root": str(tmp_path), "data": keys, **more}))
    found = faults_of(path, keys, more)
    assert [one.code for one in found] == [code], [one.line for one in found]
    line = found[0].line
    assert "\n" not in line and all(word in line for word in words), line
    assert line.startswith(f"{code}: ") and "; expected " in line


def faults_of(path, keys, more):
    try:
        experiment = case.experiment(path.parent, keys, **more)
        return outside.check(experiment).faults
    except ValueError as error:
        if isinstance(error.__context__, DataFault):
            return [error.__context__.fault]
        raise


def test_sound_data_have_no_faults(tmp_path):
    experiment = case.experiment(tmp_path, section(write(tmp_path)))
    assert outside.check(experiment).fault_lines() == []


def test_every_code_is_in_the_table():
    with_a_solver = {"CLOSURE_SIGN", "CLOSURE_FACTOR", "CLOSURE_UNRELATED", "TIME_REVERSED"}
    elsewhere = {*with_a_solver, "LENGTH_UNITS", "CHANGED"}
    assert set(CODES) - {code for code, *_ in TABLE.values()} == elsewhere
    assert len(CODES) >= 50 and "CLOSURE_IS_STATE" not in STRUCTURAL


def test_the_command_prints_one_screen(tmp_path, capsys):
    path = write(tmp_path, changed(STATE, 4, STATE[3]))
    values = {"name": "case", "data": section(path)}
    experiment = tmp_path / "case.yaml"
    experiment.write_text(yaml.safe_dump(values))
    assert data_check.run(str(experiment)) == 1
    shown = capsys.readouterr().out
    assert "10" in shown and "error: SAME_MEMBERS: members 3 and 4 are equal" in shown
    assert len(shown.splitlines()) < 24
    assert data_check.run(str(experiment), ["data.accept=[SAME_MEMBERS]"]) == 0
    assert "accepted: SAME_MEMBERS" in capsys.readouterr().out
    assert data_check.run(str(experiment), json=True) == 1
    assert yaml.safe_load(capsys.readouterr().out)["faults"][0]["code"] == "SAME_MEMBERS"


def test_the_command_proposes_a_section_for_a_file(tmp_path, capsys):
    path = case.zarr(tmp_path / "a.zarr", STATE, CLOSURE)
    assert data_check.run(str(path)) == 0
    shown = capsys.readouterr().out
    assert "state: {q: q}" in shown and "closure: {q: forcing}" in shown
    assert data_check.run(str(write(tmp_path, x=None, y=None))) == 1
    shown = capsys.readouterr().out
    assert "dims: [member, time, y, x]" in shown and "error: NO_LENGTH" in shown


DOCS = Path(__file__).parent.parent / "docs" / "your_data.md"


def test_the_docs_list_every_code():
    rows = [line.split(" | ") for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    listed = {row[0].strip("| `"): (row[1], row[2].strip(" |")) for row in rows}
    assert {code: row for code, row in listed.items() if code.isupper()} == CODES


def test_the_examples_of_the_docs_load(tmp_path):
    (tmp_path / "runs").mkdir()
    for member in range(8):
        one = case.netcdf(
            tmp_path / "runs" / f"{member}.nc", STATE[member], CLOSURE[member], dims=case.DIMS[1:]
        )
        from netCDF4 import Dataset

        with Dataset(one, "r+") as file:
            file.renameVariable("q", "q_filtered")
            file["time"][:] = 0.2 * np.arange(12)
    case.zarr(tmp_path / "dns.zarr", *case.fields(8, 12, 32), n=32)
    (tmp_path / "my.py").write_text(
        "class Reduced:\n    dt = 0.1\n    def step(self, v, n):\n        return v\n"
    )
    texts = [text.partition("```")[0] for text in DOCS.read_text().split("```yaml\n")[1:]]
    assert len(texts) == 2
    for text in texts:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        loaded = reading.load(path)
        assert loaded.data.found.members == 8 and loaded.data_grid == 16
