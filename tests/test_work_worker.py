"""Leases: runs of units under one claim, shared by any number of workers."""

import multiprocessing
import os
import random
import shutil
import time

import pytest
from test_work_units import ledger_of, write

from hpc_closure.bench import claims as claims_bench
from hpc_closure.experiment.folder import Run
from hpc_closure.work import atomic, claims, hdf5, header, launch, log
from hpc_closure.work import units as units_module
from hpc_closure.work.loop import work
from hpc_closure.work.stop import Stop
from hpc_closure.work.units import Cuts, Ledger, Unit, plan
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


def test_many_workers_have_short_leases():
    """With 512 workers and three units for each, one with six would keep all others waiting."""
    assert {len(lease.units) for lease in divide(plan(3 * 512, 1), 512)} == {1}
    sizes = [len(lease.units) for lease in divide(plan(100_000, 1), 512)]
    assert sizes[0] == LONGEST and sizes == sorted(sizes, reverse=True)


def test_workers_deal_half_of_what_is_left_at_a_time():
    """All leases of a deal have one size, so the first worker has no more to do than the last."""
    sizes = [len(lease.units) for lease in divide(plan(80, 1), 4)]
    assert sizes == [10] * 4 + [5] * 4 + [2] * 4 + [1] * 12


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
    own = [[unit.index for lease in worker.own for unit in lease.units] for worker in workers]
    assert sorted(sum(own, [])) == list(range(40))
    assert [worker.next(Stop()).index for worker in workers] == [0, 5, 10, 15]


def test_ranks_of_a_command_that_others_may_join_have_short_leases(run):
    """Three commands of two groups each: a quarter of all units must not be one lease."""
    workers = [worker_of(run, plan(40, 1), index, 2, wait="all") for index in range(2)]
    assert {len(lease.units) for worker in workers for lease in worker.own} == {1}


def test_whole_blocks_that_others_have_not_begun_come_before_own_short_ones(run):
    ledger = Ledger(run, "generate", "abc", cuts=Cuts(4, members=4 * 24, workers=4))
    units, stop = ledger.plan(), Stop()
    worker = Worker(ledger, units, (1, 4), False, "none")
    taken = []
    while (unit := worker.next(stop)) is not None:
        taken.append(len(unit.members))
        write(ledger, unit)
        worker.record_result(unit, None)
    assert taken[:20] == [4] * 20 and sorted(taken[20:]) == [1] * 8 + [2] * 4


def test_a_unit_that_another_claim_contains_is_left_to_its_owner(run):
    """An array task has one unit of a lease, or a lease has the unit of an array task."""
    units = plan(1000, 1)  # the first leases have three units
    lease = divide(units)[0]
    assert len(lease.units) == 3
    ledger = ledger_of(run)
    alone = worker_of(run, units[1:2])
    assert alone.next(Stop()) == units[1]
    many = worker_of(run, units, 0, 150)
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
    worker = worker_of(run, units, 0, 150)
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


def test_a_unit_that_fails_is_not_tried_by_every_other_worker(run):
    """The workers of a job retry what failed before it, and nothing that fails in it."""
    units = plan(2, 1)
    ledger_of(run).fail(units[1], RuntimeError("before"))
    first, second = (Worker(ledger_of(run), units, (index, 2), True, "none") for index in range(2))
    for unit in units:
        worker = first if unit.index == 0 else second
        assert worker.next(Stop()) == unit
        worker.record_result(unit, RuntimeError("now"))
    assert first.next(Stop()) is None and second.next(Stop()) is None
    names = [unit.name for unit in units]
    assert first.outcome.failed == names and sorted(second.outcome.failed) == names
    again = Worker(ledger_of(run), units, (0, 1), True, "none")
    assert again.next(Stop()) == units[0]


def test_a_single_unit_is_claimed_by_its_own_name(run):
    worker = worker_of(run, [Unit(0, (4, 5))])
    assert worker.next(Stop()).name == "000004-000005"
    assert run.claim("generate", "000004-000005").exists()


# what it costs


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace counts the calls")
def test_a_unit_makes_few_calls_to_the_file_system(tmp_path):
    """Per unit: create and rename; per lease four more."""
    made = claims_bench.calls(tmp_path / "run", 1, 300, 0.0)
    leases = len(divide(plan(300, 1)))
    per_lease = (made.total() - 2 * 300) / leases
    assert made["rename"] == 300 and per_lease < 4.5, made
    assert not made["link"] and made["unlink"] < leases + 10


