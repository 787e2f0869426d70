"""Solvers in C++ and Fortran march with an exported closure and go on where Python stopped.

The programs are those of docs/recipes. Noise, states and files are compared with Python's process.
"""

import ctypes
import json
import os
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from closure_case import states_of
from typer.testing import CliRunner

import hpc_closure
from hpc_closure.cli import app
from hpc_closure.closure import artifact
from hpc_closure.closure.artifact import Closure
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.header import Header
from hpc_closure.export.program import noise_of_call
from hpc_closure.spectral.modes.grid import to_fields, to_spectra

RECIPES = Path(__file__).resolve().parent.parent / "docs" / "recipes"
MEMBERS, SEED, SAVED, LAST = 20, 11, 40, 50
AGREE = 2e-6
POINTS = {"subgrid_backscatter": 32, "two_regimes": 44, "everything": 16}
MISSING = [name for name in ("cmake", "g++") if shutil.which(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # compilers beside other tests
    pytest.mark.skipif(bool(MISSING), reason=f"not on PATH: {', '.join(MISSING)}"),
]
LANGUAGES = [
    "cpp",
    pytest.param(
        "fortran",
        marks=pytest.mark.skipif(shutil.which("gfortran") is None, reason="gfortran not on PATH"),
    ),
]


def everything() -> Closure:
    """A small closure with all that a process can hold, and noise of every kind.

    It reads an earlier state and the last closure; its residual is a mixture with memory.
    """
    conditions = {"sensors": "none", "previous_states": 1, "previous_closures": 1}
    torch.manual_seed(0)
    small = {"width": 8, "modes": 4, "layers": 1, "mean_layers": 1}
    model = artifact.build({"preset": "mixture", "conditions": conditions, **small}, 16)
    fields = torch.stack([states_of(300, 300 * part, 16) for part in range(4)]).float()
    batch = {
        "state": fields[0],
        "target": 0.3 * fields[0] + 0.2 * fields[1] + 0.1 * fields[2] + 0.2 * fields[3],
        "history": fields[1][:, None],
        "previous": 0.1 * fields[2][:, None],
    }
    for phase in model.phases:
        model.begin(phase.name, [batch])
    with torch.no_grad():
        model.residual.tables.normal_()
    times = torch.zeros_like(model.statistics.memory_times)
    times[1], times[2] = 4.0, 20.0
    model.adopt(replace(model.statistics, memory_times=times, memory_spacing=1.0))
    assert len(model.knot_spacings) == 2 and model.score_active
    target = {"kind": "subgrid", "interval": 2, "dt": 0.01, "every": 0.04}
    header = Header(model.config, 16, 1.0, target, {"hashes": {"train": "abc"}}, ())
    return Closure(model.eval(), header)


class Kit:
    """Exported closures, the programs of the recipes, and the library.

    Attributes:
        closures: closures in Python, by name.
        folders: their exported folders.
        build: folder of the programs.
        library: the library, loaded into this process.
    """

    def __init__(self, folder: Path):
        shipped = ("subgrid_backscatter", "two_regimes")
        self.closures = {name: hpc_closure.load(name) for name in shipped}
        self.closures["everything"] = everything()
        self.folders = {name: folder / name for name in POINTS}
        subgrid = self.closures["subgrid_backscatter"].model
        # a range of the training, which shipped models do not hold
        least = torch.full((subgrid.band.grid.num_shells,), 1e-12).double()
        subgrid.adopt(
            replace(subgrid.statistics, state_least=least, state_largest=0.5 + 0 * least)
        )
        models = {name: folder / f"{name}.safetensors" for name in POINTS}
        for name, closure in self.closures.items():
            target, record = closure.target, closure.provenance
            artifact.save(closure.model, models[name], target=target, provenance=record)
            self.closures[name] = hpc_closure.load(models[name])
        for name, points in POINTS.items():
            words = ["export", str(models[name]), "--to", str(self.folders[name])]
            words += ["--members", str(MEMBERS)]
            words += ["--torchscript"] if name == "subgrid_backscatter" else []
            result = CliRunner().invoke(app, [*words, "--points", str(points)])
            assert result.exit_code == 0, result.output + str(result.exception)
            assert f"{MEMBERS} members on {points} points" in result.output
        self.build = folder / "build"
        configure = ["cmake", "-S", str(RECIPES), "-B", str(self.build)]
        configure += [f"-DCLOSURE={self.folders['two_regimes']}", "-DBUILD_SHARED_LIBS=ON"]
        configure += [f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]
        for command in (configure, ["cmake", "--build", str(self.build)]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=400)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        self.library = ctypes.CDLL(str(next(self.build.rglob("libhpc_closure.so"))))
        self.library.hc_error.restype = ctypes.c_char_p

    def march(self, language, name, folder, last=LAST, start=()):
        """Run a program; returns states and closures of its calls, (calls, 2, members, n, n)."""
        command = [self.build / f"march_{language}", self.folders[name], SEED, last, *start]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            list(map(str, command)),
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        size = POINTS[name]
        return np.fromfile(folder / "run.bin").reshape(-1, 2, MEMBERS, size, size)

    def process(self, name):
        """Python's process with the members and the seed of the programs, begun."""
        process = self.closures[name].process(MEMBERS, seed=SEED)
        memory, past = process.memory, first_states(name)
        earlier = [0.9**lag * past for lag in range(memory.frames * memory.lag)]
        return process.begin(earlier, [0 * past] * memory.previous)

    def open(self, name="subgrid_backscatter", members=MEMBERS, seed=SEED, ids=None, folder=None):
        """Open a closure in this process; returns the handle, or the line of the error."""
        handle = ctypes.c_void_p()
        where = str(folder or self.folders[name]).encode()
        ids = None if ids is None else (ctypes.c_int64 * len(ids))(*ids)
        status = self.library.hc_open(
            where, ctypes.c_int64(members), ids, ctypes.c_int64(seed), ctypes.byref(handle)
        )
        return self.said() if status else handle

    def said(self):
        return self.library.hc_error().decode()

    def call(self, function, *arguments):
        """Call a function with arrays and handles; returns its status."""
        converted = [
            ctypes.c_void_p(one.ctypes.data) if isinstance(one, np.ndarray) else one
            for one in arguments
        ]
        return getattr(self.library, function)(*converted)

    def size(self, function, handle):
        getattr(self.library, function).restype = ctypes.c_int64
        return getattr(self.library, function)(handle)


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    return Kit(tmp_path_factory.mktemp("kit"))


def first_states(name):
    """Smooth states (members, n, n) of the size of the training's."""
    size = POINTS[name]
    draws = torch.randn(MEMBERS, size, size, generator=torch.Generator().manual_seed(5))
    return to_fields(to_spectra(draws.double(), 5), size).numpy() * 4


def difference(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_solver_marches_as_with_python(kit, language, name, tmp_path):
    """20 members, 50 intervals; either language continues what the other one has saved."""
    first_states(name).tofile(tmp_path / "initial.bin")
    process = kit.process(name)
    start = []  # the programs begin without earlier states
    if process.memory.frames:
        start = [tmp_path / "start.safetensors"]
        process.save(start[0])
    run = kit.march(language, name, tmp_path, SAVED, start)
    for state, u in run:
        assert difference(u, process(state)) < AGREE
    assert len(run) == SAVED
    other = kit.closures[name].process(MEMBERS, seed=SEED).load(tmp_path / "process.safetensors")
    assert other.calls == SAVED
    process.save(tmp_path / "python.safetensors")
    # the program continues from Python's file, and Python from the program's
    rest = kit.march(language, name, tmp_path, LAST, [tmp_path / "python.safetensors"])
    assert len(rest) == LAST - SAVED
    for state, u in rest:
        assert difference(u, process(state)) < AGREE
        assert difference(u, other(state)) < AGREE


def test_random_bits_and_normals_are_those_of_python(kit):
    closure, ids = kit.closures["two_regimes"], list(range(7, 7 + MEMBERS))
    handle = kit.open("two_regimes", seed=2**62 + 1, ids=ids)
    found = np.empty(kit.size("hc_noise_size", handle))
    assert kit.call("hc_noise", handle, found) == 0
    about = json.loads((kit.folders["two_regimes"] / "closure.json").read_text())
    key = keyed_noise.Key(2**62 + 1, "sample", ids, 0)
    normals = noise_of_call(about["noise"], key, 0.0)[0].numpy().ravel()
    assert np.abs(found - normals).max() < 1e-14  # and the words are equal: hc_open compares
    # with the same numbers as the caller's, a draw is the same
    state, u = first_states("two_regimes"), np.empty((MEMBERS, 44, 44))
    again = np.empty_like(u)
    assert kit.call("hc_draw_with", handle, state, found, u) == 0
    expected = closure.process(ids, seed=2**62 + 1)(state)
    assert difference(u, expected) < AGREE
    other = kit.open("two_regimes", seed=2**62 + 1, ids=ids)
    assert kit.call("hc_draw", other, state, again) == 0 and np.array_equal(u, again)
    kit.call("hc_close", handle), kit.call("hc_close", other)


def test_states_beyond_the_training_are_counted_as_in_python(kit):
    handle, process = kit.open(), kit.process("subgrid_backscatter")
    share = np.empty(kit.size("hc_shells", handle))
    assert kit.call("hc_beyond", handle, share) == 1 and "call hc_draw first" in kit.said()
    state, u = first_states("subgrid_backscatter"), np.empty((MEMBERS, 32, 32))
    state[:7] *= 10
    none = np.zeros((4, MEMBERS, 32, 32))
    assert kit.call("hc_begin", handle, None, none) == 0
    assert kit.call("hc_draw", handle, state, u) == 0, kit.said()
    process(state)
    assert kit.call("hc_beyond", handle, share) == 0
    assert np.allclose(share, process.beyond.numpy()) and 0 < share.max() <= 1
    assert share.max() >= 7 / MEMBERS
    kit.call("hc_close", handle)
    unknown = kit.open("two_regimes")
    assert kit.call("hc_beyond", unknown, share) == 2 and "does not record the range" in kit.said()
    kit.call("hc_close", unknown)


SINGLE = """
program single
   use hpc_closure
   implicit none
   type(c_ptr) :: closure
   character(4096) :: folder
   real(c_float) :: w(32, 32, 20), u(32, 32, 20), none(32, 32, 20, 4)
   integer :: states, closures, call
   call get_command_argument(1, folder)
   call hc_must(hc_open(folder, 20_c_int64_t, 11_c_int64_t, closure))
   none = 0
   call hc_must(hc_begin_f32(closure, closures=none))
   open (newunit=states, file="states.bin", access="stream", form="unformatted")
   open (newunit=closures, file="closures.bin", access="stream", form="unformatted")
   read (states) w
   do call = 1, 3
      call hc_must(hc_draw_f32(closure, w, u))
      write (closures) u
   end do
   call hc_close(closure)
end program
"""


def test_fields_of_single_precision(kit, tmp_path):
    state = first_states("subgrid_backscatter").astype(np.float32)
    process, handle = kit.process("subgrid_backscatter"), kit.open()
    expected = np.stack([process(state.astype(np.float64)) for _ in range(3)])
    u, found = np.empty_like(state), []
    assert kit.call("hc_begin_f32", handle, None, np.zeros((4, *state.shape), np.float32)) == 0
    for _ in range(3):
        assert kit.call("hc_draw_f32", handle, state, u) == 0, kit.said()
        found.append(u.copy())
    assert difference(np.stack(found), expected) < AGREE
    assert kit.call("hc_draw_f32", handle, None, u) == 1 and "not NULL" in kit.said()
    state[3, 1, 2] = np.nan
    assert kit.call("hc_draw_f32", handle, state, u) == 1 and "state" in kit.said()
    kit.call("hc_close", handle)
    if shutil.which("gfortran") is None:
        return
    first_states("subgrid_backscatter").astype(np.float32).tofile(tmp_path / "states.bin")
    (tmp_path / "single.f90").write_text(SINGLE)
    library = next(kit.build.rglob("libhpc_closure.so"))
    module = kit.folders["subgrid_backscatter"] / "hpc_closure.f90"
    build = ["gfortran", module, "single.f90", "-o", "single", library]
    libraries = Path(torch.__file__).parent / "lib"
    paths = [f"-Wl,-rpath,{one}" for one in (library.parent, libraries)]
    paths += [f"-Wl,-rpath-link,{libraries}"]
    for command in ([*build, *paths], ["./single", kit.folders["subgrid_backscatter"]]):
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    found = np.fromfile(tmp_path / "closures.bin", np.float32).reshape(expected.shape)
    assert difference(found, expected) < AGREE


def test_the_basic_model_interface_counts_time(kit):
    command = [kit.build / "bmi_cpp", kit.folders["subgrid_backscatter"]]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr, float(done.stdout)) == (0, "", 2 * 80 * 0.0025)


def test_a_state_in_memory_is_the_file(kit, tmp_path):
    handle, path = kit.open(), tmp_path / "a.safetensors"
    begun = np.random.default_rng(1).standard_normal((4, MEMBERS, 32, 32))
    assert kit.call("hc_begin", handle, None, begun) == 0
    assert kit.call("hc_save", handle, str(path).encode()) == 0
    packed = np.empty(kit.size("hc_state_size", handle), np.uint8)
    assert kit.call("hc_pack", handle, packed) == 0
    assert packed.tobytes() == path.read_bytes()
    process = kit.process("subgrid_backscatter").load(path)
    same = kit.closures["subgrid_backscatter"].process(MEMBERS, seed=SEED)
    same.begin(closures=begun)
    for one, other in zip(process.closures, same.closures, strict=True):
        assert float((one - other).abs().max()) < 1e-14
    other = kit.open()
    size = ctypes.c_int64(len(packed))
    assert kit.call("hc_unpack", other, packed, size) == 0
    assert kit.call("hc_unpack", other, packed, ctypes.c_int64(len(packed) - 8)) == 1
    assert "not a whole file of a process" in kit.said()
    wrong = kit.open(seed=SEED + 1)
    assert kit.call("hc_load", wrong, str(path).encode()) == 1
    assert kit.said() == f"{path}: the stored process has seed=11, this one seed=12"
    for one in (handle, other, wrong):
        kit.call("hc_close", one)


def test_a_member_whose_draw_fails_fails_alone(kit, tmp_path):
    handle, state = kit.open(), first_states("subgrid_backscatter")
    u, again = np.empty_like(state), np.empty_like(state)
    assert kit.call("hc_begin", handle, None, np.zeros((4, *state.shape))) == 0
    normals = np.empty(kit.size("hc_noise_size", handle))
    assert kit.call("hc_noise", handle, normals) == 0
    normals.reshape(MEMBERS, -1)[3] = np.nan
    assert kit.call("hc_draw_with", handle, state, normals, u) == 0
    assert np.isnan(u[3]).all() and np.isfinite(np.delete(u, 3, 0)).all()
    assert kit.call("hc_draw", handle, state, again) == 0 and np.isfinite(again).all()
    assert kit.call("hc_save", handle, str(tmp_path / "a").encode()) == 0
    process = kit.process("subgrid_backscatter").load(tmp_path / "a")
    assert not process.closures[1][3].any() and process.closures[1][4].abs().max() > 0
    kit.call("hc_close", handle)


def test_mistakes_are_one_line(kit, tmp_path, monkeypatch):
    assert "exported for 20 members, opened for 7; export again" in kit.open(members=7)
    assert "seed=-1: expected an integer from 0 on" in kit.open(seed=-1)
    assert "closure.json: no such file" in kit.open(folder=tmp_path)
    handle, state = kit.open(), first_states("subgrid_backscatter")
    u = np.empty_like(state)
    assert kit.call("hc_draw", handle, state, u) == 1 and "call hc_begin first" in kit.said()
    state[3, 4, 5] = np.nan
    assert kit.call("hc_draw", handle, state, u) == 1
    assert kit.said() == "state has non-finite values: the solver has blown up"
    kit.call("hc_close", handle)
    folder = tmp_path / "changed"
    shutil.copytree(kit.folders["subgrid_backscatter"], folder)
    about = json.loads((folder / "closure.json").read_text())
    for key, value, expected in (
        ("torch", "2.1.0", "compiled with torch 2.1.0, this program runs torch"),
        ("format", "hpc_closure export 0", "export again"),
        ("members", None, "closure.json: expected a number"),
    ):
        (folder / "closure.json").write_text(json.dumps({**about, key: value}))
        assert expected in kit.open(folder=folder) and "\n" not in kit.said()
    (folder / "closure.json").write_text(json.dumps(about)[:-9])
    assert "closure.json: JSON ends early" in kit.open(folder=folder)
    (folder / "closure.json").write_text(json.dumps(about))
    test = bytearray((folder / "check.bin").read_bytes())
    at = test.index(b'"seed":"20261129"')
    test[at : at + 17] = b'"seed":"20261128"'
    (folder / "check.bin").write_bytes(test)
    assert "the random bits differ" in kit.open(folder=folder)
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    for where in (Path(words[1]) for words in mounts if "noexec" in words[3].split(",")):
        if os.access(where, os.W_OK) and where.is_dir():
            monkeypatch.setenv("TMPDIR", str(where))
            assert f"{where}: mounted noexec" in kit.open()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    assert "missing or not writable, and torch unpacks closure.pt2 there" in kit.open()


def test_a_package_for_avx2_holds_no_wider_instructions(kit, tmp_path):
    about = json.loads((kit.folders["two_regimes"] / "closure.json").read_text())
    if about["march"] != "x86-64-v3" or shutil.which("objdump") is None:
        pytest.skip(f"march {about['march']}, or no objdump")
    with zipfile.ZipFile(kit.folders["two_regimes"] / "closure.pt2") as package:
        names = [name for name in package.namelist() if name.endswith(".so")]
        for name in names:
            path = package.extract(name, tmp_path)
            code = subprocess.run(["objdump", "-d", path], capture_output=True, text=True).stdout
            assert "ymm" in code and "zmm" not in code
    assert names


def test_an_exported_folder_is_compiled_again_on_the_machine_that_runs(kit, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(kit.folders["subgrid_backscatter"], folder)
    about = json.loads((folder / "closure.json").read_text())
    (folder / "closure.json").write_text(json.dumps({**about, "torch": "2.1.0"}))
    (folder / "closure.pt2").unlink()
    result = CliRunner().invoke(app, ["export", str(folder), "--here"])
    assert result.exit_code == 0, result.output + str(result.exception)
    assert isinstance(kit.open(folder=folder), ctypes.c_void_p), kit.said()
    (folder / "model.safetensors").write_bytes(b"damaged")
    result = CliRunner().invoke(app, ["export", str(folder), "--here"])
    assert "not the file of closure.json; export again" in str(result.exception)


def test_torchscript_draws_the_same(kit):
    folder = kit.folders["subgrid_backscatter"]
    about = json.loads((folder / "closure.json").read_text())
    state = torch.from_numpy(first_states("subgrid_backscatter"))
    process = kit.process("subgrid_backscatter")
    key = keyed_noise.Key(SEED, "sample", range(MEMBERS), 0)
    none = [torch.zeros(MEMBERS, count, 21, 11, 2).double() for count in (0, 4)]
    script = torch.jit.load(folder / "closure.ts")
    with torch.no_grad():
        u = script(state, *none, *noise_of_call(about["noise"], key, 0.0))[0]
    assert difference(u.numpy(), process(state).numpy()) < AGREE
