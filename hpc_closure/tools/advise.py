"""``hpc-closure advise``: estimate whether a closure is worth training, before any training.

It answers two questions on the pilot's trajectories:

* Do unresolved scales follow the resolved ones? Twins, DNS that are nudged to the same resolved
  flow, then converge, and p(U | history) is narrow. Otherwise it is wide.
* How does each *rung* compare with the true ensemble in skill, spread and cost? A rung is a bare
  solver on a finer grid, with the best start and drain that need no training.
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

TOGETHER = 0.1  # difference of twins over the rms closure at which they count as converged
NARROW = 0.3  # the law is narrow if the twins' difference falls below this
FACTORS = (1.5, 2, 2.5, 3, 4, 6, 8)  # grids of the ladder over the reduced solver's grid
SPREAD = 0.1  # largest relative difference between a rung's spread and the true ensemble's
PREDICTABLE = 0.95  # a lead time is late if the true ensemble's error exceeds this share of the
#   error of uninformed states
ROWS = 16  # members of a timed run


@dataclass(frozen=True)
class Step:
    """One rung of the ladder.

    Attributes:
        name: name of the rung.
        grid: points per side.
        stride: DNS steps per step of the rung.
        cfl: CFL number.
        strength: drain over the fitted drain; 0 = no drain.
        crps_ratio, spread_ratio: over those of the true ensemble, by lead time.
        cost: over the cost of the bare reduced solver at its chosen step.
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
    """Complete the pilot, then print the ladder and the verdict. Returns the exit code.

    Args:
        experiment: an experiment of closure subgrid.
        options: options common to all verbs.
        grids: points per side of the rungs; empty = a choice up to the DNS.
        within: largest acceptable CRPS of a rung over that of the true ensemble.

    Raises:
        UsageError: the closure is not subgrid, or a grid or ``within`` is out of range.
    """
    if experiment.generate.closure != "subgrid":
        raise UsageError(
            f"generate.closure={experiment.generate.closure}: the law of this closure is known "
            "exactly; advise is for closure subgrid"
        )
    if experiment.reduced.python or experiment.physics.equation == "external":
        raise UsageError(
            "advise compares solvers of this package on several grids, but the experiment has a "
            "solver of others (reduced.python, physics.equation=external)"
        )
    if within <= 1:
        raise UsageError(f"--within {within:g}: expected a number above 1")
    chosen = ladder(experiment, grids)
    if options.dry_run:
        pilot = experiment.pilot
        print(f"pilot of {pilot.initial_conditions} start(s), {pilot.members} DNS each")
        print("ladder: " + ", ".join(f"{grid}^2" for grid in chosen))
        return 0
    with Session(experiment, "generate", options) as session:
        if code := generate.run_pilot(experiment, session, options, always=True):
            return code
        if session.world.root:
            answers = advise(experiment, chosen, within)
            atomic.write_json(session.run.folder("pilot") / "advice.json", answers)
            for line in answers["lines"]:
                print(line)
    return 0


def ladder(experiment: Experiment, grids: Sequence[int] = ()) -> list[int]:
    """Choose the rungs' points per side: ``grids`` if there are any, else a choice below the DNS.

    Raises:
        UsageError: a grid is odd, below the reduced solver's or above the DNS's.
    """
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
    """Score all rungs; returns plain values: ``twins``, ``ladder``, ``verdict``, ``lines``."""
    trials = Trials(experiment)
    since, difference = trials.twins()
    converged = time_to_converge(since.tolist(), difference.tolist())
    narrow = bool(difference.min() < NARROW)
    truth = trials.true_ensemble()
    true_crps, true_spread = trials.errors(truth).mean(1), trials.spread(truth)
    early = (true_crps < PREDICTABLE * trials.any_state()).tolist()
    log.get().info(f"advise: ladder of {len(grids)} grid(s)")
    steps = _score_rungs(
        experiment, trials, grids, "synchronised" if narrow else "moved", true_crps, true_spread
    )
    leads = trials.leads
    verdict = judge(experiment, steps, early, narrow, within)
    lines = [
        "twins pinned to one flow, their difference over the closure: "
        + ", ".join(f"{d:.2f} after {t:g}" for t, d in _some(since, difference)),
        f"the law is {'narrow' if narrow else 'wide'}: "
        + (
            f"unresolved scales follow the resolved ones; to {TOGETHER:g} in {converged:.2g}"
            if narrow
            else "unresolved scales do not follow the resolved ones"
            + (f" (to {TOGETHER:g} in {converged:.2g})" if math.isfinite(converged) else "")
        ),
        "",
        f"{'rung':32}{'step':>5}{'CFL':>6}{'cost':>7}   CRPS over the true ensemble's [spread]",
        f"{'':32}{'':>5}{'':>6}{'':>7}   " + "".join(_lead(*pair) for pair in zip(leads, early)),
    ]
    for step in steps:
        cells = (f"{a:.2f} [{b:.2f}]" for a, b in zip(step.crps_ratio, step.spread_ratio))
        lines.append(
            f"{step.name:32}{step.stride:>5}{step.cfl:>6.2f}{step.cost:>7.1f}   "
            + "".join(f"{cell:<14}" for cell in cells)
        )
    if not all(early):
        lines.append("lead times in brackets: the true ensemble is no better than climatology")
    return {
        "twins": {"pinned": since.tolist(), "difference": difference.tolist(), "time": converged},
        "narrow": narrow,
        "lead_times": leads,
        "early": early,
        "ladder": [asdict(step) for step in steps],
        "verdict": verdict,
        "lines": [*lines, "", verdict],
    }


