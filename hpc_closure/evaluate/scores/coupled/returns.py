r"""Return times of extremes in coupled runs: how long a patch waits for the next one.

An event begins in a patch when its largest value rises above a level between two stored times.
The return time is the time that all patches, members and starts were observed over the number of
beginnings,

.. math:: T = \frac{\text{patches} \times \text{members} \times \text{starts} \times (t_L - t_1)}
                   {\text{beginnings}},

in units of time, for one patch of ``SIDE`` points a side. Levels are the 99 % and 99.9 % quantiles
of patch maxima of the truth over all starts and lead times. An event between two stored times is
not seen, so return times of runs with other ``rollout.every`` cannot be compared. A diverged
member makes the return time NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hpc_closure.evaluate.scores.intervals import block_interval
from hpc_closure.evaluate.scores.joint.patches import SIDE, extremes, side_of, threshold
from hpc_closure.evaluate.scores.record import Score

TABLE = "Return times of extremes"
LEVELS = {"99": 0.99, "999": 0.999}
OVER = "the truth's over all starts and lead times"
SCORES = tuple(
    Score(
        name=f"return_time_{name}{end}",
        heading=f"{100 * level:g} % {heading}",
        meaning=meaning.format(100 * level),
        table=TABLE,
        requires="several fields (coupled)" if not end else "a true ensemble (coupled)",
    )
    for name, level in LEVELS.items()
    for end, heading, meaning in (
        (
            "",
            "quantile",
            f"mean time between rises of the largest value of a patch of {SIDE} points a side "
            f"above its {{:g}} % quantile, {OVER}",
        ),
        ("_ratio", "ratio", "that return time, {:g} %, over the true ensemble's; 1 is calibrated"),
    )
)


class ReturnTimes:
    """Counts of beginnings of events, fed lead time by lead time.

    Args:
        truth: true fields (cases, L, n, n).
        times: lead times (L,).
    """

    def __init__(self, truth: Tensor, times: Tensor):
        self.sides = truth.ndim - 2  # of a field
        self.side, self.span = side_of(*truth.shape[2:]), float(times[-1] - times[0])
        self.levels: dict[str, float] = {}
        if self.side is not None and self.span > 0:
            fields = truth.double()
            self.levels = {
                name: threshold(fields, self.side, level, self.sides)
                for name, level in LEVELS.items()
            }
        self.cases = len(truth)
        self._last: dict[str, dict[str, Tensor]] = {}
        self.counts: dict[str, dict[str, Tensor]] = {}
        self.observed: dict[str, float] = {}

    def add(self, method: str, fields: Tensor) -> None:
        """Add the fields (M, cases, n, n) of the next lead time."""
        if not self.levels or self.side is None:
            return
        largest = extremes(fields.double(), self.side, self.sides)[1]
        lost = largest.isnan().any(-1).any(0)  # cases
        self.observed[method] = len(fields) * largest.shape[-1] * self.span
        before = self._last.get(method)
        counts = self.counts.setdefault(method, {})
        now = {name: largest > level for name, level in self.levels.items()}
        for name, above in now.items():
            begun = (above & ~before[name]).sum((0, -1)) if before else torch.zeros(self.cases)
            begun = begun.double().masked_fill(lost, math.nan)
            counts[name] = counts.get(name, torch.zeros(self.cases).double()) + begun
        self._last[method] = now

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (method, columns of a row), with intervals over the starts."""
        blocks = torch.arange(self.cases)
        for method, counts in self.counts.items():
            for name, begun in counts.items():
                values = {
                    "begun": begun,
                    "observed": torch.full_like(begun, self.observed[method]),
                }
                value, low, high = block_interval(values, blocks, _time)
                yield method, _columns(f"return_time_{name}", value, low, high)
                if "oracle" not in self.counts or method == "oracle":
                    continue
                values["beside"] = self.counts["oracle"][name] / self.observed["oracle"]
                value, low, high = block_interval(values, blocks, _ratio)
                yield method, _columns(f"return_time_{name}_ratio", value, low, high)


def _time(means: Any) -> Tensor:
    return means["observed"] / means["begun"]


def _ratio(means: Any) -> Tensor:
    return _time(means) * means["beside"]


def _columns(score: str, value: Tensor, low: Tensor, high: Tensor) -> dict[str, Any]:
    return {"score": score, "value": float(value), "low": float(low), "high": float(high)}
