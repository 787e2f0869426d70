r"""Band-limited fields: the grid-independent representation of states and closures in a model.

A field is represented by its retained spectrum ``(..., 2K + 1, K + 1)`` in the forward norm (see
:mod:`hpc_closure.spectral.modes.grid`). A field on any grid is cut to the model's band, the model
is evaluated on its own grid, and the result is zero-padded to the caller's grid. Results are
therefore independent of the caller's resolution, and so is the cost of the model.

The package has two transforms between fields and retained spectra.
:class:`~hpc_closure.spectral.modes.transform.Transform` serves the solver: it reuses work arrays,
transforms in place, and is distributed over ranks. :class:`Band` serves networks and training: it
has no work arrays, so calls may overlap, and autograd differentiates it. Both use the same layout
of modes (:mod:`~hpc_closure.spectral.modes.grid`) and the same order of random draws
(:mod:`~hpc_closure.spectral.modes.half_plane`).
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpc_closure.spectral.modes.grid import (
    Grid,
    hermitian,
    resize,
    to_device_cached,
    to_fields,
    to_spectra,
)
from hpc_closure.spectral.modes.half_plane import ModeDraws, wavevectors_within
from hpc_closure.spectral.modes.resolution import alike, per_side

__all__ = ["LARGEST", "Band", "band", "largest_count"]

KEPT_LAYOUTS = 8  # sensor layouts whose phases are cached
LARGE = 1 << 18  # numbers of a matrix that no longer fits into the L2 cache
LOW = 2  # wavenumber of each side up to which networks read modes as numbers
LARGEST = 25  # independent real numbers of the modes |kx|, |ky| <= 2 of a square


def largest_count(dimensions: int) -> int:
    """Return the number of independent real numbers of the modes up to 2: 5, 25 or 125."""
    return (2 * LOW + 1) ** dimensions


class Band:
    """The modes ``|kx|, |ky| <= K`` of a periodic square of side ``length``.

    On a line spectra are (..., K + 1) and fields (..., n); of three sides they are
    (..., 2K + 1, 2K + 1, K + 1) and (..., n, n, n). Shapes below are those of a square. The sides
    of a box may differ in length and modes: ``length`` and ``modes`` are then tuples with one
    number per side, and so is every number of points below.

    Attributes:
        modes, length: of each side; a number if all sides have the same.
        mode_counts: modes of every side.
        grid: grid without aliasing of products of two fields.
        shape: shape of a spectrum.
        axes: the last axes, of the modes of a spectrum and of the points of a field.
    """

    modes: Any
    length: Any

    def __init__(
        self,
        modes: int | Sequence[int],
        length: float | Sequence[float] = 1.0,
        dimensions: int = 2,
    ):
        self.mode_counts: tuple[int, ...] = per_side(modes, dimensions, "modes")
        if min(self.mode_counts) < 1:
            raise ValueError(f"modes={modes}, expected at least 1")
        self.modes, self.length = alike(modes), alike(length)
        size = [2 * ((3 * count + 2) // 2) for count in self.mode_counts]
        self.grid = Grid(size, per_side(length, dimensions, "length"), dimensions)
        self.shape, self.axes = self.grid.shape, self.grid.axes
        self._cache: dict = {}
        self._layouts: dict = {}

    @property
    def groups(self) -> Tensor:
        """Index of each mode's group of equal ``|k|^2``, int64, shape of the spectrum."""
        return self.grid.groups

    @property
    def group_k2(self) -> Tensor:
        """``|k|^2`` of every group in units of the smallest wavenumber squared, float64."""
        return self.grid.group_k2

    @cached_property
    def group_size(self) -> Tensor:
        """Number of modes of the full plane in every group, float64."""
        size = torch.zeros(len(self.group_k2), dtype=torch.float64)
        return size.index_add_(0, self.groups.flatten(), self.weights.flatten())

    @cached_property
    def group_shell(self) -> Tensor:
        """Shell of every group, int64."""
        shell = torch.zeros(len(self.group_k2), dtype=torch.int64)
        shell[self.groups.flatten()] = self.grid.shell().flatten()
        return shell

    @cached_property
    def weights(self) -> Tensor:
        """Parseval weights, shape of the spectrum, float64."""
        return self.grid.weights.expand(self.shape).contiguous()

    @cached_property
    def half_plane(self) -> ModeDraws:
        """Wavevectors of the half plane sorted by |k|, the order of white-noise draws."""
        most = max(self.mode_counts)
        vectors = wavevectors_within(most, dimensions=max(2, self.grid.dimensions))
        if self.grid.dimensions == 1:
            vectors = vectors[vectors[:, 0] == 0]
            return ModeDraws(vectors, most)
        vectors = vectors[(abs(vectors) <= self.mode_counts).all(1)]
        return ModeDraws(vectors, self.mode_counts)

    def on(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return attribute ``name`` of the band or its grid as a cached tensor on ``device``."""
        key = (name, str(device), dtype)
        if key not in self._cache:
            value = getattr(self, name) if hasattr(type(self), name) else getattr(self.grid, name)
            self._cache[key] = value.to(device=device, dtype=dtype)
        return self._cache[key]

    def wavenumbers(self, like: Tensor) -> list[Tensor]:
        """Return the wavenumbers of each side, on the device and in the precision of ``like``."""
        return [to_device_cached(k, like) for k in self.grid.k]

    def to_spectral(self, field: Tensor) -> Tensor:
        """Transform fields (..., n, n) to retained spectra; n must be at least 2K + 1."""
        self.check_grid(*field.shape[-len(self.shape) :])
        return to_spectra(field, self.mode_counts)

    def points(self, size: int | Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a field of ``size`` points per side, (n, n)."""
        return per_side(size, self.grid.dimensions, "points")

    def proportional(self, number: int, step: int = 1) -> Any:
        """Return modes or points per side, ``number`` of them on the side of fewest modes.

        Others have more, in proportion to the modes of the band, rounded up to multiples of
        ``step``. A number if all sides have the same.
        """
        unit = min(self.mode_counts) * step
        return alike([-(-number * count // unit) * step for count in self.mode_counts])

    def check_grid(self, *points: int) -> None:
        """Raise ValueError unless a field (n, n) has the sides of this band and is fine enough.

        Sides of equal modes and lengths need equally many points.
        """
        if not isinstance(self.modes, int) or not isinstance(self.length, (int, float)):
            return self._check_points(points)
        least, size = 2 * self.modes + 2, points[-1]
        if points == self.points(size) and size >= least - 1:
            return
        needs = {
            1: f"on a line needs at least {least} points",
            2: f"needs a square grid of at least {least}",
            3: f"needs a cubic grid of at least {least}",
        }[self.grid.dimensions]
        raise ValueError(
            f"field is {'x'.join(map(str, points))}; a band of {self.modes} modes {needs}"
        )

    def _check_points(self, points: tuple[int, ...]) -> None:
        """Raise ValueError unless a field of unequal sides is fine enough."""
        if all(size >= 2 * count + 1 for size, count in zip(points, self.mode_counts)):
            return
        written = [" x ".join(map(str, each)) for each in (points, self.mode_counts)]
        least = " x ".join(str(2 * count + 2) for count in self.mode_counts)
        raise ValueError(
            f"field is {written[0]}; a band of {written[1]} modes needs at least {least} points"
        )

    def resized(self, w_hat: Tensor) -> Tensor:
        """Cut or zero-pad spectra of any number of modes to this band."""
        return resize(w_hat, self.mode_counts)

    def hermitian(self, w_hat: Tensor) -> Tensor:
        """Return a copy of spectra whose modes of last wavenumber 0 are those of a real field."""
        return hermitian(w_hat, self.grid.dimensions)

    def each(self, values: Tensor) -> Tensor:
        """Give values (..., ) an axis per side, (..., 1, 1), to multiply spectra or fields."""
        return values.view(*values.shape, *[1] * len(self.shape))

    @property
    def white_rms(self) -> float:
        """Rms of a field whose modes all have unit variance, the root of their number."""
        if isinstance(self.modes, tuple):
            return math.sqrt(math.prod(2 * count + 1 for count in self.mode_counts))
        return float(2 * self.modes + 1) ** (self.grid.dimensions / 2)

    @cached_property
    def independent(self) -> Tensor:
        """Whether each mode is independent of those before it, bool, shape of the spectrum.

        Of last wavenumber 0, a mode and its mirror image are conjugates.
        """
        out = torch.ones(self.shape, dtype=torch.bool)
        plane, sides = out[..., 0], self.shape[:-1]
        at = [torch.arange(one) for one in sides]
        signed = [torch.where(k > one // 2, -1, k.sign()) for k, one in zip(at, sides)]
        order = torch.zeros(sides, dtype=torch.int64)
        for axis, sign in enumerate(signed):
            order = 3 * order + sign.view(-1, *[1] * (len(sides) - 1 - axis))
        plane.copy_(order >= 0)
        return out

    def share_beyond(self, w_hat: Tensor, size: Any = None) -> Tensor:
        """Compute the share (...) of the variance of states outside this band.

        Args:
            w_hat: retained spectra (..., 2K + 1, K + 1), or full spectra from ``rfft2``.
            size: points of the last side of the fields of full spectra, even; None for retained
                spectra.
        """
        power = torch.view_as_real(w_hat).double().square().sum(-1)
        # a column with ky > 0 stands for ky and -ky, except the last column of a full spectrum
        power[..., 1:] *= 2.0
        if size is not None:
            power[..., size // 2] *= 0.5
        power.flatten(self.axes[0])[..., 0] = 0.0  # the mean
        *others, last = self.mode_counts
        beyond, inside = power[..., last + 1 :].sum(self.axes), power[..., : last + 1]
        for axis, modes in zip(self.axes[-2::-1], others[::-1]):
            middle = inside.shape[axis] - 2 * modes - 1
            if middle > 0:
                beyond = beyond + inside.narrow(axis, modes + 1, middle).sum(self.axes)
                ends = inside.narrow(axis, 0, modes + 1), inside.narrow(axis, -modes, modes)
                inside = torch.cat(ends, axis)
        return beyond / power.sum(self.axes).clamp(min=torch.finfo(power.dtype).tiny)

    def to_physical(self, w_hat: Tensor, size: int | Sequence[int]) -> Tensor:
        """Transform retained spectra to fields (..., n, n); drops modes that n cannot resolve."""
        return to_fields(w_hat, size, self.grid.dimensions)

    def phases(self, positions: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Compute (cos k.x, -sin k.x) of every mode at ``positions`` (S, 2): (S, 2 modes).

        The product with a spectrum's real pairs is the real part of sum(w hat e^(i k.x)), at half
        the cost of a complex product. The last few layouts are cached, because a layout is used
        for many states.
        """

        def make(*waves: Tensor) -> tuple[Tensor, ...]:
            phases = waves[0]
            for wave in waves[1:]:
                phases = (phases[:, :, None] * wave[:, None, :]).flatten(1)
            return (_conjugate_pairs(phases).flatten(1),)

        return self._of_layout("phases", make, positions, device)[0]

    def _of_layout(
        self,
        name: str,
        make: Callable[..., tuple[Tensor, ...]],
        positions: Tensor,
        device: torch.device | str,
    ) -> tuple[Tensor, ...]:
        """Call ``make(e^(i kx x), e^(i ky y))`` for positions (S, 2); caches the last few results.

        Args:
            name: name of the result, part of the cache key.
            make: (S, 2K + 1) and (S, K + 1) complex -> tensors.
            positions: (S, 2).
            device: device of the result.
        """
        positions = positions.double().cpu().contiguous()
        key = (name, positions.numpy().tobytes(), str(device))
        if key not in self._layouts:
            x = [
                torch.exp(1j * one[:, None] * k.reshape(1, -1))
                for one, k in zip(positions.unbind(1), self.grid.k, strict=True)
            ]
            self._layouts[key] = tuple(one.to(device) for one in make(*x))
            while len(self._layouts) > KEPT_LAYOUTS:
                self._layouts.pop(next(iter(self._layouts)), None)
        return self._layouts[key]

    def values(self, w_hat: Tensor, positions: Tensor) -> Tensor:
        """Evaluate spectra at ``positions`` (S, 2); returns (..., S), float64.

        If the matrix of :meth:`phases` would exceed the cache, sum first along x, then along y.
        """
        device = w_hat.device
        small = 2 * len(positions) * math.prod(self.shape) <= LARGE
        if small or self.grid.dimensions != 2:
            return self.at(w_hat, self.phases(positions, device))

        def make(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            return x, _conjugate_pairs(y)

        x, y = self._of_layout("waves", make, positions, device)
        weighted = w_hat.to(torch.complex128) * self.on("weights", device, torch.float64)
        return (torch.view_as_real(x @ weighted) * y).sum((-2, -1))

    def at(self, w_hat: Tensor, phases: Tensor) -> Tensor:
        """Evaluate spectra at the points of ``phases``; returns (..., S), float64."""
        weighted = w_hat.to(torch.complex128) * self.on("weights", w_hat.device, torch.float64)
        pairs = torch.view_as_real(weighted).flatten(-1 - len(self.shape))
        return pairs @ phases.to(w_hat.device).T

    def by_group(self, values: Tensor) -> Tensor:
        """Sum mode values (..., 2K + 1, K + 1) of the full plane per group; (..., groups)."""
        weighted = values * self.on("weights", values.device, values.dtype)
        out = values.new_zeros(*values.shape[: self.axes[0]], len(self.group_k2))
        flat = weighted.flatten(self.axes[0])
        return out.index_add_(-1, self.on("groups", values.device, torch.int64).flatten(), flat)

    def variance(self, spectrum: Tensor) -> Any:
        """Compute the pointwise variance of a field from variances per mode (groups,).

        From those of C channels, (C, groups), compute a tensor (C,).
        """
        variance = (spectrum * self.group_size).sum(-1)
        return variance if variance.ndim else float(variance)

    def spread(self, by_group: Tensor) -> Tensor:
        """Expand group values (..., groups) to every mode, (..., 2K + 1, K + 1)."""
        return by_group[..., self.on("groups", by_group.device, torch.int64)]

    @property
    def _fuller(self) -> "Band":
        """The band with at least the wavenumbers up to 2 of each side."""
        counts = [max(LOW, count) for count in self.mode_counts]
        return band(alike(counts), self.length, self.grid.dimensions)

    def largest(self, w_hat: Tensor) -> Tensor:
        """Extract the modes |kx|, |ky| <= 2 as real numbers, (..., 25).

        There are 5 of a line and 125 of a cube (:func:`largest_count`).
        """
        if min(self.mode_counts) < LOW:
            return self._fuller.largest(self._fuller.resized(w_hat))
        pairs = torch.view_as_real(w_hat.resolve_conj()).flatten(-1 - len(self.shape))
        return pairs.index_select(-1, self.on("largest_places", w_hat.device, torch.int64))

    @cached_property
    def _low_modes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Places among the modes of a spectrum, int64, of those up to 2.

        Of those of last wavenumber 0, one of each pair k and -k, the mean first, and their mirror
        images without that of the mean; of all others.
        """
        *others, last = self.shape
        k = [torch.tensor([0, 1, 2, -2, -1])] * (self.grid.dimensions - 1)
        half = torch.cartesian_prod(*k).view(-1, len(k)) if k else torch.zeros(1, 0).long()
        sides = torch.tensor(others).long()
        strides = torch.tensor([math.prod(others[axis + 1 :]) for axis in range(len(k))]).long()

        def places(wavevectors: Tensor) -> Tensor:
            return last * (wavevectors % sides * strides).sum(1)

        # the first wavenumber that is not zero is positive
        sign = (half.sign() * 3 ** torch.arange(len(k)).flip(0)).sum(1)
        one = torch.cat([half[sign == 0], half[sign > 0]])
        columns = places(half)[:, None] + torch.arange(1, LOW + 1)
        return places(one), places(-one[1:]), columns.flatten()

    @cached_property
    def largest_places(self) -> Tensor:
        """Indices (25,) of the numbers of :meth:`largest` in a spectrum's real pairs, int64.

        Order: real parts of the column ky = 0, its imaginary parts without the mean, then real and
        imaginary parts of the other columns, kx by kx.
        """
        column, _, others = (2 * one for one in self._low_modes)
        return torch.cat([column, column[1:] + 1, others, others + 1])

    def summary(self, w_hat: Tensor) -> Tensor:
        """Compute numbers (..., 51) of a state: its largest modes, these over its rms, log rms."""
        low = self.largest(w_hat)
        weights = self.on("weights", w_hat.device, low.dtype)
        power = (torch.view_as_real(w_hat).square().sum(-1) * weights).sum(self.axes)
        rms = power.clamp(min=torch.finfo(low.dtype).tiny).sqrt()[..., None]
        return torch.cat([low, low / rms, rms.log()], dim=-1)

    def place_largest(self, numbers: Tensor) -> Tensor:
        """Invert :meth:`largest`: put (..., 25) numbers into spectra that are zero elsewhere."""
        if numbers.dtype == torch.bfloat16:  # torch has no complex bfloat16
            numbers = numbers.float()
        if min(self.mode_counts) < LOW:
            return self.resized(self._fuller.place_largest(numbers))
        known = nn.functional.pad(numbers, (0, 1)).index_select(
            -1, self.on("largest_sources", numbers.device, torch.int64)
        )
        known = known * self.on("largest_signs", numbers.device, numbers.dtype)
        return torch.view_as_complex(known.unflatten(-1, (*self.shape, 2)))

    @cached_property
    def largest_sources(self) -> Tensor:
        """Index into the 25 numbers for each real number of a spectrum; 25 where there is none."""
        count = len(self.largest_places)
        sources = torch.full((2 * math.prod(self.shape),), count)
        sources[self.largest_places] = torch.arange(count)
        column, mirrored, _ = self._low_modes  # the column is that of a real field
        for part in range(2):
            sources[2 * mirrored + part] = sources[2 * column[1:] + part]
        return sources

    @cached_property
    def largest_signs(self) -> Tensor:
        """Signs of a spectrum's real numbers: -1 for imaginary parts of conjugates, else 1."""
        signs = torch.ones(2 * math.prod(self.shape))
        signs[2 * self._low_modes[1] + 1] = -1.0
        return signs

    def white(self, normals: np.ndarray) -> Tensor:
        """Place complex normals (B, H), E|z|^2 = 2, into spectra of white noise, E|z_hat|^2 = 1.

        H is the number of wavevectors of the half plane. The fields are real.
        """
        padded = self.half_plane.empty(len(normals))
        padded[:, :-1] = normals * np.sqrt(0.5)
        placed = self.half_plane.place(padded)  # of a line with a row
        return torch.from_numpy(placed.reshape(-1, *self.shape))


def _conjugate_pairs(values: Tensor) -> Tensor:
    return torch.view_as_real(values.conj().resolve_conj())


@lru_cache(maxsize=32)
def _band(modes: Any, length: Any, dimensions: int) -> Band:
    return Band(modes, length, dimensions)


def band(modes: Any, length: Any = 1.0, dimensions: int = 2) -> Band:
    """Return the cached band of ``modes`` modes; both may be tuples with a number per side."""
    return _band(alike(modes), alike(length), dimensions)
