"""Initial laws: draw a member's spectrum at t = 0 from its key, the same on every grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from hpc_closure.spectral.recipe import Count, Family, Finite, Positive

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from hpc_closure.spectral.modes.grid import Grid


class Initial(Family):
    """Initial law."""

    default: ClassVar[str] = "gaussian_field"
    #: dimensions of the flows that the law is for
    dimensions: ClassVar[tuple[int, ...]] = (2,)

    kind: str

    def draw(self, grid: Grid, members: Sequence[int], seed: int, stage: str) -> Tensor:
        """Draw initial states: retained spectra ``(members, ...)`` complex128.

        Args:
            grid: the solver's grid.
            members: member ids.
            seed: seed of the experiment.
            stage: stage of the pipeline, part of the Philox key.
        """
        from hpc_closure.spectral.noise.counters import key_of

        return self.spectra(grid, [key_of(seed, stage, member) for member in members])

    def spectra(self, grid: Grid, keys: list[np.ndarray]) -> Tensor:
        """Draw initial states from the Philox keys of the members; see :meth:`draw`."""
        raise NotImplementedError


class GaussianField(Initial):
    """Gaussian random field, E |w_hat|^2 = 2 sigma^2 (k^2 + tau^2)^-alpha, zero mean.

    ``sigma = tau^(alpha - 1)``. This is the law of the published code (Li et al. 2021): the real
    part of a field with independent complex coefficients.
    """

    kind: Literal["gaussian_field"] = Field(
        "gaussian_field", description="initial law; gaussian_field is the published one"
    )
    alpha: Positive = Field(2.5, description="weights (4 pi^2 k^2 + tau^2)^(-alpha/2)")
    tau: Positive = Field(7.0, description="inverse length")

    def spectra(self, grid, keys):
        import numpy as np

        vectors = _nested(grid, max(grid.mode_counts))
        vectors = vectors[(vectors != 0).any(1)]
        sigma = self.tau ** (self.alpha - 1.0)
        k2 = _scaled_k2(vectors, grid) * grid.unit**2
        std = np.sqrt(2.0) * sigma * (k2 + self.tau**2) ** (-self.alpha / 2)
        return _random_modes(grid, keys, vectors, std)

    def hash_parameters(self) -> dict:
        return {**super().hash_parameters(), "amplitude": None}


class Band(Initial):
    """Random phases and Gaussian amplitudes on |k| within width of wavenumber.

    Every mode has the same expected energy; the expected total is ``energy``. In three dimensions
    the velocity is drawn, without divergence.
    """

    dimensions: ClassVar[tuple[int, ...]] = (2, 3)

    kind: Literal["band"] = Field("band", description="initial law")
    wavenumber: Positive = Field(6.0, description="centre, integer wavenumber")
    width: Positive = Field(2.0, description="half width")
    energy: Positive = Field(0.5, description="kinetic energy")

    def spectra(self, grid, keys):
        import numpy as np

        vectors = _nested(grid, self._most(grid))
        length = np.sqrt(_scaled_k2(vectors, grid))
        vectors = vectors[(np.abs(length - self.wavenumber) <= self.width) & (length > 0)]
        if not len(vectors):
            raise ValueError(
                f"no retained mode within {self.width} of wavenumber {self.wavenumber}: "
                "widen the band, or use a finer grid"
            )
        if grid.dimensions == 3:
            return _random_vectors(grid, keys, vectors, (self.energy / len(vectors)) ** 0.5)
        k2 = _scaled_k2(vectors, grid) * grid.unit**2
        return _random_modes(grid, keys, vectors, np.sqrt(self.energy * k2 / len(vectors)))

    def _most(self, grid: Grid) -> int:
        """Return the largest component of a wavevector of the band that the grid retains."""
        if grid.dimensions == 2:
            return max(grid.mode_counts)
        return min(max(grid.mode_counts), int(self.wavenumber + self.width))


class TaylorGreen(Initial):
    """w = 2 k amplitude sin(k x) sin(k y), an exact solution that only decays.

    In three dimensions u = amplitude (sin x cos y cos z, -cos x sin y cos z, 0) at k (x, y, z),
    which decays to turbulence (Taylor and Green 1937; Brachet et al., J. Fluid Mech. 130, 1983).
    """

    dimensions: ClassVar[tuple[int, ...]] = (2, 3)

    kind: Literal["taylor_green"] = Field("taylor_green", description="initial law")
    amplitude: Finite = Field(1.0, description="largest speed")
    wavenumber: Count = Field(1, description="integer wavenumber")

    def spectra(self, grid, keys):
        out = _zeros(grid, keys)
        m = self.wavenumber
        if grid.dimensions == 3:
            return self._in_a_cube(out, m)
        value = 2 * grid.unit * m * self.amplitude / 4
        out[:, m, m] = -value
        out[:, -m, m] = value
        return out

    def _in_a_cube(self, velocity: Tensor, m: int) -> Tensor:
        """Fill the velocities ``(members, 3, ...)`` of the vortex of wavenumber ``m``."""
        import torch

        value = torch.tensor(0.125j * self.amplitude, dtype=velocity.dtype)
        for sign in (1, -1):
            velocity[:, 0, m, sign * m, m] = -value
            velocity[:, 0, -m, sign * m, m] = value
            velocity[:, 1, sign * m, m, m] = value
            velocity[:, 1, sign * m, -m, m] = -value
        return velocity


class AtRest(Initial):
    """At rest."""

    dimensions: ClassVar[tuple[int, ...]] = (1, 2, 3)

    kind: Literal["zero"] = "zero"

    def spectra(self, grid, keys):
        return _zeros(grid, keys)


class LineModes(Initial):
    """On a line: Gaussian modes 1 .. wavenumber; ``amplitude`` is the expected rms."""

    dimensions: ClassVar[tuple[int, ...]] = (1,)

    kind: Literal["line"] = Field("line", description="initial law")
    wavenumber: Positive = Field(6.0, description="highest wavenumber, integer")
    amplitude: Positive = Field(1.0, description="rms of the state")

    def spectra(self, grid, keys):
        import torch

        from hpc_closure.spectral.noise.counters import STREAM_INITIAL, complex_normals

        num = min(int(self.wavenumber), grid.modes)
        out = _zeros(grid, keys)
        for row, key in enumerate(keys):
            z = complex_normals(key, STREAM_INITIAL, 0, 1, num)[0]
            out[row, 1 : num + 1] = torch.from_numpy(z) * (self.amplitude / 2 / num**0.5)
        return out

    def hash_parameters(self) -> dict:
        return {**super().hash_parameters(), "wavenumber": int(self.wavenumber)}


def _zeros(grid: Grid, keys: list[np.ndarray]) -> Tensor:
    import torch

    vectors = (3,) if grid.dimensions == 3 else ()
    return torch.zeros(len(keys), *vectors, *grid.shape, dtype=torch.complex128)


def _scaled_k2(vectors: np.ndarray, grid: Grid) -> np.ndarray:
    """Return ``|k|^2`` of integer wavevectors in units of the smallest wavenumber squared."""
    import numpy as np

    return ((vectors * (max(grid.lengths) / np.array(grid.lengths))) ** 2).sum(1)


def _nested(grid: Grid, modes: int) -> np.ndarray:
    """Return a grid's half-plane wavevectors by square rings: those of a smaller grid come first.

    Components are at most ``modes``.
    """
    import numpy as np

    from hpc_closure.spectral.modes.half_plane import wavevectors_within

    vectors = wavevectors_within(modes, dimensions=grid.dimensions)
    vectors = vectors[(np.abs(vectors) <= grid.mode_counts).all(1)]
    return vectors[np.argsort(np.abs(vectors).max(1), kind="stable")]


def _random_modes(grid: Grid, keys: list, vectors: np.ndarray, std: np.ndarray) -> Tensor:
    """Draw Gaussian modes ``vectors`` with ``E |w_hat|^2 = std^2``; returns retained spectra."""
    import numpy as np
    import torch

    from hpc_closure.spectral.modes.half_plane import ModeDraws
    from hpc_closure.spectral.noise.counters import STREAM_INITIAL, complex_normals

    draws = ModeDraws(vectors, grid.mode_counts)
    values = draws.empty(len(keys))
    for row, key in zip(values, keys):
        row[:-1] = complex_normals(key, STREAM_INITIAL, 0, 1, len(vectors))[0]
    values[:, :-1] *= np.sqrt(0.5) * std
    return draws.spread(torch.from_numpy(draws.place(values)), grid.shape)


def _random_vectors(grid: Grid, keys: list, vectors: np.ndarray, std: float) -> Tensor:
    """Draw solenoidal Gaussian modes with ``E |u_hat|^2 = std^2``; returns retained spectra."""
    import numpy as np
    import torch

    from hpc_closure.spectral.modes.half_plane import ModeDraws, Polarisation
    from hpc_closure.spectral.noise.counters import STREAM_INITIAL, complex_normals

    draws, polarisation = ModeDraws(vectors, grid.mode_counts), Polarisation(vectors, grid)
    values = draws.empty(len(keys), 3)
    for row, key in zip(values, keys):
        normals = complex_normals(key, STREAM_INITIAL, 0, 1, 2 * len(vectors))
        row[:, :-1] = polarisation.vectors(normals)[0]
    values[..., :-1] *= np.sqrt(0.5) * std
    return draws.spread(torch.from_numpy(draws.place(values)), grid.shape)
