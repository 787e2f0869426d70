"""Submission through submitit, on the one-machine Slurm."""

import json
import os
import signal
import sys

import pytest

from hpc_closure.rollout import submit
from hpc_closure.rollout.profile import load_profile

pytest_plugins = ["slurm_testbed"]
pytestmark = pytest.mark.slurm
SPARE = load_profile("testbed").model_copy(update={"partition": "spare"})


def test_an_array_runs_and_the_queue_says_so(testbed, ensemble):
    work = ensemble(members=6, seconds=1.5)
    request = work.request([unit.name for unit in work.state().states["missing"]], throttle=4,
                           units_per_task=2)
    [found] = submit.submit(request)
    assert [len(task) for task in found.tasks] == [2, 2, 2]
    queue = submit.queued_units(work.run)
    assert set(queue) == {f"{member:06d}-{member:06d}" for member in range(6)}
    assert work.submit() == []  # nothing is missing, it is queued
    testbed.wait(lambda: "running" in submit.queued_units(work.run).values())
    sent = testbed.call("scontrol", "write", "batch_script", found.job, "-")
    assert sent.strip() == submit.batch_text(request)[0].strip()
    testbed.drain()
    assert work.counts() == {"units": 6, "done": 6}
    assert submit.queued_units(work.run) == {}
    assert "Job completed successfully" in work.log(found, "2")


def test_a_signal_saves_and_requeues(testbed, ensemble):
    work = ensemble(members=1, seconds=4.0)
    [found] = work.submit()
    testbed.wait(lambda: found.log.exists() and "from step 0" in work.log(found))
    testbed.call("scancel", "--signal=USR2", found.job)
    testbed.wait(lambda: testbed.jobs().get(found.job) == "PENDING")
    step = json.loads((work.run.restart("rollout", "000000-000000") / "step.json").read_text())
    assert work.counts() == {"units": 1, "queued": 1}
    testbed.drain()
    assert work.done()
    # It goes on from the very step at which it was told, not from the last regular save.
    assert f"from step {step['step']}" in work.log(found)


def test_scancel_saves_and_is_obeyed(testbed, ensemble):
    work = ensemble(members=2, seconds=4.0)
    [found] = work.submit()
    testbed.wait(lambda: work.counts().get("running") == 2)
    testbed.call("scancel", found.job)
    testbed.drain()
    assert work.counts() == {"units": 2, "missing": 2}
    assert testbed.show(found.job + "_1")["Restarts"] == "0"
    step = json.loads((work.run.restart("rollout", "000001-000001") / "step.json").read_text())
    [again] = work.submit()
    testbed.drain()
    assert work.done()
    assert f"from step {step['step']}" in work.log(again, "1")


def test_preempted_and_requeued(testbed, ensemble):
    work = ensemble(members=1, seconds=4.0)
    [found] = work.submit()
    testbed.wait(lambda: work.counts().get("running") == 1)
    testbed.sbatch("-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    testbed.wait(lambda: testbed.jobs().get(found.job) == "PENDING")
    testbed.drain()
    assert work.done() and testbed.show(found.job)["Restarts"] == "1"


def test_preempted_by_cancel(testbed, ensemble):
    """The partition cancels; the tasks get themselves requeued."""
    work = ensemble(members=2, seconds=4.0)
    [found] = work.submit(SPARE)
    testbed.wait(lambda: work.counts().get("running") == 2)
    testbed.sbatch("-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    testbed.drain()
    assert work.done() and testbed.show(found.job + "_0")["Restarts"] == "1"


def test_killed_task_without_accounting(testbed, ensemble):
    testbed.up("--no-accounting")
    work = ensemble(members=2, seconds=4.0)
    [found] = work.submit()
    testbed.wait(lambda: work.counts().get("running") == 2)
    victims = testbed.processes(str(work.run))
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    testbed.drain()
    assert len(victims) == 2 and not work.done()
    testbed.wait(lambda: work.counts().get("running") is None, 10, "stale claims")
    work.submit()
    testbed.drain()
    assert work.done()


def test_preempted_by_cancel_where_nodes_have_no_scontrol(testbed, ensemble, tmp_path):
    only = tmp_path / "bin"
    only.mkdir()
    for name in ("srun", "bash"):
        (only / name).symlink_to(f"/usr/bin/{name}")
    profile = SPARE.model_copy(update={"setup": [f"export PATH={only}"]})
    work = ensemble(members=1, seconds=4.0)
    [found] = work.submit(profile)
    testbed.wait(lambda: work.counts().get("running") == 1)
    testbed.sbatch("-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    testbed.drain()
    assert "not requeued: there is no scontrol on this node" in work.log(found)
    assert work.counts() == {"units": 1, "missing": 1}  # saved, claim given back, no failure
    work.submit()
    testbed.drain()
    assert work.done()


def test_submitting_from_inside_a_job(testbed, ensemble):
    work = ensemble(members=2, seconds=0.2)
    script = work.config.with_suffix(".py")
    script.write_text(
        "import slurm_testbed, pathlib\n"
        f"folder = pathlib.Path({str(work.config.parent)!r})\n"
        "work = slurm_testbed.Ensemble(folder, members=2, seconds=0.2)\n"
        "print(work.submit()[0].job)\n")
    testbed.sbatch("-n3", "--mem=100", "-o", f"{work.config.parent}/outer.log",
                   "--wrap", f"{sys.executable} {script}")
    testbed.drain()
    assert work.done(), (work.config.parent / "outer.log").read_text()


def test_requeues_are_capped(testbed, ensemble):
    work = ensemble(members=1, seconds=4.0)
    [found] = work.submit(max_requeues=0)
    testbed.wait(lambda: work.counts().get("running") == 1)
    testbed.call("scancel", "--signal=USR2", found.job)
    testbed.drain()
    assert "not requeued: started 1 times already" in work.log(found)
