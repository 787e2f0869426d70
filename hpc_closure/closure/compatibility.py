"""Check that a model file fits an experiment."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_closure.closure.header import read_header, shipped
from hpc_closure.experiment.choices import Choices
from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.kinds import equation_of
from hpc_closure.experiment.models import draws, is_composite
from hpc_closure.experiment.schema import Experiment
from hpc_closure.spectral.modes.resolution import alike, smallest_grid
from hpc_closure.work.session import check_recipe


def is_made_by(path: Path, experiment: Experiment) -> bool:
    """Return whether the experiment's training has made the model at ``path``.

    Raises:
        ValueError: the file is not a complete model file.
    """
    return path.exists() and read_header(path).train_hash == experiment.stage_hash("train")


def has_mean_gp(config: Mapping[str, Any]) -> bool:
    """Return whether models of a configuration can draw by the method ``mean_gp``.

    It needs a mean and a Gaussian law beside the generator.
    """
    return is_composite(dict(config))


def has_noise(config: Mapping[str, Any]) -> bool:
    """Return whether models of a configuration draw; the others are deterministic."""
    return draws(dict(config))


def check_model(experiment: Experiment) -> None:
    """Raise ValueError unless the model that the experiment trains or uses exists and fits."""
    run = Run.of(experiment)
    if run.model_file:
        key = f"use.model={experiment.use.model}"
        check_fits(run.model_file, experiment, key)
        read = read_header(run.model_file).config.get("conditions", {}).get("sensors", "none")
        for name in ("rollout", "evaluate"):
            if getattr(experiment, name).sensors and read == "none":
                raise ValueError(
                    f"{key}: trained with conditions.sensors=none, but {name}.sensors is set: "
                    "remove it, or use a model with conditions.sensors=optional"
                )
        return None
    if not run.model.exists():
        raise ValueError(f"{run.model}: no trained model; run `hpc-closure train` first")
    if not is_made_by(run.model, experiment):
        # names the changed keys if it can
        check_recipe(run, experiment, "rollout", overwrite=True)
        made, wanted = read_header(run.model).train_hash, experiment.stage_hash("train")
        raise ValueError(
            f"{run.model}: trained by another experiment (hash {made[:12] or 'none'}, expected "
            f"{wanted[:12]}); change `name`, or run `hpc-closure train --overwrite`"
        )


def check_fits(path: Path, experiment: Experiment, key: str) -> None:
    """Raise ValueError unless a model from elsewhere fits the experiment.

    Args:
        path: path of the model file.
        experiment: the experiment that uses it.
        key: setting that names the model, with its value, for the message.
    """
    if not path.exists():
        raise ValueError(
            f"{key}: no run, file or shipped model of this name "
            f"(shipped: {', '.join(shipped()) or 'none'}; looked for {path})"
        )
    header, generate = read_header(path), experiment.generate
    equation = equation_of(header.config)
    for name, have, want in (
        ("closure", header.target["kind"], generate.closure),
        ("dt", header.target["dt"], generate.dt),
        ("interval", header.target["interval"], generate.interval),
        ("length", header.length, alike(experiment.physics.length)),
        ("dimensions", header.config.get("dimensions", 2), experiment.physics.dimensions),
        (
            "state",
            ", ".join(equation.channel_names) if equation else "one field",
            ", ".join(experiment.physics.channel_names) or "one field",
        ),
    ):
        if have != want:
            raise ValueError(f"{key}: its {name} is {have}, the experiment's is {want}")
    if generate.closure == "subgrid" and experiment.train_grid != header.size:
        raise ValueError(
            f"{key}: its closure corrects a solver on {header.size}^2, the experiment's one "
            f"on {experiment.train_grid}^2: train on that grid"
        )
    made, wanted = header.target.get("stride", 1), Choices(experiment).stride
    if made != wanted:
        raise ValueError(
            f"{key}: its closure corrects a solver with time steps of {made} DNS step(s), the "
            f"experiment's has {wanted}: set reduced.step, or train again"
        )
    least = smallest_grid(header.size)
    for grid in (experiment.train_grid, *experiment.score_grids):
        if grid < least:
            raise ValueError(
                f"{key}: trained at {header.size}^2, it needs a grid of at least "
                f"{least}^2; got {grid}^2"
            )
