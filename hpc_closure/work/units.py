"""Work units: blocks of consecutive members, one file each, shared by any number of processes.

The state of a unit is the first of these that applies. It is *done* if its validated file has its
final name and holds the outputs of the experiment, *running* if a process has a fresh claim on it,
*queued* if the scheduler lists it, *failed* if its last attempt left an error file, else
*missing*. All books are files:

    RUN/.units/<stage>/000000-000019.claim   the process that computes it; touched regularly
    RUN/.units/<stage>/000000-000019.error   last failure: trace, attempt, host, job, log
    RUN/.units/<stage>/manifest.jsonl        cache of product headers, by (name, size, mtime)

Members are done one by one. So more members, a later end or another block size compute only the
missing members.

    ledger = Ledger.of(experiment, "generate")
    units = ledger.plan()
    ledger.survey().counts()

``loop.work`` runs the units.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import time
import traceback
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc_closure.experiment.folder import UNIT, Run, members_of_unit, unit_name, verb_of
from hpc_closure.experiment.schema import Experiment
from hpc_closure.work import atomic, claims, launch, log, provenance
from hpc_closure.work.header import BLOCK, Header

STATES = ("done", "running", "queued", "failed", "missing")
# Seconds after which the books of finished units are closed. That costs two requests, so units of
# seconds share it; it is one interval of restart files, the most that a power failure may cost.
CLOSE_AFTER = 60.0
_PART = re.compile(rf"block_({UNIT})\.h5\..+\.part")
# what decides whether a product is sound, in a whole line of the manifest
_CONTENT = re.compile(
    rb'("recipe": "[^"\\]*", "holds": \{[^{}]*\}), "size": \d+, "mtime": \d+, "lost": \{.*\}\}\Z'
)
_NAMED = re.compile(rb'\{"name": "([^"\\]+)"')  # begin of a line of the manifest


@dataclass(frozen=True)
class Unit:
    """Consecutive members that are computed together.

    Attributes:
        index: position in the plan.
        members: member indices.
        extends: a product of these members exists but ends too early; the new product replaces it.
    """

    index: int
    members: tuple[int, ...]
    extends: bool = False

    @functools.cached_property
    def name(self) -> str:
        return unit_name(self.members[0], self.members[-1])

    def __str__(self) -> str:
        return self.name


def first_recipe(folder: Path) -> str:
    """Return the recipe hash of the first product in a folder; "" without a sound product."""
    products = sorted(path for path in folder.iterdir() if BLOCK.fullmatch(path.name))
    try:
        return Header.read(products[0]).recipe
    except (IndexError, ValueError):
        return ""


def members_of(names: Iterable[str]) -> set[int]:
    """Return the members of the units with these names."""
    members: set[int] = set()
    for name in names:
        first, last = members_of_unit(name)
        members.update(range(first, last + 1))
    return members


@dataclass(frozen=True)
class Cuts:
    """Where members are cut into blocks: a block is the same whichever other members are planned.

    The last block of each worker is cut again: half of these blocks into two, the very last ones
    into four. So no worker waits long for the last one.

    Attributes:
        per_block: members of a block (``cluster.members_per_block``).
        members: number of members of the stage.
        workers: processes that share the stage; with fewer than two blocks for each, no block is
            cut again.

    Raises:
        ValueError: a size below 1.
    """

    per_block: int
    members: int = 0
    workers: int = 1

    def __post_init__(self):
        if self.per_block < 1:
            raise ValueError(f"cluster.members_per_block={self.per_block}: expected at least 1")

    def block(self, member: int) -> tuple[int, int]:
        """Return the number of a member's block, and which part of it the member is in."""
        block, place = divmod(member, self.per_block)
        num_blocks = -(-self.members // self.per_block)
        parts, left = 1, num_blocks - block
        if num_blocks >= 2 * self.workers > 2:
            parts = 4 if 2 * left <= self.workers else 2 if left <= self.workers else 1
        return block, place // -(-self.per_block // parts)

    def cut(self, members: Iterable[int]) -> list[tuple[int, ...]]:
        """Return sorted ``members`` as runs of consecutive members, each within a block."""
        blocks: list[list[int]] = []
        last = None
        for member in members:
            block = self.block(member)
            if block == last and member == blocks[-1][-1] + 1:
                blocks[-1].append(member)
            else:
                blocks.append([member])
            last = block
        return [tuple(block) for block in blocks]


def plan(members: int | Iterable[int], cuts: Cuts | int) -> list[Unit]:
    """Return blocks of members.

    Args:
        members: number of members, or their indices.
        cuts: where they are cut; a number stands for blocks of that size.

    Raises:
        ValueError: no members, or a size below 1.
    """
    cuts = Cuts(cuts) if isinstance(cuts, int) else cuts
    return [Unit(index, block) for index, block in enumerate(cuts.cut(_sorted(members)))]


def _sorted(members: int | Iterable[int]) -> list[int]:
    """Return member indices in order, of a number of members or of indices."""
    indices = sorted(set(range(members) if isinstance(members, int) else members))
    if not indices or indices[0] < 0:
        raise ValueError(f"members={members!r}: expected at least one member, none negative")
    return indices


@dataclass
class Survey:
    """State of a stage at one moment.

    Attributes:
        states: units by name of state.
        damaged: message per damaged product (its members count as missing).
        errors: content of the error file of every failed unit, by name.
        claims: content of the claim of every running unit, by name.
        products: headers of the sound products, in member order.
    """

    states: dict[str, list[Unit]]
    damaged: dict[Path, str]
    errors: dict[str, dict]
    claims: dict[str, dict]
    products: list[Header]

    def counts(self) -> dict[str, int]:
        """Return ``{units, done, running, queued, failed, missing}``."""
        counts = {state: len(self.states[state]) for state in STATES}
        return {"units": sum(counts.values()), **counts}


class Ledger:
    """Books of one stage of a run.

    Args:
        run: the run folder.
        stage: one of ``folder.BLOCKS``.
        recipe: hash that decides whether a product is of this experiment.
        holds: content of a finished product: exactly these outputs, up to ``t_end`` or later, for
            example ``{"t_end": 40.0, "outputs": ["velocity"]}``.
        stale_after: seconds without a sign of life after which a claim is stale.
        cuts: number of members of the stage, and where they are cut into blocks.

    Attributes:
        give_up: if this many units fail first, all for one cause, the rest is not tried; 0 = every
            unit is tried.
    """

    give_up = 0

    def __init__(
        self,
        run: Run,
        stage: str,
        recipe: str,
        holds: dict | None = None,
        stale_after: float = claims.STALE_AFTER,
        cuts: Cuts = Cuts(1),
    ):
        self.run, self.stage, self.recipe = run, stage, recipe
        self.holds = json.loads(json.dumps(holds or {}))
        self.stale_after, self.cuts = stale_after, cuts
        self._known: dict[str, dict | bytes] = {}  # records of the manifest by file name
        self._new: list[dict] = []  # records that are not in the manifest yet
        self._listed: set[str] = set()  # names in the folder when the products were listed
        self._sound_content: dict[bytes, bool] = {}  # whether records with this content are sound
        self._recent: set[str] = set()  # names of records made since the products were listed
        #: headers and messages of a listing that a plan was made from, for the worker of that plan
        self._fresh: tuple[list[Header], dict[Path, str]] | None = None
        self._read_to = 0  # bytes of the manifest that were read
        self._has_folder = False  # whether the folder of the products is known to exist
        #: units whose restart folder this process opened: whether it existed before
        self._restarted: dict[Unit, bool] = {}
        self._published: set[Unit] = set()  # units that this process published
        self._closed = 0.0  # monotonic time at which the books were closed

    @classmethod
    def of(cls, experiment: Experiment, stage: str) -> "Ledger":
        """Return the books of a stage of an experiment."""
        generate, rollout = experiment.generate, experiment.rollout
        per_block, replicas = experiment.cluster.members_per_block, experiment.replicas.members
        pilot, allocation = experiment.pilot, experiment.cluster.allocation
        workers = allocation.workers if allocation and stage == "rollout" else 1
        pilot_end = rollout.t_start + max(experiment.evaluate.lead_times)
        number, per_block, holds = {
            "pilot": (
                pilot.initial_conditions * pilot.members,
                pilot.members,
                {"t_end": pilot_end},
            ),
            "generate": (generate.members, per_block, generate.holds),
            # the replicas of a start share its DNS, so they are one block
            "replicas": (
                replicas * rollout.initial_conditions,
                replicas,
                {"t_end": rollout.t_end},
            ),
            "rollout": (rollout.trajectories, per_block, rollout.holds),
        }[stage]
        ledger = cls(
            Run.of(experiment),
            stage,
            recipe=experiment.stage_hash(stage),
            holds=holds,
            stale_after=experiment.cluster.claim_timeout,
            cuts=Cuts(per_block, number, workers),
        )
        ledger.give_up = experiment.cluster.max_first_failures
        return ledger

    # Reading

    def products(self, damaged: dict[Path, str] | None = None) -> list[Header]:
        """Return the headers of all sound products, in member order.

        The folder is listed once. Headers come from the manifest if name, size and time of change
        agree, so a thousand products cost one listing. Of workers that were started together only
        the first compares size and time, which are a request to the server for each product; the
        others believe the manifest, and the first computes what it finds damaged.

        Args:
            damaged: if a dict, it collects the messages about unusable files.

        Raises:
            DiskError: the folder cannot be listed.
        """
        self._read_to = 0
        self._read_manifest()
        self._recent = set()
        headers = []
        entries = listing(self.run.folder(self.stage))
        self._listed = {entry.name for entry in entries}
        believes = launch.worker()[0] > 0
        for entry in entries:
            if not BLOCK.fullmatch(entry.name):
                continue
            try:
                path = Path(entry.path)
                known = Header.from_record(path, self._record(entry.name)) if believes else None
                headers.append(known or self._header(path, entry.stat()))
            except FileNotFoundError:  # replaced after the listing
                continue
            except ValueError as error:
                if damaged is not None:
                    damaged[Path(entry.path)] = str(error)
        with contextlib.suppress(
            atomic.DiskError
        ):  # a cache, which a reader may not be allowed to write
            self._remember()
        return sorted(headers, key=lambda header: header.first)

    def products_of_plan(self, damaged: dict[Path, str]) -> list[Header]:
        """Return :meth:`products` as the last call of :meth:`plan` found them, once.

        Without such a call they are listed now.
        """
        (headers, messages), self._fresh = self._fresh or (self.products(damaged), {}), None
        damaged.update(messages)
        return headers

    def _record(self, name: str) -> dict:
        """Return the record of a product in the manifest; {} if there is none."""
        record = self._known.get(name, {})
        if isinstance(record, bytes):
            record = self._known[name] = atomic.json_line(record) or {}
        return record

    def _header(self, path: Path, stat: os.stat_result) -> Header:
        """Return the header of a product; open the file only if the manifest is outdated."""
        record = self._record(path.name)
        if record.get("size") == stat.st_size and record.get("mtime") == stat.st_mtime_ns:
            known = Header.from_record(path, record)
            if known is not None:
                return known
        return self._note(Header.read(path))

    def _note(self, header: Header) -> Header:
        record = self._known[header.path.name] = header.as_record()
        self._recent.add(header.path.name)
        self._new.append(record)
        return header

    def _read_manifest(self) -> None:
        """Read the lines of the manifest that were appended since the last call.

        Only their names are read; few of 10^5 records are ever used by a worker.
        """
        lines, self._read_to = atomic.read_lines_from(self.run.manifest(self.stage), self._read_to)
        named = {found[1].decode(): line for line in lines if (found := _NAMED.match(line))}
        self._known |= named
        self._recent |= named.keys()

    def _remember(self) -> None:
        """Append the headers that were read since the last call to the manifest."""
        path = self.run.manifest(self.stage)
        if not self._new:
            return
        lines = b"".join((json.dumps(record) + "\n").encode() for record in self._new)
        with atomic.disk_errors(path):
            try:
                _append(path, lines)
            except FileNotFoundError:
                if not self.run.root.is_dir():
                    return
                path.parent.mkdir(parents=True, exist_ok=True)
                _append(path, lines)
        self._new = []

    def sound(self, product: Header) -> bool:
        """Return whether a product of this experiment reaches the end time.

        Raises:
            ValueError: the product is of another experiment, or holds other outputs.
        """
        if product.recipe != self.recipe:
            raise ValueError(
                f"{product.path}: made by another experiment (hash {product.recipe[:12] or '-'}, "
                f"expected {self.recipe[:12]}); change `name`, or remove {product.path.parent}"
            )
        outputs, expected = dict(product.holds), dict(self.holds)
        t_end, required_end = outputs.pop("t_end", 0.0), expected.pop("t_end", 0.0)
        if outputs != expected and not (self.stage == "generate" and self.run.data_root):
            raise ValueError(
                f"{product.path}: holds other outputs ({outputs or 'none'}, expected "
                f"{expected or 'none'}); change `name`, or remove {product.path.parent}"
            )
        return t_end >= required_end * (1 - 1e-9)

    def plan(
        self, members: int | Iterable[int] | None = None, per_block: int | None = None
    ) -> list[Unit]:
        """Return all units of ``members``: existing products, and blocks for the other members.

        By default of all members, cut as the ledger says; ``per_block`` asks for blocks of one
        size.
        """
        damaged: dict[Path, str] = {}
        units, (_, products) = self._plan(members, per_block, damaged)
        self._fresh = products, damaged
        return units

    def _plan(self, members, per_block, damaged):
        cuts = Cuts(per_block) if per_block else self.cuts
        requested = set(_sorted(self.cuts.members if members is None else members))
        products = self.products(damaged)
        done, blocks, covered = set(), [], set()
        for product in products:
            product_members = set(product.members)
            if not product_members & requested or product_members & covered:
                continue
            covered |= product_members
            is_done = self.sound(product)
            blocks.append((product.members, not is_done))
            if is_done:
                done.add(product.first)
        blocks += [(block, False) for block in cuts.cut(sorted(requested - covered))]
        blocks.sort()
        units = [Unit(index, *block) for index, block in enumerate(blocks)]
        return units, ({unit.name for unit in units if unit.members[0] in done}, products)

    def incomplete(self, survey: Survey) -> str:
        """Return an error line for a verb that reads this stage; empty if all units are done."""
        counts = survey.counts()
        if counts["done"] == counts["units"]:
            return ""
        subject = {
            "pilot": "the pilot is",
            "generate": "the data are",
            "replicas": "the replicas are",
            "rollout": "the rollout is",
        }[self.stage]
        states = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
        damaged = "".join(f"; not used: {message}" for message in survey.damaged.values())
        return (
            f"{self.run.folder(self.stage)}: {subject} not complete ({states} of "
            f"{counts['units']} units); run `hpc-closure {verb_of(self.stage)}` first{damaged}"
        )

    def survey(
        self,
        members: int | Iterable[int] | None = None,
        per_block: int | None = None,
        queued: Iterable[int] = (),
    ) -> Survey:
        """Return the states of the units of :meth:`plan`.

        Args:
            members, per_block: see :meth:`plan`.
            queued: members that the scheduler lists.
        """
        damaged: dict[Path, str] = {}
        units, (done, products) = self._plan(members, per_block, damaged)
        folder = self.run.units(self.stage)
        names = {entry.name for entry in listing(folder)}
        fresh_claims = claims.living(folder, names, self.stale_after)
        errors = {}
        for name in names:
            if name.endswith(".error"):
                with contextlib.suppress(ValueError, FileNotFoundError, atomic.DiskError):
                    error = atomic.read_json(folder / name)
                    if isinstance(error, dict) and error.get("recipe") == self.recipe:
                        errors[name.removesuffix(".error")] = error
        running = {member for name in fresh_claims for member in _members_in(name)}
        failed = {member for name in errors for member in _members_in(name)}
        waiting = set(queued)
        states: dict[str, list[Unit]] = {state: [] for state in STATES}
        for unit in units:
            members = set(unit.members)
            if unit.name in done:
                state = "done"
            elif members & running:
                state = "running"
            elif members & waiting:
                state = "queued"
            else:
                state = "failed" if members & failed else "missing"
            states[state].append(unit)
        return Survey(states, damaged, errors, fresh_claims, products)

    # Writing

    def attributes(self, unit: Unit) -> dict:
        """Return the root attributes that identify the product of ``unit``."""
        return {
            "members": list(unit.members),
            "recipe_hash": self.recipe,
            "holds": json.dumps(self.holds, sort_keys=True),
        }

    @contextlib.contextmanager
    def publish(
        self,
        unit: Unit,
        check: Callable[[Path], Header] = functools.partial(Header.read, flush=True),
        *,
        claim: claims.Claim | None = None,
    ) -> Iterator[Path]:
        """Write the product of ``unit`` by ``atomic.publish``, reopening it to check it.

        The writer puts :meth:`attributes` and, last, ``complete = 1`` into the root attributes.

        Args:
            unit: the members of the file.
            check: reads the written file, checks it and flushes it to the disk; returns its
                header.
            claim: claim that must still be held.

        Yields:
            The private path to write to.

        Raises:
            RuntimeError: the file has other members, or ends too early.
        """
        checked: list[Header] = []

        def validate(part: Path) -> None:
            header = check(part)
            if header.members != unit.members or not self.sound(header):
                raise RuntimeError(f"{part}: members or contents differ from those of unit {unit}")
            if claim is not None:
                claim.confirm()
            checked.append(header)

        path = self.run.product(self.stage, unit)
        if not self._has_folder:
            atomic.make_folder(path.parent)
            self._has_folder = True
        try:
            with atomic.publish(path, validate, lean=True) as part:
                yield part
        except FileNotFoundError:
            self._has_folder = False
            raise
        self._note(dataclasses.replace(checked[0], path=path))
        self._published.add(unit)
        if claim is None or claim.inherited or self._restarted.get(unit):
            atomic.remove_parts(path)

    def published(self, unit: Unit) -> bool:
        """Return whether this process has published ``unit``, or its product exists now."""
        return unit in self._published or bool(self.look(unit))

    def look(self, unit: Unit) -> bool | None:
        """Return whether the product of ``unit`` is sound; None if it does not exist."""
        path = self.run.product(self.stage, unit)
        try:
            return self.sound(self._header(path, path.stat()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:
            return False

    def look_all(self, units: Iterable[Unit], quick: bool = False) -> dict[Unit, bool]:
        """Return whether the product of each unit is sound, of those units that have one.

        The folder is listed once. Products that other processes have entered into the manifest
        since this one listed them all are not looked at, because thousands of workers would
        otherwise open all products of all others.

        Args:
            units: the units.
            quick: do not look at products either that are new and not in the manifest yet; they
                count as not sound.
        """
        folder = self.run.folder(self.stage)
        names = {entry.name for entry in listing(folder)}
        there = {unit: name for unit in units if (name := self.run.product_name(unit)) in names}
        if there:
            self._read_manifest()
        found: dict[Unit, bool] = {}
        for unit, name in there.items():
            if self._is_recent(folder, name):
                state: bool | None = True
            elif quick and name not in self._listed:
                state = False
            else:
                state = self.look(unit)
            found |= {} if state is None else {unit: state}
        return found

    def _is_recent(self, folder: Path, name: str) -> bool:
        """Return whether a process has read or published a sound product since our listing.

        Recipe and outputs, which decide it, are the same text in nearly all lines of a manifest.
        """
        if name not in self._recent:
            return False
        line = self._known[name]
        found = _CONTENT.search(line) if isinstance(line, bytes) else None
        if found is None:
            return self._is_sound_record(folder, name)
        if found[1] not in self._sound_content:
            self._sound_content[found[1]] = self._is_sound_record(folder, name)
        return self._sound_content[found[1]]

    def _is_sound_record(self, folder: Path, name: str) -> bool:
        header = Header.from_record(folder / name, self._record(name))
        try:
            return header is not None and self.sound(header)
        except (ValueError, TypeError, AttributeError):
            return False

    def parts(self) -> set[str]:
        """Return the names of the units that had unfinished files when products were listed."""
        found = (_PART.fullmatch(name) for name in self._listed)
        return {part.group(1) for part in found if part}

    def open_restart(self, unit: Unit) -> tuple[Path, bool]:
        """Make the restart folder of a unit; returns it and whether it is new.

        An attempt that was killed left it behind.
        """
        folder = self.run.restart(self.stage, unit)
        is_new = atomic.make_new_folder(folder)
        self._restarted[unit] = self._restarted.get(unit, False) or not is_new
        return folder, is_new

    def finish(self, unit: Unit, left: Container[str]) -> None:
        """Close the books of a published unit: remove its error and its restart files.

        Args:
            unit: the unit.
            left: names of the files that were in the bookkeeping folder when it was claimed.
        """
        if time.monotonic() - self._closed > CLOSE_AFTER:
            self.close_books()
        if f"{unit}.error" in left:
            self.run.error(self.stage, unit).unlink(missing_ok=True)
        if unit in self._restarted or f"{unit}.restart" in left:
            atomic.remove_folder(self.run.restart(self.stage, unit))

    def close_books(self) -> None:
        """Enter the finished units into the manifest, and flush the folder of the products.

        A unit that takes longer than :data:`CLOSE_AFTER` is flushed before its restart files are
        removed; of shorter ones the last may have to be computed again after a power failure.
        """
        if self._published and self._new:
            with contextlib.suppress(FileNotFoundError):
                atomic.fsync(self.run.folder(self.stage))
        self._remember()
        self._closed = time.monotonic()

    def fail(self, unit: Unit, error: BaseException) -> None:
        """Write the error file of a unit: trace, attempt, host, job and log of this process."""
        path = self.run.error(self.stage, unit)
        attempt = 1
        with contextlib.suppress(ValueError, FileNotFoundError, AttributeError, TypeError):
            attempt = int(atomic.read_json(path).get("attempt", 0)) + 1
        text = " ".join(str(error).split()) or "(no message)"
        atomic.write_json(
            path,
            {
                "unit": unit.name,
                "recipe": self.recipe,
                "attempt": attempt,
                "message": f"{type(error).__name__}: {text}",
                "trace": traceback.format_exception(error),
                "host": claims.owner()["host"],
                **provenance.job(),
                "log": str(log.path() or ""),
                "time": provenance.now(),
            },
        )


def _append(path: Path, lines: bytes) -> None:
    """Append with one write, so that lines of several processes do not mix."""
    with open(path, "ab", buffering=0) as file:
        file.write(lines)


def listing(folder: Path) -> list[os.DirEntry]:
    """Return the entries of a folder; none if it does not exist.

    Raises:
        DiskError: the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise atomic.DiskError(f"{folder}: cannot be listed ({error.strerror})") from error


def _members_in(name: str) -> range:
    try:
        first, last = members_of_unit(name)
    except ValueError:
        return range(0)
    return range(first, last + 1)
