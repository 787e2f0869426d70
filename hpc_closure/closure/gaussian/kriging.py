r"""The Gaussian base law of the residual, and kriging under it.

The residual q of the mean has a variance :math:`S(|k|^2)` per group of equal :math:`|k|^2`,
estimated on members that were not used to fit the mean. The base law is N(0, Q) with this
spectrum. Point sensors condition it exactly (in float64, with a stated nugget), and Matheron's
rule draws from the conditioned law:

.. math:: P = Q - QH^T(HQH^T + R)^{-1}HQ, \qquad
          \xi_P = \xi - QH^T(HQH^T + R)^{-1}(H\xi + \eta),

with :math:`\xi \sim N(0, Q)` and sensor errors :math:`\eta \sim N(0, R)`.

A sensor reads all C fields at its place. Their law is :math:`q = F z` with fields z that are
independent of each other (:mod:`~hpc_closure.closure.gaussian.channel_covariance`), so readings
are linear in z: z is kriged under its diagonal law, and F turns it into q. A reading of one field
then corrects the others as far as they are correlated.
"""

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hpc_closure.closure.fields.modes import Band
from hpc_closure.closure.fields.sensors import regular_positions
from hpc_closure.closure.gaussian.channel_covariance import apply_channels
from hpc_closure.spectral.modes.grid import shell_sum, to_device_cached

__all__ = ["StationaryGaussian", "Kriging"]

CAP = 1e-6  # smallest share of the variance of a shell that is whitened
MOST_NUMBERS = 2048  # real numbers of a spectrum up to which a square matrix of them is cached
NUGGET = 1e-12  # added to the readings' covariance, over the variance of the law
ABSENT = 1e-20  # share of the variance that a field counts for at least


class StationaryGaussian:
    """Stationary Gaussian law with a variance per group of equal ``|k|^2``.

    Args:
        band: band of the residual.
        spectrum: (groups,) float64, variance per mode ``E|q_hat|^2``; of C channels (C, groups).
        tail: variance of the field beyond the band; it counts as an error of every sensor.

    Attributes:
        variance: pointwise variance of the field; of C channels a tensor (C,).
    """

    def __init__(self, band: Band, spectrum: Tensor, tail: float = 0.0):
        self.band, self.spectrum, self.tail = band, spectrum.double().cpu(), float(tail)
        self.variance = band.variance(self.spectrum)
        self._on: dict = {}

    def modes(self, name: str, like: Tensor) -> Tensor:
        """Return a property of every mode (2K + 1, K + 1), on the device of ``like``, cached.

        * ``std``, ``variance``: of the law.
        * ``mask``: 1 if the mode's shell carries more than ``CAP`` of the variance, else 0.
        * ``whiten``: 1 / std where ``mask`` is 1, else 0. Below ``CAP`` a network would model
          amplified round-off.
        * ``colour``: std where ``mask`` is 1, else 0.
        * ``importance``: weight of a whitened error in losses, half of it equal for all modes,
          half by variance. Neither the few strong modes nor the many weak modes then dominate.
        * ``inputs``: (2, ...) factors to fields of unit variance, with all modes equally strong,
          and with the spectrum of the law.

        Of C channels each is (C, ...), and ``inputs`` is (2, C, ...).
        """
        dtype = like.real.dtype if like.is_complex() else like.dtype
        key = (name, str(like.device), dtype)
        if key not in self._on:
            shell = self.band.group_shell
            power = shell_sum(self.spectrum, shell, self.band.group_size)
            total = self.variance[:, None] if self.spectrum.ndim > 1 else self.variance
            mask = (power[..., shell] > CAP * total) & (self.spectrum > 0)
            std = self.spectrum.sqrt()
            count = (mask * self.band.group_size).sum(-1, keepdim=std.ndim > 1).clamp(min=1)
            whiten = torch.where(mask, 1 / std.clamp(min=1e-300), 0.0)
            level = torch.tensor(
                [max(one, 1e-300) ** -0.5 for one in self._variances], dtype=std.dtype
            )
            level = level[:, None] if std.ndim > 1 else level
            values = {
                "inputs": torch.stack([whiten / self.band.white_rms, level.expand_as(std)]),
                "std": std,
                "variance": self.spectrum,
                "mask": mask.double(),
                "whiten": whiten,
                "importance": 0.5 * mask * (1 / count + self.spectrum / total),
                "colour": torch.where(mask, std, 0.0),
            }[name]
            self._on[key] = self.band.spread(values).to(device=like.device, dtype=dtype)
        return self._on[key]

    def rms(self, like: Tensor) -> Any:
        """Return the standard deviation of fields ``like``: a number, or (C, 1, 1) of channels."""
        if self.spectrum.ndim == 1:
            return math.sqrt(self.variance)
        return self.band.each(to_device_cached(self._channel_rms, like))

    @property
    def _variances(self) -> list[float]:
        return self.variance.tolist() if self.spectrum.ndim > 1 else [self.variance]

    @cached_property
    def _channel_rms(self) -> Tensor:
        return self.variance.clamp(min=1e-300).sqrt()

    def coloured(self, white: Tensor) -> Tensor:
        """Turn white noise (..., 2K + 1, K + 1) into draws of this law."""
        return white * self.modes("std", white)


