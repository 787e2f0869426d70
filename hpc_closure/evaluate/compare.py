"""Further closures that answer beside the model: ``evaluate.compare: {name: run or file}``.

The opponents of ``train.opponents`` that are trained stand there by themselves.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpc_closure.closure.artifact import Closure
from hpc_closure.closure.match import check_fits, is_made_by
from hpc_closure.data.reader import CoupledEnsemble
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run, model_at, run_at
from hpc_closure.experiment.opponents import opponents_of
from hpc_closure.experiment.schema import Experiment
from hpc_closure.work.units import Ledger

# of rollouts that are compared
SETTINGS = ("cases", "t_start", "every", "interval", "sensors", "last_closures")


@dataclass(frozen=True)
class Compared:
    """A closure beside the model.

    Attributes:
        name: of its rows.
        path: of the model file.
        run: the run that it is of; None for a file or a shipped model.
    """

    name: str
    path: Path
    run: Run | None

    @property
    def experiment(self) -> Experiment | None:
        """Settings of its run."""
        if self.run is None or not self.run.config.exists():
            return None
        return reading.load(self.run.config)

    def evaluations(self, closure: Closure) -> int:
        """Evaluations of its generator in its coupled run."""
        experiment = self.experiment
        return closure.evaluations(experiment.rollout.sampler.evaluations if experiment else None)

    @property
    def paths(self) -> list[Path]:
        """Files that its rows are made from."""
        blocks = self.run.rollout.glob("block_*.h5") if self.run else ()
        return [self.path, *blocks]


def chosen(experiment: Experiment) -> list[Compared]:
    """The closures of ``evaluate.compare``, and the run's opponents.

    Raises:
        ValueError: one is not there, not whole, or of another problem; of the opponents only those
            are taken that are there.
    """
    found = []
    opponents = {
        name: str(opponent.folder)
        for name, opponent in opponents_of(experiment).items()
        if is_made_by(Run.of(opponent).model, opponent)
    }
    for name, value in {**opponents, **experiment.evaluate.compare}.items():
        folder = run_at(experiment.folder, value)
        path = model_at(experiment.folder, value)
        if folder is not None:
            used = (
                Run.of(reading.load(folder.config)).model_file if folder.config.exists() else None
            )
            path = used or folder.model
        check_fits(path, experiment, f"evaluate.compare.{name}={value}")
        found.append(Compared(name, path, folder))
    return found


def missing(experiment: Experiment) -> list[str]:
    """Opponents of the run that are not trained."""
    there = {one.name for one in chosen(experiment)}
    return [name for name in opponents_of(experiment) if name not in there]


def coupled(
    one: Compared, experiment: Experiment, ensemble: CoupledEnsemble
) -> CoupledEnsemble | str:
    """The coupled ensemble of a compared closure, or why it cannot stand beside ``ensemble``."""
    other = one.experiment
    if one.run is None or other is None:
        return "a model file has no coupled run; name a run that has one"
    if reason := _differs(other, experiment):
        return reason
    books = Ledger.of(other, "rollout")
    books.run = one.run  # the folder may have been moved
    if reason := books.incomplete(books.survey()):
        return reason
    theirs = CoupledEnsemble([product.path for product in books.products()])
    if theirs.cases != ensemble.cases:
        return f"its coupled runs start from members {theirs.cases}, here {ensemble.cases}"
    there, here = (each.read("truth", 0) for each in (theirs, ensemble))
    if there.shape != here.shape or not np.allclose(there, here, rtol=1e-5):
        return "its coupled runs start from other states"
    return theirs


def _differs(other: Experiment, experiment: Experiment) -> str:
    """The first setting in which a coupled run is another problem; "" where there is none."""
    if other.stage_hash("generate") != experiment.stage_hash("generate"):
        rows = reading.differences(
            other.stage_settings("generate"), experiment.stage_settings("generate")
        )
        key, there, here = rows[0]
        return f"its data have {key}={there}, here {here}"
    pairs: list[tuple[str, Any, Any]] = [
        ("train.split", list(other.train.split), list(experiment.train.split)),
        ("train.grid", other.train_grid, experiment.train_grid),
        *(
            (f"rollout.{key}", getattr(other.rollout, key), getattr(experiment.rollout, key))
            for key in SETTINGS
        ),
    ]
    for key, there, here in pairs:
        if there != here:
            return f"its coupled run has {key}={there}, here {here}"
    if other.rollout.t_end < experiment.rollout.t_end:
        return (
            f"its coupled run ends at {other.rollout.t_end:g}, here {experiment.rollout.t_end:g}"
        )
    return ""
