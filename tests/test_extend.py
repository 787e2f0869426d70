"""Networks, generators, baselines and models from outside the package (``tests/extend``)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hpc_closure
from hpc_closure.data.reader import CoupledEnsemble
from hpc_closure.evaluate import verb as evaluate
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.generate import verb as generate
from hpc_closure.rollout import verb as rollout
from hpc_closure.train import verb as train
from hpc_closure.work.options import Options

TESTS = Path(__file__).parent
SMALL = """
base: diffusion_64
name: data
root: {root}
generate: {{grid: 16, members: 24, t_end: 0.4, dt: 0.005, certificate: reported,
           record: {{start: 0.2, every: 0.02}}}}
model: {{conditions: {{sensors: none}}, width: null, modes: null, layers: null}}
train: {{grid: 16, window: [0.2, 0.4], split: [0.5, 0.25, 0.25], steps: 8, batch: 4, lr: 1.0e-2,
        engine: torch, validate_every: 4, checkpoint_every: 4}}
rollout: {{members: 3, initial_conditions: 2, t_start: 0.2, t_end: 0.4, every: 0.1, interval: 2,
          baselines: [none]}}
evaluate: {{lead_times: [0.1, 0.2], grids: [16], samples: 4, members: 4, sensors: [],
           formats: []}}
cluster: {{members_per_block: 24, device: cpu, threads: 1}}
"""
SUBGRID = """
base: subgrid_backscatter_quick
name: data
root: {root}
physics: {{hyperviscosity: 1e-13, noise: {{wavenumber: 9}}, initial: {{energy: 0.01}}}}
generate: {{grid: 32, members: 8, t_end: 1.6, interval: 20,
           record: {{start: 0.4, every: 0.08, grid: 16}}}}
model: {{preset: leith, conditions: {{previous_closures: 0}}}}
train: {{split: [0.5, 0.25, 0.25], steps: 4, batch: 4, augment: false, engine: torch,
        stability_test: null}}
reduced: {{step: 1}}
replicas: {{members: 0}}
rollout: {{members: 2, initial_conditions: 1, t_start: 0.8, t_end: 1.6, every: 0.08,
          interval: 20, rungs: [],
          last_closures: own}}
evaluate: {{lead_times: [0.08], samples: 4, members: 4, formats: []}}
cluster: {{members_per_block: 8, device: cpu, threads: 1}}
"""
QUIET = Options(verbosity=-1)
NETWORK = "model={mean: [regression, 'extend.network:Pointwise'], amplitude: none, %s}"
CASES = {
    "network": NETWORK % "residual: gaussian, validate_parts: off, options: {hidden: 4}",
    "generator": "model={mean: [regression], amplitude: none, validate_parts: off, "
    "residual: 'extend.generator:Sized'}",
    "model": "model={preset: 'extend.model:Linear', options: {start: 0.5}}",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The files of two experiments whose data are there, by closure."""
    files = {}
    for name, text in (("diffusion", SMALL), ("subgrid", SUBGRID)):
        folder = tmp_path_factory.mktemp(name)
        files[name] = folder / "data.yaml"
        files[name].write_text(text.format(root=folder / "runs"))
        assert generate.run(reading.load(files[name]), QUIET) == 0
    return files


def coupled(file, *changes):
    """The run of an experiment on the data, trained, rolled out and scored."""
    experiment = reading.load(file, ["use.data=data", *changes])
    for verb in (train, rollout, evaluate):
        assert verb.run(experiment, QUIET) == 0
    return Run.of(experiment)


@pytest.mark.parametrize("name", CASES)
def test_a_class_from_outside_is_trained_coupled_and_read_again(data, name):
    run = coupled(data["diffusion"], f"name={name}", CASES[name])
    assert len(CoupledEnsemble(sorted(run.rollout.glob("*.h5"))).times) == 3
    closure = hpc_closure.load(run.model)
    assert f"extend.{name}:" in json.dumps(closure.config)
    state = 0.1 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    one, again = (closure.sample(state, members=3, seed=1) for _ in range(2))
    assert one.shape == (3, 16, 16) and bool(one.isfinite().all())
    assert torch.equal(one, again) and not torch.equal(one[0], one[1])


@pytest.mark.parametrize("rate", [None, 0.1])
def test_a_baseline_from_outside_is_tuned_or_fixed(data, rate):
    options = "" if rate is None else f", options: {{rate: {rate}}}"
    model = (
        f"model={{preset: 'extend.baseline:Drag', conditions: {{previous_closures: 0}}{options}}}"
    )
    run = coupled(data["subgrid"], f"name=drag_{rate}", model)
    closure = hpc_closure.load(run.model)
    (constant,) = closure.model.constants
    assert constant in (0.0, 0.05, 0.2) if rate is None else constant == rate
    state = 0.1 * torch.randn(16, 16, dtype=torch.float64)
    inside = closure.model.band.to_physical(closure.model.band.to_spectral(state[None]), 16)
    assert torch.allclose(closure.sample(state, members=1)[0], -constant * inside[0])


