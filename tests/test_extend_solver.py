"""An equation, a forcing and a site profile, each in one file of ``tests/extend``."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

from hpc_closure.batch.site import load_profile
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.generate import verb as generate
from hpc_closure.spectral.equations import Equation
from hpc_closure.spectral.forcing import Forcing
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.work.options import Options

EXTEND = Path(__file__).parent / "extend"
YAML = """
name: extended
root: {root}
physics: {physics}
generate: {{grid: 16, members: 2, dt: 0.01, t_end: 0.2, closure: none, certificate: reported,
           record: {{start: 0.1, every: 0.1}}}}
cluster: {{members_per_block: 2, device: cpu, threads: 1}}
"""
LINE = (
    "{equation: damped_burgers1d, viscosity: 0.02, drag: 0.3, forcing: {kind: none}, "
    "noise: {kind: none}, initial: {kind: line, amplitude: 0.1, wavenumber: 2}}"
)
PLANE = "{forcing: {kind: taylor_green, amplitude: 0.2, wavenumber: 3}}"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Register the example classes for one test only."""
    for family, name in ((Equation, "extend.equation"), (Forcing, "extend.forcing")):
        monkeypatch.setattr(family, "kinds", dict(family.kinds))
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.import_module(name)


@pytest.mark.parametrize("physics", [LINE, PLANE])
def test_an_experiment_with_the_class_generates_data(physics, tmp_path):
    path = tmp_path / "extended.yaml"
    path.write_text(YAML.format(root=tmp_path / "runs", physics=physics))
    experiment = reading.load(path)
    assert generate.run(experiment, Options(verbosity=-1)) == 0
    assert len(list(Run.of(experiment).data.glob("block_*.h5"))) == 1


def test_weak_waves_decay_by_viscosity_and_drag(tmp_path):
    path = tmp_path / "extended.yaml"
    path.write_text(YAML.format(root=tmp_path / "runs", physics=LINE))
    problem = reading.load(path).problem
    simulation = Simulation(problem, [0], 0)
    (x,) = simulation.grid.coordinates()
    k = 2 * math.pi / problem.length
    simulation.load_state(0, simulation.transform.to_spectral(1e-6 * torch.cos(k * x)[None]))
    before = simulation.state[0, 1].abs()
    after = simulation.advance(20).state[0, 1].abs()
    rate = -math.log(float(after / before)) / (20 * problem.dt)
    assert rate == pytest.approx(0.02 * k**2 + 0.3, rel=1e-3)


def test_the_forcing_is_its_formula(tmp_path):
    path = tmp_path / "extended.yaml"
    path.write_text(YAML.format(root=tmp_path / "runs", physics=PLANE))
    problem = reading.load(path).problem
    simulation = Simulation(problem, [0], 0)
    x, y = simulation.grid.coordinates()
    k = 2 * math.pi * 3 / problem.length
    field = simulation.transform.to_physical(
        problem.physics.forcing.spectrum(simulation.grid)[None]
    )
    torch.testing.assert_close(field[0], 0.2 * torch.cos(k * x) * torch.cos(k * y))


def test_the_site_profile_loads_for_every_verb():
    profile = load_profile(EXTEND / "site.yaml")
    assert profile.for_stage("train").options()["partition"] == "gpu"
    assert profile.for_stage("generate").options()["partition"] == "cpu"
