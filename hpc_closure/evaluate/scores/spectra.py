"""Compute power per wavenumber shell; shell s contains integer wavevectors with round(|k|) = s.

A field is real with shape ``(..., n, n)``, n even or odd, or ``(..., 1, n)`` in one dimension. All
modes of its grid are counted, not only the retained ones of
:mod:`hpc_closure.spectral.modes.grid`, because a field sampled on a coarser grid has others. Hence

    sum_s power[s] = mean of the squared field                                    (Parseval)

holds exactly. The half-plane transform stores the columns ky = 0..n/2. Each column stands for two
modes, except ky = 0 and, for even n, ky = n/2.
"""

from functools import lru_cache

import torch
from torch import Tensor

from hpc_closure.spectral.modes.grid import shell_sum


@lru_cache(maxsize=16)
def integer_k2(size: int, rows: int | None = None) -> Tensor:
    """Compute |k|^2 of each mode of ``rfft2``; (rows or n, n // 2 + 1), float64."""
    rows = rows or size
    kx = torch.fft.fftfreq(rows, d=1 / rows, dtype=torch.float64)
    ky = torch.fft.rfftfreq(size, d=1 / size, dtype=torch.float64)
    return kx[:, None] ** 2 + ky**2


@lru_cache(maxsize=16)
def shell_numbers(size: int, rows: int | None = None) -> Tensor:
    """Compute the shell of each mode of ``rfft2``; (rows or n, n // 2 + 1), int64."""
    return integer_k2(size, rows).sqrt().round().long()


def per_shell(density: Tensor, size: int) -> Tensor:
    """Sum a quadratic density over shells.

    Args:
        density: real (..., n, n // 2 + 1), e.g. ``|w_hat|^2`` with "forward" normalisation.
        size: n.

    Returns:
        (..., shells).
    """
    weights = torch.full((size // 2 + 1,), 2.0)
    weights[0] = 1
    if size % 2 == 0:
        weights[-1] = 1
    return shell_sum(density, shell_numbers(size, density.shape[-2]), weights)


def transform(fields: Tensor) -> Tensor:
    """Compute Fourier coefficients (..., n, n // 2 + 1), divided by the number of points.

    Raises:
        ValueError: the last two axes are neither square nor of one row.
    """
    if fields.shape[-2] not in (1, fields.shape[-1]):
        raise ValueError(
            f"fields {tuple(fields.shape)} are neither square nor of one row in the last two axes"
        )
    return torch.fft.rfft2(fields, norm="forward")


def power(coefficients: Tensor) -> Tensor:
    """Compute ``|w_hat|^2``, same shape."""
    return torch.view_as_real(coefficients).square().sum(-1)


def shell_power(fields: Tensor) -> Tensor:
    """Compute the mean square per shell of fields (..., n, n); returns (..., shells)."""
    return per_shell(power(transform(fields)), fields.shape[-1])
