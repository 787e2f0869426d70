"""Draw and caption the figures of a run for the report.

Each function draws the figures for which there are results, and yields each picture once its file
is written, in the order of the report.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pandas import DataFrame

from hpc_closure.evaluate.context import Inputs
from hpc_closure.evaluate.report import example_state, figures
from hpc_closure.evaluate.report.example_state import FieldsOfState, OneState
from hpc_closure.evaluate.rows import points_in_words, select
from hpc_closure.evaluate.scores.coupled.late import late_leads
from hpc_closure.evaluate.scores.table import Scored
from hpc_closure.experiment.method_names import MODELS
from hpc_closure.train import metrics

SECTIONS = ("generated", "coupled", "training", "cost")
SHOWN_PAIRS = (*MODELS, "mean_gp", "oracle", "none")  # methods in the figure of coherence
SHOWN = (0.2, 0.45, 0.75)  # relative positions of the lead times in the figure of skill and cost


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        section: one of ``SECTIONS``.
        png: file of the figure.
        caption: text below it.
    """

    section: str
    png: Path
    caption: str


@dataclass(frozen=True)
class Field:
    """A field that a figure shows: its name, its unit, and the unit of its square."""

    name: str
    unit: str
    squared: str

    @classmethod
    def of(cls, name: str, unit: str) -> "Field":
        """Return a field with the unit of its square in plain letters."""
        return cls(name, unit, f"({unit})$^2$")

    def __str__(self) -> str:
        return f"{self.name} [{self.unit}]"


CLOSURE = Field("U", r"s$^{-2}$", r"s$^{-4}$")


@dataclass(frozen=True)
class Album:
    """Folder into which figures are written, and their formats beside PNG.

    Attributes:
        folder: an existing folder.
        formats: ``evaluate.formats``.
    """

    folder: Path
    formats: Sequence[str] = ("png", "pdf", "csv")

    def add(self, section: str, figure, name: str, caption: str) -> Picture:
        """Write a figure and return its picture."""
        png = figures.save(figure, self.folder / name, self.formats)[0]
        return Picture(section, png, caption)


def draw(
    inputs: Inputs,
    generated: Mapping[tuple[int, str, str], Scored],
    coupled: Mapping[str, Scored],
    rows: DataFrame,
    device: str,
) -> Iterator[Picture]:
    """Draw all pictures of a run; none if ``evaluate.formats`` is empty.

    A state of several fields has the pictures of each channel, named by it.

    Args:
        inputs: experiment, closures and data.
        generated: results by grid, sensors and channel.
        coupled: results by channel; empty without coupled runs.
        rows: score rows.
        device: the machine on which the costs were measured.
    """
    target = inputs.target
    if not inputs.experiment.evaluate.formats:
        return
    inputs.run.figures.mkdir(parents=True, exist_ok=True)
    album = Album(inputs.run.figures, inputs.experiment.evaluate.formats)
    if (example := example_state.answer(inputs)) is not None:
        yield illustrate_closure(example, album)
    physics = inputs.experiment.physics
    units = {channel.name: channel.unit or "1" for channel in physics.channels}
    if (of_fields := example_state.answer_of_fields(inputs)) is not None:
        yield illustrate_closures(of_fields, album, units)
    # a single field of a flow of others has its name; of a flow here it is the vorticity
    only = physics.channels[0].name if physics.equation == "external" else ""
    for (grid, sensors, channel), scored in generated.items():
        if not scored.spectra:  # scores of all channels together have no figures
            continue
        label = f"{target}_{grid}_{sensors.replace(' ', '_').replace(',', '')}"
        points = points_in_words(grid, inputs.dimensions)
        words = f"{target}, sensors: {sensors}, {points} grid"
        shown = channel or only
        field = Field.of(f"U of {shown}", f"({units[shown]})/time") if shown else CLOSURE
        label, words = _of_channel(channel, label, words)
        yield from illustrate_generated(scored, album, label, words, field)
    for channel, scored in coupled.items():
        words = f"{target}, started at t = {inputs.experiment.rollout.begin:g}"
        label, words = _of_channel(channel, target, words)
        shown = channel or only
        state = Field.of(shown, units[shown]) if shown else None
        if scored.coherences:
            yield illustrate_coherence(scored, album)
        if scored.spectra:  # scores of all channels together have none
            yield from illustrate_coupled(scored, album, label, words, state)
        if scored.fluxes:
            yield illustrate_fluxes(scored, album, label, words)
    yield from illustrate_training(metrics.read(inputs.run.metrics), album)
    yield from illustrate_cost(rows, album, device)
    if inputs.channels:  # CRPS of channels have different units
        return
    late = late_leads(select(rows, stage="coupled"))
    leads = sorted(lead for lead in inputs.experiment.evaluate.lead_times if lead not in late)
    if leads:
        places = {int(share * len(leads)) for share in SHOWN}
        yield from illustrate_frontier(rows, album, [leads[place] for place in sorted(places)])