def test_workers_with_a_core_each_spend_their_time_in_units(tmp_path):
    """On a simulated clock, so that this machine's cores do not limit it."""
    spent = claims_bench.simulated(tmp_path / "run", 16, 160, 10.0)
    assert launch.worker() == (0, 1)
    assert len(list((tmp_path / "run" / "rollout").iterdir())) == 160 + 8 + 3 * 8
    assert 0.96 < spent["busy"] / spent["took"] < 1.0  # the rest is the wait for the last
    assert spent["took"] == pytest.approx(
        spent["start"] + spent["busy"] + spent["between"] + spent["end"]
    )


def test_only_the_first_of_many_workers_looks_at_every_product(run, monkeypatch):
    """At a second start all products are in the manifest, which the others believe."""
    units = plan(3, 1)
    for unit in units:
        write(ledger_of(run), unit)
    ledger_of(run).products()  # enters them
    looked_at, header_of = [], units_module.Ledger._header
    monkeypatch.setattr(
        units_module.Ledger,
        "_header",
        lambda self, path, stat: looked_at.append(path) or header_of(self, path, stat),
    )
    worker_of(run, units, 0, 2)
    assert len(looked_at) == 3
    monkeypatch.setenv(launch.WORKER, "1/2")
    worker = worker_of(run, units, 1, 2)
    assert len(looked_at) == 3 and not worker.pending and worker.outcome.skipped == 3
    run.product("generate", units[1]).unlink()
    assert list(worker_of(run, units, 1, 2).pending) == [units[1]]


def test_a_plan_and_its_worker_list_the_products_once(run, monkeypatch):
    ledger, listed = ledger_of(run), []
    listing = units_module.listing
    monkeypatch.setattr(
        units_module, "listing", lambda folder: listed.append(folder) or listing(folder)
    )
    units = ledger.plan(3, 1)
    Worker(ledger, units, (0, 1), False, "none")
    assert listed.count(run.data) == 1
    Worker(ledger, units, (0, 1), False, "none")  # another one looks again
    assert listed.count(run.data) == 2


def test_a_torn_or_foreign_line_of_the_manifest_is_not_believed(run):
    units, ledger = plan(3, 1), ledger_of(run)
    ledger.plan(3, 1)
    for unit in units:
        write(ledger_of(run), unit)
    books = ledger_of(run)
    books.products()
    path = run.manifest("generate")
    lines = sorted(path.read_bytes().splitlines(keepends=True))
    foreign = lines[1].replace(books.recipe.encode(), b"another")
    path.write_bytes(lines[0] + foreign + lines[2][:60] + b"\n")
    ledger._read_manifest()
    names = [run.product_name(unit) for unit in units]
    assert [ledger._is_recent(run.data, name) for name in names] == [True, False, False]


def test_a_worker_does_not_open_what_others_have_entered(run, monkeypatch):
    units = plan(8, 1)
    mine, theirs = worker_of(run, units, 0, 2), ledger_of(run)
    for unit in units[1:]:
        write(theirs, unit)
    theirs.close_books()
    opened = []
    monkeypatch.setattr(header.Header, "read", lambda path, **_: opened.append(path))
    monkeypatch.setattr(units_module.Ledger, "look", lambda _, unit: opened.append(unit))
    mine.own.clear()
    assert mine.next(Stop()) == units[0]
    assert list(mine.pending) == units[:1] and opened == units[:1]


def test_a_new_product_that_is_in_no_book_is_looked_at_last(run, monkeypatch):
    units = plan(3, 1)
    worker = worker_of(run, units, wait="all")
    write(ledger_of(run), units[0])  # its writer has not closed its books
    worker.own.clear()
    assert worker.next(Stop()) == units[1] and units[0] in worker.pending
    for unit in units[1:]:
        write(worker.ledger, unit)
    worker.held.clear()
    worker.own.clear()
    assert worker.next(Stop()) is None and not worker.pending


def test_files_of_a_killed_writer_go_when_its_unit_is_done(run):
    units, ledger = plan(3, 1), ledger_of(run)
    product = run.product("generate", units[0])
    part = product.with_name(f"{product.name}.node-7-ab12.part")
    process = multiprocessing.get_context("fork").Process(
        target=claims.take, args=(run.claim("generate", units[0]),)
    )
    run.units("generate").mkdir(parents=True)
    process.start()
    process.join()
    run.data.mkdir()
    part.write_text("half")
    # who takes the claim over removes them; so does the next start for a unit that is done
    work(ledger, units, lambda unit, claim: write(ledger, unit, claim), stop=Stop())
    assert product.exists() and not part.exists()
    part.write_text("half")
    worker_of(run, units)
    assert not part.exists()


