"""The report: one HTML file that needs nothing else, not even the network.

Everything in it is computed from the rows, the figures and the plain data handed in; how it looks
stands in ``templates/report.html``. Images are inlined, there is no script, and both light and
dark displays are served.
"""

import base64
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pandas import DataFrame, isna

from hpc_closure.evaluate.report.gallery import SECTIONS, Picture
from hpc_closure.evaluate.report.summary import groups, heading, summarise
from hpc_closure.evaluate.rows import (
    GRANTED,
    MODELS,
    Absent,
    find,
    format_value,
    pivot,
    select,
    sort_methods,
)
from hpc_closure.evaluate.scores.late import DAGGER, PREDICTABILITY, SENTENCE, late_leads
from hpc_closure.evaluate.scores.paired import DIFFERENCES, WORSE, verdict
from hpc_closure.work.atomic import write_text

TEMPLATES = Path(__file__).parent / "templates"
MAX_TIMES = 6  # lead times side by side
# scores that have a table by lead time
IN_TIME = (
    "relative_error_mean",
    "relative_error",
    "spread_ratio",
    "spread_skill",
    "brought_back",
)

# score -> heading, meaning; the order of the columns
SCORES = {
    "relative_error": (
        "error of one sample",
        "‖x − y‖ / ‖y‖ of one member, averaged over members and snapshots (the published figure)",
    ),
    "relative_error_mean": ("error of the mean", "the same of the ensemble mean"),
    "crps": (
        "CRPS",
        "fair continuous ranked probability score; for a point forecast the mean absolute error",
    ),
    "crps_ratio": (
        "CRPS ratio",
        "CRPS over that of the exact law (or true ensemble); 1 is the best possible",
    ),
    "crps_difference": (
        "CRPS, difference",
        "CRPS less that of the reference method over the same starts or snapshots, over its mean; "
        "the interval is of the difference, negative is better",
    ),
    "energy_score": ("energy score", "fair energy score: like the CRPS, of whole fields"),
    "spread": ("spread", "root of the mean unbiased variance over members"),
    "spread_ratio": (
        "spread ratio",
        "spread over that of the exact law (or true ensemble); 1 is right",
    ),
    "spread_ratio_calm": (
        "in calm quarters",
        "spread ratio over the quarter of all points and snapshots where the exact law spreads "
        "least, to that law's own",
    ),
    "spread_ratio_wild": (
        "in wild quarters",
        "the same where the exact law spreads most; who ignores the state fails in both",
    ),
    "spread_calm": ("spread, calm", "spread over the calm quarter"),
    "spread_wild": ("spread, wild", "spread over the wild quarter"),
    "spread_ratio_lowest": (
        "lowest shell",
        "least spread ratio of the wavenumber shells with more than 1e-3 of the variance",
    ),
    "spread_ratio_highest": ("highest shell", "the largest of these"),
    "spread_skill": (
        "spread / skill",
        "spread over error of the ensemble mean, finite ensemble size corrected; 1 is calibrated",
    ),
    "bias2_ratio": (
        "bias² / floor",
        "squared bias of the mean (ensemble size and realised noise taken off) over the noise",
    ),
    "coverage_90": ("90 % coverage", "share of points inside the central 90 % interval"),
    "rank_p": (
        "rank p",
        "p-value of the rank histogram of whitened modes (or of one pixel per field); a small one "
        "means not calibrated",
    ),
    "rank_sees": (
        "seen by it",
        "least error of the spread, as a share, that so many ranks would show in 4 of 5 cases",
    ),
    "energy_ratio": ("power ratio", "mean square of a member over that of the truth"),
    "pzf_mean": (
        "L2 mean",
        "relative error of the conditional mean, ensemble size taken off; the four columns of "
        "Perezhogin, Zanna, Fernandez-Granda (JAMES 2023)",
    ),
    "pzf_total": ("L2 total", "relative distance of a sample's spectrum from the truth's"),
    "pzf_residual": (
        "L2 residual",
        "the same of what is left when the conditional mean is taken off sample and truth",
    ),
    "pzf_spread": ("spread (variance)", "variance of the former over that of the latter"),
    "work_energy": (
        "energy, ratio",
        "energy that the closure brings to the resolved flow, over what the true one brings; a "
        "ratio of small differences where what it takes and gives is nearly equal",
    ),
    "work_energy_distance": (
        "energy, distance",
        "relative distance of that spectrum, what each shell gets, from the truth's",
    ),
    "work_enstrophy": ("enstrophy, ratio", "the same of enstrophy"),
    "work_enstrophy_distance": ("enstrophy, distance", "the same of enstrophy"),
    "kurtosis": (
        "kurtosis of modes",
        "excess kurtosis of the innovations' modes, each over its own variance: 0 is Gaussian",
    ),
    "kurtosis_field": ("of the field", "the same of the field's values"),
    "skewness": ("skewness", "of the innovations' values: 0 is Gaussian"),
    "variance_follows_state": (
        "told by the state",
        "share of the variance of squared innovations that local |w|, |grad w| and strain squared "
        "explain",
    ),
    "variance_wild_calm": (
        "wild / calm",
        "mean squared innovation over the quarter of points where the state tells most, over that "
        "where it tells least: 1 does not follow the state",
    ),
    "kurtosis_patterns": (
        "kurtosis of patterns",
        "mean excess kurtosis of the leading principal components of the lowest shells",
    ),
    "kurtosis_patches": ("of patches", "the same of square patches of the field"),
    "gain_mean": ("mean", "share of the mean's network that unseen members have granted"),
    "gain_amplitude": ("amplitude", "the same of the amplitude"),
    "gain_residual": ("generator", "the same of the generator"),
    "brought_back": (
        "brought back",
        "share of the draws from the start on of which a shell was larger than the training's "
        "hardly ever are, and was brought back into their range",
    ),
    "brought_back_expected": (
        "expected",
        "the same share of draws that are exchangeable with the DNS's own closures: of training "
        "closures from which the range was not taken",
    ),
    "diverged": ("diverged", "share of members with values that are not finite"),
    "valid_time": ("valid time", "time at which the ensemble mean's relative error reaches 0.5"),
    "energy_score_joint": (
        "energy score, joint",
        "fair energy score of whole trajectories, root mean square over all stored lead times",
    ),
    "energy_score_joint_ratio": (
        "joint ratio",
        "that over the true ensemble's; 1 is the best possible",
    ),
    "energy_score_difference": ("energy score, difference", "likewise of the energy score"),
    "energy_score_joint_difference": (
        "energy score, joint, difference",
        "the same of the energy score of whole trajectories",
    ),
    "predictability": (
        "predictability",
        "1 less the CRPS of the true ensemble over climatology's: what there is to be gained",
    ),
    "correlated_95": (
        "correlated until",
        "time until which members are correlated with the truth by .95, on average",
    ),
    "growth_1": (
        "to 1 %",
        "time in which the members grow apart to that share of the true ensemble's last variance",
    ),
    "growth_10": ("to 10 %", "the same to a tenth"),
    "growth_50": ("to 50 %", "the same to a half"),
    "similarity_energy_spectrum": (
        "energy spectrum",
        "similarity 1 - D / D of no closure, second half of the run, D the root mean square "
        "distance over shells from the filtered DNS: 1 is perfect, negative does harm (Ross et "
        "al., JAMES 2023; Frezat et al. 2021)",
    ),
    "similarity_enstrophy_spectrum": ("enstrophy spectrum", "the same of enstrophy"),
    "similarity_energy_flux": ("energy flux", "the same of the resolved flux through each shell"),
    "similarity_enstrophy_flux": ("enstrophy flux", "the same of enstrophy"),
    "similarity_values": (
        "law of values",
        "similarity of the law of the state at a point, D the Wasserstein-1 distance",
    ),
    "similarity_energy": ("law of energy", "the same of a member's energy"),
    "similarity_enstrophy": ("law of enstrophy", "the same of a member's enstrophy"),
    "similarity_worst": ("worst", "the least of these similarities"),
    "wasserstein1": (
        "W₁",
        "Wasserstein-1 distance of pointwise vorticity to the truth's, in standard deviations",
    ),
    "probability": ("probability", "share of members in which the event asked for happened"),
    "members_needed": (
        "members needed",
        "ensemble size that would give the probability to the tolerance asked for",
    ),
    "cost_ms": ("cost [ms]", "wall time of one closure sample"),
    "cost_us": (
        "cost [us]",
        "wall time of one member and time unit on one thread, all methods in one run",
    ),
    "cost_ratio": ("cost ratio", "cost over that of the bare solver at its own step"),
}
TABLES = {
    "Accuracy and cost": (
        "relative_error",
        "relative_error_mean",
        "crps",
        "energy_score",
        "valid_time",
        "wasserstein1",
        "diverged",
        "cost_ms",
        "cost_us",
        "cost_ratio",
    ),
    "Draws that were brought back": ("brought_back", "brought_back_expected"),
    "The event asked for": ("probability", "members_needed"),
    "Beside the model": (),
    "Calibration": (
        "crps_ratio",
        "spread",
        "spread_ratio",
        "spread_ratio_calm",
        "spread_ratio_wild",
        "spread_calm",
        "spread_wild",
        "spread_ratio_lowest",
        "spread_ratio_highest",
        "spread_skill",
        "bias2_ratio",
        "coverage_90",
        "rank_p",
        "rank_sees",
        "energy_ratio",
    ),
    "Whole trajectories": (
        "energy_score_joint",
        "energy_score_joint_ratio",
        "correlated_95",
    ),
    "Growth of the variance": ("growth_1", "growth_10", "growth_50"),
    "Spectra of samples and of residuals": (
        "pzf_mean",
        "pzf_total",
        "pzf_residual",
        "pzf_spread",
    ),
    "Budget of the closure": (
        "work_energy",
        "work_energy_distance",
        "work_enstrophy",
        "work_enstrophy_distance",
    ),
    "Innovations: what the mean leaves (gp: draws of the Gaussian law in their place)": (
        "kurtosis",
        "kurtosis_field",
        "skewness",
        "variance_follows_state",
        "variance_wild_calm",
        "kurtosis_patterns",
        "kurtosis_patches",
    ),
    "Granted by unseen members": ("gain_mean", "gain_amplitude", "gain_residual"),
    "Similarity of long-time statistics": (
        "similarity_energy_spectrum",
        "similarity_enstrophy_spectrum",
        "similarity_energy_flux",
        "similarity_enstrophy_flux",
        "similarity_values",
        "similarity_energy",
        "similarity_enstrophy",
        "similarity_worst",
    ),
}
# scores with tables of their own
STATES = ["crps_difference", "energy_score_difference"]
APART = (*DIFFERENCES, PREDICTABILITY)
METHODS = {
    "model": "the trained closure",
    GRANTED: "the trained closure, granted an estimate of the closure (conditions.physics)",
    "mean_gp": "the trained closure's own mean and Gaussian law, without its generator",
    "oracle": "draws of the exact law; in the coupled run the full system with other noise, with "
    "sensors the reduced solver with draws of the exact law given what they read; of a subgrid "
    "closure the replicas: DNS that share the resolved past",
    "oracle_x0.95": "the exact law with its spread shrunk to 95 %: a control that must fail",
    "physics": "the known term granted, no network",
    "fourier": "periodic Fourier interpolation of the sensors alone",
    "climatology": "random states of the training members",
    "none": "no closure",
}