def _of_channel(channel: str, label: str, words: str) -> tuple[str, str]:
    """Add a channel to the suffix of file names and to the words of captions."""
    return (f"{label}_{channel}", f"{channel}, {words}") if channel else (label, words)


def illustrate_closure(shown: OneState, album: Album) -> Picture:
    """Draw truth, samples and spread of the closure at one state, beside the exact law."""
    drawn = figures.closure(shown)
    plain = ", one of its mean and Gaussian law without the generator" * (len(shown.samples) > 1)
    caption = (
        f"Closure at {shown.state}, no sensors: truth, {len(next(iter(shown.samples.values())))} "
        f"samples of the model{plain}; below: the spread of the exact law and of each of them, "
        f"and the distribution of the {shown.number} over many samples."
    )
    return album.add("generated", drawn, "closure", caption)


def illustrate_closures(shown: FieldsOfState, album: Album, units: Mapping[str, str]) -> Picture:
    """Draw truth, samples and spread of the closure of each field at one state.

    ``units`` are those of the fields.
    """
    rates = {name: f"({unit})/time" if unit else "1/time" for name, unit in units.items()}
    others = {
        "DNS, same past": ", the closure of another DNS with the same resolved past",
        "no generator: sample": ", a sample of mean and Gaussian law without the generator",
    }
    more = "".join(words for title, words in others.items() if title in shown.tiles)
    cut = ", in the plane z = 0" if shown.spread.ndim == 4 else ""
    caption = (
        f"Closure of each field at {shown.state}{cut}, no sensors: truth, two samples of the model"
        f"{more}; right: the standard deviation over samples of the model. Every row has its own "
        "colours and unit."
    )
    drawn = figures.closures_of_fields(shown, rates)
    return album.add("generated", drawn, "closure", caption)


def illustrate_generated(
    scored: Scored, album: Album, label: str, words: str, field: Field = CLOSURE
) -> Iterator[Picture]:
    """Draw fields, spectra, budgets and rank histograms of the generated closure.

    Args:
        scored: result of ``score_generated``.
        album: folder for the files.
        label: suffix of the file names, e.g. ``diffusion_64_none``.
        words: description for the captions, e.g. ``diffusion, no sensors, 64² grid``.
        field: name and unit of the closure.
    """
    quantity, unit = field.name, field.unit
    shown = [name for name in (*MODELS, "oracle") if name in scored.examples]
    against = ", and of the exact law" if "oracle" in shown else ""
    if shown:
        if _sides(scored) == 1:
            drawn = figures.profiles(scored.examples, shown, quantity=quantity)
        else:
            drawn = figures.fields(scored.examples, shown, quantity=quantity, unit=unit)
        caption = (
            f"Closure at one held-out state{_slice(scored)} ({words}): truth, one sample, "
            f"ensemble mean and standard deviation of the model{against}."
        )
        yield album.add("generated", drawn, f"fields_{label}", caption)
    drawn = figures.spectra(
        scored.spectra, scored.spread_spectra, quantity=quantity, unit=field.squared
    )
    right = (
        "spread per shell over that of the exact law"
        if "oracle" in scored.spread_spectra
        else "variance over members per shell"
    )
    caption = f"Power of the closure per wavenumber shell; right: {right} ({words})."
    yield album.add("generated", drawn, f"spectra_{label}", caption)
    if scored.transfer:
        drawn = figures.rates(
            scored.transfer, title="{} of the closure", shown=(*MODELS, "oracle")
        )
        caption = (
            f"Budget of the closure per wavenumber shell: rate at which it adds each quantity to "
            f"the resolved flow ({words})."
        )
        yield album.add("generated", drawn, f"budget_{label}", caption)
    if scored.ranks:
        drawn = figures.rank_histograms(scored.ranks)
        caption = (
            f"Rank of the truth among the members ({words}); the grey band holds 95 % of the bars "
            "of a calibrated ensemble."
        )
        yield album.add("generated", drawn, f"ranks_{label}", caption)


