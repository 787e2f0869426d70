import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from hpc_closure.experiment.folder import Run
from hpc_closure.work import atomic, claims, hdf5, header, log, units
from hpc_closure.work.loop import work
from hpc_closure.work.stop import Stop, Stopped
from hpc_closure.work.units import Cuts, Ledger, Unit, plan
from hpc_closure.work.worker import Hopeless


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


def ledger_of(run, recipe="abc", **holds):
    return Ledger(run, "generate", recipe, holds or {"t_end": 4.0})


def write(ledger, unit, claim=None, **changes):
    with ledger.publish(unit, claim=claim) as part, hdf5.open_hdf5(part, "w") as file:
        file["t0_fields/w"] = np.asarray(unit.members, dtype=float)
        file.attrs.update({**ledger.attributes(unit), "complete": 1, **changes})


def run_all(ledger, members, per_block, run_unit=None, **options):
    done = []

    def default(unit, claim):
        done.append(unit.name)
        write(ledger, unit, claim)

    ledger.give_up = options.pop("give_up", 0)
    outcome = work(
        ledger,
        ledger.plan(members, per_block),
        run_unit or default,
        stop=options.pop("stop", Stop()),
        **options,
    )
    return outcome, done


def names(found):
    return [unit.name for unit in found]


# plan


def test_plan_is_aligned():
    assert names(plan(10, 4)) == ["000000-000003", "000004-000007", "000008-000009"]
    assert names(plan(range(3, 9), 4)) == ["000003-000003", "000004-000007", "000008-000008"]
    assert names(plan([0, 1, 5, 6, 2], 20)) == ["000000-000002", "000005-000006"]


def test_the_last_block_of_every_worker_is_cut_again():
    cuts = Cuts(20, members=20 * 100, workers=10)
    sizes = [len(unit.members) for unit in plan(20 * 100, cuts)]
    assert sizes == [20] * 90 + [10] * 10 + [5] * 20
    last = plan(range(20 * 99 + 7, 20 * 100), cuts)
    assert names(last) == ["001987-001989", "001990-001994", "001995-001999"]
    odd = plan(50, Cuts(7, members=50, workers=2))
    assert [len(unit.members) for unit in odd] == [7] * 6 + [4, 3] + [1]
    assert [member for unit in odd for member in unit.members] == list(range(50))
    few = plan(20 * 19, Cuts(20, members=20 * 19, workers=10))
    assert {len(unit.members) for unit in few} == {20}


@pytest.mark.parametrize("members, per_block", [(0, 4), ([], 4), ([-1], 4), (4, 0)])
def test_plan_refuses_nonsense(members, per_block):
    with pytest.raises(ValueError, match="expected at least"):
        plan(members, per_block)


# growing


def test_same_command_again_does_nothing(run):
    ledger = ledger_of(run)
    assert len(run_all(ledger, 10, 4)[1]) == 3
    outcome, done = run_all(ledger, 10, 4)
    assert not done and outcome.skipped == 3 and outcome.exit_code == 0


@pytest.mark.parametrize(
    "members, per_block, expected",
    [
        (12, 4, ["000010-000011"]),
        (16, 4, ["000010-000011", "000012-000015"]),
        (16, 8, ["000010-000015"]),
        (10, 3, []),
        (12, 1, ["000010-000010", "000011-000011"]),
    ],
)
def test_more_members_or_other_blocks_compute_only_what_is_missing(
    run, members, per_block, expected
):
    ledger = ledger_of(run)
    run_all(ledger, 10, 4)
    assert run_all(ledger, members, per_block)[1] == expected
    assert ledger.survey(members, per_block).counts()["missing"] == 0


def test_a_lost_block_is_filled_with_the_new_size(run):
    ledger = ledger_of(run)
    run_all(ledger, 12, 4)
    run.product("generate", "000004-000007").unlink()
    assert run_all(ledger, 12, 3)[1] == ["000004-000005", "000006-000007"]


def test_longer_horizon_extends_the_products(run):
    run_all(ledger_of(run), 10, 4)
    longer = ledger_of(run, t_end=8.0)
    found = longer.plan(10, 4)
    assert all(unit.extends for unit in found) and len(found) == 3
    assert longer.survey(10, 4).counts()["missing"] == 3
    assert len(run_all(longer, 10, 4)[1]) == 3
    assert longer.survey(10, 4).counts()["done"] == 3
    assert ledger_of(run).survey(10, 4).counts()["done"] == 3  # and the shorter one still is


