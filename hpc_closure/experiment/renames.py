"""Read the old names of keys, and return settings by the old names, which hashes cover.

``RENAMES`` is the only list of renamed keys. Hashes and recipes in files contain the names that
keys had when the first files were written, so a new name leaves every file of a run valid.
"""

import copy
import functools
import logging
from typing import Any

UNTIL = "1.0"  # the first release that refuses old names in files of users

# old path -> new path; a section comes before its keys, and a key stays in its section
RENAMES = {
    "generate.max_level": "generate.max_refinements",
    "model.conditions.previous": "model.conditions.previous_closures",
    "model.conditions.history": "model.conditions.previous_states",
    "model.conditions.physics": "model.conditions.physics_estimate",
    "model.library": "model.regression_terms",
    "model.gate": "model.validate_parts",
    "model.memory": "model.noise_memory",
    "model.evaluations": "model.function_evaluations",
    "model.form": "model.spectral_convolution",
    "model.constant": "model.coefficient",
    "model.returned": "model.backscatter_fraction",
    "train.memory": "train.memory_gib",
    "train.trajectory": "train.rollout_training",
    "train.trajectory.calls": "train.rollout_training.horizon",
    "train.trajectory.energy": "train.rollout_training.energy_weight",
    "train.steady": "train.stability_test",
    "train.steady.calls": "train.stability_test.horizon",
    "pilot.cases": "pilot.initial_conditions",
    "pilot.watched": "pilot.spinup",
    "replicas.pinned": "replicas.spinup",
    "rollout.cases": "rollout.initial_conditions",
    "rollout.references": "rollout.baselines",
    "rollout.sampler.evaluations": "rollout.sampler.function_evaluations",
    "evaluate.sampler.evaluations": "evaluate.sampler.function_evaluations",
    "evaluate.event.above": "evaluate.event.threshold",
    "cluster.give_up": "cluster.max_first_failures",
    "cluster.stale_after": "cluster.claim_timeout",
    "cluster.throttle": "cluster.max_running_tasks",
    "cluster.signal_lead": "cluster.signal_before_end",
}
# entries of the settings of a stage that are no keys of an experiment
STORED_ONLY = {"pilot.pinned": "pilot.replicas_spinup"}


def updated(
    values: dict[str, Any], section: str = "", *, source: str = "", warn: bool = True
) -> dict[str, Any]:
    """Return a copy of plain values in which every old name of a key is the new one.

    Args:
        values: an experiment's values, complete or in part; anything may be in them.
        section: the section, as a dotted path, whose keys ``values`` are; "" = the experiment.
        source: file or override of the values, for the messages.
        warn: whether each old name is logged, once per process and source.

    Raises:
        ValueError: a key is stated by both names.
    """
    values = copy.deepcopy(values)
    for old, new in _within(section, RENAMES):
        *parents, last = new.split(".")
        place, was = _at(values, parents), old.rpartition(".")[2]
        if place is None or was not in place:
            continue
        if last in place:
            raise ValueError(
                f"{source}: {old} and {new} are two names of one key: remove {old}, the old one"
            )
        _rename(place, was, last)
        if warn:
            _warn(f"{source}: {old} is now {new}; the old name is read until {UNTIL}")
    return values


def as_stored(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of an experiment's settings by the old names, as hashes and files have them.

    Args:
        settings: plain values by the new names.
    """
    settings = copy.deepcopy(settings)
    for old, new in reversed([*RENAMES.items(), *STORED_ONLY.items()]):
        *parents, last = new.split(".")
        place = _at(settings, parents)
        if place is not None and last in place:
            _rename(place, last, old.rpartition(".")[2])
    return settings


def _within(section: str, names: dict[str, str]) -> list[tuple[str, str]]:
    """List the pairs of a section, with paths that begin in it."""
    start = f"{section}." if section else ""
    return [
        (old.removeprefix(start), new.removeprefix(start))
        for old, new in names.items()
        if old.startswith(start)
    ]


def _at(values: Any, path: list[str]) -> dict[str, Any] | None:
    """Return the mapping at a path, or None if there is none."""
    for part in path:
        values = values.get(part) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else None


def _rename(place: dict[str, Any], name: str, new_name: str) -> None:
    """Rename a key of a mapping in place; the order of keys remains."""
    items = list(place.items())
    place.clear()
    place.update((new_name if key == name else key, value) for key, value in items)


@functools.cache
def _warn(line: str) -> None:
    """Log a line once per process; this runs before the program sets up its log."""
    logging.getLogger("hpc_closure").warning(line)
