"""Draw the figures of the report, one function each; every figure is written as PNG, PDF and CSV.

A method has the same colour, line style and marker in all figures. The colours are those of Okabe
and Ito, which colour-blind readers can distinguish; the truth is black. The functions take
numbers, not files, and return the figure.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from pandas import DataFrame, Series
from torch import Tensor

from hpc_closure.evaluate.report import drawn
from hpc_closure.evaluate.report.example_state import FieldsOfState, OneState
from hpc_closure.evaluate.rows import RUNG, format_value, select, sort_methods
from hpc_closure.evaluate.scores.coupled.late import late_leads
from hpc_closure.evaluate.scores.rank_histogram import merge, rank_p
from hpc_closure.experiment.method_names import GRANTED
from hpc_closure.work.atomic import publish, write_text

# method -> colour, line style, marker
STYLES = {
    "truth": ("#000000", "-", ""),
    "model": ("#0072B2", "-", "o"),
    GRANTED: ("#0072B2", "--", "o"),
    "mean_gp": ("#8C6BB1", ":", "d"),
    "oracle": ("#E69F00", "--", "s"),
    "oracle_x0.95": ("#D55E00", ":", "v"),
    "physics": ("#009E73", "-.", "D"),
    "fourier": ("#56B4E9", "--", "P"),
    "climatology": ("#CC79A7", "-.", "X"),
    "none": ("#777777", ":", "^"),
}
IN_WORDS = {"oracle": "exact law", "mean_gp": "no generator"}
DPI = 200
UNSTEADY = {"png": "Software", "pdf": "CreationDate"}  # metadata that would change the bytes
FURTHER = ("#D55E00", "#A6761D", "#4D4D4D", "#117A8B", "#882255")
# the numbers of markers and colours are coprime, so that a pair is reused only after all others
MARKERS = "<>h*pHd"
# shade of lead times at which scores no longer discriminate; the edge shows it in the legend
LATE = {"facecolor": "#f5f1e4", "edgecolor": "#b5a97f", "linewidth": 0.6}
COHERENT = 0.1  # coherence below which no phase is drawn
MARKED = 12  # number of markers on a line of many times
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,
    "svg.hashsalt": "hpc_closure",
}


def drawing_style():
    """Return a context in which matplotlib draws in the style of the report."""
    return matplotlib.rc_context(STYLE)


def save(
    figure: Figure, stem: str | Path, formats: Sequence[str] = ("png", "pdf", "csv")
) -> tuple[Path, ...]:
    """Write ``stem.png`` and the other formats; equal figures have equal bytes.

    The format ``csv`` is a table, see :mod:`~hpc_closure.evaluate.report.drawn`.

    Returns the paths, the PNG first.
    """
    paths = []
    for kind in ("png", *(other for other in formats if other != "png")):
        path = Path(f"{stem}.{kind}")
        paths.append(path)
        if kind == "csv":
            write_text(path, drawn.text(figure))
            continue
        with publish(path) as part, drawing_style():
            figure.savefig(part, format=kind, dpi=DPI, metadata={UNSTEADY[kind]: None})
        figure.set_layout_engine("none")  # the layout is half the cost: compute it once
    return tuple(paths)


def method_style(method: str, others: Iterable[str] = ()) -> dict[str, Any]:
    """Return line properties of a method; a method not in STYLES gets a style by its position."""
    if method in STYLES:
        colour, line, marker = STYLES[method]
    else:
        unnamed = [name for name in dict.fromkeys([*others, method]) if name not in STYLES]
        index = unnamed.index(method)
        colour, line, marker = FURTHER[index % len(FURTHER)], "-", MARKERS[index % len(MARKERS)]
    return {"color": colour, "linestyle": line, "marker": marker, "label": method}


def fields(
    examples: Mapping[str, Tensor],
    methods: Sequence[str] = ("model",),
    *,
    quantity: str = "U",
    unit: str = r"s$^{-2}$",
) -> Figure:
    """Draw truth, one member, ensemble mean and standard deviation, one row per method.

    Of fields of three sides the plane z = 0 is drawn.

    Args:
        examples: ``truth`` -> (n, n); method -> (3, n, n), see ``Scored.examples``.
        methods: rows of the figure.
        quantity: symbol or name of the field.
        unit: its unit.
    """
    methods = [method for method in methods if method in examples]
    truth = plane(examples["truth"])
    panels = {method: np.stack([plane(one) for one in examples[method]]) for method in methods}
    stds = np.stack([std for _, _, std in panels.values()])
    largest, widest = np.abs(truth).max(), stds[np.isfinite(stds)].max(initial=0.0)
    scale, signed_unit = scaled(largest, unit)
    spread_scale, spread_unit = scaled(widest, unit)
    limit, top = largest * scale or 1.0, widest * spread_scale or 1.0
    with drawing_style():
        figure = Figure(figsize=(9.2, 0.85 + 2.3 * len(methods)), layout="compressed")
        axes = figure.subplots(len(methods), 4, squeeze=False, sharex=True, sharey=True)
        for line, (method, (member, mean, std)) in zip(axes, panels.items(), strict=True):
            images = {
                "truth (DNS)": truth,
                f"{method}: one sample": member,
                f"{method}: ensemble mean": mean,
                f"{method}: ensemble std": std,
            }
            titles = [
                title if np.isfinite(image).all() else f"{title} (diverged)"
                for title, image in images.items()
            ]
            for axis, image, title in zip(line, (truth, member, mean), titles, strict=False):
                signed = _image(axis, image * scale, title, "RdBu_r", -limit, limit)
            spread = _image(line[3], std * spread_scale, titles[3], "viridis", 0, top)
            line[0].set_ylabel("y / L")
        for axis in axes[-1]:
            axis.set_xlabel("x / L")
        for image, part, label, aspect in (
            (signed, axes[:, :3], f"{quantity} [{signed_unit}]", 60),
            (spread, axes[:, 3], f"std of {quantity} [{spread_unit}]", 20),
        ):
            bar = figure.colorbar(image, ax=part, label=label, location="bottom", aspect=aspect)
            bar.outline.set_linewidth(0.6)
            bar.locator = MaxNLocator(7 if aspect == 60 else 4)
    return figure


def plane(field: Tensor) -> np.ndarray:
    """Return a field (n, n), or the plane z = 0 of (n, n, n), as an array."""
    values = np.asarray(field, dtype=float)
    return values[..., 0] if values.ndim == 3 else values


def profiles(
    examples: Mapping[str, Tensor], methods: Sequence[str] = ("model",), *, quantity: str = "U"
) -> Figure:
    """Draw :func:`fields` of a 1-D problem: truth, one member, and a band of mean and std.

    Args:
        examples: ``truth`` -> (n,); method -> (3, n).
        methods: rows of the figure.
        quantity: symbol or name of the field.
    """
    methods = [method for method in methods if method in examples]
    truth = np.asarray(examples["truth"], dtype=float)
    x = np.arange(len(truth)) / len(truth)
    with drawing_style():
        figure = Figure(figsize=(7.2, 0.8 + 2.0 * len(methods)), layout="constrained")
        axes = figure.subplots(len(methods), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
        for axis, method in zip(axes, methods, strict=True):
            member, mean, std = np.asarray(examples[method], dtype=float)
            style = method_style(method) | {"marker": "", "label": f"{method}: mean and std"}
            axis.plot(x, truth, color="black", label="truth (DNS)")
            axis.plot(x, member, color="#777777", linewidth=0.8, label="one sample")
            axis.plot(x, mean, **style)
            band = {"color": style["color"], "alpha": 0.25, "gid": style["label"]}
            axis.fill_between(x, mean - std, mean + std, **band)
            axis.set_ylabel(quantity)
            axis.legend(loc="upper right", ncols=3)
        axes[-1].set_xlabel("x / L")
    return figure


def scaled(largest: float, unit: str) -> tuple[float, str]:
    """Return a factor and a unit with which the axis has numbers between 0.1 and 1000."""
    if largest == 0 or 0.1 <= largest < 1000:
        return 1.0, unit
    exponent = int(np.floor(np.log10(largest)))
    return 10.0**-exponent, rf"$10^{{{exponent}}}$ {unit}"


def _image(axis, values, title, colours, low, high):
    axis.grid(False)
    axis.set_title(title)
    axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axis.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    # the first index is x: transposed, x runs to the right and y upwards
    return axis.imshow(
        values.T,
        origin="lower",
        extent=(0, 1, 0, 1),
        cmap=colours,
        vmin=low,
        vmax=high,
        interpolation="nearest",
    )


def closure(shown: OneState, *, quantity: str = "U", unit: str = r"s$^{-2}$") -> Figure:
    """Draw truth and samples above, and below the spread and the density of one scalar.

    Args:
        shown: closures sampled for one state.
        quantity: symbol or name of the field.
        unit: its unit.
    """
    model, *others = shown.samples
    tiles = [("truth (DNS)", shown.truth)]
    tiles += [(f"{model}: sample {i + 1}", one) for i, one in enumerate(shown.samples[model])]
    tiles += [(f"{IN_WORDS[name]}: sample", shown.samples[name][0]) for name in others]
    spreads = {name: shown.spread[name] for name in ("oracle", model, *others)}
    scale, signed_unit = scaled(max(float(tile.abs().max()) for _, tile in tiles), unit)
    limit = scale * max(float(tile.abs().max()) for _, tile in tiles) or 1.0
    widest = max(float(std.max()) for std in spreads.values())
    spread_scale, spread_unit = scaled(widest, unit)
    # in inches from the lower left corner, so that the panels of both rows are aligned
    width, height, side, step, left, low, high = 9.2, 4.5, 1.48, 1.6, 0.5, 0.46, 2.68
    with drawing_style():
        figure = Figure(figsize=(width, height))

        def place(x: float, y: float, wide: float, tall: float = side):
            return figure.add_axes((x / width, y / height, wide / width, tall / height))

        def bar(image, column: int, y: float, label: str) -> None:
            axis = place(left + column * step - 0.02, y, 0.09)
            drawn = figure.colorbar(image, cax=axis, label=label)
            drawn.outline.set_linewidth(0.6)
            drawn.locator = MaxNLocator(5)

        for column, (title, tile) in enumerate(tiles):
            axis = place(left + column * step, high, side)
            field = (scale * tile).numpy()
            signed = _image(axis, field, title, "RdBu_r", -limit, limit)
            _corner(axis, column)
        bar(signed, len(tiles), high, f"{quantity} [{signed_unit}]")
        for column, (name, std) in enumerate(spreads.items()):
            axis = place(left + column * step, low, side)
            title = f"{IN_WORDS.get(name, name)}: spread"
            top = widest * spread_scale or 1.0
            image = _image(axis, (spread_scale * std).numpy(), title, "viridis", 0, top)
            _corner(axis, column)
        bar(image, len(spreads), low, f"std of {quantity} [{spread_unit}]")
        right = left + len(spreads) * step + 0.8
        _values(place(right, low, width - 0.12 - right), shown, quantity, unit)
    return figure


def closures_of_fields(shown: FieldsOfState, units: Mapping[str, str]) -> Figure:
    """Draw truth, samples and the model's spread of several fields, one row per field.

    Each row has its own scale. Of fields of three sides the plane z = 0 is drawn.

    Args:
        shown: closures sampled for one state.
        units: name of a field -> unit of its closure.
    """
    rows, columns = len(shown.names), len(shown.tiles) + 1
    with drawing_style():
        figure = Figure(figsize=(1.7 + 1.5 * columns, 0.6 + 1.55 * rows), layout="compressed")
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for row, (line, name) in enumerate(zip(axes, shown.names, strict=True)):
            panels = [plane(tile[row]) for tile in shown.tiles.values()]
            std = plane(shown.spread[row])
            finite = [np.abs(panel[np.isfinite(panel)]).max(initial=0.0) for panel in panels]
            scale, unit = scaled(max(finite), units[name])
            limit, top = scale * max(finite) or 1.0, scale * float(std.max()) or 1.0
            for axis, panel, title in zip(line, panels, shown.tiles, strict=False):
                signed = _image(axis, scale * panel, title, "RdBu_r", -limit, limit)
            spread = _image(line[-1], scale * std, "spread", "viridis", 0, top)
            line[0].set_ylabel(f"U of {name}\n[{unit}]\ny / L")
            for image, axis in ((signed, line[-2]), (spread, line[-1])):
                bar = figure.colorbar(image, ax=axis, location="right", aspect=14)
                bar.outline.set_linewidth(0.6)
                bar.locator = MaxNLocator(4)
            if row:
                for axis in line:
                    axis.set_title("")
        for axis in axes[-1]:
            axis.set_xlabel("x / L")
    return figure


def _corner(axis, column: int) -> None:
    """Label the axes; y only in the first panel of a row."""
    axis.set_xlabel("x / L", labelpad=1)
    if column:
        axis.set_yticklabels([])
    else:
        axis.set_ylabel("y / L", labelpad=1)


def _values(axis, shown: OneState, quantity: str, unit: str) -> None:
    """Draw the density over samples of one scalar per sample, one line per method."""
    together = np.concatenate([np.asarray(values) for values in shown.values.values()])
    scale, unit = scaled(float(np.abs(together).max()), unit)
    draws = min(len(values) for values in shown.values.values())
    edges = np.linspace(scale * together.min(), scale * together.max(), 3 + round(draws**0.5))
    for name in ("oracle", *shown.samples):
        style = method_style(name)
        style = {"color": style["color"], "linestyle": style["linestyle"], "linewidth": 1.8}
        label, filled = IN_WORDS.get(name, name), name == "oracle"
        if filled:
            style |= {"alpha": 0.45, "linewidth": 0}
        density, _ = np.histogram(scale * np.asarray(shown.values[name]), edges, density=True)
        axis.stairs(density, edges, fill=filled, label=label, **style)
    axis.set(yticks=[], title=f"density of {draws:,} samples each")
    axis.set_xlabel(f"{shown.number} in {quantity} [{unit}]", labelpad=1)
    axis.set_ylim(0, 1.28 * axis.get_ylim()[1])
    axis.legend(
        loc="upper center", ncols=3, columnspacing=1, handlelength=1.4, borderpad=0, fontsize=8
    )


def spectra(
    power: Mapping[str, Tensor],
    spread: Mapping[str, Tensor],
    *,
    quantity: str = "U",
    unit: str = r"s$^{-4}$",
) -> Figure:
    """Draw power per wavenumber shell, and spread per shell over that of the oracle.

    Args:
        power: ``truth`` and methods -> mean square of one member (shells,).
        spread: ensemble methods -> variance over members (shells,). Without ``oracle`` the
            variances themselves are drawn.
        quantity: symbol or name of the field.
        unit: unit of the squared field.
    """
    # "none" has no power; the controls of the oracle have its power
    shown = [m for m in power if float(power[m].sum()) > 0 and not m.startswith("oracle_")]
    with drawing_style():
        figure = Figure(figsize=(9.2, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        names = ["truth", *sort_methods(set(shown) - {"truth"})]
        _shell_lines(left, {name: power[name] for name in names})
        left.set(title=f"Power of {quantity}", ylabel=f"mean square per shell [{unit}]")
        if "oracle" in spread:
            _spread_ratios(right, spread)
        else:
            _shell_lines(right, {name: spread[name] for name in sort_methods(spread)})
            right.set(title="Variance over members", ylabel=f"variance per shell [{unit}]")
        for axis in (left, right):
            axis.set_xlabel("wavenumber shell |k| L / 2π")
            if axis.get_legend_handles_labels()[0]:
                axis.legend()
    return figure


def rates(
    lines: Mapping[str, Mapping[str, Tensor]], *, title: str, shown: Sequence[str]
) -> Figure:
    """Draw signed rates per wavenumber shell (fluxes, budgets), one panel per quantity.

    Args:
        lines: quantity -> {method or ``truth``: (shells,)}.
        title: title of a panel, with ``{}`` for the quantity.
        shown: methods to draw; those without a line are skipped.
    """
    units = {"energy": "length²/time³", "enstrophy": "1/time³"}
    with drawing_style():
        figure = Figure(figsize=(4.6 * len(lines), 3.4), layout="constrained")
        for axis, (quantity, curves) in zip(
            np.atleast_1d(figure.subplots(1, len(lines))), lines.items(), strict=True
        ):
            names = [name for name in ("truth", *shown) if name in curves]
            axis.axhline(0, color="black", linewidth=0.8)
            for name in names:
                values = np.trim_zeros(np.asarray(curves[name], dtype=float), "b")
                style = method_style(name, names)
                style["linewidth"] = 4 if name == "truth" else 1.4
                axis.plot(np.arange(1, len(values)), values[1:], **style)
            axis.set(title=title.format(quantity), ylabel=f"per unit time [{units[quantity]}]")
            axis.set_xlabel("wavenumber shell |k| L / 2π")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.legend()
    return figure


def coherences(lines: Mapping[str, Mapping[str, Tensor]], *, shown: Sequence[str]) -> Figure:
    """Draw coherence above and phase below per wavenumber shell, one column per pair of fields.

    The phase is drawn where the coherence exceeds ``COHERENT``; elsewhere it is noise. Its axis is
    centred on the mean phase of the truth, and lines that leave it at one end are interrupted.

    Args:
        lines: pair -> {method or ``truth``: complex coherence (shells,)}.
        shown: methods to draw beside the truth; those without a line are skipped.
    """
    with drawing_style():
        size = (max(3.4 * len(lines), 4.6) + 1.4, 4.6)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(2, len(lines), squeeze=False, sharex=True)
        for (above, below), (pair, curves) in zip(axes.T, lines.items(), strict=True):
            names = [name for name in ("truth", *shown) if name in curves]
            first = np.asarray(curves[names[0]])
            mean = np.angle(first[np.abs(first) > COHERENT].sum(), deg=True)
            middle = 90 * round(float(mean) / 90)
            middle = 180 if middle == -180 else middle  # the same, in the usual words
            for name in names:
                values = np.asarray(curves[name])[1:]
                shells, size_of = np.arange(1, len(values) + 1), np.abs(values)
                live = np.flatnonzero(size_of)  # no mode has power beyond the last
                last = live[-1] + 1 if len(live) else 0
                style = method_style(name, names)
                style["linewidth"] = 4 if name == "truth" else 1.4
                above.plot(shells[:last], size_of[:last], **style)
                turned = np.angle(values * np.exp(-1j * np.radians(middle)), deg=True) + middle
                phase = np.where(size_of > COHERENT, turned, np.nan)
                jumps = 1 + np.flatnonzero(np.abs(np.diff(phase[:last])) > 180)
                places, phase = (
                    np.insert(part[:last].astype(float), jumps, np.nan) for part in (shells, phase)
                )
                below.plot(places, phase, **style)
            above.set(title=pair.replace("-", " and "), ylim=(0, 1.02))
            below.set(ylim=(middle - 185, middle + 185))
            below.set_yticks([middle + turn for turn in (-180, -90, 0, 90, 180)])
            below.set_xlabel("wavenumber shell |k| L / 2π")
            below.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0, 0].set_ylabel("coherence")
        axes[1, 0].set_ylabel("phase [degrees]")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center")
    return figure


def _shell_lines(axis, lines: Mapping[str, Tensor]) -> None:
    """Draw spectra on logarithmic axes over ten decades; markers of lines are staggered."""
    floor = 1e-10 * max((float(part.sum()) for part in lines.values()), default=0.0)
    axis.set(xscale="log", yscale="log")
    for index, (method, part) in enumerate(lines.items()):
        values = np.asarray(part, dtype=float)
        shells = np.arange(len(values))
        keep = (values > floor) & (shells > 0)
        style = method_style(method, lines)
        style["linewidth"] = 4 if method == "truth" else 1.4  # the truth shows beneath the others
        axis.plot(shells[keep], values[keep], markevery=(index % 3, 3), **style)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def _spread_ratios(axis, spread: Mapping[str, Tensor]) -> None:
    """Draw spread per shell over the oracle's, in shells where that exceeds round-off."""
    base = np.asarray(spread["oracle"], dtype=float)
    shells = np.flatnonzero(base > 1e-6 * base.sum())
    axis.axhspan(0.95, 1.05, color="#e8e8e8", zorder=0)
    axis.axhline(1, color="black", linewidth=0.8)
    limits = [0.88, 1.12]
    for method in sort_methods(set(spread) - {"oracle", "climatology"}):
        ratio = np.sqrt(np.asarray(spread[method], dtype=float)[shells] / base[shells])
        axis.plot(shells, ratio, **method_style(method, spread))
        limits += [ratio.min() - 0.03, ratio.max() + 0.03]
    axis.set_ylim(max(0, min(limits)), min(2, max(limits)))
    axis.set(title="Spread over that of the oracle (band: ±5 %)", ylabel="spread ratio")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def error_growth(rows: DataFrame, quantity: str = "vorticity [1/s]") -> Figure:
    """Draw the error of the ensemble mean and the spread against lead time.

    Late lead times (:mod:`~hpc_closure.evaluate.scores.coupled.late`) are shaded.

    Args:
        rows: rows of the coupled stage of one closure, grid, sensor layout and channel.
        quantity: name and unit of the state.
    """
    total = select(rows, stage="coupled", shell=None)
    names = sort_methods(total["method"])
    with drawing_style():
        figure = Figure(figsize=(9.2, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for method in names:
            style = method_style(method, names)
            error = _series(select(total, method=method, score="relative_error_mean"))
            style["markevery"] = max(1, len(error) // MARKED)
            left.plot(error[:, 0], error[:, 1], **style)
            low, high = error[:, 2], error[:, 3]
            if np.isfinite(low).any():
                band = {"color": style["color"], "alpha": 0.18, "lw": 0, "gid": method}
                left.fill_between(error[:, 0], low, high, **band)
            skill = _series(select(total, method=method, score="rmse_mean"))
            right.plot(skill[:, 0], skill[:, 1], **style)
            spread = _series(select(total, method=method, score="spread"))
            dashed = {**style, "linestyle": (0, (2, 2)), "marker": "", "label": None}
            dashed["gid"] = f"{method}: spread"
            right.plot(spread[:, 0], spread[:, 1], **dashed)
        left.set(title="Relative error of the ensemble mean (band: 95 % interval)")
        left.set(ylabel="||mean − truth|| / ||truth||", xlabel="lead time [s]", yscale="log")
        right.set(title="Error of the mean (solid) and spread (dashed)")
        right.set(xlabel="lead time [s]", ylabel=f"rms {quantity}", yscale="log")
        for axis in (left, right):
            _mark_late(axis, late_leads(total))
            axis.yaxis.set_major_locator(LogLocator(numticks=8))
            if axis.get_legend_handles_labels()[0]:
                axis.legend()
    return figure


def _mark_late(axis, late: Sequence[float]) -> None:
    """Shade the axis from the first late lead time on."""
    if late:
        end = axis.get_xlim()[1]
        axis.axvspan(late[0], end, zorder=0, label="late", **LATE)
        axis.set_xlim(right=end)


def _series(rows: DataFrame) -> np.ndarray:
    """Return lead time, value, low and high, (times, 4), of the finite positive values."""
    drawn = (rows["lead_time"] > 0) & (rows["value"] > 0) & np.isfinite(rows["value"])
    lines = rows[drawn].sort_values("lead_time")
    return lines[["lead_time", "value", "low", "high"]].to_numpy()


def rank_histograms(counts: Mapping[str, Tensor]) -> Figure:
    """Draw rank histograms; the band holds 95 % of the bars of a calibrated ensemble.

    Args:
        counts: ensemble method -> histogram (M + 1,), see ``Scored.ranks``.
    """
    names = sort_methods(counts)
    with drawing_style():
        columns = min(4, len(names))
        lines = -(-len(names) // columns)
        figure = Figure(figsize=(2.3 * columns, 0.2 + 2.3 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
        for axis, method in zip(axes, names, strict=False):
            merged, widths = (part.double().numpy() for part in merge(counts[method]))
            edges = np.concatenate(([0], widths.cumsum())) / widths.sum()
            density = merged / (counts[method].sum().item() * np.diff(edges))
            share = 1 / len(merged)
            deviation = 1.96 * np.sqrt((1 - share) / (share * float(counts[method].sum())))
            axis.axhspan(1 - deviation, 1 + deviation, color="#e0e0e0", zorder=0)
            axis.axhline(1, color="black", linewidth=0.8, zorder=3)
            colour = method_style(method, names)["color"]
            axis.bar(
                edges[:-1],
                density,
                np.diff(edges),
                align="edge",
                color=colour,
                alpha=0.75,
                edgecolor="white",
                linewidth=0.5,
            )
            p = format_value("rank_p", rank_p(counts[method]))
            axis.set_title(f"{method}\np {p if p.startswith('<') else '= ' + p}")
            axis.set(xlim=(0, 1), xticks=[0, 0.5, 1], xlabel="rank of the truth / members")
        for axis in axes[len(names) :]:
            axis.set_visible(False)
        for axis in axes[::columns]:
            axis.set_ylabel("relative frequency")
    return figure


def loss_curve(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw training and held-out loss against step, one panel per training phase.

    Args:
        history: rows of ``train/metrics.csv`` with ``step``, ``loss``, ``phase`` and, at
            validations, ``train_loss`` and ``valid_loss``. Losses of phases are not comparable.
    """
    phases = list(dict.fromkeys(row.get("phase", "") for row in history)) or [""]
    with drawing_style():
        width = max(4.6, min(9.2, 4.6 * len(phases)))
        figure = Figure(figsize=(width, 3.2), layout="constrained")
        axes = figure.subplots(1, len(phases), squeeze=False)[0]
        for axis, phase in zip(axes, phases, strict=True):
            rows = [row for row in history if row.get("phase", "") == phase]
            for name, colour, label, marker in (
                ("loss", "#9ecae1", "batch", ""),
                ("train_loss", "#0072B2", "training members", "o"),
                ("valid_loss", "#D55E00", "held-out members", "s"),
            ):
                points = [(row["step"], row[name]) for row in rows if name in row]
                if points:
                    x, y = np.array(points, dtype=float).T
                    axis.plot(
                        x,
                        y,
                        color=colour,
                        label=label,
                        marker=marker,
                        linewidth=1.0 if name == "loss" else 1.6,
                    )
            positive = all(row[n] > 0 for row in rows for n in row if n.endswith("loss"))
            if positive:
                _log_axis(axis)
            axis.set(title=f"Training: {phase}" if phase else "Training", xlabel="step")
            axis.legend()
        axes[0].set_ylabel("loss")
    return figure


def _log_axis(axis) -> None:
    """Set a logarithmic ordinate with plain numbers, with minor labels within one decade."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_formatter("{x:g}")
    narrow = high / low < 10
    axis.yaxis.set_minor_formatter("{x:g}" if narrow else NullFormatter())
    if narrow:
        axis.yaxis.set_minor_locator(LogLocator(subs=(1, 2, 3, 4, 5, 6, 7, 8)))


def cost(rows: DataFrame) -> Figure:
    """Draw the cost of a closure sample and of a coupled member and time unit, as bars.

    Args:
        rows: score rows; those with the scores ``cost_ms`` and ``cost_us`` are drawn.
    """
    costs = []
    for stage, score, title, unit in (
        ("generated", "cost_ms", "one closure sample", "ms"),
        ("coupled", "cost_us", "one member, one time unit", "us"),
    ):
        measured = select(rows, stage=stage, score=score)
        if len(measured):
            bars = dict(zip(measured["method"], measured["value"], strict=True))
            costs.append((title, unit, bars))
    with drawing_style():
        size = (4.6 * len(costs), 1.1 + 0.3 * max(len(bars) for *_, bars in costs))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(costs), squeeze=False)[0]
        for axis, (title, unit, values) in zip(axes, costs, strict=True):
            names = sort_methods(values)[::-1]
            widths = [values[name] for name in names]
            colours = [method_style(name, names)["color"] for name in names]
            bars = axis.barh(names, widths, color=colours, height=0.62)
            labels = [format_value("cost_ms", value) for value in widths]
            axis.bar_label(bars, labels, padding=3, fontsize=8.5)
            axis.set(title=title, xlabel=f"wall time [{unit}]", xscale="log")
            axis.set_xlim(min(widths) / 2, max(widths) * 6)
            axis.grid(axis="y", visible=False)
    return figure


def frontier(rows: DataFrame, lead_times: Sequence[float]) -> Figure:
    """Draw CRPS against cost in units of the bare solver, one panel per lead time.

    Each method is a point. One line joins the closures, another the bare solvers, for which no
    cheaper one of the same kind has a smaller CRPS (Pareto front).

    Args:
        rows: score rows; those of the coupled run with ``crps`` and ``cost_ratio`` are drawn.
        lead_times: scored lead times to draw.
    """
    coupled = select(rows, stage="coupled", shell=None)
    cost = select(coupled, score="cost_ratio").set_index("method")["value"]
    with drawing_style():
        figure = Figure(figsize=(2.9 * len(lead_times) + 2.2, 3.2), layout="constrained")
        axes = figure.subplots(1, len(lead_times), squeeze=False)[0]
        for axis, lead_time in zip(axes, lead_times, strict=True):
            skill = select(coupled, score="crps", lead_time=lead_time)
            _cost_and_skill(axis, cost, skill.set_index("method")["value"])
            axis.set_title(f"lead time {lead_time:g}")
        axes[0].set_ylabel("CRPS")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=7.5, loc="outside right center")
    return figure


def _cost_and_skill(axis, cost: Series, skill: Series) -> None:
    """Draw one panel of :func:`frontier`; ``cost`` and ``skill`` are indexed by method."""
    points = {name: (cost[name], skill[name]) for name in cost.index if name in skill.index}
    points = {name: place for name, place in points.items() if np.isfinite(place).all()}
    names = sort_methods(points)
    bare = [name for name in names if name == "none" or name.startswith(RUNG)]
    closures = [name for name in names if name not in (*bare, "oracle")]
    for group, line in ((bare, "-"), (closures, "--")):
        front, best = [], np.inf
        for place in sorted(points[name] for name in group):
            if place[1] < best:
                front.append(place)
                best = place[1]
        if front:
            axis.plot(*np.transpose(front), color="#bbbbbb", linestyle=line, zorder=1, gid="front")
    for name in names:
        style = {**method_style(name, names), "linestyle": "none"}
        axis.plot(*points[name], **{**style, "marker": style["marker"] or "o"}, zorder=2)
    if "oracle" in skill.index and np.isfinite(skill["oracle"]):
        axis.axhline(skill["oracle"], color=STYLES["oracle"][0], linestyle="--", linewidth=1)
    _log_axis(axis)
    axis.set(xscale="log", xlabel="cost of a member [bare solvers]")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