@dataclass(frozen=True)
class Report:
    """What the report is made of.

    Attributes:
        title: name of the run.
        rows: all score rows.
        absent: methods that do not apply, and why.
        facts: heading -> facts on what was run.
        pictures: figures in order.
        headline: first lines: which parts of the model act, what its generator adds.
        closed: methods in which no trained part acts.
        notes: sentences a reader must know, e.g. that fewer members than planned were there.
        provenance: plain data, printed as it is.
        start: time at which the coupled runs start.
        lead_times: those to print; None = up to six of those scored.
        against: method of the paired differences.
    """

    title: str
    rows: DataFrame
    absent: Sequence[Absent] = ()
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()
    headline: Sequence[str] = ()
    closed: Collection[str] = ()
    provenance: Mapping[str, Any] | None = None
    start: float | None = None
    lead_times: Sequence[float] | None = None
    against: str = "model"

    def write(self, path: Path) -> None:
        """Write ``report.html``."""
        jinja = Environment(
            loader=FileSystemLoader(TEMPLATES),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=StrictUndefined,
        )
        page = jinja.get_template("report.html").render(
            report=self,
            models=MODELS,
            summary=summarise(self.rows, self.start, self.closed),
            generated=[self._generated(*group) for group in groups(self.rows, "generated")],
            coupled=list(self._coupled()),
            figures=self._figures(),
            glossary=self._glossary(),
            provenance=json.dumps(self.provenance, indent=1, default=str, ensure_ascii=False),
        )
        write_text(path, page)

    def _figures(self) -> dict[str, list[dict[str, Any]]]:
        """{section: figures}, the images as text."""
        figures: dict[str, list] = {name: [] for name in SECTIONS}
        for picture in self.pictures:
            image = picture.png.read_bytes()
            figures[picture.section].append(
                {
                    "caption": picture.caption,
                    # of the PNG header; letters of one size
                    "width": int.from_bytes(image[16:20], "big") // 2,
                    "data": base64.b64encode(image).decode(),
                }
            )
        return figures

    def _notes(self, stage: str, columns: dict) -> dict[str, str]:
        """{method: reason} of the methods that a group of rows lacks."""
        return {
            note.method: note.reason
            for note in self.absent
            if note.stage == stage
            and note.closure == columns["closure"]
            and note.sensors in (None, columns["sensors"])
        }

    def _generated(self, columns: dict, rows: DataFrame) -> dict[str, Any]:
        """Heading, note and tables of one group of the generated closure."""
        total = select(rows, shell=None)
        return {
            "heading": heading(columns).capitalize(),
            "columns": columns,
            "samples": total["samples"].iloc[0],
            "tables": list(score_tables(total, self._notes("generated", columns), self.closed)),
            "paired": self._paired(total, "score", STATES, "snapshot by snapshot"),
            "floor": _floor(total),
            "shells": list(_shells(rows)),
        }

    def _coupled(self) -> Iterator[dict[str, Any]]:
        """Heading, note and tables of each group of coupled runs."""
        for columns, rows in groups(self.rows, "coupled"):
            total = select(rows, shell=None)
            times = sorted(time for time in total["lead_time"].dropna().unique() if time)
            if not times:
                continue
            shown = [time for time in self.lead_times or times if time in times] or times
            if len(shown) > MAX_TIMES:
                last = len(shown) - 1
                shown = [shown[round(i * last / (MAX_TIMES - 1))] for i in range(MAX_TIMES)]
            late = late_leads(total)
            telling = [time for time in times if time not in late]
            last = telling[-1] if telling else times[-1]
            in_time, reasons = [], self._notes("coupled", columns)
            for score in IN_TIME:
                part = select(total, score=score)
                part = part[part["lead_time"].isin(shown)]
                if len(part):
                    caption = f"{SCORES[score][0]}, by lead time".capitalize()
                    in_time.append(Table.of(part, "lead_time", shown, caption, reasons, late))
                    reasons = {}
            gained = select(total, score=PREDICTABILITY)
            gained = gained[gained["lead_time"].isin(shown)]
            if len(gained):
                caption = "Predictability, by lead time"
                in_time.append(Table.of(gained, "lead_time", shown, caption, {}, late))
            by_lead = total[total["lead_time"].isin(shown)]
            paired = [
                *self._paired(by_lead, "lead_time", shown, "start by start, by lead time", late),
                *self._paired(
                    total,
                    "score",
                    ["energy_score_joint_difference"],
                    "start by start, of whole trajectories",
                ),
            ]
            ends = total["lead_time"].isna() | (total["lead_time"] == last)
            asked = total["score"].isin(TABLES["The event asked for"])
            model = total[total["method"].isin(MODELS)]
            yield {
                "heading": heading(columns).capitalize(),
                "columns": columns,
                "sizes": next(model.itertuples(), None),
                "in_time": in_time,
                "paired": paired,
                "last": last,
                "of": times[-1],
                "late": SENTENCE if late else "",
                "tables": list(score_tables(total[ends | asked], closed=self.closed)),
            }

    def _paired(
        self, rows: DataFrame, across: str, order: Sequence, how: str, late: Sequence[float] = ()
    ) -> "list[Table]":
        """The table of the differences to the reference, in words; none without rows."""
        scores = order if across == "score" else ["crps_difference"]
        part = rows[rows["score"].isin(scores)]
        if part.empty:
            return []
        what = "Difference" if across == "score" else "CRPS, difference"
        caption = f"{what} to {self.against}, {how}: negative is better"
        return [Table.of(part, across, order, caption, late=late)]

    def _glossary(self) -> dict[str, str]:
        """{name: meaning} of the methods and scores in the rows."""
        names = sort_methods([*self.rows["method"], *(note.method for note in self.absent)])
        used = set(self.rows["score"])
        several = self.rows.dropna(subset="seeds").groupby("method")["seeds"].max()
        means = {
            name: f"mean over {number} trainings that differ in their seed alone; the small "
            "figures are the least and the largest of them, of differences the ends of all "
            "their intervals"
            for name, number in several.items()
        }
        known = {name: METHODS[name] for name in names if name in METHODS} | means
        return known | {
            name: meaning for score, (name, meaning) in SCORES.items() if score in used
        }


