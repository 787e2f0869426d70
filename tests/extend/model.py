"""A complete model from outside the package: a linear closure with white noise."""

import torch
from pydantic import Field
from torch import nn

from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.members import each_member
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.model import ClosureModel, Phase
from hpc_closure.closure.part_report import PartReport
from hpc_closure.spectral.modes.grid import hermitian, resize
from hpc_closure.spectral.recipe import Finite, Section


class FitFactor(Phase):
    """Fit the factor by least squares, and the noise to what it leaves."""

    def begin(self, model, reader):
        square, count = 0.0, 0
        for batch in reader:
            square += float(batch["target"].double().square().sum())
            count += batch["target"].numel()
        square, count = reader.sum(square, count)
        model.std = (square / count) ** 0.5
        return {"std": model.std}

    def loss(self, model, batch, seed, step):
        error = batch["target"] - model.factor * batch["state"]
        return error.square().mean((-2, -1)) / model.std**2


class Linear(ClosureModel):
    """U = a w + noise. Name it with ``model.preset: extend.model:Linear``."""

    phases = (FitFactor("factor", 1.0, "train"),)

    class Options(Section):
        """Keys of ``model.options``."""

        start: Finite = Field(0.0, description="first value of the factor")

    def __init__(self, config, grid, length=1.0):
        super().__init__(config, grid, length)
        self.band = band((grid - 1) // 3, length)
        self.factor = nn.Parameter(torch.tensor(float(config["options"]["start"])))
        self.std = 0.0

    def parts(self):
        return [PartReport(f"linear: {self.factor.item():.2g} w", True, True)]

    @torch.no_grad()
    def sample_hat(self, request):
        key = keyed_noise.Key(request.seed, request.stage, request.members, request.call)
        white = keyed_noise.white_spectra(self.band, *key, keyed_noise.STREAM_BASE, self.device)
        mean = self.factor * resize(request.state, self.band.modes)
        drawn = each_member(mean, len(request.members)) + self.std * white
        return hermitian(resize(drawn, request.state.shape[-1] - 1))

    @torch.no_grad()
    def sample_batch(self, request):
        key = keyed_noise.Key(request.seed, request.stage, request.members, request.call)
        white = keyed_noise.white_spectra(self.band, *key, keyed_noise.STREAM_BASE, self.device)
        mean = self.factor * self.band.to_spectral(request.state)
        drawn = each_member(mean, len(request.members)) + self.std * white
        return self.band.to_physical(drawn, request.state.shape[-1])

    def saved_statistics(self, spacing=None):
        return {"std": torch.tensor(self.std, dtype=torch.float64)}

    def load_statistics(self, tensors):
        self.std = float(tensors["std"])
