"""Closures scored beside the run's model: ``evaluate.compare: {name: run or file}``.

Trained opponents of ``train.opponents`` are added without being named.

The runs of ``evaluate.seeds: {name: [run, run, ...]}`` differ only in the seed of the training.
They are scored as methods ``name#1``, ``name#2`` and so on; :func:`join` averages their rows into
rows of the method ``name``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc_closure.closure.artifact import Closure
from hpc_closure.closure.compatibility import check_fits, is_made_by
from hpc_closure.data.held_out import HeldOut, check_seed
from hpc_closure.data.reader import CoupledEnsemble
from hpc_closure.evaluate.rows import MARK
from hpc_closure.evaluate.scores.paired import DIFFERENCES
from hpc_closure.evaluate.scores.table import Scored
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run, model_at, run_at
from hpc_closure.experiment.opponents import opponents_of
from hpc_closure.experiment.schema import Experiment
from hpc_closure.spectral.modes.grid import to_spectra
from hpc_closure.spectral.modes.resolution import retained_modes
from hpc_closure.work.units import Ledger

# keys of ``rollout`` that must be equal in two runs whose coupled ensembles are compared
SETTINGS = (
    "initial_conditions",
    "t_start",
    "after_release",
    "every",
    "interval",
    "sensors",
    "last_closures",
)


@dataclass(frozen=True)
class Compared:
    """A closure that is scored beside the run's model.

    Attributes:
        name: method name in the score rows.
        path: model file.
        run: run folder of the model; None for a plain model file or a shipped model.
    """

    name: str
    path: Path
    run: Run | None

    @property
    def experiment(self) -> Experiment | None:
        """Experiment of the closure's run; None without a run or without its ``config.yaml``."""
        if self.run is None or not self.run.config.exists():
            return None
        return reading.load(self.run.config, warn=False)

    def evaluations(self, closure: Closure) -> int:
        """Return the number of generator evaluations per sample in the closure's coupled run."""
        experiment = self.experiment
        return closure.evaluations(
            experiment.rollout.sampler.function_evaluations if experiment else None
        )

    @property
    def paths(self) -> list[Path]:
        """Model file and coupled-run files from which its rows are computed."""
        blocks = self.run.rollout.glob("block_*.h5") if self.run else ()
        return [self.path, *blocks]


def chosen(experiment: Experiment) -> list[Compared]:
    """List the closures of ``evaluate.compare`` and ``evaluate.seeds`` and the trained opponents.

    Opponents that are not trained are left out.

    Raises:
        ValueError: a closure is missing, incomplete or made for another problem.
    """
    test_set, settings = HeldOut.of(experiment), experiment.evaluate
    opponents = {
        name: str(opponent.folder)
        for name, opponent in opponents_of(experiment).items()
        if is_made_by(Run.of(opponent).model, opponent)
    }
    closures = [
        _named(name, value, experiment, test_set, f"evaluate.compare.{name}={value}")
        for name, value in {**opponents, **settings.compare}.items()
    ]
    for name, values in settings.seeds.items():
        key = f"evaluate.seeds.{name}"
        runs = [
            _named(one_of(name, number), value, experiment, test_set, f"{key}={value}")
            for number, value in enumerate(values, 1)
        ]
        _check_seeds(key, values, runs)
        closures += runs
    return closures


def missing(experiment: Experiment) -> list[str]:
    """List the names of the run's opponents that are not trained."""
    trained = {compared.name for compared in chosen(experiment)}
    return [name for name in opponents_of(experiment) if name not in trained]


def _named(name: str, value: str, experiment: Experiment, test_set: HeldOut, key: str) -> Compared:
    """Locate the closure of a run, a file or a shipped model and check that it fits.

    ``key`` is the setting that names it, for the error message.
    """
    folder = run_at(experiment.folder, value)
    path = model_at(experiment.folder, value)
    if folder is not None:
        other = reading.load(folder.config, warn=False) if folder.config.exists() else None
        path = (Run.of(other).model_file if other else None) or folder.model
        if other:
            check_seed(test_set, other, key)
        finer = other and other.train_grid != experiment.train_grid
        if other and finer and other.known_grid == experiment.known_grid:
            check_fits(path, other, key)
            return Compared(name, path, folder)
    check_fits(path, experiment, key)
    return Compared(name, path, folder)


def _check_seeds(key: str, values: Sequence[str], runs: Sequence[Compared]) -> None:
    """Raise ValueError unless the runs differ in ``train.seed`` and in nothing else."""
    settings, seeds = [], []
    for value, run in zip(values, runs, strict=True):
        experiment = run.experiment
        if experiment is None or experiment.use.model:
            raise ValueError(f"{key}={value}: no run that trained a model of its own")
        train_seed = experiment.train.seed
        seeds.append(experiment.seed if train_seed is None else train_seed)
        settings.append(experiment.stage_settings("train"))
        settings[-1]["train"].pop("seed", None)
        for name, first, here in reading.differences(settings[0], settings[-1]):
            raise ValueError(
                f"{key}: {values[0]} has {name}={first}, {value} has {here}; the runs of one row "
                "differ in train.seed alone"
            )
        if seeds[-1] in seeds[:-1]:
            raise ValueError(
                f"{key}: {values[seeds.index(seeds[-1])]} and {value} both have "
                f"train.seed={seeds[-1]}: they are one training"
            )


