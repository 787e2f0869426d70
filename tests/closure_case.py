"""Small closures with known laws, for the tests of the model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hpc_closure.bench.model.known import FIRST, Known
from hpc_closure.closure.artifact import build
from hpc_closure.closure.baselines.published_model import LATEST, SENSORS_PER_SIDE, PublishedModel
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.fields.sensors import subgrid
from hpc_closure.closure.gaussian.exact import ExactLaw
from hpc_closure.data.samples import Past, TrainingSet
from hpc_closure.experiment.kinds import ModelKind, names
from hpc_closure.spectral.problem import Problem
from hpc_closure.train.trainer import TrainData

SIZE = 32
BASELINES = tuple(name for name in names(ModelKind) if ModelKind.known[name].tuned)
SMALL = {"width": 8, "modes": 4, "layers": 1, "mean_layers": 1}


def law_of(kind="diffusion", size=SIZE, correlation=0.01):
    noise = {"kind": "q_wiener", "amplitude": 5e-5, "draws": 10, "correlation": correlation}
    return ExactLaw(Problem(grid=size, noise=noise), kind)


def states_of(count, first=0, size=SIZE):
    """Smooth random vorticity (count, n, n), float64, rms about 1."""
    b = band((size - 1) // 3)
    k2 = b.grid.integer_k2.double()
    shape = (1 + k2 / 2) ** -2.2 * (k2 > 0)
    shape = shape / (shape.square() * b.weights).sum().sqrt()
    w_hat = keyed_noise.white_spectra(b, 7, "state", range(first, first + count), 0) * shape
    return b.to_physical(w_hat, size)


def batches_of(law, count, first=0, chunk=100):
    """Batches (state, target) of one draw per state, float32."""
    out = []
    for start in range(first, first + count, chunk):
        states = states_of(min(chunk, first + count - start), start, law.grid.size)
        if hasattr(law, "draw"):
            targets = law.draw(states, range(start, start + len(states)), 11, 0)
        else:
            targets = law.sample(states, members=[start], seed=11)[0]
        out.append((states.float(), targets.float()))
    return out


def fitted(law, count=400, **config):
    """A default model with closed-form statistics only: the networks stay untrained."""
    torch.manual_seed(0)
    model = build({**SMALL, **config}, law.grid.size)
    for phase in model.phases:
        first = {"fit": 0, "hold": 10_000, "train": 10_000, "valid": 20_000}[phase.members]
        few = count // 4 if phase.members == "valid" else count
        model.begin(phase.name, batches_of(law, few, first=first))
    return model


@torch.no_grad()
def score_loss(model: PublishedModel, states, targets, seed=0) -> float:
    """Denoising score matching of the published network, written again, with draws of its own."""
    generator = torch.Generator().manual_seed(seed)
    t = LATEST * torch.rand(len(states), generator=generator).clamp(min=1e-5)
    z = torch.randn(states.shape, generator=generator)
    sigma = torch.sqrt((26.0 ** (2 * t) - 1) / (2 * math.log(26.0)))[:, None, None]
    clean, sensors = model.factor * targets, None
    if model.network.upscaling != "none":
        sensors = model._field(subgrid(clean, SENSORS_PER_SIDE), states.shape[-1])
    out = model.network(t, clean + sigma * z, states, sensors)
    return float((out + z).square().sum((-2, -1)).mean())


# ---- laws whose mean no term of the regression spans --------------------------------------------

RMS = 0.26  # of the vorticity of the states of ``Known``


class MeanLaw:
    """U = s m(w / rms) + the noise of an exact law, s three standard deviations of the noise.

    Args:
        base: the law with that noise.
        mean: m, of spectra of the state and its fields on the grid to fields.
    """

    def __init__(self, base: ExactLaw, mean: Callable[[Tensor, ExactLaw], Tensor]):
        self.base, self.of = base, mean
        self.variance, self.scale = base.variance, 3 * math.sqrt(base.variance)

    def mean(self, states: Tensor) -> Tensor:
        """E[U | V], (B, n, n) float64, within the band."""
        to_spectral, to_physical = self.base.transform.to_spectral, self.base.transform.to_physical
        fields = self.of(states.double() / RMS, self.base)
        return self.scale * to_physical(to_spectral(fields))

    def draw(self, states: Tensor, ids: Sequence[int], seed: int, call: int) -> Tensor:
        """One U per state; ``ids`` key the draws."""
        noise = self.base.draw(states, ids, seed, call) - self.base.mean(states)
        return self.mean(states) + noise


def cubic_drag(w: Tensor, law: ExactLaw) -> Tensor:
    """-w^3: no product of two features."""
    return -w.pow(3) / 3


def one_way_kernel(w: Tensor, law: ExactLaw) -> Tensor:
    """kx^2 / k^2 of every mode: linear and non-local, but no function of |k|^2."""
    kx, k2 = law.grid.kx, law.grid.k2
    share = torch.where(k2 > 0, kx**2 / k2.clamp(min=1e-30), 0.0)
    return law.transform.to_physical(law.transform.to_spectral(w) * share)


def outside(mean: Callable[[Tensor, ExactLaw], Tensor], grid: int = 16) -> Known:
    """States and draws of a :class:`MeanLaw`."""
    known = Known("diffusion", grid)
    known.law = MeanLaw(known.law, mean)
    return known


# ---- a law with memory --------------------------------------------------------------------------


class Remembering(Known):
    """U depends on the state one snapshot before alone, by its square: no term has that.

    Args:
        grid: points per side.
        history: frames that samples carry.
    """

    def __init__(self, grid: int = 16, history: int = 1):
        super().__init__("diffusion", grid)
        self.history = history
        self.law = MeanLaw(self.law, lambda w, law: w.square() - 1)

    def data(self, samples: int) -> TrainData:
        drawn = (("train", 2 * samples), ("valid", samples // 4))
        return TrainData(*(self._set(kind, count) for kind, count in drawn))

    def pairs(self, kind: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Present and earlier states, independent of each other, and U given the earlier ones."""
        now, before = (self.states(kind, count, start) for start in (0, 500_000))
        return now, before, self.draw(before, FIRST[kind])

    def _set(self, kind: str, count: int) -> TrainingSet:
        now, before, target = self.pairs(kind, count)
        store = TwoTimes(torch.stack([before, now], 1), torch.stack([0 * target, target], 1))
        return TrainingSet(store, range(count), range(1, 2), past=Past(self.history))


class TwoTimes:
    """Two snapshots of many trajectories as a data set in memory."""

    times = np.arange(2.0)

    def __init__(self, states: Tensor, targets: Tensor):
        self.members, self.grid, self.dimensions = range(len(states)), states.shape[-1], 2
        self.channels: tuple = ()
        self.fields = {"state": states.numpy(), "closure": targets.numpy()}

    def read(self, member, index, field="state", grid=None):
        return self.fields[field][member, index]


def with_generator(preset):
    """A fitted model of a known law whose generator acts in every shell."""
    model = fitted(law_of(), 120, preset=preset).eval()
    kept = model.frame.kept.grid.num_shells
    model.adopt(replace(model.statistics, score_gain=torch.ones(kept)))
    assert model.score_active
    return model
