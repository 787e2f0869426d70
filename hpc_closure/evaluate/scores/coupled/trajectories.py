"""Score trajectories over all lead times together."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hpc_closure.closure.fields.losses import energy_of
from hpc_closure.evaluate.scores.forecast import Forecast
from hpc_closure.evaluate.scores.intervals import Means, interval_columns
from hpc_closure.evaluate.scores.pointwise import valid_time
from hpc_closure.evaluate.scores.record import Score

CORRELATED = 0.95  # least correlation of a member with the truth
TABLE = "Whole trajectories"
SCORES = (
    Score(
        name="energy_score_joint",
        heading="energy score, joint",
        meaning="fair energy score of trajectories, root mean square over the stored lead times "
        "that are not late; over all of them without a true ensemble",
        table=TABLE,
        requires="coupled",
    ),
    Score(
        name="energy_score_joint_ratio",
        heading="joint ratio",
        meaning="the same over that of the true ensemble; 1 is the best possible",
        table=TABLE,
        requires="the method ``oracle`` (coupled)",
    ),
    Score(
        name="correlated_95",
        heading="correlated until",
        meaning=f"time until which the mean correlation of members with the truth is at least "
        f"{CORRELATED:g}, over all stored lead times",
        table=TABLE,
        requires="coupled",
    ),
)


class Trajectories:
    """Distances of one method's trajectories to the truth, accumulated lead time by lead time."""

    def __init__(self) -> None:
        self._skill: list[Tensor] = []
        self._pairs: list[Tensor] = []
        self._apart: list[Tensor] = []

    def add(self, forecast: Forecast) -> None:
        """Add a lead time: members (M, cases, n, n) and truth (cases, n, n)."""
        ensemble, truth = forecast.ensemble, forecast.truth.fields
        skill, pairs = forecast.distances
        self._skill.append(skill.cpu())
        self._pairs.append(pairs.cpu())
        sides = tuple(range(1 - truth.ndim, 0))
        sizes = ensemble.square().mean(sides) * truth.square().mean(sides)
        correlation = (ensemble * truth).mean(sides) / sizes.sqrt().clamp(min=1e-300)
        self._apart.append(1 - correlation.mean(0).cpu())

    def energy_score(self, number: int | None = None) -> Tensor:
        """Compute the fair energy score (cases,) over the first lead times together.

        Args:
            number: number of lead times; None for all.
        """
        skill, pairs = (torch.stack(parts[:number]) for parts in (self._skill, self._pairs))
        score = energy_of(skill.mean(0), pairs.mean(0))
        return torch.where(score.isfinite(), score, torch.inf)

    def correlated(self, times: Tensor) -> Tensor:
        """Return the time (cases,) at which the mean correlation falls below CORRELATED."""
        apart = torch.stack(self._apart, -1)
        apart = torch.cat([torch.zeros_like(apart[:, :1]), apart], -1)  # equal at the start
        times = torch.cat([times.new_zeros(1), times])
        return valid_time(apart, times, 1 - CORRELATED)


def joint_energies(
    trajectories: Mapping[str, Trajectories], times: Tensor, late: Sequence[float] = ()
) -> dict[str, Tensor]:
    """Compute energy scores (cases,) of trajectories by method; {} if every lead time is late.

    Late leads are excluded: they add to every method the error of a random flow of the same
    climate, which with many late leads hides the differences at early ones.

    Args:
        trajectories: trajectories by method.
        times: lead times (L,), increasing.
        late: the late lead times, which are the last ones of ``times``.
    """
    number = sum(time < min(late, default=math.inf) for time in times.tolist())
    if not number:
        return {}
    return {method: paths.energy_score(number) for method, paths in trajectories.items()}


def joint_scores(
    trajectories: Mapping[str, Trajectories],
    times: Tensor,
    blocks: Tensor,
    late: Sequence[float] = (),
) -> Iterator[tuple[str, dict]]:
    """Yield method and columns ``score, value, low, high`` of every method.

    Args:
        trajectories: trajectories by method.
        times: lead times (L,), increasing.
        blocks: block of each case (cases,), for the intervals.
        late: as in :func:`joint_energies`.
    """
    energies = joint_energies(trajectories, times, late)
    for method, paths in trajectories.items():
        forms: dict[str, tuple[dict[str, Tensor], Callable[[Means], Tensor]]] = {}
        if method in energies:
            energy = {"own": energies[method]}
            forms["energy_score_joint"] = (energy, lambda means: means["own"])
        forms["correlated_95"] = ({"t": paths.correlated(times)}, lambda means: means["t"])
        if method in energies and "oracle" in energies:
            both = {**energy, "law": energies["oracle"]}
            forms["energy_score_joint_ratio"] = (both, lambda means: means["own"] / means["law"])
        for score, (values, form) in forms.items():
            numbers = dict.fromkeys(("value", "low", "high"), torch.inf)
            if all(bool(value.isfinite().all()) for value in values.values()):
                numbers = interval_columns(values, blocks, form)
            yield method, {"score": score, **numbers}
