"""Small closures with known laws, for the tests of the model."""

import math

import torch

from hpc_closure.closure import draws
from hpc_closure.closure.band import band
from hpc_closure.closure.build import build
from hpc_closure.closure.exact import ExactLaw
from hpc_closure.closure.published import LATEST, SENSORS_PER_SIDE, PublishedModel
from hpc_closure.closure.sensors import subgrid
from hpc_closure.spectral.problem import Problem

SIZE = 32
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
    w_hat = draws.white_spectra(b, 7, "state", range(first, first + count), 0) * shape
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
    model.begin("mean", batches_of(law, count))
    model.begin("generator", batches_of(law, count, first=10_000))
    model.begin("check", batches_of(law, count // 4, first=20_000))
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
