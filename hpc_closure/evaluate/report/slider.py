"""Frames of a coupled run for the report's slider: truth, members and spread by lead time.

Frames are drawn here and embedded as images, so the page needs no plotting library. Their size is
bounded: where a run has more lead times than fit, every n-th is shown.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from hpc_closure.data.held_out import truth_of
from hpc_closure.data.reader import CoupledEnsemble
from hpc_closure.evaluate.report.figures import drawing_style, plane, scaled
from hpc_closure.evaluate.report.movie import SHOWN, sampled
from hpc_closure.experiment.schema import Experiment
from hpc_closure.work.units import Ledger

MOST_FRAMES = 41
MOST_BYTES = 3_000_000  # of all frames, as they are in the page
SIZE, DPI, QUALITY = (12.0, 3.3), 90, 80


@dataclass(frozen=True)
class Fields:
    """What the frames show.

    Attributes:
        lead_times: (T,) since the start.
        truth: (T, n, n).
        members: (at most SHOWN, T, n, n).
        spread: (T, n, n) standard deviation over all members.
        number: of members.
        quantity, unit: name of the field and its unit, "" if unknown.
        is_slice: whether they are planes of fields of three sides.
    """

    lead_times: np.ndarray
    truth: np.ndarray
    members: np.ndarray
    spread: np.ndarray
    number: int
    quantity: str = "vorticity"
    unit: str = ""
    is_slice: bool = False


@dataclass(frozen=True)
class Slider:
    """Pictures of a coupled run, one per lead time, among which the page moves a slider.

    Attributes:
        frames: data URIs, one per lead time.
        labels: lead times in words.
        caption: text below the picture.
        width: width of a frame on the page in pixels.
    """

    frames: list[str]
    labels: list[str]
    caption: str
    width: int

    @property
    def megabytes(self) -> str:
        """Return the size of all frames in words."""
        return f"{sum(map(len, self.frames)) / 1e6:.1f} MB"


def of_run(experiment: Experiment) -> Slider | None:
    """Return the slider of the first start of a coupled run.

    None without figures (``evaluate.formats``), without a finished unit, with a single lead time,
    or if the state is a line.
    """
    paths = [product.path for product in Ledger.of(experiment, "rollout").products()]
    if not (experiment.evaluate.formats and paths) or experiment.problem.dimensions == 1:
        return None
    fields = read(experiment, CoupledEnsemble(paths))
    return None if fields is None else draw(fields)


def read(experiment: Experiment, ensemble: CoupledEnsemble) -> Fields | None:
    """Read the first start's fields, time by time; None if there are fewer than two times."""
    found = truth_of(experiment, ensemble)
    if found is None:
        return None
    truth, name = found
    lead_times = np.array([float(time - ensemble.start) for time in ensemble.times])
    if len(lead_times) < 2:
        return None
    case = ensemble.cases[0]
    truth.select([case])
    ensemble.select([case])
    chosen = sampled(len(lead_times), MOST_FRAMES)
    truths, members, spreads = [], [], []
    for index in chosen:
        runs = ensemble.read("model", index)[:, 0]
        true = truth.read(name, truth.index(lead_times[index]))[0, 0]
        if ensemble.channels:  # the first field
            runs, true = runs[:, 0], true[0]
        planes = np.stack([plane(one) for one in runs])
        truths.append(plane(true))
        members.append(planes[:SHOWN])
        spreads.append(np.nanstd(planes, axis=0))
    described = experiment.problem.physics.channels[0]
    return Fields(
        lead_times[chosen],
        np.stack(truths),
        np.stack(members, 1),
        np.stack(spreads),
        len(ensemble.members),
        described.name,
        described.unit,
        experiment.problem.dimensions == 3,
    )


def draw(fields: Fields, most_bytes: int = MOST_BYTES) -> Slider:
    """Draw the frames; where they exceed ``most_bytes``, every second is left out, and so on."""
    with drawing_style():
        pictures = _Pictures(fields)
        frames = [pictures.frame(number) for number in range(len(fields.lead_times))]
    kept: Sequence[int] = range(len(frames))
    while sum(len(frames[number]) for number in kept) > most_bytes and len(kept) > 2:
        kept = sampled(len(frames), (len(kept) + 1) // 2)
    shown = len(fields.members)
    return Slider(
        frames=[frames[number] for number in kept],
        labels=[f"{fields.lead_times[number]:.4g}" for number in kept],
        caption=f"{_named(fields.quantity)} of the first start: truth, {shown} of "
        f"{fields.number} members, and the standard deviation of all members, by lead time"
        f"{', in the plane z = 0' if fields.is_slice else ''}.",
        width=round(SIZE[0] * DPI),
    )


def _named(quantity: str) -> str:
    """Return the first words of a sentence on a quantity; a symbol such as u keeps its case."""
    return quantity.capitalize() if len(quantity) > 2 else f"Field {quantity}"


class _Pictures:
    """The figure of all frames; colours mean the same in each."""

    def __init__(self, fields: Fields):
        self.fields = fields
        largest = float(np.nanquantile(np.abs(fields.truth), 0.999))
        self.factor, unit = scaled(largest, fields.unit)
        limit = largest * self.factor or 1.0
        widest = float(np.nanquantile(fields.spread, 0.995)) * self.factor or 1.0
        self.figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
        self.canvas = FigureCanvasAgg(self.figure)
        titles = ["truth (DNS)", *(f"member {number}" for number in range(len(fields.members)))]
        axes = self.figure.subplots(1, len(titles) + 1)
        self.images = []
        blank = np.zeros(fields.truth[0].shape).T
        for axis, title in zip(axes, [*titles, "ensemble std"]):
            colours, low, high = ("RdBu_r", -limit, limit)
            if axis is axes[-1]:
                colours, low, high = ("viridis", 0.0, widest)
            axis.set(xticks=[], yticks=[])
            axis.set_title(title)
            axis.grid(False)
            self.images.append(
                axis.imshow(blank, origin="lower", cmap=colours, vmin=low, vmax=high)
            )
        label = f"{fields.quantity} [{unit}]" if unit else fields.quantity
        self.figure.colorbar(
            self.images[0], ax=list(axes[:-1]), location="bottom", label=label, aspect=50, pad=0.02
        )
        self.figure.colorbar(
            self.images[-1],
            ax=axes[-1],
            location="bottom",
            label=f"std [{unit}]" if unit else "std",
            aspect=12,
            pad=0.02,
            ticks=MaxNLocator(4),
        )

    def frame(self, number: int) -> str:
        """Return the data URI of frame ``number``."""
        fields = self.fields
        shown = [fields.truth[number], *fields.members[:, number], fields.spread[number]]
        for image, values in zip(self.images, shown, strict=True):
            image.set_data(values.T * self.factor)
        self.canvas.draw()
        if number == 0:
            self.figure.set_layout_engine("none")  # all frames have the places of the first
        stream = io.BytesIO()
        picture = Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB")
        picture.save(stream, "WEBP", quality=QUALITY)
        return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
