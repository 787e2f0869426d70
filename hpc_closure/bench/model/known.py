"""Data with a known law, and a model fitted to them, for measurements without a run folder."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_closure.closure.artifact import build
from hpc_closure.closure.gaussian.exact import ExactLaw
from hpc_closure.closure.model import ClosureModel
from hpc_closure.data.samples import TrainingSet
from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.schema import Train
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.problem import Problem
from hpc_closure.train import trainer

PUBLISHED: dict[str, Any] = {"amplitude": 5e-5, "draws": 10}
#: noise of each case; a regime lasts a step, which is the averaging time of a closure here
CASES: dict[str, dict[str, Any]] = {
    "diffusion": {"kind": "q_wiener", **PUBLISHED},
    "amplitude": {"kind": "state_amplitude", "strength": 1.0, **PUBLISHED},
    "regimes": {"kind": "two_regimes", "hold": 1e-3, **PUBLISHED},
}
WHITE = 1e-7  # squared correlation length of a noise with all modes
CHUNK = 100
# number of the first state of each kind; the ranges do not overlap
FIRST = {"train": 0, "valid": 2_000_000, "test": 3_000_000}


@dataclass
class Known:
    """A law p(U | V) and states from the published initial law.

    Attributes:
        case: diffusion (Gaussian), amplitude (depends on the flow) or regimes (bimodal).
        grid: points per side.
        seed: seed of states and draws.
        correlation: squared correlation length of the noise. If the grid does not resolve it, the
            residual has all modes of the band.
    """

    case: str
    grid: int = 64
    seed: int = 0
    correlation: float = 0.005

    def __post_init__(self):
        if self.case not in CASES:
            raise ValueError(f"case {self.case!r}: expected one of {', '.join(CASES)}")
        noise = {**CASES[self.case], "correlation": self.correlation}
        self.problem = Problem(grid=self.grid, noise=noise)
        self.law = ExactLaw(self.problem, "diffusion")

    def states(self, kind: str, count: int, first: int = 0) -> Tensor:
        """Draw vorticity (count, n, n) float64 of a kind in ``FIRST``."""
        ids = range(FIRST[kind] + first, FIRST[kind] + first + count)
        grid = self.problem.make_grid()
        w_hat = self.problem.physics.initial.draw(grid, ids, self.seed, "bench")
        return Transform(grid).to_physical(w_hat)

    def draw(self, states: Tensor, first: int) -> Tensor:
        """Draw one U per state; ``first`` is the number of the first draw."""
        return self.law.draw(states, range(first, first + len(states)), self.seed + 1, 0)

    def batches(self, kind: str, count: int) -> list[tuple[Tensor, Tensor]]:
        """Draw pairs (state, target) float32 in batches, ``count`` pairs in total."""
        out = []
        for start in range(0, count, CHUNK):
            states = self.states(kind, min(CHUNK, count - start), start)
            targets = self.draw(states, FIRST[kind] + start)
            out.append((states.float(), targets.float()))
        return out

    def data(self, samples: int) -> trainer.TrainData:
        """Draw two halves of ``samples`` training states, and samples / 4 validation states."""
        drawn = (("train", 2 * samples), ("valid", max(samples // 4, 1)))
        sets = [Drawn(self, kind, count) for kind, count in drawn]
        return trainer.TrainData(
            *(TrainingSet(drawn_set, drawn_set.members, seed=self.seed) for drawn_set in sets)
        )


class Drawn:
    """Draws of a law as a data set in memory; each state is a trajectory.

    Args:
        known: the law.
        kind, count: kind and number of the states.
    """

    times = np.zeros(1)

    def __init__(self, known: Known, kind: str, count: int):
        self.members: Sequence[int] = range(count)
        self.grid, self.dimensions = known.grid, 2
        self.channels: tuple[str, ...] = ()
        pairs = known.batches(kind, count)
        self.fields = {
            name: torch.cat([pair[part] for pair in pairs])[:, None].numpy()
            for part, name in enumerate(("state", "closure"))
        }

    def read(
        self, member: int, index: int | slice, field: str = "state", grid: int | None = None
    ) -> np.ndarray:
        """Return fields (times, n, n) of a member; the grid is always the stored one."""
        return self.fields[field][member, index]


def fit(
    known: Known,
    *,
    samples: int = 2000,
    steps: int = 2000,
    batch: int = 64,
    config: dict | None = None,
    data: trainer.TrainData | None = None,
) -> ClosureModel:
    """Train the default model on fresh draws of the law.

    Args:
        known: the law.
        samples: states in each half of the training data; a quarter of it for validation.
        steps: optimiser steps of all phases together; 0 fits the closed forms only.
        batch: samples per step.
        config: differences from the ``default`` preset.
        data: result of :meth:`Known.data`; ``samples`` is then ignored.
    """
    torch.manual_seed(known.seed)
    model = build(config or {}, known.grid)
    data = data or known.data(samples)
    if not steps:
        for phase in model.phases:
            model.begin(phase.name, data.of(phase.members).passes)
        return model.eval()
    trained: list[ClosureModel] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = Train(steps=steps, batch=batch, lr=2e-3, engine="torch")
        plan = trainer.Plan(settings, known.seed, Run(Path(folder)))
        trainer.fit(model, data, plan, lambda model, path: trained.append(model))
    return trained[0].eval()
