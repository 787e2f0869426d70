"""Summarise a run in a few generated lines: settings, scores and comparisons.

Every score of the model is printed beside those of the exact law, if it is known, and of the best
method that needs no generator.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pandas import DataFrame, isna

from hpc_closure.closure.artifact import Closure
from hpc_closure.closure.composed.model import CompositeClosure
from hpc_closure.closure.part_report import PartReport, describe
from hpc_closure.evaluate.context import Inputs
from hpc_closure.evaluate.rows import find, format_value, points_in_words, select, sort_methods
from hpc_closure.evaluate.scores.coupled.late import late_leads
from hpc_closure.evaluate.scores.generated.innovations import verdict
from hpc_closure.evaluate.scores.rank_histogram import LEVEL
from hpc_closure.experiment.method_names import GRANTED, METHODS, MODEL
from hpc_closure.experiment.schema import Experiment

RARE = 0.01  # share of rescaled draws above which the headline mentions them
DETECTABLE = 0.05  # a rank test passes only if it detects this relative error of the spread
# methods with which a sentence compares the model, the exact law first
WORDS = {method.name: method.words for method in METHODS if method.words}
BESIDE = sorted(WORDS, key=lambda name: name != "oracle")
OPPONENTS = [method.name for method in METHODS if method.opponent]
WHOLE = "all channels"
GROUP = ["closure", "sensors", "grid", "interval", "split", "channel"]


@dataclass(frozen=True)
class Line:
    """One line of the summary: a quantity, its value for the model, and those of references."""

    what: str
    model: str
    beside: str = ""


def facts(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Return heading -> settings of the run, for the report."""
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
            **_terms(experiment),
            "closure": f"{inputs.target}, mean of {dns.interval} step(s)",
        },
        "Data": {
            "DNS": f"{points_in_words(dns.grid, physics.dimensions)}, dt {dns.dt:g}, {dns.scheme}",
            "trajectories": ", ".join(f"{len(v)} {k}" for k, v in inputs.parts.items()),
            "test set": inputs.test_set.in_words(len(inputs.parts["test"])),
            "stored": f"t = {times[0]:g} to {times[-1]:g}, {len(times)} times on "
            f"{points_in_words(inputs.data.grid, physics.dimensions)}",
        },
        "Model": {
            "preset": model["preset"],
            "conditions": ", ".join(f"{key}: {v}" for key, v in model["conditions"].items()),
            "weights": sum(weight.numel() for weight in inputs.closure.model.parameters()),
            "steps": experiment.train.steps,
            "parts": describe(inputs.closure.parts()),
            "generator": generator_in_words(
                inputs.closure, experiment.evaluate.sampler.function_evaluations
            ),
        },
        **({"Compared": compared} if compared else {}),
        "Coupled run": {
            "members, starts": f"{coupled.members}, {coupled.initial_conditions}",
            "time": f"{coupled.begin:g} to {coupled.t_end:g}",
            "closure called": f"every {coupled.interval} step(s), "
            f"{inputs.closure.describe_interval(coupled.interval)}",
        },
    }


def _terms(experiment: Experiment) -> dict[str, Any]:
    """Return the terms of the equation and the user's reduced solver, as far as there are any."""
    physics, terms = experiment.physics, {}
    if physics.equation != "external":
        terms = {
            "viscosity": experiment.problem.viscosity,
            "forcing, noise": f"{physics.forcing.kind}, {physics.noise.kind}",
        }
    if experiment.reduced.python:
        terms["reduced solver"] = experiment.reduced.python
    return terms


def generator_in_words(closure: Closure, requested: int | None) -> str:
    """Describe grid, modes and number of evaluations of a closure's generator.

    ``requested`` is the configured number of evaluations; None uses the model's default.
    """
    number = closure.evaluations(requested)
    if not number:
        return "does not act"
    config, effort = closure.config, f"{number} evaluation{'' if number == 1 else 's'}"
    if isinstance(closure.model, CompositeClosure):
        frame = closure.model.frame
        return f"on a {frame.size}x{frame.size} grid, {frame.kept.modes} modes, {effort}"
    modes = f", {config['modes']} modes" if "modes" in config else ""
    return f"on the grid of the states{modes}, {effort}"


def dataset(inputs: Inputs) -> str:
    """Describe the data set on which the scores are computed."""
    return f"scored on {inputs.test_set.in_words(len(inputs.parts['test']))}"


