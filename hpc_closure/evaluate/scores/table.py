"""From blocks of samples to scores: gather statistics per sample, take means, form scores.

A statistic is a number per sample (and per shell); a score is a formula of means of statistics.
Nothing else is kept of an ensemble, so any number of samples passes through bounded memory, and
every score gets its interval from the same statistics
(:mod:`~hpc_closure.evaluate.scores.intervals`).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pandas import DataFrame
from torch import Tensor

from hpc_closure.closure.fields.losses import crps, energy_of
from hpc_closure.evaluate.rows import Absent, frame
from hpc_closure.evaluate.scores import pointwise
from hpc_closure.evaluate.scores.forecast import Forecast, shell_statistics
from hpc_closure.evaluate.scores.intervals import Means, block_interval, interval_columns
from hpc_closure.evaluate.scores.rank_histogram import rank_p, smallest_seen

COVERAGE = 0.9
JUDGED = 1e-3  # share of the reference's variance that a shell of the extremes must have
SHELL_FLOOR = 1e-6  # shells below this share of the variance hold round-off, not signal


@dataclass(frozen=True)
class Formula:
    """A score: the statistics it needs, how it follows from their means, and for whom."""

    needs: tuple[str, ...]
    form: Callable[[Means, int], Tensor]
    ensembles_only: bool = False


def _of_quarter(name: str) -> dict[str, Formula]:
    """Spread over a quarter of all points, and over that of the exact law there."""
    own, law, share = (f"{word}_{name}" for word in ("variance", "law_variance", "share"))
    return {
        f"spread_ratio_{name}": Formula(
            (own, law), lambda s, m: pointwise.spread_ratio(s[own], s[law]), True
        ),
        f"spread_{name}": Formula(
            (own, share), lambda s, m: pointwise.spread(s[own] / s[share]), True
        ),
    }


# "reference_" marks a statistic of the exact law or true ensemble over the same samples
TOTAL = {
    "relative_error": Formula(("relative_error",), lambda s, m: s["relative_error"]),
    "relative_error_mean": Formula(
        ("relative_error_mean",), lambda s, m: s["relative_error_mean"]
    ),
    "mse": Formula(("mse",), lambda s, m: s["mse"]),
    "rmse_mean": Formula(("mean_mse",), lambda s, m: s["mean_mse"].sqrt()),
    "bias2": Formula(
        ("mean_mse", "variance", "floor"),
        lambda s, m: s["mean_mse"] - s["variance"] / m - s["floor"],
    ),
    "bias2_ratio": Formula(
        ("mean_mse", "variance", "floor"),
        lambda s, m: (s["mean_mse"] - s["variance"] / m) / s["floor"] - 1,
    ),
    "crps": Formula(("crps",), lambda s, m: s["crps"]),
    "crps_ratio": Formula(
        ("crps", "reference_crps"),
        lambda s, m: pointwise.crps_ratio(s["crps"], s["reference_crps"]),
    ),
    "energy_score": Formula(("energy_score",), lambda s, m: s["energy_score"]),
    "spread": Formula(("variance",), lambda s, m: pointwise.spread(s["variance"]), True),
    "spread_skill": Formula(
        ("variance", "mean_mse"),
        lambda s, m: pointwise.spread_skill(s["variance"], s["mean_mse"], m),
        True,
    ),
    "spread_ratio": Formula(
        ("variance", "reference_variance"),
        lambda s, m: pointwise.spread_ratio(s["variance"], s["reference_variance"]),
        True,
    ),
    **_of_quarter("calm"),
    **_of_quarter("wild"),
    "coverage_90": Formula(("coverage",), lambda s, m: s["coverage"], True),
    "energy_ratio": Formula(
        ("energy", "truth_energy"),
        lambda s, m: pointwise.energy_ratio(s["energy"], s["truth_energy"]),
    ),
}
PER_SHELL = ("spread_skill", "spread_ratio", "energy_ratio")


def _left(s: Means, m: int) -> Tensor:
    """Spectrum of what the conditional mean leaves of the truth, ensemble size taken off."""
    return (s["mean_mse"] - s["variance"] / m).clamp_min(0)


# of spectra (shells,): the four columns of Perezhogin, Zanna, Fernandez-Granda (JAMES 2023)
PZF = {
    "pzf_mean": Formula(
        ("mean_mse", "variance", "truth_energy"),
        lambda s, m: (_left(s, m).sum(-1) / s["truth_energy"].sum(-1)).sqrt(),
        True,
    ),
    "pzf_total": Formula(
        ("energy", "truth_energy"),
        lambda s, m: pointwise.distance(s["energy"], s["truth_energy"]),
        True,
    ),
    "pzf_residual": Formula(
        ("mean_mse", "variance"),
        lambda s, m: pointwise.distance(s["variance"], _left(s, m)),
        True,
    ),
    "pzf_spread": Formula(
        ("mean_mse", "variance"),
        lambda s, m: s["variance"].sum(-1) / _left(s, m).sum(-1),
        True,
    ),
}


@dataclass
class Statistics:
    """Per-sample statistics of one method, appended block by block.

    Attributes:
        members: ensemble size; 1 is a point forecast.
        total: name -> list of (s,) tensors.
        shells: name -> list of (s, shells) tensors.
    """

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
            forecast: a sample with any value that is not finite scores as infinitely wrong.
            floor: (s,) squared distance of the truth from its exact conditional mean, if known.
            places: name -> mask and exact pointwise variance, (s, n, n) both, as
                :meth:`~hpc_closure.evaluate.scores.variance_quartiles.Quarters.at` gives them.
        """
        ensemble, truth = forecast.ensemble, forecast.truth.fields
        self.members = len(ensemble)
        total = {
            "relative_error": pointwise.relative_error(ensemble, truth),
            "relative_error_mean": pointwise.relative_error(ensemble.mean(0, keepdim=True), truth),
            "mse": pointwise.mse(ensemble, truth),
            "mean_mse": pointwise.mean_mse(ensemble, truth),
            "variance": pointwise.variance(ensemble),
            "crps": crps(ensemble, truth),
            "energy_score": energy_of(*forecast.distances),
            "energy": ensemble.square().mean((0, 2, 3)),
            "truth_energy": truth.square().mean((1, 2)),
        }
        if COVERAGE * (self.members + 1) <= self.members - 1:
            total["coverage"] = pointwise.coverage(ensemble, truth, COVERAGE)
        if floor is not None:
            total["floor"] = floor
        if places and self.members > 1:
            own = ensemble.var(0)
            for name, (mask, exact) in places.items():
                mask = mask.to(own.device)
                total[f"variance_{name}"] = (own * mask).mean((1, 2))
                total[f"law_variance_{name}"] = (exact.to(own.device) * mask).mean((1, 2))
                total[f"share_{name}"] = mask.double().mean((1, 2))
        for into, parts in (
            (self.total, total),
            (self.shells, shell_statistics(forecast)),
        ):
            for name, part in parts.items():
                part = part.double().cpu()
                part = torch.where(part.isfinite(), part, torch.inf)
                into.setdefault(name, []).append(part)

    def joined(self, which: str) -> dict[str, Tensor]:
        """All samples: ``which`` is ``total`` or ``shells``."""
        return {name: torch.cat(parts) for name, parts in getattr(self, which).items()}


