"""What ``hpc-closure doctor`` looks at: one small function a thing, in the list :data:`CHECKS`.

Packages are imported in processes of their own, because a broken one may end the process, write
messages or wait for a device. A program that does not answer in time is ended. The largest thing
that a check does is to start two MPI ranks.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import hpc_closure
from hpc_closure.experiment.folder import STAGES
from hpc_closure.work import extras

PATIENCE = 30.0  # seconds for imports, which a cold network disk makes slow
START = 10.0  # seconds for the start of two MPI ranks
ANSWER = 3.0  # seconds for a program that answers at once, or does not
LITTLE = 1e9  # bytes: less free space of the temporary folder is worth a note
LOCKED = 64 * 2**20  # bytes of locked memory that MPI needs at least with an InfiniBand card
ALL = tuple(STAGES)

State = Literal["OK", "missing", "broken", "note"]


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        state: OK; missing or broken; or a note on what works, but could be better.
        text: what was found, in a few words.
        mend: command that mends it, or "".
        stops: verbs that cannot run because of it.
    """

    state: State
    text: str
    mend: str = ""
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """A thing to look at: its name, what uses it, and the function that looks."""

    name: str
    used_by: str
    look: Callable[[], Finding]


# -- programs and imports ----------------------------------------------------------------------


def ask(
    command: Sequence[str], patience: float, environ: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Return exit code and output of a program; (-1, reason) if it cannot start or is too slow."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,  # so that its children end with it
        )
    except OSError as error:
        return -1, error.strerror or str(error)
    try:
        output, _ = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        said = (error.stdout or b"").decode(errors="replace")
        return -1, f"{said}\nno answer within {patience:g} s"
    return process.returncode, output.decode(errors="replace").strip()


def last_line(text: str) -> str:
    """Return the last line of a program's output, which has the reason of most failures."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no message"


# Imports modules one by one and prints [module, error, details] for each; the second word of the
# command line is {module: code that sets `details`} in JSON.
_PROBE = """
import json, sys
for module, code in json.loads(sys.argv[1]).items():
    names, error = {"details": None}, ""
    try:
        exec(f"import {module}\\n{code}", names)
    except BaseException as failure:
        error = f"{type(failure).__name__}: {failure}"
    print("\\n@" + json.dumps([module, error, names["details"]]), flush=True)
"""
_TORCH = """
cuda = torch.cuda
number = cuda.device_count() if cuda.is_available() else 0
names = [cuda.get_device_name(index) for index in range(number)]
details = {"built for": torch.version.cuda or torch.version.hip or "", "devices": names}
"""
_H5PY = "details = {'hdf5': h5py.version.hdf5_version, 'mpi': bool(h5py.get_config().mpi)}"
_MPI = """
mpi4py.rc.initialize = False
from mpi4py import MPI
details = MPI.Get_library_version().replace(chr(0), "")
"""
# Modules that one process imports one after the other. DeepSpeed is last, for it changes torch.
BATCHES: tuple[dict[str, str], ...] = (
    {"numpy": "", "scipy": "", "pydantic": "", "yaml": "", "typer": "", "safetensors": ""}
    | {"h5py": _H5PY, "torch": _TORCH, "deepspeed": ""},
    {"numba": "", "submitit": "", "matplotlib": "", "pandas": "", "jinja2": "", "tensorboard": ""}
    | {"zarr": "", "netCDF4": ""},
    {"mpi4py": _MPI},
)
_one_at_a_time = {index: threading.Lock() for index in range(len(BATCHES))}


@functools.cache
def _imported(index: int) -> dict[str, tuple[str, Any]]:
    """Import the modules of a batch that are installed; returns {module: (error, details)}."""
    rest = {one: code for one, code in BATCHES[index].items() if extras.installed(one)}
    found: dict[str, tuple[str, Any]] = {}
    while rest:
        # -P: a file of the working folder must not pass for a package
        command = [sys.executable, "-P", "-c", _PROBE, json.dumps(rest)]
        status, text = ask(command, PATIENCE)
        for line in text.splitlines():
            if line.startswith("@"):
                module, error, details = json.loads(line[1:])
                found[module] = ((error.splitlines() or [""])[0][:160], details)
        rest = {module: code for module, code in rest.items() if module not in found}
        if rest:  # the process ended while it imported the first of these
            module, _ = next(iter(rest.items()))
            reason = last_line(text) if status == -1 else f"the process ended with code {status}"
            found[module] = (reason, None)
            del rest[module]
    return found


def imported(module: str) -> tuple[str, Any] | None:
    """Return (error or "", details) of a module's import; None if it is not installed."""
    index = next(index for index, batch in enumerate(BATCHES) if module in batch)
    with _one_at_a_time[index]:
        return _imported(index).get(module)


# -- packages ----------------------------------------------------------------------------------


