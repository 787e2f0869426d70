"""How fast the members of an ensemble grow apart from equal starts."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hpc_closure.evaluate.scores.intervals import block_interval
from hpc_closure.evaluate.scores.pointwise import valid_time
from hpc_closure.evaluate.scores.record import Score
from hpc_closure.evaluate.scores.table import JUDGED

GROWTH = "growth_"  # before a share in per cent
GROWN = (0.01, 0.1, 0.5)  # shares of the saturated variance
SCORES = tuple(
    Score(
        name=f"{GROWTH}{100 * share:g}",
        heading=f"to {100 * share:g} %",
        meaning=f"time in which the members grow apart to {100 * share:g} % of the true "
        "ensemble's last variance",
        table="Growth of the variance",
        requires="several members, the method ``oracle`` (coupled)",
        per_shell=True,
    )
    for share in GROWN
)


def growth(
    variances: Mapping[str, Sequence[Tensor]], times: Tensor, blocks: Tensor
) -> Iterator[tuple[str, dict]]:
    """Find the times at which the members of an ensemble have grown apart, in all and per shell.

    After Freitas et al. (2026): from equal starts, to a share of the variance that the true
    ensemble has at the last lead time.

    Args:
        variances: method -> (cases, shells) over members at each lead time.
        times: (L,) lead times.
        blocks: (cases,).

    Yields:
        Method, and columns ``score, shell, value, low, high``.
    """
    last = variances["oracle"][-1].mean(0)
    judged = (last > JUDGED * last.sum()).nonzero()[:, 0].tolist()
    since = torch.cat([times.new_zeros(1), times])
    for method, parts in variances.items():
        shells = torch.stack(list(parts), -1)  # (cases, shells, L)
        whole = torch.cat([shells.sum(1, keepdim=True), shells[:, judged]], 1)
        start = whole.new_zeros(*whole.shape[:-1], 1)
        most = torch.cat([last.sum()[None], last[judged]])[:, None]
        if not bool(whole.isfinite().all()):
            continue
        for share in GROWN:
            value, low, high = block_interval(
                {"v": torch.cat([start, whole], -1)},
                blocks,
                lambda means, at=share: valid_time(means["v"] / most, since, at),  # type: ignore
            )
            for row, shell in enumerate([None, *judged]):
                found = {"value": value[row], "low": low[row], "high": high[row]}
                name = f"{GROWTH}{100 * share:g}"
                numbers = {key: float(one) for key, one in found.items()}
                yield method, {"score": name, "shell": shell, **numbers}
