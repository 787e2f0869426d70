"""Compute one unit: a base class with the loop; its subclasses are the physics.

The loop advances to each stored time, records it, writes restart files, tests the stop flag, and
publishes the finished file. Unfinished files are in the unit's restart folder: a working file,
whose structure is fixed when it is made, and the newest two restart files. A killed unit continues
from the newest complete restart file, so at most one checkpoint interval is lost.
"""

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from hpc_closure.work import atomic, hdf5, log
from hpc_closure.work.header import Header
from hpc_closure.work.stop import Stopped

LOOK_EVERY = 2.0  # longest time in seconds between two tests of the stop flag


class Writer(Protocol):
    """What a block needs from the writer of its unfinished file.

    Attributes:
        path: path of the file.
        continued: whether the file existed and is continued.
    """

    path: Path
    continued: bool

    def write(self, index: int, fields: dict, scalars: dict, references: dict) -> None:
        """Store snapshot ``index``."""

    def write_series(self, index: int, entries: dict) -> None:
        """Store the entries of the series at their time ``index``."""

    def write_whole(self, index: int, states: np.ndarray) -> None:
        """Store the states of the starts with all modes at their time ``index``."""

    def continue_from(self, product: Path) -> tuple[int, dict]:
        """Copy a finished block with an earlier end; returns its snapshots' number and state."""

    def flush(self) -> None: ...

    def finish(self, restart: dict, attributes: dict) -> None:
        """Add the last state and attributes, mark the file complete and close it."""

    def close(self) -> None: ...

    def check(self, path: Path) -> Header:
        """Return the header of the finished file, now at ``path``, and flush it to the disk.

        Raises:
            ValueError: the file is unusable.
        """


