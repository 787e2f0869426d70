"""The question of an uncertainty study: how probable is it that an observable exceeds a threshold?

The answer is a share of members with its Wilson interval, and the ensemble size that would pin it
down to a stated half width.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hpc_closure.evaluate.scores.record import Score
from hpc_closure.evaluate.scores.spectra import shell_power

QUANTILE = 1.959963984540054  # of the normal law, 95 % two-sided
TABLE = "The event asked for"
SCORES = (
    Score(
        name="probability",
        heading="probability",
        meaning="share of members in which the event of evaluate.event happened",
        table=TABLE,
        requires="``evaluate.event`` (coupled)",
    ),
    Score(
        name="members_needed",
        heading="members needed",
        meaning="ensemble size that would give the probability to the tolerance of evaluate.event",
        table=TABLE,
        requires="``evaluate.event`` (coupled)",
    ),
)


def enstrophy(fields: Tensor) -> Tensor:
    """Mean of w^2 / 2 over the grid, fields (..., n, n)."""
    return 0.5 * fields.double().square().mean((-2, -1))


def peak(fields: Tensor) -> Tensor:
    """Largest |w| on the grid."""
    return fields.double().abs().amax((-2, -1))


def large_scale(fields: Tensor) -> Tensor:
    """Share of the enstrophy in the shells 0 to 2."""
    power = shell_power(fields)
    return power[..., :3].sum(-1) / power.sum(-1)


OBSERVABLES: dict[str, Callable[[Tensor], Tensor]] = {
    "enstrophy": enstrophy,
    "peak": peak,
    "large_scale": large_scale,
}


def wilson(hits: int, trials: int) -> tuple[float, float, float]:
    """Share and its 95 % interval (Wilson, J. Am. Stat. Assoc. 1927), right at 0 and 1 too."""
    if not 0 <= hits <= trials or trials < 1:
        raise ValueError(f"{hits} of {trials}: expected 0 <= hits <= trials, trials >= 1")
    share, z2 = hits / trials, QUANTILE**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    half *= QUANTILE / (1 + z2 / trials)
    return share, max(0.0, centre - half), min(1.0, centre + half)


def members_needed(low: float, high: float, tolerance: float) -> int:
    """Members for a half width of ``tolerance``, for the least favourable share in [low, high]."""
    if not 0 < tolerance < 0.5:
        raise ValueError(f"tolerance={tolerance}, expected between 0 and 0.5")
    worst = min(max(0.5, low), high)
    return math.ceil(QUANTILE**2 * worst * (1 - worst) / tolerance**2)


def event_records(fields: dict[str, Tensor], event, labels: dict) -> Iterator[dict]:
    """Records of the scores ``probability`` and ``members_needed``.

    Args:
        fields: method -> (members, cases, n, n) at the event's lead time.
        event: object with ``observable, above, lead_time, tolerance``.
        labels: columns of every row.
    """
    for method, ensemble in fields.items():
        values = OBSERVABLES[event.observable](torch.as_tensor(ensemble)).flatten()
        share, low, high = wilson(int((values > event.above).sum()), len(values))
        own = {**labels, "method": method, "lead_time": event.lead_time, "members": len(values)}
        yield {**own, "score": "probability", "value": share, "low": low, "high": high}
        needed = members_needed(low, high, event.tolerance)
        yield {**own, "score": "members_needed", "value": needed}
