"""What README and docs say can be done: every command parses, every file named exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from hpc_closure.cli import app
from hpc_closure.experiment import reading

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)


def blocks(kind):
    for page in PAGES:
        for language, text in FENCE.findall(page.read_text()):
            if language == kind:
                yield page.name, text


def commands():
    for page, text in blocks("bash"):
        for line in text.replace("\\\n", " ").splitlines():
            line = line.split("  #")[0].strip()
            if line and not line.startswith("#"):
                yield page, line


def words_of(line):
    words = shlex.split(line)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words


def test_there_are_commands():
    assert len(list(commands())) > 15


@pytest.mark.parametrize("page, line", list(commands()))
def test_every_command_is_one_that_exists(page, line, capsys):
    words = words_of(line)
    for index, word in enumerate(words):
        if word.startswith(("launch/", "slurm/")) and not word.endswith((".yaml", "/")):
            assert (ROOT / word).exists(), f"{page}: {word}"
    if "hpc-closure" in words:
        parse(words[words.index("hpc-closure") + 1 :])
        assert not capsys.readouterr().err, f"{page}: an old name"


def parse(words):
    """Parse a command line without running it; usage errors raise."""
    command = typer.main.get_command(app)
    context = command.make_context("hpc-closure", list(words), resilient_parsing=False)
    name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    while hasattr(found, "resolve_command"):
        if not rest or rest[0].startswith("-"):
            return
        context = found.make_context(name, rest, parent=context)
        name, found, rest = found.resolve_command(
            context, [*context._protected_args, *context.args]
        )
    found.make_context(name, rest, parent=context)


def test_the_parser_of_this_test_refuses_a_wrong_command():
    with pytest.raises(Exception, match="(?i)no such (option|command)"):
        parse(["generate", "x.yaml", "--no-such-option"])


@pytest.mark.parametrize("page, text", list(blocks("yaml")))
def test_every_experiment_in_the_docs_loads(page, text, tmp_path, monkeypatch):
    if not re.search(r"^(base|name|generate|train):", text, re.M):
        pytest.skip("not an experiment")
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    reading.load(path)


@pytest.mark.parametrize("page, text", list(blocks("python")))
def test_every_python_example_compiles(page, text):
    compile(text, page, "exec")


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([\w/.-]+\.md)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def images():
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        for target in re.findall(r"!\[[^]]+\]\(([^)]+)\)", page.read_text()):
            yield page, page.parent / target


def test_the_first_pages_open_with_the_drawing_and_the_figure():
    names = {}
    for page, path in images():
        assert path.is_file(), f"{page.name}: {path}"
        limit = {".svg": 100_000, ".png": 300_000}[path.suffix]
        assert 1000 < path.stat().st_size < limit, path
        names.setdefault(page.name, []).append(path.name)
    assert set(names) == {"README.md", "index.md"}
    assert all(
        found == ["workflow.svg", "clouds.png", "closure.png"] for found in names.values()
    ), names


def test_the_workflow_is_what_its_script_draws(tmp_path):
    """The letters and their places, for the outlines are those of one matplotlib."""
    script, made = ROOT / "docs/images/workflow.py", tmp_path / "workflow.svg"
    again = tmp_path / "again.svg"
    for path in (made, again):
        subprocess.run([sys.executable, script, path], check=True)
    assert made.read_bytes() == again.read_bytes()
    texts, shown = (
        re.findall(r"<!-- (.*?) -->", path.read_text())
        for path in (made, script.with_suffix(".svg"))
    )
    assert texts == shown and "RUN/train/" in texts


def test_both_first_pages_tell_the_same_figures_of_the_quickstart():
    marked = r"<!-- quickstart figures -->\n(> .*\n)<!-- end -->"
    told = [re.findall(marked, page.read_text()) for page in (PAGES[0], ROOT / "docs/index.md")]
    assert told[0] == told[1] and len(told[0]) == 1
    assert "the model's CRPS is " in told[0][0]
    assert "the best of 4 closures without a generator" in told[0][0]


@pytest.mark.slow
def test_the_documentation_builds(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_closure_in_a_solver_of_ones_own():
    """The example runs, and its trajectory is that of our solver with the same closure."""
    import numpy as np
    import torch

    import hpc_closure
    from hpc_closure.closure.targets import reduced_problem
    from hpc_closure.spectral.problem import Problem
    from hpc_closure.spectral.simulation import Simulation

    example = next(text for page, text in blocks("python") if page == "api.md" and "force" in text)
    told: dict = {}
    exec(example, told)
    steps, hold, members = told["steps"], told["hold"], told["members"]
    full = Problem(grid=64, forcing={"kind": "published", "amplitude": 0.1})
    problem = reduced_problem(full, 64, "diffusion")
    ours = Simulation(problem, range(members), 0)
    x = np.arange(64) / 64
    wave = np.sin(2 * np.pi * (x[:, None] + 2 * x[None, :]))
    start = torch.as_tensor(np.tile(wave, (members, 1, 1)))
    ours.load_state(0, ours.transform.to_spectral(start))
    closure = hpc_closure.load("diffusion")
    for call in range(steps // hold):
        state = ours.transform.to_physical(ours.state)
        u = closure.sample(state, members=members, seed=1, call=call, interval=hold)
        ours.advance(hold, tendency_hat=ours.transform.to_spectral(u))
    theirs = told["real"](told["w"])
    difference = ours.transform.to_physical(ours.state).numpy() - theirs
    change = theirs - start.numpy()
    assert np.abs(difference).max() < 1e-6 * np.abs(change).max()


def subgrid_case(folder):
    """A small subgrid problem: its data set, and a file of a closed form fitted to it."""
    import torch
    from trajectory_case import GRID, INTERVAL, PREVIOUS, PROBLEM, data, dns

    from hpc_closure.closure import artifact
    from hpc_closure.closure.artifact import build

    conditions = {"sensors": "none", "previous_closures": PREVIOUS}
    torch.manual_seed(0)
    model, samples = build({"preset": "gaussian", "conditions": conditions}, GRID), data()
    for phase in model.phases:
        model.begin(phase.name, samples.of(phase.members).passes)
    every = INTERVAL * PROBLEM.dt
    target = {"kind": "subgrid", "interval": INTERVAL, "dt": PROBLEM.dt, "every": every}
    artifact.save(model, folder / "model.safetensors", target=target, provenance={})
    return dns(), folder / "model.safetensors"


def test_a_subgrid_closure_in_a_solver_of_ones_own(tmp_path, monkeypatch):
    """The example's trajectory is that of our solver, which adds the closure after its map."""
    import numpy as np
    import torch
    from trajectory_case import INTERVAL, REDUCED

    import hpc_closure
    from hpc_closure.closure.targets import advance_with
    from hpc_closure.data import reader
    from hpc_closure.spectral.simulation import Simulation

    example = next(
        text for page, text in blocks("python") if page == "api.md" and "process.begin" in text
    )
    data, path = subgrid_case(tmp_path)
    closure, seen = hpc_closure.load(path), []
    monkeypatch.setattr(reader, "DataSet", lambda folder: seen.append(folder) or data)
    monkeypatch.setattr(hpc_closure, "load", lambda path: seen.append(path) or closure)
    monkeypatch.chdir(tmp_path)  # the example writes the state of its process
    assert example.count("2.5e-18") == 1 and REDUCED.physics.drag == 0.05
    told: dict = {}
    exec(example.replace("2.5e-18", f"{REDUCED.physics.hyperviscosity}"), told)
    assert [Path(one).parts[:2] for one in seen] == 2 * [("runs", "subgrid_backscatter_quick")]
    calls, members, start = told["calls"], told["members"], told["start"]

    ours = Simulation(REDUCED, range(members), 0)
    to_spectral, to_physical = ours.transform.to_spectral, ours.transform.to_physical
    first = torch.as_tensor(data.read(data.members[-1], start)).double()
    ours.load_state(0, to_spectral(first.expand(members, -1, -1).contiguous()))
    last = [data.read(data.members[-1], start - lag, "closure") for lag in range(1, start + 1)]
    last = [torch.as_tensor(one).double().expand(members, -1, -1) for one in last]
    for call in range(calls):
        now = {"members": members, "seed": 1, "call": call, "interval": INTERVAL}
        u = closure.sample(to_physical(ours.state), previous=torch.stack(last, 1), **now)
        advance_with(ours, "subgrid", INTERVAL * REDUCED.dt, to_spectral(u))
        last = [u, *last][: len(last)]
    found, expected = told["real"](told["w"]), to_physical(ours.state).numpy()
    change = expected - first.numpy()
    assert np.abs(found - expected).max() < 1e-6 * np.abs(change).max()
    assert found.std(0).max() > 0.01 * found.std()


