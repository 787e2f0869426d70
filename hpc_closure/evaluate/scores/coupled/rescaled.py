"""Compute the share of draws in a coupled run that were rescaled into the training's range.

A closure that reads its own last draws is guarded: if the power of a draw in a wavenumber shell
exceeds a high quantile of the training closures, the draw is made smaller. The share of draws
changed in this way, from the start to each lead time, is compared with the share of training
closures beyond the same bounds, which draws exchangeable with the DNS's closures would have.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_closure.evaluate.scores.intervals import block_interval
from hpc_closure.evaluate.scores.record import Score

SHARE, EXPECTED = "rescaled_share", "rescaled_share_expected"
TABLE = "Rescaled draws"
REQUIRES = "a closure that reads its own last draws (coupled)"
SCORES = (
    Score(
        name=SHARE,
        heading="rescaled",
        meaning="share of the draws since the start in which the power of a shell was beyond "
        "the training's range and was rescaled into it",
        table=TABLE,
        requires=REQUIRES,
        per_shell=True,
        by_lead_time=True,
    ),
    Score(
        name=EXPECTED,
        heading="expected",
        meaning="the same share for closures of the DNS: training closures that were not used to "
        "set the range",
        table=TABLE,
        requires=REQUIRES,
        per_shell=True,
    ),
)


def shares(counts: np.ndarray | Tensor) -> Iterator[dict[str, Any]]:
    """Yield columns ``score, shell, value, low, high`` of the share of rescaled draws.

    The share is given in total and for each shell from 1 on; intervals are over starts.

    Args:
        counts: (members, starts, 2 + shells). Column 0 is the number of draws since the start,
            column 1 the number rescaled in any shell, column 2 + s that in shell s.
    """
    sums = torch.as_tensor(counts, dtype=torch.float64).sum(0)
    if not bool(sums[:, 0].sum() > 0):
        return
    interval = block_interval(
        {"n": sums[:, :1], "rescaled": sums[:, 1:]},
        torch.arange(len(sums)),
        lambda means: means["rescaled"] / means["n"].clamp(min=1e-300),
    )
    for column, shell in _columns(len(interval[0])):
        numbers = {name: float(c[column]) for name, c in zip(("value", "low", "high"), interval)}
        yield {"score": SHARE, "shell": shell, **numbers}


def expected(model: Tensor | None) -> Iterator[dict[str, Any]]:
    """Yield columns of the share expected of the DNS's closures; nothing if it is unknown.

    Args:
        model: (1 + shells,) as :attr:`~hpc_closure.closure.model.ClosureModel.expected_rescaled`.
    """
    if model is not None:
        for column, shell in _columns(len(model)):
            yield {"score": EXPECTED, "shell": shell, "value": float(model[column])}


def _columns(number: int) -> Iterator[tuple[int, int | None]]:
    """Yield column and shell, the total first; shell 0 is left out, for the mean is zero."""
    return ((column, column - 1 if column else None) for column in range(number) if column != 1)


def records(
    counts: Mapping[str, Sequence[np.ndarray]],
    model: Mapping[str, Tensor | None],
    leads: Sequence[float],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield method and columns of all rows.

    Args:
        counts: method -> counts of :func:`shares` at each lead time.
        model: method -> expected shares of :func:`expected`, or None.
        leads: lead times.
    """
    for method, by_lead in counts.items():
        for lead, counts_at in zip(leads, by_lead, strict=True):
            for columns in shares(counts_at):
                yield method, {"lead_time": lead, **columns}
        for columns in expected(model.get(method)):
            yield method, columns
