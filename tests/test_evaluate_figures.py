"""Figures: files of both kinds, the same bytes again, and no text on other text or cut off."""

import io
import itertools
import math

import pandas
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from matplotlib.text import Text
from test_evaluate_pointwise import normal, stationary

from hpc_closure.evaluate.methods import Moments
from hpc_closure.evaluate.report import drawn, figures
from hpc_closure.evaluate.report.example_state import FieldsOfState, OneState, median
from hpc_closure.evaluate.report.gallery import (
    Album,
    illustrate_closure,
    illustrate_closures,
    illustrate_cost,
    illustrate_coupled,
    illustrate_frontier,
    illustrate_generated,
    illustrate_training,
)
from hpc_closure.evaluate.rows import frame, select
from hpc_closure.evaluate.scores.rank_histogram import fourier_coordinates
from hpc_closure.evaluate.scores.table import Labels
from hpc_closure.evaluate.stages.coupled import score_coupled
from hpc_closure.evaluate.stages.generated import score_generated

LABELS = Labels({"closure": "diffusion", "sensors": "none", "interval": 1})


@pytest.fixture(scope="module")
def generated():
    mean, size = 0.1 * stationary(40, 32, seed=1), 32

    def law(scale):
        def sample(indices, members):
            noise = stationary(members * len(indices), size, seed=int(1e4 * scale))
            return mean[indices] + scale * noise.unflatten(0, (members, len(indices)))

        return sample

    truth = mean + 0.04 * stationary(40, size, seed=2)
    samplers = {
        "model": law(0.039),
        "one-pass ensemble": law(0.05),
        "oracle": law(0.04),
        "physics": lambda indices, members: mean[None, indices],
        "none": lambda indices, members: 0 * truth[None, indices],
    }
    exact = Moments(lambda i: mean[i], 0.04**2, whiten=lambda f: fourier_coordinates(f, 5))
    return score_generated(truth, samplers, LABELS, members=12, law=exact)


@pytest.fixture(scope="module")
def coupled():
    start = stationary(5, 24, seed=3)[:, None]
    truth = start + 0.01 * stationary(20, 24, seed=4).unflatten(0, (5, 4)).cumsum(1)
    noise = stationary(6 * 20, 24, seed=5).unflatten(0, (6, 5, 4)).cumsum(2)
    truth[:, 0], noise[:, :, 0] = start[:, 0], 0
    ensembles = {
        "model": start + 0.011 * noise,
        "oracle": start + 0.01 * noise.flip(0),
        "none": (1 + 0.2 * torch.arange(4.0))[None, None, :, None, None] * start[None],
    }
    costs = {"model": 2.4, "oracle": 0.36, "none": 0.31}
    return score_coupled(truth, ensembles, [0, 5, 10, 20], LABELS, costs=costs)


def one_state(*others, model="model", scale=1.0):
    names = (model, *others)
    return OneState(
        truth=scale * normal(16, 16),
        samples={name: scale * normal(3, 16, 16) for name in names},
        spread={name: scale * normal(16, 16).abs() for name in ("oracle", *names)},
        values={name: scale * normal(400) for name in ("oracle", *names)},
        number="amplitude of cos(2πx/L)",
        state="a held-out state with 50 % for one regime",
    )


def history(phases):
    rows = []
    for phase in phases:
        for step in range(0, 400, 10):
            row = {"step": len(rows) * 10, "phase": phase, "loss": 0.1 + math.exp(-step / 90)}
            if step % 100 == 0:
                row |= {"train_loss": 0.9 * row["loss"], "valid_loss": 1.1 * row["loss"]}
            rows.append(row)
    return rows


UNITS = {"moisture": "1/time", "rain": "(1/time)/time"}


def fields_of_state(sides=2):
    """Closures of two fields, the second a thousand times the first."""
    sizes = torch.tensor([1.0, 1e3], dtype=torch.float64).view(2, *[1] * sides)
    truth, other, one, two, none, spread = sizes * normal(6, 2, *[8] * sides).double()
    tiles = {"truth (DNS)": truth, "DNS, same past": other, "model: sample 1": one}
    tiles |= {"model: sample 2": two, "no generator: sample": none}
    return FieldsOfState(tuple(UNITS), tiles, spread.abs(), "a held-out state")


