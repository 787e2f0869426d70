"""Recipes of docs/recipes that need a peer: run in small, from the data to the coupled run."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import four_verbs

from hpc_closure.experiment.folder import Run

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
