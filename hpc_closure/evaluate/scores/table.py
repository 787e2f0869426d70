"""Compute scores from blocks of samples: gather statistics per sample, average, form scores.

A statistic is a number per sample (and per shell); a score is a formula of means of statistics.
Only statistics are stored, so memory is bounded for any number of samples. The interval of a score
is computed from the same statistics (:mod:`~hpc_closure.evaluate.scores.intervals`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pandas import DataFrame
from torch import Tensor

from hpc_closure.closure.fields.losses import crps, energy_of
from hpc_closure.evaluate.rows import Absent, frame
from hpc_closure.evaluate.scores import pointwise
from hpc_closure.evaluate.scores.forecast import Forecast, shell_statistics
from hpc_closure.evaluate.scores.intervals import Means, block_interval, interval_columns
from hpc_closure.evaluate.scores.joint import patches
from hpc_closure.evaluate.scores.rank_histogram import detectable_error, rank_p
from hpc_closure.evaluate.scores.record import ACCURACY, CALIBRATION, Score

COVERAGE = 0.9
JUDGED = 1e-3  # least share of the reference's variance of a shell in least and largest ratio
SHELL_FLOOR = 1e-6  # shells below this share of the variance hold round-off, not signal


# statistics that formulas can read: in total, and those of SHELL_STATISTICS also per shell
STATISTICS = {
    "relative_error": "||x - y|| / ||y|| of one member, averaged over members",
    "relative_error_mean": "the same of the ensemble mean",
    "mse": "squared error of one member, averaged over members and grid",
    "mean_mse": "squared error of the ensemble mean",
    "variance": "unbiased variance over members",
    "crps": "fair CRPS",
    "energy_score": "fair energy score",
    "energy": "mean square of one member",
    "truth_energy": "mean square of the truth",
    "coverage": "share of points inside the central 90 % interval (19 or more members)",
    "floor": "squared distance of the truth from its exact conditional mean, where that is known",
    **{
        f"{name}_{quarter}": f"{words} over the quarter of all points with {which} variance"
        for quarter, which in (("low_variance", "least"), ("high_variance", "largest"))
        for name, words in (
            ("variance", "variance over members, summed"),
            ("law_variance", "variance of the exact law, summed"),
            ("share", "share of points"),
        )
    },
    **patches.STATISTICS,
}
SHELL_STATISTICS = ("energy", "truth_energy", "variance", "mean_mse")

SEVERAL, REFERENCE = "several members", "a reference ensemble (``oracle``)"
EXACT = "an exact law (generated)"
FOLLOWS = "an exact law whose variance follows the state (generated)"


def _of_quarter(name: str, heading: str, meaning: str) -> tuple[Score, Score]:
    """Define the spread over a quarter of all points, and its ratio to the exact law's."""
    words = name.replace("_", " ")
    variance, law, share = (f"{word}_{name}" for word in ("variance", "law_variance", "share"))
    return (
        Score(
            name=f"spread_ratio_{name}",
            heading=heading,
            meaning=meaning,
            table=CALIBRATION,
            requires=FOLLOWS,
            needs=(variance, law),
            formula=lambda s, m: pointwise.spread_ratio(s[variance], s[law]),
            ensembles_only=True,
        ),
        Score(
            name=f"spread_{name}",
            heading=f"spread, {words}",
            meaning=f"spread over the quarter of {words}",
            table=CALIBRATION,
            requires=FOLLOWS,
            needs=(variance, share),
            formula=lambda s, m: pointwise.spread(s[variance] / s[share]),
            ensembles_only=True,
        ),
    )


def _unexplained(s: Means, m: int) -> Tensor:
    """Estimate the spectrum (..., shells) of the truth less its conditional mean.

    The sampling error of the ensemble mean is subtracted.
    """
    return (s["mean_mse"] - s["variance"] / m).clamp_min(0)


