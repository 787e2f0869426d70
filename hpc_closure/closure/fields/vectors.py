r"""Terms of a velocity whose components are fields of the state, for any number of sides.

Spectra of a velocity are (..., d, *modes), one component per side, and its gradient
:math:`A_{ij} = \partial_j u_i` is split into strain and rotation, :math:`A = S + W`. All products
are formed on the alias-free grid of the band. The part without divergence is

.. math:: (Pu)(k) = u - k\,(k\cdot u) / |k|^2 .

The terms of :func:`vector_terms` turn with the axes, so that one coefficient per :math:`|k|^2`
serves all components: the resolved nonlinear term, the eddy viscosity of Smagorinsky, and the
divergence of the tensors that are quadratic in the gradient, among them the gradient model,
:math:`AA^T = SS - WW - (SW - WS)` (Clark, Ferziger, Reynolds, J. Fluid Mech. 1979).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hpc_closure.closure.fields.modes import Band

__all__ = [
    "QUADRATIC",
    "carried_by",
    "gradients",
    "solenoidal",
    "strain_norm",
    "stress_divergence",
    "vector_terms",
]

ADVECTION, EDDY = "u.grad u", "div |S|S"
QUADRATIC = (ADVECTION, EDDY, "div SS", "div SW", "div WW")


def gradients(fields_hat: Tensor, band: Band) -> Tensor:
    """Compute spectra (..., d, *modes) of the derivatives along each side, from (..., *modes)."""
    i_f = torch.complex(-fields_hat.imag, fields_hat.real)
    each = [i_f * k for k in band.wavenumbers(i_f)]
    return torch.stack(each, dim=band.axes[0] - 1)


def solenoidal(u_hat: Tensor, band: Band) -> Tensor:
    """Remove the part along k of velocities (..., d, *modes)."""
    axis = band.axes[0] - 1
    k = torch.stack(torch.broadcast_tensors(*band.wavenumbers(u_hat)))
    inverse = band.on("inverse_k2", u_hat.device, u_hat.real.dtype)
    return u_hat - k * ((k * u_hat).sum(axis, keepdim=True) * inverse)


def carried_by(u_hat: Tensor, fields_hat: Tensor, band: Band) -> Tensor:
    r"""Compute spectra (B, F, *modes) of :math:`-u\cdot\nabla f`, free of aliasing.

    Args:
        u_hat: (B, d, *modes) velocity.
        fields_hat: (B, F, *modes) fields f.
        band: band of both.
    """
    size, axis = band.grid.sizes, band.axes[0] - 1
    u = band.to_physical(u_hat, size)[:, None]
    slopes = band.to_physical(gradients(fields_hat, band), size)
    return band.to_spectral(-(u * slopes).sum(axis))


def _gradient_parts(u_hat: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """Compute fields of strain and rotation, each (..., d, d, *points), on the alias-free grid."""
    axis = band.axes[0] - 1
    slopes = band.to_physical(gradients(u_hat, band), band.grid.sizes)
    turned = slopes.transpose(axis, axis - 1)
    return 0.5 * (slopes + turned), 0.5 * (slopes - turned)


def _norm(strain: Tensor, band: Band) -> Tensor:
    axis = band.axes[0] - 1
    return (2 * strain.square().sum((axis, axis - 1))).sqrt()


def strain_norm(u_hat: Tensor, band: Band) -> Tensor:
    r"""Compute fields (..., *points) of :math:`|S| = (2 S_{ij}S_{ij})^{1/2}`."""
    return _norm(_gradient_parts(u_hat, band)[0], band)


def stress_divergence(tensor: Tensor, band: Band) -> Tensor:
    r"""Compute spectra (..., d, *modes) of :math:`P\,\partial_j T_{ij}`.

    Args:
        tensor: fields (..., d, d, *points) of a symmetric tensor, on a grid of the band.
        band: band of the result.
    """
    axis = band.axes[0] - 1
    parts = band.to_spectral(tensor)
    i_parts = torch.complex(-parts.imag, parts.real)
    k = torch.stack(torch.broadcast_tensors(*band.wavenumbers(i_parts)))
    return solenoidal((i_parts * k).sum(axis), band)


def _matmul(first: Tensor, second: Tensor, band: Band) -> Tensor:
    """Multiply tensors (..., d, d, *points) at every point."""
    axis = band.axes[0] - 1
    return (first.unsqueeze(axis) * second.unsqueeze(axis - 2)).sum(axis - 1)


def vector_terms(u_hat: Tensor, band: Band, names: Sequence[str]) -> dict[str, Tensor]:
    """Compute spectra (B, d, *modes) of terms of :data:`QUADRATIC` from velocities of that shape.

    All are free of divergence.
    """
    out, wanted = {}, [name for name in names if name in QUADRATIC]
    if ADVECTION in wanted:
        out[ADVECTION] = solenoidal(carried_by(u_hat, u_hat, band), band)
    if set(wanted) <= {ADVECTION}:
        return out
    strain, rotation = _gradient_parts(u_hat, band)
    for name in wanted:
        if name == EDDY:
            axis = band.axes[0] - 1
            size = _norm(strain, band).unsqueeze(axis).unsqueeze(axis)
            out[name] = stress_divergence(size * strain, band)
        elif name == "div SS":
            out[name] = stress_divergence(_matmul(strain, strain, band), band)
        elif name == "div WW":
            out[name] = stress_divergence(_matmul(rotation, rotation, band), band)
        elif name == "div SW":
            both = _matmul(strain, rotation, band) - _matmul(rotation, strain, band)
            out[name] = stress_divergence(both, band)
    return out
