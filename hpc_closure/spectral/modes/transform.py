"""Transforms between physical fields and retained spectra, split in MPI slabs; diagonal operators.

A transform is a real FFT along the last side and complex FFTs along the others, x the last one.
Modes that are not retained are cut between them, before anything is exchanged. On several ranks a
physical field is split in rows (x) and a spectrum in columns (ky; in three dimensions these are
of both signs). One all-to-all per transform is then enough, for any number of fields and members.
In three dimensions more ranks than columns form pencils, which need two::

    # mpirun -n 3 python example.py
    from mpi4py import MPI
    transform = Transform(Grid(64), comm=MPI.COMM_WORLD)
    field = transform.to_physical(transform.local(w_hat))      # (..., rows of this rank, 64)

Every line is transformed by itself, with the same arithmetic for any number of lines. So on the
CPU the result does not depend, to the last bit, on the batch or on the number of ranks.

Spectra are stored as real pairs ``(..., 2)``. A product of two complex tensors rounds differently
in the vector body and in the tail of a CPU loop, so its last bit would depend on the batch. Adding
and multiplying reals, one operation at a time, does not. So a value that a :class:`Symbol` returns
depends on its mode alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.modes.grid import Grid
from hpc_closure.spectral.modes.line_fft import LineFFT
from hpc_closure.spectral.modes.resolution import pencils, per_side
from hpc_closure.spectral.modes.slabs import Slabs

PRECISIONS = {"float64": torch.float64, "float32": torch.float32}
COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}

#: a spectrum as real pairs, and real factors per field and mode (or None)
Part = tuple[Tensor, Tensor | None]
#: points of a side, or of each side; None = those of the grid
Size = int | Sequence[int] | None


class Symbol:
    """Diagonal operator: one complex number, often real or imaginary, per retained mode.

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
        """Write ``symbol * z`` of real pairs to ``out`` and return it.

        Neither ``out`` nor ``scratch`` may be ``z``.
        """
        if self.is_real:
            return torch.mul(z, self.real, out=out)
        if self.is_imaginary:
            return self._times_imaginary(z, out)
        self._times_imaginary(z, scratch)
        torch.mul(z, self.real, out=out)
        return out.add_(scratch)

    def times(self, z: Tensor) -> Tensor:
        """Return ``symbol * z`` of real pairs, a new tensor that autograd differentiates."""
        if self.is_real:
            return z * self.real
        rotated = z.flip(-1) * self.imag
        return rotated if self.is_imaginary else z * self.real + rotated

    def scale(self, z: Tensor, scratch: Tensor) -> Tensor:
        """Multiply ``z`` by the symbol in place."""
        if self.is_real:
            return z.mul_(self.real)
        self._times_imaginary(z, scratch)
        if self.is_imaginary:
            return z.copy_(scratch)
        return z.mul_(self.real).add_(scratch)

    def _times_imaginary(self, z: Tensor, out: Tensor) -> Tensor:
        """Write ``i imag * z`` to ``out``."""
        torch.mul(z[..., 1], self.imag[..., 0], out=out[..., 0])
        torch.mul(z[..., 0], self.imag[..., 1], out=out[..., 1])
        return out


@dataclass
class _Padded:
    """Work array of an inverse transform and views of its parts."""

    whole: Tensor  # (fields, members, n, columns or n // 2 + 1) complex
    lines: Tensor  # its retained columns
    upper: Tensor  # real pairs of rows 0..K
    middle: Tensor  # rows of modes that are not retained
    lower: Tensor  # real pairs of rows -K..-1


