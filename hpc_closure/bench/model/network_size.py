"""Calibration against the size of the networks, on a known law.

A model of each size is trained for an equal number of steps on the same draws (:mod:`.known`), and
judged on unseen states (:mod:`.sampling`) with its sampler. ``score`` is whether the generator
acts. ``front`` is whether no other size is both cheaper to train and nearer to the law.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from hpc_closure.bench.model import sampling
from hpc_closure.bench.model.known import Known, fit

COLUMNS = {
    "width": "d",
    "layers": "d",
    "modes": "d",
    "weights": "d",
    "score": "",
    "train_s": ".1f",
    "sample_ms": ".1f",
    "crps_ratio": ".4f",
    "crps_low": ".4f",
    "crps_high": ".4f",
    "spread_ratio": ".4f",
    "min_shell": ".3f",
    "max_shell": ".3f",
    "low_variance": ".3f",
    "high_variance": ".3f",
    "front": "",
}
SCORES = [key for key in COLUMNS if key in sampling.COLUMNS]


class Size(NamedTuple):
    """Size of a model's networks: keys of its section."""

    width: int
    layers: int
    modes: int


def run(
    known: Known,
    sizes: Sequence[Size],
    plan: sampling.Plan,
    *,
    samples: int = 2000,
    steps: int = 2000,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Train and measure each size; returns seconds of training, milliseconds of a sample, scores.

    Args:
        known: the law.
        sizes: the sizes.
        plan: numbers of states and members; methods and budgets are those of the models.
        samples: states in each half of the training data.
        steps: steps of every training.
        report: called with each row when it is complete, without ``front``.
    """
    rows: list[dict[str, Any]] = []
    data = known.data(samples)
    for size in sizes:
        began = time.perf_counter()
        model = fit(known, data=data, steps=steps, config=size._asdict())
        took = time.perf_counter() - began
        method, evaluations = model.config["method"], int(model.config["function_evaluations"])
        settings = replace(plan, methods=(method,), evaluations=(evaluations,))
        scores = sampling.run(known, model, settings)[-1]
        row = {
            **size._asdict(),
            "weights": model.num_parameters(),
            "score": "acts" if model.score_active else "does not act",
            "train_s": took,
            "sample_ms": scores["cost_ms"],
            **{key: scores[key] for key in SCORES},
        }
        report(row)
        rows.append(row)
    mark_front(rows)
    return rows


def mark_front(rows: list[dict[str, Any]]) -> None:
    """Set ``front`` of each row: whether no other row is better in cost and score.

    Another row is better if it is better in one of them and not worse in the other.
    """
    places = [(row["train_s"], row["crps_ratio"]) for row in rows]
    for row, (cost, score) in zip(rows, places, strict=True):
        beaten = any(a <= cost and b <= score and (a < cost or b < score) for a, b in places)
        row["front"] = "no" if beaten else "yes"
