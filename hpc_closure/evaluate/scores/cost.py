"""What methods cost, from measured times; ``stages.costs`` measures those of the coupled run."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from hpc_closure.evaluate.scores.record import ACCURACY, Score

SCORES = (
    Score(
        name="cost_ms",
        heading="cost [ms]",
        meaning="wall time of one closure sample",
        table=ACCURACY,
        requires="generated",
    ),
    Score(
        name="cost_us",
        heading="cost [us]",
        meaning="wall time of one member and time unit on one thread, all methods in one run",
        table=ACCURACY,
        requires="coupled",
    ),
    Score(
        name="cost_ratio",
        heading="cost ratio",
        meaning="cost over that of the bare solver at its own step",
        table=ACCURACY,
        requires="coupled",
    ),
)


def of_samples(milliseconds: Sequence[float]) -> dict:
    """Columns ``score, value``: the median over blocks of the time of one closure sample."""
    return {"score": "cost_ms", "value": float(torch.tensor(milliseconds).median())}


def of_members(microseconds: Mapping[str, float], method: str) -> Iterator[dict]:
    """Columns ``score, value`` of a method's coupled run; nothing where it was not timed.

    Args:
        microseconds: method -> per member and time unit, the bare solver's as ``none``.
        method: whose rows.
    """
    if method in microseconds:
        yield {"score": "cost_us", "value": microseconds[method]}
        if "none" in microseconds:
            yield {"score": "cost_ratio", "value": microseconds[method] / microseconds["none"]}
