"""Compute power per wavenumber shell; shell s contains wavevectors with round(|k|) = s.

A field is real with shape ``(..., *sides)``, of one to three sides, even or odd; |k| is in units
of the smallest wavenumber, that of the longest side. All modes of its grid are counted, not only
the retained ones of :mod:`hpc_closure.spectral.modes.grid`, because a field sampled on a coarser
grid has others. Hence

    sum_s power[s] = mean of the squared field                                    (Parseval)

holds exactly. The real transform stores the wavenumbers 0..n/2 of the last side. Each stands for
two modes, except 0 and, for even n, n/2.
"""

from functools import lru_cache

import torch
from torch import Tensor

from hpc_closure.spectral.modes.grid import shell_of, shell_sum


@lru_cache(maxsize=16)
def scaled_k2(points: tuple[int, ...], lengths: tuple[float, ...] = ()) -> Tensor:
    """Compute |k|^2 of each mode of the real transform, in units of the smallest wavenumber.

    Args:
        points: points per side.
        lengths: length of each side; equal if there are none.

    Returns:
        ``(..., n // 2 + 1)``, a side of full transforms for each other side, float64.
    """
    *others, last = points
    longest = max(lengths, default=1.0)
    waves = [torch.fft.fftfreq(size, d=1 / size, dtype=torch.float64) for size in others]
    waves.append(torch.fft.rfftfreq(last, d=1 / last, dtype=torch.float64))
    out = torch.zeros(*others, last // 2 + 1, dtype=torch.float64)
    for side, k in enumerate(waves):
        k = k * (longest / lengths[side]) if lengths else k
        out = out + (k**2).reshape([-1 if one == side else 1 for one in range(len(points))])
    return out


@lru_cache(maxsize=16)
def shell_numbers(points: tuple[int, ...], lengths: tuple[float, ...] = ()) -> Tensor:
    """Compute the shell of each mode, int64; arguments and shape as of :func:`scaled_k2`."""
    return shell_of(scaled_k2(points, lengths))


def per_shell(density: Tensor, points: tuple[int, ...], lengths: tuple[float, ...] = ()) -> Tensor:
    """Sum a quadratic density over shells.

    Args:
        density: real (..., n, n // 2 + 1), e.g. ``|w_hat|^2`` with "forward" normalisation.
        points: points per side.
        lengths: length of each side; equal if there are none.

    Returns:
        (..., shells).
    """
    size = points[-1]
    weights = torch.full((size // 2 + 1,), 2.0)
    weights[0] = 1
    if size % 2 == 0:
        weights[-1] = 1
    return shell_sum(density, shell_numbers(tuple(points), tuple(lengths)), weights)


def transform(fields: Tensor, dimensions: int = 2) -> Tensor:
    """Compute Fourier coefficients (..., n, n // 2 + 1), divided by the number of points."""
    return torch.fft.rfftn(fields, dim=tuple(range(-dimensions, 0)), norm="forward")


def power(coefficients: Tensor) -> Tensor:
    """Compute ``|w_hat|^2``, same shape."""
    return torch.view_as_real(coefficients).square().sum(-1)


def shell_power(fields: Tensor, dimensions: int = 2, lengths: tuple[float, ...] = ()) -> Tensor:
    """Compute the mean square per shell of fields (..., *sides); returns (..., shells)."""
    return per_shell(power(transform(fields, dimensions)), fields.shape[-dimensions:], lengths)