def headline(parts: Sequence[PartReport], rows: DataFrame, data: str = "") -> list[str]:
    """Return the first lines of a report: acting parts, test data, gain by the generator.

    The gain needs an exact law or a true ensemble.
    """
    lines = [describe(parts), *([data] if data else [])]
    shown = None  # the first grid
    for columns, group in groups(rows, "generated"):
        if columns["sensors"] == "none" and shown in (None, columns["grid"]):
            if line := Answers(columns, group).added():
                lines.append(_of_channel(columns) + line)
                shown = columns["grid"]
    for columns, group in groups(rows, "coupled"):
        if line := Answers(columns, group).guard():
            lines.append(_of_channel(columns) + line)
    return lines


def _of_channel(columns: dict) -> str:
    """Return the opening words of a sentence on one of several channels, or ""."""
    return f"{columns['channel']}: " if columns["channel"] else ""


def groups(rows: DataFrame, stage: str) -> Iterator[tuple[dict, DataFrame]]:
    """Group the rows of a stage into tables, which have equal values of GROUP.

    Yields:
        The shared columns and the rows. If there are channels, the rows of all channels together
        have the channel WHOLE.
    """
    here = select(rows, stage=stage)
    whole = WHOLE if here["channel"].notna().any() else None
    for key, group in here.groupby(GROUP, dropna=False, sort=False):
        columns = {name: None if isna(v) else v for name, v in zip(GROUP, key, strict=True)}
        yield {**columns, "channel": columns["channel"] or whole}, group


def heading(columns: dict, dimensions: int = 2) -> str:
    """Describe a group in words: ``diffusion, no sensors, 64² grid``, and the channel if any."""
    points = points_in_words(columns["grid"], dimensions)
    grid = f"grid of {points}" if dimensions == 1 else f"{points} grid"
    sensors = columns["sensors"]
    layout = "no sensors" if sensors == "none" else f"sensors: {sensors}"
    channel = f", {columns['channel']}" if columns.get("channel") else ""
    return f"{columns['closure']}, {layout}, {grid}{channel}"


def summarise(
    rows: DataFrame,
    start: float | None = None,
    closed: Collection[str] = (),
    dimensions: int = 2,
) -> list[Line]:
    """Summarise the model's scores, group by group.

    Args:
        rows: all rows of the run.
        start: time at which the coupled runs start.
        closed: methods in which no trained part acts.
        dimensions: number of sides of the fields.
    """
    lines: list[Line] = []
    for columns, group in groups(rows, "generated"):
        lines += Answers(columns, group, closed, dimensions).generated()
    for columns, group in groups(rows, "coupled"):
        lines += Answers(columns, group, closed, dimensions).coupled(start)
    return lines


