r"""The published model (Dong, Chen, Wu, J. Comput. Phys. 2025), for comparison.

Three parallel Fourier networks (noisy closure, vorticity, sensors) of 4 layers, 8 x 8 modes and
width 20 are joined by 1 x 1 convolutions. They learn the score of a variance-exploding SDE,
:math:`dx = 26^t\,dW`. A sample takes 10 Euler-Maruyama steps on a rho = 7 grid of the SDE time
from 0.1 to 1e-3. Sensors stand on a regular subgrid. Their values reach the grid by bicubic
interpolation of their lift (``interp``) or by a box filter (``conv``). The target is the closure
as defined in the publication, G = 2U for the diffusion term (``target_factor``).

docs/published.md lists the differences from the publication. Sources: the publication and its
authors' code, xdong99/SGM_FNO_Closure and AIMS-Madison/SBM_FNO_Closure on GitHub.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.members import each_member
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.fields.sensors import subgrid
from hpc_closure.closure.model import ClosureModel, Phase, Request
from hpc_closure.closure.networks.layers import CheckpointedModule, SpectralConv
from hpc_closure.closure.part_report import PartReport
from hpc_closure.closure.reductions import Reader
from hpc_closure.closure.sampling import PublishedVE, build_sampler
from hpc_closure.spectral.modes.resolution import retained_modes

__all__ = ["PublishedModel", "PublishedNetwork", "constant_loss", "white_loss"]

EMBEDDING = 256  # numbers of the time embedding
SENSORS_PER_SIDE = 16
LATEST = 2.0  # SDE times in training are uniform in (0, LATEST)


def _spectral(width: int, modes: int, form: str) -> SpectralConv:
    layer = SpectralConv(width, width, modes, form=form)
    nn.init.uniform_(layer.weight, 0.0, 1.0 / width**2)
    return layer


class Branch(CheckpointedModule):
    """Fourier network of one input field; (B, n, n) to (B, width, n, n).

    It lifts (field, x, y), then applies layers of spectral plus 1 x 1 convolution with GELU in
    between.
    """

    def __init__(self, width: int, modes: int, layers: int, form: str):
        super().__init__()
        self.lift = nn.Linear(3, width)
        self.spectral = nn.ModuleList(_spectral(width, modes, form) for _ in range(layers))
        self.local = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(layers))

    def lifted(self, field: Tensor) -> Tensor:
        """Lift a field (B, n, n) and its coordinates to (B, width, n, n)."""
        size = field.shape[-1]
        line = torch.linspace(0, 1, size, device=field.device, dtype=field.dtype)
        x, y = line[:, None].expand(size, size), line[None, :].expand(size, size)
        stacked = torch.stack([field, x.expand_as(field), y.expand_as(field)], dim=-1)
        return self.lift(stacked).permute(0, 3, 1, 2)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        for number in range(len(self.spectral)):
            x = self.through(partial(self._layer, number), x, shift)
        return x

    def _layer(self, number: int, x: Tensor, shift: Tensor | None) -> Tensor:
        x = self.spectral[number](x) + self.local[number](x)
        x = x if shift is None else x + shift
        return x if number == len(self.spectral) - 1 else functional.gelu(x)


class PublishedNetwork(CheckpointedModule):
    """Network for sigma(t) s(x, t | w, sensors), s the score."""

    passes = ("forward",)

    def __init__(self, width: int, modes: int, layers: int, upscaling: str, form: str = "fft"):
        super().__init__()
        self.upscaling = upscaling
        self.noisy = Branch(width, modes, layers, form)
        self.state = Branch(width, modes, layers, form)
        count = 2
        if upscaling != "none":
            count = 3
            self.sensors = Branch(width, modes, layers, form)
        if upscaling == "interp":
            self.smooth = nn.Sequential(
                _spectral(width, modes, form), nn.GELU(), _spectral(width, modes, form)
            )
        # fixed random frequencies: saved with the weights but never trained
        self.frequencies: Tensor
        self.register_buffer("frequencies", 30.0 * torch.randn(EMBEDDING // 2))
        self.embed = nn.Linear(EMBEDDING, EMBEDDING)
        self.shift = nn.Linear(EMBEDDING, width)
        self.join = nn.Sequential(
            nn.Conv2d(count * width, 2 * width, 1),
            nn.GELU(),
            nn.Conv2d(2 * width, width, 1),
            nn.GELU(),
            nn.Conv2d(width, width, 1),
            nn.GELU(),
        )
        self.head = nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, 1))

    def forward(self, t: Tensor, x: Tensor, state: Tensor, sensors: Tensor | None) -> Tensor:
        """Compute the score times sigma, (B, n, n).

        Args:
            t: (B,) SDE times.
            x, state: (B, n, n).
            sensors: (B, s, s) for ``interp``, (B, n, n) for ``conv``, None for ``none``.
        """
        phase = 2 * math.pi * t[:, None] * self.frequencies
        embedded = self.embed(torch.cat([phase.sin(), phase.cos()], dim=-1))
        shift = self.shift(functional.silu(embedded))[..., None, None]
        parts = [
            self.noisy(self.noisy.lifted(x), shift),
            self.state(self.state.lifted(state)),
        ]
        if sensors is not None:
            lifted = self.sensors.lifted(sensors)
            if self.upscaling == "interp":
                size = x.shape[-1]
                lifted = functional.interpolate(lifted, size=(size, size), mode="bicubic")
                lifted = self.smooth(lifted)
            parts.append(self.sensors(lifted))
        joined = self.through(self.join, torch.cat(parts, dim=1))
        return self.through(self.head, joined.permute(0, 2, 3, 1))[..., 0]


def box_filter(values: Tensor, size: int) -> Tensor:
    """Spread sensor values (B, s, s) to fields (B, n, n), as published.

    The values are summed over boxes of 2 n/s - 1 points per side (7 at n/s = 4), with zeros
    between the sensors and outside the square. Then a linear map per field restores the minimum
    and maximum of the sensors.
    """
    stride = size // values.shape[-1]
    field = values.new_zeros(len(values), 1, size, size)
    field[:, 0, ::stride, ::stride] = values
    kernel = values.new_ones(1, 1, 2 * stride - 1, 2 * stride - 1)
    smooth = functional.conv2d(field, kernel, padding=stride - 1)[:, 0]
    low, high = smooth.amin((-2, -1), keepdim=True), smooth.amax((-2, -1), keepdim=True)
    least, most = values.amin((-2, -1), keepdim=True), values.amax((-2, -1), keepdim=True)
    share = (smooth - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)
    return least + share * (most - least)


def constant_loss(size: int) -> float:
    """Return the loss of the best constant score on a size x size grid: E|c + z|^2 at c = 0."""
    return float(size * size)


def white_loss(size: int, std: float) -> float:
    r"""Return the loss of the best score for white noise with the target's std s.

    The score of N(0, s^2) at every point is :math:`-\sigma x / (s^2 + \sigma^2)`. Its loss per
    point is :math:`E_t[s^2 / (s^2 + \sigma_t^2)]`, t uniform in (0, 2), here in closed form.
    """
    rate = 2 * math.log(PublishedVE().base)
    offset, last = rate * std**2 - 1, math.exp(-LATEST * rate)
    mean = (math.log1p(offset) - math.log1p(offset * last)) / offset if offset else 1 - last
    return size * size * std**2 * mean / LATEST


class MatchScore(Phase):
    """Train the whole network by denoising score matching."""

    def begin(self, model: "PublishedModel", reader: Reader) -> dict[str, Any]:
        squares, count = 0.0, 0
        for batch in reader:
            target = batch["target"] if isinstance(batch, dict) else batch[1]
            squares += float(target.square().sum(dtype=torch.float64))
            count += target.numel()
        squares, count = reader.sum(squares, count)
        std = model.factor * math.sqrt(squares / count)
        return {
            "loss of a constant score": f"{constant_loss(model.grid):.4g}",
            "loss of a score that knows the std alone": f"{white_loss(model.grid, std):.4g}",
        }

    def loss(self, model: "PublishedModel", batch: dict, seed: int, step: int) -> Tensor:
        """Match the denoising score (B,), summed over the points of a sample."""
        state = batch["state"].float()
        target = model.factor * batch["target"].float()
        size = target.shape[-1]
        ids = [int(i) for i in batch["sample_index"]]
        t = keyed_noise.uniforms(seed, "train", ids, step, 1)[:, 0].to(target)
        t = LATEST * (t * (1 - 1e-5) + 1e-5)
        z = keyed_noise.normals(seed, "train", ids, step, size * size).to(target)
        z = z.view(-1, size, size)
        sigma = model.schedule.sigmas(t)[:, None, None]
        sensors = None
        if model.network.upscaling != "none":
            sensors = model.carried(subgrid(target, SENSORS_PER_SIDE), size)
        score = model.network(t, target + sigma * z, state, sensors)
        return (score + z).square().sum((-2, -1))


class PublishedModel(ClosureModel):
    """The published network, loss and sampler as a ``ClosureModel``."""

    rescaled = False
    phases = (MatchScore("score", 1.0, "train"),)

    def __init__(self, config: dict[str, Any], grid: int, length: float = 1.0):
        super().__init__(config, grid, length)
        sensors = config["conditions"]["sensors"]
        if config["conditions"]["previous_states"]:
            raise ValueError(
                "model.preset=published reads no previous states: set conditions.previous_states=0"
            )
        if sensors == "optional":
            raise ValueError(
                "model.preset=published is trained either with sensors or without: set "
                "conditions.sensors to required or none"
            )
        upscaling = "none" if sensors == "none" else config["upscaling"]
        if upscaling not in ("none", "interp", "conv"):
            raise ValueError(f"model.upscaling={upscaling!r}, expected interp or conv")
        self.network = PublishedNetwork(
            config["width"],
            config["modes"],
            config["layers"],
            upscaling,
            config["spectral_convolution"],
        )
        self.factor = float(config["target_factor"])
        self.schedule = PublishedVE()

    def parts(self) -> list[PartReport]:
        return [PartReport("published score network", True, True)]

    def carried(self, values: Tensor, size: int) -> Tensor:
        """Carry values (B, s, s) of sensors to the grid, (B, size, size), or leave them there."""
        return box_filter(values, size) if self.network.upscaling == "conv" else values

    @torch.no_grad()
    def sample_batch(self, request: Request) -> Tensor:
        """Draw fields, see :class:`~hpc_closure.closure.model.ClosureModel`.

        Sensors must be regular, and samples are not rescaled to another interval.
        """
        state, sensors = request.state, request.sensors
        size, count = state.shape[-1], len(request.members)
        field = None
        if self.network.upscaling != "none":
            if sensors is None:
                raise ValueError(
                    "this model was trained with sensors: pass sensors=Sensors(values, positions)"
                )
            side = math.isqrt(len(sensors.positions))
            if side * side != len(sensors.positions) or size % side:
                raise ValueError("model.preset=published needs sensors on a regular subgrid")
            values = self.factor * sensors.values.to(state.device).float()
            field = each_member(self.carried(values.reshape(-1, side, side), size), count)
        elif sensors is not None:
            raise ValueError(
                "this model was trained with conditions.sensors=none: pass sensors=None"
            )
        key = keyed_noise.Key(request.seed, request.stage, request.members, request.call)
        states = each_member(state.float(), count)

        def white(stream: int) -> Tensor:
            flat = keyed_noise.normals(*key, size * size, stream)
            return flat.to(states).view(count, size, size)

        def denoise(x: Tensor, t: float) -> Tensor:
            times = torch.full((count,), t, device=states.device)
            return x + self.schedule.sigma(t) * self.network(times, x, states, field)

        sampler = build_sampler(
            request.method or self.config["method"],
            self.schedule,
            request.evaluations or self.config["function_evaluations"],
        )
        z = white(keyed_noise.STREAM_BASE)
        # as published, the initial noise does not include the variance of the data
        out = sampler(denoise, z, lambda index: white(keyed_noise.STREAM_STEP + index))
        return (out / self.factor).to(state.dtype)

    @torch.no_grad()
    def sample_hat(self, request: Request) -> Tensor:
        """Draw fields and transform them to spectra, because the model works on grid points."""
        modes = request.state.shape[-1] - 1
        solver = band(modes, self.length)
        own_size = self.grid if retained_modes(self.grid) == modes else solver.grid.size
        size = request.grid or own_size
        fields = replace(request, state=solver.to_physical(request.state, size))
        return solver.to_spectral(self.sample_batch(fields))