def test_restart_files_are_kept_until_the_books_are_closed(run, monkeypatch):
    """A power failure must not take both the product and what it was made from."""
    (unit,), ledger, order = plan(1, 1), ledger_of(run), []
    monkeypatch.setattr(atomic, "fsync", lambda path: order.append("flush"))
    remove = atomic.remove_folder
    monkeypatch.setattr(
        atomic, "remove_folder", lambda path: order.append("remove") or remove(path)
    )

    def run_unit(unit, claim):
        ledger.open_restart(unit)
        write(ledger, unit, claim)

    work(ledger, [unit], run_unit, stop=Stop())
    assert order == ["flush", "remove"]


# many workers, of whom some die


STEPS = 3
AT_A_NODE = 8


def value_of(member, step):
    """State of a member after some steps, by a map that forgets nothing."""
    value = 0.1 + member / 1e5
    for _ in range(step):
        value = 3.9 * value * (1 - value)
    return value


def in_steps(run, seconds, record):
    """The body of a unit that saves its state after every step and continues from it."""
    ledger = ledger_of(run)
    ledger.stale_after = 6.0

    def run_unit(unit, claim):
        ledger.open_restart(unit)
        path = run.restart("generate", unit, 1)
        saved = atomic.read_json(path) if path.exists() else {"step": 0}
        for step in range(saved["step"], STEPS):
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(min(0.2, seconds))
                claim.refresh()
            atomic.write_json(path, {"step": step + 1})
            record(f"step {unit}")
        with ledger.publish(unit, claim=claim) as part, hdf5.open_hdf5(part, "w") as file:
            file["t0_fields/w"] = [value_of(member, STEPS) for member in unit.members]
            file.attrs.update({**ledger.attributes(unit), "complete": 1})
        record(f"done {unit}")

    return ledger, run_unit


def work_on_a_node(run, index, count, num_units, seconds):
    os.environ.update({launch.WORKER: f"{index}/{count}", "SLURM_JOB_ID": "7"})
    claims._machine = (
        lambda: f"node {index // AT_A_NODE}"
    )  # its processes are seen from there only
    log.setup(verbosity=-1)

    def record(text):
        with open(run.root / f"by_{index}", "a") as file:
            print(text, file=file)

    ledger, run_unit = in_steps(run, seconds, record)
    os._exit(work(ledger, ledger.plan(num_units, 1), run_unit, stop=Stop()).exit_code)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "count, seconds", [(32, 0.3), pytest.param(512, 5.0, marks=pytest.mark.long)]
)
def test_a_tenth_of_the_workers_and_a_node_die_and_nothing_is_lost_or_done_twice(
    tmp_path, count, seconds
):
    num_units, undisturbed, run = 3 * count, Run(tmp_path / "inline"), Run(tmp_path / "run")
    log.setup(verbosity=-1)
    ledger, run_unit = in_steps(undisturbed, 0.0, lambda _: None)
    work(ledger, ledger.plan(num_units, 1), run_unit, stop=Stop())
    run.root.mkdir()
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=work_on_a_node, args=(run, index, count, num_units, seconds))
        for index in range(count)
    ]
    for worker in workers:
        worker.start()
    began, chance = time.monotonic(), random.Random(0)
    killed = chance.sample(range(AT_A_NODE, count), count // 10)  # not the first: it waits for all
    for index in killed:
        time.sleep(STEPS * seconds / len(killed))
        workers[index].kill()
    lost = range(count - AT_A_NODE, count)
    for index in lost:
        workers[index].kill()
    for worker in workers:
        worker.join()
    dead = {*killed, *lost}
    codes = [worker.exitcode for index, worker in enumerate(workers) if index not in dead]
    assert set(codes) == {0}
    assert len(list(run.data.iterdir())) == num_units  # and no file of a dead writer
    for path in undisturbed.data.iterdir():
        assert hdf5.sha256_datasets(run.data / path.name) == hdf5.sha256_datasets(path)
    lines = [
        line.split() for path in run.root.glob("by_*") for line in path.read_text().splitlines()
    ]
    done = [name for word, name in lines if word == "done"]
    steps = [name for word, name in lines if word == "step"]
    assert len(done) == len(set(done)) >= num_units - len(dead)
    # a step that was saved is not done again: the dead lose what they had not saved
    assert len(steps) <= STEPS * num_units + len(dead)
    # who was killed between publishing and booking left a claim, which the next start removes
    elapsed = time.monotonic() - began
    ledger = in_steps(run, 0.0, None)[0]
    Worker(ledger, ledger.plan(num_units, 1), (0, 1), False, "none")
    assert [path.name for path in run.units("generate").iterdir()] == ["manifest.jsonl"]
    print(f"share of the living: {STEPS * num_units * seconds / (len(codes) * elapsed):.2f}")