def drawn_texts(figure):
    """Texts on the page with their boxes in pixels."""
    canvas = FigureCanvasAgg(figure)
    with figures.drawing_style():
        canvas.draw()
    hidden = ticks_out_of_view(figure)
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text not in hidden:
            yield text.get_text(), text.get_window_extent(canvas.get_renderer())


def ticks_out_of_view(figure):
    """Labels that exist but are not drawn: matplotlib keeps ticks beyond the axis."""
    hidden = set()
    for axes in figure.axes:
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            low, high = sorted(limits)
            shown = axis.get_visible() and axes.get_visible()
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not shown or not low <= tick.get_loc() <= high:
                    hidden |= {tick.label1, tick.label2}
    return hidden


def check_layout(figure):
    """No text on another, none outside of the page."""
    texts = list(drawn_texts(figure))
    assert texts
    width, height = figure.bbox.size
    for text, box in texts:
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1, text
    for (first, a), (second, b) in itertools.combinations(texts, 2):
        overlap_x = min(a.x1, b.x1) - max(a.x0, b.x0)
        overlap_y = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert overlap_x < 1 or overlap_y < 1, (first, second)


def all_figures(generated, coupled):
    yield figures.closure(one_state("mean_gp", scale=3e-4))
    yield figures.closure(one_state(scale=200))
    yield figures.closures_of_fields(fields_of_state(), UNITS)
    yield figures.fields(generated.examples, ("model", "oracle"), quantity="G")
    yield figures.fields(coupled.examples, ("model",), quantity="vorticity", unit="1/s")
    yield figures.spectra(generated.spectra, generated.spread_spectra, quantity="G")
    yield figures.spectra(coupled.spectra, coupled.spread_spectra)
    alone = {"model": generated.spread_spectra["model"]}
    yield figures.spectra(generated.spectra, alone)
    yield figures.error_growth(coupled.rows)
    yield figures.frontier(coupled.rows, [5, 10])
    yield figures.rank_histograms(generated.ranks)
    yield figures.loss_curve(history(["mean", "residual"]))
    yield figures.loss_curve(history([""]))
    yield figures.cost(frame([*generated.records, *coupled.records]))
    yield figures.cost(coupled.rows)


def test_no_text_overlaps_or_is_cut_off(generated, coupled):
    for figure in all_figures(generated, coupled):
        check_layout(figure)


def test_the_layout_check_can_fail(coupled):
    figure = figures.error_growth(coupled.rows)
    check_layout(figure)
    figure.axes[0].set_title("a title that runs on and on into the title of its neighbour")
    with pytest.raises(AssertionError):
        check_layout(figure)


def test_axes_are_labelled_with_units(generated, coupled):
    for figure in all_figures(generated, coupled):
        for axes in figure.axes:
            if axes.get_visible() and axes.lines:
                assert axes.get_xlabel()
    growth = figures.error_growth(coupled.rows).axes
    assert growth[0].get_xlabel() == "lead time [s]" and "[1/s]" in growth[1].get_ylabel()


def test_save_writes_all_formats_reproducibly(tmp_path, coupled):
    first = figures.save(figures.error_growth(coupled.rows), tmp_path / "a" / "error")
    second = figures.save(figures.error_growth(coupled.rows), tmp_path / "b" / "error")
    assert [path.name for path in first] == ["error.png", "error.pdf", "error.csv"]
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()
    assert imread(first[0]).shape[1] == 1840
    assert {path.name for path in (tmp_path / "a").iterdir()} == {path.name for path in first}
    plain = figures.save(figures.error_growth(coupled.rows), tmp_path / "c" / "error", ["png"])
    assert [path.name for path in plain] == ["error.png"]


def test_methods_keep_their_style():
    styles = [figures.method_style(name) for name in figures.STYLES]
    assert len({(s["color"], str(s["linestyle"])) for s in styles}) == len(styles)
    names = ["model", "smagorinsky", "leith"]
    further = [figures.method_style(name, names) for name in names[1:]]
    assert further[0]["color"] != further[1]["color"]
    assert figures.method_style("leith", names) == further[1]


