"""Opponents of a generator: closures without one, each an experiment beside the run's own.

``train.opponents`` names presets of the model. Each is trained on the data of the run, coupled
from the same starts, and compared in every table: a run of its own in RUN/opponents/NAME.
"""

from pathlib import Path

from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.schema import Conditions, Experiment, Use

FIRST = "gaussian_modes"  # whose mean the others take, where it is an opponent, too
AFTER_MEAN = 0.6  # share of the steps that are for what is about a mean
# sizes of networks that an opponent has as the model has them
SIZES = ("width", "modes", "mean_layers", "memory", "library")

__all__ = ["folder_of", "opponents_of"]


def opponents_of(experiment: Experiment) -> dict[str, Experiment]:
    """The experiments of ``train.opponents`` by name; none where the model is another run's."""
    if experiment.use.model:
        return {}
    return {name: _experiment(experiment, name) for name in experiment.train.opponents}


def folder_of(experiment: Experiment, name: str) -> Path:
    """Run folder of an opponent."""
    return Run.of(experiment).opponents / name


def _experiment(experiment: Experiment, name: str) -> Experiment:
    run, plain = Run.of(experiment), experiment.model_dump()
    data = run.data_root or run.root
    conditions = {**plain["model"]["conditions"], "sensors": "none"}
    sizes = {key: plain["model"][key] for key in SIZES if plain["model"][key] is not None}
    plain["model"] = {"preset": name, "conditions": Conditions(**conditions), **sizes}
    mean = FIRST if name != FIRST and FIRST in experiment.train.opponents else None
    steps = experiment.train.steps
    plain |= {"base": None, "name": name, "root": str(run.opponents)}
    plain["use"] = Use(data=str(data), mean=mean)
    plain["train"] |= {"opponents": (), "trajectory": None}
    plain["train"] |= {"steps": max(1, round(AFTER_MEAN * steps)) if mean else steps}
    plain["replicas"] = {}
    plain["rollout"] |= {"references": (), "sensors": None}
    plain["evaluate"] |= {"compare": {}, "sensors": (), "event": None}
    return Experiment.model_validate(plain)
