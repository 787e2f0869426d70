"""Switches of GPU code: off by default, read in one place; without its folders all else works."""

import subprocess
import sys
from pathlib import Path

import pytest
from rehearsal import CUDA_FOLDERS, without_cuda_folders
from test_imports import graph

from hpc_closure.spectral import switches

# the one place that imports each folder; folders import each other
SEAMS = {
    "spectral.cuda": {"spectral.simulation", "closure.fields.keyed_noise"},
    "closure.cuda": {"closure.artifact"},
    "train.cuda": {"train.engine"},
}


def test_all_are_off_by_default(monkeypatch):
    monkeypatch.delenv(switches.VARIABLE, raising=False)
    assert switches.active() == frozenset()
    assert not any(map(switches.is_on, switches.SWITCHES))


@pytest.mark.parametrize("name", switches.SWITCHES)
def test_each_is_set_alone(name, monkeypatch):
    monkeypatch.setenv(switches.VARIABLE, f" {name},")
    assert switches.active() == {name} and switches.is_on(name)


def test_a_wrong_name_is_one_line(monkeypatch):
    monkeypatch.setenv(switches.VARIABLE, "graphs,graph")
    line = "HPC_CLOSURE_CUDA=graphs,graph: 'graph' is no switch; expected some of graphs, fused, "
    with pytest.raises(ValueError, match=f"^{line}replays, captured, with commas, or nothing$"):
        switches.active()


def test_a_block_sees_its_own(monkeypatch):
    monkeypatch.setenv(switches.VARIABLE, "graphs")
    with switches.only("fused", "replays"):
        assert switches.active() == {"fused", "replays"}
        with switches.only():
            assert not switches.active()
        assert switches.active() == {"fused", "replays"}
    assert switches.active() == {"graphs"}
    with pytest.raises(ValueError, match="'all' is no switch"):
        with switches.only("all"):
            pass


@pytest.mark.parametrize("folder", SEAMS)
def test_one_seam_leads_to_each_folder(folder):
    own = tuple(name.removeprefix("hpc_closure.") for name in CUDA_FOLDERS)
    users = {
        module
        for module, others in graph().items()
        if not module.startswith(own) and any(other.startswith(folder) for other in others)
    }
    assert users == SEAMS[folder]


ALONE = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
from rehearsal import CUDA_FOLDERS, without_cuda_folders
with without_cuda_folders():
    import hpc_closure
    for module in pkgutil.walk_packages(hpc_closure.__path__, "hpc_closure."):
        if not module.name.startswith(CUDA_FOLDERS) and "__main__" not in module.name:
            importlib.import_module(module.name)
    import numpy as np
    from hpc_closure.spectral.problem import Problem
    from hpc_closure.spectral.simulation import Simulation
    from train_case import losses
    from hpc_closure.train.processes import Processes
    closure = hpc_closure.load("two_regimes")
    simulation = Simulation(Problem(grid=closure.model.grid), [0], 0).initialise().advance(2)
    field = simulation.fields(["vorticity"])["vorticity"][0]
    assert np.isfinite(closure.sample(field.numpy(), members=2)).all()
    assert len(losses("torch", 0, Processes(), preset="default")) > 1
    assert not any(name.startswith(CUDA_FOLDERS) for name in sys.modules)
print("works")
"""


def test_the_folders_can_be_deleted():
    """Every other module is imported, and the CPU steps, draws and trains, without them."""
    folder = str(Path(__file__).parent)
    run = subprocess.run([sys.executable, "-c", ALONE, folder], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip() == "works"


def test_the_test_would_notice():
    with without_cuda_folders(), pytest.raises(ModuleNotFoundError, match="is deleted"):
        import hpc_closure.spectral.cuda.graph  # noqa: F401
    import hpc_closure.spectral.cuda.steps  # noqa: F401