# ---- tables ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A value in words with its interval in words; both empty where there is none."""

    value: str = ""
    interval: str = ""


@dataclass(frozen=True)
class Table:
    """A table with methods down.

    Attributes:
        caption: above it.
        heads: (name, meaning) of the columns.
        lines: method -> cells.
        reasons: why a method has no cell.
    """

    caption: str
    heads: list[tuple[str, str]]
    lines: dict[str, list[Cell]]
    reasons: dict[str, str]

    @classmethod
    def of(
        cls,
        rows: DataFrame,
        across: str = "score",
        order: Sequence = (),
        caption: str = "",
        reasons: Mapping[str, str] | None = None,
        late: Collection[float] = (),
    ) -> "Table":
        """Lay rows out; ``reasons`` has further methods, and why they have no rows.

        Lead times that are ``late`` have a dagger.
        """
        reasons = reasons or {}
        table = pivot(rows, across, order, reasons)
        lines = {
            method: [_cell(row, intervals=across != "shell") for row in cells]
            for method, cells in zip(table.index, table.to_numpy(), strict=True)
        }
        heads = [
            SCORES[name] if name in SCORES else (f"{name:g}{DAGGER * (name in late)}", "")
            for name in order
        ]
        empty = {method for method, cells in lines.items() if not any(c.value for c in cells)}
        return cls(caption, heads, lines, {m: r for m, r in reasons.items() if m in empty})


