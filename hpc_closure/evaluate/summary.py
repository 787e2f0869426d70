"""What was run and what came out, in a few lines; nothing here is written by hand for one run.

The model always stands beside what it has to be measured against: the exact law where there is
one, and the best answer that needs no network.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pandas import DataFrame, isna

from hpc_closure.closure.artifact import Closure
from hpc_closure.closure.composed import ComposedModel
from hpc_closure.closure.parts import PartReport, describe
from hpc_closure.evaluate.inputs import Inputs
from hpc_closure.evaluate.rank_histogram import LEVEL
from hpc_closure.evaluate.rows import GRANTED, find, format_value, select

CONTROL_SEES = 0.05  # spread error that a test must see to be passed
# closures without a generator, in words
OPPONENTS = {
    "gaussian_modes": "a Gaussian law by wavevector",
    "gaussian_state": "a Gaussian law that follows the state",
    "mixture": "a mixture of two Gaussian laws that follow the state",
}
REFERENCES = {
    "oracle": "the exact law",
    "mean_gp": "mean + Gaussian process",
    **OPPONENTS,
    "physics": "the granted physics",
    "fourier": "Fourier interpolation of the sensors alone",
    "climatology": "climatology",
    "none": "no closure",
}
GROUP = ["closure", "sensors", "grid", "interval", "split"]


@dataclass(frozen=True)
class Line:
    """One line of the summary: a question, the model's answer, and what stands beside it."""

    what: str
    model: str
    beside: str = ""


