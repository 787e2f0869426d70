"""Estimate the probability that an observable exceeds a threshold (uncertainty study).

The estimate is a share of members with its Wilson interval. A second score is the ensemble size at
which the interval has a requested half width.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hpc_closure.evaluate.scores.record import Score
from hpc_closure.evaluate.scores.spectra import shell_power

QUANTILE = 1.959963984540054  # 97.5 % quantile of the normal law: a two-sided 95 % interval
TABLE = "Event of evaluate.event"
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
    """Compute the mean of w^2 / 2 over the grid; fields (M, S, n, n) -> (M, S)."""
    return 0.5 * fields.double().square().mean(tuple(range(2, fields.ndim)))


def peak(fields: Tensor) -> Tensor:
    """Find the largest |w| on the grid; fields (M, S, n, n) -> (M, S)."""
    return fields.double().abs().amax(tuple(range(2, fields.ndim)))


def large_scale(fields: Tensor) -> Tensor:
    """Compute the share of the enstrophy in shells 0 to 2; fields (M, S, n, n) -> (M, S)."""
    power = shell_power(fields, fields.ndim - 2)
    return power[..., :3].sum(-1) / power.sum(-1)


OBSERVABLES: dict[str, Callable[[Tensor], Tensor]] = {
    "enstrophy": enstrophy,
    "peak": peak,
    "large_scale": large_scale,
}


def wilson(hits: int, trials: int) -> tuple[float, float, float]:
    """Compute a share and its 95 % interval (Wilson, J. Am. Stat. Assoc. 1927).

    The interval is valid for shares of 0 and 1, too.
    """
    if not 0 <= hits <= trials or trials < 1:
        raise ValueError(f"{hits} of {trials}: expected 0 <= hits <= trials, trials >= 1")
    share, z2 = hits / trials, QUANTILE**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    half *= QUANTILE / (1 + z2 / trials)
    return share, max(0.0, centre - half), min(1.0, centre + half)


def members_needed(low: float, high: float, tolerance: float) -> int:
    """Return the ensemble size for a half width of ``tolerance`` at the worst share.

    The share lies in [low, high].

    The worst share is the one closest to 0.5, where the interval is widest.
    """
    if not 0 < tolerance < 0.5:
        raise ValueError(f"tolerance={tolerance}, expected between 0 and 0.5")
    worst = min(max(0.5, low), high)
    return math.ceil(QUANTILE**2 * worst * (1 - worst) / tolerance**2)


def event_records(fields: dict[str, Tensor], event, labels: dict) -> Iterator[dict]:
    """Yield rows of the scores ``probability`` and ``members_needed``.

    Args:
        fields: method -> states (members, cases, n, n) at the event's lead time.
        event: the settings ``evaluate.event``: observable, above, lead_time, tolerance.
        labels: columns of every row.
    """
    for method, ensemble in fields.items():
        values = OBSERVABLES[event.observable](torch.as_tensor(ensemble)).flatten()
        share, low, high = wilson(int((values > event.threshold).sum()), len(values))
        columns = {
            **labels,
            "method": method,
            "lead_time": event.lead_time,
            "members": len(values),
        }
        yield {**columns, "score": "probability", "value": share, "low": low, "high": high}
        needed = members_needed(low, high, event.tolerance)
        yield {**columns, "score": "members_needed", "value": needed}
