"""Line FFTs: the only module that calls an FFT library for the solver.

The nonlinear term on the CPU has compiled FFTs (:mod:`~cpu.line_kernels`). All transforms are
unnormalised towards physical space (the ``forward`` norm).

On the CPU the strided complex lines use SciPy. Its pocketfft gives equal bits for any number of
lines; MKL behind torch does not at sizes such as 24 and 48. The contiguous real lines use torch,
which is faster, if a test shows that its bits do not depend on the number of lines.
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
    """The transforms of one device: line by line on the CPU, full planes on a GPU.

    On a GPU other numbers of sides take one transform per axis.
    """

    def __init__(self, device: torch.device):
        self.on_cpu = device.type == "cpu"
        if self.on_cpu:
            keep_freed_memory()

    def x_to_physical(self, lines: Tensor, axis: int = -2) -> Tensor:
        """Transform to physical space along an axis but the last, complex; on a CPU in place."""
        if not self.on_cpu:
            return torch.fft.ifft(lines, dim=axis, norm="forward")
        return _in_place(scipy.fft.ifft, lines, axis)

    def x_to_spectral(self, lines: Tensor, axis: int = -2) -> Tensor:
        """Transform to spectral space along an axis but the last, complex; on a CPU in place."""
        if not self.on_cpu:
            return torch.fft.fft(lines, dim=axis, norm="forward")
        return _in_place(scipy.fft.fft, lines, axis)

    def y_to_physical(self, lines: Tensor, size: int) -> Tensor:
        """Transform half-complex lines to ``size`` reals along the last axis.

        Absent modes are zero.
        """
        if self.on_cpu and not _torch_is_exact(size, lines.dtype):
            return torch.from_numpy(scipy.fft.irfft(lines.numpy(), n=size, norm="forward"))
        with _one_thread(self.on_cpu):
            return torch.fft.irfft(lines, n=size, dim=-1, norm="forward")

    def y_to_spectral(self, field: Tensor) -> Tensor:
        """Transform real lines to half-complex ones along the last axis."""
        if self.on_cpu and not _torch_is_exact(field.shape[-1], field.dtype):
            return torch.from_numpy(scipy.fft.rfft(field.numpy(), norm="forward"))
        with _one_thread(self.on_cpu):
            return torch.fft.rfft(field, dim=-1, norm="forward")

    def plane_to_physical(self, spectra: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Transform both axes to physical space (GPU).

        One library call is faster than a strided one and a copy.
        """
        return torch.fft.irfft2(spectra, s=sizes, norm="forward")

    def plane_to_spectral(self, fields: Tensor) -> Tensor:
        """Transform both axes to spectral space (GPU)."""
        return torch.fft.rfft2(fields, norm="forward")


@functools.cache
def _torch_is_exact(size: int, dtype: torch.dtype) -> bool:
    """Return whether torch's real lines of this size have equal bits for any number of lines.

    They do on all machines tested so far, with one thread. MKL does not promise it, so each
    process tests every size once and uses SciPy's pocketfft if the test fails.
    """
    real = {torch.complex128: torch.float64, torch.complex64: torch.float32}.get(dtype, dtype)
    generator = torch.Generator().manual_seed(0)
    field = torch.randn(2, 19, size, dtype=real, generator=generator)
    with _one_thread(True):
        spectra = torch.fft.rfft(field)
        back = torch.fft.irfft(spectra, n=size)
        for rows in (slice(0, 1), slice(1, 3), slice(3, 8), slice(5, 12), slice(2, 19)):
            for planes in (slice(0, 1), slice(0, 2)):
                lines = field[planes, rows], spectra[planes, rows]
                if not torch.equal(torch.fft.rfft(lines[0]), spectra[planes, rows]):
                    return False
                if not torch.equal(torch.fft.irfft(lines[1], n=size), back[planes, rows]):
                    return False
    return True


@contextlib.contextmanager
def _one_thread(active: bool) -> Iterator[None]:
    """Run torch on one thread: MKL's last bits depend on how it splits lines among threads."""
    threads = torch.get_num_threads() if active else 1
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _in_place(transform, lines: Tensor, axis: int) -> Tensor:
    """Write the transform of ``lines`` to ``lines`` and return it.

    SciPy may overwrite its argument or return a new array.
    """
    array = lines.numpy()
    result = transform(array, axis=axis, norm="forward", overwrite_x=True)
    if result.__array_interface__["data"] != array.__array_interface__["data"]:
        np.copyto(array, result)
    return lines


@functools.cache
def keep_freed_memory() -> None:
    """Make the C library keep freed work arrays instead of returning their pages.

    FFTs return new arrays at every step. Returning a megabyte and faulting it in again takes as
    long as the transform. Only glibc supports it; elsewhere nothing happens.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, 32 << 20)
    mallopt(M_TRIM_THRESHOLD, 512 << 20)
