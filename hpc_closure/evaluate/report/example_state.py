"""Many closures sampled for one held-out state: the data of the figure ``closure``.

The model is compared with the exact law and, if it has them, with its own mean and Gaussian law
without the generator. If the noise has two regimes, a state is chosen in which both are about
equally likely: there a law with one peak differs most from the true law with two.
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
KEPT = 3  # number of samples whose fields are shown
SPREAD = 64  # samples of several fields, of which two are shown


@dataclass(frozen=True)
class OneState:
    """Closures sampled for one state, all float64 on the CPU.

    Attributes:
        truth: closure of the DNS, (n, n).
        samples: method -> samples (up to ``KEPT``, n, n); the model comes first.
        spread: method -> standard deviation (n, n); that of ``oracle`` is exact.
        values: method -> a scalar of each sample, (draws,), described by ``number``.
        number: name of that scalar.
        state: description of the state, in words.
    """

    truth: Tensor
    samples: Mapping[str, Tensor]
    spread: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    number: str
    state: str


@dataclass(frozen=True)
class FieldsOfState:
    """Closures of several fields at one state, all float64 on the CPU.

    Attributes:
        names: names of the C fields.
        tiles: title -> closure (C, n, n); the truth comes first.
        spread: standard deviation over the model's samples, (C, n, n).
        state: description of the state, in words.
    """

    names: tuple[str, ...]
    tiles: Mapping[str, Tensor]
    spread: Tensor
    state: str


def answer_of_fields(inputs: Inputs) -> FieldsOfState | None:
    """Sample closures of several fields for one state; None for one field, or on a line.

    Of the held-out snapshots that are scored, it is the one of median power, the mean over the
    fields of each field's power relative to its own mean.
    """
    settings, grid = inputs.experiment.evaluate, inputs.experiment.score_grids[0]
    if not inputs.channels or inputs.dimensions == 1:
        return None
    if inputs.closure.config["conditions"]["sensors"] == "required":
        return None
    snapshots = inputs.snapshots(grid)
    methods = Methods(inputs, snapshots, None, snapshots.closures)  # climatology is not sampled
    index = median(snapshots.closures)
    here = torch.tensor([index])
    tiles = {"truth (DNS)": snapshots.closures[index].double()}
    if inputs.replicas is not None:
        others = inputs.closures_of_replicas(snapshots.keys[index], grid)
        if len(others) > 1:
            tiles["DNS, same past"] = others[1].double()
    draws = min(SPREAD, settings.members)
    drawn = methods.samplers[inputs.model](here, draws)[:, 0].double().cpu()
    tiles |= {f"{inputs.model}: sample {i + 1}": one for i, one in enumerate(drawn[:2])}
    if "mean_gp" in methods.samplers and inputs.closure.model.score_active:
        tiles["no generator: sample"] = methods.samplers["mean_gp"](here, 1)[0, 0].double().cpu()
    return FieldsOfState(
        inputs.channels, tiles, drawn.std(0), "the held-out state of median power"
    )


def median(closures: Tensor) -> int:
    """Return the index of the snapshot of median power of closures (S, C, n, n)."""
    power = closures.double().square().flatten(2).mean(2)
    relative = (power / power.mean(0).clamp(min=1e-300)).mean(1)
    return int(relative.argsort()[(len(relative) - 1) // 2])


def answer(inputs: Inputs) -> OneState | None:
    """Sample closures for one state of the first scored grid; None without an exact law.

    The number of samples is an eighth of those that the scores use, at most ``DRAWS``.
    """
    settings, grid = inputs.experiment.evaluate, inputs.experiment.score_grids[0]
    if inputs.closure.config["conditions"]["sensors"] == "required":
        return None
    snapshots = inputs.snapshots(grid)
    methods = Methods(inputs, snapshots, None, snapshots.closures)  # climatology is not sampled
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
    stride = max(1, draws // (KEPT + 1))  # show samples evenly spaced in the sequence
    for name in (inputs.model, "mean_gp", "oracle"):
        if name in methods.samplers:
            drawn = methods.samplers[name](here, draws)[:, 0].double().cpu()
            values[name] = (drawn * weights).sum((-2, -1))
            if name != "oracle":
                samples[name], spread[name] = drawn[stride::stride][:KEPT], drawn.std(0)
    truth = torch.as_tensor(snapshots.closures[index]).double().cpu()
    return OneState(truth, samples, spread, values, number, state)


def choose(law: ExactLaw, states: Tensor) -> tuple[int, str]:
    """Choose the state to show; return its index and a description."""
    if not isinstance(law.fluctuation, Mixed):
        return 0, "the first held-out state"
    probability = law.fluctuation.probability(law.spectra(states))
    index = int((probability - 0.5).abs().argmin())
    return index, f"a held-out state with {100 * float(probability[index]):.0f} % for one regime"


def functional(law: ExactLaw, spread: Tensor) -> tuple[Tensor, str]:
    """Return weights (n, n) whose sum with a field is the scalar to show, and its name."""
    if isinstance(law.fluctuation, Mixed):
        x = 2 * math.pi / len(spread) * torch.arange(len(spread), dtype=torch.float64)
        return x.cos()[:, None].expand_as(spread) * 2 / spread.numel(), "amplitude of cos(2πx/L)"
    row, column = divmod(int(spread.argmax()), len(spread))
    weights = torch.zeros_like(spread)
    weights[row, column] = 1
    return weights, f"value at x, y = {row / len(spread):.2g}, {column / len(spread):.2g} L"
