"""Work through units: claim, run, publish, book; several programs may do so at once.

    outcome = work(ledger, ledger.plan(), run_unit, stop=stop)
    sys.exit(outcome.exit_code)

A stage without members is a single unit, held by :func:`single`.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from hpc_closure.experiment.folder import Run
from hpc_closure.work import atomic, claims, launch, log
from hpc_closure.work.mpi import Groups, World
from hpc_closure.work.stop import Stop, Stopped
from hpc_closure.work.units import Ledger, Unit
from hpc_closure.work.worker import Outcome, Wait, Worker

SINGLE = Unit(0, (0,))  # the only unit of train and of evaluate


def work(
    ledger: Ledger,
    units: Sequence[Unit],
    run_unit: Callable,
    *,
    stop: Stop,
    groups: Groups | None = None,
    retry_failed: bool = False,
    wait: Wait = "all",
) -> Outcome:
    """Claim and run the units that are not done, until none is left.

    Of workers that were started together (HPC_CLOSURE_WORKER), the first waits for units of the
    others, so that it ends last and takes over what a killed worker leaves. The others end when no
    unit is free; what is computed elsewhere is not their concern.

    A failed unit does not end the loop. The loop ends if the first ``ledger.give_up`` units all
    fail for one cause (or raise :class:`~hpc_closure.work.worker.Hopeless`), or if the disk is
    full or unwritable.

    Args:
        ledger: books of the stage.
        units: units to run, from ``ledger.plan``.
        run_unit: ``run_unit(unit, claim)`` computes and publishes the unit through
            ``ledger.publish`` and calls ``claim.refresh()`` between steps. If
            ``stop.agree(domain)`` is true it saves a restart file and raises ``Stopped``. It is
            called on all ranks of a domain.
        stop: the stop flag.
        groups: groups of MPI ranks; the groups work on different units.
        retry_failed: run units again whose last attempt failed.
        wait: whose units to wait for, see :class:`~hpc_closure.work.worker.Worker`.

    Returns:
        The outcome, equal on all ranks.

    Raises:
        DiskError: the disk is full or unwritable.
    """
    groups = groups or World().groups()
    domain = groups.domain.prepare()
    index, count = launch.worker()
    if count > 1:
        wait = "none" if index else "job"
    place = index * groups.count + groups.index, count * groups.count
    worker = Worker(ledger, units, place, retry_failed, wait) if domain.root else None
    while True:
        unit = domain.bcast(worker.next(stop) if worker else None)
        if unit is None:
            break
        claim = worker.claim if worker else claims.NO_CLAIM
        error = domain.agree_on_error(_attempt(ledger, unit, run_unit, claim))
        if worker:
            worker.record_result(unit, error)
        if isinstance(error, atomic.DiskError):
            raise error
        if isinstance(error, Stopped):
            stop.request(error.reason)
    outcome = _merge(
        groups.world.allgather(worker.close(stop, alone=count == 1) if worker else None)
    )
    return replace(outcome, elsewhere=[]) if count > 1 else outcome


def _attempt(ledger, unit, run_unit, claim) -> BaseException | None:
    log.get().info(f"{ledger.stage} {unit}: start")
    try:
        run_unit(unit, claim)
    except (Stopped, Exception) as error:
        return error
    return None


def _merge(outcomes: list[Outcome | None]) -> Outcome:
    parts = [outcome for outcome in outcomes if outcome is not None]
    return Outcome(
        done=sorted({name for part in parts for name in part.done}),
        failed=sorted({name for part in parts for name in part.failed}),
        skipped=parts[0].skipped,
        elsewhere=sorted({name for part in parts for name in part.elsewhere}),
        stopped=next((part.stopped for part in parts if part.stopped), ""),
        gave_up=next((part.gave_up for part in parts if part.gave_up), ""),
    )


@contextlib.contextmanager
def single(
    run: Run, stage: str, recipe: str, stale_after: float = claims.STALE_AFTER
) -> Iterator[None]:
    """Hold a stage that is a single unit, and book its failure.

        with single(run, "train", experiment.stage_hash("train")):
            ...

    A thread touches the claim, because such a stage has long phases without a loop that could.

    Raises:
        RuntimeError: another process works on the stage.
    """
    ledger = Ledger(run, stage, recipe, stale_after=stale_after)
    path = run.claim(stage, SINGLE)
    atomic.make_folder(path.parent)
    claim = claims.take(path, stale_after) or claims.take(path, stale_after)
    if claim is None:
        owner = claims.read(path) or {}
        raise RuntimeError(
            f"{run}: {stage} is being run by process {owner.get('pid', '?')} on "
            f"{owner.get('host', '?')} since {owner.get('since', '?')}; wait for it or end it "
            f"(a claim without a sign of life for {stale_after:g} s is taken over)"
        )
    ended = threading.Event()

    def keep_alive():
        while not ended.wait(stale_after / 20):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=keep_alive, daemon=True)
    thread.start()
    try:
        yield
        run.error(stage, SINGLE).unlink(missing_ok=True)
    except Exception as error:
        if not isinstance(error, atomic.DiskError):
            ledger.fail(SINGLE, error)
        raise
    finally:
        ended.set()
        thread.join()
        claim.release()
