"""Files of others on several ranks: the products of one process."""

import sys

import numpy as np
import outside_case as case
import pytest
from train_case import needs_deepspeed

from hpc_closure.experiment.folder import Run
from hpc_closure.generate import verb as generate
from hpc_closure.train import metrics
from hpc_closure.work.hdf5 import sha256_members
from hpc_closure.work.options import Options

VERB = [sys.executable, "-m", "hpc_closure"]
TRAIN = ["train.engine=deepspeed", "train.memory_gib=0.00001"]

LATER = {
    "model": {"width": 4, "modes": 2, "mean_layers": 1, "layers": 1, "function_evaluations": 2},
    "train": {"split": [0.6, 0.2, 0.2], "steps": 4, "batch": 4, "validate_every": 2},
    "rollout": {"t_start": 0.0, "t_end": 0.4, "every": 0.2, "interval": 2, "baselines": []},
    "evaluate": {"lead_times": [0.2]},
    "cluster": {"device": "cpu", "threads": 1, "members_per_block": 2},
}
REDUCED = """
import numpy as np

class Reduced:
    dt = 0.05

    def step(self, v, n):
        return v * np.exp(-0.1 * n * self.dt)
"""


def experiment(folder, name, closure=False):
    """Write data of others and an experiment that reads them."""
    path = folder / "a.nc"
    if not path.exists():
        case.netcdf(path, *case.fields(members=8, times=10))
        (folder / "my.py").write_text(REDUCED)
    section = case.section(path)
    values = {
        "name": name,
        "root": str(folder / "runs"),
        "data": section,
        "reduced": {"python": f"{folder / 'my.py'}:Reduced"},
        **LATER,
    }
    if not closure:  # it is computed
        del section["closure"]
        values["reduced"]["grid"] = case.N
    return case.experiment(folder, section, **{k: v for k, v in values.items() if k != "data"})


def products(loaded):
    """Content of each member of the computed closures."""
    found = {}
    for path in sorted(Run.of(loaded).data.rglob("*.h5")):
        found |= sha256_members(path)
    return found


@pytest.mark.mpi
def test_ranks_compute_the_closures_of_one_process(tmp_path, mpirun):
    one = experiment(tmp_path, "one")
    assert generate.run(one, Options()) == 0
    two = experiment(tmp_path, "two")
    done = mpirun(2, [*VERB, "generate", tmp_path / "two.yaml"])
    assert done.returncode == 0, done.stderr
    assert products(one) == products(two) and len(products(one)) == 8


@pytest.mark.mpi
@needs_deepspeed
def test_processes_have_the_losses_of_one(tmp_path, mpirun):
    losses = []
    for name, processes in (("one", 1), ("two", 2)):
        loaded = experiment(tmp_path, name, closure=True)
        done = mpirun(processes, [*VERB, "train", tmp_path / f"{name}.yaml", *TRAIN])
        assert done.returncode == 0, done.stderr
        rows = metrics.read(Run.of(loaded).metrics)
        losses.append([row["loss"] for row in rows if row.get("loss") is not None])
    assert len(losses[0]) >= 2
    np.testing.assert_allclose(*losses, rtol=1e-6)
