"""Collect all scores: built-in ones and those of the modules in ``evaluate.scores``."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_closure.evaluate.scores import (
    cost,
    paired,
    pointwise,
    rank_histogram,
    table,
)
from hpc_closure.evaluate.scores.coupled import (
    climate,
    exceedance,
    growth,
    late,
    rescaled,
    returns,
    trajectories,
)
from hpc_closure.evaluate.scores.generated import budget, gains, innovations
from hpc_closure.evaluate.scores.joint import channels, coherence, patches
from hpc_closure.evaluate.scores.record import Score
from hpc_closure.evaluate.scores.table import SHELL_STATISTICS, STATISTICS
from hpc_closure.experiment.user_modules import load_attribute, load_module

# in the order of tables and columns in the report
MODULES = (
    table,
    pointwise,
    channels,
    coherence,
    patches,
    cost,
    rank_histogram,
    rescaled,
    exceedance,
    returns,
    paired,
    trajectories,
    growth,
    budget,
    innovations,
    gains,
    climate,
    late,
)


def by_name(scores: Iterable[Score]) -> dict[str, Score]:
    """Index scores by name."""
    return {score.name: score for score in scores}


BUILT_IN: Mapping[str, Score] = by_name(score for module in MODULES for score in module.SCORES)


def load(modules: Sequence[str]) -> tuple[Score, ...]:
    """Import modules and collect their ``SCORES``, without the built-in ones.

    Raises:
        ValueError: a module cannot be imported or has no scores; a score cannot be computed or has
            the name of another.
    """
    known = dict(BUILT_IN)
    for name in modules:
        expected = f"a tuple of one or more Score of {Score.__module__}"
        for score in load_attribute(_setting(name), name, "SCORES", expected, _are_scores):
            if score.name in known:
                raise ValueError(
                    f"evaluate.scores: {name} has a score {score.name}, a name that is taken; "
                    "choose another name"
                )
            _check_statistics(name, score)
            known[score.name] = score
    return tuple(known.values())[len(BUILT_IN) :]


def files(modules: Sequence[str]) -> list[Path]:
    """List the source files of modules; a change of them makes the scores outdated."""
    paths = (getattr(load_module(_setting(name), name), "__file__", None) for name in modules)
    return [Path(path) for path in paths if path]


def _setting(module: str) -> str:
    return f"evaluate.scores={module}"


def _are_scores(value: Any) -> bool:
    """Return whether a value is a tuple or list of scores, at least one."""
    return (
        isinstance(value, (tuple, list))
        and bool(value)
        and all(isinstance(one, Score) for one in value)
    )


def _check_statistics(module: str, score: Score) -> None:
    """Raise ValueError unless a score can be formed from the existing statistics."""
    where = f"evaluate.scores: {module}: score {score.name}"
    if not score.statistics:
        raise ValueError(f"{where} has neither a formula with its needs nor a function of samples")
    per_shell = score.spectra or score.per_shell
    sampled = (score.name,) if score.sample else ()
    names = SHELL_STATISTICS if per_shell else (*STATISTICS, *sampled)
    kind = "statistic per shell" if per_shell else "statistic"
    for need in score.statistics:
        if need.removeprefix("reference_") not in names:
            raise ValueError(
                f"{where} needs {need}, which is no {kind}; there are {', '.join(names)}, and "
                "reference_ before each"
            )
    if score.needs and score.formula is None:
        raise ValueError(f"{where} has needs, but no formula")
