"""What all tests share: one thread per process, and a way to start MPI ranks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
for launcher_variable in ("PMI_RANK", "PMI_SIZE", "RANK", "WORLD_SIZE"):
    os.environ.pop(launcher_variable, None)

BIN = Path(sys.executable).parent
MOST_RERUNS = 3  # of a run; more of them say that something is wrong


# Files that take minutes run first, so that at the end no process waits long for another.
FIRST = (
    "end_to_end",
    "faults",
    "learning",
    "train_trainer",
    "chaos",
    "evaluate_channels",
    "subgrid_cube",
    "subgrid",
    "uncertainty_study",
    "wheel",
)


@pytest.fixture(autouse=True)
def goes_on(monkeypatch):
    """This process goes on after a test has called the command line in it."""
    monkeypatch.setattr("hpc_closure.work.stop.Stop.process_ends", False)


def pytest_collection_modifyitems(config, items):
    """Order files, and leave out tests marked long unless they are asked for by that name."""
    places = {f"test_{name}.py": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(FIRST)))
    if "long" not in config.option.markexpr:
        left_out = [item for item in items if "long" in item.keywords]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """Fail a run in which too many tests needed a second try (`launch/test` gives each one)."""
    if len(_reruns(session.config)) > MOST_RERUNS and exitstatus == 0:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter, config):
    """Say why such a run fails."""
    number = len(_reruns(config))
    if number > MOST_RERUNS:
        terminalreporter.line(
            f"{number} tests failed first, more than {MOST_RERUNS}: something is wrong with them "
            "or with what they test"
        )


def _reruns(config) -> list:
    """Reports of the tests that were run again; none in a worker of xdist."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return reporter.stats.get("rerun", []) if reporter else []


@pytest.fixture(scope="session")
def environment():
    """Environment of child processes: the environment's own programs first on PATH."""
    return {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }


@pytest.fixture(scope="session")
def mpirun(environment):
    """Start a command on ranks: ``mpirun(2, [sys.executable, "x.py"])``, a CompletedProcess."""
    program = shutil.which("mpirun", path=environment["PATH"])
    if program is None:
        pytest.skip("no mpirun; pip install 'hpc_closure[mpi]'")
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    extra = ["--oversubscribe"] if "Open MPI" in version else []

    def start(ranks, command, timeout=400, **options):
        return subprocess.run(
            [program, *extra, "-n", str(ranks), *map(str, command)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**environment, **options.pop("env", {})},
            **options,
        )

    return start


TINY = """
base: diffusion_64
name: tiny
root: {root}
generate: {{grid: 16, members: 8, t_end: 0.4, dt: 0.005, certificate: reported,
           record: {{start: 0.2, every: 0.02}}}}
train: {{grid: 16, window: [0.2, 0.4], split: [0.5, 0.25, 0.25], steps: 4, batch: 4,
        validate_every: 2, checkpoint_every: 2}}
rollout: {{members: 4, initial_conditions: 2, t_start: 0.2, t_end: 0.4, every: 0.1, interval: 2}}
evaluate: {{lead_times: [0.1, 0.2], grids: [16], samples: 4, members: 4,
           sensors: [{{number: 16}}], formats: []}}
cluster: {{members_per_block: 2, device: cpu}}
"""


@pytest.fixture
def tiny(tmp_path):
    """An experiment of seconds: its file; the run folder is ``runs/tiny`` beside it."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(root=tmp_path / "runs"), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def hpc_closure_command(environment):
    """Run ``hpc-closure`` as a user does: ``hpc_closure_command("status", path)``."""

    def start(*words, timeout=400, cwd=None, **variables):
        return subprocess.run(
            [sys.executable, "-m", "hpc_closure", *map(str, words)],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=cwd,
            env={**environment, **variables},
        )

    return start


def members_of(folder):
    """Hash every member in a data folder: {member: sha256}."""
    from hpc_closure.work import hdf5

    hashes = {}
    for path in sorted(folder.glob("*.h5")):
        hashes.update(hdf5.sha256_members(path))
    return hashes


def four_verbs(folder, text, changes=()):
    """The experiment of a text with ``{root}``, run in this process from DNS to report."""
    from hpc_closure.evaluate import verb as evaluate
    from hpc_closure.experiment import reading
    from hpc_closure.generate import verb as generate
    from hpc_closure.rollout import verb as rollout
    from hpc_closure.train import verb as train
    from hpc_closure.work.options import Options

    path = folder / "experiment.yaml"
    path.write_text(text.format(root=folder / "runs"))
    experiment = reading.load(path, changes)
    for verb in (generate, train, rollout, evaluate):
        assert verb.run(experiment, Options(verbosity=-1)) == 0
    return experiment