# "reference_" marks a statistic of the exact law or true ensemble over the same samples
SCORES = (
    Score(
        name="relative_error",
        heading="error of one sample",
        meaning="‖x − y‖ / ‖y‖ of one member, averaged over members and snapshots (the published "
        "figure)",
        table=ACCURACY,
        needs=("relative_error",),
        formula=lambda s, m: s["relative_error"],
        by_lead_time=True,
    ),
    Score(
        name="relative_error_mean",
        heading="error of the mean",
        meaning="the same of the ensemble mean",
        table=ACCURACY,
        needs=("relative_error_mean",),
        formula=lambda s, m: s["relative_error_mean"],
        by_lead_time=True,
    ),
    Score(
        name="mse",
        heading="squared error",
        meaning="squared error of one member",
        needs=("mse",),
        formula=lambda s, m: s["mse"],
    ),
    Score(
        name="rmse_mean",
        heading="RMSE of the mean",
        meaning="root mean square error of the ensemble mean",
        needs=("mean_mse",),
        formula=lambda s, m: s["mean_mse"].sqrt(),
    ),
    Score(
        name="bias2",
        heading="bias²",
        meaning="squared bias of the mean, corrected for ensemble size and realised noise",
        requires=EXACT,
        needs=("mean_mse", "variance", "floor"),
        formula=lambda s, m: s["mean_mse"] - s["variance"] / m - s["floor"],
    ),
    Score(
        name="bias2_ratio",
        heading="bias² / floor",
        meaning="squared bias of the mean (corrected for ensemble size and realised noise) over "
        "the variance of the noise",
        table=CALIBRATION,
        requires=EXACT,
        needs=("mean_mse", "variance", "floor"),
        formula=lambda s, m: (s["mean_mse"] - s["variance"] / m) / s["floor"] - 1,
    ),
    Score(
        name="crps",
        heading="CRPS",
        meaning="fair continuous ranked probability score; for a point forecast the mean absolute "
        "error",
        table=ACCURACY,
        needs=("crps",),
        formula=lambda s, m: s["crps"],
    ),
    Score(
        name="crps_ratio",
        heading="CRPS ratio",
        meaning="CRPS over that of the exact law (or true ensemble); 1 is the best possible",
        table=CALIBRATION,
        requires=REFERENCE,
        needs=("crps", "reference_crps"),
        formula=lambda s, m: pointwise.crps_ratio(s["crps"], s["reference_crps"]),
    ),
    Score(
        name="energy_score",
        heading="energy score",
        meaning="fair energy score: the CRPS of entire fields",
        table=ACCURACY,
        needs=("energy_score",),
        formula=lambda s, m: s["energy_score"],
    ),
    Score(
        name="spread",
        heading="spread",
        meaning="root of the mean unbiased variance over members",
        table=CALIBRATION,
        requires=SEVERAL,
        needs=("variance",),
        formula=lambda s, m: pointwise.spread(s["variance"]),
        ensembles_only=True,
    ),
    Score(
        name="spread_skill",
        heading="spread / skill",
        meaning="spread over error of the ensemble mean, corrected for ensemble size; 1 is "
        "calibrated",
        table=CALIBRATION,
        requires=SEVERAL,
        needs=("variance", "mean_mse"),
        formula=lambda s, m: pointwise.spread_skill(s["variance"], s["mean_mse"], m),
        per_shell=True,
        ensembles_only=True,
        by_lead_time=True,
    ),
    Score(
        name="spread_ratio",
        heading="spread ratio",
        meaning="spread over that of the exact law (or true ensemble); 1 is right",
        table=CALIBRATION,
        requires=f"{SEVERAL}, {REFERENCE}",
        needs=("variance", "reference_variance"),
        formula=lambda s, m: pointwise.spread_ratio(s["variance"], s["reference_variance"]),
        per_shell=True,
        ensembles_only=True,
        by_lead_time=True,
        shells="Spread ratio",
    ),
    *_of_quarter(
        "low_variance",
        "in low-variance quarters",
        "spread over that of the exact law, in the quarter of all points and snapshots where the "
        "exact law's variance is least",
    ),
    *_of_quarter(
        "high_variance",
        "in high-variance quarters",
        "the same where the exact law's variance is largest; a method that ignores the state "
        "fails in both",
    ),
    Score(
        name="coverage_90",
        heading="90 % coverage",
        meaning="share of points inside the central 90 % interval",
        table=CALIBRATION,
        requires="19 or more members",
        needs=("coverage",),
        formula=lambda s, m: s["coverage"],
        ensembles_only=True,
    ),
    Score(
        name="energy_ratio",
        heading="power ratio",
        meaning="mean square of a member over that of the truth",
        table=CALIBRATION,
        needs=("energy", "truth_energy"),
        formula=lambda s, m: pointwise.energy_ratio(s["energy"], s["truth_energy"]),
        per_shell=True,
    ),
    *(
        Score(
            name=f"spread_ratio_{name}_shell",
            heading=f"{name}. over shells",
            meaning=meaning,
            table=CALIBRATION,
            requires=f"{SEVERAL}, {REFERENCE}",
        )
        for name, meaning in (
            (
                "min",
                f"least spread ratio of the wavenumber shells with more than {JUDGED:g} of the "
                "variance",
            ),
            ("max", "the largest of these"),
        )
    ),
    # the four columns of Perezhogin, Zanna, Fernandez-Granda (JAMES 2023)
    *(
        Score(
            name=name,
            heading=heading,
            meaning=meaning,
            table="Spectra of samples and of residuals",
            requires=SEVERAL,
            needs=needs,
            formula=formula,
            spectra=True,
            ensembles_only=True,
        )
        for name, heading, meaning, needs, formula in (
            (
                "l2_mean",
                "L2 mean",
                "relative error of the conditional mean, corrected for ensemble size; the four "
                "columns of Perezhogin, Zanna, Fernandez-Granda (JAMES 2023)",
                ("mean_mse", "variance", "truth_energy"),
                lambda s, m: (_unexplained(s, m).sum(-1) / s["truth_energy"].sum(-1)).sqrt(),
            ),
            (
                "l2_total",
                "L2 total",
                "relative distance of a sample's spectrum from the truth's",
                ("energy", "truth_energy"),
                lambda s, m: pointwise.distance(s["energy"], s["truth_energy"]),
            ),
            (
                "l2_residual",
                "L2 residual",
                "the same after the conditional mean is subtracted from sample and truth",
                ("mean_mse", "variance"),
                lambda s, m: pointwise.distance(s["variance"], _unexplained(s, m)),
            ),
            (
                "variance_ratio",
                "variance ratio",
                "variance of the sample's residual over that of the truth's",
                ("mean_mse", "variance"),
                lambda s, m: s["variance"].sum(-1) / _unexplained(s, m).sum(-1),
            ),
        )
    ),
)


