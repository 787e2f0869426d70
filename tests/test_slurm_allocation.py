"""One job whose workers share the units of a run, on the one-machine Slurm."""

import os
import signal

import pytest

from hpc_closure.work import atomic

pytest_plugins = ["slurm_testbed"]
pytestmark = pytest.mark.slurm


def published(work) -> list[str]:
    return [record["unit"] for record in atomic.read_jsonl(work.run.root / "published.jsonl")]


def node_logs(found) -> str:
    return "\n".join(path.read_text() for path in sorted(found.log.parent.glob("*_log.out")))


def test_the_workers_of_one_job_share_the_units(testbed, ensemble):
    work = ensemble(members=30, seconds=0.5)
    [found] = work.submit(workers=(2, 3))
    assert len(found.tasks) == 1
    testbed.drain()
    assert work.done()
    assert sorted(published(work)) == [f"{member:06d}-{member:06d}" for member in range(30)]
    step = testbed.show(found.job)
    assert step["NumNodes"] == "2" and step["ExitCode"] == "0:0"
    logs = [path.name for path in found.log.parent.glob(f"{found.job}_node*_log.out")]
    assert len(logs) == 2  # one per node


def test_a_killed_worker_costs_its_unit_a_checkpoint_and_the_others_go_on(testbed, ensemble):
    work = ensemble(members=12, seconds=4.0, again=0.5)
    [found] = work.submit(workers=(2, 3))
    testbed.wait(lambda: work.counts().get("running", 0) >= 5, what="running workers")
    # not the first worker, which waits for the others
    owners = [claim["pid"] for claim in work.state().claims.values()]
    first = work.state().claims.get("000000-000000", {}).get("pid")
    os.kill(next(pid for pid in owners if pid != first), signal.SIGKILL)
    testbed.drain()
    assert work.done(), node_logs(found)
    assert len(published(work)) == len(set(published(work))) == 12
    assert testbed.show(found.job).get("Restarts") == "0"


def test_at_the_time_limit_all_workers_save_and_the_job_goes_back_to_the_queue(testbed, ensemble):
    work = ensemble(members=6, seconds=30.0, again=1.0)
    [found] = work.submit(workers=(2, 3))
    testbed.wait(lambda: work.counts().get("running") == 6, what="six running workers")
    testbed.call("scancel", "--signal=USR2", found.job)
    testbed.drain()
    assert work.done(), node_logs(found)
    assert testbed.show(found.job)["Restarts"] == "1"
    assert len(published(work)) == 6


def test_an_allocation_and_an_array_share_a_run(testbed, ensemble):
    work = ensemble(members=24, seconds=0.6)
    names = [unit.name for unit in work.state().states["missing"]]
    work.submit_units(names, workers=(1, 3))
    work.submit_units(names[::2], units_per_task=4, max_running_tasks=3)
    testbed.drain()
    assert work.done()
    assert sorted(published(work)) == names
