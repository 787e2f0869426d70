"""Trajectories that no training uses: the starts, their truth and the snapshots that are scored.

They are the test members of a run's data or, with ``use.test``, all members of a second data set.
That set is the same problem drawn by another seed; nothing was fitted or chosen on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_closure.experiment import reading
from hpc_closure.experiment.checks import check_members
from hpc_closure.experiment.choices import Choices
from hpc_closure.experiment.folder import Run, run_at
from hpc_closure.experiment.schema import Experiment, Replicas
from hpc_closure.work.units import Ledger

if TYPE_CHECKING:
    from hpc_closure.data.reader import CoupledEnsemble

ALL = (0.0, 0.0, 1.0)  # split of a data set whose members are all for tests


@dataclass(frozen=True)
class HeldOut:
    """The source of starts, truth and snapshots.

    Attributes:
        experiment: experiment that made the data.
        run: its folder.
        split: shares by which :class:`~hpc_closure.data.reader.DataSet` splits the members.
        replicas: settings of the true ensemble that is read; none is read with 0 members.
        second: name in ``use.test``; "" if the data are those of the run.
    """

    experiment: Experiment
    run: Run
    split: tuple[float, float, float]
    replicas: Replicas
    second: str = ""

    @classmethod
    def of(cls, experiment: Experiment) -> HeldOut:
        """Return the held-out trajectories of an experiment.

        Raises:
            ValueError: ``use.test`` names no run.
        """
        name, run = experiment.use.test, Run.of(experiment)
        if not name:
            return cls(experiment, run, experiment.train.split, experiment.replicas)
        second_run = run_at(experiment.folder, name)
        if second_run is None or not second_run.config.exists():
            raise ValueError(
                f"use.test={name}: no run of this name under {run.root.parent}, nor the folder "
                f"of a run; `hpc-closure generate EXPERIMENT name={name} seed=... "
                "train.split=[0,0,1]` makes it"
            )
        other = reading.load(second_run.config, warn=False)
        # the folder may have been moved since the run
        other_run = replace(Run.of(other), root=second_run.root)
        replicas = other.replicas if experiment.replicas.members else Replicas()
        return cls(other, other_run, ALL, replicas, name)

    @property
    def seed(self) -> int:
        """Return the seed of the data, which keys the noise of their trajectories."""
        return self.experiment.seed

    @property
    def number(self) -> int:
        """Return the number of members that can be a start if none diverged."""
        return int(self.experiment.generate.members * self.split[2] + 1e-9)

    @property
    def paths(self) -> list[Path]:
        """Return the block files of a second data set and of its replicas."""
        stages = ("generate", "replicas") if self.second else ()
        return [path for stage in stages for path in self.run.folder(stage).glob("block_*.h5")]

    def books(self, stage: str) -> Ledger:
        """Return the ledger of ``generate`` or ``replicas``."""
        ledger = Ledger.of(self.experiment, stage)
        ledger.run = self.run
        return ledger

    def in_words(self, trajectories: int | None = None) -> str:
        """Describe the data set for the log and the report.

        Args:
            trajectories: number of its trajectories; by default all.
        """
        number = self.number if trajectories is None else trajectories
        if self.second:
            return (
                f"all {number} trajectories of the second data set {self.second} (seed "
                f"{self.seed}), none of which the model was trained on"
            )
        return f"the {number} test trajectories that train.split holds back (seed {self.seed})"


def truth_of(
    experiment: Experiment, ensemble: CoupledEnsemble
) -> tuple[CoupledEnsemble, str] | None:
    """Return the ensemble that holds the truth of a coupled run, and its name there.

    It is the trajectory of each start; where none is stored, the first replica. None if there are
    no replicas either.
    """
    from hpc_closure.data.reader import CoupledEnsemble

    if "truth" in ensemble.names:
        return ensemble, "truth"
    products = HeldOut.of(experiment).books("replicas").products()
    if not products:
        return None
    return CoupledEnsemble([product.path for product in products]), "model"


def check(experiment: Experiment) -> HeldOut:
    """Return the trajectories that ``rollout`` and ``evaluate`` read, after checking them.

    Raises:
        ValueError: there are fewer than ``rollout.initial_conditions``; or the second data set
            is of another problem, has the seed of the training data, or is incomplete.
    """
    held = HeldOut.of(experiment)
    if held.second:
        _check_problem(held, experiment)
    if experiment.rollout.initial_conditions > held.number:
        members, cases = held.experiment.generate.members, experiment.rollout.initial_conditions
        if held.second:
            raise ValueError(
                f"rollout.initial_conditions={cases}, but use.test={held.second} has {members} "
                f"trajectories to start from: lower it, or generate more there"
            )
        raise ValueError(
            f"rollout.initial_conditions={cases}, but generate.members={members} with "
            f"train.split={list(experiment.train.split)} leave {held.number} test trajectories "
            "to start from: lower it, or raise the members or the test share"
        )
    if held.second:
        _check_complete(held, experiment)
    if experiment.rollout.after_release:
        check_members(experiment, held.replicas.members)
        books = held.books("replicas")
        if reason := books.incomplete(books.survey()):
            raise ValueError(f"rollout.after_release: {reason}")
    return held


def _check_problem(held: HeldOut, experiment: Experiment) -> None:
    """Raise ValueError unless the second data set is the same problem drawn by another seed."""
    key, other = f"use.test={held.second}", held.experiment
    second_settings, own_settings = (
        each.stage_settings("generate") for each in (other, experiment)
    )
    for settings in (second_settings, own_settings):
        del settings["seed"]
        settings.pop("data", None)  # other files
        settings.pop("reduced", None)  # the step of the reduced solver is compared below
    for name, second_value, own_value in reading.differences(second_settings, own_settings):
        raise ValueError(
            f"{key}: its {name} is {second_value}, the experiment's is {own_value}; a test set is "
            "the same problem drawn by another seed"
        )
    second_value, own_value = Choices(other).stride, Choices(experiment).stride
    if second_value != own_value:
        raise ValueError(
            f"{key}: its closures are of a reduced solver that takes {second_value} step(s) of "
            f"the DNS in one, the experiment's takes {own_value}: generate it with "
            f"reduced.step={own_value}"
        )
    check_seed(held, experiment, f"seed={experiment.seed}")
    if experiment.use.model and (trained := run_at(experiment.folder, experiment.use.model)):
        if trained.config.exists():
            stored = reading.load(trained.config, warn=False)
            check_seed(held, stored, f"use.model={experiment.use.model}")


def _check_complete(held: HeldOut, experiment: Experiment) -> None:
    """Raise ValueError unless the second data set is complete and long enough."""
    key, other = f"use.test={held.second}", held.experiment
    in_place = other.data is not None and other.data.in_place
    ledger = held.books("generate")
    if not in_place and (reason := ledger.incomplete(ledger.survey())):
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
    """Raise ValueError if a model was trained on the second data set.

    Args:
        held: the trajectories that score the model.
        trained: the experiment that trained it.
        what: the setting that names the model, with its value.
    """
    mine, others = held.experiment.data, trained.data
    if mine and mine.found and others and others.found:  # files of others have no seed
        if held.second and mine.found.sha256 == others.found.sha256:
            raise ValueError(
                f"use.test={held.second}: its files are those of the training data ({what}); "
                "name a run with other files"
            )
        return
    if held.second and trained.seed == held.seed:
        raise ValueError(
            f"use.test={held.second}: its seed {held.seed} is that of the training data ({what}), "
            "so its members are the same; generate it with another seed"
        )


def _check_replicas(held: HeldOut, experiment: Experiment) -> None:
    """Raise ValueError unless the replicas of the second data set fit the rollout's starts."""
    key, other, rollout = f"use.test={held.second}", held.experiment, experiment.rollout
    way_out = "generate them there, or set replicas.members=0 to go without a true ensemble"
    if not other.replicas.members:
        raise ValueError(f"{key}: it has no replicas; {way_out}")
    equal_settings = {
        "train.split": (list(other.train.split), list(ALL)),
        "rollout.t_start": (other.rollout.t_start, rollout.t_start),
        "rollout.every": (other.rollout.every, rollout.every),
    }
    for name, (second_value, own_value) in equal_settings.items():
        if second_value != own_value:
            raise ValueError(
                f"{key}: its replicas are made with {name}={second_value}, needed is {own_value}; "
                f"{way_out}"
            )
    for name, second_value, required in (
        (
            "rollout.initial_conditions",
            other.rollout.initial_conditions,
            rollout.initial_conditions,
        ),
        ("rollout.t_end", other.rollout.t_end, rollout.t_end),
    ):
        if second_value < required:
            raise ValueError(
                f"{key}: its replicas are made with {name}={second_value:g}, needed is at least "
                f"{required:g}; {way_out}"
            )
    ledger = held.books("replicas")
    if reason := ledger.incomplete(ledger.survey()):
        raise ValueError(f"{key}: {reason}")