def coupled(
    compared: Compared, experiment: Experiment, ensemble: CoupledEnsemble
) -> CoupledEnsemble | str:
    """Open the coupled ensemble of a compared closure.

    Returns:
        The ensemble, or the reason why it cannot be compared with ``ensemble``.
    """
    other = compared.experiment
    if compared.run is None or other is None:
        return "a model file has no coupled run; name a run that has one"
    if reason := _differs(other, experiment):
        return reason
    books = Ledger.of(other, "rollout")
    books.run = compared.run  # the folder may have been moved
    if reason := books.incomplete(books.survey()):
        return reason
    theirs = CoupledEnsemble([product.path for product in books.products()])
    if theirs.cases != ensemble.cases:
        return f"its coupled runs start from members {theirs.cases}, here {ensemble.cases}"
    modes = retained_modes(experiment.known_grid)
    sides = experiment.physics.dimensions
    there, here = (_resolved(each.read("truth", 0), modes, sides) for each in (theirs, ensemble))
    if there.shape != here.shape or not np.allclose(there, here, rtol=1e-5, atol=1e-6):
        return "its coupled runs start from other states"
    return theirs


def _resolved(fields: np.ndarray, modes: int, sides: int) -> np.ndarray:
    """Compute spectra, truncated to ``modes``, of fields (..., n, n)."""
    return to_spectra(torch.from_numpy(fields).double(), modes, sides).numpy()


def _differs(other: Experiment, experiment: Experiment) -> str:
    """Name the first setting in which two coupled runs differ; "" if there is none."""
    try:
        theirs, ours = HeldOut.of(other), HeldOut.of(experiment)
    except ValueError as error:
        return str(error)
    there, here = (test_set.experiment.stage_settings("generate") for test_set in (theirs, ours))
    # runs whose solvers have different grids are comparable: the modes of the start are the same
    for settings in (there, here):
        settings.pop("reduced", None)
        del settings["generate"]["record"]["grid"]
    for key, their_value, our_value in reading.differences(there, here):
        return f"its data have {key}={their_value}, here {our_value}"
    pairs: list[tuple[str, Any, Any]] = [
        ("train.split", list(theirs.split), list(ours.split)),
        ("reduced.known", other.known_grid, experiment.known_grid),
        *(
            (f"rollout.{key}", getattr(other.rollout, key), getattr(experiment.rollout, key))
            for key in SETTINGS
        ),
    ]
    conditioned = experiment.generate.closure == "subgrid" and experiment.rollout.sensors
    for key, there, here in pairs:
        if key == "rollout.sensors" and conditioned:
            continue  # the truth is the start's own trajectory, whatever a run reads of it
        if key == "rollout.sensors" and there and experiment.generate.closure == "subgrid":
            return (
                "its coupled run reads sensors, so its truth is the start's own trajectory: name "
                "this run in its evaluate.compare"
            )
        if there != here:
            return f"its coupled run has {key}={there}, here {here}"
    if other.rollout.t_end < experiment.rollout.t_end:
        return (
            f"its coupled run ends at {other.rollout.t_end:g}, here {experiment.rollout.t_end:g}"
        )
    return ""


KEY = ("lead_time", "shell", "score", "channel")


def one_of(name: str, number: int) -> str:
    """Return the method name of training ``number`` (from 1) of a row of ``evaluate.seeds``."""
    return f"{name}{MARK}{number}"


def join(scored: Scored, seeds: Mapping[str, Sequence[str]]) -> None:
    """Add the mean rows, spectra and fluxes of ``evaluate.seeds`` to ``scored``, in place.

    A row of which a training has no scores gets a note instead of numbers.
    """
    for name, runs in seeds.items():
        each = [one_of(name, number) for number in range(1, len(runs) + 1)]
        for note in [note for note in scored.absent if note.method in each]:
            reason = f"{note.method}: {note.reason}"
            scored.absent.append(replace(note, method=name, reason=reason))
        by_key: dict[tuple, list[dict]] = {}
        for record in scored.records:
            if record["method"] in each:
                by_key.setdefault(tuple(record.get(key) for key in KEY), []).append(record)
        scored.records += [
            _joined(name, records) for records in by_key.values() if len(records) == len(each)
        ]
        parts = [scored.spectra, scored.spread_spectra]
        for by_name in (scored.fluxes, scored.transfer, scored.coherences):
            parts += by_name.values()
        for part in parts:
            if set(each) <= set(part):
                part[name] = torch.stack([part[method] for method in each]).mean(0)


def _joined(name: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average the records of all trainings into one; its interval is their range."""
    values = [float(record["value"]) for record in records]
    ends = [(value, value) for value in values]
    if records[0]["score"] in DIFFERENCES:
        ends = [(float(record["low"]), float(record["high"])) for record in records]
    lows, highs = zip(*ends, strict=True)
    unknown = any(math.isnan(end) for end in (*lows, *highs))
    return {
        **records[0],
        "method": name,
        "value": (
            math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.inf
        ),
        "low": math.nan if unknown else min(lows),
        "high": math.nan if unknown else max(highs),
        "seeds": len(records),
    }


def shown(scored: Scored) -> Scored:
    """Return a copy for report and figures, without the rows of single trainings."""

    def without(part: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in part.items() if MARK not in name}

    return replace(
        scored,
        records=[record for record in scored.records if MARK not in record["method"]],
        absent=[note for note in scored.absent if MARK not in note.method],
        spectra=without(scored.spectra),
        spread_spectra=without(scored.spread_spectra),
        fluxes={name: without(part) for name, part in scored.fluxes.items()},
        transfer={name: without(part) for name, part in scored.transfer.items()},
        coherences={name: without(part) for name, part in scored.coherences.items()},
        ranks=without(scored.ranks),
        examples=without(scored.examples),
    )
