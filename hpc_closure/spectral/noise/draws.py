"""Draws of a stochastic forcing: counter-based, along Wiener paths that can be refined.

The path drawn with step ``dt / 2`` sums to the path drawn with step ``dt`` (Brownian bridge,
Levy's construction), so a run can be repeated with another step on the same path. Only the modes
of the forcing are drawn, many steps at once, in an order that does not depend on the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.modes.grid import Grid
from hpc_closure.spectral.modes.half_plane import ModeDraws, Polarisation
from hpc_closure.spectral.noise.counters import (
    STREAM_BRIDGE,
    STREAM_PATH,
    STREAM_STATIONARY,
    complex_normals,
    key_of,
)
from hpc_closure.spectral.noise.laws import Noise

if TYPE_CHECKING:
    from hpc_closure.spectral.noise.state_dependent import Response


class NoiseModel:
    """A stochastic forcing on a grid, drawn for members and steps.

    The noise enters ``dw/dt`` as the rate ``beta xi``, constant over a step ``dt``: a Wiener
    increment divided by ``dt``. Additive noise is the same in Ito and Stratonovich calculus. Noise
    that depends on the state (:meth:`response`) is in the sense of Ito. A forcing with a
    correlation time is driven by the same refinable path. In three dimensions it is a solenoidal
    vector, with two normals per mode.

    Args:
        noise: law of the noise.
        grid: the solver's grid.
        dt: step of the run.
        seed: seed of the experiment.
        stage: stage of the pipeline, part of the Philox key.
        path_dt: step in which the path is drawn; ``dt`` times or over a power of two.

    Raises:
        ValueError: the noise is not defined in these dimensions, or ``path_dt`` does not fit.
    """

    def __init__(
        self,
        noise: Noise,
        grid: Grid,
        dt: float,
        seed: int,
        stage: str = "generate",
        path_dt: float | None = None,
    ):
        if grid.dimensions not in noise.dimensions:
            raise ValueError(f"noise {noise.kind} is not defined in {grid.dimensions} dimensions")
        self.grid, self.dt, self.seed, self.stage = grid, dt, seed, stage
        self.level = path_level(dt, path_dt)
        self.correlation_time = noise.memory
        self._noise = noise
        vectors, variance = noise.law(grid)
        self.draws = ModeDraws(vectors, grid.mode_counts if grid.dimensions > 1 else grid.modes)
        self.polarisation = Polarisation(vectors, grid) if grid.dimensions == 3 else None
        # Standard deviation of the rate at dt: sqrt(E |beta xi_hat|^2), one per drawn mode.
        self.std = np.sqrt(variance if noise.memory else variance / dt)
        self._keys: dict[int, np.ndarray] = {}

    @property
    def std_hat(self) -> Tensor:
        """Return ``sqrt(E |beta xi_hat|^2)`` per retained mode at ``dt``, ``(2K + 1, K + 1)``.

        In three dimensions it is that of the vector.
        """
        box = torch.from_numpy(self.draws.place_std(self.std))
        return self.draws.spread(box, self.grid.shape)

    @property
    def variance(self) -> float:
        """Return the pointwise variance of the rate at ``dt``, of all drawn modes on any grid."""
        vectors, _ = self._noise.law(self.grid)
        # a drawn mode stands for k and -k; the mean is a single mode
        multiplicity = np.where((vectors != 0).any(1), 2.0, 1.0)
        return float((multiplicity * self.std**2).sum())

    def response(self, members: Sequence[int]) -> Response | None:
        """Return how the noise of ``members`` depends on the state; None if it does not."""
        return self._noise.response(self, members)

    @property
    def box(self) -> tuple[int, ...]:
        """Return the shape of a rate: the box of drawn modes, ``(3, *box)`` of vectors."""
        return self.draws.box if self.polarisation is None else (3, *self.draws.box)

    @property
    def num_drawn(self) -> int:
        """Return the number of complex normals per member and step."""
        return len(self.std) * (1 if self.polarisation is None else 2)

    def draw(
        self, members: Sequence[int], first_step: int, steps: int, level: int = 0
    ) -> np.ndarray:
        """Draw rates ``beta xi_hat`` in the box of drawn modes.

        A forcing with a correlation time returns the normals that drive it.

        Args:
            members: member ids.
            first_step: first step, in steps of ``dt / 2**level``.
            steps: number of steps.
            level: refinement of ``dt``.

        Returns:
            ``(steps, members, *box)`` complex128.
        """
        out = self._empty(steps, len(members))
        # The path is drawn in units of the rate at path_dt: scale it to the rate at dt.
        scale = np.sqrt(0.5) * 2.0 ** (-self.level / 2) * np.ones(len(self.std))
        if not self.correlation_time:
            scale *= self.std
        scale = np.repeat(scale, 2)  # multiplying real pairs by reals rounds once
        if self.polarisation is not None:
            scale = np.tile(scale, 2)
        for column, member in enumerate(members):
            rates = self._rates(self.key(member), first_step, steps, self.level + level)
            rates.view(np.float64)[:] *= scale
            out[:, column, ..., :-1] = self._polarised(rates)
        return self.draws.place(out)

    def _empty(self, *lead: int) -> np.ndarray:
        """Return an array for draws ``(*lead, M + 1)``, of vectors ``(*lead, 3, M + 1)``."""
        return self.draws.empty(*lead, *self.box[: -len(self.draws.box)])

    def _polarised(self, normals: np.ndarray) -> np.ndarray:
        """Return the draws of normals ``(..., num_drawn)``, of vectors ``(..., 3, M)``."""
        return normals if self.polarisation is None else self.polarisation.vectors(normals)

    def spread(self, box: np.ndarray) -> Tensor:
        """Expand a box ``(..., *box)`` to the full retained spectrum."""
        return self.draws.spread(torch.from_numpy(box), self.grid.shape)

    def stationary(self, members: Sequence[int]) -> np.ndarray:
        """Draw initial rates of an Ornstein-Uhlenbeck forcing, ``(members, *box)`` complex128."""
        out, width = self._empty(len(members)), self.num_drawn
        for row, member in zip(out, members):
            normals = complex_normals(self.key(member), STREAM_STATIONARY, 0, 1, width)
            row[..., :-1] = self._polarised(normals)[0]
        out[..., :-1] *= np.sqrt(0.5) * self.std
        return self.draws.place(out)

    def relaxation(self, dt: float) -> tuple[float, np.ndarray]:
        """Return ``(decay, kick)`` of ``y(t + dt) = decay y(t) + kick z``, z from :meth:`draw`.

        ``z`` is drawn at the level of ``dt``, so its variance is ``self.dt / dt``, for which the
        kick corrects. So the law is exact for every step, and all steps share one path.
        """
        decay = float(np.exp(-dt / self.correlation_time))
        kick = np.sqrt((1.0 - decay**2) * (dt / self.dt)) * self.std
        return decay, self.draws.place_std(kick)

    def key(self, member: int) -> np.ndarray:
        """Return the Philox key of a member."""
        if member not in self._keys:
            self._keys[member] = key_of(self.seed, self.stage, member)
        return self._keys[member]

    def _rates(self, key: np.ndarray, first: int, num: int, level: int) -> np.ndarray:
        """Return rates in units where a step of the path (level 0) has ``E |z|^2 = 2``."""
        width = self.num_drawn
        if level == 0:
            return complex_normals(key, STREAM_PATH, first, num, width)
        if level < 0:
            fine = self._rates(key, 2 * first, 2 * num, level + 1)
            return (fine[0::2] + fine[1::2]) * 0.5
        start, stop = first // 2, -(-(first + num) // 2)
        parent = self._rates(key, start, stop - start, level - 1)
        bridge = complex_normals(key, STREAM_BRIDGE + level, start, stop - start, width)
        bridge *= 2.0 ** ((level - 1) / 2)
        halves = np.stack([parent + bridge, parent - bridge], axis=1).reshape(-1, width)
        return halves[first - 2 * start :][:num]


def path_level(dt: float, path_dt: float | None) -> int:
    """Return ``j`` with ``dt = path_dt * 2**-j``; ValueError if there is no such integer."""
    if path_dt is None:
        return 0
    level = round(float(np.log2(path_dt / dt)))
    if abs(path_dt * 2.0**-level - dt) > 1e-12 * dt:
        raise ValueError(
            "noise path_dt must be dt times or over a power of two: "
            f"dt = {dt}, path_dt = {path_dt}"
        )
    return level
