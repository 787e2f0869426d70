"""Work through units: claim, run, publish, book; several programs may do so at once.

    outcome = work(ledger, ledger.plan(), run_unit, stop=stop)
    sys.exit(outcome.exit_code)

A stage without members is a single unit, held by :func:`single`.
"""

import collections
import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpc_closure.experiment.folder import Run
from hpc_closure.work import atomic, claims, log
from hpc_closure.work.mpi import Groups, World
from hpc_closure.work.stop import Stop, Stopped
from hpc_closure.work.units import Ledger, Unit, listing

SINGLE = Unit(0, (0,))  # the only unit of train and of evaluate


@dataclass
class Outcome:
    """Result of :func:`work`, the same on every rank.

    Attributes:
        done, failed: names of the units that this program finished or failed.
        skipped: number of units that were done before.
        elsewhere: units that other processes still compute.
        stopped: reason of an early stop, or empty.
        gave_up: message if the first units failed for one cause, or empty.
    """

    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    skipped: int = 0
    elsewhere: list[str] = field(default_factory=list)
    stopped: str = ""
    gave_up: str = ""

    @property
    def exit_code(self) -> int:
        if self.gave_up:
            return 3
        return 75 if self.stopped or self.elsewhere else 3 if self.failed else 0

    def report(self) -> None:
        """Log the last lines of a verb that works on units."""
        logger = log.get()
        done, failed = len(self.done), len(self.failed)
        logger.info(f"{done} unit(s) done now, {self.skipped} before, {failed} failed")
        if self.stopped:
            logger.warning(f"stopped early ({self.stopped}); the same command continues")
        if self.gave_up:
            logger.error(self.gave_up)
        if failed:
            logger.error("`hpc-closure status --failed` names the failed units and their logs")


class Hopeless(Exception):
    """The product of a unit was published, but holds nothing of use."""


def work(
    ledger: Ledger,
    units: Sequence[Unit],
    run_unit: Callable,
    *,
    stop: Stop,
    groups: Groups | None = None,
    retry_failed: bool = False,
    wait: bool = True,
) -> Outcome:
    """Claim and run the units that are not done, until none is left.

    A failed unit does not end the loop. The loop ends if the first ``ledger.give_up`` units all
    fail for one cause (or raise :class:`Hopeless`), or if the disk is full or unwritable.

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
        wait: wait for units that another program computes, and take them over if it dies.

    Returns:
        The outcome, equal on all ranks.

    Raises:
        DiskError: the disk is full or unwritable.
    """
    groups = groups or World().groups()
    domain = groups.domain.prepare()
    worker = _Worker(ledger, units, retry_failed, wait, groups)
    while True:
        unit = domain.bcast(worker.next(stop) if domain.root else None)
        if unit is None:
            break
        error = domain.agree_on_error(_attempt(ledger, unit, run_unit, worker.claim, domain))
        if domain.root:
            worker.record_result(unit, error)
        if isinstance(error, atomic.DiskError):
            raise error
        if isinstance(error, Stopped):
            stop.request(error.reason)
    return _merge(groups.world.allgather(worker.close(stop) if domain.root else None))


def _attempt(ledger, unit, run_unit, claim, domain) -> BaseException | None:
    log.get().info(f"{ledger.stage} {unit}: start")
    try:
        run_unit(unit, claim if domain.root else claims.NO_CLAIM)
    except (Stopped, Exception) as error:
        return error
    return None