def test_a_shorter_horizon_is_done(run):
    run_all(ledger_of(run), 4, 4)
    assert not run_all(ledger_of(run, t_end=2.0), 4, 4)[1]


@pytest.mark.parametrize("holds", [{}, {"fields": ["a"]}, {"fields": ["a", "b", "c"]}])
def test_other_outputs_are_refused(run, holds):
    run_all(ledger_of(run, t_end=4.0, fields=["a", "b"]), 4, 4)
    with pytest.raises(ValueError, match="holds other outputs.*change `name`"):
        ledger_of(run, t_end=4.0, **holds).plan(4, 4)


def test_another_experiment_is_refused(run):
    run_all(ledger_of(run), 4, 4)
    with pytest.raises(ValueError, match="made by another experiment.*change `name`"):
        ledger_of(run, recipe="xyz").plan(4, 4)


# states


def test_states_in_their_order(run):
    ledger = ledger_of(run)
    found = {unit.name: unit for unit in plan(10, 2)}
    done, running, queued, failed, missing = found.values()
    write(ledger, done)
    for unit in (done, running, queued, failed):
        ledger.fail(unit, ValueError("NaN at step 7"))
    for unit in (done, running):
        claims.take(run.claim("generate", unit))
    survey = ledger.survey(10, 2, queued={0, 2, 4, 5})
    assert {state: names(survey.states[state]) for state in units.STATES} == {
        "done": [done.name],
        "running": [running.name],
        "queued": [queued.name],
        "failed": [failed.name],
        "missing": [missing.name],
    }
    assert survey.counts() == {
        "units": 5,
        "done": 1,
        "running": 1,
        "queued": 1,
        "failed": 1,
        "missing": 1,
    }
    assert survey.errors[failed.name]["message"] == "ValueError: NaN at step 7"
    assert survey.claims[running.name]["pid"] == os.getpid()


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty", "unfinished", "renamed"])
def test_damaged_products_are_missing_named_and_kept(run, damage):
    ledger = ledger_of(run)
    run_all(ledger, 8, 4)
    path = run.product("generate", "000004-000007")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "foreign":
        path.write_text("not hdf5")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "unfinished":
        with hdf5.open_hdf5(path, "r+") as file:
            file.attrs["complete"] = 0
    else:
        path.write_bytes(run.product("generate", "000000-000003").read_bytes())
    survey = ledger.survey(8, 4)
    assert survey.counts()["missing"] == 1 and list(survey.damaged) == [path]
    assert path.name in survey.damaged[path] and "\n" not in survey.damaged[path]
    outcome, done = run_all(ledger, 8, 4)
    assert done == ["000004-000007"] and outcome.exit_code == 0
    assert path.with_name(path.name + ".damaged").exists()
    assert ledger.survey(8, 4).counts()["done"] == 2


def test_the_manifest_is_only_a_cache(run):
    ledger = ledger_of(run)
    run_all(ledger, 8, 4)
    for text in (b"", b"junk\n{}\n[1]\n", b'{"name": "block_000000-000003.h5", "size": 1}\n'):
        run.manifest("generate").write_bytes(text)
        assert ledger.survey(8, 4).counts()["done"] == 2
    run.manifest("generate").unlink()
    assert ledger.survey(8, 4).counts()["done"] == 2


def test_survey_of_nothing_creates_nothing(run):
    assert ledger_of(run).survey(8, 4).counts()["missing"] == 2
    assert not run.root.exists()


# work


def test_a_failed_unit_is_recorded_and_the_rest_goes_on(run):
    ledger = ledger_of(run)

    def run_unit(unit, claim):
        if 5 in unit.members:
            raise FloatingPointError("member 5: NaN at step 7, CFL 3.1")
        write(ledger, unit, claim)

    outcome, _ = run_all(ledger, 12, 4, run_unit)
    assert outcome.failed == ["000004-000007"] and len(outcome.done) == 2
    assert outcome.exit_code == 3
    record = atomic.read_json(run.error("generate", "000004-000007"))
    assert record["attempt"] == 1 and "CFL 3.1" in record["message"]
    assert "log" in record and any("run_unit" in line for line in record["trace"])
    assert not list(run.units("generate").glob("*.claim"))
    # again: not without being asked
    outcome, done = run_all(ledger, 12, 4)
    assert not done and outcome.exit_code == 3
    outcome, _ = run_all(ledger, 12, 4, run_unit, retry_failed=True)
    assert atomic.read_json(run.error("generate", "000004-000007"))["attempt"] == 2
    outcome, done = run_all(ledger, 12, 4, retry_failed=True)
    assert done == ["000004-000007"] and outcome.exit_code == 0
    assert not run.error("generate", "000004-000007").exists()


