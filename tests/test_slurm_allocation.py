"""One job whose workers share the units of a run, on the one-machine Slurm."""

import os
import signal
import sys
import time

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


STEP_PER_UNIT = """#!/bin/sh
#SBATCH --nodes=2 --ntasks-per-node=4 --output=/dev/null
for unit in {units}; do
  srun --exact --nodes=1 --ntasks=1 --mpi=none {python} -c \\
    "import slurm_payload; slurm_payload.run_units('{config}', ['$unit'])" &
done
wait
"""


@pytest.mark.long
def test_one_job_of_workers_against_arrays_and_a_step_per_unit(testbed, ensemble, tmp_path):
    """The same units on the same eight CPUs, from submission to the last product.

    ``pytest -m long -s tests/test_slurm_allocation.py`` prints the seconds (docs/cluster.md).
    """
    number, each = 24, 4.0
    seconds, busy = {}, number * each / 8
    ways = ("one job", "array, 3 units a task", "array, 1 unit a task", "a step per unit")
    for way in ways:
        work = ensemble(way.replace(" ", "_").replace(",", ""), members=number, seconds=each)
        names = [unit.name for unit in work.state().states["missing"]]
        began = time.monotonic()
        if way == "one job":
            work.submit(workers=(2, 4))
        elif way.startswith("array"):
            work.submit(units_per_task=int(way.split()[1]), max_running_tasks=8)
        else:
            script = tmp_path / "steps.sh"
            script.write_text(
                STEP_PER_UNIT.format(
                    units=" ".join(names), python=sys.executable, config=work.config
                )
            )
            testbed.sbatch(str(script))
        testbed.wait(work.done, 900, f"{way}: all products")
        seconds[way] = time.monotonic() - began
        testbed.drain()
        print(
            f"{way}: {seconds[way]:.0f} s; units alone {busy:.0f} s; load {os.getloadavg()[0]:.1f}"
        )
    # an array whose tasks have equal shares is as quick: its tasks start without a step
    assert seconds["one job"] < min(seconds["array, 1 unit a task"], seconds["a step per unit"])
