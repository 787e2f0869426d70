"""Choose, claim and book the units of one process, beside any number of others.

Units are claimed in *leases*: runs of consecutive units under one claim. The first leases of a
stage are long, the last ones hold a single unit, so that few claims are made and no worker waits
long for the last one. Workers that were started together divide a plan into the same leases. Each
begins with leases of its own and then takes what is left, in the order from its own on.

Processes that divide a plan differently (an array whose tasks have some of the units, another
number of members or of workers) can hold claims that overlap. After a claim is made, the folder is
listed, and units that another living claim contains are left to its owner.
"""

import collections
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hpc_closure.experiment.folder import unit_name
from hpc_closure.work import atomic, claims, log, provenance
from hpc_closure.work.stop import Stop, Stopped
from hpc_closure.work.units import Ledger, Unit, listing

Wait = Literal["all", "job", "none"]

LONGEST = 16  # units of a lease
LOOKED_AT = 8  # leases of other workers that are looked at in one round of waiting
LEASES = 256  # one worker divides the units that are left into at least this number of leases


@dataclass
class Outcome:
    """Result of :func:`~hpc_closure.work.loop.work`, the same on every rank.

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


@dataclass(frozen=True)
class Lease:
    """Consecutive units that are claimed together.

    Attributes:
        units: the units, in order; their members are consecutive.
    """

    units: tuple[Unit, ...]

    @property
    def name(self) -> str:
        """Return the name of the claim: first and last member."""
        return unit_name(self.units[0].members[0], self.units[-1].members[-1])

    @property
    def members(self) -> int:
        """Return the number of members."""
        return sum(len(unit.members) for unit in self.units)


def divide(units: Sequence[Unit], workers: int = 1) -> list[Lease]:
    """Divide a plan into leases, which depend on the plan and on the number of workers.

    Workers that were started together deal half of what is left among them, then half of the rest
    ("factoring", Hummel, Schonberg, Flynn, Commun. ACM 35 (1992)). For one worker, which may have
    others beside it that it does not know of, every lease is a small part of what is left.
    Programs with other numbers of workers hold leases that overlap, and yield to each other.

    >>> from hpc_closure.work.units import plan
    >>> sizes = [len(lease.units) for lease in divide(plan(100_000, 20))]
    >>> sizes[0], sizes[-1], len(sizes), sum(sizes)
    (16, 1, 1160, 5000)
    >>> sizes = [len(lease.units) for lease in divide(plan(100_000, 20), 512)]
    >>> sizes[0], sizes[512], sizes[1024], sizes[-1]
    (4, 2, 1, 1)
    """
    leases: list[Lease] = []
    first, size = 0, 1.0  # size: members of a lease
    left = sum(len(unit.members) for unit in units)
    while first < len(units):
        if workers == 1:
            size = left / LEASES
        elif len(leases) % workers == 0:
            size = left / (2 * workers)
        last, held = first + 1, len(units[first].members)
        while (
            last < min(first + LONGEST, len(units))
            and held + len(units[last].members) <= size
            and _follow(units[last - 1], units[last])
        ):
            held += len(units[last].members)
            last += 1
        leases.append(Lease(tuple(units[first:last])))
        first, left = last, left - held
    return leases


def _follow(one: Unit, other: Unit) -> bool:
    """Return whether the members of two units are consecutive."""
    return other.members[0] == one.members[-1] + 1


class Worker:
    """Chooses the next unit of a group of ranks; exists on the first rank of its domain.

    Args:
        ledger: books of the stage.
        units: units to run, from ``ledger.plan``.
        place: index of this worker among all that were started together, and their number.
        retry_failed: run units again whose last attempt failed.
        wait: whether to wait for units that other programs compute, and to take them over if they
            die: ``all``, ``job`` (those of this batch job) or ``none``.
    """

    def __init__(
        self,
        ledger: Ledger,
        units: Sequence[Unit],
        place: tuple[int, int],
        retry_failed: bool,
        wait: Wait,
    ):
        self.ledger, self.wait, self.give_up = ledger, wait, ledger.give_up
        self.outcome = Outcome()
        self.claim: claims.Claim | None = None
        self.held: collections.deque[Unit] = collections.deque()  # of the lease, not tried yet
        self.causes: list[str] = []  # causes of failure of the units tried so far
        index, count = place
        damaged: dict[Path, str] = {}
        products = ledger.products_of_plan(damaged)
        sound = {product.members for product in products if ledger.sound(product)}
        if index == 0:
            for message in damaged.values():
                log.get().warning(f"not used: {message}")
        self.folder = ledger.run.units(ledger.stage)
        self.names = {entry.name for entry in listing(self.folder)}
        parts = ledger.parts() if index == 0 and sound else set()
        self.pending: dict[Unit, None] = {}  # units to do, in order
        self.failures: dict[Unit, int] = {}  # attempts at them that failed before this start
        for unit in units:
            if unit.members in sound:
                self.outcome.skipped += 1
                if index == 0 and {f"{unit}.claim", f"{unit}.restart"} & self.names:
                    self._sweep(unit)
                if index == 0 and unit.name in parts:
                    atomic.remove_parts(ledger.run.product(ledger.stage, unit))
            elif (failures := self._failures(unit)) and not retry_failed:
                self.outcome.failed.append(unit.name)
                if index == 0:
                    log.get().warning(
                        f"{ledger.stage} {unit}: failed before; --retry-failed runs it again"
                    )
            else:
                self.pending[unit] = None
                if failures:
                    self.failures[unit] = failures
        # who waits for all has others beside it whose number it does not know
        leases = divide(units, 1 if wait == "all" else count)
        #: leases that this worker tries first
        own = leases[index::count]
        self.own = collections.deque(lease for lease in own if self._is_long(lease))
        #: own leases of blocks that were cut again, for when no worker has left a whole block
        self.last = [lease for lease in own if not self._is_long(lease)]
        first = round(index * len(leases) / count)
        self.leases = leases[first:] + leases[:first]  # in the order in which it takes others
        self.free: set[str] = set()  # names of leases that nobody had at the last listing
        self.round = 0
        if self.pending and not self.names:
            atomic.make_folder(self.folder)
        if index == 0:
            claims.sweep(self.folder, self.names)

    def _sweep(self, unit: Unit) -> None:
        """Remove claim and restart files of a process that was killed after it published."""
        stage, run = self.ledger.stage, self.ledger.run
        claim = claims.take(run.claim(stage, unit), self.ledger.stale_after)
        if claim is None:  # another process removes them now, or extends the product
            return
        restart = run.restart(stage, unit)
        if not (restart / "working.h5").exists():  # else an extension of the product is unfinished
            atomic.remove(restart)
        claim.release()

    def _failures(self, unit: Unit) -> int:
        """Return how many attempts at a unit have failed so far, from its error file."""
        if f"{unit}.error" not in self.names:
            return 0
        try:
            record = atomic.read_json(self.ledger.run.error(self.ledger.stage, unit))
            is_ours = isinstance(record, dict) and record.get("recipe") == self.ledger.recipe
            return max(1, int(record.get("attempt", 1))) if is_ours else 0
        except (ValueError, TypeError, FileNotFoundError):
            return 0

    def _drop_failed(self, units: Iterable[Unit]) -> None:
        """Drop units that failed elsewhere since this start; else every worker would try them."""
        for unit in units:
            if self._failures(unit) > self.failures.get(unit, 0):
                del self.pending[unit]
                self.outcome.failed.append(unit.name)
                log.get().warning(f"{self.ledger.stage} {unit}: failed in another process")

    # -- the next unit ---------------------------------------------------------------------------

    def next(self, stop: Stop) -> Unit | None:
        """Claim a unit; return None if none is left or the stop flag is set."""
        pause, has_logged = 0.5, False
        if self.outcome.gave_up:
            return None
        while not stop.requested:
            if self.held:
                return self.held.popleft()
            if self.own:
                self._take(self.own.popleft())
                continue
            if self.last:
                if not self._take_left(long=True):
                    self.own, self.last = collections.deque(self.last), []
                continue
            if self._take_left():
                continue
            if not self.pending or not self._waits():
                return None
            if not has_logged:
                log.get().info(
                    f"waiting for {len(self.pending)} unit(s) that other processes "
                    f"compute, {next(iter(self.pending))} first"
                )
                has_logged = True
            time.sleep(max(0.0, min(pause, stop.remaining)))
            # of a job one process waits, and all its cores wait for that one
            pause = min(2.0 if self.wait == "job" else 10.0, 1.5 * pause)
        return None

    def _is_long(self, lease: Lease) -> bool:
        """Return whether a lease holds a whole block."""
        return lease.members >= self.ledger.cuts.per_block

    def _take_left(self, long: bool = False) -> bool:
        """Claim a lease that nobody has, or whose owner is dead; return whether there was one.

        ``long``: only one of whole blocks that nobody has.

        Products and claims are listed once. Of the leases with a claim a few are looked at, others
        in the next round, so that many waiting workers do not read all claims of all others.
        """
        self.ledger.close_books()  # the others read there what is done
        unsure = self._drop_done(list(self.pending), quick=True)
        leases = [lease for lease in self.leases if self._is_long(lease)] if long else self.leases
        left = [lease for lease in leases if not unsure.issuperset(self._todo(lease))]
        if unsure and not left and not long and self.wait != "none":
            self._drop_done(list(unsure))
            left = [lease for lease in leases if self._todo(lease)]
        claimed = {entry.name for entry in listing(self.folder)} if left else set()
        free = [lease for lease in left if f"{lease.name}.claim" not in claimed]
        rest = [lease for lease in left if f"{lease.name}.claim" in claimed]
        # who does not wait looks at one: the first worker of a job, which waits, looks at them all
        number = 0 if long else LOOKED_AT if self.wait != "none" else 1
        self.round += number
        turn = self.round % len(rest) if rest else 0
        looked_at = (rest[turn:] + rest[:turn])[:number]
        self.free = {lease.name for lease in free}
        return any(self._take(lease) for lease in [*free, *looked_at])

    def _waits(self) -> bool:
        """Return whether to wait for a unit that is claimed by another program."""
        job = provenance.job().get("job")
        if self.wait != "job" or job is None:
            return self.wait != "none"
        claimed = (
            claims.read(self.ledger.run.claim(self.ledger.stage, lease.name))
            for lease in self.leases
            if self._todo(lease)
        )
        # an empty record is a claim that is being written
        return any(record == {} or (record and record.get("job") == job) for record in claimed)

    def _todo(self, lease: Lease) -> list[Unit]:
        return [unit for unit in lease.units if unit in self.pending]

    def _drop_done(self, units: Sequence[Unit], quick: bool = False) -> set[Unit]:
        """Drop the units that are done; return those whose product cannot be used.

        The products of many units are listed, those of few are looked at. ``quick``: see
        :meth:`~hpc_closure.work.units.Ledger.look_all`.
        """
        if quick or len(units) > 2:
            states: dict[Unit, bool | None] = {**self.ledger.look_all(units, quick)}
        else:
            states = {unit: self.ledger.look(unit) for unit in units}
        for unit, state in states.items():
            if state:
                del self.pending[unit]
        return {unit for unit, state in states.items() if state is False}

    def _take(self, lease: Lease) -> bool:
        """Claim a lease; return False if nothing in it is left or another process has it."""
        if not self._todo(lease):
            return False
        path = self.ledger.run.claim(self.ledger.stage, lease.name)
        was_free = lease.name in self.free
        self.free.discard(lease.name)
        claim = claims.take(path, self.ledger.stale_after, was_free=was_free)
        if claim is None:
            return False
        self.names = {entry.name for entry in listing(self.folder)}
        taken = claims.overlapping(path, self.names, self.ledger.stale_after)
        unusable = self._drop_done(self._todo(lease))
        self._drop_failed(self._todo(lease))
        todo = [unit for unit in self._todo(lease) if taken.isdisjoint(unit.members)]
        if not todo:
            claim.release()
            return False
        self.claim = claim
        self.held.extend(todo)
        for unit in todo:
            if unit in unusable and not unit.extends:
                self._set_aside(unit)
        return True

    def _set_aside(self, unit: Unit) -> None:
        """Rename a product that cannot be used."""
        path = self.ledger.run.product(self.ledger.stage, unit)
        aside = atomic.set_aside(path)
        log.get().warning(f"{path.name} was not usable: it is kept as {aside.name} and made again")

    # -- results ---------------------------------------------------------------------------------

    def record_result(self, unit: Unit, error: BaseException | None) -> None:
        """Book how an attempt ended, and release the claim after the last unit of its lease."""
        stage = self.ledger.stage
        error = self._lost_or(error)
        self._count_causes(error)
        if isinstance(error, Hopeless):
            log.get().warning(f"{stage} {unit}: {error}")
            error = None
        if error is None and not self.ledger.published(unit):
            error = RuntimeError(f"unit {unit} ended without a product")
        if error is None:
            self.ledger.finish(unit, self.names)
            del self.pending[unit]
            self.outcome.done.append(unit.name)
        elif isinstance(error, claims.Lost):
            log.get().warning(f"{stage} {unit}: {error}")  # pending: the other process computes it
        elif not isinstance(error, (Stopped, atomic.DiskError)):
            self.ledger.fail(unit, error)
            del self.pending[unit]
            self.outcome.failed.append(unit.name)
            log.get().error(f"{stage} {unit} failed: {type(error).__name__}: {error}")
        if isinstance(error, (claims.Lost, Stopped, atomic.DiskError)) or self.outcome.gave_up:
            self.held.clear()
        if not self.held:
            assert self.claim is not None
            self.claim.release()

    def _lost_or(self, error: BaseException | None) -> BaseException | None:
        """Return that the claim is lost, if it is: who has it now may have caused the error.

        It moves and removes files of the unit, and decides what becomes of it.
        """
        expected = (Stopped, Hopeless, atomic.DiskError, claims.Lost)
        if error is not None and not isinstance(error, expected):
            assert self.claim is not None
            try:
                self.claim.check()
            except claims.Lost as lost:
                lost.__cause__ = error
                return lost
        return error

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

    def close(self, stop: Stop, alone: bool = True) -> Outcome:
        """Release what is held; returns the outcome of this group.

        Args:
            stop: the stop flag.
            alone: False if others were started together with this worker, so that it does not
                matter what they still compute.
        """
        if self.held and self.claim is not None:  # stopped between two units of a lease
            self.held.clear()
            self.claim.release()
        self.ledger.close_books()
        if self.pending and not self.outcome.gave_up and (alone or stop.requested):
            self._drop_done(list(self.pending))
            missing = [unit.name for unit in self.pending]
            if stop.requested:
                self.outcome.stopped = stop.reason if missing else ""
            else:
                self.outcome.elsewhere = missing
        return self.outcome