def _cell(row, intervals: bool) -> Cell:
    if row is None:
        return Cell()
    if row.score in DIFFERENCES:
        return _difference(row)
    value, low, high = (format_value(row.score, edge) for edge in (row.value, row.low, row.high))
    bounded = intervals and not isna(row.low) and not isna(row.high)
    return Cell(value, f"{low} – {high}" if bounded and not low == value == high else "")


def _difference(row) -> Cell:
    """A paired difference in per cent, and what its interval says."""
    if math.isinf(row.value):
        return Cell(f"diverged, {WORSE}")
    value, low, high = (f"{100 * edge:+.2g}" for edge in (row.value, row.low, row.high))
    interval = "" if isna(row.low) or isna(row.high) else f"{low} – {high}"
    return Cell(f"{value} %, {verdict(row.low, row.high)}", interval)


def score_tables(
    rows: DataFrame, reasons: Mapping[str, str] | None = None, closed: Collection[str] = ()
) -> Iterator[Table]:
    """Accuracy and calibration apart; a score that says nothing (nobody diverged) is left out."""
    if not select(rows, score="diverged")["value"].any():
        rows = rows[rows["score"] != "diverged"]
    for caption, names in TABLES.items():
        part = rows[rows["score"].isin(names)]
        if len(part):
            order = [name for name in names if name in set(part["score"])]
            yield Table.of(part, "score", order, caption + _closed(part, closed), reasons)


