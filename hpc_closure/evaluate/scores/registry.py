"""Collect all scores: built-in ones and those of the modules in ``evaluate.scores``."""

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from hpc_closure.evaluate.scores import (
    budget,
    climate,
    cost,
    exceedance,
    gains,
    growth,
    innovations,
    late,
    paired,
    pointwise,
    rank_histogram,
    rescaled,
    table,
    trajectories,
)
from hpc_closure.evaluate.scores.record import Score
from hpc_closure.evaluate.scores.table import SHELL_STATISTICS, STATISTICS

# in the order of tables and columns in the report
MODULES = (
    table,
    pointwise,
    cost,
    rank_histogram,
    rescaled,
    exceedance,
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
        scores = getattr(_import(name), "SCORES", ())
        if not scores or not all(isinstance(score, Score) for score in scores):
            raise ValueError(
                f"evaluate.scores: {name} has no scores; expected SCORES = (Score(...), ...) with "
                f"Score of {Score.__module__}"
            )
        for score in scores:
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
    paths = (getattr(_import(name), "__file__", None) for name in modules)
    return [Path(path) for path in paths if path]


def _import(name: str) -> ModuleType:
    try:
        return import_module(name)
    except Exception as error:  # a user's module may raise anything
        raise ValueError(
            f"evaluate.scores: {name} cannot be imported ({type(error).__name__}: {error}); is "
            "its folder in PYTHONPATH?"
        ) from error


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