class Block(ABC):
    """One block of members that is being computed.

    Args:
        unit: the members.
        books: ledger of the stage.
        session: run folder, stop flag, device, provenance.
        domain: the ranks that share one field; the first rank writes.
    """

    record_steps: Sequence[int]  # increasing
    first_step = 0
    stride = 1  # steps that must be taken together

    def __init__(self, unit, books, session, domain):
        self.unit, self.books, self.session, self.domain = unit, books, session, domain
        self.writer: Writer | None = None  # writer of the unfinished file; first rank only

    @property
    @abstractmethod
    def step_index(self) -> int:
        """Return the steps taken since t = 0."""

    @abstractmethod
    def initialise(self) -> None:
        """Start from the initial state."""

    @abstractmethod
    def advance(self, steps: int) -> None:
        """Advance by ``steps``, a multiple of ``stride``."""

    @abstractmethod
    def record(self) -> tuple[dict, dict, dict]:
        """Return fields (B, n, n), scalars (B,) and references (C, n, n) at the present time."""

    @abstractmethod
    def save_state(self) -> dict:
        """Return numpy arrays from which ``load_state`` continues bit for bit."""

    @abstractmethod
    def load_state(self, state: dict) -> None: ...

    @abstractmethod
    def open_writer(self, path: Path) -> Writer:
        """Return the writer of the unfinished file."""

    def certificate(self) -> dict:
        """Return the certificate of the block (collective).

        Raises:
            RuntimeError: the block must not be published.
        """
        return {}

    def cost(self) -> dict:
        """Return wall seconds by part, for the provenance."""
        return {}

    # the loop

    def run(self, claim, checkpoint_every: float) -> None:
        """Compute and publish the block.

        Args:
            claim: claim on the unit.
            checkpoint_every: seconds between restart files.
        """
        stage, run = self.books.stage, self.books.run
        folder = run.restart(stage, self.unit)
        with atomic.disk_errors(run.product(stage, self.unit)):
            try:
                with hdf5.hdf5_errors(folder / "working.h5"):
                    self._attempt(claim, checkpoint_every)
            except atomic.DamagedFile as error:
                # A process killed while it writes can leave a working file that only looks sound.
                if str(folder) not in str(error):
                    raise
                atomic.remove(folder)
                if self.domain.size > 1:  # other ranks saw no error: leave it to the next attempt
                    raise
                log.get().warning(f"{stage} {self.unit}: starts anew: {error}")
                self._attempt(claim, checkpoint_every)

    def _attempt(self, claim, checkpoint_every: float) -> None:
        writer, index = self._start()
        try:
            self._loop(claim, checkpoint_every, writer, index)
        finally:
            if writer is not None:
                writer.close()

    def _loop(self, claim, checkpoint_every, writer, index):
        stop, steps = self.session.stop, self.record_steps
        saved = time.monotonic()
        batch = self.stride
        # a later end without another snapshot: the copied product's state is the last one
        state = self.save_state() if index == len(steps) else {}
        label = f"{self.books.stage} {self.unit}"
        total, done = steps[-1] - self.first_step, self.step_index - self.first_step
        with log.Progress(total, label, initial=done, show=self.domain.root) as bar:
            while index < len(steps):
                while self.step_index < steps[index]:
                    began = time.monotonic()
                    count = min(batch, steps[index] - self.step_index)
                    self.advance(count)
                    bar.update(count)
                    claim.refresh()
                    now = time.monotonic()
                    if self.domain.size == 1 and now - began < 0.1 * LOOK_EVERY:
                        batch *= 2
                    if self.domain.size > 1:
                        batch = 100 * self.stride
                    due = now - saved > checkpoint_every
                    if self.domain.size == 1 and not (due or stop.requested):
                        continue
                    due = self.domain.bcast(due)
                    stopping = stop.agree(self.domain)
                    if due or stopping:
                        self._save(writer, index)
                        saved = time.monotonic()
                    if stopping:
                        raise Stopped(stop.reason)
                if index == len(steps) - 1:
                    state = self.save_state()
                snapshot = self.record()
                if writer is not None:
                    writer.write(index, *snapshot)
                index += 1
        self._publish(writer, state, claim)

    def _start(self):
        """Return the writer (on the first rank) and the index of the next snapshot."""
        run, stage = self.books.run, self.books.stage
        writer, restart = None, None
        if self.domain.root:
            folder, is_new = self.books.open_restart(self.unit)
            working = folder / "working.h5"
            if not is_new and not working.exists():  # killed while it published
                atomic.adopt(run.product(stage, self.unit), working)
            writer = self.open_writer(working)
            restart = self._restart_point(writer, is_new)
        restart = self.domain.bcast(restart)
        self.writer = writer
        if restart is None:
            self.initialise()
            return writer, 0
        index, state = restart
        self.load_state(state)
        log.get().info(f"{stage} {self.unit}: continue from step {self.step_index}")
        return writer, index

    def _restart_point(self, writer, is_new: bool):
        """Return (next snapshot, state) of the newest sound restart file, or of a shorter product.

        None if there is neither. A new folder has no restart files.
        """
        stage, run = self.books.stage, self.books.run
        if writer.continued:
            for path in sorted(run.restart(stage, self.unit).glob("step_*.h5"), reverse=True):
                try:
                    with hdf5.open_hdf5(path) as file:
                        if file.attrs["recipe_hash"] != self.books.recipe:
                            continue
                        index = int(file.attrs["next_snapshot"])
                        state = {name: file[name][()] for name in file}
                        if file.attrs["sha256"] != _digest(state):
                            raise atomic.DamagedFile(f"{path}: damaged restart file")
                        return index, state
                except atomic.DamagedFile as error:
                    log.get().warning(f"not used: {error}")
        elif (
            not is_new
        ):  # restart files of another working file refer to snapshots that this one lacks
            for path in run.restart(stage, self.unit).glob("step_*.h5"):
                path.unlink()
        product = run.product(stage, self.unit)
        if not (self.unit.extends and product.exists()):
            return None
        return writer.continue_from(product)

    def _save(self, writer, index) -> None:
        state = self.save_state()
        if not self.domain.root:
            return
        writer.flush()
        # The restart file refers to these snapshots, so they must reach the disk before it.
        atomic.fsync(writer.path)
        path = self.books.run.restart(self.books.stage, self.unit, self.step_index)
        with atomic.publish(path) as part, hdf5.open_hdf5(part, "w") as file:
            for name, value in state.items():
                file[name] = value
            file.attrs["next_snapshot"] = index
            file.attrs["recipe_hash"] = self.books.recipe
            file.attrs["sha256"] = _digest(state)
        for old in sorted(path.parent.glob("step_*.h5"))[:-2]:
            old.unlink()

    def _publish(self, writer, state, claim) -> None:
        certificate = self.certificate()
        if not self.domain.root:
            return
        claim.confirm()  # before the working file is moved, which a new owner would continue
        record = {**self.session.record, "seconds": self.cost()}
        with self.books.publish(self.unit, writer.check, claim=claim) as part:
            writer.finish(
                restart=state,
                attributes={
                    "recipe_hash": self.books.recipe,
                    "holds": json.dumps(self.books.holds, sort_keys=True),
                    "certificate": json.dumps(certificate),
                    "provenance": json.dumps(record),
                },
            )
            writer.path.rename(part)


def _digest(state: dict) -> str:
    """Return the SHA-256 of the arrays of a restart file."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(state[name]).tobytes())
    return digest.hexdigest()


def record_steps(start: float, stop: float, every: float, dt: float) -> range:
    """Return the step numbers of the stored times start, start + every, ..., stop."""
    return range(round(start / dt), round(stop / dt) + 1, round(every / dt))


def times_of(steps: Sequence[int], dt: float) -> np.ndarray:
    """Return the times of steps of length ``dt``."""
    return np.array([step * dt for step in steps])
