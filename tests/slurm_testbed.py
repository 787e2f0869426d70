"""The one-machine Slurm of slurm/testbed for tests: the fixtures ``testbed`` and ``ensemble``."""

import atexit
import fcntl
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from slurm_payload import Ensemble, with_tests

FOLDER = Path(__file__).resolve().parents[1] / "slurm" / "testbed"
RUNNING = Path("/run/slurm-testbed")


def _alive(name: str) -> bool:
    """Whether a daemon runs (a zombie has an empty command line)."""
    with_pid = RUNNING / f"{name}.pid"
    try:
        return bool(Path(f"/proc/{with_pid.read_text().strip()}/cmdline").read_bytes())
    except OSError:
        return False


class Testbed:
    """Commands of the tests; every wait ends in an error that shows the queue."""

    def up(self, *options: str) -> None:
        done = subprocess.run([FOLDER / "up", *options], capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            why = lines[-1] if lines else "slurm/testbed/up failed"
            # where there is a Slurm of ours to start, not to start it is a failure
            possible = shutil.which("slurmctld") and "another Slurm" not in why
            (pytest.fail if possible else pytest.skip)(why)

    def call(self, *command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def sbatch(self, *options: str) -> str:
        return self.call("sbatch", "--parsable", *options).partition(";")[0]

    def jobs(self, stuck: bool = False) -> dict[str, str]:
        """``{"12_3": "RUNNING", ...}`` of all that is queued or runs.

        Without those that Slurm holds because their node died while it started them.
        """
        lines = self.call("squeue", "-h", "-r", "-o", "%i %T %r").splitlines()
        return dict(
            line.split()[:2]
            for line in lines
            if stuck or "launch failed requeued held" not in line
        )

    def show(self, job: str) -> dict[str, str]:
        """What scontrol says about a job."""
        words = self.call("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, condition, seconds: float = 300.0, what: str = "condition"):
        """Poll until ``condition()`` is true; returns its value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = condition()
            if value:
                return value
            time.sleep(0.2)
        raise AssertionError(f"{what}: not within {seconds:g} s; queue: {self.jobs()}")

    def drain(self, seconds: float = 400.0) -> None:
        """Wait until nothing is queued or runs."""
        self.wait(lambda: not self.jobs(), seconds, "an empty queue")

    def clear(self) -> None:
        """Cancel everything."""
        for job in {name.partition("_")[0] for name in self.jobs(stuck=True)}:
            subprocess.run(["scancel", job], check=False)
        self.wait(lambda: not self.jobs(stuck=True), what="an empty queue")

    def kill_daemon(self, name: str) -> None:
        pid = (RUNNING / f"{name}.pid").read_text().strip()
        subprocess.run(["kill", "-9", pid], check=False)
        self.wait(lambda: not _alive(name), 10, f"the end of {name}")

    def processes(self, word: str) -> list[int]:
        """Living Python processes whose command line holds ``word``."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                except OSError:
                    continue
                if "python" in words[0] and any(word in one for one in words):
                    found.append(int(entry.name))
        return found


def _one_session_at_a_time() -> None:
    """There is one testbed on a machine, and the tests cancel what they find on it."""
    handle = os.open("/run/slurm-testbed.lock", os.O_CREAT | os.O_RDWR)
    for _ in range(1200):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
            return
        except BlockingIOError:
            time.sleep(0.5)
    pytest.skip("the testbed is in use by another test session")


@pytest.fixture(scope="session")
def cluster() -> Testbed:
    if os.geteuid():
        pytest.skip("not root: no one-machine Slurm (slurm/testbed/up)")
    _one_session_at_a_time()
    bed = Testbed()
    was_up = _alive("slurmctld")
    bed.up()
    if not was_up:
        atexit.register(subprocess.run, [FOLDER / "down"], capture_output=True)
    return bed


@pytest.fixture
def testbed(cluster: Testbed):
    """A testbed with an empty queue, before and after the test."""
    cluster.up()
    cluster.clear()
    yield cluster
    cluster.clear()


@pytest.fixture
def ensemble(tmp_path, monkeypatch):
    """Makes a run of empty physics: ``ensemble("name", members=8, seconds=2) -> Ensemble``."""
    monkeypatch.setenv("PYTHONPATH", with_tests())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lambda name="study", **changes: Ensemble(tmp_path / name, **changes)
