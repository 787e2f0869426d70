"""Steady forcings of the vorticity equation, as retained spectra."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpc_closure.spectral.counters import standard_normals
from hpc_closure.spectral.grid import Grid
from hpc_closure.spectral.noise import ring_modes


def steady_forcing(grid: Grid, kind: str, **parameters: float) -> Tensor:
    """Retained spectrum of a steady forcing, complex128.

    Args:
        grid: the solver's grid.
        kind: ``none``; ``published`` (``amplitude`` 0.1); ``kolmogorov`` (``amplitude``,
            ``wavenumber``); ``ring`` (``amplitude``, ``wavenumber``, ``width``, ``phase_seed``).

    Raises:
        ValueError: unknown kind, or modes that the grid does not retain.
    """
    if kind not in FORCINGS:
        raise ValueError(f"forcing kind must be one of {sorted(FORCINGS)}, got {kind!r}")
    if grid.dimensions != 2 and kind != "none":
        raise ValueError(f"forcing kind {kind!r} is defined on 2-D grids")
    out = torch.zeros(grid.shape, dtype=torch.complex128)
    FORCINGS[kind](grid, out, **parameters)
    return out


def _set(grid: Grid, out: Tensor, kx: int, ky: int, value: complex) -> None:
    """Give mode ``(kx, ky)`` a coefficient, and its negative the conjugate when that is stored."""
    if ky < 0 or (ky == 0 and kx < 0):
        kx, ky, value = -kx, -ky, value.conjugate()
    if max(abs(kx), ky) > grid.modes:
        raise ValueError(f"forcing mode ({kx}, {ky}) is beyond the retained {grid.modes} modes")
    out[kx, ky] = torch.tensor(value, dtype=out.dtype)
    if ky == 0 and kx:
        out[-kx, 0] = out[kx, 0].conj()


def _none(grid: Grid, out: Tensor) -> None:
    """No forcing."""


def _published(grid: Grid, out: Tensor, *, amplitude: float = 0.1) -> None:
    """``f = amplitude (sin 2 pi (x + y) + cos 2 pi (x + y))``, x, y in sides (Li et al. 2021)."""
    _set(grid, out, 1, 1, amplitude * complex(0.5, -0.5))


def _kolmogorov(grid: Grid, out: Tensor, *, amplitude: float = 1.0, wavenumber: int = 4) -> None:
    """``amplitude sin(k y)`` on u: ``f = -amplitude k cos(k y)``, k = 2 pi wavenumber / L."""
    _set(grid, out, 0, int(wavenumber), complex(-0.5 * amplitude * grid.unit * wavenumber))


def _ring(
    grid: Grid,
    out: Tensor,
    *,
    amplitude: float = 1.0,
    wavenumber: float = 4,
    width: float = 0.5,
    phase_seed: int = 0,
) -> None:
    """Equal coefficients with fixed random phases on ``|k|`` within ``width`` of ``wavenumber``.

    ``amplitude`` is the rms of the forcing.
    """
    vectors = ring_modes(wavenumber, width)
    phases = standard_normals(phase_seed, "forcing", 0, width=2 * len(vectors)).reshape(-1, 2)
    size = amplitude / math.sqrt(2 * len(vectors))
    for (kx, ky), (a, b) in zip(vectors.tolist(), phases.tolist()):
        _set(grid, out, kx, ky, size * complex(a, b) / math.hypot(a, b))


FORCINGS = {"none": _none, "published": _published, "kolmogorov": _kolmogorov, "ring": _ring}
