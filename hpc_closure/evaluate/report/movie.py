"""Draw a coupled run as a film: truth, members, spread, where the truth lies, and spectra.

Frames are drawn by matplotlib. They become an MP4 file where ffmpeg is installed, else a GIF.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.animation import AbstractMovieWriter, FFMpegWriter, PillowWriter
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import (
    FormatStrFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)

from hpc_closure.evaluate.report.figures import drawing_style, plane, scaled
from hpc_closure.work.atomic import publish

SHOWN = 3  # members
BAND = (0.05, 0.95)  # quantiles of the spectra's band
# all players know this pixel format; the index comes first, so that a page can play a part
MP4 = ["-pix_fmt", "yuv420p", "-movflags", "+faststart"]
FORMATS = {".mp4": "ffmpeg", ".gif": ""}
SIZE, DPI = (9.6, 6.0), {".mp4": 120, ".gif": 70}  # a GIF holds every frame nearly whole


@dataclass(frozen=True)
class Film:
    """What a film shows, frame by frame.

    Attributes:
        lead_times: (T,) since the start.
        truth: (T, *sides).
        members: (M, T, *sides).
        shells: (S,) wavenumbers of the spectra.
        truth_spectra: (T, S) of the truth.
        spectra: (M, T, S) of the members.
        quantity: name of the field.
        unit: its unit, empty if unknown.
        title: line above the pictures.
    """

    lead_times: np.ndarray
    truth: np.ndarray
    members: np.ndarray
    shells: np.ndarray
    truth_spectra: np.ndarray
    spectra: np.ndarray
    quantity: str = "vorticity"
    unit: str = ""
    title: str = ""


def default_format() -> str:
    """Return ``.mp4`` if ffmpeg is installed, else ``.gif``."""
    return ".mp4" if shutil.which("ffmpeg") else ".gif"


def write(film: Film, path: Path, seconds: float = 10.0) -> Path:
    """Write a film that lasts about ``seconds``; returns its path.

    Raises:
        ValueError: the ending is neither .mp4 nor .gif, or ffmpeg is needed and missing.
    """
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise ValueError(f"{path}: expected a file that ends in .mp4 or .gif")
    if FORMATS[kind] and not shutil.which(FORMATS[kind]):
        raise ValueError(f"{path}: an MP4 file needs ffmpeg; install it or choose a .gif file")
    rate = round(max(1.0, min(25.0, len(film.lead_times) / seconds)))
    with publish(path) as part, drawing_style():
        pictures = Pictures(film)
        # the writers choose the format by the ending
        target = part.with_name(part.name + kind)
        writer: AbstractMovieWriter
        if kind == ".mp4":
            writer = FFMpegWriter(fps=rate, codec="h264", extra_args=MP4)
        else:
            writer = PillowWriter(fps=rate)
        with writer.saving(pictures.figure, str(target), dpi=DPI[kind]):
            for number in range(len(film.lead_times)):
                pictures.show(number)
                writer.grab_frame()
        target.replace(part)
    return path


class Pictures:
    """The figure of one frame; :meth:`show` sets it to another."""

    def __init__(self, film: Film):
        self.film = film
        finite = film.truth[np.isfinite(film.truth)]
        factor, unit = scaled(float(np.quantile(np.abs(finite), 0.999)), film.unit)
        self.factor, limit = factor, float(np.quantile(np.abs(finite), 0.999)) * factor or 1.0
        late = np.nanstd(film.members[:, -1], axis=0)
        widest = float(np.nanquantile(late, 0.99)) * factor or 1.0
        self.figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasAgg(self.figure)
        # each row is laid out by itself: colour bars of one row do not move pictures of the other
        halves = self.figure.subfigures(2, 1, height_ratios=(1, 1.2), squeeze=False)
        upper, lower = halves[:, 0]
        shown = range(min(SHOWN, len(film.members)))
        titles = ["truth (DNS)", *(f"member {number}" for number in shown)]
        quantity = f"{film.quantity} [{unit}]" if unit else film.quantity
        self.images: dict[str, AxesImage] = {}
        for axis, title in zip(np.ravel(upper.subplots(1, len(titles))), titles):
            signed = self._image(axis, title, "RdBu_r", -limit, limit)
        fields = [image.axes for image in self.images.values()]
        upper.colorbar(signed, ax=fields, label=quantity, shrink=0.8, aspect=15, pad=0.01)
        left, middle, self.axis = np.ravel(lower.subplots(1, 3, width_ratios=(1, 1, 2)))
        spread = self._image(left, "ensemble std", "viridis", 0, widest)
        ranks = self._image(middle, "rank of the truth", "PuOr", 0, 1)
        labels = (quantity, "members below the truth [%]")
        for image, label in zip((spread, ranks), labels):
            bar = lower.colorbar(image, ax=image.axes, location="bottom", aspect=20, pad=0.03)
            bar.set_label(label)
            bar.locator = MaxNLocator(5)
        bar.formatter = PercentFormatter(1.0, symbol="")
        self.heading = self.figure.suptitle("", x=0.01, ha="left", fontsize=10)
        self.show(len(film.lead_times) - 1)
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")  # all frames have the places of the last

    def _image(self, axis, title: str, colours: str, low: float, high: float) -> AxesImage:
        axis.set(xticks=[], yticks=[])
        axis.set_title(title)
        axis.grid(False)
        sides = plane(self.film.truth[0]).shape
        image = axis.imshow(
            np.zeros(sides).T, origin="lower", cmap=colours, vmin=low, vmax=high, rasterized=True
        )
        self.images[title] = image
        return image

    def show(self, number: int) -> None:
        """Set the figure to frame ``number``."""
        film, factor = self.film, self.factor
        truth = plane(film.truth[number])
        members = np.stack([plane(member[number]) for member in film.members])
        values = {
            "truth (DNS)": truth * factor,
            **{f"member {m}": members[m] * factor for m in range(min(SHOWN, len(members)))},
            "ensemble std": np.nanstd(members, axis=0) * factor,
            "rank of the truth": ranks_of(truth, members),
        }
        for title, image in self.images.items():
            image.set_data(values[title].T)
        self._spectra(number)
        where = ", plane z = 0" if film.truth[0].ndim == 3 else ""
        words = f"{film.title}{where}    lead time {film.lead_times[number]:.2f}"
        self.heading.set_text(words.strip())

    def _spectra(self, number: int) -> None:
        film, axis = self.film, self.axis
        low, high = np.nanquantile(film.spectra[:, number], BAND, axis=0)
        shells = slice(1, None)  # without the mean
        axis.clear()
        axis.set_title(f"spectrum of {film.quantity}: mean square per shell")
        axis.fill_between(
            film.shells[shells],
            low[shells],
            high[shells],
            color="#0072B2",
            alpha=0.35,
            lw=0,
            label="90 % of the members",
        )
        true = film.truth_spectra[number, shells]
        axis.loglog(film.shells[shells], true, color="black", label="truth")
        axis.legend(loc="lower left", frameon=False)
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        everything = film.truth_spectra[:, shells]
        largest = float(everything.max())
        smallest = float(everything[everything > 1e-9 * largest].min())
        axis.set_ylim(0.3 * smallest, 3 * largest)
        axis.set_xlabel("wavenumber |k|")


def ranks_of(truth: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Return the share of members (M, ...) below the truth (...), point by point, 0 to 1.

    Of members that equal the truth to single precision, as at the start, half count as below.
    """
    alive = np.isfinite(members)
    equal = np.abs(members - truth) <= 1e-6 * np.nanmax(np.abs(truth))
    below = np.where(equal, 0.5, members < truth)
    number = alive.sum(axis=0)
    return np.sum(below, axis=0, where=alive) / np.where(number, number, np.nan)


def sampled(number: int, most: int) -> Sequence[int]:
    """Return at most ``most`` evenly spaced indices below ``number``, the last one included.

    >>> sampled(10, 4)
    [0, 3, 6, 9]
    """
    if number <= most:
        return list(range(number))
    return [int(index) for index in np.linspace(0, number - 1, most).round()]
