"""A deterministic baseline as a closure model.

:mod:`hpc_closure.train.tuning` chooses its constants in coupled runs; nothing is fitted one step
ahead.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hpc_closure.closure.fields.members import each_member
from hpc_closure.closure.fields.modes import Band, band
from hpc_closure.closure.model import ClosureModel, Phase, Request
from hpc_closure.closure.part_report import PartReport
from hpc_closure.experiment.kinds import equation_of
from hpc_closure.spectral.modes.grid import hermitian, resize, to_device_cached

__all__ = ["FunctionalModel"]


class Formula(Protocol):
    """Interface of a :class:`~hpc_closure.closure.baselines.base.Baseline`."""

    constants: Mapping[str, tuple[float, ...]]
    note: str

    def candidates(self, config: dict[str, Any]) -> list[tuple[float, ...]]:
        """List the tuples of constants to choose from."""

    def tendency(self, w_hat: Tensor, band: Band, delta: float, *constants: Any) -> Tensor:
        """Compute spectra of U."""


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
        self.band = band((grid - 1) // 3, length)
        self.constants = baseline.candidates(config)[0]
        self.width = length / grid
        self.equation = equation_of(config)
        if self.equation is not None:  # relative vorticity of each layer, from all fields
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
        if self.equation is None:
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

    @torch.no_grad()
    def sample_hat(self, request: Request) -> Tensor:
        modes, count = request.state.shape[-1] - 1, len(request.members)
        u_hat = self.tendency(resize(request.state, self.band.modes), self.constants)
        return each_member(hermitian(resize(u_hat, modes)), count)

    @torch.no_grad()
    def sample_batch(self, request: Request) -> Tensor:
        """Return U (members, n, n), or (members, C, n, n): members of a state have the same."""
        size, count = request.state.shape[-1], len(request.members)
        u_hat = self.tendency(self.band.to_spectral(request.state), self.constants)
        field = self.band.to_physical(u_hat, size).to(request.state)
        return each_member(field, count)