class Cloudy:
    """A data set of clouds on 16 x 16 points: a smooth flow, moisture near 1 and a little rain."""

    members, grid = range(3), 16

    def read(self, member, index, field="state", grid=None):
        import numpy as np

        x = 2 * np.pi * np.arange(16) / 16 + member
        waves = np.sin(x)[:, None] * np.cos(2 * x + index)
        return np.stack([waves, 0.9 + 0.1 * waves, 0.2 + 0.1 * waves]).astype(np.float32)


def clouds_case(folder):
    """Save a closed form of the preset clouds that was fitted to random closures; returns it."""
    import torch

    from hpc_closure.closure import artifact
    from hpc_closure.experiment import reading

    experiment = reading.load("clouds")
    config = {
        "preset": "gaussian",
        "equation": experiment.physics.model_dump(),
        "conditions": {"sensors": "none", "forecast": True},
    }
    model = artifact.build(config, 16, experiment.physics.length)
    generator, waves = torch.Generator().manual_seed(0), torch.as_tensor(Cloudy().read(0, 0))
    states = waves + 0.1 * torch.randn(64, 3, 16, 16, generator=generator)
    noise = 0.1 * torch.randn(64, 3, 16, 16, generator=generator)
    for phase in model.phases:
        model.begin(phase.name, [(states, noise - 0.05 * states.roll(1, 1))])
    target = {"kind": "subgrid", "interval": 20, "dt": 0.0125, "every": 0.25}
    artifact.save(model, folder / "model.safetensors", target=target, provenance={})
    return folder / "model.safetensors"