def test_a_file_imports_nothing_by_itself(data):
    """A model whose class nobody has imported is one clear line, not code that runs."""
    run = coupled(data["diffusion"], "name=model", CASES["model"])
    code = (
        "import sys, hpc_closure\n"
        f"sys.path.insert(0, {str(TESTS)!r})\n"
        "try:\n"
        f"    hpc_closure.load({str(run.model)!r})\n"
        "except ValueError as error:\n"
        "    assert 'extend' not in sys.modules\n"
        "    print(error)\n"
        "import extend.model\n"
        f"print(hpc_closure.load({str(run.model)!r}).config['options'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    line, options = done.stdout.splitlines()
    assert line.endswith(
        "model.safetensors: its class extend.model:Linear is not loaded: import extend.model "
        "first, or name the class in use.classes of the experiment"
    )
    assert options == "{'start': 0.5}"


def test_an_experiment_names_the_classes_of_other_models(data, monkeypatch):
    monkeypatch.delitem(sys.modules, "extend.model", raising=False)
    one = reading.load(data["diffusion"], ["use.classes=['extend.model:Linear']"])
    assert "extend.model" in sys.modules
    assert one.stage_hash("evaluate") == reading.load(data["diffusion"]).stage_hash("evaluate")
    with pytest.raises(
        ValueError, match="use.classes=json:dumps: dumps of json is not a subclass of"
    ):
        reading.load(data["diffusion"], ["use.classes=['json:dumps']"])
    with pytest.raises(ValueError, match="use.classes"):
        reading.load(data["diffusion"], ["use.classes=[extend]"])


@pytest.mark.parametrize(
    "change,line",
    [
        (
            "preset: 'nowhere.at:All'",
            "model.preset=nowhere.at:All: nowhere.at cannot be imported (ModuleNotFoundError: No "
            "module named 'nowhere'); install its package, or add its folder to PYTHONPATH",
        ),
        (
            "preset: 'extend.model:Other'",
            "model.preset=extend.model:Other: extend.model has no Other; expected a subclass of",
        ),
        (
            "preset: 'extend.network:Pointwise'",
            "of extend.network is not a subclass of hpc_closure.closure.model.Closure",
        ),
        (
            "residual: 'extend.network:Pointwise'",
            "of extend.network is not a subclass of hpc_closure.experiment.kinds.Re",
        ),
        (
            "preset: 'hpc_closure.closure.model:ClosureModel'",
            "define its abstract method(s) parts, sample_batch, sample_hat",
        ),
        (
            "preset: 'extend.model:Linear', options: {stop: 1}",
            "model.options.stop: unknown key; valid: start",
        ),
        (
            "preset: 'extend.model:Linear', options: {start: far}",
            "model.options.start='far': Input should be a valid number",
        ),
        ("preset: 'extend.model:Linear', width: 8", "model.width is no setting of"),
        ("options: {start: 1}", "model.options.start: unknown key; valid: none"),
    ],
)
def test_what_does_not_fit_is_one_line(data, change, line):
    with pytest.raises(ValueError) as caught:
        reading.load(data["diffusion"], [f"model={{conditions: {{sensors: none}}, {change}}}"])
    assert line in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, error", [("1 / 0", "ZeroDivisionError"), ("None.x", "AttributeError")]
)
def test_a_module_that_fails_is_named_with_its_error(data, tmp_path, monkeypatch, text, error):
    (tmp_path / f"own_{error}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"own_{error} cannot be imported .{error}: ") as refused:
        reading.load(data["diffusion"], [f"use.classes=['own_{error}:Mine']"])
    assert "\n" not in str(refused.value)


def test_the_options_are_in_the_hash(data):
    one, other = (
        reading.load(data["diffusion"], ["use.data=data", CASES["network"].replace("4", size)])
        for size in ("4", "5")
    )
    assert one.stage_hash("generate") == other.stage_hash("generate")
    assert one.stage_hash("train") != other.stage_hash("train")


TWICE = """
from hpc_closure.experiment.kinds import NetworkKind
from hpc_closure.spectral.recipe import Count, Section


class Twice(NetworkKind):
    name = "twice"
    decay = 0.5

    class Options(Section):
        copies: Count | None = 2

    @classmethod
    def build(cls, channels, config):
        from hpc_closure.closure.networks.blocks import LocalNetwork

        return LocalNetwork(channels, 4 * config["copies"], 2, config["dimensions"])
"""


def test_a_class_of_the_package_is_one_file(tmp_path):
    """Its name, its key in the section itself, and what it builds are known; no list names it."""
    source = Path(hpc_closure.__file__).parent
    left_out = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(source, tmp_path / "hpc_closure", ignore=left_out)
    (tmp_path / "hpc_closure/closure/networks/kinds/twice.py").write_text(TWICE)
    code = (
        "from hpc_closure.experiment import reading\n"
        "from hpc_closure.train.verb import build_model\n"
        "model = 'model={mean: [regression, twice], amplitude: none, copies: 3}'\n"
        "made = build_model(reading.load('quickstart', [model]))\n"
        "print(made.mean.kind, made.config['copies'], made.weight_decay('mean.network'))\n"
        "try: reading.load('quickstart', ['model.copies=3'])\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    made, line = done.stdout.splitlines()
    assert made == "twice 3 0.5"
    assert line.startswith("quickstart: model.copies is no setting of model.preset=default")


def test_what_an_experiment_may_name_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from hpc_closure.experiment import kinds\n"
        "assert kinds.names(kinds.NetworkKind) and kinds.names(kinds.ModelKind)\n"
        "heavy = {'torch', 'numpy', 'h5py', 'mpi4py'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