@dataclass(frozen=True)
class Labels:
    """Columns and options that are known before scoring.

    Attributes:
        shared: columns of all rows.
        single: method -> columns of its rows.
        against: reference method of the comparison sample by sample.
        further: the user's scores of ``evaluate.scores``.
        channels: names of the fields of a state; empty for one field.
        lengths: length of each side of the domain; their number is that of the sides.
    """

    shared: Mapping[str, Any]
    single: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    against: str = "model"
    further: tuple[Score, ...] = ()
    channels: tuple[str, ...] = ()
    lengths: tuple[float, ...] = (1.0, 1.0)

    @property
    def dimensions(self) -> int:
        """Number of sides of the fields."""
        return len(self.lengths)

    def of(self, method: str) -> dict[str, Any]:
        """Return the columns of a method's rows."""
        return {**self.shared, **self.single.get(method, {}), "method": method}

    def of_channel(self, name: str) -> "Labels":
        """Return the labels of a channel's rows; the same for the name "" of a single field."""
        return replace(self, shared={**self.shared, "channel": name}) if name else self


@dataclass
class Statistics:
    """Per-sample statistics of one method, appended block by block.

    Attributes:
        further: the user's scores of ``evaluate.scores``.
        threshold: threshold of patch maxima
            (:func:`~hpc_closure.evaluate.scores.joint.patches.threshold`); without it exceedance
            is not scored.
        members: ensemble size; 1 is a point forecast.
        total: name -> list of (s,) tensors.
        shells: name -> list of (s, shells) tensors.
    """

    further: tuple[Score, ...] = ()
    threshold: float | None = None
    members: int = 0
    total: dict[str, list[Tensor]] = field(default_factory=dict)
    shells: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(
        self,
        forecast: Forecast,
        floor: Tensor | None = None,
        places: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Add a block.

        Args:
            forecast: ensemble and truth; a sample with a value that is not finite has infinite
                errors.
            floor: squared distance of the truth from its exact conditional mean (s,), if known.
            places: name -> mask and exact pointwise variance, both (s, n, n), from
                :meth:`~hpc_closure.evaluate.scores.variance_quartiles.Quarters.at`.
        """
        ensemble, truth = forecast.ensemble, forecast.truth.fields
        self.members, sides = len(ensemble), tuple(range(1, truth.ndim))
        total = {
            "relative_error": pointwise.relative_error(ensemble, truth),
            "relative_error_mean": pointwise.relative_error(ensemble.mean(0, keepdim=True), truth),
            "mse": pointwise.mse(ensemble, truth),
            "mean_mse": pointwise.mean_mse(ensemble, truth),
            "variance": pointwise.variance(ensemble),
            "crps": crps(ensemble, truth),
            "energy_score": energy_of(*forecast.distances),
            "energy": ensemble.square().mean((0, *(axis + 1 for axis in sides))),
            "truth_energy": truth.square().mean(sides),
            **patches.statistics(ensemble, truth, self.threshold),
        }
        if COVERAGE * (self.members + 1) <= self.members - 1:
            total["coverage"] = pointwise.coverage(ensemble, truth, COVERAGE)
        if floor is not None:
            total["floor"] = floor
        if places and self.members > 1:
            variance = ensemble.var(0)
            for name, (mask, exact) in places.items():
                mask = mask.to(variance.device)
                total[f"variance_{name}"] = (variance * mask).mean(sides)
                total[f"law_variance_{name}"] = (exact.to(variance.device) * mask).mean(sides)
                total[f"share_{name}"] = mask.double().mean(sides)
        for score in self.further:
            if score.sample is not None:
                total[score.name] = _sampled(score, ensemble, truth)
        for into, parts in (
            (self.total, total),
            (self.shells, shell_statistics(forecast)),
        ):
            for name, part in parts.items():
                part = part.double().cpu()
                part = torch.where(part.isfinite(), part, torch.inf)
                into.setdefault(name, []).append(part)

    def joined(self, which: str) -> dict[str, Tensor]:
        """Concatenate the statistics of all blocks; ``which`` is ``total`` or ``shells``."""
        return {name: torch.cat(parts) for name, parts in getattr(self, which).items()}


def _sampled(score: Score, ensemble: Tensor, truth: Tensor) -> Tensor:
    """Compute numbers (S,) by a score's function; raise ValueError if the shape is wrong."""
    assert score.sample is not None
    numbers = torch.as_tensor(score.sample(ensemble, truth))
    if numbers.shape != truth.shape[:1]:
        raise ValueError(
            f"score {score.name}: its function returned {tuple(numbers.shape)} for an ensemble "
            f"{tuple(ensemble.shape)}; expected one number a sample, ({len(truth)},)"
        )
    return numbers


def _gather(which: str, method: Statistics, reference: Statistics | None) -> dict[str, Tensor]:
    """Return statistics of a method and, with the prefix ``reference_``, of its reference."""
    values = method.joined(which)
    # a point forecast has no spread to divide by
    if reference is not None and reference.members > 1:
        values |= {f"reference_{name}": part for name, part in reference.joined(which).items()}
    return values


def form_scores(
    statistics: Statistics, blocks: Tensor, reference: Statistics | None = None
) -> Iterator[dict]:
    """Form every score that the statistics allow, in total and per shell.

    Args:
        statistics: statistics of the method.
        blocks: trajectory or case of each sample (S,), for the intervals.
        reference: statistics of the exact law or true ensemble for the same samples.

    Yields:
        Columns ``score, shell, value, low, high, members, samples`` of a score row.
    """
    columns = {"members": statistics.members, "samples": len(blocks)}
    formed = [score for score in (*SCORES, *patches.SCORES, *statistics.further)]
    formed = [score for score in formed if score.statistics]
    if statistics.members == 1:
        formed = [score for score in formed if not score.ensembles_only]
    for which in ("total", "shells"):
        values = _gather(which, statistics, reference)
        for score in formed:
            if score.spectra or (which == "shells" and not score.per_shell):
                continue
            if not all(need in values for need in score.statistics):
                continue
            value, low, high = block_interval(
                {need: values[need] for need in score.statistics},
                blocks,
                lambda means, form=score.form: form(means, statistics.members),  # type: ignore
            )
            lost = any(not values[need].isfinite().all() for need in score.statistics)
            if lost:  # the run diverged: no finite number describes it
                value, low, high = (
                    torch.full_like(part, torch.inf) for part in (value, low, high)
                )
            for place in _places(which, values[score.statistics[-1]].mean(0)):
                if value[place].isnan():  # 0 / 0, as at lead time zero
                    continue
                yield {
                    "score": score.name,
                    "shell": None if which == "total" else place,
                    "value": float(value[place]),
                    "low": float(low[place]),
                    "high": float(high[place]),
                    **columns,
                }
    shells = _gather("shells", statistics, reference)
    spectral = [score for score in formed if score.spectra]
    for record in _of_spectra(spectral, shells, statistics.members, blocks):
        yield {**record, **columns}
    if statistics.members > 1 and reference is not None and reference.members > 1:
        for record in _extremes(shells, blocks):
            yield {**record, **columns}


def _of_spectra(
    scores: Sequence[Score], shells: Mapping[str, Tensor], members: int, blocks: Tensor
) -> Iterator[dict]:
    """Yield columns ``score, shell, value, low, high`` of the scores of spectra (S, shells)."""
    for score in scores:
        parts = {need: shells[need] for need in score.statistics if need in shells}
        finite = all(part.isfinite().all() for part in parts.values())
        if len(parts) < len(score.statistics) or not finite:
            continue
        numbers = interval_columns(
            parts,
            blocks,
            lambda means, form=score.form: form(means, members),  # type: ignore
        )
        if not math.isnan(numbers["value"]):
            yield {"score": score.name, "shell": None, **numbers}


def _extremes(shells: Mapping[str, Tensor], blocks: Tensor) -> Iterator[dict]:
    """Yield the least and the largest spread ratio over shells with enough variance (JUDGED)."""
    values = {name: shells[name] for name in ("variance", "reference_variance")}
    if not all(part.isfinite().all() for part in values.values()):
        return
    carried = values["reference_variance"].mean(0)
    judged = carried > JUDGED * carried.sum()
    if not judged.any():
        return
    for name, extreme in (("min", torch.amin), ("max", torch.amax)):
        numbers = interval_columns(
            {key: part[:, judged] for key, part in values.items()},
            blocks,
            lambda s, pick=extreme: pick(  # type: ignore
                pointwise.spread_ratio(s["variance"], s["reference_variance"]), -1
            ),
        )
        yield {"score": f"spread_ratio_{name}_shell", "shell": None, **numbers}


def _places(which: str, denominator: Tensor) -> list:
    """Return the indices of a score: () in total, or shells whose denominator has signal."""
    if which == "total":
        return [()]
    return (denominator > SHELL_FLOOR * denominator.sum()).nonzero()[:, 0].tolist()


@dataclass
class Scored:
    """Results of scoring: rows and the data of the figures.

    Attributes:
        records: score rows as dictionaries of columns, see :mod:`~hpc_closure.evaluate.rows`.
        absent: methods without rows, with reasons.
        spectra: method or ``truth`` -> mean square per shell (shells,).
        spread_spectra: ensemble method -> variance over members per shell (shells,).
        fluxes: quantity -> {method or ``truth``: flux through each shell (shells,)}.
        transfer: quantity -> {method or ``truth``: rate at which the closure adds it to each
            shell (shells,)}.
        coherences: pair of fields -> {method or ``truth``: complex coherence (shells,)}.
        ranks: ensemble method -> rank histogram (M + 1,).
        examples: ``truth`` -> (n, n), or with another number of sides; method -> (3, n, n): one
            member, ensemble mean, ensemble standard deviation (zero for a point forecast).
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    spread_spectra: dict[str, Tensor] = field(default_factory=dict)
    fluxes: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    transfer: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    coherences: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    ranks: dict[str, Tensor] = field(default_factory=dict)
    examples: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> DataFrame:
        """The records as a table."""
        return frame(self.records)

    def add(self, **columns: Any) -> None:
        """Append one row."""
        self.records.append(columns)

    def add_ranks(self, counts: Tensor, **columns: Any) -> None:
        """Store the rank histogram (M + 1,) of a method and add its rows; none for few ranks."""
        self.ranks[columns["method"]] = counts
        p = rank_p(counts)
        if p == p:
            detectable = detectable_error(int(counts.sum()), len(counts) - 1)
            self.add(**columns, score="rank_p", value=p)
            self.add(**columns, score="rank_power", value=detectable)

    def keep_example(self, method: str, ensemble: Tensor) -> None:
        """Store one member, mean and standard deviation of an ensemble (M, n, n)."""
        std = ensemble.std(0) if len(ensemble) > 1 else torch.zeros_like(ensemble[0])
        self.examples[method] = torch.stack((ensemble[0], ensemble.mean(0), std)).cpu()

    def keep_spectra(self, method: str, statistics: Statistics) -> None:
        """Store the mean spectra of a method and of the truth."""
        shells = statistics.joined("shells")
        self.spectra[method] = shells["energy"].mean(0)
        self.spectra["truth"] = shells["truth_energy"].mean(0)
        if statistics.members > 1:
            self.spread_spectra[method] = shells["variance"].mean(0)

    def keep_transfer(self, method: str, transfer: Mapping[str, Tensor]) -> None:
        """Store the rates per shell of a method's closures and of the truth's."""
        for name, part in transfer.items():
            whose, _, quantity = name.partition("_")
            key = method if whose == "own" else "truth"
            self.transfer.setdefault(quantity, {})[key] = part.mean(0)