@pytest.mark.parametrize("bad, tried", [({0, 1, 2}, 2), ({0, 2}, 6), ({1, 2, 3}, 6)])
def test_the_rest_is_not_tried_when_the_first_units_fail_for_one_cause(run, bad, tried):
    """Not where one of the first came out, nor when the causes differ."""
    ledger, seen = ledger_of(run), []

    def run_unit(unit, claim):
        seen.append(unit.index)
        if unit.index in bad:
            raise RuntimeError(f"member {unit.members[0]} is lost at t = {0.5 * unit.index:g}")
        write(ledger, unit, claim)

    outcome, _ = run_all(ledger, 12, 2, run_unit, give_up=2)
    assert len(seen) == tried and outcome.exit_code == 3
    assert bool(outcome.gave_up) == (tried == 2)
    if outcome.gave_up:
        assert outcome.gave_up.endswith("member 2 is lost at t = 0.5") and not outcome.elsewhere


def test_different_causes_do_not_end_the_verb(run):
    ledger = ledger_of(run)

    def run_unit(unit, claim):
        raise RuntimeError(["no memory", "lost at t = 3"][unit.index % 2])

    outcome, _ = run_all(ledger, 12, 2, run_unit, give_up=2)
    assert len(outcome.failed) == 6 and not outcome.gave_up


def test_a_unit_of_no_use_is_done_and_counts_as_one_that_fails(run):
    ledger = ledger_of(run)

    def run_unit(unit, claim):
        write(ledger, unit, claim)
        raise Hopeless("all 2 trajectories of the model diverged")

    outcome, _ = run_all(ledger, 12, 2, run_unit, give_up=3)
    assert len(outcome.done) == 3 and not outcome.failed and outcome.exit_code == 3
    assert ledger.survey(12, 2).counts() == {
        "units": 6, "done": 3, "running": 0, "queued": 0, "failed": 0, "missing": 3
    }  # fmt: skip


def test_failures_of_another_recipe_do_not_count(run):
    ledger_of(run, recipe="old").fail(plan(4, 4)[0], ValueError("x"))
    assert ledger_of(run).survey(4, 4).counts()["missing"] == 1
    assert run_all(ledger_of(run), 4, 4)[1]


def test_a_full_disk_ends_the_verb(run):
    ledger = ledger_of(run)

    def run_unit(unit, claim):
        raise atomic.DiskError("cannot write x: no space left on the device")

    with pytest.raises(atomic.DiskError):
        run_all(ledger, 12, 4, run_unit)
    assert not list(run.units("generate").glob("*"))
    assert ledger.survey(12, 4).counts()["missing"] == 3


def test_stop_between_and_inside_units(run):
    ledger, stop, seen = ledger_of(run), Stop(), []

    def run_unit(unit, claim):
        seen.append(unit.name)
        if len(seen) == 2:
            stop.request("SIGTERM")
            raise Stopped(stop.reason)
        write(ledger, unit, claim)

    outcome, _ = run_all(ledger, 12, 4, run_unit, stop=stop)
    assert outcome.stopped == "SIGTERM" and outcome.exit_code == 75 and len(seen) == 2
    assert not list(run.units("generate").glob("*.claim"))
    assert len(run_all(ledger, 12, 4)[1]) == 2


def test_stop_after_the_last_unit_is_done(run):
    ledger, stop = ledger_of(run), Stop()

    def run_unit(unit, claim):
        write(ledger, unit, claim)
        stop.request("SIGTERM")

    outcome, _ = run_all(ledger, 4, 4, run_unit, stop=stop)
    assert outcome.exit_code == 0


def test_a_unit_without_product_is_a_failure(run):
    outcome, _ = run_all(ledger_of(run), 4, 4, lambda unit, claim: None)
    assert outcome.exit_code == 3


