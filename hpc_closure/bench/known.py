"""Data with a known law, and a model fitted to them, for measurements without a run folder."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_closure.bench.laws import StateAmplitude, TwoRegimes
from hpc_closure.closure.exact import ExactLaw
from hpc_closure.closure.interface import ClosureModel
from hpc_closure.closure.presets import build
from hpc_closure.experiment.schema import Train
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.transform import Transform
from hpc_closure.train.processes import Processes
from hpc_closure.train.trainer import Average, learning_rate, start_engine

CASES = ("diffusion", "amplitude", "regimes")
NOISE = {"kind": "q_wiener", "amplitude": 5e-5, "draws": 10, "correlation": 0.005}
CHUNK = 100
# first state of each kind: no two kinds share one
FIRST = {"fit": 0, "hold": 1_000_000, "valid": 2_000_000, "test": 3_000_000}


@dataclass
class Known:
    """A law p(U | V) and states drawn from the published initial law.

    Attributes:
        case: diffusion (Gaussian), amplitude (it follows the flow) or regimes (bimodal).
        grid: points per side.
        seed: of states and draws.
    """

    case: str
    grid: int = 64
    seed: int = 0

    def __post_init__(self):
        if self.case not in CASES:
            raise ValueError(f"case {self.case!r}: expected one of {', '.join(CASES)}")
        self.problem = Problem(grid=self.grid, noise=NOISE)
        self.exact = ExactLaw(self.problem, "diffusion")
        self.law = {
            "diffusion": lambda: self.exact,
            "amplitude": lambda: StateAmplitude(self.exact),
            "regimes": lambda: TwoRegimes(self.exact),
        }[self.case]()

    def states(self, kind: str, count: int, first: int = 0) -> Tensor:
        """Vorticity (count, n, n) float64 of a kind of ``FIRST``."""
        ids = range(FIRST[kind] + first, FIRST[kind] + first + count)
        grid = self.problem.make_grid()
        w_hat = self.problem.physics.initial.draw(grid, ids, self.seed, "bench")
        return Transform(grid).to_physical(w_hat)

    def draw(self, states: Tensor, first: int) -> Tensor:
        """One U for each state; ``first`` names the draws."""
        if hasattr(self.law, "draw"):
            ids = range(first, first + len(states))
            return self.law.draw(states, ids, self.seed + 1, 0)
        return self.law.sample(states, members=[first], seed=self.seed + 1)[0]

    def batches(self, kind: str, count: int) -> list[tuple[Tensor, Tensor]]:
        """Pairs (state, target) float32, ``count`` in all."""
        out = []
        for start in range(0, count, CHUNK):
            states = self.states(kind, min(CHUNK, count - start), start)
            targets = self.draw(states, FIRST[kind] + start)
            out.append((states.float(), targets.float()))
        return out


def fit(
    known: Known,
    *,
    samples: int = 2000,
    steps: int = 2000,
    batch: int = 64,
    config: dict | None = None,
) -> ClosureModel:
    """The default model, trained on fresh draws of the law, phase after phase.

    Args:
        known: the law.
        samples: states of each of ``fit`` and ``hold``; a quarter of it for ``valid``.
        steps: of the optimiser, all phases together; 0 fits the closed-form parts only.
        batch: of a step.
        config: differences from the ``default`` preset.
    """
    settings = Train(steps=max(steps, 1), batch=batch, lr=2e-3, engine="torch")
    torch.manual_seed(known.seed)
    model = build(config or {}, known.grid)
    data = {
        "fit": known.batches("fit", samples),
        "hold": known.batches("hold", samples),
        "valid": known.batches("valid", max(samples // 4, 1)),
    }
    total = sum(phase.share for phase in model.phases)
    for phase in model.phases:
        model.begin(phase.name, data[phase.members])
        phase_steps = round(steps * phase.share / total)
        if not phase_steps:
            continue
        worker = start_engine(model, settings, Processes())
        average = Average(worker.held(), settings.ema)
        states = torch.cat([state for state, _ in data[phase.members]])
        targets = torch.cat([target for _, target in data[phase.members]])
        choose = torch.Generator().manual_seed(known.seed)
        for step in range(phase_steps):
            indices = torch.randint(samples, (settings.batch,), generator=choose)
            drawn = {"state": states[indices], "target": targets[indices], "sample_index": indices}
            lr = learning_rate(settings, step, phase_steps)
            worker.step([(drawn, known.seed, step)], lr)
            average.update(worker.held(), step + 1)
        weights = worker.whole(average.tensors)
        worker.close()
        model.load_state_dict({**model.state_dict(), **weights})
    return model.eval()