def illustrate_coupled(
    scored: Scored, album: Album, label: str, words: str, field: Field | None = None
) -> Iterator[Picture]:
    """Draw error growth, and fields and spectra at the last lead time of a coupled run.

    Args:
        scored: result of ``score_coupled``.
        album: folder for the files.
        label: suffix of the file names.
        words: description for the captions.
        field: name and unit of the state; None = vorticity, off the plane a velocity.
    """
    sides = _sides(scored)
    name, unit = ("state", "(length/time)$^2$") if sides != 2 else ("vorticity", r"s$^{-2}$")
    if field is not None:
        name, unit = field.name, field.squared
    late = late_leads(scored.rows)
    caption = f"Error of the ensemble mean, and spread, against lead time ({words})."
    if late:
        caption += " Shaded: late lead times, where scores do not separate good closures from bad."
    leads = scored.rows["lead_time"].dropna()
    is_late = bool(late) and bool(late[-1] == leads.max())
    last = "the last lead time" + ", which is late" * is_late
    drawn = figures.error_growth(scored.rows, "vorticity [1/s]" if field is None else str(field))
    yield album.add("coupled", drawn, f"error_{label}", caption)
    shown = [name for name in (*MODELS, "none") if name in scored.examples]
    if shown:
        if sides == 1:
            drawn = figures.profiles(scored.examples, shown, quantity="u")
        else:
            plain = Field.of("vorticity", "1/s") if sides == 2 else Field.of("u", "length/time")
            of_field = field or plain
            drawn = figures.fields(
                scored.examples, shown, quantity=of_field.name, unit=of_field.unit
            )
        caption = f"{name if field else name.capitalize()} at {last}{_slice(scored)} ({words})."
        yield album.add("coupled", drawn, f"{'state' if field else name}_{label}", caption)
    drawn = figures.spectra(scored.spectra, scored.spread_spectra, quantity=name, unit=unit)
    caption = f"Power of the {name} and spread per shell at {last} ({words})."
    stem = "state" if field else name
    yield album.add("coupled", drawn, f"{stem}_spectra_{label}", caption)


def illustrate_fluxes(scored: Scored, album: Album, label: str, words: str) -> Picture:
    """Draw the resolved fluxes of a coupled run through each shell."""
    drawn = figures.rates(scored.fluxes, title="flux of {}", shown=(*MODELS, "oracle", "none"))
    caption = f"Resolved flux through each shell in the second half of the run ({words})."
    return album.add("coupled", drawn, f"flux_{label}", caption)


def illustrate_coherence(scored: Scored, album: Album) -> Picture:
    """Draw coherence and phase of each pair of fields of a coupled run."""
    drawn = figures.coherences(scored.coherences, shown=SHOWN_PAIRS)
    caption = (
        "Coherence of pairs of fields per wavenumber shell in the second half of the run, and "
        "phase of the first less the second, of modes with kx > 0; no phase where the coherence "
        f"is below {figures.COHERENT:g}."
    )
    return album.add("coupled", drawn, "coherence", caption)


def illustrate_training(history: Sequence[Mapping[str, Any]], album: Album) -> Iterator[Picture]:
    """Draw the loss curve from the rows of ``train/metrics.csv``; nothing without rows."""
    if history:
        caption = "Loss of the batches, and of fixed samples of training and held-out members."
        yield album.add("training", figures.loss_curve(history), "loss", caption)


def illustrate_cost(rows: DataFrame, album: Album, words: str) -> Iterator[Picture]:
    """Draw the costs; ``words`` names the machine. Draw nothing if no cost was measured."""
    if rows["score"].isin(["cost_ms", "cost_us"]).any():
        yield album.add("cost", figures.cost(rows), "cost", f"Wall time, {words}.")


def illustrate_frontier(
    rows: DataFrame, album: Album, lead_times: Sequence[float]
) -> Iterator[Picture]:
    """Draw skill against cost if at least three methods have a cost."""
    coupled = select(rows, stage="coupled", score="cost_ratio")
    if len(coupled) >= 3:
        caption = (
            "CRPS against the cost of a member, in bare solvers at their own step. Joined are the "
            "bare solvers, and by a broken line the closures, that no cheaper one beats; the "
            "horizontal line is the true ensemble."
        )
        drawn = figures.frontier(rows, lead_times)
        yield album.add("cost", drawn, "frontier", caption)


def _sides(scored: Scored) -> int:
    """Return the number of sides of the fields; 2 without examples."""
    return scored.examples["truth"].ndim if "truth" in scored.examples else 2


def _slice(scored: Scored) -> str:
    """Return the words on the plane that is shown of fields of three sides."""
    return ", in the plane z = 0" if _sides(scored) == 3 else ""