class Answers:
    """Sentences on the scores of one group of rows."""

    def __init__(
        self, columns: dict, rows: DataFrame, closed: Collection[str] = (), dimensions: int = 2
    ):
        self.rows, self.each_shell = select(rows, shell=None), rows
        self.words, self.interval = heading(columns, dimensions), columns["interval"]
        self.granted = GRANTED in set(rows["method"])
        self.model = GRANTED if self.granted else MODEL
        self.closed = ", closed form" if self.model in closed else ""
        self.late = late_leads(rows)

    def row(self, score: str, method: str = "", time: float | None = None):
        """Return the row of a score (of the model, unless a method is named), or None."""
        return find(self.rows, method=method or self.model, score=score, lead_time=time)

    def others(self, score: str, time: float | None = None) -> str:
        """Format the same score of the reference methods."""
        scored = {name: self.row(score, name, time) for name in BESIDE}
        return ", ".join(
            f"{WORDS[name]} {format_value(score, row.value)}"
            for name, row in scored.items()
            if row is not None
        )

    def last(self, score: str) -> float | None:
        """Return the last lead time that is not late at which the model has this score."""
        times = select(self.rows, method=self.model, score=score)["lead_time"].dropna()
        times = times[(times > 0) & ~times.isin(self.late)]
        return None if times.empty else times.max()

    def generated(self) -> Iterator[Line]:
        row = self.row("relative_error")
        if row is not None:
            what = f"Generated closure ({self.words}): relative error of one sample"
            what += self.closed or _effort(row.evaluations)
            if self.granted:
                what += ", with an estimate of the closure as input"
            beside = [self.others("relative_error")]
            floor = self.row("floor", "oracle")
            if floor is not None:
                bound = f"σ/rms(U) = {format_value('floor', floor.value)}"
                beside.append(f"no mean predicted from the same input has an error below {bound}")
            yield Line(what, say(row), "; ".join(filter(None, beside)))
        if not self.granted:  # an estimate of the closure as input would make the test meaningless
            yield from self.calibration()
        words, of_law = verdict(self.each_shell, self.model)
        if words:
            where = f"Innovations ({self.words}): closure minus its mean, on unseen trajectories"
            yield Line(where, words, of_law)

    def opponent(self) -> str | None:
        """Return the method without a generator that has the least CRPS, or None."""
        names = [name for name in OPPONENTS if self.row("crps_ratio", name)]
        return min(names, key=lambda name: self.row("crps_ratio", name).value, default=None)

    def added(self) -> str:
        """Compare the model's CRPS with that of the best method without a generator."""
        model_row = self.row("crps_ratio")
        if model_row is None:
            return ""
        if not model_row.evaluations:
            return (
                f"the generator does not act; the model's CRPS is {say(model_row)} times the "
                "exact law's"
            )
        words = f"the model's CRPS is {say(model_row)} times the exact law's"
        best = self.opponent()
        if best is None:
            return words
        number = sum(self.row("crps_ratio", name) is not None for name in OPPONENTS)
        words += f"; {WORDS[best]}"
        words += f", the best of {number} closures without a generator," if number > 1 else ""
        words += f" has {say(self.row('crps_ratio', best))} times the exact law's CRPS"
        energy = self.row("energy_score_difference", best)
        if energy is not None:
            words += f" and {say(_over(energy))} times the model's energy score"
        return f"{self._verdict_on(best)}{words}{self._spreads(best)}"

    def _verdict_on(self, best: str) -> str:
        """Return the opening words if the best opponent is as good as the generator, else ""."""
        pair = self.row("crps_difference", best)
        if pair is None or isna(pair.low) or pair.low > 0:
            return ""
        how = "is better than" if pair.high < 0 else "is as good as"
        ratio = say(_over(pair))
        return f"{WORDS[best]} {how} the generator: its CRPS is {ratio} times the model's; "

    def _spreads(self, best: str) -> str:
        """Compare the spreads of the model and of an opponent, relative to the exact law's."""
        spreads, plain_spreads = [], []
        for score, where in (
            ("spread_ratio", "in all"),
            ("spread_ratio_low_variance", "in low-variance quarters"),
            ("spread_ratio_high_variance", "in high-variance ones"),
        ):
            own, plain = (self.row(score, name) for name in ("", best))
            if own is not None and plain is not None:
                spreads.append(f"{format_value(score, own.value)} {where}")
                plain_spreads.append(f"{format_value(score, plain.value)} {where}")
        if not spreads:
            return ""
        return (
            f"; relative to the exact law's, the model's spread is {', '.join(spreads)}; without "
            f"a generator it is {', '.join(plain_spreads)}"
        )

    def calibration(self) -> Iterator[Line]:
        parts = []
        for score, words in (
            ("crps_ratio", "CRPS {} times the exact law's"),
            ("spread_ratio", "spread {} times the exact law's"),
        ):
            if (row := self.row(score)) is not None:
                parts.append(words.format(say(row)))
        if not parts and (skill := self.row("spread_skill")) is not None:
            parts.append(f"spread over error of the mean {say(skill)}")
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
                f"the exact law has p {_p(oracle)}, and with its spread reduced to 95\u00a0% p "
                f"{_p(control)}: this test {'can' if sound else 'could not'} tell them apart"
            )
        if parts:
            yield Line(f"Calibration ({self.words})", ", ".join(parts), beside)

    def _verdict(self, p) -> str:
        """Describe a rank test's result and the smallest spread error that it detects."""
        if p.value < LEVEL:
            return f"fails (p {_p(p)})"
        detectable = self.row("rank_power")
        if detectable is None or math.isnan(detectable.value):
            return f"does not fail (p {_p(p)}), with too few ranks to detect a wrong spread"
        size = f"a spread wrong by {100 * detectable.value:.2g}\u00a0%"
        if detectable.value > DETECTABLE:
            return f"does not fail (p {_p(p)}), and would as a rule not detect less than {size}"
        return f"passes (p {_p(p)}; it detects {size})"

    def coupled(self, start: float | None) -> Iterator[Line]:
        last = self.last("relative_error_mean")
        if last is not None:
            row, none = (self.row("relative_error_mean", m, last) for m in ("", "none"))
            when = "the end" if start is None else f"t = {start + last:g}"
            since = "" if start is None else f"start at {start:g}, "
            late = ", the last that is not late" if self.late else ""
            cases = "1 start" if row.samples == 1 else f"{row.samples} starts"
            what = (
                f"Coupled run ({self.words}, one sample for {self.interval} solver steps) at "
                f"{when} ({since}lead time {last:g}{late}; {row.members} members, {cases}): "
                f"relative error of the ensemble mean{self.closed}"
            )
            beside = self.others("relative_error_mean", last)
            if none is not None and 0 < none.value < math.inf and 0 < row.value < math.inf:
                factor = none.value / row.value
                words = f"{1 / factor:.3g} times larger"
                if factor >= 1:
                    words = f"{factor:.3g} times smaller"
                beside += f": the error is {words} than without closure"
            yield Line(what, say(row), beside)
        elif self.late:
            yield Line(
                f"Coupled run ({self.words})",
                "every lead time is late: scores there do not separate good closures from bad",
            )
        yield from self.spread()
        yield from self.similarity()
        if guard := self.guard(least=0.0):
            yield Line("Draws beyond the training's range", guard)
        yield from self.cost()
        yield from self.event()

    def guard(self, least: float = RARE) -> str:
        """Describe the share of rescaled draws if it exceeds ``least``; "" otherwise."""
        last = self.last("rescaled_share")
        row = None if last is None else self.row("rescaled_share", time=last)
        if row is None or not row.value > least:
            return ""
        words = (
            f"{_percent(row)} of the draws up to lead time {last:g} were rescaled into the "
            "training's range"
        )
        beyond = self.row("rescaled_share_expected")
        if beyond is None:
            return words
        return f"{words}; of the DNS's own closures {_percent(beyond)} would be"

    def spread(self) -> Iterator[Line]:
        last = self.last("spread_skill")
        parts = []
        for score, words in (
            ("spread_ratio", "times the true ensemble's"),
            ("spread_skill", "times the error of its mean"),
        ):
            if last is not None and (row := self.row(score, time=last)) is not None:
                parts.append(f"{say(row)} {words}")
        if parts:
            when = f"at lead time {last:g}" if self.late else "at the last lead time"
            yield Line(f"Spread of that ensemble {when}", " and ".join(parts))

    def similarity(self) -> Iterator[Line]:
        """Report the worst similarity of the long-time statistics.

        At late lead times it still separates good closures from bad; forecast errors do not.
        """
        score = "similarity_worst"
        if (row := self.row(score)) is None:
            return
        others = select(self.rows, score=score)["method"]
        beside = [
            f"{WORDS.get(name, name)} {format_value(score, self.row(score, name).value)}"
            for name in sort_methods(others)
            if name not in (self.model, "climatology")
        ]
        beside.append(f"{WORDS['none']} 0 by definition, the filtered DNS 1")
        yield Line(
            "Long-time statistics of that ensemble: least similarity to the filtered DNS",
            say(row),
            ", ".join(beside),
        )

    def cost(self) -> Iterator[Line]:
        cost, ratio = self.row("cost_us"), self.row("cost_ratio")
        if cost is not None:
            beside = ""
            if ratio is not None:
                times = format_value("cost_ratio", ratio.value)
                beside = f"{times} times that of the bare solver at its own step"
            spent = format_value("cost_us", cost.value)
            yield Line("Cost of one member and one time unit", f"{spent} us", beside)

    def event(self) -> Iterator[Line]:
        times = select(self.rows, method=self.model, score="probability")["lead_time"].dropna()
        if times.empty:
            return
        time = times.max()
        row, needed = (self.row(name, time=time) for name in ("probability", "members_needed"))
        beside = [self.others("probability", time)]
        late = ", which is late" if time in self.late else ""
        if needed is not None:
            size = f"{needed.value:.0f} members"
            beside.append(f"{size} estimate it within the tolerance of evaluate.event")
        yield Line(
            f"Event of evaluate.event ({self.words}, lead time {time:g}{late}): probability",
            f"{say(row)} from {row.members} members",
            "; ".join(filter(None, beside)),
        )


def _effort(evaluations) -> str:
    """Describe the number of evaluations of the score network per sample."""
    if isna(evaluations):
        return ""
    if not evaluations:
        return ", score network switched off"
    return f", {evaluations} evaluation{'' if evaluations == 1 else 's'} of the score network"


def _over(row):
    """Convert a relative difference to a ratio."""
    ends = {name: getattr(row, name) + 1 for name in ("value", "low", "high")}
    return row._replace(**ends)


def say(row) -> str:
    """Format a value with its interval."""
    value, low, high = (format_value(row.score, edge) for edge in (row.value, row.low, row.high))
    return value if isna(row.low) or isna(row.high) else f"{value} [{low}, {high}]"


def _percent(row) -> str:
    """Format a share in per cent, with its interval if there is one."""
    value, low, high = (f"{100 * edge:.2g}" for edge in (row.value, row.low, row.high))
    interval = "" if isna(row.low) or isna(row.high) else f" [{low}, {high}]"
    return f"{value}{interval}\u00a0%"


def _p(row) -> str:
    text = format_value("rank_p", row.value)
    return text if text.startswith("<") else f"= {text}"