def test_field_panels_share_the_scale_of_the_truth(generated):
    figure = figures.fields(generated.examples, ("model",), quantity="G")
    images = [axes.images[0] for axes in figure.axes if axes.images]
    limits = {image.get_clim() for image in images[:3]}
    assert len(limits) == 1 and limits.pop() == pytest.approx(
        [sign * float(generated.examples["truth"].abs().max()) for sign in (-1, 1)]
    )
    # the first index of a field is x, to the right
    assert torch.allclose(torch.as_tensor(images[0].get_array()).T, generated.examples["truth"])


def test_spreads_share_one_scale_from_zero_and_densities_are_of_the_values():
    shown = one_state("mean_gp")
    figure = figures.closure(shown)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    top = max(float(std.max()) for std in shown.spread.values())
    assert [image.get_clim() for image in images[5:]] == [pytest.approx((0, top))] * 3
    assert len({image.get_clim() for image in images[:5]}) == 1
    for image, name in zip(images[5:], ("oracle", "model", "mean_gp"), strict=True):
        assert torch.allclose(torch.as_tensor(image.get_array()).T, shown.spread[name].double())
    axes = next(axes for axes in figure.axes if axes.get_title(loc="left").startswith("density"))
    for patch, name in zip(axes.patches, ("oracle", "model", "mean_gp"), strict=True):
        density, edges, _ = patch.get_data()
        mean = (density * (edges[1:] ** 2 - edges[:-1] ** 2)).sum() / 2
        assert mean == pytest.approx(float(shown.values[name].mean()), abs=0.1)


@pytest.mark.parametrize("sides", [2, 3])
def test_every_field_has_a_row_of_truth_and_samples_with_its_own_scale(tmp_path, sides):
    shown = fields_of_state(sides)
    figure = figures.closures_of_fields(shown, UNITS)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == 2 * 6
    for row, scale in enumerate((1.0, 1e-3)):
        tiles = [*shown.tiles.values(), shown.spread]
        line = images[6 * row : 6 * row + 6]
        for image, tile in zip(line, tiles, strict=True):
            expected = scale * figures.plane(tile[row])
            assert torch.allclose(torch.as_tensor(image.get_array()).T, torch.tensor(expected))
        assert len({image.get_clim() for image in line[:5]}) == 1
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert labels[0].startswith("U of moisture\n[1/time]")
    assert labels[1].startswith("U of rain\n[$10^{3}$ (1/time)/time]")
    picture = illustrate_closures(shown, Album(tmp_path, ["png"]), {"moisture": "", "rain": "x"})
    assert picture.png.name == "closure.png" and "the same resolved past" in picture.caption
    assert ("plane z = 0" in picture.caption) == (sides == 3)


def test_the_state_shown_has_median_power_of_all_fields_alike():
    power = torch.tensor([[4.0, 1.0], [1.0, 2.0], [2.0, 9.0]])  # relative: 1.71, 0.99, 2.3 halves
    closures = power.sqrt()[..., None, None] * torch.tensor([1.0, 1e3])[:, None, None]
    assert median(closures.expand(3, 2, 4, 4)) == 0


def test_diverged_and_missing_values_are_left_out_of_lines():
    start = normal(1, 8, 8)
    ensemble = start + 0.1 * normal(4, 3, 8, 8)
    ensemble[:, 2] = math.inf
    scored = score_coupled(start.expand(3, 8, 8), {"model": ensemble}, [1, 2, 3], LABELS)
    line = figures.error_growth(scored.rows).axes[0].lines[0]
    assert list(line.get_xdata()) == [1, 2]


def test_illustrations_come_captioned(tmp_path, generated, coupled, monkeypatch):
    monkeypatch.setattr(figures, "DPI", 40)
    album, plain = Album(tmp_path), Album(tmp_path / "plain", ["png"])
    pictures = [
        illustrate_closure(one_state("mean_gp"), album),
        *illustrate_generated(generated, album, "diffusion_32", "diffusion, no sensors"),
        *illustrate_coupled(coupled, album, "diffusion_24", "diffusion, no sensors"),
        *illustrate_training(history(["mean"]), album),
        *illustrate_cost(coupled.rows, album, "2 CPU cores"),
        *illustrate_frontier(coupled.rows, album, [10]),
    ]
    assert [picture.section for picture in pictures] == (
        ["generated"] * 4 + ["coupled"] * 3 + ["training", "cost", "cost"]
    )
    for picture in pictures:
        assert all(picture.png.with_suffix(end).exists() for end in (".png", ".pdf", ".csv"))
        assert picture.caption.endswith(".")
    plain.folder.mkdir()
    list(illustrate_training(history(["mean"]), plain))
    assert [path.name for path in plain.folder.iterdir()] == ["loss.png"]
    assert not list(illustrate_training([], album))
    assert not list(illustrate_cost(frame([]), album, ""))
    assert not list(illustrate_frontier(frame([]), album, [10]))