class Transform:
    """Transforms of one grid; holds work arrays, so each thread needs its own.

    Args:
        grid: grid of the retained spectrum.
        precision: ``float64`` or ``float32``.
        device: device of the arrays.
        comm: mpi4py communicator whose ranks share each field, or None.

    Raises:
        ValueError: unknown precision, or several ranks on a line or a GPU.
    """

    def __init__(self, grid: Grid, precision: str = "float64", device="cpu", comm=None):
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {sorted(PRECISIONS)}, got {precision!r}")
        self.grid = grid
        self.device = torch.device(device)
        self.real = PRECISIONS[precision]
        self.complex = COMPLEX[self.real]
        self.lines = LineFFT(self.device)
        self.slabs: Slabs | None = None
        #: exchange of y and kz among ranks with the same rows and columns, if these are pencils
        self.pencils: Slabs | None = None
        if comm is not None and comm.Get_size() > 1:
            if grid.dimensions == 1 or self.device.type != "cpu":
                raise ValueError(
                    "domain ranks need two or three dimensions on the CPU: set domain_ranks: 1"
                )
            self._divide(comm)
        self._padded: dict[tuple, _Padded] = {}
        self._boxes: dict[tuple, Tensor] = {}
        self._spectra: dict[tuple, Tensor] = {}

    def _divide(self, comm) -> None:
        """Divide the fields among the ranks of a communicator."""
        shape, parts = self.grid.shape, 1
        if self.grid.dimensions == 3:
            _, parts = pencils(comm.Get_size(), *shape[1:])
        if parts == 1:
            self.slabs = Slabs(comm, shape[1], 1 - self.grid.dimensions)
            return
        row, place = divmod(comm.Get_rank(), parts)
        self.slabs = Slabs(comm.Split(place, row), shape[1], -2)
        self.pencils = Slabs(comm.Split(row, place), shape[2], -1)

    @property
    def num_ranks(self) -> int:
        """Return the number of ranks that share a field."""
        each = [part.num_ranks for part in (self.slabs, self.pencils) if part]
        return int(np.prod(each))

    @property
    def columns(self) -> slice:
        """Return the columns (ky) of the retained spectrum that this rank holds."""
        whole = self.grid.shape[-1] if self.grid.dimensions == 1 else self.grid.shape[1]
        return self.slabs.columns if self.slabs else slice(0, whole)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one member's retained spectrum on this rank."""
        shape = list(self.grid.shape)
        shape[min(1, len(shape) - 1)] = self.columns.stop - self.columns.start
        if self.pencils:
            shape[2] = self.halves.stop - self.halves.start
        return tuple(shape)

    @property
    def halves(self) -> slice:
        """Return the modes of the last side that this rank holds; all, unless on pencils."""
        return self.pencils.columns if self.pencils else slice(0, self.grid.shape[-1])

    def rows(self, size: int | None = None) -> slice:
        """Return the rows (x) of a physical field of ``size`` points that this rank holds."""
        size = size or self.grid.sizes[0]
        return self.slabs.rows(size) if self.slabs else slice(0, size)

    def local(self, spectrum: Tensor) -> Tensor:
        """Return this rank's columns of a tensor that broadcasts to the full retained spectrum."""
        for part, axis in ((self.slabs, 1 - self.grid.dimensions), (self.pencils, -1)):
            if part and spectrum.shape[axis] > 1:
                start, stop = part.columns.start, part.columns.stop
                spectrum = spectrum.narrow(axis, start, stop - start)
        return spectrum

    def symbol(self, values: Tensor) -> Symbol:
        """Return the diagonal operator of ``values`` (full retained shape) on this rank."""
        return Symbol(self.local(values), torch.empty(0, dtype=self.real, device=self.device))

    def factors(self, *values: Tensor) -> Tensor:
        """Return real factors of several fields for :meth:`synthesize` and :meth:`analyse`.

        Args:
            values: real tensors that broadcast to the full retained spectrum, one per field.

        Returns:
            ``(fields, 1, 2K + 1, local columns, 2)``, or ``(fields, 1, K + 1, 2)`` on a line, or
            ``(fields, 1, 2K + 1, local columns, K + 1, 2)`` in three dimensions.
        """
        full = torch.stack([value.expand(self.grid.shape) for value in values]).unsqueeze(1)
        columns = self.local(full).to(self.device, self.real)
        return torch.stack([columns, columns], -1).contiguous()

    # -- complex spectra, any leading axes -------------------------------------------------------

    def to_physical(self, w_hat: Tensor, size: Size = None) -> Tensor:
        """Evaluate spectra on the grid, or on a grid of ``size`` points per side.

        Args:
            w_hat: ``(..., 2K + 1, local columns)`` complex (``(..., K + 1)`` on a line).
            size: points, at least ``2K + 2``: a number for equal sides or one per side; by
                default those of the grid.

        Returns:
            ``(..., local rows, size)`` real, a new tensor.
        """
        lead = w_hat.shape[: -self.grid.dimensions]
        pairs = torch.view_as_real(w_hat.resolve_conj().contiguous())
        field = self.synthesize((pairs.reshape(-1, *self.shape, 2), None), size=size)
        return field.reshape(*lead, *field.shape[2:])

    def to_spectral(self, field: Tensor) -> Tensor:
        """Return the retained spectra of fields ``(..., local rows, size)``."""
        lead = field.shape[: -self.grid.dimensions]
        fields = field.reshape(1, -1, *field.shape[-self.grid.dimensions :])
        spectra = torch.view_as_complex(self.analyse(fields))
        return spectra.reshape(*lead, *self.shape).clone()

    # -- the solver's form: real pairs, several fields at once -----------------------------------

    def synthesize(self, *parts: Part, size: Size = None) -> Tensor:
        """Return the physical fields of spectra times real factors, all in one transform.

        Args:
            parts: pairs ``(w, factors)``: real pairs ``(members, 2K + 1, local columns, 2)``, and
                factors ``(fields, 1, ...)``, or None for the single field ``w``.
            size: points per side; by default those of the grid.

        Returns:
            ``(fields, members, local rows, size)`` real, a new tensor, parts in order.

        Raises:
            ValueError: too few points for the modes.
        """
        sizes = self._sizes(size)
        fields = sum(1 if f is None else f.shape[0] for _, f in parts)
        members = parts[0][0].shape[0]
        if self.grid.dimensions == 3:
            return self._synthesize_cube(parts, fields, members, sizes)
        padded, K = self._work(fields, members, sizes), self.grid.mode_counts[0]
        if self.grid.dimensions == 1:
            _fill(padded.upper, parts)
            return self.lines.y_to_physical(padded.whole, sizes[-1])
        _fill(padded.upper, _halves(parts, slice(0, K + 1)))
        _fill(padded.lower, _halves(parts, slice(K + 1, None)))
        if not self.lines.on_cpu:
            return self.lines.plane_to_physical(padded.whole, sizes)
        padded.middle.zero_()
        self.lines.x_to_physical(padded.lines)
        lines = self.slabs.to_rows(padded.whole) if self.slabs else padded.whole
        return self.lines.y_to_physical(lines, sizes[-1])

    def _synthesize_cube(self, parts, fields: int, members: int, sizes) -> Tensor:
        """Return fields ``(fields, members, local rows, n, n)``; see :meth:`synthesize`."""
        (K, K_y, _), (nx, ny, nz) = self.grid.mode_counts, sizes
        lines = self._box("x", fields, members, nx, *self.shape[1:])
        pairs = torch.view_as_real(lines)
        _fill(pairs[:, :, : K + 1], _halves(parts, slice(0, K + 1)))
        _fill(pairs[:, :, nx - K :], _halves(parts, slice(K + 1, None)))
        lines[:, :, K + 1 : nx - K].zero_()
        lines = self.lines.x_to_physical(lines, -3)
        if self.slabs:
            lines = self.slabs.to_rows(lines)
        rows = self._box("y", fields, members, lines.shape[2], ny, lines.shape[-1])
        rows[..., : K_y + 1, :].copy_(lines[..., : K_y + 1, :])
        rows[..., ny - K_y :, :].copy_(lines[..., K_y + 1 :, :])
        rows[..., K_y + 1 : ny - K_y, :].zero_()
        rows = self.lines.x_to_physical(rows)
        return self.lines.y_to_physical(self.pencils.to_rows(rows) if self.pencils else rows, nz)

    def analyse(self, fields: Tensor, factors: Tensor | None = None) -> Tensor:
        """Return the retained spectra of fields, times real factors.

        Args:
            fields: ``(fields, members, local rows, size)`` real.
            factors: ``(fields, 1, 2K + 1, local columns, 2)`` or None.

        Returns:
            ``(fields, members, 2K + 1, local columns, 2)`` real pairs in a work array that the
            next call overwrites.

        Raises:
            ValueError: too few points for the modes.
        """
        sides, K = self.grid.dimensions, self.grid.mode_counts
        sizes = self._sizes_of(fields)
        if sides == 2 and not self.lines.on_cpu:
            spectra = self.lines.plane_to_spectral(fields)
            return self._retained(spectra[..., : K[-1] + 1], factors)
        lines = self.lines.y_to_spectral(fields)[..., : K[-1] + 1]
        if sides == 1:
            out = self._output(*fields.shape[:2])
            _fill(out, [(torch.view_as_real(lines), factors)], paired=True)
            return out
        if self.pencils:
            lines = self.pencils.to_columns(lines, sizes[1])
        if sides == 3:
            lines = self.lines.x_to_spectral(lines)
            lines = torch.cat([lines[..., : K[1] + 1, :], lines[..., sizes[1] - K[1] :, :]], -2)
        if self.slabs:
            lines = self.slabs.to_columns(lines, sizes[0])
        return self._retained(self.lines.x_to_spectral(lines, -sides), factors)

    def _retained(self, spectra: Tensor, factors: Tensor | None) -> Tensor:
        """Return the retained rows of spectra (fields, members, n, columns), times factors."""
        K, n = self.grid.mode_counts[0], spectra.shape[2]
        out, pairs = self._output(*spectra.shape[:2]), torch.view_as_real(spectra)
        upper, lower = slice(0, K + 1), slice(K + 1, None)
        _fill(out[:, :, upper], [(pairs[:, :, : K + 1], _rows(factors, upper))], paired=True)
        _fill(out[:, :, lower], [(pairs[:, :, n - K :], _rows(factors, lower))], paired=True)
        return out

    def _sizes(self, size: Size) -> tuple[int, ...]:
        """Return points per side; ValueError if one is too few for the modes."""
        sizes = per_side(size or self.grid.sizes, self.grid.dimensions, "size")
        for n, K in zip(sizes, self.grid.mode_counts):
            if n < 2 * K + 1:
                raise ValueError(f"{n} points cannot carry {K} modes: resize the spectrum first")
        return sizes

    def _sizes_of(self, field: Tensor) -> tuple[int, ...]:
        """Return the points per side of the full field of which this rank holds a part."""
        last = self.grid.sizes[-1]
        return self._sizes([field.shape[-1] * size // last for size in self.grid.sizes])

    def _work(self, fields: int, members: int, sizes: tuple[int, ...]) -> _Padded:
        key = (fields, members, sizes)
        if key not in self._padded:
            K, width, n = self.grid.mode_counts[0], self.shape[-1], sizes[0]
            columns = width if self.slabs else sizes[-1] // 2 + 1
            lead = (fields, members) if self.grid.dimensions == 1 else (fields, members, n)
            whole = torch.zeros(*lead, columns, dtype=self.complex, device=self.device)
            lines = whole[..., :width]
            pairs = torch.view_as_real(lines)
            if self.grid.dimensions == 1:
                self._padded[key] = _Padded(whole, lines, pairs, pairs, pairs)
            else:
                cuts = pairs[:, :, : K + 1], pairs[:, :, K + 1 : n - K], pairs[:, :, n - K :]
                self._padded[key] = _Padded(whole, lines, *cuts)
        return self._padded[key]

    def _box(self, name: str, *shape: int) -> Tensor:
        """Return a complex work array."""
        key = (name, *shape)
        if key not in self._boxes:
            self._boxes[key] = torch.zeros(*shape, dtype=self.complex, device=self.device)
        return self._boxes[key]

    def _output(self, fields: int, members: int) -> Tensor:
        key = (fields, members)
        if key not in self._spectra:
            shape = (fields, members, *self.shape, 2)
            self._spectra[key] = torch.empty(shape, dtype=self.real, device=self.device)
        return self._spectra[key]

    # -- full arrays -----------------------------------------------------------------------------

    def gather(self, w_hat: Tensor) -> Tensor:
        """Return full retained spectra, on every rank, from each rank's columns."""
        if self.pencils:
            w_hat = self.pencils.gather_columns(w_hat)
        return self.slabs.gather_columns(w_hat) if self.slabs else w_hat

    def gather_field(self, field: Tensor) -> Tensor:
        """Return full physical fields, on every rank, from each rank's rows."""
        if not self.slabs:
            return field
        sizes = self._sizes_of(field)
        if self.pencils:
            field = self.pencils.gather_rows(field, sizes[1])
        return self.slabs.gather_rows(field, sizes[0])

    def maximum(self, values: np.ndarray) -> np.ndarray:
        """Return the largest value over the ranks, element by element."""
        for part in (self.slabs, self.pencils):
            values = part.maximum(values) if part else values
        return values


def _halves(parts: Sequence[Part], rows: slice) -> list[Part]:
    """Return some rows (kx) of parts."""
    return [(w[:, rows], _rows(factors, rows)) for w, factors in parts]


def _rows(factors: Tensor | None, rows: slice) -> Tensor | None:
    return None if factors is None else factors[:, :, rows]


def _fill(target: Tensor, parts, paired: bool = False) -> None:
    """Write ``w * factors`` of each part to its fields of ``target``.

    ``paired``: ``w`` has a leading axis of fields.
    """
    first = 0
    for w, factors in parts:
        if factors is None:
            target[first : first + (w.shape[0] if paired else 1)].copy_(w)
            first += 1
        else:
            number = factors.shape[0]
            torch.mul(w, factors, out=target[first : first + number])
            first += number
