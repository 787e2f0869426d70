"""Build the experiments of the opponents: closures without a generator, as a comparison.

``train.opponents`` names model presets. Each opponent is trained on the data of the run, coupled
from the same starts and compared in every table. Its run folder is RUN/opponents/NAME.
"""

from pathlib import Path

from hpc_closure.experiment.folder import Run, run_at
from hpc_closure.experiment.models import PRESETS
from hpc_closure.experiment.schema import Conditions, Experiment, Use

FIRST = "gaussian_modes"  # if this is an opponent, others of the same mean reuse it
AFTER_MEAN = 0.6  # share of the steps of an opponent that reuses a mean
# keys that an opponent copies from the model
SIZES = ("width", "modes", "mean_layers", "noise_memory", "regression_terms")

__all__ = ["folder_of", "opponents_of"]


def opponents_of(experiment: Experiment) -> dict[str, Experiment]:
    """Return the experiments of ``train.opponents`` by name; {} if the model is reused."""
    if experiment.use.model:
        return {}
    return {name: _experiment(experiment, name) for name in experiment.train.opponents}


def folder_of(experiment: Experiment, name: str) -> Path:
    """Return the run folder of an opponent."""
    return Run.of(experiment).opponents / name


def _experiment(experiment: Experiment, name: str) -> Experiment:
    """Build the experiment of one opponent."""
    run, plain = Run.of(experiment), experiment.model_dump()
    data = run.data_root or run.root
    conditions = {**plain["model"]["conditions"], "sensors": "none"}
    sizes = {key: plain["model"][key] for key in SIZES if plain["model"][key] is not None}
    plain["model"] = {"preset": name, "conditions": Conditions(**conditions), **sizes}
    shared = name != FIRST and PRESETS[name]["mean"] == PRESETS[FIRST]["mean"]
    mean = FIRST if shared and FIRST in experiment.train.opponents else None
    steps = experiment.train.steps
    plain |= {"base": None, "name": name, "root": str(run.opponents)}
    test = run_at(run.root, experiment.use.test) if experiment.use.test else None
    plain["use"] = Use(data=str(data), mean=mean, test=str(test.root) if test else None)
    plain["train"] |= {"opponents": (), "rollout_training": None}
    plain["train"] |= {"steps": max(1, round(AFTER_MEAN * steps)) if mean else steps}
    plain["replicas"] = {}
    plain["rollout"] |= {"baselines": (), "rungs": (), "sensors": None}
    plain["evaluate"] |= {"compare": {}, "sensors": (), "event": None}
    return Experiment.model_validate(plain)
