"""Scores of a method over those of the model, on the same samples: what a tie is.

Two methods that answer the same states share most of their scatter, so intervals of their own
overlap where one is better in nearly every trajectory. The ratio of their means has an interval of
its own, from the same trajectories left out in turn.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from hpc_closure.evaluate.intervals import interval_columns
from hpc_closure.evaluate.rows import MODELS
from hpc_closure.evaluate.statistics import Statistics

SCORES = ("crps", "energy_score")

__all__ = ["over_the_model", "paired_scores"]


def paired_scores(
    statistics: Mapping[str, Statistics], blocks: Tensor
) -> Iterator[tuple[str, dict]]:
    """Method, and columns ``score, value, low, high``, of every other method that draws.

    Args:
        statistics: by method, of the same samples.
        blocks: (S,) trajectory or case of each sample.
    """
    samples = {name: one.joined("total") for name, one in statistics.items() if one.members > 1}
    for score in SCORES:
        values = {name: total[score] for name, total in samples.items()}
        yield from over_the_model(f"{score}_to_model", values, blocks)


def over_the_model(
    score: str, values: Mapping[str, Tensor], blocks: Tensor
) -> Iterator[tuple[str, dict]]:
    """The same of values (S,) of one score by method; none where one is lost."""
    model = next((values[name] for name in MODELS if name in values), None)
    if model is None or not bool(model.isfinite().all() and (model.mean() > 0)):
        return
    for method, own in values.items():
        if method in MODELS or not bool(own.isfinite().all()):
            continue
        pair = {"own": own, "model": model}
        columns = interval_columns(pair, blocks, lambda means: means["own"] / means["model"])
        yield method, {"score": score, **columns}
