"""Trajectories that no training sees: the starts, their truth and the snapshots that are scored.

They are the test members of a run's own data or, with ``use.test``, all members of a second data
set: the same problem drawn by another seed, on which nothing was fitted and nothing chosen.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from hpc_closure.experiment import reading
from hpc_closure.experiment.checks import check_members
from hpc_closure.experiment.choices import Choices
from hpc_closure.experiment.folder import Run, run_at
from hpc_closure.experiment.schema import Experiment, Replicas
from hpc_closure.work.units import Ledger

ALL = (0.0, 0.0, 1.0)  # the split of a data set whose members are all for tests


@dataclass(frozen=True)
class HeldOut:
    """Where starts, truth and snapshots are from.

    Attributes:
        experiment: that made the data.
        run: its folder.
        split: shares by which :class:`~hpc_closure.data.reader.DataSet` chooses the members.
        replicas: what is read of the true ensemble; none of it with 0 members.
        second: what ``use.test`` names; "" where the data are the run's own.
    """

    experiment: Experiment
    run: Run
    split: tuple[float, float, float]
    replicas: Replicas
    second: str = ""

    @classmethod
    def of(cls, experiment: Experiment) -> "HeldOut":
        """Of an experiment. ValueError where ``use.test`` names no run."""
        name, run = experiment.use.test, Run.of(experiment)
        if not name:
            return cls(experiment, run, experiment.train.split, experiment.replicas)
        there = run_at(experiment.folder, name)
        if there is None or not there.config.exists():
            raise ValueError(
                f"use.test={name}: no run of this name under {run.root.parent}, and no folder of "
                f"one; `hpc-closure generate EXPERIMENT name={name} seed=... "
                "train.split=[0,0,1]` makes it"
            )
        other = reading.load(there.config)
        # the folder may have been moved
        other_run = replace(Run.of(other), root=there.root)
        replicas = other.replicas if experiment.replicas.members else Replicas()
        return cls(other, other_run, ALL, replicas, name)

    @property
    def seed(self) -> int:
        """Of the data: what keys the noise of their trajectories."""
        return self.experiment.seed

    @property
    def number(self) -> int:
        """Members that may be a start, if none diverged."""
        return int(self.experiment.generate.members * self.split[2] + 1e-9)

    @property
    def paths(self) -> list[Path]:
        """Blocks of a second data set and of its replicas."""
        stages = ("generate", "replicas") if self.second else ()
        return [path for one in stages for path in self.run.folder(one).glob("block_*.h5")]

    def books(self, stage: str) -> Ledger:
        """Of ``generate`` or ``replicas``."""
        books = Ledger.of(self.experiment, stage)
        books.run = self.run
        return books

    def in_words(self, trajectories: int | None = None) -> str:
        """Which data set it is; ``trajectories`` is their number, all by default."""
        number = self.number if trajectories is None else trajectories
        if self.second:
            return (
                f"all {number} trajectories of the second data set {self.second} (seed "
                f"{self.seed}), none of which the model was trained on"
            )
        return f"the {number} test trajectories that train.split holds back (seed {self.seed})"


def check(experiment: Experiment) -> HeldOut:
    """The trajectories that ``rollout`` and ``evaluate`` read.

    Raises:
        ValueError: there are fewer than ``rollout.cases``; or the second data set is of another
            problem, of the seed that trained, or not whole.
    """
    held = HeldOut.of(experiment)
    if held.second:
        _check_problem(held, experiment)
    if experiment.rollout.cases > held.number:
        members, cases = held.experiment.generate.members, experiment.rollout.cases
        if held.second:
            raise ValueError(
                f"rollout.cases={cases}, but use.test={held.second} has {members} trajectories "
                f"to start from: lower it, or generate more there"
            )
        raise ValueError(
            f"rollout.cases={cases}, but generate.members={members} with "
            f"train.split={list(experiment.train.split)} leave {held.number} test trajectories "
            "to start from: lower it, or raise the members or the test share"
        )
    if held.second:
        _check_whole(held, experiment)
    if experiment.rollout.after_release:
        check_members(experiment, held.replicas.members)
        books = held.books("replicas")
        if reason := books.incomplete(books.survey()):
            raise ValueError(f"rollout.after_release: {reason}")
    return held


def _check_problem(held: HeldOut, experiment: Experiment) -> None:
    """The second data set must be the same problem, drawn by a seed that trained nothing."""
    key, other = f"use.test={held.second}", held.experiment
    theirs, here = (one.stage_settings("generate") for one in (other, experiment))
    for settings in (theirs, here):
        del settings["seed"]
        settings.pop("reduced", None)  # the step that was found is compared below
    for name, there, own in reading.differences(theirs, here):
        raise ValueError(
            f"{key}: its {name} is {there}, the experiment's is {own}; a test set is the same "
            "problem drawn by another seed"
        )
    there, own = Choices(other).stride, Choices(experiment).stride
    if there != own:
        raise ValueError(
            f"{key}: its closures are of a reduced solver that takes {there} step(s) of the DNS "
            f"in one, the experiment's takes {own}: generate it with reduced.step={own}"
        )
    check_seed(held, experiment, f"seed={experiment.seed}")
    if experiment.use.model and (trained := run_at(experiment.folder, experiment.use.model)):
        if trained.config.exists():
            check_seed(held, reading.load(trained.config), f"use.model={experiment.use.model}")


def _check_whole(held: HeldOut, experiment: Experiment) -> None:
    """All of the second data set must be there, for long enough."""
    key, other = f"use.test={held.second}", held.experiment
    books = held.books("generate")
    if reason := books.incomplete(books.survey()):
        raise ValueError(f"{key}: {reason}")
    last = experiment.rollout.t_end
    if other.generate.closure == "subgrid" and other.generate.t_end < last - 1e-9:
        raise ValueError(
            f"{key}: its generate.t_end is {other.generate.t_end:g}, but the truth is needed to "
            f"rollout.t_end={last:g}: generate longer there"
        )
    if experiment.replicas.members:
        _check_replicas(held, experiment)


def check_seed(held: HeldOut, trained: Experiment, what: str) -> None:
    """Raise ValueError when a model was trained on the second data set.

    Args:
        held: the trajectories that score it.
        trained: the experiment that trained it.
        what: setting that names it, with its value.
    """
    if held.second and trained.seed == held.seed:
        raise ValueError(
            f"use.test={held.second}: its seed {held.seed} is that of the training data ({what}), "
            "so its members are the same; generate it with another seed"
        )


def _check_replicas(held: HeldOut, experiment: Experiment) -> None:
    """The true ensemble of the second data set must begin at the starts of the rollout."""
    key, other, rollout = f"use.test={held.second}", held.experiment, experiment.rollout
    way_out = "generate them there, or set replicas.members=0 to go without a true ensemble"
    if not other.replicas.members:
        raise ValueError(f"{key}: it has no replicas; {way_out}")
    wanted = {
        "train.split": (list(other.train.split), list(ALL)),
        "rollout.t_start": (other.rollout.t_start, rollout.t_start),
        "rollout.every": (other.rollout.every, rollout.every),
    }
    for name, (there, here) in wanted.items():
        if there != here:
            raise ValueError(
                f"{key}: its replicas are made with {name}={there}, needed is {here}; {way_out}"
            )
    for name, there, least in (
        ("rollout.cases", other.rollout.cases, rollout.cases),
        ("rollout.t_end", other.rollout.t_end, rollout.t_end),
    ):
        if there < least:
            raise ValueError(
                f"{key}: its replicas are made with {name}={there:g}, needed is at least "
                f"{least:g}; {way_out}"
            )
    books = held.books("replicas")
    if reason := books.incomplete(books.survey()):
        raise ValueError(f"{key}: {reason}")
