"""How often draws of a coupled run were brought back into the training's range.

A closure that reads its own last draws is guarded: a draw of which a shell is larger than the
training's hardly ever are is made smaller. The share of draws so changed, from the start to each
lead time, stands beside what draws exchangeable with the DNS's own closures would have: the share
of training closures that are beyond the same bounds.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_closure.evaluate.scores.intervals import block_interval
from hpc_closure.evaluate.scores.record import Score

SHARE, EXPECTED = "brought_back", "brought_back_expected"
TABLE = "Draws that were brought back"
REQUIRES = "a closure that reads its own last draws (coupled)"
SCORES = (
    Score(
        name=SHARE,
        heading="brought back",
        meaning="share of the draws from the start on of which a shell was larger than the "
        "training's hardly ever are, and was brought back into their range",
        table=TABLE,
        requires=REQUIRES,
        per_shell=True,
        by_lead_time=True,
    ),
    Score(
        name=EXPECTED,
        heading="expected",
        meaning="the same share of draws that are exchangeable with the DNS's own closures: of "
        "training closures from which the range was not taken",
        table=TABLE,
        requires=REQUIRES,
        per_shell=True,
    ),
)


def shares(counts: np.ndarray | Tensor) -> Iterator[dict[str, Any]]:
    """Columns ``score, shell, value, low, high`` of the share of draws brought back.

    In total, and in each shell from 1 on; intervals are over starts.

    Args:
        counts: (members, starts, 2 + shells): draws since the start, those of them brought back in
            any shell, and in each.
    """
    sums = torch.as_tensor(counts, dtype=torch.float64).sum(0)
    if not bool(sums[:, 0].sum() > 0):
        return
    found = block_interval(
        {"n": sums[:, :1], "back": sums[:, 1:]},
        torch.arange(len(sums)),
        lambda means: means["back"] / means["n"].clamp(min=1e-300),
    )
    for place, shell in _places(len(found[0])):
        numbers = {name: float(one[place]) for name, one in zip(("value", "low", "high"), found)}
        yield {"score": SHARE, "shell": shell, **numbers}


def expected(model: Tensor | None) -> Iterator[dict[str, Any]]:
    """Columns of the share expected of the DNS's own closures; none where it is not known.

    Args:
        model: (1 + shells,) as :attr:`~hpc_closure.closure.model.ClosureModel.expected_back`.
    """
    if model is not None:
        for place, shell in _places(len(model)):
            yield {"score": EXPECTED, "shell": shell, "value": float(model[place])}


def _places(columns: int) -> Iterator[tuple[int, int | None]]:
    """Column and shell: the total first; shell 0 holds a mean, which is zero."""
    return ((place, place - 1 if place else None) for place in range(columns) if place != 1)


def records(
    counts: Mapping[str, Sequence[np.ndarray]],
    model: Mapping[str, Tensor | None],
    leads: Sequence[float],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Method and columns of all rows.

    Args:
        counts: method -> counts, as :func:`shares` has them, at each lead time.
        model: method -> expected shares.
        leads: lead times.
    """
    for method, each in counts.items():
        for lead, one in zip(leads, each, strict=True):
            for columns in shares(one):
                yield method, {"lead_time": lead, **columns}
        for columns in expected(model.get(method)):
            yield method, columns
