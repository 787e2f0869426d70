"""Score all fields of a state of several channels together.

The energy score of each channel does not see how channels depend on one another. The energy score
of all of them does: its norm is the root mean square over grid and channels, each channel in units
of its standard deviation in reference fields, so that it does not depend on the channels' units.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hpc_closure.closure.fields.losses import energy_of
from hpc_closure.evaluate.scores.intervals import interval_columns
from hpc_closure.evaluate.scores.record import Score

TABLE = "All channels together"
SCORES = (
    Score(
        name="energy_score_channels",
        heading="energy score, channels",
        meaning="fair energy score of all fields of the state, each in units of its standard "
        "deviation in training closures (generated) or in the truth (coupled)",
        table=TABLE,
        requires="a state of several fields",
        by_lead_time=True,
    ),
    Score(
        name="energy_score_channels_ratio",
        heading="channels, ratio",
        meaning="the same over that of the exact law (or true ensemble); 1 is the best possible",
        table=TABLE,
        requires="a state of several fields, a reference ensemble (``oracle``)",
    ),
)


def split(fields: Tensor, channels: Sequence[str], dimensions: int = 2) -> dict[str, Tensor]:
    """Return {channel: fields (..., n, n)} of fields (..., C, n, n); {"": fields} of one field.

    The axis of the channels is the one before those of the sides, ``dimensions`` of them.
    """
    if not channels:
        return {"": fields}
    return dict(zip(channels, fields.unbind(-1 - dimensions), strict=True))


def scales(fields: Tensor, dimensions: int = 2) -> Tensor:
    """Compute the standard deviation of each channel of fields (..., C, n, n); (C,) float64.

    A channel that does not vary has the scale 1.
    """
    std = fields.double().movedim(-1 - dimensions, 0).flatten(1).std(1)
    return torch.where(std > 0, std, 1.0)


def energy_score(distances: Sequence[tuple[Tensor, Tensor]], scale: Tensor) -> Tensor:
    """Compute the fair energy score (S,) of all channels, infinite where a member was lost.

    Args:
        distances: of each channel the mean squared distances over the grid, of members to the
            truth (S, M) and to each other (S, M, M).
        scale: standard deviation of each channel (C,), in the units of its distances.
    """
    weights = (scale**-2).tolist()
    skill, pairs = (
        torch.stack([weight * part.cpu() for weight, part in zip(weights, parts)]).mean(0)
        for parts in zip(*distances, strict=True)
    )
    score = energy_of(skill, pairs)
    return torch.where(score.isfinite(), score, torch.inf)


class Channels:
    """Energy scores of all channels by method, accumulated block by block.

    Args:
        scale: standard deviation of each channel (C,), see :func:`scales`.

    Attributes:
        members: ensemble size by method.
    """

    def __init__(self, scale: Tensor):
        self.scale = scale
        self.members: dict[str, int] = {}
        self._scores: dict[str, list[Tensor]] = {}

    def add(self, method: str, distances: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add a block of a method; ``distances`` as in :func:`energy_score`."""
        self.members[method] = distances[0][0].shape[1]
        self._scores.setdefault(method, []).append(energy_score(distances, self.scale))

    def records(self, blocks: Tensor) -> Iterator[tuple[str, dict]]:
        """Yield method and columns ``score, value, low, high, members, samples`` of SCORES.

        Args:
            blocks: block of each sample (S,), for the intervals.
        """
        scores = {method: torch.cat(parts) for method, parts in self._scores.items()}
        for method, own in scores.items():
            sizes = {"members": self.members[method], "samples": len(blocks)}
            yield method, {"score": SCORES[0].name, **_interval({"own": own}, blocks), **sizes}
            if self.members.get("oracle", 1) > 1:
                both = {"own": own, "law": scores["oracle"]}
                yield method, {"score": SCORES[1].name, **_interval(both, blocks), **sizes}


def _interval(values: Mapping[str, Tensor], blocks: Tensor) -> dict[str, float]:
    """Return columns ``value, low, high`` of the mean of ``own``, over that of ``law``, if any."""
    if not all(bool(part.isfinite().all()) for part in values.values()):
        return dict.fromkeys(("value", "low", "high"), math.inf)
    return interval_columns(
        values,
        blocks,
        lambda means: means["own"] / means["law"] if "law" in means else means["own"],
    )
