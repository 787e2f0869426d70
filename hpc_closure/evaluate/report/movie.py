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

from hpc_closure.evaluate.report.figures import drawing_style, plane, scaled
from hpc_closure.work.atomic import publish

SHOWN = 3  # members
BAND = (0.05, 0.95)  # quantiles of the spectra's band
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
            writer = FFMpegWriter(fps=rate, codec="h264", extra_args=["-pix_fmt", "yuv420p"])
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
        grid = self.figure.add_gridspec(2, 4, height_ratios=(1, 1))
        shown = range(min(SHOWN, len(film.members)))
        titles = ["truth (DNS)", *(f"member {number}" for number in shown)]
        self.images: dict[str, AxesImage] = {}
        for column, title in enumerate(titles):
            signed = self._image(grid[0, column], title, "RdBu_r", -limit, limit)
        self.figure.colorbar(
            signed,
            ax=[image.axes for image in self.images.values()],
            label=f"{film.quantity} [{unit}]" if unit else film.quantity,
            aspect=15,
            pad=0.01,
        )
        spread = self._image(grid[1, 0], "ensemble std", "viridis", 0, widest)
        ranks = self._image(grid[1, 1], "rank of the truth", "PuOr", 0, 1)
        for image in (spread, ranks):
            self.figure.colorbar(image, ax=image.axes, location="bottom", aspect=20, pad=0.02)
        self.axis = self.figure.add_subplot(grid[1, 2:])
        self.heading = self.figure.suptitle("", x=0.01, ha="left", fontsize=10)

    def _image(self, cell, title: str, colours: str, low: float, high: float):
        axis = self.figure.add_subplot(cell)
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
        words = f"{film.title}    lead time {film.lead_times[number]:.2f}"
        self.heading.set_text(words.strip())

    def _spectra(self, number: int) -> None:
        film, axis = self.film, self.axis
        low, high = np.nanquantile(film.spectra[:, number], BAND, axis=0)
        shells = slice(1, None)  # without the mean
        axis.clear()
        axis.set_title("spectrum: truth, and 90 % of the members")
        axis.fill_between(
            film.shells[shells], low[shells], high[shells], color="#0072B2", alpha=0.35, lw=0
        )
        axis.loglog(film.shells[shells], film.truth_spectra[number, shells], color="black")
        everything = film.truth_spectra[:, shells]
        largest = float(everything.max())
        smallest = float(everything[everything > 1e-9 * largest].min())
        axis.set_ylim(0.3 * smallest, 3 * largest)
        axis.set_xlabel("wavenumber |k|")


def ranks_of(truth: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Return the share of members (M, ...) below the truth (...), point by point, 0 to 1."""
    return np.nanmean(members < truth, axis=0)


def sampled(number: int, most: int) -> Sequence[int]:
    """Return at most ``most`` evenly spaced indices below ``number``, the last one included.

    >>> sampled(10, 4)
    [0, 3, 6, 9]
    """
    if number <= most:
        return list(range(number))
    return [int(index) for index in np.linspace(0, number - 1, most).round()]
