"""Draws of a stochastic forcing, counter-based, along Wiener paths that refine.

The path drawn with step ``dt / 2`` sums to the path drawn with step ``dt`` (Brownian bridge,
Levy's construction), so a run can be repeated with another step on the same path. Only the modes
that matter are drawn, many steps at once, in an order that no grid changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.modes.grid import Grid
from hpc_closure.spectral.modes.half_plane import ModeDraws
from hpc_closure.spectral.noise.counters import (
    STREAM_BRIDGE,
    STREAM_PATH,
    STREAM_STATIONARY,
    complex_normals,
    key_of,
)
from hpc_closure.spectral.noise.paths import Noise

if TYPE_CHECKING:
    from hpc_closure.spectral.noise.state_dependent import Response


class NoiseModel:
    """A stochastic forcing on a grid, drawn for members and steps.

    The noise enters ``dw/dt`` as the rate ``beta xi``, held over a step ``dt``: a Wiener increment
    divided by ``dt``. Where it is additive, Ito and Stratonovich calculus agree; where the state
    shapes it (:meth:`response`), it is meant as Ito. A forcing with memory is driven by the same
    refinable path.

    Args:
        noise: its law.
        grid: the solver's grid.
        dt: step of the run.
        seed: seed of the experiment.
        stage: stage whose draws these are.
        path_dt: step in which the path is drawn; ``dt`` may be it times or over a power of two.
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
        self.draws = ModeDraws(vectors, grid.modes)
        # Standard deviation of the rate at dt: sqrt(E |beta xi_hat|^2), one per drawn mode.
        self.std = np.sqrt(variance if noise.memory else variance / dt)
        self._keys: dict[int, np.ndarray] = {}

    @property
    def std_hat(self) -> Tensor:
        """``sqrt(E |beta xi_hat|^2)`` per retained mode at ``dt``, ``(2K + 1, K + 1)`` float64."""
        box = torch.from_numpy(self.draws.place_std(self.std))
        return self.draws.spread(box, self.grid.shape)

    @property
    def variance(self) -> float:
        """Pointwise variance of the rate at ``dt``, of all modes drawn, on whatever grid."""
        vectors, _ = self._noise.law(self.grid)
        both = np.where((vectors != 0).any(1), 2.0, 1.0)  # k and -k; the mean is one mode
        return float((both * self.std**2).sum())

    def response(self, members: Sequence[int]) -> Response | None:
        """How the noise of ``members`` follows the state; None where it does not."""
        return self._noise.response(self, members)

    @property
    def box(self) -> tuple[int, int]:
        """Rows and columns of the compact form."""
        return self.draws.box

    @property
    def num_drawn(self) -> int:
        """Complex normals per member and step."""
        return len(self.std)

    def draw(
        self, members: Sequence[int], first_step: int, steps: int, level: int = 0
    ) -> np.ndarray:
        """Rates ``beta xi_hat`` in compact form (with memory: the driving normals).

        Args:
            members: member ids.
            first_step: first step, in steps of ``dt / 2**level``.
            steps: number of steps.
            level: refinement of ``dt``.

        Returns:
            ``(steps, members, *box)`` complex128.
        """
        out = self.draws.empty(steps, len(members))
        # The path is drawn in units of the rate at its own step: scale it to the rate at dt.
        scale = np.sqrt(0.5) * 2.0 ** (-self.level / 2) * np.ones(len(self.std))
        if not self.correlation_time:
            scale *= self.std
        scale = np.repeat(scale, 2)  # real times real pairs: rounds once
        for column, member in enumerate(members):
            rates = self._rates(self.key(member), first_step, steps, self.level + level)
            rates.view(np.float64)[:] *= scale
            out[:, column, :-1] = rates
        return self.draws.place(out)

    def spread(self, box: np.ndarray) -> Tensor:
        """Compact form to the whole retained spectrum."""
        return self.draws.spread(torch.from_numpy(box), self.grid.shape)

    def stationary(self, members: Sequence[int]) -> np.ndarray:
        """Initial rates of an Ornstein-Uhlenbeck forcing, ``(members, *box)`` complex128."""
        out = self.draws.empty(len(members))
        width = len(self.std)
        for row, member in zip(out, members):
            row[:-1] = complex_normals(self.key(member), STREAM_STATIONARY, 0, 1, width)[0]
        out[:, :-1] *= np.sqrt(0.5) * self.std
        return self.draws.place(out)

    def relaxation(self, dt: float) -> tuple[float, np.ndarray]:
        """``(decay, kick)``: ``y(t + dt) = decay y(t) + kick z`` with ``z`` from :meth:`draw`.

        ``z`` is drawn at the level of ``dt``, so its variance is ``self.dt / dt``; the kick takes
        it out again, which makes the law exact for every step and the path common to all of them.
        """
        decay = float(np.exp(-dt / self.correlation_time))
        kick = np.sqrt((1.0 - decay**2) * (dt / self.dt)) * self.std
        return decay, self.draws.place_std(kick)

    def key(self, member: int) -> np.ndarray:
        """Philox key of a member."""
        if member not in self._keys:
            self._keys[member] = key_of(self.seed, self.stage, member)
        return self._keys[member]

    def _rates(self, key: np.ndarray, first: int, num: int, level: int) -> np.ndarray:
        """Rates in units where a step of the path itself (level 0) has ``E |z|^2 = 2``."""
        width = len(self.std)
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
    """``j`` with ``dt = path_dt * 2**-j``."""
    if path_dt is None:
        return 0
    level = round(float(np.log2(path_dt / dt)))
    if abs(path_dt * 2.0**-level - dt) > 1e-12 * dt:
        raise ValueError(
            "noise path_dt must be dt times or over a power of two: "
            f"dt = {dt}, path_dt = {path_dt}"
        )
    return level
