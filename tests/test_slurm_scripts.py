"""The shell side of slurm/ without a Slurm."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parents[1] / "slurm"
SCRIPTS = [SLURM / "pipeline", SLURM / "example.sbatch", *(SLURM / "testbed").glob("[ud]*")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash(path):
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(
            ["shellcheck", "-s", "bash", "-e", "SC1090,SC1091,SC2086,SC2034,SC2154", path],
            check=True,
        )


def test_the_example_can_be_stopped_and_requeued():
    text = (SLURM / "example.sbatch").read_text()
    for option in ("--signal=B:USR2@", "--requeue", "--open-mode=append", "--time="):
        assert f"#SBATCH {option}" in text
    last = text.rstrip().splitlines()[-1]
    assert last.startswith("exec python3 -m hpc_closure.batch.requeue srun ")


def test_the_testbed_says_in_one_line_why_not():
    command = [SLURM / "testbed" / "up"]
    if os.geteuid() == 0:
        command = ["setpriv", "--reuid=65534", "--clear-groups", *command]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines() == [
        "testbed/up: needs root (run: sudo slurm/testbed/up)"
    ]
    helped = subprocess.run([SLURM / "testbed" / "up", "--help"], capture_output=True, text=True)
    assert "--no-accounting" in helped.stdout
