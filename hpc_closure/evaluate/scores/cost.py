"""Form the cost scores from measured times; ``stages.costs`` measures the coupled run."""

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
    """Return columns ``score, value``: median over blocks of the time per closure sample."""
    return {"score": "cost_ms", "value": float(torch.tensor(milliseconds).median())}


def of_members(microseconds: Mapping[str, float], method: str) -> Iterator[dict]:
    """Yield columns ``score, value`` of a method's coupled run; nothing if it was not timed.

    Args:
        microseconds: method -> microseconds per member and time unit; ``none`` is the bare solver.
        method: name of the method.
    """
    if method in microseconds:
        yield {"score": "cost_us", "value": microseconds[method]}
        if "none" in microseconds:
            yield {"score": "cost_ratio", "value": microseconds[method] / microseconds["none"]}
