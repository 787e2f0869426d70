"""Scores of whole trajectories: what a lead time alone does not show."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hpc_closure.closure.fields.losses import energy_of
from hpc_closure.evaluate.scores.forecast import Forecast
from hpc_closure.evaluate.scores.intervals import interval_columns
from hpc_closure.evaluate.scores.pointwise import valid_time
from hpc_closure.evaluate.scores.record import Score

CORRELATED = 0.95  # of a member with the truth
TABLE = "Whole trajectories"
SCORES = (
    Score(
        name="energy_score_joint",
        heading="energy score, joint",
        meaning="fair energy score of whole trajectories, root mean square over all stored "
        "lead times",
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

    @property
    def energy_score(self) -> Tensor:
        """(cases,) fair energy score of all lead times together, root mean square over them."""
        score = energy_of(torch.stack(self._skill).mean(0), torch.stack(self._pairs).mean(0))
        return torch.where(score.isfinite(), score, torch.inf)

    def correlated(self, times: Tensor) -> Tensor:
        """(cases,) time at which members are no more correlated with the truth by CORRELATED."""
        apart = torch.stack(self._apart, -1)
        apart = torch.cat([torch.zeros_like(apart[:, :1]), apart], -1)  # equal at the start
        times = torch.cat([times.new_zeros(1), times])
        return valid_time(apart, times, 1 - CORRELATED)


def joint_scores(
    trajectories: dict[str, Trajectories], times: Tensor, blocks: Tensor
) -> Iterator[tuple[str, dict]]:
    """Method, and columns ``score, value, low, high``, of every method.

    Args:
        trajectories: by method.
        times: (L,) lead times.
        blocks: (cases,).
    """
    truth = trajectories.get("oracle")
    for method, own in trajectories.items():
        energy = {"own": own.energy_score}
        forms = {
            "energy_score_joint": (energy, lambda means: means["own"]),
            "correlated_95": ({"t": own.correlated(times)}, lambda means: means["t"]),
        }
        if truth is not None:
            both = {**energy, "law": truth.energy_score}
            forms["energy_score_joint_ratio"] = (both, lambda means: means["own"] / means["law"])
        for score, (values, form) in forms.items():
            numbers = dict.fromkeys(("value", "low", "high"), torch.inf)
            if all(bool(value.isfinite().all()) for value in values.values()):
                numbers = interval_columns(values, blocks, form)
            yield method, {"score": score, **numbers}
