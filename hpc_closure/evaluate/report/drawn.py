"""Write what a figure shows as a table, so that it can be drawn again elsewhere.

The table is read from the finished figure: nothing but what is drawn is in it, in the units of its
axes. A comment line describes each panel; ``pandas.read_csv(path, comment="#")`` reads the rest::

    # panel 1: Power of U; x: wavenumber shell |k| L / 2π; y: mean square per shell [s$^{-4}$]
    panel,kind,series,x,x_end,y,y_end,value
    1,line,truth,1,,0.0417,,

    line   a point of a line (x, y)
    band   low and high end at x (y, y_end)
    bar    a bar from x to x_end of height y; a horizontal one has its name in ``series``
    image  a point of a field (x, y, value); at most SIDE per side, every n-th
"""

import csv
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

COLUMNS = ("panel", "kind", "series", "x", "x_end", "y", "y_end", "value")
SIDE = 128  # points of an image per side; a panel has few more pixels
Row = dict[str, Any]


def text(figure: Figure) -> str:
    """Return the table of a figure as CSV with comment lines.

    Args:
        figure: a figure that has been drawn or saved, so that its labels are placed.
    """
    stream = io.StringIO()
    panels: list[Any] = [axis for axis in figure.axes if axis.get_visible() and not is_bar(axis)]
    for number, axis in enumerate(panels, 1):
        words = [axis.get_title(loc="left"), f"x: {axis.get_xlabel()}", f"y: {axis.get_ylabel()}"]
        thinned = [every for image in axis.images if (every := _every(image)) > 1]
        words += [f"one point in {thinned[0]} per side"] if thinned else []
        line = "; ".join(" ".join(word.split()) for word in words)
        stream.write(f"# panel {number}: {line}\n")
    writer = csv.DictWriter(stream, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for number, axis in enumerate(panels, 1):
        for row in rows(axis):
            writer.writerow({"panel": number} | {key: _text(value) for key, value in row.items()})
    return stream.getvalue()


def is_bar(axis: Any) -> bool:
    """Return whether a panel is the colour bar of another one."""
    return hasattr(axis, "_colorbar")


def rows(axis: Any) -> Iterator[Row]:
    """Yield the rows of a panel; lines and areas without data (references, shades) have none."""
    for line in axis.lines:
        if line.get_transform() != axis.transData:  # a reference line over the whole panel
            continue
        series = _label(line)
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
            yield {"kind": "line", "series": series, "x": x, "y": y}
    for band in axis.collections:
        series = _label(band)
        for path in band.get_paths():
            for x in np.unique(path.vertices[:, 0]):
                ends = path.vertices[path.vertices[:, 0] == x, 1]
                low, high = ends.min(), ends.max()
                yield {"kind": "band", "series": series, "x": x, "y": low, "y_end": high}
    for bars in axis.containers:
        if isinstance(bars, BarContainer):
            yield from _bars(axis, bars)
    for patch in axis.patches:
        if isinstance(patch, StepPatch):
            values, edges, _ = patch.get_data()
            for height, start, end in zip(values, edges, edges[1:]):
                bar = {"x": start, "x_end": end, "y": height}
                yield {"kind": "bar", "series": _label(patch), **bar}
    for image in axis.images:
        yield from _points(image)


def _bars(axis: Any, bars: BarContainer) -> Iterator[Row]:
    """Yield a row for each bar; horizontal ones are named by the ticks."""
    if bars.orientation == "horizontal":
        names = axis.yaxis.get_major_formatter().format_ticks(axis.get_yticks())
        for name, bar in zip(names, bars.patches, strict=True):
            yield {"kind": "bar", "series": name, "x": 0, "x_end": bar.get_width()}
        return
    for bar in bars.patches:
        x, width = bar.get_x(), bar.get_width()
        yield {"kind": "bar", "x": x, "x_end": x + width, "y": bar.get_height()}


def _every(image: Any) -> int:
    """Return n if every n-th point of an image is written."""
    return -(-max(np.shape(image.get_array())) // SIDE)


def _points(image: Any) -> Iterator[Row]:
    """Yield the points of an image (rows y, columns x), at their coordinates."""
    array = np.asarray(image.get_array(), dtype=float)
    left, right, low, high = image.get_extent()
    every, (height, width) = _every(image), array.shape
    for row in range(0, height, every):
        y = low + (high - low) * row / height
        for column in range(0, width, every):
            x = left + (right - left) * column / width
            yield {"kind": "image", "x": x, "y": y, "value": array[row, column]}


def _label(artist: Any) -> str:
    """Return the name of an artist that the legend leaves out (gid), or its label, or ""."""
    label = str(artist.get_gid() or artist.get_label())
    return "" if label.startswith("_") else label


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{float(value):.7g}"