def test_a_closure_of_several_fields_in_a_solver_of_ones_own(tmp_path, monkeypatch):
    """The example's trajectory is that of our solver, whose closure reads the forecast."""
    import numpy as np
    import torch

    import hpc_closure
    from hpc_closure.closure.model import Request
    from hpc_closure.closure.targets import corrected_by
    from hpc_closure.data import reader
    from hpc_closure.spectral.simulation import Simulation

    (example,) = (
        text for page, text in blocks("python") if page == "api.md" and "forecast" in text
    )
    closure, seen = hpc_closure.load(clouds_case(tmp_path)), []
    monkeypatch.setattr(reader, "DataSet", lambda folder: seen.append(folder) or Cloudy())
    monkeypatch.setattr(hpc_closure, "load", lambda path: seen.append(path) or closure)
    made: dict = {}
    exec(example, made)
    assert [Path(one).parts[:2] for one in seen] == 2 * [("runs", "clouds")]
    members, span = range(made["members"]), made["span"]
    ours = Simulation(made["problem"], members, 0)
    start = np.tile(Cloudy().read(2, 0), (len(members), 1, 1, 1))
    ours.load_state(0, ours.transform.to_spectral(torch.as_tensor(start).double()))
    for call in range(made["calls"]):
        corrected_by(ours, span, lambda: closure.sample_hat(Request(ours.state, members, 1, call)))
    found, expected = made["state"], ours.transform.to_physical(ours.state).numpy()
    assert found.shape == (16, 3, 16, 16)
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected - start).max()
    assert (found.std(0).max((1, 2)) > 0.01 * found.std((0, 2, 3))).all()


def test_every_test_file_is_of_a_module_or_of_a_theme_that_the_readme_names():
    tests = Path(__file__).parent
    themes = re.findall(r"`(test_[\w*]+)\.py`", (tests / "README.md").read_text())
    for path in tests.glob("test_*.py"):
        wing, _, module = path.stem.removeprefix("test_").partition("_")
        rooms = [
            one.relative_to(ROOT / "hpc_closure" / wing).with_suffix("").parts
            for one in (ROOT / "hpc_closure" / wing).rglob("*")
        ]
        of_module = any(module in (parts[-1], "_".join(parts)) for parts in rooms)
        assert of_module or any(path.match(f"{theme}.py") for theme in themes), path.name
    for theme in themes:
        assert list(tests.glob(f"{theme}.py")), f"tests/README.md names {theme}.py"