class _Worker:
    """Chooses the next unit of a group; exists on the first rank of its domain."""

    def __init__(self, ledger, units, retry_failed, wait, groups):
        self.ledger, self.wait, self.give_up = ledger, wait, ledger.give_up
        self.claim = None
        self.outcome = Outcome()
        self.causes: list[str] = []  # causes of failure of the units tried so far
        self.pending: dict[Unit, None] = {}  # units to do, in order
        self.fresh: collections.deque[Unit] = collections.deque()  # pending units, not tried yet
        if not groups.domain.root:
            return
        damaged: dict[Path, str] = {}
        sound = {product.members for product in ledger.products(damaged) if ledger.sound(product)}
        if groups.index == 0:
            for message in damaged.values():
                log.get().warning(f"not used: {message}")
        names = {entry.name for entry in listing(ledger.run.units(ledger.stage))}
        todo = []
        for unit in units:
            if unit.members in sound:
                self.outcome.skipped += 1
                if groups.index == 0 and {f"{unit}.claim", f"{unit}.restart"} & names:
                    self._sweep(unit)
            elif not retry_failed and self._failed(unit, names):
                self.outcome.failed.append(unit.name)
                if groups.index == 0:
                    log.get().warning(
                        f"{ledger.stage} {unit}: failed before; --retry-failed runs it again"
                    )
            else:
                todo.append(unit)
        # Every group starts with different units and then helps the others.
        own_units = set(todo[groups.index :: groups.count])
        todo.sort(key=lambda unit: (unit not in own_units, unit.index))
        self.pending = dict.fromkeys(todo)
        self.fresh = collections.deque(todo)
        if todo:
            atomic.make_folder(ledger.run.units(ledger.stage))
        if groups.index == 0:
            claims.sweep(ledger.run.units(ledger.stage), names)

    def _sweep(self, unit) -> None:
        """Remove claim and restart files of a process that was killed after it published."""
        stage, run = self.ledger.stage, self.ledger.run
        claim = claims.take(run.claim(stage, unit), self.ledger.stale_after)
        if claim is None:  # another process removes them now, or extends the product
            return
        restart = run.restart(stage, unit)
        if not (restart / "working.h5").exists():  # else an extension of the product is unfinished
            atomic.remove(restart)
        claim.release()

    def _failed(self, unit, names) -> bool:
        if f"{unit}.error" not in names:
            return False
        try:
            record = atomic.read_json(self.ledger.run.error(self.ledger.stage, unit))
            return isinstance(record, dict) and record.get("recipe") == self.ledger.recipe
        except (ValueError, FileNotFoundError):
            return False

    def next(self, stop: Stop) -> Unit | None:
        """Claim a unit; return None if none is left or the stop flag is set."""
        pause, has_logged = 0.5, False
        if self.outcome.gave_up:
            return None
        while not stop.requested:
            while self.fresh and not stop.requested:
                unit = self.fresh.popleft()
                if self._try_claim(unit):
                    return unit
            if stop.requested or not self.pending:
                return None
            # The other units have claims, which will be released or become stale.
            for unit in list(self.pending):
                if self._try_claim(unit):
                    return unit
            if not self.pending or not self.wait:
                return None
            if not has_logged:
                log.get().info(
                    f"waiting for {len(self.pending)} unit(s) that other processes "
                    f"compute, {next(iter(self.pending))} first"
                )
                has_logged = True
            time.sleep(max(0.0, min(pause, stop.remaining)))
            pause = min(10.0, 1.5 * pause)
        return None

    def _try_claim(self, unit: Unit) -> bool:
        """Claim a unit that is still to be done; drop it if it is done."""
        if self.ledger.done(unit):  # by another group or program
            del self.pending[unit]
            return False
        path = self.ledger.run.claim(self.ledger.stage, unit)
        self.claim = claims.take(path, self.ledger.stale_after)
        if self.claim is None:
            return False
        if self.ledger.done(unit):  # published after the first test and before the claim
            self.claim.release()
            del self.pending[unit]
            return False
        self._set_aside_unusable(unit)
        return True

    def close(self, stop: Stop) -> Outcome:
        """Return the outcome of this group."""
        if self.pending and not self.outcome.gave_up:
            done = {
                product.members for product in self.ledger.products() if self.ledger.sound(product)
            }
            missing = [unit.name for unit in self.pending if unit.members not in done]
            if stop.requested:
                self.outcome.stopped = stop.reason if missing else ""
            else:
                self.outcome.elsewhere = missing
        return self.outcome

    def _set_aside_unusable(self, unit) -> None:
        """Rename an existing product of the unit that cannot be used."""
        path = self.ledger.run.product(self.ledger.stage, unit)
        if path.exists() and not unit.extends:
            aside = atomic.set_aside(path)
            log.get().warning(
                f"{path.name} was not usable: it is kept as {aside.name} and made again"
            )

    def record_result(self, unit: Unit, error: BaseException | None) -> None:
        """Book how an attempt ended and release the claim."""
        stage = self.ledger.stage
        self._count_causes(error)
        if isinstance(error, Hopeless):
            log.get().warning(f"{stage} {unit}: {error}")
            error = None
        if error is None and not self.ledger.done(unit):
            error = RuntimeError(f"unit {unit} ended without a product")
        if error is None:
            self.ledger.finish(unit)
            del self.pending[unit]
            self.outcome.done.append(unit.name)
        elif isinstance(error, claims.Lost):
            log.get().warning(f"{stage} {unit}: {error}")  # pending: the other process computes it
        elif not isinstance(error, (Stopped, atomic.DiskError)):
            self.ledger.fail(unit, error)
            del self.pending[unit]
            self.outcome.failed.append(unit.name)
            log.get().error(f"{stage} {unit} failed: {type(error).__name__}: {error}")
        self.claim.release()

    def _count_causes(self, error: BaseException | None) -> None:
        """Give up if the first units all failed for one cause."""
        if self.give_up == 0 or isinstance(error, (Stopped, atomic.DiskError, claims.Lost)):
            return
        text = f"{type(error).__name__}: {error}"
        cause = re.sub(r"[\d.]+", "0", text) if error else ""  # numbers differ from unit to unit
        self.causes.append(cause)
        if not cause or set(self.causes) != {cause}:
            self.give_up = 0
        elif len(self.causes) == self.give_up:
            self.outcome.gave_up = (
                f"the first {self.give_up} unit(s) all failed for one cause, so the rest is "
                f"not tried (cluster.max_first_failures={self.give_up}): {error}"
            )


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
