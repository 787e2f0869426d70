"""Leases: runs of units under one claim, shared by any number of workers."""

import multiprocessing
import os
import time

import pytest
from test_work_units import ledger_of, write

from hpc_closure.experiment.folder import Run
from hpc_closure.work import claims, launch
from hpc_closure.work.loop import work
from hpc_closure.work.stop import Stop
from hpc_closure.work.units import Unit, plan
from hpc_closure.work.worker import LONGEST, Worker, divide


def test_leases_shrink_towards_the_end_and_contain_every_unit_once():
    units = plan(100_000, 20)
    leases = divide(units)
    sizes = [len(lease.units) for lease in leases]
    assert [unit for lease in leases for unit in lease.units] == units
    assert sizes[0] == LONGEST and sizes == sorted(sizes, reverse=True)
    assert sizes[-511:] == [1] * 511  # the last units are claimed one by one
    assert leases[0].name == "000000-000319"
    assert {len(lease.units) for lease in divide(plan(200, 1))} == {1}


def test_a_lease_has_no_gap():
    units = plan([member for member in range(10_000) if member % 100 != 7], 1)
    for lease in divide(units):
        members = [member for unit in lease.units for member in unit.members]
        assert members == list(range(members[0], members[-1] + 1))


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


def worker_of(run, units, index=0, count=1, wait="none"):
    return Worker(ledger_of(run), units, (index, count), False, wait)


def test_workers_begin_with_leases_of_their_own(run):
    units = plan(40, 1)
    workers = [worker_of(run, units, index, 4) for index in range(4)]
    own = [[lease.units[0].index for lease in worker.own] for worker in workers]
    assert own == [list(range(index, 40, 4)) for index in range(4)]
    assert [worker.next(Stop()).index for worker in workers] == [0, 1, 2, 3]


def test_a_unit_that_another_claim_contains_is_left_to_its_owner(run):
    """An array task has one unit of a lease, or a lease has the unit of an array task."""
    units = plan(1000, 1)  # the first leases have three units
    lease = divide(units)[0]
    assert len(lease.units) == 3
    ledger = ledger_of(run)
    alone = worker_of(run, units[1:2])
    assert alone.next(Stop()) == units[1]
    many = worker_of(run, units, 0, 500)
    taken = [many.next(Stop())]
    while many.held:
        taken.append(many.held.popleft())
    assert [unit.index for unit in taken] == [0, 2]
    other = worker_of(run, units[2:3])
    assert other.next(Stop()) is None
    assert not ledger.run.claim("generate", units[2]).exists()  # it gave its claim back


def test_a_dead_owner_of_an_overlapping_claim_does_not_block(run):
    units = plan(1000, 1)
    path = run.claim("generate", units[1])
    path.parent.mkdir(parents=True)
    process = multiprocessing.get_context("fork").Process(target=claims.take, args=(path,))
    process.start()
    process.join()
    assert path.exists()
    worker = worker_of(run, units, 0, 500)
    assert worker.next(Stop()).index == 0
    assert [unit.index for unit in worker.held] == [1, 2]
    assert not path.exists()


def test_a_worker_that_stops_gives_its_whole_lease_back(run):
    units, stop = plan(1000, 1), Stop()
    ledger = ledger_of(run)

    def run_unit(unit, claim):
        write(ledger, unit, claim)
        stop.request("asked")

    outcome = work(ledger, units, run_unit, stop=stop)
    assert outcome.done == ["000000-000000"] and outcome.exit_code == 75
    assert not list(run.units("generate").glob("*.claim"))


def share(run, index, count, seconds):
    os.environ[launch.WORKER] = f"{index}/{count}"
    ledger = ledger_of(run)

    def run_unit(unit, claim):
        time.sleep(seconds)
        with open(run.root / f"by_{index}", "a") as file:
            print(unit.name, file=file)
        write(ledger, unit, claim)

    os._exit(work(ledger, ledger.plan(600, 1), run_unit, stop=Stop()).exit_code)


@pytest.mark.timeout(120)
def test_many_workers_compute_every_unit_once(run):
    run.root.mkdir()
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=share, args=(run, index, 6, 0.001)) for index in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 6
    lists = [(run.root / f"by_{index}").read_text().split() for index in range(6)]
    names = [name for one in lists for name in one]
    assert sorted(names) == [f"{member:06d}-{member:06d}" for member in range(600)]
    assert min(len(one) for one in lists) > 20
    assert not list(run.units("generate").glob("*.claim"))


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({}, (0, 1)),
        ({"HPC_CLOSURE_WORKER": "3/512"}, (3, 512)),
        (
            {"HPC_CLOSURE_WORKER": "auto", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8"},
            (5, 8),
        ),
        ({"HPC_CLOSURE_WORKER": "auto", "FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "2"}, (1, 2)),
    ],
)
def test_a_worker_knows_its_place(environ, expected):
    assert launch.worker(environ) == expected
    started = launch.launch(environ)
    assert (started.rank, started.size, started.mpi) == (0, 1, False)


@pytest.mark.parametrize("text", ["auto", "8/8", "3", "a/b"])
def test_a_wrong_place_is_refused(text):
    with pytest.raises(ValueError, match="HPC_CLOSURE_WORKER='.*expected auto in a step"):
        launch.worker({"HPC_CLOSURE_WORKER": text})


def test_a_single_unit_is_claimed_by_its_own_name(run):
    worker = worker_of(run, [Unit(0, (4, 5))])
    assert worker.next(Stop()).name == "000004-000005"
    assert run.claim("generate", "000004-000005").exists()
