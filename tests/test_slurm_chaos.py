"""An ensemble of 64 units during which everything goes wrong, on the one-machine Slurm."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from slurm_payload import Ensemble, ledger

from hpc_closure.batch.squeue import queued_units
from hpc_closure.work import atomic, hdf5

pytest_plugins = ["slurm_testbed"]
pytestmark = pytest.mark.slurm


class Chaos:
    """One kind of trouble per method, each hits what the random generator picks."""

    def __init__(self, testbed, work, seed):
        self.testbed, self.work, self.random = testbed, work, random.Random(seed)

    def _pick(self, *states):
        jobs = sorted(job for job, state in self.testbed.jobs().items() if state in states)
        return self.random.choice(jobs) if jobs else None

    def kill_a_task(self):
        for pid in self.testbed.processes(str(self.work.run))[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def requeue(self):
        if job := self._pick("RUNNING"):
            subprocess.run(["scontrol", "requeue", job], check=False, capture_output=True)

    def warn(self):
        if job := self._pick("RUNNING"):
            subprocess.run(["scancel", "--signal=USR2", job], check=False, capture_output=True)

    def cancel(self):
        if job := self._pick("RUNNING", "PENDING"):
            subprocess.run(["scancel", job], check=False, capture_output=True)

    def preempt(self):
        self.testbed.sbatch("-p", "high", "-N1", "-n3", "-o", "/dev/null", "--wrap", "sleep 1")

    def lose_a_node(self):
        pids = self.testbed.call("ip", "netns", "pids", "testbed-node2").split()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        # As a site's health check does; by itself Slurm takes a minute or two to notice.
        self.testbed.call("scontrol", "update", "nodename=node2", "state=down", "reason=crash")
        time.sleep(1.0)
        self.testbed.up()

    def restart_the_controller(self):
        self.testbed.kill_daemon("slurmctld")
        time.sleep(0.5)
        self.testbed.up()

    def submit_again(self):
        """A second person submits the same units, those in the queue included."""
        survey = self.work.books.survey(64, 1)
        self.work.submit_units([unit.name for unit in survey.states["missing"]][:6])


def test_nothing_is_lost_and_nothing_is_made_twice(testbed, ensemble, tmp_path):
    work = ensemble(members=64, seconds=1.5, steps=50, stale_after=4.0)
    work.submit(units_per_task=4)
    chaos = Chaos(testbed, work, seed=2026)
    troubles = [
        chaos.kill_a_task,
        chaos.requeue,
        chaos.warn,
        chaos.cancel,
        chaos.preempt,
        chaos.lose_a_node,
        chaos.restart_the_controller,
        chaos.submit_again,
        chaos.kill_a_task,
        chaos.preempt,
    ]
    chaos.random.shuffle(troubles)
    testbed.wait(lambda: work.counts().get("done", 0) >= 1)
    for trouble in troubles:
        trouble()
        time.sleep(chaos.random.uniform(0.3, 1.2))
    assert not work.done()  # it hit while there was work to do
    for _ in range(5):
        # a controller that crashed may list a job that has ended until it hears from its node
        testbed.call("scontrol", "reconfigure")
        testbed.wait(lambda: not queued_units(work.run), 300, "the end of our jobs")
        if work.done():
            break
        time.sleep(work.plan["stale_after"])  # claims of the killed
        work.submit(units_per_task=4)  # the same command again
    assert work.counts() == {"units": 64, "done": 64}

    quiet = Ensemble(tmp_path / "quiet", members=64, seconds=0.0, steps=50)
    names = [unit.name for unit in quiet.books.plan(64, 1)]
    command = f"import slurm_payload as s; s.run_units({str(quiet.config)!r}, {names!r})"
    subprocess.run([sys.executable, "-c", command], check=True, capture_output=True)
    for name in names:
        one, other = work.run.product("rollout", name), quiet.run.product("rollout", name)
        assert hdf5.sha256_datasets(one) == hdf5.sha256_datasets(other)
    written = Counter(
        record["unit"] for record in atomic.read_jsonl(work.run.root / "published.jsonl")
    )
    assert max(written.values()) == 1 and set(written) <= set(names)
    left = {path.suffix for path in work.run.root.rglob("*") if path.suffix in (".part", ".claim")}
    assert left <= {".claim"} and not ledger(work.plan).survey(64, 1).claims
