"""Find late leads: lead times at which scores no longer separate good from bad closures.

Once the true ensemble is independent of its initial state, its members are draws from the climate,
and every closure with about the right climate has the same score. A lead time is late if the CRPS
of the true ensemble is at least 0.95 of climatology's at this and all later lead times. Without a
true ensemble no lead time is called late.
"""

from collections.abc import Iterator, Mapping

import torch
from pandas import DataFrame
from torch import Tensor

from hpc_closure.evaluate.rows import select
from hpc_closure.evaluate.scores.paired import difference
from hpc_closure.evaluate.scores.record import Score

PREDICTABILITY = "predictability"
LEAST = 0.05  # predictability below which a lead time is late
DAGGER = "†"
SCORES = (
    Score(
        name=PREDICTABILITY,
        heading="predictability",
        meaning="1 - CRPS of the true ensemble / CRPS of climatology: the largest possible gain",
        requires="the methods ``oracle`` and ``climatology`` (coupled)",
        by_lead_time=True,
    ),
)
SENTENCE = (
    f"{DAGGER} Late: the true ensemble's CRPS is at least {1 - LEAST:g} times climatology's. "
    "There random states of the same climate score as well as forecasts from the right start, and "
    "the headlines leave such lead times out."
)


def predictability(crps: Mapping[str, Tensor], blocks: Tensor) -> Iterator[tuple[str, dict]]:
    """Yield ``oracle`` and columns ``score, value, low, high`` of its predictability.

    Args:
        crps: method -> CRPS (cases,) at one lead time; nothing is yielded without ``oracle`` and
            ``climatology``.
        blocks: block of each case (cases,), for the intervals.
    """
    if not {"oracle", "climatology"} <= set(crps):
        return
    oracle, climate = crps["oracle"], crps["climatology"]
    if bool(torch.stack([oracle.isfinite().all(), climate.isfinite().all()]).all()):
        relative = difference(oracle, climate, blocks)
        ends = {"value": -relative["value"], "low": -relative["high"], "high": -relative["low"]}
        yield "oracle", {"score": PREDICTABILITY, **ends}


def late_leads(rows: DataFrame) -> list[float]:
    """List the late lead times in the rows of a coupled run, increasing."""
    known = select(rows, method="oracle", score=PREDICTABILITY, shell=None)
    return late_of(dict(zip(known["lead_time"], known["value"], strict=True)))


def late_of(predictabilities: Mapping[float, float]) -> list[float]:
    """List the late lead times, increasing; ``predictabilities`` is indexed by lead time."""
    late: list[float] = []
    for lead, value in sorted(predictabilities.items(), reverse=True):
        if value >= LEAST:
            break
        late.append(lead)
    return late[::-1]
