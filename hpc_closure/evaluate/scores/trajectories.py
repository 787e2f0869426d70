"""Scores of whole trajectories: what a lead time alone does not show."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hpc_closure.closure.fields.losses import energy_of
from hpc_closure.evaluate.scores.forecast import Forecast
from hpc_closure.evaluate.scores.intervals import Means, interval_columns
from hpc_closure.evaluate.scores.pointwise import valid_time
from hpc_closure.evaluate.scores.record import Score

CORRELATED = 0.95  # of a member with the truth
TABLE = "Whole trajectories"
SCORES = (
    Score(
        name="energy_score_joint",
        heading="energy score, joint",
        meaning="fair energy score of whole trajectories, root mean square over the stored lead "
        "times that are not late; all where no true ensemble says which are",
        table=TABLE,
        requires="coupled",
    ),
    Score(
        name="energy_score_joint_ratio",
        heading="joint ratio",
        meaning="that over the true ensemble's; 1 is the best possible",
        table=TABLE,
        requires="the method ``oracle`` (coupled)",
    ),
    Score(
        name="correlated_95",
        heading="correlated until",
        meaning=f"time until which members are correlated with the truth by {CORRELATED:g}, on "
        "average, over all stored lead times",
        table=TABLE,
        requires="coupled",
    ),
)


class Trajectories:
    """Trajectories of one method beside the truth's, taken in lead time by lead time."""

    def __init__(self) -> None:
        self._skill: list[Tensor] = []
        self._pairs: list[Tensor] = []
        self._apart: list[Tensor] = []

    def add(self, forecast: Forecast) -> None:
        """Take in a lead time: members (M, cases, n, n) and truth (cases, n, n)."""
        ensemble, truth = forecast.ensemble, forecast.truth.fields
        skill, pairs = forecast.distances
        self._skill.append(skill.cpu())
        self._pairs.append(pairs.cpu())
        sizes = ensemble.square().mean((-2, -1)) * truth.square().mean((-2, -1))
        correlation = (ensemble * truth).mean((-2, -1)) / sizes.sqrt().clamp(min=1e-300)
        self._apart.append(1 - correlation.mean(0).cpu())

    def energy_score(self, number: int | None = None) -> Tensor:
        """Fair energy score (cases,) of the first lead times together, root mean square over them.

        Args:
            number: how many; none for all.
        """
        skill, pairs = (torch.stack(parts[:number]) for parts in (self._skill, self._pairs))
        score = energy_of(skill.mean(0), pairs.mean(0))
        return torch.where(score.isfinite(), score, torch.inf)

    def correlated(self, times: Tensor) -> Tensor:
        """(cases,) time at which members are no more correlated with the truth by CORRELATED."""
        apart = torch.stack(self._apart, -1)
        apart = torch.cat([torch.zeros_like(apart[:, :1]), apart], -1)  # equal at the start
        times = torch.cat([times.new_zeros(1), times])
        return valid_time(apart, times, 1 - CORRELATED)


def joint_energies(
    trajectories: Mapping[str, Trajectories], times: Tensor, late: Sequence[float] = ()
) -> dict[str, Tensor]:
    """Energy scores (cases,) of whole trajectories by method; {} where every lead time is late.

    A late lead adds what any flow of the same climate has, to every method alike: with many of
    them a trajectory that is right as long as it can be looks like one that never is.

    Args:
        trajectories: by method.
        times: (L,) lead times, increasing.
        late: the last of them, at which no score can tell.
    """
    number = sum(time < min(late, default=math.inf) for time in times.tolist())
    if not number:
        return {}
    return {method: own.energy_score(number) for method, own in trajectories.items()}


def joint_scores(
    trajectories: Mapping[str, Trajectories],
    times: Tensor,
    blocks: Tensor,
    late: Sequence[float] = (),
) -> Iterator[tuple[str, dict]]:
    """Yield method, and columns ``score, value, low, high``, of every method.

    Args:
        trajectories: by method.
        times: (L,) lead times, increasing.
        blocks: (cases,).
        late: as of :func:`joint_energies`.
    """
    energies = joint_energies(trajectories, times, late)
    for method, own in trajectories.items():
        forms: dict[str, tuple[dict[str, Tensor], Callable[[Means], Tensor]]] = {}
        if method in energies:
            energy = {"own": energies[method]}
            forms["energy_score_joint"] = (energy, lambda means: means["own"])
        forms["correlated_95"] = ({"t": own.correlated(times)}, lambda means: means["t"])
        if method in energies and "oracle" in energies:
            both = {**energy, "law": energies["oracle"]}
            forms["energy_score_joint_ratio"] = (both, lambda means: means["own"] / means["law"])
        for score, (values, form) in forms.items():
            numbers = dict.fromkeys(("value", "low", "high"), torch.inf)
            if all(bool(value.isfinite().all()) for value in values.values()):
                numbers = interval_columns(values, blocks, form)
            yield method, {"score": score, **numbers}