def _paired(values: Tensor, band: Band) -> Tensor:
    """Repeat a value per mode for its real and imaginary part, (..., 2 modes)."""
    return values.flatten(-len(band.shape)).repeat_interleave(2, dim=-1)


def _factorised(matrix: Tensor, larger: Tensor) -> Tensor:
    """Compute Cholesky factors; those of ``matrix + larger`` where matrices are not positive."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if matrix.device.type != "cpu":  # reading ``info`` would make the host wait
        second, _ = torch.linalg.cholesky_ex(matrix + larger)
        return torch.where((info > 0)[..., None, None], second, factor)
    if bool((info > 0).any()):
        return torch.linalg.cholesky(matrix + larger)
    return factor


class Kriging:
    """Conditioning of a base law on point values at fixed positions.

    Readings of C fields are C S numbers, those of the first field first.

    Args:
        law: the base law.
        positions: (S, 2).
        noise_variance: (S,) or (B, S), variance of the sensors' errors; of C fields (C S,) or
            (B, C S).
        scale: (2K + 1, K + 1) factor of each mode of q in the readings, of C fields (C, ...);
            None = 1.
        channels: (2, C, C, 2K + 1, K + 1) factors F across C fields; None for one field.
    """

    def __init__(
        self,
        law: StationaryGaussian,
        positions: Tensor,
        noise_variance: Tensor,
        scale: Tensor | None = None,
        channels: Tensor | None = None,
    ):
        self.law, self.band, self.channels = law, law.band, channels
        self.fields = len(law.spectrum) if law.spectrum.ndim > 1 else 1
        device = noise_variance.device
        # share: variance of the readings over that of the law
        self.phases, share = law.band.phases(positions, device), torch.ones(self.fields)
        if scale is not None:
            self.phases = self.phases * _paired(scale, self.band)[..., None, :]
            modes = law.modes("variance", scale) * law.band.weights.to(scale)
            axes = tuple(range(-len(self.band.shape), 0))
            share = ((modes * scale.square()).sum(axes) / modes.sum(axes).clamp(min=1e-300)).cpu()
        self._variance = _paired(law.band.spread(law.spectrum), self.band).flatten().to(device)
        weights = _paired(law.band.weights, self.band).to(device)
        self._weighted = weights.repeat(self.fields) * self._variance
        self._seen = self._of_independent(self.phases)
        covariance = (self._seen * self._weighted) @ self._seen.T
        size = torch.as_tensor(law.variance, dtype=torch.float64).view(-1).cpu()
        size = size.clamp(min=ABSENT * float(size.sum()))

        def of_readings(by_field: Tensor) -> Tensor:
            return by_field.repeat_interleave(len(positions)).to(device)

        # the variance beyond the band is known of all fields together
        tail = of_readings(share.double() * (law.tail * (size / size.sum())))
        self.error = noise_variance.double() + tail
        nugget, larger = (of_readings(one * share.double() * size) for one in (NUGGET, 1e-8))
        matrix = covariance + torch.diag_embed(self.error + nugget)
        # larger nugget for coincident sensors, or more exact sensors than modes
        larger = torch.diag_embed(larger.expand_as(self.error))
        self.factor = _factorised(matrix, larger)
        self._std: dict[int, Tensor] = {}
        self._gain: Tensor | None = None
        self._rest: Tensor | None = None

    def _of_independent(self, phases: Tensor) -> Tensor:
        """Turn phases (S, 2 modes) or (C, S, 2 modes) of q into those of z, (C S, C 2 modes)."""
        if self.fields == 1:
            return phases.view(-1, phases.shape[-1])
        phases = phases.expand(self.fields, *phases.shape[-2:])
        if self.channels is None:
            return torch.block_diag(*phases)
        factors = torch.complex(*self.channels.to(phases)).flatten(2)
        pairs = torch.view_as_complex(phases.unflatten(-1, (-1, 2)).contiguous())
        # the phases are conjugate: their product with real pairs is Re(sum F z e^(i k.x))
        out = torch.einsum("ism,ijm->isjm", pairs, factors.conj())
        return torch.view_as_real(out.resolve_conj()).flatten(-2).flatten(2).flatten(0, 1)

    def at_sensors(self, q_hat: Tensor) -> Tensor:
        """Evaluate spectra at the sensors; returns (..., S), of C fields (..., C S), float64."""
        if self.fields == 1:
            return self.band.at(q_hat, self.phases)
        if self.phases.ndim == 2:
            return self.band.at(q_hat, self.phases).flatten(-2)
        axis = -1 - len(self.band.shape)
        each = zip(q_hat.unbind(axis), self.phases)
        return torch.cat([self.band.at(one, phases) for one, phases in each], dim=-1)

    def field(self, innovation: Tensor) -> Tensor:
        """Compute posterior mean spectra (M, 2K + 1, K + 1), complex128, of innovations (M, S).

        If the errors differ between B states, innovations b M/B to (b + 1) M/B - 1 belong to state
        b. Of C fields spectra (M, C, 2K + 1, K + 1) of innovations (M, C S).
        """
        if self.factor.ndim == 3:
            each = innovation.double().unflatten(0, (len(self.factor), -1))
            alpha = torch.cholesky_solve(each.mT, self.factor).mT.flatten(0, 1)
            pairs = alpha @ (self._seen * self._variance)
        else:
            pairs = innovation.double() @ self._gain_of_all()
        shape = (self.fields,) if self.law.spectrum.ndim > 1 else ()
        z_hat = torch.view_as_complex(pairs.unflatten(-1, (*shape, *self.band.shape, 2)))
        return z_hat if self.channels is None else apply_channels(self.channels, z_hat)

    def remove(self, q_hat: Tensor, errors: Tensor | None = None) -> Tensor:
        """Turn prior draws into posterior fluctuations, q - K(Hq + errors) (Matheron's rule).

        Returns spectra, complex128.
        """
        values = self.at_sensors(q_hat)
        if errors is not None:
            values = values + errors
        return q_hat.to(torch.complex128) - self.field(values)

    def project(self, q_hat: Tensor) -> Tensor:
        """Compute q - KHq, spectra, complex128."""
        sensors, numbers = self._seen.shape
        several = self.law.spectrum.ndim > 1
        if self.factor.ndim == 3 or several or numbers > min(2 * sensors, MOST_NUMBERS):
            return self.remove(q_hat)
        if self._rest is None:  # a product with 1 - KH costs less than two products
            weights = _paired(self.band.weights, self.band).to(self.phases)
            seen = weights[:, None] * self.phases.T
            self._rest = torch.eye(numbers).to(seen) - seen @ self._gain_of_all()
        pairs = torch.view_as_real(q_hat.to(torch.complex128))
        pairs = pairs.flatten(-1 - len(self.band.shape)) @ self._rest
        return torch.view_as_complex(pairs.unflatten(-1, (*self.band.shape, 2)))

    def _gain_of_all(self) -> Tensor:
        """Return the gain K^T, (S, 2 modes), if the errors are the same for all states."""
        if self._gain is None:
            self._gain = torch.cholesky_solve(self._seen * self._variance, self.factor)
        return self._gain

    def std(self, size: int) -> Tensor:
        """Compute the posterior standard deviation over the prior's, (B or 1, n, n); cached.

        Of C fields it is (B or 1, C, n, n), each over its own.
        """
        if size in self._std:
            return self._std[size]
        sides = self.band.grid.dimensions
        places = regular_positions(size, self.band.length, sides)
        points = self._of_independent(self.band.phases(places, self.phases.device))
        cross = (self._seen * self._weighted) @ points.T
        factor = self.factor if self.factor.ndim == 3 else self.factor[None]
        cross = cross.expand(len(factor), -1, -1)
        half = torch.linalg.solve_triangular(factor, cross, upper=False)
        known = half.square().sum(1).unflatten(-1, (self.fields, -1))
        if self.fields > 1:
            prior = (points.square() * self._weighted).sum(-1).unflatten(-1, (self.fields, -1))
            left = 1 - known / prior.clamp(min=1e-300)
        else:
            variance = float(torch.as_tensor(self.law.variance).sum())
            left = 1 - known / max(variance, 1e-300)
        several = (self.fields,) if self.law.spectrum.ndim > 1 else ()
        shape = len(left), *several, *(size,) * sides
        self._std[size] = left.clamp(min=0).sqrt().reshape(shape)
        return self._std[size]
