"""``bench solver``: both contenders take the same steps."""

from pathlib import Path

import torch

from hpc_closure.bench.measure import Timing
from hpc_closure.bench.solver import bridge
from hpc_closure.spectral.outside.arrays import to_torch

SOLVER = f"{Path(__file__).parent / 'user_solvers' / 'vorticity_torch.py'}:Reduced"


def test_both_take_the_same_steps_and_are_recorded():
    alone, coupled = bridge._contenders(SOLVER, 16, 3, 2).values()
    first = to_torch(alone(1))
    assert first.shape == (3, 16, 16)
    assert torch.equal(first, to_torch(alone(1)))
    records = bridge.run(SOLVER, 16, 3, [1, 2], Timing(steps=2, repeats=2))
    assert [record["method"] for record in records[:2]] == ["solver alone", "in the package"]
    assert all(record["microseconds"] > 0 for record in records)
    coupled(1)
