"""A test that fails may pass in a second try, which is reported; more than three fail the run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MOST_RERUNS

TESTS = Path(__file__).parent
FLAKY = """
import pathlib, pytest
@pytest.mark.parametrize("number", range({number}))
def test_fails_first(number):
    seen = pathlib.Path({folder!r}, str(number))
    first = not seen.exists()
    seen.touch()
    assert not first
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "xdist"])
@pytest.mark.parametrize("number, code", [(MOST_RERUNS, 0), (MOST_RERUNS + 1, 1)])
def test_reruns_are_named_and_limited(number, code, workers, tmp_path):
    (tmp_path / "test_flaky.py").write_text(FLAKY.format(number=number, folder=str(tmp_path)))
    options = ["-q", "-p", "conftest", "-p", "no:cacheprovider", "--reruns", "1", "-r", "aR"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *workers, "--rootdir", tmp_path, tmp_path],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == code, run.stdout + run.stderr
    assert run.stdout.count("RERUN test_flaky.py::test_fails_first") == number
    assert f"{number} passed, {number} rerun" in run.stdout
    assert ("something is wrong" in run.stdout) == bool(code)
