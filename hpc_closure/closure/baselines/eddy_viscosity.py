"""Terms of the eddy viscosities, each of which has a file in ``baselines/kinds``.

All compute U from the resolved vorticity w without randomness; in three dimensions from the
velocity, spectra (B, 3, ...). The filter width is the spacing of the reduced solver's grid.
"""

import torch
from torch import Tensor

from hpc_closure.closure.fields.features import carried, divergence, feature_spectra, gradient
from hpc_closure.closure.fields.modes import Band, band
from hpc_closure.closure.fields.vectors import (
    EDDY,
    carried_by,
    solenoidal,
    strain_norm,
    vector_terms,
)

__all__ = ["backscatter", "germano", "random_rotation", "slope", "strain_rate", "viscous"]

TEST_FILTER = 2  # width of the test filter over the grid spacing


def strain_rate(w_hat: Tensor, band: Band, delta: float) -> Tensor:
    r"""Compute fields of :math:`\Delta^2 |S|`, with :math:`|S|^2 = 4 u_x^2 + (u_y + v_x)^2`.

    In three dimensions :math:`|S|^2 = 2 S_{ij}S_{ij}`.
    """
    if band.grid.dimensions == 3:
        return delta**2 * strain_norm(w_hat, band)
    kx, ky = (band.on(name, w_hat.device, w_hat.real.dtype) for name in ("kx", "ky"))
    u, v = feature_spectra(w_hat, band)[:, :2].unbind(1)
    parts = torch.stack([2j * kx * u, 1j * (ky * u + kx * v)], dim=1)
    return delta**2 * torch.hypot(*band.to_physical(parts, band.grid.sizes).unbind(1))


def slope(w_hat: Tensor, band: Band, delta: float) -> Tensor:
    r"""Compute fields (B, n, n) of :math:`\Delta^3 |\nabla w|`."""
    return delta**3 * torch.hypot(*gradient(w_hat, band).unbind(1))


def viscous(w_hat: Tensor, band: Band, delta: float, viscosity) -> Tensor:
    r"""Compute spectra (B, ...) of :math:`\nabla\cdot(\nu\nabla w)` for c = 1.

    In three dimensions, of :math:`P\,\partial_j(2\nu S_{ij})` with Smagorinsky's nu.

    Args:
        w_hat: (B, ...).
        band: band of w.
        delta: width of the filter.
        viscosity: :func:`strain_rate` or :func:`slope`.
    """
    if band.grid.dimensions == 3:
        return 2 * delta**2 * vector_terms(w_hat, band, [EDDY])[EDDY]
    nu = viscosity(w_hat, band, delta)[:, None]
    return divergence(nu * gradient(w_hat, band), band)


def mean_product(first_hat: Tensor, second_hat: Tensor, band: Band) -> Tensor:
    """Compute means over the square (B, 1, 1) of products of two fields, from their spectra.

    In three dimensions (B, 1, 1, 1, 1), of scalar products.
    """
    weights = band.on("weights", first_hat.device, first_hat.real.dtype)
    axes = tuple(range(1, first_hat.ndim))
    return ((first_hat.conj() * second_hat).real * weights).sum(axes, keepdim=True)


def backscatter(
    w_hat: Tensor, band: Band, delta: float, c: Tensor | float, returned: Tensor | float
) -> Tensor:
    """Compute spectra of a biharmonic viscosity and a negative one that returns its energy."""
    k2 = band.on("k2", w_hat.device, w_hat.real.dtype)
    inverse = band.on("inverse_k2", w_hat.device, w_hat.real.dtype)
    curvature = band.to_physical(-k2 * w_hat, band.grid.sizes)
    nu = delta**2 * strain_rate(w_hat, band, delta)
    drained = c**4 * k2 * band.to_spectral(nu * curvature)
    power = -mean_product(inverse * w_hat, drained, band)  # energy drain, the mean of -psi U
    negative = returned * power / mean_product(w_hat, w_hat, band).clamp(min=1e-300)
    return drained + negative * k2 * w_hat


def germano(w_hat: Tensor, own: Band, delta: float, viscosity) -> Tensor:
    """Compute spectra of a viscous term with Germano's dynamic constant, one per row.

    Args:
        w_hat: (B, ...).
        own: band of w.
        delta: width of the filter.
        viscosity: :func:`strain_rate` or :func:`slope`.
    """
    halves = tuple(count // TEST_FILTER for count in own.mode_counts)
    coarser = band(halves, own.length, own.grid.dimensions)

    def test(spectra: Tensor) -> Tensor:
        return own.resized(coarser.resized(spectra))

    def moved(spectra: Tensor) -> Tensor:
        if own.grid.dimensions == 3:
            return solenoidal(carried_by(spectra, spectra, own), own)
        return carried(spectra, spectra[:, None], own)[:, 0]

    coarse = test(w_hat)
    resolved = viscous(w_hat, own, delta, viscosity)
    # d(test)/dt + J(test) = U(test), and the test filter of dw/dt + J(w) = U(w)
    stress = test(moved(w_hat) - moved(coarse))
    model = test(viscous(coarse, own, TEST_FILTER * delta, viscosity) - resolved)
    share = mean_product(stress, model, own)
    return (share / mean_product(model, model, own).clamp(min=1e-300)).clamp(min=0) * resolved


def random_rotation(u_hat: Tensor, white: Tensor, own: Band, delta: float) -> Tensor:
    r"""Compute spectra (M, 3, ...) of :math:`\nabla\times(\Delta^2|S|^2 g)`, Leith's random force.

    g has three components, independent and white in space, with unit variance at a point (Leith,
    Phys. Fluids A 1990). The force has no divergence.

    Args:
        u_hat: (M, 3, ...) velocities.
        white: (M, 3, ...) spectra of white noise, unit variance per mode.
        own: band of both.
        delta: width of the filter.
    """
    size = own.grid.sizes
    g = own.to_physical(white.to(u_hat) / own.white_rms, size)
    potential = own.to_spectral(delta**2 * strain_norm(u_hat, own).square()[:, None] * g)
    k = torch.stack(torch.broadcast_tensors(*own.wavenumbers(potential)))
    i_potential = torch.complex(-potential.imag, potential.real)
    return torch.linalg.cross(k.to(potential).expand_as(potential), i_potential, dim=1)