def _gather(which: str, own: Statistics, reference: Statistics | None) -> dict[str, Tensor]:
    """Statistics of a method with those of its reference beside them."""
    values = own.joined(which)
    # a point forecast has no spread to divide by
    if reference is not None and reference.members > 1:
        values |= {f"reference_{name}": part for name, part in reference.joined(which).items()}
    return values


def form_scores(
    statistics: Statistics, blocks: Tensor, reference: Statistics | None = None
) -> Iterator[dict]:
    """Every score that the statistics allow, in total and per shell.

    Args:
        statistics: of the method.
        blocks: (S,) trajectory or case of each sample, for the intervals.
        reference: of the exact law or true ensemble, same samples.

    Yields:
        Columns ``score, shell, value, low, high, members, samples`` of a score row.
    """
    columns = {"members": statistics.members, "samples": len(blocks)}
    for which in ("total", "shells"):
        values = _gather(which, statistics, reference)
        for name, formula in TOTAL.items():
            if which == "shells" and name not in PER_SHELL:
                continue
            if formula.ensembles_only and statistics.members == 1:
                continue
            if not all(need in values for need in formula.needs):
                continue
            value, low, high = block_interval(
                {need: values[need] for need in formula.needs},
                blocks,
                lambda means, form=formula.form: form(means, statistics.members),  # type: ignore
            )
            lost = any(not values[need].isfinite().all() for need in formula.needs)
            if lost:  # a run that diverged: no number describes it
                value, low, high = (
                    torch.full_like(part, torch.inf) for part in (value, low, high)
                )
            for place in _places(which, values[formula.needs[-1]].mean(0)):
                if value[place].isnan():  # 0 / 0, as at lead time zero
                    continue
                yield {
                    "score": name,
                    "shell": None if which == "total" else place,
                    "value": float(value[place]),
                    "low": float(low[place]),
                    "high": float(high[place]),
                    **columns,
                }
    if statistics.members > 1:
        yield from ({**record, **columns} for record in _of_spectra(statistics, blocks))
    if statistics.members > 1 and reference is not None and reference.members > 1:
        for record in _extremes(_gather("shells", statistics, reference), blocks):
            yield {**record, **columns}


