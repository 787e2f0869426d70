"""A deterministic baseline as a closure model.

:mod:`hpc_closure.train.tuning` chooses its constants in coupled runs; nothing is fitted one step
ahead.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.members import each_member
from hpc_closure.closure.fields.modes import Band, band
from hpc_closure.closure.fields.persistence import position, share_of_mean
from hpc_closure.closure.model import ClosureModel, Phase, Request
from hpc_closure.closure.part_report import PartReport
from hpc_closure.experiment.kinds import equation_of
from hpc_closure.spectral.modes.grid import mode_counts, to_device_cached
from hpc_closure.spectral.modes.resolution import per_side, retained_modes

__all__ = ["FunctionalModel"]


class Formula(Protocol):
    """Interface of a :class:`~hpc_closure.closure.baselines.base.Baseline`."""

    constants: Mapping[str, tuple[float, ...]]
    note: str
    draws: bool
    later: tuple[str, ...]

    def candidates(
        self, config: dict[str, Any], best: tuple[float, ...] | None = None
    ) -> list[tuple[float, ...]]:
        """List the tuples of constants to choose from."""

    def tendency(self, w_hat: Tensor, band: Band, delta: float, *constants: Any) -> Tensor:
        """Compute spectra of U."""

    def noise(
        self, w_hat: Tensor, white: Tensor, band: Band, delta: float, *constants: Any
    ) -> Tensor:
        """Compute spectra of the random part of U."""

    def memory(self, *constants: float) -> float:
        """Return the calls after which the noise is another."""


class FunctionalModel(ClosureModel):
    """A baseline with its constants, as a closure model.

    Args:
        baseline: the formula.
        config, grid, length: see :class:`~hpc_closure.closure.model.ClosureModel`.

    Attributes:
        constants: constants of the formula; the first candidate until they are tuned.
    """

    def __init__(self, baseline: Formula, config: dict[str, Any], grid: int, length: float = 1.0):
        super().__init__(config, grid, length)
        self.baseline, self.kind = baseline, config["preset"]
        self.equation = equation_of(config)
        self.dimensions = int(config.get("dimensions", 2))
        self.band = band(retained_modes(grid), length, self.dimensions)
        self.constants = baseline.candidates(config)[0]
        self.width = _width(self.grid, self.length)
        self.layered = self.equation is not None and not self.equation.velocity_channels
        if self.layered:  # relative vorticity of each layer, from all fields
            factors = self.equation.stream_factors(self.band.grid)
            self.vorticity_factors = factors * self.band.grid.k2

    def parts(self) -> list[PartReport]:
        symbols = ("c" if name == "coefficient" else name for name in self.baseline.constants)
        values = ", ".join(f"{name} = {value:g}" for name, value in zip(symbols, self.constants))
        name = self.kind.replace("_", " ")
        return [PartReport(name, False, True, (), values or self.baseline.note)]

    def phase_named(self, name: str) -> Phase:
        raise ValueError(f"model.preset={self.kind} has no phase {name!r}: it is tuned")

    def saved_statistics(self, spacing: float | None = None) -> dict[str, Tensor]:
        return {"constants": torch.tensor(self.constants, dtype=torch.float64)}

    def load_statistics(self, tensors: dict[str, Tensor]) -> None:
        self.constants = tuple(tensors["constants"].tolist())

    @property
    def score_active(self) -> bool:
        return False

    def tendency(self, w_hat: Tensor, constants: Sequence[Tensor | float]) -> Tensor:
        """Compute spectra (B, ...) of U in the model's band from those of w.

        Of C layers it is the formula of each layer's relative vorticity.

        Args:
            w_hat: (B, 2K + 1, K + 1), or (B, C, ...) of C layers.
            constants: numbers, or tensors (B, 1, 1) with one value per row.
        """
        if not self.layered:
            return self.baseline.tendency(w_hat, self.band, self.width, *constants)
        factors = to_device_cached(self.vorticity_factors, w_hat.real)
        vorticity = (w_hat[:, None] * factors).sum(2)
        layers = vorticity.shape[1]
        constants = [
            each.repeat_interleave(layers, 0) if isinstance(each, Tensor) else each
            for each in constants
        ]
        rates = self.baseline.tendency(vorticity.flatten(0, 1), self.band, self.width, *constants)
        return rates.unflatten(0, (-1, layers))

    def random_part(
        self,
        w_hat: Tensor,
        key: keyed_noise.Key,
        constants: Sequence[Tensor | float],
        memory: float,
        interval_ratio: float = 1.0,
    ) -> Tensor:
        """Draw spectra (M, ...) of the random part of U in the model's band.

        Args:
            w_hat: (M, ...) states, one per member.
            key: key of the draws; its item is the call.
            constants: as of :meth:`tendency`.
            memory: calls after which the noise is another; 0 = white in time.
            interval_ratio: averaging time in intervals for which the constants were tuned.
        """
        channels = tuple(w_hat.shape[1 : -len(self.band.axes)])

        def white(item: int, stream: int) -> Tensor:
            own = key._replace(item=item)
            return keyed_noise.white_fields(self.band, own, stream, w_hat.device, channels)

        if memory:
            first, cos, sin = position(key.item * interval_ratio, memory)
            stream = keyed_noise.STREAM_MEMORY
            noise = cos * white(first, stream) + sin * white(first + 1, stream)
        else:
            noise = white(key.item, keyed_noise.STREAM_BASE)
        if interval_ratio != 1:
            rho = torch.tensor(math.exp(-2 / memory) if memory else 0.0, dtype=torch.float64)
            noise = noise * share_of_mean(rho, interval_ratio).sqrt()
        return self.baseline.noise(w_hat, noise, self.band, self.width, *constants)

    def _draw(self, w_hat: Tensor, request: Request) -> Tensor:
        """Draw spectra (M, ...) of U in the model's band for states (B, ...)."""
        count = len(request.members)
        u_hat = each_member(self.tendency(w_hat, self.constants), count)
        if not self.baseline.draws:
            return u_hat
        key = keyed_noise.Key(request.seed, request.stage, request.members, request.call)
        memory = self.baseline.memory(*self.constants)
        states = each_member(w_hat, count)
        return u_hat + self.random_part(
            states, key, self.constants, memory, request.interval_ratio
        ).to(u_hat)

    @torch.no_grad()
    def sample_hat(self, request: Request) -> Tensor:
        counts = mode_counts(request.state, self.dimensions)
        caller = band(counts, self.length, self.dimensions)
        u_hat = self._draw(self.band.resized(request.state), request)
        return caller.hermitian(caller.resized(u_hat))

    @torch.no_grad()
    def sample_batch(self, request: Request) -> Tensor:
        """Return U (members, n, n), or (members, C, n, n).

        Members of a state have the same, unless the baseline draws.
        """
        u_hat = self._draw(self.band.to_spectral(request.state), request)
        points = request.state.shape[-self.dimensions :]
        return self.band.to_physical(u_hat, points).to(request.state)


def _width(grid: Any, length: Any) -> float:
    """Return the spacing of a grid, the geometric mean of those of unequal sides."""
    if not isinstance(grid, tuple) and not isinstance(length, tuple):
        return length / grid
    sides = len(grid if isinstance(grid, tuple) else length)
    pairs = zip(per_side(length, sides), per_side(grid, sides))
    return float(math.prod(side / points for side, points in pairs) ** (1 / sides))
