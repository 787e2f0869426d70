"""Diagonal operators in spectral space, applied with operations that round once.

Spectra are held as real pairs ``(..., 2)``. A product of two complex tensors rounds differently in
the vector body and in the tail of a CPU loop, so its last bit would depend on the batch.
Multiplying and adding reals, one operation at a time, does not: every result here is a function of
its own mode.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Symbol:
    """Multiply by ``values``, one complex (often real or imaginary) number per retained mode.

    Args:
        values: complex or real tensor of the retained shape (this rank's columns).
        like: real tensor whose dtype and device the symbol takes.
    """

    def __init__(self, values: Tensor, like: Tensor):
        values = values.to(torch.complex128)
        self.real = self.imag = None
        if bool((values.real != 0).any()) or not bool((values.imag != 0).any()):
            self.real = torch.stack([values.real, values.real], -1).to(like)
        if bool((values.imag != 0).any()):
            self.imag = torch.stack([-values.imag, values.imag], -1).to(like)

    def apply(self, z: Tensor, out: Tensor, scratch: Tensor | None = None) -> Tensor:
        """``out = symbol * z`` for real pairs; ``out`` may be ``z`` only when the symbol is real.

        ``scratch`` is needed by symbols with both parts.
        """
        if self.imag is None:
            return torch.mul(z, self.real, out=out)
        target = out if self.real is None else scratch
        torch.mul(z[..., 1], self.imag[..., 0], out=target[..., 0])
        torch.mul(z[..., 0], self.imag[..., 1], out=target[..., 1])
        if self.real is not None:
            torch.mul(z, self.real, out=out)
            out.add_(scratch)
        return out

    def scale(self, z: Tensor, scratch: Tensor) -> Tensor:
        """``z *= symbol`` in place."""
        if self.imag is None:
            return z.mul_(self.real)
        torch.mul(z[..., 1], self.imag[..., 0], out=scratch[..., 0])
        torch.mul(z[..., 0], self.imag[..., 1], out=scratch[..., 1])
        if self.real is None:
            return z.copy_(scratch)
        return z.mul_(self.real).add_(scratch)
