"""Recipes of docs/recipes in small, from the data to the coupled run."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import four_verbs

from hpc_closure.experiment.folder import Run

SMALL = """
base: subgrid_quick
name: small
physics: {viscosity: 1.0e-3, forcing: {kind: ring, wavenumber: 3, amplitude: 1.0},
          initial: {kind: band, wavenumber: 3, width: 1, energy: 0.02}}
generate: {grid: 32, dt: 1.0e-2, members: 12, t_end: 2.6, interval: 10,
           record: {start: 0.5, every: 0.1, grid: 16}}
model: {conditions: {previous_closures: 1}}
train: {split: [0.5, 0.25, 0.25]}
reduced: {step: 1}
replicas: {members: 0}
rollout: {members: 4, initial_conditions: 3, t_start: 1.6, t_end: 2.6, every: 0.1, interval: 10,
          rungs: []}
evaluate: {lead_times: [0.1, 1.0], samples: 12, members: 4}
cluster: {members_per_block: 4, device: cpu, threads: 1}
"""
RECIPES = Path(__file__).parent.parent / "docs" / "recipes"


def test_exponax_makes_the_data_and_runs_the_closure(tmp_path, monkeypatch):
    pytest.importorskip("exponax")
    shutil.copy(RECIPES / "kolmogorov.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "kolmogorov", raising=False)
    import kolmogorov

    kolmogorov.dns("dns.h5", members=10, snapshots=24, spin_up=20)
    recipe = (RECIPES / "kolmogorov.yaml").read_text()
    assert len(recipe.splitlines()) <= 12
    recipe = recipe.replace("{", "{{").replace("}", "}}")
    changes = ["root=" + str(tmp_path), "evaluate.formats=[]", "evaluate.samples=20"]
    changes += ["rollout.initial_conditions=2", "rollout.members=4", "rollout.t_end=2.6"]
    changes += ["evaluate.lead_times=[0.2,1]", "cluster.device=cpu", "cluster.threads=1"]
    run = Run.of(four_verbs(tmp_path, recipe, changes))
    assert (run.folder("evaluate") / "report.html").exists()
    inside = np.asarray(kolmogorov.run_inside(str(run.root), members=3, calls=4))
    assert inside.shape == (4, 3, 24, 24) and np.isfinite(inside).all()
    assert (inside[:, 0] != inside[:, 1]).any()


def test_readings_of_the_closure_lower_the_error(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sensors.NUMBERS", (4, 8))
    import sensors

    (tmp_path / "small.yaml").write_text(SMALL)
    scores = sensors.run("small.yaml", ["evaluate.formats=[]"])
    sensors.draw(scores, tmp_path / "sensors.png")
    assert (tmp_path / "sensors.png").stat().st_size > 10_000
    rows = pd.read_csv(scores, keep_default_na=False)
    rows = rows[(rows.stage == "coupled") & (rows.score == "crps") & (rows["shell"] == "")]
    crps = rows[rows.lead_time.astype(float) == 0.1].set_index("method")["value"].astype(float)
    assert crps["read_8"] < crps["model"] < 0.95 * crps["free"] < 0.5 * crps["none"]
