"""Calibration and cost against the number of evaluations and the sampler, on a known law.

A model is fitted to draws of a law (:mod:`.known`), or read from a file. It is judged on unseen
states, without sensors, beside draws of the law itself. Each sampler and number of evaluations has
a row:

* ``relative_error`` of a single member, and ``crps_ratio`` to the oracle (1 is optimal);
* ``spread_ratio`` to the oracle, total and per shell; ``min_shell`` and ``max_shell``: extremes
  over the shells with more than 1e-3 of the noise's variance (``shells``);
* ``low_variance`` and ``high_variance``: the spread ratio over the quarter of all points and
  states in which the law's spread is smallest and largest; a law that does not depend on the state
  fails there;
* ``rank_p``: p-value of the truth's ranks at the point of each state with the largest spread;
* ``cost_ms``: milliseconds for ``members`` samples of a state.

The ratios have 95 % intervals over the states (``crps_low``, ``crps_high``, ``spread_low``,
``spread_high``). Each row has its own draws. The row ``oracle_x0.95`` is the control: the oracle's
draws with reduced spread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hpc_closure.bench.model.known import Known
from hpc_closure.closure.fields.losses import crps
from hpc_closure.closure.model import ClosureModel, Request
from hpc_closure.closure.sampling import SAMPLERS
from hpc_closure.evaluate.scores import pointwise
from hpc_closure.evaluate.scores.intervals import block_interval
from hpc_closure.evaluate.scores.rank_histogram import rank_counts, rank_p, ranks
from hpc_closure.evaluate.scores.spectra import shell_power
from hpc_closure.evaluate.stages.generated import CONTROL

METHODS = ("euler", "heun", "dpmpp_2m")
EVALUATIONS = (1, 2, 4, 8, 16, 32)
FLOOR = 1e-3  # least share of the noise's variance in a shell that is judged
REFERENCE = 4  # draws of the law over draws of the model
CHUNK = 25  # states per chunk
SEED = 7  # seed of the first row's draws
ORACLE = "oracle"
MEAN_GP = "mean_gp"
ONE_PASS = "one_pass"
COLUMNS = {
    "case": "",
    "method": "",
    "evaluations": "d",
    "relative_error": ".4g",
    "crps_ratio": ".4f",
    "crps_low": ".4f",
    "crps_high": ".4f",
    "spread_ratio": ".4f",
    "spread_low": ".4f",
    "spread_high": ".4f",
    "min_shell": ".3f",
    "max_shell": ".3f",
    "low_variance": ".3f",
    "high_variance": ".3f",
    "rank_p": ".2g",
    "cost_ms": ".2f",
}


@dataclass(frozen=True)
class Plan:
    """Settings of the measurement of a model.

    Attributes:
        methods: keys of ``SAMPLERS``.
        evaluations: budgets.
        states, members: number of unseen states, and members per state.
        repeats: timings of the cost, of which the median is reported.
        device: device of the models.
    """

    methods: Sequence[str] = METHODS
    evaluations: Sequence[int] = EVALUATIONS
    states: int = 32
    members: int = 32
    repeats: int = 3
    device: str = "cpu"

    def __post_init__(self):
        for method in self.methods:
            if method not in SAMPLERS:
                raise ValueError(f"method {method!r}: expected one of {', '.join(METHODS)}")
        if self.members < 2:
            raise ValueError(f"members={self.members}: a spread needs at least 2")

    @property
    def settings(self) -> list[tuple[str, int]]:
        """Method and budget of each row."""
        return [(method, budget) for method in self.methods for budget in self.evaluations]


def run(
    known: Known,
    model: ClosureModel,
    plan: Plan = Plan(),
    *,
    crps_generator: ClosureModel | None = None,
    unseen: Sequence[tuple[Tensor, Tensor]] = (),
) -> list[dict[str, Any]]:
    """Measure the rows: oracle, mean + Gaussian process, CRPS generator, methods x evaluations.

    Args:
        known: the law.
        model: a model fitted to it.
        plan: settings of the measurement.
        crps_generator: a model whose generator was trained by CRPS, for a further row.
        unseen: batches on which the spread of every setting, of ``crps_generator`` as well, is
            calibrated as in training. Without them only the model's default setting is.
    """
    members, device = plan.members, plan.device
    states = known.states("test", plan.states)
    truth = known.draw(states, 9_000_000)
    reference = Reference(known, states, truth, members)
    rows = []

    def add(method: str, budget: int | None, draw, cost: float | None = None) -> None:
        rows.append(
            {
                "case": known.case,
                "method": method,
                "evaluations": budget,
                **reference.judge(draw),
                "cost_ms": cost,
            }
        )

    # the oracle's row has draws apart from the reference, so it shows the effect of chance
    oracle_members = range(members)
    add(ORACLE, None, lambda chosen: reference.law(chosen, oracle_members))

    def control(chosen: slice) -> Tensor:
        drawn, mean = reference.law(chosen, oracle_members), known.law.mean(states[chosen])
        return mean + CONTROL * (drawn - mean)

    add(f"{ORACLE}_x{CONTROL:g}", None, control)

    def measure(label: str, drawer: ClosureModel, method: str | None, budget: int | None) -> None:
        drawer = drawer.to(device)
        # each row has another seed
        request = Request(states, (), SEED + len(rows), method=method, evaluations=budget)
        cost = _cost(drawer, request, plan)
        add(
            label,
            budget,
            partial(_draw, drawer, members, request, device),
            cost,
        )

    def calibrate_spread(drawer: ClosureModel) -> None:
        if unseen:
            drawer.begin("check", unseen)
            drawer.eval()

    measure(MEAN_GP, model, MEAN_GP, None)
    if crps_generator is not None:
        calibrate_spread(crps_generator)
        measure(ONE_PASS, crps_generator, None, 1)
    for method, budget in plan.settings:
        if unseen:
            model.config.update(method=method, function_evaluations=budget)
        calibrate_spread(model)
        measure(method, model, method, budget)
    for row in rows:
        row.update(grid=known.grid, states=plan.states, members=members, device=device)
    return rows


class Reference:
    """The law on some states, from many draws, and a truth per state."""

    def __init__(self, known: Known, states: Tensor, truth: Tensor, members: int):
        self.known, self.states, self.truth, self.members = known, states, truth, members
        first, second = (
            self._sum(range(start, start + REFERENCE * members // 2))
            for start in (members, members + REFERENCE * members // 2)
        )
        # half of the draws select the places, the other half measure them
        order = first["variance_map"].flatten().argsort()
        quarter = len(order) // 4
        self.low_variance, self.high_variance = order[:quarter], order[-quarter:]
        self.widest = first["variance_map"].flatten(1).argmax(1)
        self.found = {key: (first[key] + second[key]) / 2 for key in first if "map" not in key}
        self.found["map"] = second["variance_map"].flatten()
        shells = self.found["shells"].mean(0)
        self.judged = (shells / shells.sum()) > FLOOR

    def law(self, chosen: slice, members: range) -> Tensor:
        """Draw from the law, (members, states, n, n), with a seed per chunk."""
        seed = self.known.seed + 2 + chosen.start
        return self.known.law.sample(self.states[chosen], members=members, seed=seed)

    def _sum(self, members: range) -> dict[str, Tensor]:
        return self._statistics(lambda chosen: self.law(chosen, members))

    def _statistics(self, draw, widest: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the statistics of the scores per state; ``draw(slice)`` returns the members."""
        parts: dict[str, list[Tensor]] = {}
        ties = torch.Generator().manual_seed(self.known.seed)
        for start in range(0, len(self.states), CHUNK):
            chosen = slice(start, min(start + CHUNK, len(self.states)))
            ensemble, truth = draw(chosen).double(), self.truth[chosen].double()
            shells = shell_power(ensemble - ensemble.mean(0)).sum(0) / (len(ensemble) - 1)
            chunk_statistics = {
                "relative_error": pointwise.relative_error(ensemble, truth),
                "crps": crps(ensemble, truth),
                "variance": pointwise.variance(ensemble),
                "shells": shells,
                "variance_map": ensemble.var(0).float(),
            }
            if widest is not None:
                place = widest[chosen]
                rows = torch.arange(len(place))
                at = ensemble.flatten(2)[:, rows, place], truth.flatten(1)[rows, place]
                chunk_statistics["rank_map"] = ranks(*at, ties)
            for key, value in chunk_statistics.items():
                parts.setdefault(key, []).append(value)
        return {key: torch.cat(value) for key, value in parts.items()}

    def _ratio(self, values: Tensor, law: Tensor, form, name: str) -> dict[str, float]:
        """Compute the ratio of a score to the law's, with its interval over the states."""
        interval = block_interval(
            {"own": values, "law": law},
            torch.arange(len(values)),
            lambda means: form(means["own"], means["law"]),
        )
        names = (f"{name}_ratio", f"{name}_low", f"{name}_high")
        return {key: float(value) for key, value in zip(names, interval, strict=True)}

    def judge(self, draw) -> dict[str, Any]:
        """Compute the columns of a row from the ensembles of ``draw(slice)``."""
        scores, law = self._statistics(draw, self.widest), self.found
        shells = pointwise.spread_ratio(scores["shells"].mean(0), law["shells"].mean(0))[
            self.judged
        ]
        variance = scores["variance_map"].flatten()
        places = {
            name: float(pointwise.spread_ratio(variance[place].mean(), law["map"][place].mean()))
            for name, place in (
                ("low_variance", self.low_variance),
                ("high_variance", self.high_variance),
            )
        }
        return {
            "relative_error": float(scores["relative_error"].mean()),
            **self._ratio(scores["crps"], law["crps"], pointwise.crps_ratio, "crps"),
            **self._ratio(scores["variance"], law["variance"], pointwise.spread_ratio, "spread"),
            "min_shell": float(shells.min()),
            "max_shell": float(shells.max()),
            "shells": self.judged.nonzero()[:, 0].tolist(),
            "spread_ratio_shells": shells.tolist(),
            **places,
            "rank_p": rank_p(rank_counts(scores["rank_map"], self.members)),
        }


def _draw(model, members: int, request: Request, device: str, chosen: slice) -> Tensor:
    """Draw (members, states, n, n) float64 for a slice of the request's states."""
    out = []
    for number in range(chosen.start, chosen.stop):
        ids = range(number * members, (number + 1) * members)
        state = request.state[number : number + 1].float().to(device)
        drawn = model.sample_batch(replace(request, state=state, members=ids))
        out.append(drawn.double().cpu())
    return torch.stack(out, 1)


def _cost(model, request: Request, plan: Plan) -> float:
    """Measure milliseconds for the members of a state."""
    state, taken = request.state[:1].float().to(plan.device), []
    for call in range(plan.repeats + 1):
        start = time.perf_counter()
        members = range(plan.members)
        drawn = model.sample_batch(replace(request, state=state, members=members, call=call))
        float(drawn[0, 0, 0])  # waits for the device
        taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken[1:])
