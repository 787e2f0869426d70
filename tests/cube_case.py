"""A flow on a cube whose closure has a law known in closed form, for tests of closures."""

import math

import torch

from hpc_closure.closure.artifact import build
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.fields.vectors import carried_by, solenoidal

SIZE, MODES, LENGTH = 12, 3, 2 * math.pi
B = band(MODES, LENGTH, 3)
NONE = {"sensors": "none"}
SMALL = {"width": 6, "modes": 2, "layers": 1, "mean_layers": 1, "conditions": NONE}


EQUATION = {"equation": "navier_stokes_3d", "length": LENGTH}


def divergence(u_hat, b=B):
    """Rms divergence of velocities (..., 3, *modes) over the rms of their gradient."""
    k = torch.stack(torch.broadcast_tensors(*b.grid.k))
    along = (k * u_hat).sum(-4).abs().square() * b.weights
    gradient = u_hat.abs().square().sum(-4) * b.grid.k2 * b.weights
    return float((along.sum() / gradient.sum()).sqrt())


class CubeLaw:
    """U = 0.3 N(u) - 0.1 u + noise, all without divergence; N = -P(u.grad u)."""

    variance = 0.3 / (1 + B.grid.k2) ** 2 * (B.grid.k2 > 0)

    def _white(self, ids, seed, name):
        key = keyed_noise.Key(seed, name, ids, 0)
        white = keyed_noise.white_fields(B, key, 0, torch.device("cpu"), (3,))
        return solenoidal(white, B)

    def noise(self, ids, seed):
        return self._white(ids, seed, "law") * self.variance.sqrt()

    def states(self, ids):
        return self._white(ids, 1, "state") / (1 + B.grid.k2) * (B.grid.k2 > 0)

    def mean(self, u_hat):
        return 0.3 * solenoidal(carried_by(u_hat, u_hat, B), B) - 0.1 * u_hat

    def batches(self, first, count, chunk=100):
        out = []
        for start in range(first, first + count, chunk):
            ids = range(start, start + chunk)
            states = self.states(ids)
            target = self.mean(states) + self.noise(ids, 11)
            out.append(tuple(B.to_physical(part, SIZE).float() for part in (states, target)))
        return out


def fitted(count=300, **config):
    """A model with closed-form statistics only: the networks stay untrained."""
    torch.manual_seed(0)
    model = build({**SMALL, "dimensions": 3, "equation": EQUATION, **config}, SIZE, LENGTH)
    for phase in model.phases:
        first = {"fit": 0, "hold": 10_000, "train": 10_000, "valid": 20_000}[phase.members]
        model.begin(phase.name, CubeLaw().batches(first, count))
    return model
