"""Transforms between physical fields and retained spectra: line FFTs, pruned, split in MPI slabs.

A 2-D transform is a real FFT along y and a complex FFT along x. Modes outside the retained set are
cut between the two, before anything is exchanged. On several ranks a physical field is split in
rows (x) and a spectrum in columns (ky), so one all-to-all per transform is enough, for any number
of fields and members at once::

    # mpirun -n 3 python example.py
    from mpi4py import MPI
    transform = Transform(Grid(64), comm=MPI.COMM_WORLD)
    w = transform.to_physical(transform.local(w_hat))      # (..., rows of this rank, 64)

Every line is transformed by itself with the same arithmetic however many lines there are, so the
result does not depend, to the last bit, on the batch or on the number of ranks (CPU).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import scipy.fft
import torch
from torch import Tensor

from hpc_closure.spectral.grid import Grid
from hpc_closure.spectral.symbols import Symbol

PRECISIONS = {"float64": torch.float64, "float32": torch.float32}
COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}


class LineFFT:
    """The four line transforms, unnormalised towards physical space (the ``forward`` norm).

    On the CPU the strided complex lines go through SciPy (pocketfft: equal bits for any number of
    lines, which MKL behind torch does not give at sizes such as 24 and 48) and the contiguous
    real lines through torch, which is the faster there.
    """

    def __init__(self, device: torch.device):
        self.on_cpu = device.type == "cpu"

    def x_to_physical(self, lines: Tensor) -> Tensor:
        """Complex inverse along the second-to-last axis."""
        if self.on_cpu:
            return torch.from_numpy(scipy.fft.ifft(lines.numpy(), axis=-2, norm="forward"))
        return torch.fft.ifft(lines, dim=-2, norm="forward")

    def x_to_spectral(self, lines: Tensor) -> Tensor:
        """Complex forward along the second-to-last axis."""
        if self.on_cpu:
            return torch.from_numpy(scipy.fft.fft(lines.numpy(), axis=-2, norm="forward"))
        return torch.fft.fft(lines, dim=-2, norm="forward")

    def y_complex_to_physical(self, lines: Tensor) -> Tensor:
        """Complex inverse along the last axis."""
        if self.on_cpu:
            return torch.from_numpy(scipy.fft.ifft(lines.numpy(), axis=-1, norm="forward"))
        return torch.fft.ifft(lines, dim=-1, norm="forward")

    def y_complex_to_spectral(self, lines: Tensor) -> Tensor:
        """Complex forward along the last axis."""
        if self.on_cpu:
            return torch.from_numpy(scipy.fft.fft(lines.numpy(), axis=-1, norm="forward"))
        return torch.fft.fft(lines, dim=-1, norm="forward")

    def y_to_physical(self, lines: Tensor, size: int) -> Tensor:
        """Half-complex to real along the last axis; missing modes are zero."""
        with _one_thread(self.on_cpu):
            return torch.fft.irfft(lines, n=size, dim=-1, norm="forward")

    def y_to_spectral(self, field: Tensor) -> Tensor:
        """Real to half-complex along the last axis."""
        with _one_thread(self.on_cpu):
            return torch.fft.rfft(field, dim=-1, norm="forward")


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


def blocks(length: int, parts: int) -> list[slice]:
    """Split ``length`` items in ``parts`` consecutive slices that differ by at most one item."""
    base, extra = divmod(length, parts)
    starts = [part * base + min(part, extra) for part in range(parts + 1)]
    return [slice(a, b) for a, b in zip(starts, starts[1:])]


class Transform:
    """Transforms of one grid.

    Args:
        grid: the grid of the retained spectrum.
        precision: ``float64`` or ``float32``.
        device: where the arrays live.
        comm: an mpi4py communicator whose ranks share each field, or None.
    """

    def __init__(self, grid: Grid, precision: str = "float64", device="cpu", comm=None):
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {sorted(PRECISIONS)}, got {precision!r}")
        self.grid = grid
        self.device = torch.device(device)
        self.real = PRECISIONS[precision]
        self.complex = COMPLEX[self.real]
        self.lines = LineFFT(self.device)
        self.comm = comm if comm is not None and comm.Get_size() > 1 else None
        self.num_ranks = self.comm.Get_size() if self.comm else 1
        self.rank = self.comm.Get_rank() if self.comm else 0
        if self.comm and (grid.dimensions == 1 or self.device.type != "cpu"):
            raise ValueError("domain ranks need a 2-D grid and the CPU; use domain_ranks: 1")
        if self.num_ranks > grid.modes + 1:
            raise ValueError(
                f"a grid of {grid.size} has {grid.modes + 1} columns of modes: at most that many "
                f"domain ranks, got {self.num_ranks}"
            )
        self._columns = blocks(grid.modes + 1, self.num_ranks)
        self.columns = self._columns[self.rank]
        self._padded: dict[tuple, Tensor] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one member's retained spectrum on this rank."""
        if self.grid.dimensions == 1:
            return self.grid.shape
        return (self.grid.shape[0], self.columns.stop - self.columns.start)

    def rows(self, size: int | None = None) -> slice:
        """Rows (x) of a physical field of ``size`` points that this rank holds."""
        return blocks(size or self.grid.size, self.num_ranks)[self.rank]

    def local(self, spectrum: Tensor) -> Tensor:
        """This rank's columns of a tensor that broadcasts to the whole retained spectrum."""
        if self.num_ranks == 1 or spectrum.shape[-1] == 1:
            return spectrum
        return spectrum[..., self.columns]

    def symbol(self, values: Tensor) -> Symbol:
        """Diagonal operator with ``values`` per mode (whole retained shape), on this rank."""
        return Symbol(self.local(values), torch.empty(0, dtype=self.real, device=self.device))

    def to_physical(self, w_hat: Tensor, size: int | None = None) -> Tensor:
        """Evaluate spectra on the grid, or on one of ``size`` points per side.

        Args:
            w_hat: ``(..., 2K + 1, local columns)`` complex (``(..., K + 1)`` in one dimension).
            size: points per side, at least ``2K + 2``; the grid's own by default.

        Returns:
            ``(..., local rows, size)`` real.
        """
        n = size or self.grid.size
        K = self.grid.modes
        if n < 2 * K + 1:
            raise ValueError(f"{n} points cannot carry {K} modes: resize the spectrum first")
        if self.grid.dimensions == 1:
            return self.lines.y_to_physical(w_hat, n)
        padded = self._zero_padded(tuple(w_hat.shape[:-2]), n, w_hat.shape[-1])
        padded[..., : K + 1, :] = w_hat[..., : K + 1, :]
        padded[..., n - K :, :] = w_hat[..., K + 1 :, :]
        lines = self.lines.x_to_physical(padded)
        if self.comm:
            lines = self._to_rows(lines, n)
        return self.lines.y_to_physical(lines, n)

    def to_spectral(self, field: Tensor) -> Tensor:
        """Retained spectra of fields ``(..., local rows, size)``, cut to the grid's modes."""
        K, n = self.grid.modes, field.shape[-1]
        if n < 2 * K + 1:
            raise ValueError(f"{n} points cannot carry {K} modes")
        lines = self.lines.y_to_spectral(field)[..., : K + 1]
        if self.grid.dimensions == 1:
            return lines.contiguous()
        if self.comm:
            lines = self._to_columns(lines, n)
        lines = self.lines.x_to_spectral(lines)
        out = lines.new_empty(*lines.shape[:-2], 2 * K + 1, lines.shape[-1])
        out[..., : K + 1, :] = lines[..., : K + 1, :]
        out[..., K + 1 :, :] = lines[..., n - K :, :]
        return out

    def _zero_padded(self, lead: tuple, n: int, columns: int) -> Tensor:
        """Buffer whose middle rows, the modes beyond K, are zero and stay zero."""
        key = (*lead, n, columns)
        if key not in self._padded:
            self._padded[key] = torch.zeros(key, dtype=self.complex, device=self.device)
        return self._padded[key]

    # -- slabs -----------------------------------------------------------------------------------

    def _exchange(self, sends: list[Tensor], shapes: list[tuple]) -> list[Tensor]:
        """One all-to-all: piece ``r`` of ``sends`` goes to rank ``r``; pieces of ``shapes`` return."""
        outgoing = torch.cat([piece.reshape(-1) for piece in sends]).numpy()
        counts = [int(np.prod(shape)) for shape in shapes]
        incoming = np.empty(sum(counts), dtype=outgoing.dtype)
        self.comm.Alltoallv([outgoing, [p.numel() for p in sends]], [incoming, counts])
        pieces = torch.from_numpy(incoming).split(counts)
        return [piece.reshape(shape) for piece, shape in zip(pieces, shapes)]

    def _to_rows(self, lines: Tensor, n: int) -> Tensor:
        """``(..., n, local columns)`` to ``(..., local rows, K + 1)``."""
        rows, lead = blocks(n, self.num_ranks), lines.shape[:-2]
        mine = rows[self.rank].stop - rows[self.rank].start
        shapes = [(*lead, mine, c.stop - c.start) for c in self._columns]
        return torch.cat(self._exchange([lines[..., r, :] for r in rows], shapes), dim=-1)

    def _to_columns(self, lines: Tensor, n: int) -> Tensor:
        """``(..., local rows, K + 1)`` to ``(..., n, local columns)``."""
        rows, lead = blocks(n, self.num_ranks), lines.shape[:-2]
        mine = self.columns.stop - self.columns.start
        shapes = [(*lead, r.stop - r.start, mine) for r in rows]
        return torch.cat(self._exchange([lines[..., c] for c in self._columns], shapes), dim=-2)

    def gather(self, w_hat: Tensor) -> Tensor:
        """Whole retained spectra, on every rank, from each rank's columns."""
        return self._gather(w_hat, self._columns, -1)

    def gather_field(self, field: Tensor) -> Tensor:
        """Whole physical fields, on every rank, from each rank's rows."""
        return self._gather(field, blocks(field.shape[-1], self.num_ranks), -2)

    def _gather(self, mine: Tensor, parts: list[slice], axis: int) -> Tensor:
        if not self.comm:
            return mine
        shapes = []
        for part in parts:
            shape = list(mine.shape)
            shape[axis] = part.stop - part.start
            shapes.append(shape)
        counts = [int(np.prod(shape)) for shape in shapes]
        incoming = np.empty(sum(counts), dtype=mine.contiguous().numpy().dtype)
        self.comm.Allgatherv(mine.contiguous().numpy().reshape(-1), [incoming, counts])
        pieces = torch.from_numpy(incoming).split(counts)
        return torch.cat([p.reshape(s) for p, s in zip(pieces, shapes)], dim=axis)
