r"""Gaussian law with a separate covariance for every wavevector.

The base law (:mod:`~hpc_closure.closure.gaussian.kriging`) has one variance for all modes of equal
:math:`|k|^2`. Here each mode :math:`q_k = a + ib` has a 2 x 2 covariance of (a, b). The law can
therefore represent a preferred direction or phase, such as that of a standing wave. The covariance
is stored as a factor relative to the base law:

.. math:: \mathrm{Cov}(a, b) = \tfrac12 S(|k|^2)\,L L^T, \qquad
          L = \begin{pmatrix} l_{11} & 0 \\ l_{21} & l_{22} \end{pmatrix},

and a draw is L times a draw of the base law, mode by mode. The mode k = 0 is real: only
:math:`l_{11}` counts for it, with S in place of S / 2.
"""

import torch
from torch import Tensor

from hpc_closure.closure.fields.modes import Band
from hpc_closure.closure.reductions import Reader

__all__ = ["ModeCovariance", "apply_factors", "remove_factors"]

LEAST = 1e-3  # lower bound of each variance over that of the base law


class ModeCovariance:
    """Second moments of snapshots, from which the factors are computed.

    Args:
        kept: band of the residual.
    """

    def __init__(self, kept: Band):
        self.sums = torch.zeros(3, *kept.shape, dtype=torch.float64)
        self.number = 0

    def add(self, q_hat: Tensor) -> None:
        """Add spectra (B, 2K + 1, K + 1) of q."""
        a, b = q_hat.real.double(), q_hat.imag.double()
        self.sums += torch.stack([(a * a).sum(0), (a * b).sum(0), (b * b).sum(0)]).cpu()
        self.number += len(q_hat)

    def factors(self, reader: Reader, variance: Tensor) -> Tensor:
        """Compute l11, l21, l22 of every mode, (3, 2K + 1, K + 1) float64.

        Args:
            reader: reader of the added snapshots; it sums over processes.
            variance: (2K + 1, K + 1) S of every mode; where it is 0, the factor is 1.
        """
        sums, number = reader.sum(self.sums, self.number)
        drawn = variance > 0
        scale = torch.where(drawn, 0.5 * variance, 1.0)
        mean = (0,) * scale.ndim
        scale[mean] *= 2 if bool(drawn[mean]) else 1
        aa, ab, bb = sums / number / scale
        aa = aa.clamp(min=LEAST)
        first = aa.sqrt()
        across = ab / first
        second = (bb - across.square()).clamp(min=LEAST).sqrt()
        one, none = torch.ones_like(first), torch.zeros_like(first)
        return torch.stack(
            [
                torch.where(drawn, first, one),
                torch.where(drawn, across, none),
                torch.where(drawn, second, one),
            ]
        )


def apply_factors(factors: Tensor, q_hat: Tensor) -> Tensor:
    """Compute L q, mode by mode, of spectra (..., 2K + 1, K + 1), with factors (3, ...)."""
    first, across, second = factors
    a, b = q_hat.real, q_hat.imag
    return torch.complex(first * a, across * a + second * b)


def remove_factors(factors: Tensor, q_hat: Tensor) -> Tensor:
    """Invert :func:`apply_factors`."""
    first, across, second = factors
    a = q_hat.real / first
    return torch.complex(a, (q_hat.imag - across * a) / second)
