"""Line FFTs: the one place that knows which library transforms a line.

All are unnormalised towards physical space (the ``forward`` norm). On the CPU the strided complex
lines go through SciPy (pocketfft: equal bits for any number of lines, which MKL behind torch does
not give at sizes such as 24 and 48) and the contiguous real lines through torch, the faster there.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import scipy.fft
import torch
from torch import Tensor


class LineFFT:
    """The line transforms of one device. Those along x may work in place: use what they return."""

    def __init__(self, device: torch.device):
        self.on_cpu = device.type == "cpu"
        if self.on_cpu:
            keep_freed_memory()

    def x_to_physical(self, lines: Tensor) -> Tensor:
        """Complex inverse along the second-to-last axis, result in ``lines``."""
        if self.on_cpu:
            return _in_place(scipy.fft.ifft, lines, -2)
        return lines.copy_(torch.fft.ifft(lines, dim=-2, norm="forward"))

    def x_to_spectral(self, lines: Tensor) -> Tensor:
        """Complex forward along the second-to-last axis."""
        if self.on_cpu:
            return _in_place(scipy.fft.fft, lines, -2)
        return torch.fft.fft(lines, dim=-2, norm="forward")

    def y_complex_to_physical(self, lines: Tensor) -> Tensor:
        """Complex inverse along the last axis."""
        if self.on_cpu:
            return _in_place(scipy.fft.ifft, lines, -1)
        return torch.fft.ifft(lines, dim=-1, norm="forward")

    def y_complex_to_spectral(self, lines: Tensor) -> Tensor:
        """Complex forward along the last axis."""
        if self.on_cpu:
            return _in_place(scipy.fft.fft, lines, -1)
        return torch.fft.fft(lines, dim=-1, norm="forward")

    def y_to_physical(self, lines: Tensor, size: int) -> Tensor:
        """Half-complex to real along the last axis; missing modes are zero."""
        return torch.fft.irfft(lines, n=size, dim=-1, norm="forward")

    def y_to_spectral(self, field: Tensor) -> Tensor:
        """Real to half-complex along the last axis."""
        return torch.fft.rfft(field, dim=-1, norm="forward")


def _in_place(transform, lines: Tensor, axis: int) -> Tensor:
    """SciPy may overwrite its argument or return a new array; either way ``lines`` has the result."""
    array = lines.numpy()
    result = transform(array, axis=axis, norm="forward", overwrite_x=True)
    if result.__array_interface__["data"] != array.__array_interface__["data"]:
        np.copyto(array, result)
    return lines


@functools.cache
def keep_freed_memory() -> None:
    """Ask the C library to keep freed work arrays instead of returning their pages.

    FFTs return new arrays at every step; handing a megabyte back and faulting it in again costs as
    much as the transform. glibc only; elsewhere nothing happens.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, 32 << 20)
    mallopt(M_TRIM_THRESHOLD, 512 << 20)