def test_a_product_of_other_members_is_not_published(run):
    ledger = ledger_of(run)

    def run_unit(unit, claim):
        write(ledger, unit, claim, members=[7, 8, 9, 10])

    assert run_all(ledger, 4, 4, run_unit)[0].exit_code == 3
    assert not list(run.data.glob("*"))


def test_a_lost_claim_publishes_nothing_and_is_no_failure(run):
    ledger = ledger_of(run)

    def run_unit(unit, claim):
        record = {**claims.owner(), "host": "other", "machine": "other", "mark": "theirs"}
        claim.path.write_text(json.dumps(record))
        claim._touched -= ledger.stale_after  # this process was suspended for so long
        write(ledger, unit, claim)

    outcome, _ = run_all(ledger, 4, 4, run_unit, wait="none")
    assert outcome.elsewhere == ["000000-000003"] and outcome.exit_code == 75
    assert not list(run.data.glob("*")) and not list(run.units("generate").glob("*.error"))


def test_an_error_of_a_unit_that_another_process_has_now_is_no_failure(run):
    """The new owner moves files of the unit, so that the old one cannot find them."""
    ledger = ledger_of(run)

    def run_unit(unit, claim):
        record = {**claims.owner(), "host": "other", "machine": "other", "mark": "theirs"}
        claim.path.write_text(json.dumps(record))
        raise FileNotFoundError("working.h5")

    outcome, _ = run_all(ledger, 4, 4, run_unit, wait="none")
    assert outcome.elsewhere == ["000000-000003"] and not outcome.failed
    assert not list(run.units("generate").glob("*.error"))


def test_restart_files_go_with_the_finished_unit(run):
    ledger = ledger_of(run)

    def run_unit(unit, claim):
        assert ledger.open_restart(unit) == (run.restart("generate", unit), True)
        assert ledger.open_restart(unit) == (run.restart("generate", unit), False)
        atomic.write_text(run.restart("generate", unit, 7), "state")
        write(ledger, unit, claim)

    run_all(ledger, 4, 4, run_unit)
    assert not run.restart("generate", "000000-000003").exists()


def test_what_a_killed_publisher_left_is_swept(run):
    ledger = ledger_of(run)
    run_all(ledger, 12, 4)
    for name in ("000000-000003", "000004-000007", "000008-000011"):
        atomic.write_text(run.restart("generate", name, 7), "state")
    dead = {**claims.owner(), "born": "0", "mark": "x"}  # not when this process was
    atomic.write_json(run.claim("generate", "000000-000003"), dead)
    alive = {**dead, "machine": "other"}
    atomic.write_json(run.claim("generate", "000004-000007"), alive)
    working = run.restart("generate", "000008-000011") / "working.h5"
    working.write_text("a longer product, interrupted")
    assert not run_all(ledger, 12, 4)[1]
    left = sorted(path.name for path in run.units("generate").iterdir())
    assert (
        left
        == [
            "000004-000007.claim",
            "000004-000007.restart",
            "000008-000011.restart",
            "manifest.jsonl",
        ]
        and working.exists()
    )


PROGRAM = """
import sys, time
import numpy as np
from hpc_closure.work import hdf5, log, loop, mpi, units
from hpc_closure.experiment.folder import Run
from hpc_closure.work.stop import Stop, Stopped

log.setup()
folder, pause, domain_ranks = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
run = Run(folder)
world = mpi.world()
with world.guard(), Stop() as stop:
    groups = world.groups(domain_ranks)
    ledger = units.Ledger(run, "generate", "abc", {"t_end": 4.0})

    def run_unit(unit, claim):
        for _ in range(10):
            time.sleep(pause / 10)
            claim.refresh()
            if stop.agree(groups.domain):
                raise Stopped(stop.reason)
        if groups.domain.root:
            with ledger.publish(unit, claim=claim) as part, hdf5.open_hdf5(part, "w") as file:
                file["t0_fields/w"] = np.asarray(unit.members, dtype=float)
                file.attrs.update({**ledger.attributes(unit), "complete": 1})

    outcome = loop.work(ledger, ledger.plan(12, 2), run_unit, stop=stop, groups=groups)
if world.root:
    print(len(outcome.done), outcome.exit_code)
sys.exit(outcome.exit_code)
"""