def facts(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Heading -> facts on what was run."""
    experiment, model = inputs.experiment, inputs.closure.config
    physics, dns, coupled = experiment.physics, experiment.generate, experiment.rollout
    times = inputs.data.times
    compared = {
        one.name: f"{one.path}: {describe(closure.parts())}; generator "
        + generator_in_words(closure, None)
        for one, closure in zip(inputs.chosen, inputs.compared.values(), strict=True)
    }
    return {
        "Problem": {
            "equation": physics.equation,
            "viscosity": experiment.problem.viscosity,
            "forcing, noise": f"{physics.forcing.kind}, {physics.noise.kind}",
            "closure": f"{inputs.target}, mean of {dns.interval} step(s)",
        },
        "Data": {
            "DNS": f"{dns.grid}², dt {dns.dt:g}, {dns.scheme}",
            "trajectories": ", ".join(f"{len(v)} {k}" for k, v in inputs.parts.items()),
            "stored": f"t = {times[0]:g} to {times[-1]:g}, {len(times)} times on "
            f"{inputs.data.grid}²",
        },
        "Model": {
            "preset": model["preset"],
            "conditions": ", ".join(f"{key}: {v}" for key, v in model["conditions"].items()),
            "weights": sum(weight.numel() for weight in inputs.closure.model.parameters()),
            "steps": experiment.train.steps,
            "parts": describe(inputs.closure.parts()),
            "generator": generator_in_words(
                inputs.closure, experiment.evaluate.sampler.evaluations
            ),
        },
        **({"Compared": compared} if compared else {}),
        "Coupled run": {
            "members, starts": f"{coupled.members}, {coupled.cases}",
            "time": f"{coupled.t_start:g} to {coupled.t_end:g}",
            "closure called": f"every {coupled.interval} step(s), "
            f"{inputs.closure.hold(coupled.interval)}",
        },
    }


def generator_in_words(closure: Closure, asked: int | None) -> str:
    """Grid, modes and evaluations of a closure's generator."""
    number = closure.evaluations(asked)
    if not number:
        return "does not act"
    config, effort = closure.config, f"{number} evaluation{'' if number == 1 else 's'}"
    if isinstance(closure.model, ComposedModel):
        frame = closure.model.frame
        return f"on a {frame.size}x{frame.size} grid, {frame.kept.modes} modes, {effort}"
    return f"on the grid of the states, {config['modes']} modes, {effort}"


def headline(parts: Sequence[PartReport], rows: DataFrame) -> list[str]:
    """First lines of a report: which parts act and, where the exact law is known, what for."""
    lines = [describe(parts)]
    for columns, group in groups(rows, "generated"):
        if columns["sensors"] == "none" and (line := Answers(columns, group).added()):
            lines.append(line)
            break
    return lines


def groups(rows: DataFrame, stage: str) -> Iterator[tuple[dict, DataFrame]]:
    """Rows of one stage that belong into one table: equal closure, sensors, grid, interval."""
    for key, group in select(rows, stage=stage).groupby(GROUP, dropna=False, sort=False):
        yield {name: None if isna(v) else v for name, v in zip(GROUP, key, strict=True)}, group


def heading(columns: dict) -> str:
    """A group in words: ``diffusion, no sensors, 64² grid``."""
    sensors = columns["sensors"]
    layout = "no sensors" if sensors == "none" else f"sensors: {sensors}"
    return f"{columns['closure']}, {layout}, {columns['grid']}² grid"


def summarise(
    rows: DataFrame, start: float | None = None, closed: Collection[str] = ()
) -> list[Line]:
    """Lines on every group that has a model.

    Args:
        rows: all rows of the run.
        start: time at which the coupled runs start.
        closed: methods in which no trained part acts.
    """
    lines: list[Line] = []
    for columns, group in groups(rows, "generated"):
        lines += Answers(columns, group, closed).generated()
    for columns, group in groups(rows, "coupled"):
        lines += Answers(columns, group, closed).coupled(start)
    return lines


class Answers:
    """The numbers of one group, in words."""

    def __init__(self, columns: dict, rows: DataFrame, closed: Collection[str] = ()):
        self.rows = select(rows, shell=None)
        self.words, self.interval = heading(columns), columns["interval"]
        self.granted = GRANTED in set(rows["method"])
        self.model = GRANTED if self.granted else "model"
        self.closed = ", closed form" if self.model in closed else ""

    def row(self, score: str, method: str = "", time: float | None = None):
        """The row of a score, of the model where no method is named; None where there is none."""
        return find(self.rows, method=method or self.model, score=score, lead_time=time)

    def others(self, score: str, time: float | None = None) -> str:
        """The same score of the methods that a reader compares with."""
        scored = {name: self.row(score, name, time) for name in REFERENCES}
        return ", ".join(
            f"{REFERENCES[name]} {format_value(score, row.value)}"
            for name, row in scored.items()
            if row is not None
        )

    def last(self, score: str) -> float | None:
        """The last lead time at which the model has a score."""
        times = select(self.rows, method=self.model, score=score)["lead_time"].dropna()
        return None if times.empty else times.max()

    def generated(self) -> Iterator[Line]:
        row = self.row("relative_error")
        if row is not None:
            what = f"Generated closure ({self.words}): relative error of one sample"
            what += self.closed or _effort(row.evaluations)
            if self.granted:
                what += ", granted an estimate of the closure"
            beside = [self.others("relative_error")]
            floor = self.row("floor", "oracle")
            if floor is not None:
                bound = f"σ/rms(U) = {format_value('floor', floor.value)}"
                beside.append(f"no mean without more information can be nearer than {bound}")
            yield Line(what, say(row), "; ".join(filter(None, beside)))
        if not self.granted:  # what was granted certifies nothing
            yield from self.calibration()

    def opponent(self) -> str | None:
        """The method without a generator that has the least CRPS; None where there is none."""
        names = [name for name in ("mean_gp", *OPPONENTS) if self.row("crps_ratio", name)]
        return min(names, key=lambda name: self.row("crps_ratio", name).value, default=None)

    def added(self) -> str:
        """What the generator adds to the best answer without one, by the exact law."""
        own = self.row("crps_ratio")
        if own is None:
            return ""
        if not own.evaluations:
            return (
                f"what the generator adds: nothing, it does not act; CRPS {say(own)} times "
                "the exact law's"
            )
        words = f"what the generator adds: CRPS {say(own)} times the exact law's"
        best = self.opponent()
        if best is None:
            return words
        number = sum(self.row("crps_ratio", name) is not None for name in ("mean_gp", *OPPONENTS))
        whose = REFERENCES[best]
        whose += f", the best of {number} without a generator" if number > 1 else ""
        words += f", against {say(self.row('crps_ratio', best))} of {whose}"
        energy = self.row("energy_score_to_model", best)
        if energy is not None:
            words += f", whose energy score is {say(energy)} times the model's"
        return f"{self._verdict_on(best)}{words}{self._spreads(best)}"

    def _verdict_on(self, best: str) -> str:
        """What comes first where the best opponent is as good as the generator."""
        pair = self.row("crps_to_model", best)
        if pair is None or isna(pair.low) or pair.low > 1:
            return ""
        how = "is better than" if pair.high < 1 else "is as good as"
        return f"{REFERENCES[best]} {how} the generator: {say(pair)} times its CRPS; "

    def _spreads(self, best: str) -> str:
        """Spreads of the model and of an opponent, over the exact law's."""
        spreads = []
        for score, where in (
            ("spread_ratio", "in all"),
            ("spread_ratio_calm", "in calm quarters"),
            ("spread_ratio_wild", "in wild ones"),
        ):
            own, plain = (self.row(score, name) for name in ("", best))
            if own is not None and plain is not None:
                values = (format_value(score, row.value) for row in (own, plain))
                spreads.append("{} against {} ".format(*values) + where)
        return f"; spread {', '.join(spreads)}; the exact law has 1" if spreads else ""

    def calibration(self) -> Iterator[Line]:
        parts = []
        for score, words in (
            ("crps_ratio", "CRPS {} times the exact law's"),
            ("spread_ratio", "spread {} of the exact law's"),
        ):
            if (row := self.row(score)) is not None:
                parts.append(words.format(say(row)))
        if not parts and (skill := self.row("spread_skill")) is not None:
            parts.append(f"spread over skill {say(skill)}")
        p = self.row("rank_p")
        if p is not None:
            parts.append(f"the rank histogram {self._verdict(p)}")
        ranked = select(self.rows, score="rank_p")
        controls = ranked[ranked["method"].str.startswith("oracle_x")]
        oracle, beside = self.row("rank_p", "oracle"), ""
        if p is not None and oracle is not None and len(controls):
            control = next(controls.itertuples())
            sound = oracle.value >= LEVEL > control.value
            beside = (
                f"the exact law has p {_p(oracle)}, and with 95\u00a0% of its spread p "
                f"{_p(control)}: this test {'can' if sound else 'could not'} tell them apart"
            )
        if parts:
            yield Line(f"Calibration ({self.words})", ", ".join(parts), beside)

    def _verdict(self, p) -> str:
        """What a rank test says, and how large a spread error it could have seen."""
        if p.value < LEVEL:
            return f"fails (p {_p(p)})"
        seen = self.row("rank_sees")
        if seen is None or math.isnan(seen.value):
            return f"does not fail (p {_p(p)}), with too few ranks to see a wrong spread"
        size = f"a spread wrong by {100 * seen.value:.2g}\u00a0%"
        if seen.value > CONTROL_SEES:
            return f"does not fail (p {_p(p)}), and would as a rule not see less than {size}"
        return f"passes (p {_p(p)}; it sees {size})"

    def coupled(self, start: float | None) -> Iterator[Line]:
        last = self.last("relative_error_mean")
        if last is not None:
            row, none = (self.row("relative_error_mean", m, last) for m in ("", "none"))
            when = "the end" if start is None else f"t = {start + last:g}"
            since = "" if start is None else f"start {start:g}, "
            cases = "1 start" if row.samples == 1 else f"{row.samples} starts"
            what = (
                f"Coupled run ({self.words}, a sample held for {self.interval} solver steps) at "
                f"{when} ({since}horizon {last:g}; {row.members} members, {cases}): relative "
                f"error of the ensemble mean{self.closed}"
            )
            beside = self.others("relative_error_mean", last)
            if none is not None and 0 < none.value < math.inf and 0 < row.value < math.inf:
                factor = none.value / row.value
                words = (
                    f"{factor:.3g} times nearer"
                    if factor >= 1
                    else f"{1 / factor:.3g} times farther"
                )
                beside += f": {words} than without closure"
            yield Line(what, say(row), beside)
        yield from self.spread()
        yield from self.cost()
        yield from self.event()

    def spread(self) -> Iterator[Line]:
        last = self.last("spread_skill")
        parts = []
        for score, words in (
            ("spread_ratio", "of the true ensemble's"),
            ("spread_skill", "of its error"),
        ):
            if last is not None and (row := self.row(score, time=last)) is not None:
                parts.append(f"{say(row)} {words}")
        if parts:
            yield Line("Spread of that ensemble at the last lead time", " and ".join(parts))

    def cost(self) -> Iterator[Line]:
        cost, ratio = self.row("cost_ms"), self.row("cost_ratio")
        if cost is not None:
            beside = ""
            if ratio is not None:
                beside = f"{format_value('cost_ratio', ratio.value)} times the bare solver"
            yield Line(
                "Cost of a member step", f"{format_value('cost_ms', cost.value)} ms", beside
            )

    def event(self) -> Iterator[Line]:
        time = self.last("probability")
        if time is None:
            return
        row, needed = (self.row(name, time=time) for name in ("probability", "members_needed"))
        beside = [self.others("probability", time)]
        if needed is not None:
            size = f"{needed.value:.0f} members"
            beside.append(f"{size} would give it to the tolerance asked for")
        yield Line(
            f"The event asked for ({self.words}, lead time {time:g}): probability",
            f"{say(row)} by {row.members} members",
            "; ".join(filter(None, beside)),
        )


def _effort(evaluations) -> str:
    """How often the score network was asked for one sample."""
    if isna(evaluations):
        return ""
    if not evaluations:
        return ", score network switched off"
    return f", {evaluations} evaluation{'' if evaluations == 1 else 's'} of the score network"


def say(row) -> str:
    """A value with its interval."""
    value, low, high = (format_value(row.score, edge) for edge in (row.value, row.low, row.high))
    return value if isna(row.low) or isna(row.high) else f"{value} [{low}, {high}]"


def _p(row) -> str:
    text = format_value("rank_p", row.value)
    return text if text.startswith("<") else f"= {text}"
