"""One held-out state answered many times: what the picture ``closure`` shows.

Beside the model stand the exact law and, where it has one, the model's own mean and Gaussian law
without its generator. Where the noise has two regimes a state is taken in which both are about
equally likely, for there one peak and two differ most.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_closure.closure.gaussian.exact import ExactLaw
from hpc_closure.closure.gaussian.fluctuation import Mixed
from hpc_closure.evaluate.context import Inputs
from hpc_closure.evaluate.methods import Methods
from hpc_closure.evaluate.stages.generated import BLOCK_BYTES

DRAWS = 1024
KEPT = 3  # samples whose fields are shown


@dataclass(frozen=True)
class OneState:
    """Answers to one state, all float64 on the CPU.

    Attributes:
        truth: (n, n), the closure of the DNS.
        samples: method -> (up to ``KEPT``, n, n), the model's first.
        spread: method -> (n, n) standard deviation; that of ``oracle`` is exact.
        values: method -> (draws,) the number of each sample that ``number`` names.
        number: what that number is.
        state: which state it is, in words.
    """

    truth: Tensor
    samples: Mapping[str, Tensor]
    spread: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    number: str
    state: str


def answer(inputs: Inputs) -> OneState | None:
    """The answers on the first grid scored; None without a law to compare with.

    That many samples are drawn as to cost an eighth of what the scores do, up to ``DRAWS``.
    """
    settings, grid = inputs.experiment.evaluate, inputs.experiment.score_grids[0]
    if inputs.closure.config["conditions"]["sensors"] == "required":
        return None
    snapshots = inputs.snapshots(grid)
    methods = Methods(inputs, snapshots, None, snapshots.closures)  # no climatology is asked for
    if methods.law is None:
        return None
    index, state = choose(methods.law, snapshots.states)
    here = torch.tensor([index])
    spread = {"oracle": methods.law.variance_at(snapshots.states[here])[0].sqrt()}
    weights, number = functional(methods.law, spread["oracle"])
    draws = min(DRAWS, max(32, settings.samples * settings.members // 8))
    draws = min(draws, max(2, BLOCK_BYTES // (8 * grid * grid)))
    samples: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    stride = max(1, draws // (KEPT + 1))  # those shown are spread evenly over all
    for name in (inputs.model, "mean_gp", "oracle"):
        if name in methods.samplers:
            drawn = methods.samplers[name](here, draws)[:, 0].double().cpu()
            values[name] = (drawn * weights).sum((-2, -1))
            if name != "oracle":
                samples[name], spread[name] = drawn[stride::stride][:KEPT], drawn.std(0)
    truth = torch.as_tensor(snapshots.closures[index]).double().cpu()
    return OneState(truth, samples, spread, values, number, state)


def choose(law: ExactLaw, states: Tensor) -> tuple[int, str]:
    """Index of the state to show, and what it is in words."""
    if not isinstance(law.fluctuation, Mixed):
        return 0, "the first held-out state"
    probability = law.fluctuation.probability(law.spectra(states))
    index = int((probability - 0.5).abs().argmin())
    return index, f"a held-out state with {100 * float(probability[index]):.0f} % for one regime"


def functional(law: ExactLaw, spread: Tensor) -> tuple[Tensor, str]:
    """Weights (n, n) that turn a field into one number, and what that is in words."""
    if isinstance(law.fluctuation, Mixed):
        x = 2 * math.pi / len(spread) * torch.arange(len(spread), dtype=torch.float64)
        return x.cos()[:, None].expand_as(spread) * 2 / spread.numel(), "amplitude of cos(2πx/L)"
    row, column = divmod(int(spread.argmax()), len(spread))
    weights = torch.zeros_like(spread)
    weights[row, column] = 1
    return weights, f"value at x, y = {row / len(spread):.2g}, {column / len(spread):.2g} L"
