"""Late leads: lead times at which a score can no longer tell a good closure from a bad one.

Once the true ensemble has forgotten its start its members are those of the climate, and any flow
of about that climate scores what it scores. A lead time is late when the CRPS of the true ensemble
is at least 0.95 of climatology's, there and at all lead times that follow. Where there is no true
ensemble nobody knows, and no lead time is called late.
"""

from collections.abc import Iterator, Mapping

import torch
from pandas import DataFrame
from torch import Tensor

from hpc_closure.evaluate.rows import select
from hpc_closure.evaluate.scores.paired import difference
from hpc_closure.evaluate.scores.record import Score

PREDICTABILITY = "predictability"
LEAST = 0.05  # of it, for a score to tell
DAGGER = "†"
SCORES = (
    Score(
        name=PREDICTABILITY,
        heading="predictability",
        meaning="1 less the CRPS of the true ensemble over climatology's: what there is to be "
        "gained",
        requires="the methods ``oracle`` and ``climatology`` (coupled)",
        by_lead_time=True,
    ),
)
SENTENCE = (
    f"{DAGGER} Late: the true ensemble's CRPS is at least {1 - LEAST:g} of climatology's, so that "
    "a flow of the same climate that knows nothing of its start scores as well; such lead times "
    "stand in no headline."
)


def predictability(crps: Mapping[str, Tensor], blocks: Tensor) -> Iterator[tuple[str, dict]]:
    """The method ``oracle`` and its columns ``score, value, low, high``: one less the ratio of its
    CRPS to climatology's.

    Args:
        crps: method -> (cases,) at one lead time; nothing comes where one of both is not there.
        blocks: (cases,).
    """
    if not {"oracle", "climatology"} <= set(crps):
        return
    own, climate = crps["oracle"], crps["climatology"]
    if bool(torch.stack([own.isfinite().all(), climate.isfinite().all()]).all()):
        found = difference(own, climate, blocks)
        ends = {"value": -found["value"], "low": -found["high"], "high": -found["low"]}
        yield "oracle", {"score": PREDICTABILITY, **ends}


def late_leads(rows: DataFrame) -> list[float]:
    """Find the late ones of the lead times in the rows of a coupled run, increasing."""
    known = select(rows, method="oracle", score=PREDICTABILITY, shell=None)
    return late_of(dict(zip(known["lead_time"], known["value"], strict=True)))


def late_of(predictabilities: Mapping[float, float]) -> list[float]:
    """Find the late ones of lead times, increasing; ``predictabilities`` by lead time."""
    late: list[float] = []
    for lead, value in sorted(predictabilities.items(), reverse=True):
        if value >= LEAST:
            break
        late.append(lead)
    return late[::-1]
