"""Submission through submitit, on the one-machine Slurm."""

import contextlib
import json
import os
import signal
import sys

import pytest
from slurm_payload import Ensemble, with_tests
from test_faults import mounted

from hpc_closure.batch import submit
from hpc_closure.batch.site import load_profile
from hpc_closure.batch.squeue import queued_units

pytest_plugins = ["slurm_testbed"]
pytestmark = pytest.mark.slurm
SPARE = load_profile("testbed").model_copy(update={"partition": "spare"})


def test_an_array_runs_and_the_queue_says_so(testbed, ensemble):
    work = ensemble(members=6, seconds=1.5)
    request = work.request(
        [unit.name for unit in work.state().states["missing"]],
        max_running_tasks=4,
        units_per_task=2,
    )
    [found] = submit.submit(request)
    assert [len(task) for task in found.tasks] == [2, 2, 2]
    queue = queued_units(work.run)
    assert set(queue) == {f"{member:06d}-{member:06d}" for member in range(6)}
    assert work.submit() == []  # nothing is missing, it is queued
    testbed.wait(lambda: "running" in queued_units(work.run).values())
    sent = testbed.call("scontrol", "write", "batch_script", found.job, "-")
    assert sent.strip() == submit.batch_text(request)[0].strip()
    testbed.drain()
    assert work.counts() == {"units": 6, "done": 6}
    assert queued_units(work.run) == {}
    assert "Job completed successfully" in work.log(found, "2")


def saved_step(work, unit):
    return json.loads((work.run.restart("rollout", unit) / "step.json").read_text())["step"]


def test_how_tasks_end(testbed, ensemble):
    """Three arrays at once: one is warned, one cancelled, one warned that may not be requeued."""
    kinds = ("warned", "cancelled", "capped")
    works = {kind: ensemble(kind, members=2, seconds=30.0, again=1.0) for kind in kinds}
    sent = {
        kind: work.submit(max_requeues=0 if kind == "capped" else 20)[0]
        for kind, work in works.items()
    }
    for kind, work in works.items():
        testbed.wait(lambda: work.counts().get("running") == 2, what=kind)  # noqa: B023
        testbed.call(
            "scancel", *([] if kind == "cancelled" else ["--signal=USR2"]), sent[kind].job
        )
    testbed.wait(lambda: testbed.jobs().get(sent["warned"].job + "_1") == "PENDING")
    step = saved_step(works["warned"], "000001-000001")
    testbed.drain()
    assert works["warned"].done()
    # It goes on from the very step at which it was warned, not from the last regular save.
    assert f"from step {step}" in works["warned"].log(sent["warned"], "1")
    assert "not requeued: started 1 times already" in works["capped"].log(sent["capped"])
    steps = {}
    for kind in ("cancelled", "capped"):
        # Saved, claims given back, no failure booked; and the cancelled one stays cancelled.
        assert works[kind].counts() == {"units": 2, "missing": 2}
        assert testbed.show(sent[kind].job + "_1")["Restarts"] == "0"
        steps[kind] = saved_step(works[kind], "000001-000001")
        sent[kind] = works[kind].submit()[0]  # the same command again
    testbed.drain()
    for kind, step in steps.items():
        assert works[kind].done() and f"from step {step}" in works[kind].log(sent[kind], "1")


def test_preemption(testbed, ensemble, tmp_path):
    """By a partition that requeues, by one that cancels, by one where nodes have no scontrol."""
    only = tmp_path / "bin"
    only.mkdir()
    for name in ("srun", "bash"):
        (only / name).symlink_to(f"/usr/bin/{name}")
    profiles = {
        "main": load_profile("testbed"),
        "spare": SPARE,
        "bare": SPARE.model_copy(update={"setup": [f"export PATH={only}"]}),
    }
    works = {kind: ensemble(kind, members=1, seconds=30.0, again=1.0) for kind in profiles}
    sent = {kind: work.submit(profiles[kind])[0] for kind, work in works.items()}
    for work in works.values():
        testbed.wait(lambda: work.counts().get("running") == 1)  # noqa: B023
    testbed.sbatch("-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    testbed.drain()
    for kind in ("main", "spare"):  # started twice, and not once more after the end
        assert works[kind].done() and testbed.show(sent[kind].job)["Restarts"] == "1"
    assert "Slurm does it itself" in works["main"].log(sent["main"])
    assert "there is no scontrol on this node" in works["bare"].log(sent["bare"])
    assert works["bare"].counts() == {"units": 1, "missing": 1}
    works["bare"].submit()
    testbed.drain()
    assert works["bare"].done()


def test_a_held_job_does_not_block(testbed, ensemble):
    """Nobody but an administrator moves such a job; the same command submits its units again."""
    work = ensemble(members=2, seconds=0.2)
    later = load_profile("testbed").model_copy(update={"extra": {"begin": "now+3600"}})
    [held] = work.submit(later)
    assert work.submit() == []  # it is queued
    testbed.call("scontrol", "hold", held.job)
    assert testbed.call("squeue", "-h", "-o", "%r") == "JobHeldAdmin"
    [again] = work.submit()
    testbed.wait(work.done, what=f"the units of job {again.job}")
    testbed.wait(lambda: set(testbed.jobs()) == {held.job + "_0", held.job + "_1"})


def test_killed_task_without_accounting(testbed, ensemble):
    testbed.up("--no-accounting")
    work = ensemble(members=2, seconds=15.0, again=1.0)
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


def test_full_disk(testbed, tmp_path, monkeypatch):
    """The file system of the run fills up under four tasks; freed, the same command goes on."""
    monkeypatch.setenv("PYTHONPATH", with_tests())
    shared = tmp_path / "shared"
    with mounted(shared, "8m"):
        for node in ("node1", "node2"):  # they see what was mounted before they started
            testbed.kill_daemon(f"slurmd.{node}")
        testbed.up()
        work = Ensemble(shared / "study", members=4, seconds=15.0, again=1.0)
        [first] = work.submit()
        testbed.wait(lambda: work.counts().get("running") == 4)
        with contextlib.suppress(OSError), open(shared / "ballast", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        testbed.drain()
        assert work.counts() == {"units": 4, "missing": 4}  # claims given back, none a failure
        assert not list(work.run.root.rglob("*.h5"))
        (shared / "ballast").unlink()
        [again] = work.submit()
        testbed.drain()
        assert work.done(), work.log(again)
        assert testbed.show(first.job + "_0")["JobState"] == "FAILED"


def test_submitting_from_inside_a_job(testbed, ensemble):
    work = ensemble(members=2, seconds=0.2)
    script = work.folder / "inside.py"
    script.write_text(
        "import slurm_payload, pathlib\n"
        f"folder = pathlib.Path({str(work.folder)!r})\n"
        "work = slurm_payload.Ensemble(folder, members=2, seconds=0.2)\n"
        "print(work.submit()[0].job)\n"
    )
    testbed.sbatch(
        "-n3",
        "--mem=100",
        "-o",
        f"{work.folder}/outer.log",
        "--wrap",
        f"{sys.executable} {script}",
    )
    testbed.drain()
    assert work.done(), (work.folder / "outer.log").read_text()
