"""Report the gain of each trained part: the share that acts, chosen on unseen members."""

from collections.abc import Iterable, Iterator
from typing import Any

from hpc_closure.closure.part_report import PartReport
from hpc_closure.evaluate.scores.record import Score

GAIN = "gain_"  # before the name of a part
SCORES = tuple(
    Score(
        name=f"{GAIN}{part}",
        heading=heading,
        meaning=meaning,
        table="Gains of trained parts, chosen on unseen members",
        requires="trained parts (generated)",
        per_shell=True,
        shells=shells,
    )
    for part, heading, meaning, shells in (
        (
            "mean",
            "mean",
            "share of the mean's network that is kept, chosen on members unseen in training",
            "Gain of the mean's network",
        ),
        ("amplitude", "amplitude", "the same of the amplitude", ""),
        ("residual", "generator", "the same of the generator", "Gain of the generator"),
    )
)


def gains(parts: Iterable[PartReport]) -> Iterator[dict[str, Any]]:
    """Yield columns ``score, shell, value`` of the trained parts, per shell if gains differ."""
    for part in parts:
        if not part.trained or not part.gains:
            continue
        score = GAIN + part.name.split(":")[0]
        single = len(part.gains) == 1
        for shell, gain in enumerate(part.gains):
            if single or shell:
                yield {"score": score, "shell": None if single else shell, "value": gain}
