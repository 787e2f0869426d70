r"""Coordinates of the residual q, :math:`U = m + D\,q`, with a band and a grid for q."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpc_closure.closure.fields.members import for_members
from hpc_closure.closure.fields.modes import Band, band
from hpc_closure.closure.fields.sensors import Sensors
from hpc_closure.closure.gaussian.kriging import StationaryGaussian
from hpc_closure.spectral.modes.grid import to_device_cached

__all__ = ["StateConditions", "ResidualCoordinates"]


@dataclass
class StateConditions:
    """Quantities that depend on the state only, for B states.

    Attributes:
        state_hat: (B, ...) spectra of the state in the model's band; of C channels, here and
            below, (B, C, ...).
        mean_hat: (B, ...) spectra of m(V) in the model's band.
        features: (B, C, g, g) condition channels on the generator's grid; (B, 0, 1, 1) for a model
            without networks.
        summary: (B, 51) numbers of the state (:meth:`Band.summary`), normalised, or (B, 51 C);
            (B, 0) for a model without networks.
        log_amplitude: (B, g, g) log D; None if D = 1.
    """

    state_hat: Tensor
    mean_hat: Tensor
    features: Tensor
    summary: Tensor
    log_amplitude: Tensor | None = None

    def rows(self, rows: list[int]) -> "StateConditions":
        """Select some of the states."""
        return StateConditions(
            self.state_hat[rows],
            self.mean_hat[rows],
            self.features[rows],
            self.summary[rows],
            None if self.log_amplitude is None else self.log_amplitude[rows],
        )


@dataclass(frozen=True)
class ResidualCoordinates:
    """Coordinates q in which residuals are learned and drawn: their band, grid and laws.

    Attributes:
        band: band of the model.
        kept: band of the residual.
        size: points per side of the generator's grid, g; a tuple if sides have different numbers.
        first: law of the residual of the regression.
        law: law of q; equal to ``first`` until it is estimated.
        plain: law of the residual for D = 1.
        state_std: standard deviation of the state's modes in the residual band; None if no network
            reads the whitened state.
        factors: (3, ...) covariance factors by wavevector, relative to ``law``
            (:mod:`~hpc_closure.closure.gaussian.mode_covariance`); None if they are not used.
        channels: (2, C, C, ...) factors across C channels of the law of q, relative to ``law``
            (:mod:`~hpc_closure.closure.gaussian.channel_covariance`); None for one field.
        plain_channels: those of ``plain``.
        offset: (25,) initial offset of two peaks of the whitened largest modes; None if not used.
        copula: law of the normal scores of q at points, up to their variance; None if not used.
        copula_channels: its factors across channels.
    """

    band: Band
    kept: Band
    size: Any
    first: StationaryGaussian
    law: StationaryGaussian
    plain: StationaryGaussian
    state_std: Tensor | None
    factors: Tensor | None = None
    offset: Tensor | None = None
    channels: Tensor | None = None
    plain_channels: Tensor | None = None
    copula: StationaryGaussian | None = None
    copula_channels: Tensor | None = None

    @property
    def points(self) -> tuple[int, ...]:
        """Shape of a field on the generator's grid, (g, g)."""
        return self.kept.points(self.size)

    def whiten_state(self, w_hat: Tensor) -> Tensor:
        """Whiten spectra (B, ...) of states in the model's band; returns the residual band.

        The result is complex64. No weak shell is masked, because the closure's small scales come
        from equally small scales of the state.
        """
        assert self.state_std is not None
        std = to_device_cached(self.state_std, w_hat)
        seen = std > 1e-7 * std.max()
        white = self.kept.resized(w_hat) / torch.where(seen, std, torch.inf)
        return white.to(torch.complex64)

    def field(self, q_hat: Tensor) -> Tensor:
        """Transform spectra in the residual band to fields (..., g, g)."""
        return self.kept.to_physical(q_hat, self.size)

    def standardise(self, residual_hat: Tensor, log_amplitude: Tensor | None) -> Tensor:
        """Divide residual spectra in the model's band by D; returns spectra (B, ...) of q."""
        if log_amplitude is None:
            return self.kept.resized(residual_hat)
        field = self.band.to_physical(residual_hat, self.size)
        return self.kept.to_spectral(field * torch.exp(-log_amplitude).to(field))

    def amplify(self, q_hat: Tensor, log_amplitude: Tensor | None) -> Tensor:
        """Multiply spectra (M, ...) of q by D; returns spectra (M, ...) in the model's band.

        Inverse of :meth:`standardise`. Amplitude b of B is for rows b M/B to (b + 1) M/B - 1.
        """
        if log_amplitude is None:
            return self.band.resized(q_hat)
        field = self.field(q_hat)
        field = field * for_members(torch.exp(log_amplitude), len(field)).to(field)
        pairs = zip(self._full.mode_counts, self.band.mode_counts)
        modes = tuple(min(pair) for pair in pairs)
        grid_band = band(modes, self.band.length, self.band.grid.dimensions)
        return self.band.resized(grid_band.to_spectral(field))

    def at(self, field: Tensor, positions: Tensor) -> Tensor:
        """Interpolate fields (B, g, g) by Fourier modes at positions (S, 2); returns (B, S).

        Of fields (B, C, g, g) it returns (B, C, S).
        """
        return self._full.values(self._full.to_spectral(field), positions)

    @property
    def _full(self) -> Band:
        """Return the band of all modes of fields on the generator's grid."""
        modes = tuple(points // 2 - 1 for points in self.points)
        return band(modes, self.band.length, self.band.grid.dimensions)

    def each_mode(self, shells: Tensor, like: Tensor) -> Tensor:
        """Expand values (shells,) to every mode of the residual band, on ``like``'s device."""
        return to_device_cached(shells, like)[..., to_device_cached(self.kept.grid.shell(), like)]

    def innovation(self, encoding: StateConditions, sensors: Sensors) -> Tensor:
        """Compute innovations: readings minus the mean, divided by D; (B, S) float64.

        Of C fields they are (B, C S), those of the first field first.

        Args:
            encoding: conditions from the states.
            sensors: readings of U.
        """
        device = encoding.mean_hat.device
        fields = (encoding.mean_hat.shape[1],) if self.law.spectrum.ndim > 1 else ()
        shape = (-1, *fields, len(sensors.positions))
        values = sensors.values.to(device).double().reshape(shape)
        innovation = values - self.band.values(encoding.mean_hat, sensors.positions)
        if encoding.log_amplitude is not None:
            innovation = innovation * torch.exp(
                -self.at(encoding.log_amplitude.double(), sensors.positions)
            )
        return innovation.flatten(1)