def table(figure):
    """The table of a figure, and the descriptions of its panels."""
    FigureCanvasAgg(figure).draw()
    text = drawn.text(figure)
    return pandas.read_csv(io.StringIO(text), comment="#", dtype={"series": str}), [
        line for line in text.splitlines() if line.startswith("#")
    ]


def test_tables_hold_the_lines_and_bands_that_are_drawn(coupled):
    found, panels = table(figures.error_growth(coupled.rows))
    assert panels[0] == (
        "# panel 1: Relative error of the ensemble mean (band: 95 % interval); x: lead time [s]; "
        "y: ||mean − truth|| / ||truth||"
    )
    rows = select(coupled.rows, stage="coupled", shell=None, score="relative_error_mean")
    wanted = rows[(rows["method"] == "model") & (rows["lead_time"] > 0)]
    ours = found[(found["panel"] == 1) & (found["series"] == "model")]
    line, band = ours[ours["kind"] == "line"], ours[ours["kind"] == "band"]
    assert list(line["x"]) == list(wanted["lead_time"]) == list(band["x"])
    assert list(line["y"]) == pytest.approx(list(wanted["value"]), rel=1e-6)
    assert list(band["y"]) == pytest.approx(list(wanted["low"]), rel=1e-6)
    assert list(band["y_end"]) == pytest.approx(list(wanted["high"]), rel=1e-6)
    assert {"model", "model: spread", "oracle: spread"} <= set(
        found[found["panel"] == 2]["series"]
    )
    assert not found["series"].isna().any()
    found, _ = table(figures.profiles({"truth": normal(32), "model": normal(3, 32)}))
    band = found[found["kind"] == "band"]
    assert set(band["series"]) == {"model: mean and std"} and len(band) == 32


def test_tables_hold_bars_and_fields(generated, coupled):
    found, panels = table(figures.cost(coupled.rows))
    wanted = select(coupled.rows, score="cost_us").set_index("method")["value"]
    bars = found.set_index("series")["x_end"]
    assert len(panels) == 1 and bars.to_dict() == pytest.approx(wanted.to_dict(), rel=1e-6)
    found, _ = table(figures.rank_histograms({"model": generated.ranks["model"]}))
    assert ((found["x_end"] - found["x"]) * found["y"]).sum() == pytest.approx(1, rel=1e-5)
    shown = one_state()
    found, panels = table(figures.closure(shown))
    assert panels[0].startswith("# panel 1: truth (DNS); x: x / L; y: y / L")
    truth = found[(found["panel"] == 1)].pivot(index="x", columns="y", values="value")
    assert torch.allclose(torch.tensor(truth.to_numpy()), shown.truth.double(), rtol=1e-5)
    assert truth.index[1] == truth.columns[1] == 1 / 16
    densities = found[found["kind"] == "bar"].groupby("series")
    for _, density in densities:
        mass = ((density["x_end"] - density["x"]) * density["y"]).sum()
        assert mass == pytest.approx(1, rel=1e-5)
    assert set(densities.groups) == {"exact law", "model"}


def test_a_table_has_no_reference_lines_and_few_points_of_a_large_field(generated):
    found, _ = table(figures.spectra(generated.spectra, generated.spread_spectra))
    assert set(found["series"]) <= {"truth", *generated.spectra} and not found["x"].isna().any()
    size = drawn.SIDE + 20
    examples = {"truth": normal(size, size), "model": normal(3, size, size)}
    found, panels = table(figures.fields(examples))
    assert len(found) == 4 * (size // 2) ** 2 and len(panels) == 4
    assert panels[0].endswith("; one point in 2 per side")
