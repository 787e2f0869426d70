"""Noise that lasts for several closure calls: means over time, and places between its knots."""

import math

from torch import Tensor

__all__ = ["position", "share_of_mean"]


def share_of_mean(rho: Tensor, interval_ratio: float) -> Tensor:
    r"""Compute the variance of a mean over m trained intervals over that of one.

    If closures that are k intervals apart have the correlation :math:`\rho^k`, this ratio is

    .. math:: \frac{m (1 - \rho^2) - 2 \rho (1 - \rho^m)}{m^2 (1 - \rho)^2},

    which is 1 / m for white closures and near 1 if m is short compared with the memory.

    Args:
        rho: (shells,) correlation of neighbouring intervals, 0 = white, below 1.
        interval_ratio: m, above 0.

    Returns:
        (shells,).
    """
    among = interval_ratio * (1 - rho.square()) - 2 * rho * (1 - rho.pow(interval_ratio))
    return among / (interval_ratio * (1 - rho)).square()


def position(call: float, knots: float) -> tuple[int, float, float]:
    """Compute (k, cos theta, sin theta) of a call, for knots that are ``knots`` calls apart."""
    before = math.floor(call / knots)
    theta = 0.5 * math.pi * (call / knots - before)
    return before, math.cos(theta), math.sin(theta)
