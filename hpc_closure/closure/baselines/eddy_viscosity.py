"""Terms of the eddy viscosities, each of which has a file in ``baselines/kinds``.

All compute U from the resolved vorticity w without randomness. The filter width is the spacing of
the reduced solver's grid.
"""

import torch
from torch import Tensor

from hpc_closure.closure.fields.features import carried, divergence, feature_spectra, gradient
from hpc_closure.closure.fields.modes import Band
from hpc_closure.spectral.modes.grid import resize

__all__ = ["backscatter", "germano", "slope", "strain_rate", "viscous"]

TEST_FILTER = 2  # width of the test filter over the grid spacing


def strain_rate(w_hat: Tensor, band: Band, delta: float) -> Tensor:
    r"""Compute fields of :math:`\Delta^2 |S|`, with :math:`|S|^2 = 4 u_x^2 + (u_y + v_x)^2`."""
    kx, ky = (band.on(name, w_hat.device, w_hat.real.dtype) for name in ("kx", "ky"))
    u, v = feature_spectra(w_hat, band)[:, :2].unbind(1)
    parts = torch.stack([2j * kx * u, 1j * (ky * u + kx * v)], dim=1)
    return delta**2 * torch.hypot(*band.to_physical(parts, band.grid.size).unbind(1))


def slope(w_hat: Tensor, band: Band, delta: float) -> Tensor:
    r"""Compute fields (B, n, n) of :math:`\Delta^3 |\nabla w|`."""
    return delta**3 * torch.hypot(*gradient(w_hat, band).unbind(1))


def viscous(w_hat: Tensor, band: Band, delta: float, viscosity) -> Tensor:
    r"""Compute spectra (B, ...) of :math:`\nabla\cdot(\nu\nabla w)` for c = 1.

    Args:
        w_hat: (B, ...).
        band: band of w.
        delta: width of the filter.
        viscosity: :func:`strain_rate` or :func:`slope`.
    """
    nu = viscosity(w_hat, band, delta)[:, None]
    return divergence(nu * gradient(w_hat, band), band)


def mean_product(first_hat: Tensor, second_hat: Tensor, band: Band) -> Tensor:
    """Compute means over the square (B, 1, 1) of products of two fields, from their spectra."""
    weights = band.on("weights", first_hat.device, first_hat.real.dtype)
    return ((first_hat.conj() * second_hat).real * weights).sum((-2, -1), keepdim=True)


def backscatter(
    w_hat: Tensor, band: Band, delta: float, c: Tensor | float, returned: Tensor | float
) -> Tensor:
    """Compute spectra of a biharmonic viscosity and a negative one that returns its energy."""
    k2 = band.on("k2", w_hat.device, w_hat.real.dtype)
    inverse = band.on("inverse_k2", w_hat.device, w_hat.real.dtype)
    curvature = band.to_physical(-k2 * w_hat, band.grid.size)
    nu = delta**2 * strain_rate(w_hat, band, delta)
    drained = c**4 * k2 * band.to_spectral(nu * curvature)
    power = -mean_product(inverse * w_hat, drained, band)  # energy drain, the mean of -psi U
    negative = returned * power / mean_product(w_hat, w_hat, band).clamp(min=1e-300)
    return drained + negative * k2 * w_hat


def germano(w_hat: Tensor, band: Band, delta: float, viscosity) -> Tensor:
    """Compute spectra of a viscous term with Germano's dynamic constant, one per row."""

    def test(spectra: Tensor) -> Tensor:
        return resize(resize(spectra, band.modes // TEST_FILTER), band.modes)

    coarse = test(w_hat)
    resolved = viscous(w_hat, band, delta, viscosity)
    # d(test)/dt + J(test) = U(test), and the test filter of dw/dt + J(w) = U(w)
    moved, moved_coarse = (
        carried(spectra, spectra[:, None], band)[:, 0] for spectra in (w_hat, coarse)
    )
    stress = test(moved - moved_coarse)
    model = test(viscous(coarse, band, TEST_FILTER * delta, viscosity) - resolved)
    share = mean_product(stress, model, band)
    return (share / mean_product(model, model, band).clamp(min=1e-300)).clamp(min=0) * resolved
