"""``hpc-closure advise``: whether a closure can be expected to pay, before one is trained.

On the pilot's trajectories it asks two things. How fast do twins come together that are pinned to
one flow: do the unresolved scales follow the resolved ones (a narrow law), or have they a life of
their own (a wide one)? And how far does each *rung*, a bare solver on a finer grid with the best
start and drain that need no training, fall behind the true ensemble, at what cost?
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hpc_closure.evaluate.stages import costs
from hpc_closure.experiment.schema import Experiment, Rung
from hpc_closure.generate import verb as generate
from hpc_closure.generate.pilot import Trials
from hpc_closure.generate.rungs import rung_problem
from hpc_closure.work import atomic, log
from hpc_closure.work.options import Options, UsageError
from hpc_closure.work.session import Session

TOGETHER = 0.1  # difference of twins, over the closure: they have come together
NARROW = 0.3  # difference at which unresolved scales follow the resolved ones
FACTORS = (1.5, 2, 2.5, 3, 4, 6, 8)  # grids of the ladder, over the reduced solver's
SPREAD = 0.1  # by which the spread of a rung may differ from the true ensemble's
PREDICTABLE = 0.95  # of the error of any state: beyond, a lead time is late
ROWS = 16  # members that are timed together


@dataclass(frozen=True)
class Step:
    """One rung of the ladder.

    Attributes:
        name: of the rung.
        grid, stride, cfl: of the solver.
        strength: of its drain, over the fit; 0 without.
        crps_ratio, spread_ratio: to the true ensemble, by lead time.
        cost: over the bare reduced solver at its own step.
    """

    name: str
    grid: int
    stride: int
    cfl: float
    strength: float
    crps_ratio: list[float]
    spread_ratio: list[float]
    cost: float


def run(
    experiment: Experiment,
    options: Options = Options(),
    grids: Sequence[int] = (),
    within: float = 1.3,
) -> int:
    """Run the pilot where it is missing, print the ladder and the verdict. Returns the exit code.

    Args:
        experiment: of closure subgrid.
        options: of a verb.
        grids: points per side of the ladder; by default a choice up to the DNS.
        within: CRPS over the true ensemble's that a rung must not exceed.

    Raises:
        UsageError: it is no subgrid closure, or a grid cannot be.
    """
    if experiment.generate.closure != "subgrid":
        raise UsageError(
            f"generate.closure={experiment.generate.closure}: the law of this closure is known "
            "exactly; advise is for closure subgrid"
        )
    if within <= 1:
        raise UsageError(f"--within {within:g}: expected a number above 1")
    chosen = ladder(experiment, grids)
    if options.dry_run:
        print(f"pilot of {experiment.pilot.cases} start(s), {experiment.pilot.members} DNS each")
        print("ladder: " + ", ".join(f"{grid}^2" for grid in chosen))
        return 0
    with Session(experiment, "generate", options) as session:
        if code := generate.run_pilot(experiment, session, options, always=True):
            return code
        if session.world.root:
            found = advise(experiment, chosen, within)
            atomic.write_json(session.run.folder("pilot") / "advice.json", found)
            for line in found["lines"]:
                print(line)
    return 0


def ladder(experiment: Experiment, grids: Sequence[int] = ()) -> list[int]:
    """Points per side of the rungs: those asked for, or a choice below the DNS."""
    least, most = experiment.train_grid, experiment.generate.grid
    for grid in grids:
        if not least <= grid <= most or grid % 2:
            raise UsageError(
                f"--grids {grid}: expected even numbers from the reduced solver's {least} to the "
                f"DNS's {most}"
            )
    even = [2 * round(factor * least / 2) for factor in FACTORS]
    return sorted({*grids} or {least, *(grid for grid in even if grid < most)})


def advise(experiment: Experiment, grids: Sequence[int], within: float) -> dict[str, Any]:
    """The answers, plain values: ``twins``, ``ladder``, ``verdict``, and ``lines`` to print."""
    trials = Trials(experiment)
    since, difference = trials.twins()
    time = together(since.tolist(), difference.tolist())
    narrow = bool(difference.min() < NARROW)
    truth = trials.true_ensemble()
    least, spread = trials.errors(truth).mean(1), trials.spread(truth)
    early = (least < PREDICTABLE * trials.any_state()).tolist()
    log.get().info(f"advise: ladder of {len(grids)} grid(s)")
    steps = _climb(experiment, trials, grids, "synchronised" if narrow else "moved", least, spread)
    leads = trials.leads
    verdict = judge(experiment, steps, early, narrow, within)
    lines = [
        "twins pinned to one flow, their difference over the closure: "
        + ", ".join(f"{d:.2f} after {t:g}" for t, d in _some(since, difference)),
        f"the law is {'narrow' if narrow else 'wide'}: "
        + (
            f"unresolved scales follow the resolved ones; to {TOGETHER:g} in {time:.2g}"
            if narrow
            else "unresolved scales do not follow the resolved ones"
            + (f" (to {TOGETHER:g} in {time:.2g})" if math.isfinite(time) else "")
        ),
        "",
        f"{'rung':32}{'step':>5}{'CFL':>6}{'cost':>7}   CRPS over the true ensemble's [spread]",
        f"{'':32}{'':>5}{'':>6}{'':>7}   " + "".join(_lead(*one) for one in zip(leads, early)),
    ]
    for one in steps:
        cells = (f"{a:.2f} [{b:.2f}]" for a, b in zip(one.crps_ratio, one.spread_ratio))
        lines.append(
            f"{one.name:32}{one.stride:>5}{one.cfl:>6.2f}{one.cost:>7.1f}   "
            + "".join(f"{cell:<14}" for cell in cells)
        )
    if not all(early):
        lines.append("late lead times, in brackets: the true ensemble knows no more than climate")
    return {
        "twins": {"pinned": since.tolist(), "difference": difference.tolist(), "time": time},
        "narrow": narrow,
        "lead_times": leads,
        "early": early,
        "ladder": [asdict(one) for one in steps],
        "verdict": verdict,
        "lines": [*lines, "", verdict],
    }


def _lead(lead: float, early: bool) -> str:
    return f"{f'{lead:g}' if early else f'({lead:g})':<14}"


def _some(times: torch.Tensor, values: torch.Tensor) -> list[tuple[float, float]]:
    """At most six of them, the first and the last included."""
    number = min(6, len(times))
    at = [round(place * (len(times) - 1) / max(number - 1, 1)) for place in range(number)]
    return [(float(times[one]), float(values[one])) for one in at]


def together(times: Sequence[float], differences: Sequence[float]) -> float:
    """Time after which twins differ by TOGETHER: by the rate of the second half of the record.

    Infinite where they do not come together.
    """
    half = len(times) // 2
    t = torch.tensor(times[half:], dtype=torch.float64)
    log_difference = torch.tensor(differences[half:], dtype=torch.float64).log()
    centred = t - t.mean()
    rate = float((centred * log_difference).sum() / centred.square().sum())
    if rate >= 0:
        return math.inf
    return float(t.mean() + (math.log(TOGETHER) - log_difference.mean()) / rate)


def _climb(experiment, trials: Trials, grids, start: str, least, spread) -> list[Step]:
    """All rungs, timed in one run."""
    found: list[tuple[Rung, Any, Any, Any]] = []
    clocks: dict[str, costs.Clock] = {}
    with costs.one_thread():
        for grid in grids:
            own = "empty" if grid == experiment.train_grid else start
            rung = Rung(grid=grid, start=own, drain=True)
            choice = trials.rung(rung)
            problem = rung_problem(experiment.problem, grid, choice.stride, choice.drain)
            past = experiment.past_of(rung)
            fields = trials.run(problem, own, past, experiment.pilot.members)
            ratio = trials.errors(fields).mean(1) / least
            found.append((rung, choice, ratio, trials.spread(fields) / spread))
            clocks[rung.name] = costs.bare(trials.started(problem, ROWS), trials.span)
            log.get().info(f"advise: {rung.name} done")
        clocks["none"] = costs.bare(trials.started(trials.bare(), ROWS), trials.span)
        clocks["DNS"] = costs.bare(trials.started(experiment.problem, ROWS), trials.span)
        spent = costs.fastest(clocks, trials.span)
    steps = [
        Step(
            rung.name,
            rung.grid,
            choice.stride,
            choice.cfl,
            choice.strength,
            ratio.tolist(),
            spreads.tolist(),
            spent[rung.name] / spent["none"],
        )
        for rung, choice, ratio, spreads in found
    ]
    ones = [1.0] * len(trials.leads)
    dns = Step(
        "DNS, the true ensemble",
        experiment.generate.grid,
        1,
        trials.cfl(experiment.problem),
        0.0,
        ones,
        ones,
        spent["DNS"] / spent["none"],
    )
    return [*steps, dns]


def judge(
    experiment: Experiment,
    steps: Sequence[Step],
    early: Sequence[bool],
    narrow: bool,
    within: float,
) -> str:
    """The verdict, in one sentence."""
    *rungs, dns = steps
    grid, past = experiment.train_grid, 10 * experiment.generate.interval * experiment.generate.dt
    past = max(experiment.replicas.pinned, past)
    begun = f", synchronised for {past:g} time units," if narrow else " from a moved start"

    def worst(one: Step) -> float:
        return max(ratio for ratio, counts in zip(one.crps_ratio, early) if counts)

    def apart(one: Step) -> float:
        """Largest difference of its spread, over the true ensemble's."""
        return max(abs(ratio - 1) for ratio, counts in zip(one.spread_ratio, early) if counts)

    good = [
        one
        for one in rungs
        if worst(one) <= within and apart(one) <= SPREAD and one.cost < dns.cost
    ]
    if good:
        best = min(good, key=lambda one: one.cost)
        return (
            f"verdict: a {best.grid}x{best.grid} run{begun} is within {worst(best):.2f} of the "
            "true ensemble, its spread "
            f"within {100 * apart(best):.0f} %, for {best.cost:.1f} bare "
            f"solvers: a closure on {grid}x{grid} has to be as good for less, or it does not pay"
        )
    best = min(rungs, key=worst)
    nearest = (
        f"the best, {best.grid}x{best.grid}, is within {worst(best):.2f}, its spread within "
        f"{100 * apart(best):.0f} %, for {best.cost:.1f} bare solvers"
    )
    if narrow:
        return (
            f"verdict: the law is narrow and no rung below the DNS is within {within:g} of the "
            f"true ensemble ({nearest}): a closure on {grid}x{grid} has to beat the synchronised "
            "rungs at its cost; train one on a rung, which lacks spread more than skill"
        )
    return (
        f"verdict: every rung below the DNS drifts or costs as much as it ({nearest}, the DNS "
        f"{dns.cost:.0f}): train a closure"
    )
