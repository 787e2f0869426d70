"""The Kuramoto-Sivashinsky equation on a line: another periodic equation in one file.

``u_t + u u_x + u_xx + u_xxxx = 0``; chaotic for lengths above about 22.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_closure.spectral.transform import Transform


class KuramotoSivashinsky1D:
    """Linear symbol ``k^2 - k^4`` and nonlinear term ``-(u^2)_x / 2``.

    Args:
        transform: transform of a 1-D grid.
    """

    dimensions = 1
    parameters = ()

    def __init__(self, transform: Transform):
        if transform.grid.dimensions != 1:
            raise ValueError("kuramoto_sivashinsky1d needs a grid with dimensions: 1")
        k = transform.grid.ky
        self.transform = transform
        self.linear = torch.complex(k**2 - k**4, torch.zeros_like(k))
        self.half_k = transform.factors(0.5 * k)

    def nonlinear(self, w: Tensor, out: Tensor) -> Tensor:
        """``out = -(u^2)_x / 2`` as real pairs ``(members, K + 1, 2)``."""
        u = self.transform.synthesize((w, None))
        square = self.transform.analyse(u.mul_(u), self.half_k)[0]
        # -i k / 2 times the spectrum of u^2
        out[..., 0].copy_(square[..., 1])
        torch.neg(square[..., 0], out=out[..., 1])
        return out

    def speed(self, w: Tensor) -> Tensor:
        """Largest ``|u|`` of each member, ``(members,)``."""
        return self.transform.synthesize((w, None))[0].abs_().amax(-1)
