"""Measure how fast the members of an ensemble diverge from equal initial states."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hpc_closure.evaluate.scores.intervals import block_interval
from hpc_closure.evaluate.scores.pointwise import valid_time
from hpc_closure.evaluate.scores.record import Score
from hpc_closure.evaluate.scores.table import JUDGED

GROWTH = "growth_"  # prefix of a score, before the share in per cent
GROWN = (0.01, 0.1, 0.5)  # shares of the saturated variance
SCORES = tuple(
    Score(
        name=f"{GROWTH}{100 * share:g}",
        heading=f"to {100 * share:g} %",
        meaning=f"time after which the variance over members is {100 * share:g} % of the true "
        "ensemble's at the last lead time",
        table="Growth of the variance",
        requires="several members, the method ``oracle`` (coupled)",
        per_shell=True,
    )
    for share in GROWN
)


def growth(
    variances: Mapping[str, Sequence[Tensor]], times: Tensor, blocks: Tensor
) -> Iterator[tuple[str, dict]]:
    """Find the times at which the variance over members reaches shares of its saturated value.

    Total and shells are treated separately, as in Freitas et al. (2026). The saturated value is
    the variance of the true ensemble at the last lead time.

    Args:
        variances: method -> variances over members (cases, shells) at each lead time.
        times: (L,) lead times.
        blocks: block of each case (cases,), for the intervals.

    Yields:
        Method and columns ``score, shell, value, low, high``.
    """
    last = variances["oracle"][-1].mean(0)
    judged = (last > JUDGED * last.sum()).nonzero()[:, 0].tolist()
    since = torch.cat([times.new_zeros(1), times])
    for method, parts in variances.items():
        shells = torch.stack(list(parts), -1)  # (cases, shells, L)
        series = torch.cat([shells.sum(1, keepdim=True), shells[:, judged]], 1)
        start = series.new_zeros(*series.shape[:-1], 1)
        limit = torch.cat([last.sum()[None], last[judged]])[:, None]
        if not bool(series.isfinite().all()):
            continue
        for share in GROWN:
            value, low, high = block_interval(
                {"v": torch.cat([start, series], -1)},
                blocks,
                lambda means, at=share: valid_time(means["v"] / limit, since, at),  # type: ignore
            )
            for row, shell in enumerate([None, *judged]):
                interval = {"value": value[row], "low": low[row], "high": high[row]}
                name = f"{GROWTH}{100 * share:g}"
                numbers = {key: float(number) for key, number in interval.items()}
                yield method, {"score": name, "shell": shell, **numbers}
