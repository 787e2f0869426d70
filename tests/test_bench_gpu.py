"""Measurements in pieces: what is done is not done again, time ends, a failure is shown."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_closure.bench import gpu
from hpc_closure.bench.gpu import Measurements, Place, Step
from hpc_closure.work.stop import EXIT_STOPPED

LAUNCH = Path(__file__).parent.parent / "launch" / "gpu"


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, "cpu", small=True)


def told_of(place, part, step):
    return json.loads((place.folder / part / f"{step}.json").read_text())


def test_a_bench_is_run_once_and_summed_up(place):
    lines: list[str] = []
    assert Measurements(place, 300, lines.append).run(["gradient"]) == 0
    told = told_of(place, "gradient", "speed")
    assert told["state"] == "done" and told["seconds"] > 0
    assert told["records"]["records"][0]["grid"] == 16 and "cpu" in told["records"]["machine"]
    assert Measurements(place, 300, lines.append).run(["gradient"]) == 0
    assert len(lines) == 1 and lines[0].startswith("gradient speed: done after ")
    assert told_of(place, "gradient", "speed") == told
    text = (place.folder / "gpu.txt").read_text()
    assert "gradient, matrices" in text and text.startswith("gradient speed: done, ")


def test_pipelines_end_in_scores_and_a_verb_goes_on(place):
    """The second model is trained on the data of the first."""
    assert Measurements(place, 600, lambda line: None).run(["default"]) == 0
    scores = json.loads((place.folder / "gpu.json").read_text())["scores"]["default"]
    assert {row["method"] for row in scores["samples"]} >= {"model", "oracle"}
    assert scores["cost"]["none"] == 1 < scores["cost"]["model"]
    words = [step.words for step in gpu.parts(place)["fno_score"]]
    assert [each[0] for each in words] == ["train", "rollout", "evaluate"]
    assert all("use.data=default" in each for each in words)


def test_when_the_time_is_over_nothing_is_begun(place):
    assert Measurements(place, 1.0).run(["gradient"]) == EXIT_STOPPED
    assert not (place.folder / "gradient").exists()


def test_a_command_is_asked_to_end_and_begun_anew(place, monkeypatch):
    slow = {"slow": [Step("sleep", ["20", "1"], "slowly")], "other": [Step("none", [], "this")]}
    monkeypatch.setattr(gpu, "LEAST", 0.1)
    monkeypatch.setattr(gpu, "parts", lambda place: slow)
    (place.folder / "slowly.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(place.folder), prepend=os.pathsep)
    assert Measurements(place, 2.0).run() == EXIT_STOPPED
    assert told_of(place, "slow", "sleep")["state"] == "stopped"
    (place.folder / "slowly.py").write_text("print('quick')\n")
    assert Measurements(place, 60.0).run(["slow"]) == 0
    assert told_of(place, "slow", "sleep")["seconds"] > 2.0  # of both


def test_a_failure_is_shown_and_the_next_part_is_run(place, monkeypatch):
    found = {
        "wrong": [Step("dns", ["bench", "dns", "--grid", "none"])],
        "gradient": gpu.parts(place)["gradient"],
    }
    monkeypatch.setattr(gpu, "parts", lambda place: found)
    assert Measurements(place, 300).run() == 1
    text = (place.folder / "gpu.txt").read_text()
    assert "wrong dns: failed" in text and "--grid none: expected numbers" in text
    assert told_of(place, "gradient", "speed")["state"] == "done"


def test_no_such_part(place):
    with pytest.raises(
        ValueError, match="--part speed: expected one of dns, networks, gradient, switches"
    ):
        Measurements(place, 60).run(["speed"])


def launch(*words, python=sys.executable):
    environment = {**os.environ, "HPC_CLOSURE_PYTHON": str(python)}
    return subprocess.run(
        ["bash", str(LAUNCH), *map(str, words)], capture_output=True, text=True, env=environment
    )


def test_one_command_on_a_machine_without_network(tmp_path):
    words = ["--device", "cpu", "--small", "--part", "gradient"]
    run = launch(tmp_path / "out", *words)
    assert run.returncode == 0, run.stderr
    assert "gradient speed: done" in (tmp_path / "out" / "gpu.txt").read_text()
    assert launch().returncode == 2
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    run = launch(tmp_path / "bare", *words, python=bare)
    assert run.returncode == 1
    assert "lacks numpy>=1.26" in run.stderr and "--wheels FOLDER" in run.stderr
