r"""Band-limited fields: the model's own representation, the same on every grid.

A field is its retained spectrum, ``(..., 2K + 1, K + 1)`` in the forward norm (see
:mod:`hpc_closure.spectral.modes.grid`). Whatever grid a caller brings is cut to the model's band,
the model is evaluated on its own grid, and the answer is zero-padded to the caller's grid:
resolution invariance by construction, at a cost that does not depend on the caller's grid.

There are two transforms between fields and retained spectra, for two uses.
:class:`~hpc_closure.spectral.modes.transform.Transform` is the solver's: it reuses its work
arrays, transforms in place, and is split over ranks. This one is what a network and its training
need: it holds no work arrays, so calls may overlap, and autograd goes through it. Where the modes
sit and how draws fill them is the same, :mod:`~hpc_closure.spectral.modes.grid` and
:mod:`~hpc_closure.spectral.modes.half_plane`.
"""

import math
from collections.abc import Callable
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from hpc_closure.spectral.modes.grid import Grid, Row, resize, to_fields, to_spectra
from hpc_closure.spectral.modes.half_plane import ModeDraws, wavevectors_within

__all__ = ["Band", "band"]

KEPT_LAYOUTS = 8
LARGE = 1 << 18  # numbers of a matrix that leaves the second cache
LARGEST = 25  # numbers of the modes |kx|, |ky| <= 2