def _of_spectra(statistics: Statistics, blocks: Tensor) -> Iterator[dict]:
    """The scores that compare spectra as wholes."""
    shells = statistics.joined("shells")
    for name, formula in PZF.items():
        parts = {need: shells[need] for need in formula.needs}
        if not all(part.isfinite().all() for part in parts.values()):
            continue
        numbers = interval_columns(
            parts,
            blocks,
            lambda means, form=formula.form: form(means, statistics.members),  # type: ignore
        )
        if not math.isnan(numbers["value"]):
            yield {"score": name, "shell": None, **numbers}


def _extremes(shells: Mapping[str, Tensor], blocks: Tensor) -> Iterator[dict]:
    """The spread ratios of the shells that spread least and most, of those that carry the law."""
    values = {name: shells[name] for name in ("variance", "reference_variance")}
    if not all(part.isfinite().all() for part in values.values()):
        return
    carried = values["reference_variance"].mean(0)
    judged = carried > JUDGED * carried.sum()
    if not judged.any():
        return
    for name, extreme in (("lowest", torch.amin), ("highest", torch.amax)):
        numbers = interval_columns(
            {key: part[:, judged] for key, part in values.items()},
            blocks,
            lambda s, pick=extreme: pick(  # type: ignore
                pointwise.spread_ratio(s["variance"], s["reference_variance"]), -1
            ),
        )
        yield {"score": f"spread_ratio_{name}", "shell": None, **numbers}


def _places(which: str, denominator: Tensor) -> list:
    """Where a score is taken: () in total, or the shells whose denominator holds signal."""
    if which == "total":
        return [()]
    return (denominator > SHELL_FLOOR * denominator.sum()).nonzero()[:, 0].tolist()


@dataclass
class Scored:
    """What scoring leaves: rows, and what the figures need beside them.

    Attributes:
        records: score rows as dictionaries of columns, see :mod:`~hpc_closure.evaluate.rows`.
        absent: methods without rows, and why.
        spectra: method or ``truth`` -> mean square per shell (shells,).
        spread_spectra: ensemble method -> variance over members per shell (shells,).
        fluxes: quantity -> {method or ``truth``: flux through each shell (shells,)}.
        work: quantity -> {method or ``truth``: what the closure brings to each shell (shells,)}.
        ranks: ensemble method -> rank histogram (M + 1,).
        examples: ``truth`` -> (n, n); method -> (3, n, n): one member, ensemble mean, ensemble
            standard deviation (zero for a point forecast).
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    spread_spectra: dict[str, Tensor] = field(default_factory=dict)
    fluxes: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    work: dict[str, dict[str, Tensor]] = field(default_factory=dict)
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
        """Keep the rank histogram (M + 1,) of a method, and add its rows; none for few ranks."""
        self.ranks[columns["method"]] = counts
        p = rank_p(counts)
        if p == p:
            seen = smallest_seen(int(counts.sum()), len(counts) - 1)
            self.add(**columns, score="rank_p", value=p)
            self.add(**columns, score="rank_sees", value=seen)

    def keep_example(self, method: str, ensemble: Tensor) -> None:
        """Keep one member, mean and standard deviation of an ensemble (M, n, n)."""
        std = ensemble.std(0) if len(ensemble) > 1 else torch.zeros_like(ensemble[0])
        self.examples[method] = torch.stack((ensemble[0], ensemble.mean(0), std)).cpu()

    def keep_spectra(self, method: str, statistics: Statistics) -> None:
        """Keep the mean spectra of a method."""
        shells = statistics.joined("shells")
        self.spectra[method] = shells["energy"].mean(0)
        self.spectra["truth"] = shells["truth_energy"].mean(0)
        if statistics.members > 1:
            self.spread_spectra[method] = shells["variance"].mean(0)

    def keep_work(self, method: str, work: Mapping[str, Tensor]) -> None:
        """Keep what a method's closures bring to each shell, and the truth's."""
        for name, part in work.items():
            whose, _, quantity = name.partition("_")
            key = method if whose == "own" else "truth"
            self.work.setdefault(quantity, {})[key] = part.mean(0)