def start(folder, pause=0.2, **options):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(pause), "1"],
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def test_two_people_at_once_share_the_work(run):
    both = [start(run.root, pause=0.4) for _ in range(2)]
    shares = [int(process.communicate(timeout=60)[0].split()[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(shares) == 6 and min(shares) > 0
    assert ledger_of(run).survey(12, 2).counts()["done"] == 6


def test_kill_nine_then_the_same_command_does_not_wait(run):
    process = start(run.root, pause=1.0)
    while not list(run.data.glob("*.h5")):
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(run.units("generate").glob("*.claim"))
    began = time.monotonic()
    again = start(run.root, pause=0.05)
    assert again.communicate(timeout=60)[0].split() == ["5", "0"]
    assert time.monotonic() - began < 15
    assert not list(run.units("generate").glob("*.claim"))


def test_sigterm_is_exit_75(run):
    process = start(run.root, pause=1.0)
    while not list(run.units("generate").glob("*.claim")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0].split() == ["0", "75"]
    assert process.returncode == 75


@pytest.mark.mpi
@pytest.mark.parametrize("ranks, domain_ranks", [(2, 1), (2, 2), (4, 2)])
def test_ranks_share_the_units(run, mpirun, ranks, domain_ranks):
    done = mpirun(ranks, [sys.executable, "-c", PROGRAM, run.root, 0.1, domain_ranks])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["6", "0"]
    assert ledger_of(run).survey(12, 2).counts()["done"] == 6


# scale


def books_of(run, num_units, per_block):
    """A stage with ``num_units`` products that one process has surveyed before."""
    ledger = ledger_of(run)
    write(ledger, Unit(0, tuple(range(per_block))))
    first = run.product("generate", f"{0:06d}-{per_block - 1:06d}")
    lines = []
    for index in range(num_units):
        low = index * per_block
        path = run.product("generate", f"{low:06d}-{low + per_block - 1:06d}")
        if index:
            os.link(first, path)
        stat = path.stat()
        lines.append(
            json.dumps(
                {
                    "name": path.name,
                    "size": stat.st_size,
                    "mtime": stat.st_mtime_ns,
                    "first": low,
                    "last": low + per_block - 1,
                    "recipe": "abc",
                    "holds": {"t_end": 4.0},
                    "lost": {},
                }
            )
        )
    run.units("generate").mkdir(parents=True)
    run.manifest("generate").write_text("\n".join(lines) + "\n")
    return ledger


@pytest.mark.parametrize("members, per_block, limit", [(20_000, 20, 0.5), (100_000, 20, 2.0)])
def test_survey_is_quick(run, members, per_block, limit):
    """Processor seconds, as below: other processes may share the machine."""
    ledger = books_of(run, members // per_block, per_block)
    times = []
    for _ in range(3):
        began = time.process_time()
        counts = ledger.survey(members, per_block).counts()
        times.append(time.process_time() - began)
    assert counts["done"] == counts["units"] == members // per_block
    assert min(times) < limit, times


@pytest.mark.parametrize("members, per_block", [(10_000, 20)])
def test_bookkeeping_of_many_members_with_empty_physics(run, members, per_block):
    log.setup(verbosity=-1)
    ledger = ledger_of(run)
    began = time.process_time()
    outcome, done = run_all(ledger, members, per_block)
    per_unit = (time.process_time() - began) / len(done)
    assert len(done) == members // per_block and outcome.exit_code == 0
    assert per_unit < 0.1
    # few files beside the products, whatever their number
    assert [path.name for path in run.units("generate").iterdir()] == ["manifest.jsonl"]
    began = time.process_time()
    assert ledger.survey(members, per_block).counts()["done"] == members // per_block
    assert time.process_time() - began < 2.0
    log.setup()


def test_work_looks_only_at_what_is_missing(run, monkeypatch):
    ledger = books_of(run, 500, 20)
    run.product("generate", "000020-000039").unlink()
    opened = []
    original = header.open_hdf5
    monkeypatch.setattr(
        header, "open_hdf5", lambda path, **words: opened.append(path) or original(path, **words)
    )
    log.setup(verbosity=-1)
    outcome, done = run_all(ledger, 10_000, 20)
    log.setup()
    assert done == ["000020-000039"] and outcome.skipped == 499 and len(opened) < 10
