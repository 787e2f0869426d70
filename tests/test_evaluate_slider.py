"""The slider of the report: frames of the coupled run by lead time."""

import base64
import io
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_evaluate_report import Page, run_rows

from hpc_closure.evaluate.report import slider
from hpc_closure.evaluate.report.page import Report


def fields(times=5, side=16, noise=0.0):
    x = 2 * np.pi * np.arange(side) / side
    wave = np.cos(3 * x)[:, None] * np.ones((side, side))
    grow = (1 + np.arange(times))[:, None, None]
    truth = grow * wave
    rng = np.random.default_rng(0)
    members = np.stack(
        [(1 + 0.1 * m) * truth + noise * rng.normal(size=truth.shape) for m in range(3)]
    )
    return slider.Fields(0.5 * np.arange(times), truth, members, members.std(0), 20)


def pixels(uri):
    kind, data = uri.split(",", 1)
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), dtype=float)


def test_the_page_holds_every_frame_and_a_slider_that_keys_move(tmp_path):
    drawn = slider.draw(fields())
    path = tmp_path / "report.html"
    Report(title="a run", rows=run_rows(), slider=drawn, start=0.0).write(path)
    text = path.read_text()
    page = Page(text)
    assert drawn.labels == ["0", "0.5", "1", "1.5", "2"]
    (frames,) = re.findall(r"var frames = (\[.*?\]), labels = (\[.*?\]);", text)
    assert json.loads(frames[0]) == drawn.frames and json.loads(frames[1]) == drawn.labels
    assert page.sources == [drawn.frames[0]]  # what is shown without scripts
    (control,) = re.findall(r"<input[^>]*>", text)
    assert 'type="range"' in control and 'max="4"' in control and 'id="lead"' in control
    assert '<label for="lead">' in text and "aria-valuetext" in text and "<noscript>" in text
    assert f"5 frames, {drawn.megabytes}" in text
    assert not re.search(r"https?://|<link|@import|url\(|<script src", text)
    assert {"lead", "frame", "when", "play"} <= set(page.ids)
    Report(title="a run", rows=run_rows(), start=0.0).write(path)
    assert "<script" not in path.read_text()


def test_frames_differ_and_colours_mean_the_same_in_each():
    frames = [pixels(uri) for uri in slider.draw(fields()).frames]
    assert {frame.shape for frame in frames} == {(297, 1080, 3)}
    # the wave grows: fields are paler in early frames, titles and colour bars stay in place
    pale = [float(frame[70:180, 30:180].mean()) for frame in frames]
    assert pale == sorted(pale, reverse=True) and pale[0] > pale[-1] + 20
    bars = [frame[-60:] for frame in frames]
    assert all(np.abs(bar - bars[0]).mean() < 2 for bar in bars)


def test_the_size_is_bounded_and_first_and_last_frame_stay():
    shown = fields(times=9, noise=1.0)
    whole = slider.draw(shown)
    total = sum(map(len, whole.frames))
    half = slider.draw(shown, most_bytes=total // 2 + total // 9)
    assert len(whole.frames) == 9 and len(half.frames) == 5
    assert half.labels == ["0", "1", "2", "3", "4"]
    assert sum(map(len, half.frames)) <= total // 2 + total // 9
    assert len(slider.draw(shown, most_bytes=1).frames) == 2


@pytest.mark.parametrize("sides, channels", [(2, ()), (2, ("rain", "water")), (3, ())])
def test_fields_are_read_time_by_time(monkeypatch, sides, channels):
    rng = np.random.default_rng(1)
    shape = (*[len(channels)] * bool(channels), *[8] * sides)
    states = rng.normal(size=(100, 6, 1, *shape))  # times, members, cases
    ensemble = SimpleNamespace(
        names={"model", "truth"},
        channels=list(channels),
        start=2.0,
        times=2.0 + 0.1 * np.arange(100),
        cases=[7],
        members=list(range(6)),
        select=lambda cases: None,
        index=lambda lead: round(lead / 0.1),
        read=lambda name, index: states[index] if name == "model" else 2 * states[index, :1],
    )
    kind = SimpleNamespace(name="vorticity", unit="1/s")
    problem = SimpleNamespace(dimensions=sides, physics=SimpleNamespace(channels=[kind]))
    found = slider.read(SimpleNamespace(problem=problem), ensemble)
    assert len(found.lead_times) == slider.MOST_FRAMES and found.is_slice == (sides == 3)
    assert found.lead_times[0] == 0 and found.lead_times[-1] == pytest.approx(9.9)
    last = states[-1, :, 0, 0] if channels else states[-1, :, 0]
    last = last[..., 0] if sides == 3 else last
    assert np.allclose(found.truth[-1], 2 * last[0]) and np.allclose(
        found.members[:, -1], last[:3]
    )
    assert np.allclose(found.spread[-1], last.std(0)) and found.number == 6
    ensemble.times = ensemble.times[:1]
    assert slider.read(SimpleNamespace(problem=problem), ensemble) is None


@pytest.mark.timeout(120)
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium opens the page")
def test_a_browser_moves_the_slider_without_errors(tmp_path):
    drawn, path = slider.draw(fields()), tmp_path / "report.html"
    Report(title="a run", rows=run_rows(), slider=drawn, start=0.0).write(path)
    watch = "<script>onerror = text => document.documentElement.title += text</script>"
    move = """<script>
const range = document.getElementById("lead");
range.value = 3;
range.dispatchEvent(new Event("input"));
document.getElementById("frame").decode().then(
  () => document.documentElement.title += "shown " + document.getElementById("frame").naturalWidth
);
</script>"""
    text = (
        path.read_text().replace("<head>", f"<head>{watch}").replace("</body>", f"{move}</body>")
    )
    path.write_text(text)
    page = subprocess.run(
        ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        + [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
        + ["--dump-dom", f"file://{path}"],
        capture_output=True,
        text=True,
        timeout=100,
    ).stdout
    assert re.search(r'<html[^>]* title="shown 1080"', page), page[:500]
    (image,) = re.findall(r'<img id="frame"[^>]*src="([^"]*)"', page)
    assert image == drawn.frames[3]
    assert re.search(r'<output id="when"[^>]*>1.5</output>', page)
    assert 'aria-valuetext="lead time 1.5"' in page
