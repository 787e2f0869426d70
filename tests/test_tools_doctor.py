"""The doctor: every broken state has its line, its command and its exit code."""

import importlib.metadata
import importlib.util
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_programs import programs  # noqa: F401

from hpc_closure.experiment.folder import STAGES
from hpc_closure.tools import doctor, doctor_checks
from hpc_closure.tools.doctor_checks import CHECKS, Check, Finding
from hpc_closure.work import extras

BY_NAME = {check.name: check for check in CHECKS}


def look(name):
    return BY_NAME[name].look()


def test_every_line_and_the_machine_readable_form(hpc_closure_command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = hpc_closure_command("doctor", "--json")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and not done.stderr, done.stderr
    report = json.loads(done.stdout)
    found = {check["name"]: check for check in report["checks"]}
    assert list(found) == list(BY_NAME) and report["stopped"] == {}
    for check in report["checks"]:
        assert check["state"] in ("OK", "missing", "broken", "note") and check["text"]
        assert check["used_by"] and bool(check["mend"]) == (check["state"] != "OK"), check
    for name in ("numpy", "torch", "h5py", "HDF5 locks", "pandas", "submitit", "libtorch headers"):
        assert found[name]["state"] == "OK", found[name]
    used = sum(getattr(after, key) - getattr(before, key) for key in ("ru_utime", "ru_stime"))
    assert used < 10  # about 3.5 s of processor time; a minute says that a check computes


def test_a_core_install_cannot_evaluate(monkeypatch, capsys):
    """And whatever is optional stops nothing."""
    optional = {module for modules in extras.EXTRAS.values() for module in modules}
    real = extras.installed
    monkeypatch.setattr(extras, "installed", lambda one: one not in optional and real(one))
    doctor_checks._imported.cache_clear()
    names = ("numpy", "pandas", "matplotlib", "jinja2", "tensorboard", "deepspeed", "submitit")
    chosen = [BY_NAME[name] for name in (*names, "MPI library", "netCDF4")]
    assert doctor.run(checks=chosen) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "cannot run: evaluate (pandas, matplotlib, jinja2)"
    assert lines[0].split()[:2] == ["OK", "numpy"]
    assert (
        lines[1].split()
        == (
            "missing pandas not installed [needed by evaluate]; mend: pip install "
            "'hpc_closure[report]'"
        ).split()
    )
    assert lines[4].endswith(
        "[optional, curves of train]; mend: pip install 'hpc_closure[report]'"
    )
    assert lines[5].endswith("mend: pip install 'hpc_closure[deepspeed]'")
    assert lines[7].endswith("mend: pip install 'hpc_closure[hpc,mpi]'")
    assert lines[8].endswith("mend: pip install 'hpc_closure[data]'")
    doctor_checks._imported.cache_clear()


def test_a_check_that_fails_is_a_line(capsys):
    def surprise():
        raise KeyError("x")

    chosen = [Check("one", "x", surprise), Check("two", "x", lambda: Finding("OK", "fine"))]
    assert doctor.run(checks=chosen) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("note     one  could not be checked (KeyError: 'x')")
    assert lines[1:] == ["OK       two  fine", "every verb can run"]
    stops = [Check("a", "x", lambda: Finding("broken", "b", "c", ("train", "rollout")))]
    assert doctor.run(json=True, checks=stops) == 1
    assert json.loads(capsys.readouterr().out)["stopped"] == {"train": ["a"], "rollout": ["a"]}


# -- packages ----------------------------------------------------------------------------------


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Replace modules by ones of a text, the only ones that are imported then."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))

    def make(**texts):
        for name, text in texts.items():
            (folder / f"{name}.py").write_text(text)
        monkeypatch.setattr(doctor_checks, "BATCHES", (dict.fromkeys(texts, ""),))
        monkeypatch.setattr(extras, "installed", lambda name: name in texts)
        doctor_checks._imported.cache_clear()

    yield make
    doctor_checks._imported.cache_clear()


def test_broken_packages(stub):
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    stub(pandas="raise ImportError('no lib')", numpy=crash, scipy="", deepspeed="1 / 0")
    found = look("pandas")
    assert (found.state, found.stops) == ("broken", ("evaluate",))
    assert found.text == "import fails: ImportError: no lib"
    assert found.mend == "pip install --force-reinstall pandas"
    assert look("numpy").state == "broken" and look("numpy").stops == STAGES
    assert "ended with code -11" in look("numpy").text
    assert look("scipy").state == "OK"  # after the one that ended the process
    assert look("deepspeed").state == "broken"
    assert look("deepspeed").stops == ("train",)  # which would take it because it is installed


def test_a_package_that_hangs(stub, monkeypatch):
    monkeypatch.setattr(doctor_checks, "PATIENCE", 2.0)
    stub(typer="", yaml="import time; time.sleep(60)")
    began = time.monotonic()
    assert "no answer within 2 s" in look("pyyaml").text
    assert look("pyyaml").mend == "pip install --force-reinstall pyyaml"
    assert time.monotonic() - began < 30


def test_a_file_of_the_working_folder_is_no_package(stub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scipy.py").write_text("raise ImportError")
    stub(scipy="")
    assert look("scipy").state == "OK"


def test_packages_that_are_too_old(monkeypatch):
    lines = ["numpy>=1.26", "submitit<1.6,>=1.5; extra == 'hpc'", "torch", "numpydoc>=9"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    least = doctor_checks.least_version
    assert (least("numpy"), least("submitit"), least("torch")) == ("1.26", "1.5", "")
    monkeypatch.setattr(doctor_checks, "imported", lambda module: ("", None))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.4.9")
    assert look("numpy").state == look("submitit").state == "note"
    assert look("numpy").mend == "pip install 'numpy>=1.26'"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.26.0rc1+cpu")
    assert look("numpy").state == "OK"
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    assert look("Python").stops == STAGES and "venv" in look("Python").mend


def test_gpus(monkeypatch, programs):  # noqa: F811
    def torch(built, *devices):
        answer = ("", {"built for": built, "devices": list(devices)})
        monkeypatch.setattr(doctor_checks, "imported", lambda module: answer)
        return look("GPU")

    assert torch("12.8", "H100", "H100").text == "2: H100; CUDA 12.8"
    assert torch("").state == "missing" and "srun --gpus=1" in torch("").mend
    programs("nvidia-smi", "echo 'GPU 0: H100'")
    assert torch("") == Finding(
        "broken", "GPU 0: H100; this torch is made for CPUs", "pip install -U torch"
    )
    assert "cannot use the driver" in torch("12.8").text and torch("12.8").mend == "nvidia-smi"
    monkeypatch.setattr(doctor_checks, "imported", lambda module: None)
    assert look("GPU").mend == "pip install hpc_closure"


def test_headers(monkeypatch, tmp_path):
    there = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there)
    assert look("libtorch headers").state == "missing"
    assert look("libtorch headers").mend == "pip install --force-reinstall torch"
    folder = tmp_path / "include" / "torch" / "csrc" / "api" / "include" / "torch"
    folder.mkdir(parents=True)
    (folder / "torch.h").touch()
    assert look("libtorch headers") == Finding("OK", str(tmp_path / "include"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert look("libtorch headers").mend == "pip install hpc_closure"


# -- this machine ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, state, text",
    [
        ("", "OK", "not set"),
        ("2", "OK", "OMP_NUM_THREADS=2"),
        ("2,1", "OK", "OMP_NUM_THREADS=2,1"),
        ("9", "note", "OMP_NUM_THREADS=9 is more"),
        ("many", "broken", "is not a number"),
    ],
)
def test_threads(monkeypatch, value, state, text):
    monkeypatch.setattr(doctor_checks, "cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    found = look("threads")
    assert found.state == state and text in found.text and not found.stops
    assert found.mend == ("" if state == "OK" else "export OMP_NUM_THREADS=4")


def test_cores_are_those_of_the_affinity(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert doctor_checks.cores() == 1


def test_the_cache_of_compiled_functions(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert look("Numba cache").state == "broken" and not look("Numba cache").stops
    assert look("Numba cache").mend == "export NUMBA_CACHE_DIR=$HOME/.cache/hpc_closure"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "new"))
    assert "empty: the first run" in look("Numba cache").text
    (tmp_path / "new" / "cpu_1").mkdir(parents=True)
    (tmp_path / "new" / "cpu_1" / "a.nbi").touch()
    assert look("Numba cache").text == f"{tmp_path / 'new'}, warm: 1 functions"
    assert not list(tmp_path.glob("**/tmp*"))


def test_temporary_folders(monkeypatch, tmp_path):
    assert look("temporary folder").state in ("OK", "note")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    assert "cannot be used" in look("temporary folder").text
    monkeypatch.delenv("TMPDIR")
    disk = SimpleNamespace(f_bavail=10**6, f_frsize=4096, f_flag=0)
    monkeypatch.setattr(os, "statvfs", lambda folder: disk)
    assert look("temporary folder") == Finding("OK", f"{tempfile.gettempdir()}, 4 GB free")
    disk.f_flag = os.ST_NOEXEC
    assert "noexec" in look("temporary folder").text
    assert look("temporary folder").mend == "export TMPDIR=$HOME/tmp"
    disk.f_bavail = 10**4
    assert "41 MB left" in look("temporary folder").text
    assert look("temporary folder").mend == "export TMPDIR=/path/with/space"

    def none():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    assert look("temporary folder").stops == STAGES


def test_locks_of_files(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HDF5_USE_FILE_LOCKING", "FALSE")  # would hide what is looked for
    monkeypatch.setattr(doctor_checks, "imported", lambda module: ("", None))
    assert look("HDF5 locks") == Finding("OK", f"work in {tmp_path}")
    monkeypatch.setattr(doctor_checks, "_LOCKS", "print('plain', flush=True); 1 / 0")
    found = look("HDF5 locks")
    assert found.state == "note" and not found.stops
    assert found.mend == "export HDF5_USE_FILE_LOCKING=FALSE"
    monkeypatch.setattr(doctor_checks, "_LOCKS", "raise OSError('no space')")
    assert look("HDF5 locks").stops == STAGES and "no space" in look("HDF5 locks").text
    assert "another file system" in look("HDF5 locks").mend
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(doctor_checks, "imported", lambda module: None)
    assert look("HDF5 locks").stops == STAGES


def test_the_limit_of_locked_memory(monkeypatch, tmp_path):
    def limit(number):
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (number, number))
        return look("locked memory")

    monkeypatch.setattr(doctor_checks, "INFINIBAND", tmp_path / "absent")
    assert limit(resource.RLIM_INFINITY) == Finding("OK", "unlimited")
    assert limit(2**20).text == "1 MiB, which is enough without InfiniBand"
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(doctor_checks, "INFINIBAND", tmp_path)
    assert limit(2**20).state == "note" and limit(2**20).mend == "ulimit -l unlimited"
    assert limit(2**30).state == "OK"


@pytest.mark.parametrize("name", ["gcc", "g++", "gfortran", "cmake", "ffmpeg"])
def test_programs(programs, name):  # noqa: F811
    assert look(name).state == "missing" and "install" in look(name).mend
    programs(name, "echo first; echo second")
    assert look(name) == Finding("OK", "first")
    programs(name, "echo 'cannot open libx.so' >&2; exit 127")
    assert look(name).state == "broken" and look(name).text.endswith("cannot open libx.so")


# -- several processes -------------------------------------------------------------------------


@pytest.fixture
def mpi(monkeypatch, tmp_path):
    """Pretend that mpi4py works with an MPICH, in an environment without an mpirun of its own."""
    monkeypatch.setattr(doctor_checks, "imported", lambda module: ("", "MPICH Version: 5\n..."))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "elsewhere" / "python"))
    return monkeypatch


def test_the_mpi_library(mpi):
    assert look("MPI library") == Finding("OK", "MPICH Version: 5")
    mpi.setattr(doctor_checks, "imported", lambda module: ("cannot load libmpi", None))
    assert look("MPI library").state == "broken" and not look("MPI library").stops
    assert look("MPI library").mend.startswith("pip install 'hpc_closure[mpi]'")
    mpi.setattr(doctor_checks, "imported", lambda module: None)
    assert look("MPI library").mend == "pip install 'hpc_closure[hpc,mpi]'"


def test_mpirun(mpi, programs, tmp_path):  # noqa: F811
    assert look("mpirun").state == "missing" and "hpc_closure[mpi]" in look("mpirun").mend
    programs("mpirun", "echo ranks 2; echo ranks 2")
    assert look("mpirun") == Finding("OK", f"{tmp_path}/bin/mpirun starts 2 ranks")
    programs("mpirun", "echo ranks 1; echo ranks 1")
    assert "belongs to another MPI than MPICH Version: 5" in look("mpirun").text
    assert look("mpirun").mend.endswith("--no-binary mpi4py mpi4py")
    programs("mpirun", "echo 'bad host name'; exit 1")
    assert look("mpirun").text.endswith("does not start 2 ranks: bad host name")
    assert "hostname" in look("mpirun").mend and look("mpirun").state == "broken"
    programs("mpirun", '[ "$1" = --version ] && echo "mpirun (Open MPI) 5" || echo "ranks 2 $@"')
    assert "--oversubscribe" in look("mpirun").text
    mpi.setattr(doctor_checks, "imported", lambda module: None)
    assert look("mpirun").state == "note"


def test_an_mpirun_that_hangs_is_ended_with_its_children(mpi, programs, tmp_path):  # noqa: F811
    mpi.setattr(doctor_checks, "START", 1.0)
    programs("mpirun", f'[ "$1" = --version ] && exit; sleep 60 & echo $! > {tmp_path}/pid; wait')
    began = time.monotonic()
    assert "no answer within 1 s" in look("mpirun").text and time.monotonic() - began < 20
    child = int((tmp_path / "pid").read_text())
    while is_running(child) and time.monotonic() - began < 25:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(process):
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def test_slurm(programs):  # noqa: F811
    assert look("Slurm").state == "missing" and "module load slurm" in look("Slurm").mend
    for name in ("sbatch", "squeue", "srun"):
        programs(name, "exit 0")
    assert look("Slurm").state == "note" and "scontrol" in look("Slurm").text
    programs("scontrol", "echo 'Slurmctld(primary) at here is UP'")
    assert look("Slurm").state == "OK"
    programs("scontrol", "echo '***'; echo 'Slurmctld(primary) at here is DOWN'; exit 1")
    assert look("Slurm").text.endswith("Slurmctld(primary) at here is DOWN")
    assert look("Slurm").state == "broken" and look("Slurm").mend == "scontrol ping"
