"""The wheel in an environment of its own: no checkout, no MPI, only what its metadata requires.

The environment borrows the packages of this one by links, so nothing is downloaded; a requirement
that setup.cfg forgets is absent there.
"""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import TINY
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = (
    "import hpc_closure, torch; "
    "u = hpc_closure.load('two_regimes').sample(torch.zeros(1, 64, 64), members=3, seed=0, call=0)"
    "; print(tuple(u.shape), bool(u.isfinite().all()))"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy, for a build leaves folders in its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    shutil.copytree(
        ROOT / "hpc_closure", source / "hpc_closure", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("setup.cfg", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source)
    [path] = folder.glob("*.whl")
    return path


def pip(python, *words):
    command = [sys.executable, "-m", "pip", "--python", python, "-q", "--no-input"]
    done = subprocess.run([*command, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Environment:
    """A virtual environment with the wheel and, as links, with what it requires."""

    def __init__(self, folder, wheel):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.folder, self.python = folder, folder / "bin" / "python"
        [self.packages] = folder.glob("lib/python*/site-packages")
        self.linked: set[str] = set()
        with zipfile.ZipFile(wheel) as archive:
            [metadata] = [name for name in archive.namelist() if name.endswith("/METADATA")]
            text = archive.read(metadata).decode()
        lines = [line for line in text.splitlines() if line.startswith("Requires-Dist: ")]
        self.requirements = [line.removeprefix("Requires-Dist: ") for line in lines]
        self.link(self.requirements, "")
        pip(self.python, "install", "--no-deps", "--no-index", wheel)

    def link(self, requirements, extra):
        """Link the packages that requirements name for an extra, and what they require."""
        for requirement in map(Requirement, requirements):
            marker = requirement.marker
            if requirement.name in self.linked or marker and not marker.evaluate({"extra": extra}):
                continue
            found = importlib.metadata.distribution(requirement.name)
            assert requirement.specifier.contains(found.version, prereleases=True), requirement
            self.linked.add(requirement.name)
            for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
                if not (self.packages / top).exists():
                    (self.packages / top).symlink_to(found.locate_file(top))
            for inner in ("", *requirement.extras):
                self.link(found.requires or (), inner)

    def run(self, *words, cwd=None):
        """Run ``hpc-closure``, or Python for words that begin with -c."""
        program = [self.python] if words[0] == "-c" else [self.folder / "bin" / "hpc-closure"]
        return subprocess.run(
            [*program, *map(str, words)],
            capture_output=True,
            text=True,
            timeout=400,
            cwd=cwd or self.folder,
            env={
                "PATH": str(self.folder / "bin"),
                "HOME": str(self.folder),
                "OMP_NUM_THREADS": "1",
            },
        )


def test_the_wheel_has_what_the_package_reads(wheel):
    """Every file of the package, and none beside it."""
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = [name for name in archive.namelist() if ".dist-info/" in name]
    files = (path for path in (ROOT / "hpc_closure").rglob("*") if path.is_file())
    wanted = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    assert inside == wanted
    assert any(name.endswith("licenses/LICENSE") for name in metadata)


@pytest.mark.slow
def test_the_wheel_in_an_empty_environment(wheel, tmp_path):
    place = Environment(tmp_path / "environment", wheel)

    # the core: it samples, and says what the fourth verb lacks
    done = place.run("doctor")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.endswith("\ncannot run: evaluate (pandas, matplotlib)\n")
    done = place.run("-c", SAMPLE)
    assert done.stdout == "(3, 64, 64) True\n", done.stderr
    done = place.run("config", "copy", "quickstart", "mine.yaml")
    assert done.returncode == 0 and (place.folder / "mine.yaml").is_file(), done.stderr
    assert place.run("config", "check", "mine.yaml").returncode == 0
    assert place.run("config", "profile", "template", "slurm/profiles/me.yaml").returncode == 0
    experiment = tmp_path / "tiny.yaml"
    experiment.write_text(TINY.format(root=tmp_path / "runs"))
    for verb in ("generate", "train", "rollout"):
        done = place.run(verb, experiment, "-q")
        assert done.returncode == 0, done.stderr
    done = place.run("evaluate", experiment)
    assert done.returncode == 1 and "pip install 'hpc_closure[report]'" in done.stderr

    # with the extras of ranks, Slurm and the report, but without an MPI library
    for extra in ("hpc", "report"):
        place.link(place.requirements, extra)
    done = place.run("doctor", "--json")
    states = {check["name"]: check["state"] for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0 and states["MPI library"] == "broken", done.stdout
    assert states["pandas"] == states["tensorboard"] == states["submitit"] == "OK"
    assert states["mpirun"] == states["deepspeed"] == "missing"
    done = place.run("evaluate", experiment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "tiny" / "evaluate" / "report.html").is_file()
    done = place.run("submit", experiment, "--dry-run", "cluster.profile=cpu")
    assert done.returncode == 0 and "#SBATCH" in done.stdout, done.stderr