def python() -> Finding:
    """Check the version of Python; name the versions and the folder of this package."""
    where = Path(hpc_closure.__file__).parent
    text = f"{platform.python_version()}; hpc_closure {hpc_closure.__version__} in {where}"
    if sys.version_info < (3, 11):
        return Finding("broken", f"{text}; too old", "python3.11 -m venv .venv", ALL)
    return Finding("OK", text)


def least_version(name: str) -> str:
    """Return the oldest version of a package that setup.cfg accepts, or ""."""
    try:
        lines = importlib.metadata.requires("hpc_closure") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        return ""
    for line in lines:
        versions = line.partition(";")[0].lower().removeprefix(name.lower())
        for part in versions.split(","):
            if versions[:1] in ("<", ">") and part.startswith(">="):
                return part.removeprefix(">=").strip()
    return ""


def _number(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version: (2, 13) for "2.13.0rc1+cpu"."""
    digits = ["".join(c for c in part if c.isdigit()) for part in version.split(".")[:2]]
    return tuple(int(part or 0) for part in digits)


def package(
    name: str, module: str = "", stops: tuple[str, ...] = (), harms: tuple[str, ...] = ()
) -> Finding:
    """Check that a package can be imported and is new enough.

    Args:
        name: name of the package.
        module: name to import, if it is another one.
        stops: verbs that cannot run without it.
        harms: verbs that cannot run if it is installed, but broken.
    """
    module = module or name
    answer = imported(module)
    if answer is None:
        return Finding("missing", "not installed", extras.command(module), stops)
    error, details = answer
    if error:
        mend = f"pip install --force-reinstall {name}"
        return Finding("broken", f"import fails: {error}", mend, stops or harms)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("OK", "version unknown")
    least = least_version(name)
    if least and _number(version) < _number(least):
        return Finding("note", f"{version}, older than {least}", f"pip install '{name}>={least}'")
    if module == "h5py":
        with_mpi = "with MPI" if details["mpi"] else "without MPI, which nothing here needs"
        version = f"{version}; HDF5 {details['hdf5']} {with_mpi}"
    return Finding("OK", version)


def gpu() -> Finding:
    """Check that torch sees the GPUs of this machine."""
    answer = imported("torch")
    if answer is None or answer[0]:
        return Finding("missing", "torch cannot be imported", extras.command("torch"))
    built, devices = answer[1]["built for"], answer[1]["devices"]
    if devices:
        return Finding("OK", f"{len(devices)}: {', '.join(dict.fromkeys(devices))}; CUDA {built}")
    status, text = ask(["nvidia-smi", "-L"], ANSWER)
    if status or "GPU" not in text:
        elsewhere = "srun --gpus=1 hpc-closure doctor (on a node of a cluster that has one)"
        return Finding("missing", "verbs compute on the CPU", elsewhere)
    if not built:
        reason = "this torch is made for CPUs"
        return Finding("broken", f"{text.splitlines()[0]}; {reason}", "pip install -U torch")
    return Finding("broken", f"torch for CUDA {built} cannot use the driver", "nvidia-smi")


def headers() -> Finding:
    """Check that the headers of libtorch are there, for programs in C++."""
    found = importlib.util.find_spec("torch") if extras.installed("torch") else None
    folders = list(found.submodule_search_locations or []) if found else []
    if not folders:
        return Finding("missing", "torch is not installed", extras.command("torch"))
    folder = Path(folders[0]) / "include"
    if not (folder / "torch" / "csrc" / "api" / "include" / "torch" / "torch.h").is_file():
        mend = "pip install --force-reinstall torch"
        return Finding("missing", f"no torch/torch.h in {folder}", mend)
    return Finding("OK", str(folder))


# -- this machine ------------------------------------------------------------------------------


def cores() -> int:
    """Return the number of cores that this process may use: affinity and the container's quota."""
    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        number = min(number or 1, max(1, round(int(quota) / int(period))))
    return number or 1


def threads() -> Finding:
    """Compare OMP_NUM_THREADS with the cores of this process."""
    allowed, value = cores(), os.environ.get("OMP_NUM_THREADS", "")
    text = f"{allowed} of {os.cpu_count()} cores are this process's"
    if not value:
        return Finding("OK", f"{text}; OMP_NUM_THREADS is not set: a process uses them all")
    first = value.split(",")[0]
    if not first.isdigit() or int(first) < 1:
        reason = f"{text}; OMP_NUM_THREADS={value} is not a number"
        return Finding("broken", reason, f"export OMP_NUM_THREADS={allowed}")
    if int(first) > allowed:
        reason = f"{text}; OMP_NUM_THREADS={value} is more: threads wait for each other"
        return Finding("note", reason, f"export OMP_NUM_THREADS={allowed}")
    return Finding("OK", f"{text}; OMP_NUM_THREADS={value}")


def _writable(folder: Path) -> bool:
    """Return whether files can be made in a folder, or in the nearest one above that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def numba_cache() -> Finding:
    """Check that compiled functions can be stored, and whether there are some."""
    # as Numba looks: the folder of its variable, else beside the sources, else the user's cache
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "numba"
    folders = [Path(hpc_closure.__file__).parent / "spectral" / "cpu" / "__pycache__", user]
    if os.environ.get("NUMBA_CACHE_DIR"):
        folders = [Path(os.environ["NUMBA_CACHE_DIR"])]
    folder = next((one for one in folders if _writable(one)), None)
    if folder is None:
        reason = f"{folders[0]} cannot be written: every process compiles the solver"
        return Finding("broken", reason, "export NUMBA_CACHE_DIR=$HOME/.cache/hpc_closure")
    stored = sum(1 for _ in folder.rglob("*.nbi"))
    if not stored:
        return Finding("OK", f"{folder}, empty: the first run on a grid compiles some seconds")
    return Finding("OK", f"{folder}, warm: {stored} functions")


def temporary_folder() -> Finding:
    """Check that the temporary folder can be written, has space, and may hold programs."""
    wanted, mend = os.environ.get("TMPDIR", ""), "export TMPDIR=/path/with/space"
    try:
        folder = tempfile.gettempdir()
    except OSError:
        return Finding("broken", "no temporary folder can be written", mend, ALL)
    if wanted and not (Path(wanted).is_dir() and _writable(Path(wanted))):
        return Finding("note", f"TMPDIR={wanted} cannot be used, {folder} is", mend)
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if free < LITTLE:
        return Finding("note", f"{folder} has {free / 1e6:.0f} MB left", mend)
    if disk.f_flag & os.ST_NOEXEC:
        reason = f"{folder} is noexec: programs that are compiled at run time cannot start there"
        return Finding("note", reason, "export TMPDIR=$HOME/tmp")
    return Finding("OK", f"{folder}, {free / 1e9:.0f} GB free")


_LOCKS = """
import h5py, sys
path = sys.argv[1]
with h5py.File(path, "w", locking=False) as file:
    file["x"] = [1.0, 2.0]
print("plain", flush=True)
with h5py.File(path, "a", locking=True) as file:
    file["x"][0] = 3.0
print("locked")
"""


def hdf5_locks() -> Finding:
    """Write an HDF5 file to the working folder, without and with locks, and remove it."""
    answer = imported("h5py")
    if answer is None or answer[0]:
        return Finding("missing", "h5py cannot be imported", extras.command("h5py"), ALL)
    where = Path.cwd()
    if not _writable(where):
        return Finding("note", f"{where} cannot be written: not tried", "cd $HOME")
    with tempfile.TemporaryDirectory(prefix=".hpc-closure-doctor-", dir=where) as folder:
        environ = {
            name: os.environ[name] for name in os.environ if name != "HDF5_USE_FILE_LOCKING"
        }
        command = [sys.executable, "-P", "-c", _LOCKS, f"{folder}/x.h5"]
        status, text = ask(command, PATIENCE, environ)
    if "plain" not in text.split():
        mend = "cd to a folder of another file system, or pip install --force-reinstall h5py"
        return Finding("broken", f"no HDF5 file in {where}: {last_line(text)}", mend, ALL)
    if status:
        reason = f"locks fail in {where}; the verbs need none, other programs may"
        return Finding("note", reason, "export HDF5_USE_FILE_LOCKING=FALSE")
    return Finding("OK", f"work in {where}")


def locked_memory() -> Finding:
    """Check the limit of locked memory, which MPI over InfiniBand needs."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return Finding("OK", "unlimited")
    text = f"{limit / 2**20:.3g} MiB"
    if limit < LOCKED and INFINIBAND.is_dir() and any(INFINIBAND.iterdir()):
        return Finding("note", f"{text}: too little for InfiniBand", "ulimit -l unlimited")
    return Finding("OK", f"{text}, which is enough without InfiniBand")


INFINIBAND = Path("/sys/class/infiniband")


def program(name: str, mend: str, option: str = "--version") -> Finding:
    """Check that a program is on PATH and starts."""
    path = shutil.which(name)
    if path is None:
        return Finding("missing", "not on PATH", mend)
    status, text = ask([path, option], ANSWER)
    if status:
        return Finding("broken", f"{path}: {last_line(text)}", mend)
    return Finding("OK", f"{(text.splitlines() or [path])[0]}")


# -- several processes -------------------------------------------------------------------------


def mpi_library() -> Finding:
    """Check that mpi4py finds an MPI library."""
    answer = imported("mpi4py")
    if answer is None:
        return Finding("missing", "mpi4py is not installed", "pip install 'hpc_closure[hpc,mpi]'")
    error, library = answer
    if error:
        mend = "pip install 'hpc_closure[mpi]' (or load your site's MPI module)"
        return Finding("broken", f"mpi4py finds none: {error}", mend)
    return Finding("OK", (library.splitlines() or ["unknown"])[0])


_RANKS = "from mpi4py import MPI; print('ranks', MPI.COMM_WORLD.Get_size(), flush=True)"


def mpirun() -> Finding:
    """Start two ranks with mpirun; they must see each other."""
    beside = Path(sys.executable).parent / "mpirun"  # of an environment that is not activated
    path = str(beside) if os.access(beside, os.X_OK) else shutil.which("mpirun")
    if path is None:
        mend = "pip install 'hpc_closure[mpi]' (or load your site's MPI module)"
        return Finding("missing", "not on PATH; under Slurm, jobs use srun", mend)
    answer = imported("mpi4py")
    if answer is None or answer[0]:
        mend = "pip install 'hpc_closure[hpc,mpi]'"
        return Finding("note", f"{path}; not tried, because mpi4py does not work", mend)
    allow = dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
    allow |= {"PRTE_ALLOW_RUN_AS_ROOT": "1", "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    many = ["--oversubscribe"] if "Open MPI" in ask([path, "--version"], ANSWER)[1] else []
    command = [path, *many, "-n", "2", sys.executable, "-P", "-c", _RANKS]
    status, text = ask(command, START, {**os.environ, **allow})
    if text.count("ranks 2") == 2 and not status:
        return Finding("OK", f"{path} starts 2 ranks")
    if text.count("ranks 1") == 2:
        reason = f"{path} belongs to another MPI than {answer[1].splitlines()[0]}"
        return Finding("broken", reason, "pip install --force-reinstall --no-binary mpi4py mpi4py")
    reason = f"{path} does not start 2 ranks: {last_line(text)}"
    return Finding("broken", reason, f"{path} -n 2 hostname (then its manual, or your site)")


def slurm() -> Finding:
    """Check Slurm's commands and that the controller answers."""
    names = ("sbatch", "squeue", "srun", "scontrol")
    absent = [name for name in names if shutil.which(name) is None]
    mend = "module load slurm (or log in to a node of the cluster)"
    if len(absent) == len(names):
        return Finding("missing", "no sbatch on PATH", mend)
    if "scontrol" not in absent:
        status, text = ask(["scontrol", "ping"], ANSWER)
        if status or "UP" not in text:
            reason = next((line for line in text.splitlines() if "DOWN" in line), last_line(text))
            return Finding("broken", f"no answer of the controller: {reason}", "scontrol ping")
    if absent:
        return Finding("note", f"not on PATH: {', '.join(absent)}", mend)
    return Finding("OK", f"{', '.join(names)}; the controller answers")


# -- the list ----------------------------------------------------------------------------------


def _core(name: str, module: str = "") -> Check:
    return Check(name, "every verb", partial(package, name, module, ALL))


def _report(name: str) -> Check:
    return Check(name, "evaluate", partial(package, name, stops=("evaluate",)))


def _files(name: str) -> Check:
    return Check(name, "files of other programs", partial(package, name))


_COMPILER = "apt-get install {0} (or module load gcc)"
CHECKS = (
    Check("Python", "every verb", python),
    *map(_core, ("numpy", "scipy", "torch", "numba", "h5py", "safetensors", "pydantic")),
    _core("pyyaml", "yaml"),
    _core("typer"),
    Check("HDF5 locks", "every verb", hdf5_locks),
    Check("temporary folder", "every verb", temporary_folder),
    Check("threads", "every verb", threads),
    Check("Numba cache", "every verb", numba_cache),
    Check("GPU", "speed", gpu),
    *map(_report, ("pandas", "matplotlib", "jinja2")),
    Check("tensorboard", "curves of train", partial(package, "tensorboard")),
    Check("deepspeed", "train on many devices", partial(package, "deepspeed", harms=("train",))),
    Check("MPI library", "several ranks", mpi_library),
    Check("mpirun", "several ranks", mpirun),
    Check("locked memory", "several ranks", locked_memory),
    Check("submitit", "submit", partial(package, "submitit")),
    Check("Slurm", "submit", slurm),
    *map(_files, ("zarr", "netCDF4")),
    Check("gcc", "programs in C", partial(program, "gcc", _COMPILER.format("gcc"))),
    Check("g++", "programs in C++", partial(program, "g++", _COMPILER.format("g++"))),
    Check(
        "gfortran",
        "programs in Fortran",
        partial(program, "gfortran", _COMPILER.format("gfortran")),
    ),
    Check("cmake", "programs in C++", partial(program, "cmake", "pip install cmake")),
    Check("libtorch headers", "programs in C++", headers),
    Check(
        "ffmpeg", "movies", partial(program, "ffmpeg", "apt-get install ffmpeg", option="-version")
    ),
)
