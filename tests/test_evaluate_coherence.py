"""Coherence and phase of pairs of fields: those of a known law, and distances that see them."""

import math

import pytest
import torch
from pandas import isna
from test_evaluate_channels import LABELS, pairs
from test_evaluate_pointwise import normal

from hpc_closure.evaluate.report import figures
from hpc_closure.evaluate.report.gallery import Album, illustrate_coherence
from hpc_closure.evaluate.report.page import Report
from hpc_closure.evaluate.rows import find, frame, select
from hpc_closure.evaluate.scores.joint.coherence import (
    Pairs,
    complex_coherence,
    cross_spectra,
    pair_names,
)
from hpc_closure.evaluate.scores.table import Labels, Scored
from hpc_closure.evaluate.stages import coupled

SIZE, PAIR = 16, "upper-lower"
COHERENCE, PHASE = 0.8, 1.1
SCORE = "coherence_distance"


def of_law(*shape, seed, coherence=COHERENCE, phase=PHASE, sides=2, size=SIZE):
    """White fields (..., 2, n, n); with kx > 0 the first is ahead of the second by ``phase``."""
    axes = tuple(range(-sides, 0))
    draws = (
        normal(math.prod(shape), *[size] * sides, seed=seed + part).unflatten(0, shape)
        for part in (0, 1000)
    )
    first, other = (torch.fft.fftn(draw, dim=axes) for draw in draws)
    k = torch.fft.fftfreq(size)
    turn = torch.exp(-1j * phase * torch.sign(k).double())
    turn[size // 2] = math.cos(phase)
    turn = turn[(..., *[None] * (sides - 1))]
    second = coherence * turn * first + math.sqrt(1 - coherence**2) * other
    return torch.fft.ifftn(torch.stack([first, 50 * second], -1 - sides), dim=axes).real


@pytest.mark.parametrize("sides", [1, 2, 3])
def test_a_known_law_has_its_coherence_and_phase(sides):
    fields = of_law({1: 3000, 2: 3000, 3: 200}[sides], seed=1, sides=sides)
    spectra = cross_spectra(fields, (1.0,) * sides).mean(0)
    found = complex_coherence(spectra)
    shells = slice(1, SIZE // 2)
    assert found.shape[:2] == (2, 2)
    assert torch.allclose(found[0, 1, shells].abs(), torch.tensor(COHERENCE).double(), atol=0.03)
    assert torch.allclose(found[0, 1, shells].angle(), torch.tensor(PHASE).double(), atol=0.05)
    # the second less the first has the opposite phase; a field is coherent with itself
    assert torch.equal(found[1, 0].angle(), -found[0, 1].angle())
    assert torch.allclose(found[0, 0, shells], torch.tensor(1.0 + 0j).to(found), atol=1e-12)


def test_cross_spectra_are_means_over_the_modes_of_half_a_plane():
    x = 2 * math.pi * torch.arange(SIZE).double() / SIZE
    along, across = x[:, None], x[None]
    first = (2 * along - across).cos() + across.cos()
    second = 3 * (2 * along - across - 0.4).cos() + across.sin()
    spectra = cross_spectra(torch.stack([first, second]))
    # shell 2 has with kx > 0 the modes (2, -1), (2, 0), (2, 1), (1, -2), (1, 2)
    expected = torch.zeros(12).to(spectra)
    expected[2] = 0.75 / 5 * torch.exp(torch.tensor(0.4j))
    assert torch.allclose(spectra[0, 1, :12], expected, atol=1e-12)
    # an odd number of points has no largest wavenumber to leave out
    assert cross_spectra(normal(2, 5, 5)).shape[-1] == 4
    with_largest = torch.stack([(8 * along).cos() + 0 * across] * 2)
    assert not bool((cross_spectra(with_largest).abs() > 1e-12).any())


def test_channels_and_members_are_pooled_over_the_second_half():
    """Complex spectra are averaged, not coherences."""
    found = Pairs(("a", "b", "c"), 3)
    assert list(found.pairs) == ["a-b", "a-c", "b-c"] == list(pair_names("abc"))
    states = normal(3, 4, 5, 3, SIZE, SIZE)  # lead times, members, cases
    for index, ensemble in enumerate(states):
        found.add("truth", index, ensemble[:1])
        found.add("model", index, ensemble)
    assert found.reference == "truth"
    spectra = cross_spectra(states[1:].double()).mean((0, 1, 2))
    expected = complex_coherence(spectra)
    lines = found.coherences()
    assert torch.allclose(lines["b-c"]["model"], expected[1, 2], atol=1e-12)
    assert set(lines["a-b"]) == {"truth", "model"}


@pytest.fixture(scope="module")
def scored():
    """A coupled run: the model lacks a part of the phase, and ``mean_gp`` the coherence."""
    cases, times = 6, 4
    ensembles = {
        "model": of_law(8, cases, times, seed=2, phase=PHASE + 0.5),
        "mean_gp": of_law(8, cases, times, seed=3, coherence=0.2),
        "right": of_law(8, cases, times, seed=4),
        "oracle": of_law(8, cases, times, seed=5),
        "none": of_law(1, cases, times, seed=6),
    }
    truth = of_law(cases, times, seed=7)
    return coupled.score_channels(truth, ensembles, [1, 2, 3, 4], LABELS), truth, ensembles


def test_distances_see_phase_and_coherence(scored):
    rows = scored[0][""].rows
    found = {row.method: row for row in select(rows, score=SCORE).itertuples()}
    assert set(found) == {"model", "mean_gp", "right", "oracle", "none"}
    phase = COHERENCE * abs(1 - complex(math.cos(0.5), math.sin(0.5)))
    for method, expected in (("model", phase), ("mean_gp", 0.6), ("right", 0), ("oracle", 0)):
        row = found[method]
        assert row.channel == PAIR and isna(row.lead_time) and row.stage == "coupled"
        assert row.value == pytest.approx(expected, abs=0.07), method
    assert found["model"].low < phase < found["model"].high
    assert (found["model"].members, found["model"].samples) == (8, 6)
    # by chance halves differ more than entire ensembles
    assert found["right"].value < found["oracle"].value
    assert set(scored[0][""].coherences) == {PAIR}


def test_without_a_true_ensemble_the_truth_is_the_reference(scored):
    _, truth, ensembles = scored
    some = {name: ensembles[name] for name in ("model", "right")}
    found = coupled.score_channels(truth, some, [1, 2, 3, 4], LABELS)[""]
    values = {row.method: row.value for row in select(found.rows, score=SCORE).itertuples()}
    assert set(values) == {"model", "right"} and values["right"] < 0.15 < values["model"]
    assert set(found.coherences[PAIR]) == {"truth", "model", "right"}


def test_a_lost_member_is_an_infinite_distance_without_a_line(scored):
    _, truth, ensembles = scored
    lost = ensembles["model"].clone()
    lost[3, 2, 3, 1, 0, 0] = math.nan
    some = {"model": lost, "oracle": ensembles["oracle"]}
    found = coupled.score_channels(truth, some, [1, 2, 3, 4], LABELS)[""]
    assert find(found.rows, score=SCORE, method="model").value == math.inf
    assert find(found.rows, score=SCORE, method="oracle").value < 0.2
    assert set(found.coherences[PAIR]) == {"truth", "oracle"}


def test_shells_without_power_do_not_count():
    """A smooth field carries few shells; in the others even equal fields have any coherence."""
    smooth = pairs(4, 6, 2, seed=3)
    waves = torch.fft.rfft2(smooth)
    waves[..., 3:], waves[..., 4:-3, :] = 0, 0
    smooth = torch.fft.irfft2(waves)
    noise = 1e-9 * normal(4, 6, 2, 2, SIZE, SIZE, seed=9)
    truth = smooth[0] + noise[1]
    found = coupled.score_channels(truth, {"model": (smooth + noise)[:1]}, [1, 2], LABELS)
    assert find(found[""].rows, score=SCORE).value < 1e-6
    coherences = found[""].coherences[PAIR]["model"].abs()
    assert bool((coherences[1:5] > 0).all()) and not bool(coherences[5:].any())


def test_one_field_has_no_pairs():
    truth, ensemble = normal(2, 3, SIZE, SIZE), normal(4, 2, 3, SIZE, SIZE, seed=2)
    plain = Labels({"closure": "subgrid", "sensors": "none", "interval": 1})
    found = coupled.score_coupled(truth, {"model": ensemble}, [1, 2, 3], plain)
    assert not found.coherences and SCORE not in set(found.rows["score"])


def test_the_figure_has_a_column_per_pair(tmp_path):
    lines = {
        f"{first}-b": {
            "truth": torch.polar(torch.tensor([0.0, 0.5, 0.05, 0.0]), torch.ones(4)),
            "model": torch.polar(torch.tensor([0.0, 0.6, 0.5, 0.0]), 0.5 * torch.ones(4)),
        }
        for first in ("a", "c", "d")
    }
    drawn = figures.coherences(lines, shown=("model", "oracle"))
    assert len(drawn.axes) == 6
    above, below = drawn.axes[0], drawn.axes[3]
    assert above.get_title("left") == "a and b"
    assert [line.get_label() for line in above.lines] == ["truth", "model"]
    assert above.lines[0].get_ydata() == pytest.approx([0.5, 0.05])
    phase = below.lines[0].get_ydata()
    assert phase[0] == pytest.approx(math.degrees(1)) and math.isnan(phase[1])
    low, high = below.get_ylim()
    assert low < phase[0] - 100 and high > phase[0] + 100
    away = {name: -line for name, line in lines["a-b"].items()}  # by half a turn
    line, *_ = figures.coherences({"a-b": away}, shown=()).axes[1].lines
    assert line.get_ydata()[0] == pytest.approx(math.degrees(1) - 180)
    turning = torch.polar(torch.tensor([0.0, 0.5, 0.5, 0.5]), torch.tensor([0.0, 3.0, -3.0, -2.5]))
    lines["a-b"] = {"truth": torch.full((4,), 0.5 + 0j), "model": turning}
    line = figures.coherences(lines, shown=("model",)).axes[3].lines[1]
    expected = [math.degrees(3), math.nan, math.degrees(-3), math.degrees(-2.5)]
    assert line.get_ydata() == pytest.approx(expected, nan_ok=True)
    picture = illustrate_coherence(Scored(coherences=lines), Album(tmp_path, ("png",)))
    assert picture.png == tmp_path / "coherence.png" and picture.png.exists()


def test_the_report_has_a_table_of_pairs(scored, tmp_path):
    rows = frame(record for part in scored[0].values() for record in part.records)
    Report("t", rows).write(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("distance of the coherence of pairs") == 1
    assert f">{PAIR}</" in page or PAIR in page
    assert "coherence of pairs</" in page  # the glossary
