"""Compare two methods start by start, which resolves differences that separate intervals hide.

Scores vary much more between starts than between methods, and in the same way for all methods.
Therefore the mean score of a method is divided by that of a reference over the same starts
(snapshots, trajectories). The jackknife leaves the same start out of both
(:mod:`~hpc_closure.evaluate.scores.intervals`). The ratio less one is the relative difference.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hpc_closure.evaluate.rows import MARK
from hpc_closure.evaluate.scores.intervals import interval_columns
from hpc_closure.evaluate.scores.record import PAIRED, Score
from hpc_closure.evaluate.scores.table import Statistics

# scores of single states that are compared; fields without patches have no scores of patches
OF_PATCHES = {
    "patch_max_crps": "CRPS of patch maxima",
    "patch_min_crps": "CRPS of patch minima",
    "field_max_crps": "CRPS of the field's maximum",
    "patch_energy_score": "energy score of patches",
}
OF_STATES = ("crps", "energy_score", *OF_PATCHES)
REQUIRES = "the method ``evaluate.against``"
SCORES = (
    Score(
        name="crps_difference",
        heading="CRPS, difference",
        meaning="relative difference of the CRPS to the reference method over the same starts or "
        "snapshots; the interval is that of the difference, negative is better",
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
    *(
        Score(
            name=f"{name}_difference",
            heading=f"{words}, difference",
            meaning=f"likewise of the {words}",
            table=PAIRED,
            requires=REQUIRES,
        )
        for name, words in OF_PATCHES.items()
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
BETTER, WORSE, ALIKE = "better", "worse", "indistinguishable"


def difference(own: Tensor, reference: Tensor, blocks: Tensor) -> dict[str, float]:
    """Return columns ``value, low, high`` of mean(own) / mean(reference) - 1.

    Args:
        own: scores of a method (S,); smaller is better.
        reference: scores of the reference method for the same samples (S,).
        blocks: block of each sample (S,); blocks are independent.
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
    """Yield method and columns ``score, value, low, high`` of all methods but the reference.

    The value is infinite if the method lost a member. Nothing is yielded if the reference lost a
    member or is missing.

    Args:
        score: name of the rows, one of :data:`DIFFERENCES`.
        values: method -> scores (S,).
        against: name of the reference; the mean of its trainings if there are several.
        blocks: block of each sample (S,).
    """
    same = [name for name in values if name == against or name.startswith(against + MARK)]
    if not same:
        return
    reference = torch.stack([values[name] for name in same]).mean(0)
    if not bool(reference.isfinite().all()):
        return
    for method, scores in values.items():
        if method in same:
            continue
        numbers = dict.fromkeys(("value", "low", "high"), torch.inf)
        if bool(scores.isfinite().all()):
            numbers = difference(scores, reference, blocks)
        yield method, {"score": score, **numbers}


def of_states(
    statistics: Mapping[str, Statistics], against: str, blocks: Tensor
) -> Iterator[tuple[str, dict]]:
    """Yield :func:`differences` of the scores OF_STATES, from statistics by method."""
    joined = {method: parts.joined("total") for method, parts in statistics.items()}
    for score in OF_STATES:
        values = {method: scores[score] for method, scores in joined.items() if score in scores}
        yield from differences(f"{score}_difference", values, against, blocks)


def verdict(low: float, high: float) -> str:
    """Return the verdict of a difference's interval; without an interval ALIKE."""
    if math.isnan(low) or math.isnan(high) or low <= 0 <= high:
        return ALIKE
    return WORSE if low > 0 else BETTER
