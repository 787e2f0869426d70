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
        self.is_real = not bool((values.imag != 0).any())
        self.is_imaginary = not self.is_real and not bool((values.real != 0).any())
        self.real = torch.stack([values.real, values.real], -1).to(like)
        self.imag = torch.stack([-values.imag, values.imag], -1).to(like)

    def apply(self, z: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
        """``out = symbol * z`` for real pairs; neither ``out`` nor ``scratch`` may be ``z``."""
        if self.is_real:
            return torch.mul(z, self.real, out=out)
        if self.is_imaginary:
            return self._turn(z, out)
        self._turn(z, scratch)
        torch.mul(z, self.real, out=out)
        return out.add_(scratch)

    def scale(self, z: Tensor, scratch: Tensor) -> Tensor:
        """``z *= symbol`` in place."""
        if self.is_real:
            return z.mul_(self.real)
        self._turn(z, scratch)
        if self.is_imaginary:
            return z.copy_(scratch)
        return z.mul_(self.real).add_(scratch)

    def _turn(self, z: Tensor, out: Tensor) -> Tensor:
        """``out = i imag * z``."""
        torch.mul(z[..., 1], self.imag[..., 0], out=out[..., 0])
        torch.mul(z[..., 0], self.imag[..., 1], out=out[..., 1])
        return out
