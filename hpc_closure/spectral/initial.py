"""Initial laws: a member's spectrum at t = 0 from its key alone, the same on every grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.counters import STREAM_INITIAL, complex_normals, key_of
from hpc_closure.spectral.grid import Grid
from hpc_closure.spectral.half_plane import ModeDraws, wavevectors_within


def initial_spectrum(
    grid: Grid, kind: str, members: Sequence[int], seed: int, stage: str, **parameters: float
) -> Tensor:
    """Retained spectra ``(members, ...)`` complex128 at t = 0.

    Args:
        grid: the solver's grid.
        kind: ``gaussian_field`` (``alpha``, ``tau``, ``amplitude``), ``band`` (``wavenumber``,
            ``width``, ``energy``), ``taylor_green`` (``amplitude``, ``wavenumber``), ``zero``, or,
            on a line, ``line`` (``amplitude``, ``wavenumber``).
        members: member ids.
        seed: seed of the experiment.
        stage: stage whose draws these are.
    """
    if kind not in INITIAL:
        raise ValueError(f"initial kind must be one of {sorted(INITIAL)}, got {kind!r}")
    if (kind == "line") != (grid.dimensions == 1) and kind != "zero":
        raise ValueError(f"initial kind {kind!r} does not fit a {grid.dimensions}-D grid")
    keys = [key_of(seed, stage, member) for member in members]
    return INITIAL[kind](grid, keys, **parameters)


def _nested_square(modes: int) -> np.ndarray:
    """Half-plane wavevectors in square rings: those of a smaller grid come first."""
    vectors = wavevectors_within(modes)
    return vectors[np.argsort(np.abs(vectors).max(1), kind="stable")]


def _random_modes(grid: Grid, keys: list, vectors: np.ndarray, std: np.ndarray) -> Tensor:
    """Complex Gaussian coefficients of standard deviation ``sqrt(E |w_hat|^2) = std``."""
    draws = ModeDraws(vectors, grid.modes)
    values = draws.empty(len(keys))
    for row, key in zip(values, keys):
        row[:-1] = complex_normals(key, STREAM_INITIAL, 0, 1, len(vectors))[0]
    values[:, :-1] *= np.sqrt(0.5) * std
    return draws.spread(torch.from_numpy(draws.place(values)), grid.shape)


def _gaussian_field(
    grid: Grid,
    keys: list,
    *,
    alpha: float = 2.5,
    tau: float = 7.0,
    amplitude: float | None = None,
) -> Tensor:
    """Gaussian random field, ``E |w_hat|^2 = 2 amplitude^2 (k^2 + tau^2)^-alpha``, zero mean.

    The law of the published code (Li et al. 2021): the real part of a field with independent
    complex coefficients; ``amplitude`` is ``tau^(alpha - 1)`` unless given.
    """
    vectors = _nested_square(grid.modes)
    vectors = vectors[(vectors != 0).any(1)]
    sigma = tau ** (alpha - 1.0) if amplitude is None else amplitude
    k2 = (vectors**2).sum(1) * grid.unit**2
    return _random_modes(grid, keys, vectors, np.sqrt(2.0) * sigma * (k2 + tau**2) ** (-alpha / 2))


def _band(
    grid: Grid, keys: list, *, wavenumber: float = 6, width: float = 2, energy: float = 0.5
) -> Tensor:
    """Random phases and Gaussian amplitudes on ``|k|`` within ``width`` of ``wavenumber``.

    Equal energy to every mode, ``energy`` in the mean.
    """
    vectors = _nested_square(grid.modes)
    length = np.sqrt((vectors**2).sum(1))
    vectors = vectors[(np.abs(length - wavenumber) <= width) & (length > 0)]
    if not len(vectors):
        raise ValueError(f"no retained mode within {width} of wavenumber {wavenumber}")
    k2 = (vectors**2).sum(1) * grid.unit**2
    return _random_modes(grid, keys, vectors, np.sqrt(energy * k2 / len(vectors)))


def _taylor_green(
    grid: Grid, keys: list, *, amplitude: float = 1.0, wavenumber: int = 1
) -> Tensor:
    """``w = 2 k amplitude sin(k x) sin(k y)``, an exact solution that only decays."""
    out = torch.zeros(len(keys), *grid.shape, dtype=torch.complex128)
    m = int(wavenumber)
    value = 2 * grid.unit * m * amplitude / 4
    out[:, m, m] = -value
    out[:, -m, m] = value
    return out


def _zero(grid: Grid, keys: list) -> Tensor:
    """At rest."""
    return torch.zeros(len(keys), *grid.shape, dtype=torch.complex128)


def _line(grid: Grid, keys: list, *, amplitude: float = 1.0, wavenumber: int = 4) -> Tensor:
    """Gaussian modes ``1 .. wavenumber`` on a line, rms ``amplitude`` in the mean."""
    num = min(int(wavenumber), grid.modes)
    out = torch.zeros(len(keys), *grid.shape, dtype=torch.complex128)
    for row, key in enumerate(keys):
        z = complex_normals(key, STREAM_INITIAL, 0, 1, num)[0]
        out[row, 1 : num + 1] = torch.from_numpy(z) * (amplitude / 2 / num**0.5)
    return out


INITIAL: dict[str, Callable[..., Tensor]] = {
    "gaussian_field": _gaussian_field,
    "band": _band,
    "taylor_green": _taylor_green,
    "zero": _zero,
    "line": _line,
}
