"""Line FFTs by libraries: the one place that knows which transforms a line.

The nonlinear term on the CPU has its own (:mod:`line_kernels`). All are unnormalised towards
physical space (the ``forward`` norm). On the CPU the strided complex lines go through SciPy
(pocketfft: equal bits for any number of lines, which MKL behind torch does not give at sizes such
as 24 and 48) and the contiguous real lines through torch, the faster there, where a test shows
that it gives them too.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import numpy as np
import scipy.fft
import torch
from torch import Tensor


class LineFFT:
    """The transforms of one device: line by line on the CPU, whole planes on a GPU."""

    def __init__(self, device: torch.device):
        self.on_cpu = device.type == "cpu"
        if self.on_cpu:
            keep_freed_memory()

    def x_to_physical(self, lines: Tensor) -> Tensor:
        """Complex inverse along the second-to-last axis, in place (CPU)."""
        return _in_place(scipy.fft.ifft, lines)

    def x_to_spectral(self, lines: Tensor) -> Tensor:
        """Complex forward along the second-to-last axis, in place (CPU)."""
        return _in_place(scipy.fft.fft, lines)

    def y_to_physical(self, lines: Tensor, size: int) -> Tensor:
        """Half-complex to real along the last axis; missing modes are zero."""
        if self.on_cpu and not _torch_is_exact(size, lines.dtype):
            return torch.from_numpy(scipy.fft.irfft(lines.numpy(), n=size, norm="forward"))
        with _one_thread(self.on_cpu):
            return torch.fft.irfft(lines, n=size, dim=-1, norm="forward")

    def y_to_spectral(self, field: Tensor) -> Tensor:
        """Real to half-complex along the last axis."""
        if self.on_cpu and not _torch_is_exact(field.shape[-1], field.dtype):
            return torch.from_numpy(scipy.fft.rfft(field.numpy(), norm="forward"))
        with _one_thread(self.on_cpu):
            return torch.fft.rfft(field, dim=-1, norm="forward")

    def plane_to_physical(self, spectra: Tensor, size: int) -> Tensor:
        """Both axes at once (GPU): one library call instead of a strided one and a copy."""
        return torch.fft.irfft2(spectra, s=(size, size), norm="forward")

    def plane_to_spectral(self, fields: Tensor) -> Tensor:
        """Both axes at once (GPU)."""
        return torch.fft.rfft2(fields, norm="forward")


@functools.cache
def _torch_is_exact(size: int, dtype: torch.dtype) -> bool:
    """Whether torch's real lines of this size have the same bits however many there are.

    They have on the machines seen, with one thread; MKL promises nothing, so each process asks
    once per size and takes SciPy's pocketfft where the answer is no.
    """
    real = {torch.complex128: torch.float64, torch.complex64: torch.float32}.get(dtype, dtype)
    generator = torch.Generator().manual_seed(0)
    field = torch.randn(2, 19, size, dtype=real, generator=generator)
    with _one_thread(True):
        spectra = torch.fft.rfft(field)
        back = torch.fft.irfft(spectra, n=size)
        for rows in (slice(0, 1), slice(1, 3), slice(3, 8), slice(5, 12), slice(2, 19)):
            for part in (slice(0, 1), slice(0, 2)):
                lines = field[part, rows], spectra[part, rows]
                if not torch.equal(torch.fft.rfft(lines[0]), spectra[part, rows]):
                    return False
                if not torch.equal(torch.fft.irfft(lines[1], n=size), back[part, rows]):
                    return False
    return True


@contextlib.contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    """MKL's last bits depend on how it shares the lines among threads, so it gets one."""
    threads = torch.get_num_threads() if wanted else 1
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _in_place(transform, lines: Tensor) -> Tensor:
    """SciPy may overwrite its argument or return a new array: ``lines`` has the result."""
    array = lines.numpy()
    result = transform(array, axis=-2, norm="forward", overwrite_x=True)
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