def _lead(lead: float, early: bool) -> str:
    return f"{f'{lead:g}' if early else f'({lead:g})':<14}"


def _some(times: torch.Tensor, values: torch.Tensor) -> list[tuple[float, float]]:
    """Pick at most six (time, value) pairs, evenly spaced, with the first and the last."""
    number = min(6, len(times))
    places = [round(place * (len(times) - 1) / max(number - 1, 1)) for place in range(number)]
    return [(float(times[index]), float(values[index])) for index in places]


def time_to_converge(times: Sequence[float], differences: Sequence[float]) -> float:
    """Extrapolate when twins differ by TOGETHER, by an exponential fit to the last half.

    Returns infinity if they do not converge.
    """
    half = len(times) // 2
    t = torch.tensor(times[half:], dtype=torch.float64)
    log_difference = torch.tensor(differences[half:], dtype=torch.float64).log()
    centred = t - t.mean()
    rate = float((centred * log_difference).sum() / centred.square().sum())
    if rate >= 0:
        return math.inf
    return float(t.mean() + (math.log(TOGETHER) - log_difference.mean()) / rate)


def _score_rungs(
    experiment, trials: Trials, grids, start: str, true_crps, true_spread
) -> list[Step]:
    """Run, score and time all rungs and the DNS.

    Args:
        experiment, trials: the experiment and its pilot.
        grids: points per side of the rungs.
        start: start of rungs that are finer than the reduced solver.
        true_crps, true_spread: (leads,) CRPS and spread of the true ensemble.
    """
    scored: list[tuple[Rung, Any, Any, Any]] = []
    clocks: dict[str, costs.Clock] = {}
    with costs.one_thread():
        for grid in grids:
            rung_start = "empty" if grid == experiment.train_grid else start
            rung = Rung(grid=grid, start=rung_start, drain=True)
            choice = trials.rung(rung)
            problem = rung_problem(experiment.problem, grid, choice.stride, choice.drain)
            past = experiment.past_of(rung)
            fields = trials.run(problem, rung_start, past, experiment.pilot.members)
            ratio = trials.errors(fields).mean(1) / true_crps
            scored.append((rung, choice, ratio, trials.spread(fields) / true_spread))
            clocks[rung.name] = costs.bare(trials.started(problem, ROWS), trials.span)
            log.get().info(f"advise: {rung.name} done")
        clocks["none"] = costs.bare(trials.started(trials.bare(), ROWS), trials.span)
        clocks["DNS"] = costs.bare(trials.started(experiment.problem, ROWS), trials.span)
        seconds = costs.fastest(clocks)
    steps = [
        Step(
            rung.name,
            rung.grid,
            choice.stride,
            choice.cfl,
            choice.strength,
            ratio.tolist(),
            spreads.tolist(),
            seconds[rung.name] / seconds["none"],
        )
        for rung, choice, ratio, spreads in scored
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
        seconds["DNS"] / seconds["none"],
    )
    return [*steps, dns]


def judge(
    experiment: Experiment,
    steps: Sequence[Step],
    early: Sequence[bool],
    narrow: bool,
    within: float,
) -> str:
    """Write the verdict in one sentence.

    Args:
        experiment: the experiment.
        steps: the rungs, then the DNS.
        early: which lead times count.
        narrow: whether unresolved scales follow the resolved ones.
        within: largest acceptable CRPS over that of the true ensemble.
    """
    *rungs, dns = steps
    grid, past = experiment.train_grid, 10 * experiment.generate.interval * experiment.generate.dt
    past = max(experiment.replicas.spinup, past)
    begin = f", synchronised for {past:g} time units," if narrow else " from a moved start"

    def worst(step: Step) -> float:
        return max(ratio for ratio, counts in zip(step.crps_ratio, early) if counts)

    def spread_error(step: Step) -> float:
        """Return the largest relative difference between its spread and the true ensemble's."""
        return max(abs(ratio - 1) for ratio, counts in zip(step.spread_ratio, early) if counts)

    good = [
        step
        for step in rungs
        if worst(step) <= within and spread_error(step) <= SPREAD and step.cost < dns.cost
    ]
    if good:
        best = min(good, key=lambda step: step.cost)
        return (
            f"verdict: a {best.grid}x{best.grid} run{begin} is within {worst(best):.2f} of the "
            "true ensemble, its spread "
            f"within {100 * spread_error(best):.0f} %, for {best.cost:.1f} bare "
            f"solvers: a closure on {grid}x{grid} must be as good at lower cost to be worth it"
        )
    best = min(rungs, key=worst)
    nearest = (
        f"the best, {best.grid}x{best.grid}, is within {worst(best):.2f}, its spread within "
        f"{100 * spread_error(best):.0f} %, for {best.cost:.1f} bare solvers"
    )
    if narrow:
        return (
            f"verdict: the law is narrow and no rung below the DNS is within {within:g} of the "
            f"true ensemble ({nearest}): a closure on {grid}x{grid} must beat the synchronised "
            "rungs of equal cost; train one on a rung, which lacks spread more than skill"
        )
    return (
        f"verdict: every rung below the DNS drifts or costs as much as it ({nearest}, the DNS "
        f"{dns.cost:.0f}): train a closure"
    )
