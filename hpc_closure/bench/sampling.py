"""Calibration and cost against the number of evaluations and the sampler, on a known law.

A model is fitted to draws of a law (:mod:`.known`), or read from a file, and judged on states it
has not seen, without sensors, beside draws of the law itself. One row for each sampler and number
of evaluations:

* ``relative_error`` of one member and ``crps_ratio`` to the oracle (1 is the best there is);
* ``spread_ratio`` to the oracle, in all and per shell; ``lowest`` and ``highest`` of the shells
  with more than 1e-3 of the noise's variance (``shells``);
* ``cost_ms`` of ``members`` samples for one state.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpc_closure.bench.known import Known
from hpc_closure.closure.model import ClosureModel
from hpc_closure.closure.sample import SAMPLERS
from hpc_closure.evaluate import scores
from hpc_closure.evaluate.spectra import shell_power

METHODS = ("euler", "midpoint", "heun", "adams", "ddim", "ancestral", "dpmpp_2m")
EVALUATIONS = (1, 2, 4, 8, 16, 32)
FLOOR = 1e-3  # share of the noise's variance that a shell must have to be judged
REFERENCE = 4  # times as many draws of the law as of the model
ORACLE = "oracle"
MEAN_GP = "mean_gp"
COLUMNS = {"case": "", "method": "", "evaluations": "d", "relative_error": ".4g",
           "crps_ratio": ".4f", "spread_ratio": ".4f", "lowest": ".3f", "highest": ".3f",
           "cost_ms": ".2f"}  # fmt: skip


def run(
    known: Known,
    model: ClosureModel,
    *,
    methods: Sequence[str] = METHODS,
    evaluations: Sequence[int] = EVALUATIONS,
    states: int = 32,
    members: int = 32,
    repeats: int = 3,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Records: the oracle, mean + Gaussian process, then methods x evaluations.

    Args:
        known: the law.
        model: fitted to it, on ``device``.
        methods: keys of ``SAMPLERS``.
        evaluations: budgets; those that a method cannot spend are left out.
        states, members: unseen states, and members drawn for each.
        repeats: timings of the cost; their median is given.
    """
    for method in methods:
        if method not in SAMPLERS:
            raise ValueError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    if members < 2:
        raise ValueError(f"members={members}: a spread needs at least 2")
    given = known.states("test", states)
    truth = known.draw(given, 9_000_000)
    own, many = range(members), range(members, (1 + REFERENCE) * members)
    reference = _statistics(known.law.sample(given, members=many, seed=known.seed + 2), truth)
    # draws of its own for the oracle's row, which so shows what chance does
    again = known.law.sample(given, members=own, seed=known.seed + 2)
    judged = (reference["shells"] / reference["shells"].sum()) > FLOOR
    rows = [_row(known, ORACLE, None, _statistics(again, truth), reference, judged, None)]

    def add(method: str, budget: int | None) -> None:
        drawn = _draw(model, given, members, method, budget, device)
        cost = _cost(model, given[:1], members, method, budget, device, repeats)
        found = _statistics(drawn, truth)
        rows.append(_row(known, method, budget, found, reference, judged, cost))

    add(MEAN_GP, None)
    for method in methods:
        for budget in evaluations:
            if budget % SAMPLERS[method].cost and method != "heun":
                continue
            add(method, budget)
    for row in rows:
        row.update(grid=known.grid, states=states, members=members, device=device)
    return rows


def _draw(model, states: Tensor, members: int, method, budget, device) -> Tensor:
    """(members, states, n, n) float64."""
    out = []
    for number, state in enumerate(states.float()):
        ids = range(number * members, (number + 1) * members)
        drawn = model.sample_batch(
            state[None].to(device), members=ids, seed=7, method=method, evaluations=budget
        )
        out.append(drawn.double().cpu())
    return torch.stack(out, 1)


def _cost(model, state: Tensor, members: int, method, budget, device, repeats: int) -> float:
    """Milliseconds for the members of one state."""
    given, taken = state.float().to(device), []
    for call in range(repeats + 1):
        start = time.perf_counter()
        drawn = model.sample_batch(
            given, members=range(members), seed=7, call=call, method=method, evaluations=budget
        )
        float(drawn[0, 0, 0])  # waits for the device
        taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken[1:])


def _statistics(ensemble: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Means over the states of what the scores are made of."""
    anomaly = ensemble - ensemble.mean(0)
    num = len(ensemble)
    return {
        "relative_error": scores.relative_error(ensemble, truth).mean(),
        "crps": scores.crps(ensemble, truth).mean(),
        "variance": scores.variance(ensemble).mean(),
        "shells": shell_power(anomaly).sum(0).mean(0) / (num - 1),
    }


def _row(known, method, budget, found, reference, judged: Tensor, cost) -> dict[str, Any]:
    shells = scores.spread_ratio(found["shells"], reference["shells"])[judged]
    return {
        "case": known.case,
        "method": method,
        "evaluations": budget,
        "relative_error": float(found["relative_error"]),
        "crps_ratio": float(scores.crps_ratio(found["crps"], reference["crps"])),
        "spread_ratio": float(scores.spread_ratio(found["variance"], reference["variance"])),
        "lowest": float(shells.min()),
        "highest": float(shells.max()),
        "shells": judged.nonzero()[:, 0].tolist(),
        "spread_ratio_shells": shells.tolist(),
        "cost_ms": cost,
    }
