r"""The coordinates of the residual: :math:`U = m + D\,q`, q in a band and on a grid of its own."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hpc_closure.closure.band import Band, band
from hpc_closure.closure.law import BaseLaw
from hpc_closure.closure.sensors import Sensors
from hpc_closure.closure.shared import for_members
from hpc_closure.spectral.grid import resize
from hpc_closure.spectral.placed import placed

__all__ = ["Encoding", "Frame"]


@dataclass
class Encoding:
    """What the state alone decides, for B states.

    Attributes:
        state_hat: (B, ...) spectrum of the state in the model's band.
        mean_hat: (B, ...) spectrum of m(V) in the model's band.
        features: (B, C, g, g) condition channels on the generator's grid; (B, 0, 1, 1) for a model
            without networks.
        summary: (B, 51) numbers of the state (:meth:`Band.summary`), normalised; (B, 0) for a
            model without networks.
        log_amplitude: (B, g, g) log D, or None where D = 1.
    """

    state_hat: Tensor
    mean_hat: Tensor
    features: Tensor
    summary: Tensor
    log_amplitude: Tensor | None = None

    def rows(self, rows: list[int]) -> "Encoding":
        """That of some of the states."""
        parts = (getattr(self, field.name) for field in fields(self))
        return Encoding(*(None if part is None else part[rows] for part in parts))


@dataclass(frozen=True)
class Frame:
    """Where q lives.

    Attributes:
        band: of the model.
        kept: band of the residual.
        size: points per side of the generator's grid.
        first: law of what the regression leaves.
        law: law of q; that of ``first`` until it is known.
        plain: law of the residual where D = 1.
        state_std: standard deviation of the state's modes in the residual band, where it is read.
        factors: (3, ...) of the law of q by wavevector, over ``law`` (:mod:`mode_law`); None where
            nothing is drawn from it.
        offset: (25,) where two peaks of the whitened largest modes begin; None likewise.
    """

    band: Band
    kept: Band
    size: int
    first: BaseLaw
    law: BaseLaw
    plain: BaseLaw
    state_std: Tensor | None
    factors: Tensor | None = None
    offset: Tensor | None = None

    def whiten_state(self, w_hat: Tensor) -> Tensor:
        """Spectra (B, ...) in the model's band to whitened ones in the residual band, complex64.

        What the closure's small scales are made of is as small in the state: no shell is left out.
        """
        assert self.state_std is not None
        std = placed(self.state_std, w_hat)
        seen = std > 1e-7 * std.max()
        white = resize(w_hat, self.kept.modes) / torch.where(seen, std, torch.inf)
        return white.to(torch.complex64)

    def field(self, q_hat: Tensor) -> Tensor:
        """Spectra in the residual band to fields (..., g, g)."""
        return self.kept.to_physical(q_hat, self.size)

    def standardise(self, residual_hat: Tensor, log_amplitude: Tensor | None) -> Tensor:
        """Residual spectra in the model's band to q spectra (B, ...) in the residual band."""
        if log_amplitude is None:
            return resize(residual_hat, self.kept.modes)
        field = self.band.to_physical(residual_hat, self.size)
        return self.kept.to_spectral(field * torch.exp(-log_amplitude).to(field))

    def amplify(self, q_hat: Tensor, log_amplitude: Tensor | None) -> Tensor:
        """Inverse of :meth:`standardise`: spectra (M, ...) in the model's band.

        Each of B amplitudes is for M / B of q in a row.
        """
        if log_amplitude is None:
            return resize(q_hat, self.band.modes)
        field = self.field(q_hat)
        field = field * for_members(torch.exp(log_amplitude), len(field)).to(field)
        modes = min(self.size // 2 - 1, self.band.modes)
        grid_band = band(modes, self.band.length, self.band.grid.dimensions)
        return resize(grid_band.to_spectral(field), self.band.modes)

    def at(self, field: Tensor, positions: Tensor) -> Tensor:
        """Values (B, S), by Fourier interpolation, of fields on the generator's grid."""
        full = band(self.size // 2 - 1, self.band.length)
        return full.values(full.to_spectral(field), positions)

    def each_mode(self, shells: Tensor, like: Tensor) -> Tensor:
        """Values (shells,) at every mode of the residual band, on the device of ``like``."""
        return placed(shells, like)[placed(self.kept.grid.shell(), like)]

    def innovation(self, encoding: Encoding, sensors: Sensors) -> Tensor:
        """What sensors read beyond the mean, (B, S) float64, over D.

        Args:
            encoding: of the states.
            sensors: readings of U.
        """
        device = encoding.mean_hat.device
        values = sensors.values.to(device).double().reshape(-1, len(sensors.positions))
        innovation = values - self.band.values(encoding.mean_hat, sensors.positions)
        if encoding.log_amplitude is not None:
            innovation = innovation * torch.exp(
                -self.at(encoding.log_amplitude.double(), sensors.positions)
            )
        return innovation