class Band:
    """The modes ``|kx|, |ky| <= K`` of a periodic square of side ``length``.

    In one dimension those of a line, a plane of one row: spectra (..., 1, K + 1), fields
    (..., 1, n) (:class:`~hpc_closure.spectral.modes.grid.Row`).
    """

    def __init__(self, modes: int, length: float = 1.0, dimensions: int = 2):
        if modes < 1:
            raise ValueError(f"modes={modes}, expected at least 1")
        self.modes, self.length = modes, length
        size = 2 * ((3 * modes + 2) // 2)
        self.grid = Row(size, length) if dimensions == 1 else Grid(size, length)
        self.shape = self.grid.shape
        self._cache: dict = {}
        self._layouts: dict = {}

    @cached_property
    def groups(self) -> Tensor:
        """Index of each mode's group of equal ``|k|^2``, int64, shape of the spectrum."""
        return torch.unique(self.grid.integer_k2, return_inverse=True)[1]

    @cached_property
    def group_k2(self) -> Tensor:
        """Integer ``|k|^2`` of every group, int64."""
        return torch.unique(self.grid.integer_k2)

    @cached_property
    def group_size(self) -> Tensor:
        """Modes (of the whole plane) in every group, float64."""
        size = torch.zeros(len(self.group_k2), dtype=torch.float64)
        return size.index_add_(0, self.groups.flatten(), self.weights.flatten())

    @cached_property
    def group_shell(self) -> Tensor:
        """Shell of every group, int64."""
        return torch.round(self.group_k2.double().sqrt()).long()

    @cached_property
    def weights(self) -> Tensor:
        """Parseval weights, shape of the spectrum, float64."""
        return self.grid.weights.expand(self.shape).contiguous()

    @cached_property
    def half_plane(self) -> ModeDraws:
        """Where the draws of white noise go: the wavevectors of the half plane, by |k|."""
        vectors = wavevectors_within(self.modes)
        if self.grid.dimensions == 1:
            vectors = vectors[vectors[:, 0] == 0]
        return ModeDraws(vectors, self.modes)

    def on(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Attribute ``name`` (here or of the grid) as a tensor on ``device``, kept for reuse."""
        key = (name, str(device), dtype)
        if key not in self._cache:
            value = getattr(self, name) if hasattr(type(self), name) else getattr(self.grid, name)
            self._cache[key] = value.to(device=device, dtype=dtype)
        return self._cache[key]

    def to_spectral(self, field: Tensor) -> Tensor:
        """Fields (..., n, n), n > 2K or n = 2K + 2 at least, to retained spectra."""
        self.check_grid(*field.shape[-2:])
        return to_spectra(field, self.modes)

    def check_grid(self, rows: int, columns: int) -> None:
        """Raise ValueError unless a field has the band's sides and is fine enough for it."""
        line, least = self.grid.dimensions == 1, 2 * self.modes + 2
        if rows != (1 if line else columns) or columns < least - 1:
            needs = f"needs a square grid of at least {least}"
            if line:
                needs = f"on a line needs one row of at least {least} points"
            raise ValueError(f"field is {rows}x{columns}; a band of {self.modes} modes {needs}")

    def share_beyond(self, w_hat: Tensor, size: int | None = None) -> Tensor:
        """Share (...) of the variance of states that is outside this band; 0 where there is none.

        Args:
            w_hat: retained spectra (..., 2K + 1, K + 1), or whole ones as ``rfft2`` gives them.
            size: points per side of the fields of whole ones, even.
        """
        power = torch.view_as_real(w_hat).double().square().sum(-1)
        # a column with ky > 0 stands for two, but for the last of a whole spectrum
        power[..., 1:] *= 2.0
        if size is not None:
            power[..., size // 2] *= 0.5
        power[..., 0, 0] = 0.0
        modes = self.modes
        beyond = power[..., modes + 1 :].sum((-2, -1))
        if w_hat.shape[-2] > 2 * modes + 1:
            beyond = beyond + power[..., modes + 1 : -modes, : modes + 1].sum((-2, -1))
        return beyond / power.sum((-2, -1)).clamp(min=torch.finfo(power.dtype).tiny)

    def to_physical(self, w_hat: Tensor, size: int) -> Tensor:
        """Retained spectra to fields (..., n, n); modes that n cannot carry are cut."""
        return to_fields(w_hat, size)

    def phases(self, positions: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """cos k.x and -sin k.x of every mode at ``positions`` (S, 2): real pairs (S, 2 modes).

        Products with real pairs of spectra are the real part of sum(w hat e^(i k.x)), at half the
        cost of complex ones. The last few are kept: a layout is used for many states.
        """

        def make(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            phases = (x[:, :, None] * y[:, None, :]).flatten(1)
            return (_conjugate_pairs(phases).flatten(1),)

        return self._of_layout("phases", make, positions, device)[0]

    def _of_layout(
        self,
        name: str,
        make: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        positions: Tensor,
        device: torch.device | str,
    ) -> tuple[Tensor, ...]:
        """What is made of e^(i kx x) and e^(i ky y) at positions; the last few are kept."""
        positions = positions.double().cpu().contiguous()
        key = (name, positions.numpy().tobytes(), str(device))
        if key not in self._layouts:
            x = torch.exp(1j * positions[:, :1] * self.grid.kx.reshape(1, -1))
            y = torch.exp(1j * positions[:, 1:] * self.grid.ky.reshape(1, -1))
            self._layouts[key] = tuple(one.to(device) for one in make(x, y))
            while len(self._layouts) > KEPT_LAYOUTS:
                self._layouts.pop(next(iter(self._layouts)), None)
        return self._layouts[key]

    def values(self, w_hat: Tensor, positions: Tensor) -> Tensor:
        """Values (..., S) in float64 of spectra at ``positions`` (S, 2).

        First along x, then along y, where the matrix of :meth:`phases` would be larger than all
        the rest.
        """
        device = w_hat.device
        if 2 * len(positions) * math.prod(self.shape) <= LARGE:
            return self.at(w_hat, self.phases(positions, device))

        def make(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            return x, _conjugate_pairs(y)

        x, y = self._of_layout("waves", make, positions, device)
        weighted = w_hat.to(torch.complex128) * self.on("weights", device, torch.float64)
        return (torch.view_as_real(x @ weighted) * y).sum((-2, -1))

    def at(self, w_hat: Tensor, phases: Tensor) -> Tensor:
        """Values (..., S) in float64 of spectra at the points of ``phases``."""
        weighted = w_hat.to(torch.complex128) * self.on("weights", w_hat.device, torch.float64)
        return torch.view_as_real(weighted).flatten(-3) @ phases.to(w_hat.device).T

    def by_group(self, values: Tensor) -> Tensor:
        """Sum over the plane of mode values (..., 2K + 1, K + 1) within groups, (..., groups)."""
        weighted = values * self.on("weights", values.device, values.dtype)
        out = values.new_zeros(*values.shape[:-2], len(self.group_k2))
        return out.index_add_(
            -1, self.on("groups", values.device, torch.int64).flatten(), weighted.flatten(-2)
        )

    def variance(self, spectrum: Tensor) -> float:
        """Pointwise variance of a field with variances per mode (groups,)."""
        return float((spectrum * self.group_size).sum())

    def spread(self, by_group: Tensor) -> Tensor:
        """Group values (..., groups) to every mode of the spectrum."""
        return by_group[..., self.on("groups", by_group.device, torch.int64)]

    def largest(self, w_hat: Tensor) -> Tensor:
        """The modes |kx|, |ky| <= 2 as real numbers, (..., 25)."""
        if self.modes < 2:
            return band(2, self.length).largest(resize(w_hat, 2))
        pairs = torch.view_as_real(w_hat.resolve_conj()).flatten(-3)
        return pairs.index_select(-1, self.on("largest_places", w_hat.device, torch.int64))

    @cached_property
    def largest_places(self) -> Tensor:
        """Where :meth:`largest` finds its numbers among the real pairs of a spectrum, int64.

        The column ky = 0, real and (but for the mean) imaginary, then the others, kx by kx.
        """
        kx = torch.tensor([0, 1, 2, -2, -1]) % self.shape[0]
        places = 2 * (kx[:, None] * self.shape[1] + torch.arange(3))
        column = places[:3, 0]
        return torch.cat(
            [column, column[1:] + 1, places[:, 1:].flatten(), places[:, 1:].flatten() + 1]
        )

    def summary(self, w_hat: Tensor) -> Tensor:
        """Numbers (..., 51) of a state: its largest modes, the same over its rms, log rms.

        None (..., 0) on a line, where no network reads them.
        """
        if self.grid.dimensions == 1:
            return w_hat.real.new_zeros(*w_hat.shape[:-2], 0)
        low = self.largest(w_hat)
        weights = self.on("weights", w_hat.device, low.dtype)
        power = (torch.view_as_real(w_hat).square().sum(-1) * weights).sum((-2, -1))
        rms = power.clamp(min=torch.finfo(low.dtype).tiny).sqrt()[..., None]
        return torch.cat([low, low / rms, rms.log()], dim=-1)

    def place_largest(self, numbers: Tensor) -> Tensor:
        """Inverse of :meth:`largest`: (..., 25) numbers to a spectrum, else zero."""
        if numbers.dtype == torch.bfloat16:  # there are no complex numbers of it
            numbers = numbers.float()
        if self.modes < 2:
            return resize(band(2, self.length).place_largest(numbers), self.modes)
        known = nn.functional.pad(numbers, (0, 1)).index_select(
            -1, self.on("largest_sources", numbers.device, torch.int64)
        )
        known = known * self.on("largest_signs", numbers.device, numbers.dtype)
        return torch.view_as_complex(known.unflatten(-1, (*self.shape, 2)))

    @cached_property
    def largest_sources(self) -> Tensor:
        """For each of a spectrum's real pairs which of the 25 numbers it is; 25 where none is."""
        sources = torch.full((2 * math.prod(self.shape),), LARGEST)
        sources[self.largest_places] = torch.arange(LARGEST)
        pairs = sources.view(*self.shape, 2)
        pairs[-2:, 0] = pairs[1:3, 0].flip(0)  # the column of a real field
        return sources

    @cached_property
    def largest_signs(self) -> Tensor:
        """-1 where the real pair is that of a conjugate, else 1."""
        signs = torch.ones(*self.shape, 2)
        signs[-2:, 0, 1] = -1.0
        return signs.flatten()

    def white(self, normals: np.ndarray) -> Tensor:
        """Complex normals (B, H) of the half plane, E|z|^2 = 2, to the spectrum of white noise.

        Every mode has E|z_hat|^2 = 1; the field is real.
        """
        padded = self.half_plane.empty(len(normals))
        padded[:, :-1] = normals * np.sqrt(0.5)
        return torch.from_numpy(self.half_plane.place(padded))


def _conjugate_pairs(values: Tensor) -> Tensor:
    return torch.view_as_real(values.conj().resolve_conj())


@lru_cache(maxsize=32)
def band(modes: int, length: float = 1.0, dimensions: int = 2) -> Band:
    """The band of ``modes`` modes; built once."""
    return Band(modes, length, dimensions)
