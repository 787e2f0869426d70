"""Scores of two methods start by start: what an interval of each alone cannot tell apart.

Starts differ much more than methods do, and alike for all methods. So the score of a method is
divided by that of a reference over the same starts (snapshots, trajectories), and the interval is
of that ratio, each start left out of both at once (:mod:`~hpc_closure.evaluate.scores.intervals`);
less one, it is the difference over the reference's mean.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hpc_closure.evaluate.rows import MARK
from hpc_closure.evaluate.scores.intervals import interval_columns
from hpc_closure.evaluate.scores.record import PAIRED, Score
from hpc_closure.evaluate.scores.table import Statistics

OF_STATES = ("crps", "energy_score")  # scores that are compared state by state
REQUIRES = "the method ``evaluate.against``"
SCORES = (
    Score(
        name="crps_difference",
        heading="CRPS, difference",
        meaning="CRPS less that of the reference method over the same starts or snapshots, over "
        "its mean; the interval is of the difference, negative is better",
        table=PAIRED,
        requires=REQUIRES,
    ),
    Score(
        name="energy_score_difference",
        heading="energy score, difference",
        meaning="likewise of the energy score",
        table=PAIRED,
        requires=REQUIRES,
    ),
    Score(
        name="energy_score_joint_difference",
        heading="energy score, joint, difference",
        meaning="the same of the energy score of whole trajectories",
        table=PAIRED,
        requires=f"{REQUIRES} (coupled)",
    ),
)
DIFFERENCES = tuple(score.name for score in SCORES)
BETTER, WORSE, ALIKE = "better", "worse", "not told apart"


def difference(own: Tensor, reference: Tensor, blocks: Tensor) -> dict[str, float]:
    """Columns ``value, low, high``: mean of ``own`` over that of ``reference``, less one.

    Args:
        own: (S,) scores of a method, small ones are good.
        reference: (S,) of another one, same samples.
        blocks: (S,) of samples that are independent.
    """
    numbers = interval_columns(
        {"own": own, "reference": reference},
        blocks,
        lambda means: means["own"] / means["reference"],
    )
    return {name: number - 1 for name, number in numbers.items()}


def differences(
    score: str, values: Mapping[str, Tensor], against: str, blocks: Tensor
) -> Iterator[tuple[str, dict]]:
    """Method, and columns ``score, value, low, high``, of all methods but the reference.

    Infinite where the method lost a member; none where the reference lost one or is not there.

    Args:
        score: name of the rows, of :data:`DIFFERENCES`.
        values: method -> (S,).
        against: the reference; of several trainings their mean.
        blocks: (S,).
    """
    same = [name for name in values if name == against or name.startswith(against + MARK)]
    if not same:
        return
    reference = torch.stack([values[name] for name in same]).mean(0)
    if not bool(reference.isfinite().all()):
        return
    for method, own in values.items():
        if method in same:
            continue
        numbers = dict.fromkeys(("value", "low", "high"), torch.inf)
        if bool(own.isfinite().all()):
            numbers = difference(own, reference, blocks)
        yield method, {"score": score, **numbers}


def of_states(
    statistics: Mapping[str, Statistics], against: str, blocks: Tensor
) -> Iterator[tuple[str, dict]]:
    """:func:`differences` of the scores OF_STATES; statistics of the same states by method."""
    for score in OF_STATES:
        values = {method: parts.joined("total")[score] for method, parts in statistics.items()}
        yield from differences(f"{score}_difference", values, against, blocks)


def verdict(low: float, high: float) -> str:
    """What the interval of a difference says; too few samples have none, and tell nothing."""
    if math.isnan(low) or math.isnan(high) or low <= 0 <= high:
        return ALIKE
    return WORSE if low > 0 else BETTER
