"""The film of a coupled run."""

import numpy as np
import pytest

from hpc_closure.evaluate.report import movie
from hpc_closure.experiment import reading
from hpc_closure.spectral.modes.grid import Grid
from hpc_closure.tools import movie as verb
from hpc_closure.work.options import UsageError


def film(times=3, members=4, sides=(16, 16)):
    x = 2 * np.pi * np.arange(sides[0]) / sides[0]
    wave = np.cos(3 * x).reshape(-1, *[1] * (len(sides) - 1)) * np.ones(sides)
    grow = 1 + np.arange(times).reshape(-1, *[1] * len(sides))
    truth = grow * wave
    ensemble = np.stack([(1 + 0.1 * (m - 1.5)) * truth for m in range(members)])
    grid = Grid(sides[0], 1.0, len(sides))
    return movie.Film(
        lead_times=np.arange(times) * 0.5,
        truth=truth,
        members=ensemble,
        shells=np.arange(grid.num_shells),
        truth_spectra=verb.spectra_of(truth, grid),
        spectra=verb.spectra_of(ensemble, grid),
        title="a wave",
    )


def test_spectra_are_mean_squares_per_shell():
    shown = film()
    assert np.allclose(shown.truth_spectra[:, 3], [0.5, 2.0, 4.5])
    assert np.allclose(shown.truth_spectra.sum(-1), (shown.truth**2).mean((-2, -1)))


def test_the_rank_is_the_share_of_members_below_the_truth():
    members = np.array([[0.0, 5.0], [1.0, 5.0], [2.0, np.nan], [3.0, 5.0]])
    assert movie.ranks_of(np.array([1.5, 6.0]), members).tolist() == [0.5, 1.0]
    # at the start all members are the truth: it lies in their middle, not below them all
    assert movie.ranks_of(np.ones(2), np.full((4, 2), 1 + 1e-8)).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("sides", [(16, 16), (8, 8, 8)])
def test_a_frame_shows_the_fields_of_its_time(sides):
    shown = film(sides=sides)
    pictures = movie.Pictures(shown)
    for number in (0, 2):
        pictures.show(number)
        drawn = np.asarray(pictures.images["truth (DNS)"].get_array())
        expected = movie.plane(shown.truth[number]).T * pictures.factor
        assert np.allclose(drawn, expected)
        spread = np.asarray(pictures.images["ensemble std"].get_array())
        assert np.allclose(spread, movie.plane(shown.members[:, number].std(0)).T)
        assert f"lead time {0.5 * number:.2f}" in pictures.heading.get_text()


def test_a_film_is_a_gif_of_all_frames_or_an_mp4(tmp_path):
    from PIL import Image

    path = movie.write(film(times=4), tmp_path / "wave.gif", seconds=2.0)
    with Image.open(path) as image:
        assert image.n_frames == 4
    if movie.default_format() == ".mp4":
        path = movie.write(film(), tmp_path / "wave.mp4")
        assert path.read_bytes()[4:8] == b"ftyp" and path.stat().st_size < 5e6
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted(
        {"wave.gif", f"wave{movie.default_format()}"}
    )


def test_files_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected a file that ends in .mp4 or .gif"):
        movie.write(film(), tmp_path / "wave.avi")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert movie.default_format() == ".gif"
    with pytest.raises(ValueError, match="needs ffmpeg; install it or choose a .gif file"):
        movie.write(film(), tmp_path / "wave.mp4")


def test_a_line_or_an_experiment_without_a_rollout_has_no_film(tmp_path):
    with pytest.raises(UsageError, match="a film shows flows of two or three dimensions"):
        verb.run(reading.load("burgers", [f"root={tmp_path}"]))
    with pytest.raises(ValueError, match="run `hpc-closure rollout` first"):
        verb.run(reading.load("quickstart", [f"root={tmp_path}"]))
