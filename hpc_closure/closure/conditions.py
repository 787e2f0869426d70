r"""Conditions of the closure: the resolved state, its history, sensors, an estimate of it.

From the vorticity spectrum, with :math:`-\Delta\psi = w` and :math:`(u, v) = (\psi_y, -\psi_x)`,
the features are u, v, w, w_x, w_y, computed by spectral derivatives: exact on any grid.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hpc_closure.closure.band import Band

__all__ = [
    "FEATURES",
    "Sensors",
    "coordinates",
    "feature_spectra",
    "physics_estimate",
    "regular_positions",
]

FEATURES = ("u", "v", "w", "w_x", "w_y")


def regular_positions(per_side: int, length: float = 1.0) -> Tensor:
    """Positions (per_side^2, 2), float64, of a regular layout that starts at the origin."""
    x = torch.arange(per_side, dtype=torch.float64) * (length / per_side)
    return torch.cartesian_prod(x, x).reshape(-1, 2)


@dataclass(frozen=True)
class Sensors:
    """Point values of the true closure.

    Args:
        values: (..., S), one row per state, in the convention of the target U.
        positions: (S, 2) coordinates (x, y), any real numbers: the domain is periodic.
        noise_std: standard deviation of the sensors' error, in units of U; 0 = exact.
    """

    values: Any
    positions: Any
    noise_std: float = 0.0

    def __post_init__(self):
        values = torch.as_tensor(self.values)
        positions = torch.as_tensor(self.positions, dtype=torch.float64).cpu()
        if positions.ndim != 2 or positions.shape[-1] != 2 or not len(positions):
            raise ValueError(
                f"sensor positions have shape {tuple(positions.shape)}, expected (S, 2)"
            )
        if values.ndim < 1 or values.shape[-1] != len(positions):
            raise ValueError(
                f"{len(positions)} sensor positions but values of shape {tuple(values.shape)}; "
                "expected (..., S)"
            )
        if not 0 <= float(self.noise_std) < float("inf"):
            raise ValueError(f"sensor noise_std={self.noise_std}, expected a number >= 0")
        if not torch.isfinite(values).all() or not torch.isfinite(positions).all():
            raise ValueError("sensor values and positions must be finite; drop the silent sensors")
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "positions", positions)
        object.__setattr__(self, "noise_std", float(self.noise_std))

    @property
    def key(self) -> tuple:
        """What decides the gain of a layout."""
        return (self.positions.numpy().tobytes(), self.noise_std)


def feature_spectra(w_hat: Tensor, band: Band) -> Tensor:
    """Spectra (..., 5, 2K + 1, K + 1) of u, v, w, w_x, w_y from those of w."""
    real = w_hat.real.dtype
    kx, ky = band.on("kx", w_hat.device, real), band.on("ky", w_hat.device, real)
    inverse = band.on("inverse_k2", w_hat.device, real)
    iw = torch.complex(-w_hat.imag, w_hat.real)
    parts = [iw * (ky * inverse), iw * (-kx * inverse), w_hat, iw * kx, iw * ky]
    return torch.stack(parts, dim=-3)


def physics_estimate(w_hat: Tensor, band: Band, kind: str, viscosity: float) -> Tensor:
    r"""Spectra of what physics says of the closure, for vorticity spectra (..., 2K + 1, K + 1).

    ``diffusion``: :math:`\tfrac\nu2\Delta w`; ``convection``: :math:`-u\cdot\nabla w`;
    ``subgrid``: the form of Leith's model, :math:`\nabla\cdot(|\nabla w|\nabla w)`, whose
    constant the model fits (Leith, Physica D 1996).
    """
    if kind == "diffusion":
        return w_hat * (-0.5 * viscosity * band.on("k2", w_hat.device, w_hat.real.dtype))
    size = band.grid.size
    u, v, _, w_x, w_y = band.to_physical(feature_spectra(w_hat, band), size).unbind(-3)
    if kind == "convection":
        return band.to_spectral(-(u * w_x + v * w_y))
    if kind != "subgrid":
        raise ValueError(f"no physics estimate of closure {kind!r}")
    gradient = torch.hypot(w_x, w_y)
    flux = band.to_spectral(torch.stack([gradient * w_x, gradient * w_y], dim=-3))
    kx, ky = (band.on(name, w_hat.device, w_hat.real.dtype) for name in ("kx", "ky"))
    return 1j * (kx * flux[..., 0, :, :] + ky * flux[..., 1, :, :])


@lru_cache(maxsize=32)
def _coordinates(size: int, device: str, dtype: torch.dtype) -> Tensor:
    angle = torch.arange(size, dtype=torch.float64) * (2 * torch.pi / size)
    x, y = angle[:, None].expand(size, size), angle[None, :].expand(size, size)
    return torch.stack([x.sin(), x.cos(), y.sin(), y.cos()]).to(device=device, dtype=dtype)


def coordinates(size: int, like: Tensor) -> Tensor:
    """Periodic coordinates (4, n, n): sin and cos of 2 pi x / L and 2 pi y / L."""
    return _coordinates(size, str(like.device), like.dtype)