def _closed(rows: DataFrame, closed: Collection[str]) -> str:
    """Which rows of a table are closed forms, in words."""
    names = [name for name in sort_methods(rows["method"]) if name in closed]
    return f" (closed form: {', '.join(names)})" if names else ""


# scores with a table per shell, and its caption
SHELLS = {
    "spread_ratio": "Spread ratio",
    "gain_mean": "Gain of the mean's network",
    "gain_residual": "Gain of the generator",
    "kurtosis": "Excess kurtosis of the innovations' modes",
    "kurtosis_field": "Excess kurtosis of the innovations' field",
    "skewness": "Skewness of the innovations' field",
}


def _shells(rows: DataFrame) -> Iterator[Table]:
    for score, words in SHELLS.items():
        part = rows[(rows["score"] == score) & rows["shell"].notna()]
        if len(part):
            caption = f"{words} per wavenumber shell"
            yield Table.of(part, "shell", sorted(part["shell"].unique()), caption)


def _floor(rows: DataFrame) -> str:
    """The best that any answer could reach, in words; empty where the law is not known."""
    floor = find(rows, method="oracle", score="floor")
    if floor is None:
        return ""
    realised = find(rows, method="oracle", score="floor_realised")
    text = (
        "Best possible relative error of any mean, from the exact law and these data: σ/rms(U) = "
        f"{format_value('floor', floor.value)}"
    )
    if realised is not None:
        text += f" (with the noise that these snapshots realised: {realised.value:.3g})"
    return f"{text}; of a perfect single sample {floor.value * math.sqrt(2):.3g}."
