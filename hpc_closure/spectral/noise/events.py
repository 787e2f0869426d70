r"""Random events that change the state at single steps: births of rain clouds.

Births are a Poisson process whose rate per area and time depends on the state at the start of a
step. They are drawn by thinning: candidates of a constant rate, of which a share is accepted.
Candidates, places, sizes and acceptance come from counters (seed, stage, member, step). So the
births of a member do not depend on the batch, the number of ranks or a restart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.modes.grid import Grid
from hpc_closure.spectral.noise.counters import STREAM_EVENTS, key_of, uniform, uniforms
from hpc_closure.spectral.noise.state_dependent import Start

MOST = 500  # expected candidates of a step; the Poisson law is summed from exp(-MOST)


class Events:
    """Random events that add to some channels in the steps at which they occur."""

    def add(self, start: Start, members: Sequence[int], base: Tensor, out: Tensor) -> None:
        """Write ``base`` plus the events of a step, as rates, to their channels of ``out``.

        Args:
            start: the members at the start of the step.
            members: ids of its rows.
            base: real pairs like the state.
            out: like ``base``.
        """
        raise NotImplementedError


class Births(Events):
    r"""Blobs :math:`A\,g(x - x_j)` added to a channel, with exponential sizes A of mean 1.

    Args:
        law: the equation; ``rate(values)`` is births per area and time at values of the field that
            determines it, ``largest_rate`` its largest value, ``blob(grid)`` the spectrum of g at
            the origin, and ``birth_channels`` the channels (that determines the rate, of blobs).
        grid: the solver's grid.
        dt: step.
        seed, stage: of the experiment, for the Philox keys.

    Raises:
        ValueError: a step has more candidates than can be drawn.
    """

    def __init__(
        self,
        law,
        grid: Grid,
        dt: float,
        seed: int,
        stage: str,
    ):
        self.rate, self.largest, self.blob = law.rate, law.largest_rate, law.blob(grid).numpy()
        self.reads, self.writes = law.birth_channels
        self.grid, self.dt, self.seed, self.stage = grid, dt, seed, stage
        self.expected = self.largest * grid.length**2 * dt
        if self.expected > MOST:
            raise ValueError(
                f"generate.dt={dt:g} has {self.expected:.3g} candidates of births in a step, at "
                f"most {MOST} can be drawn: lower generate.dt or physics.birth_rate"
            )

    def add(self, start, members, base, out):
        spectra = start.full_spectra()[:, self.reads]
        target = out[:, self.writes]
        target.copy_(base[:, self.writes])
        for row, member in enumerate(members):
            places, sizes = self.draw(member, start.step, spectra[row])
            if len(sizes):
                spectrum = start.transform.local(torch.from_numpy(self.spectrum(places, sizes)))
                target[row] += torch.view_as_real(spectrum / self.dt).to(target)

    def draw(self, member: int, step: int, w_hat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draw the births of a member in a step.

        Args:
            member: its id.
            step: steps taken before.
            w_hat: retained spectrum of the field that determines the rate, at the start of the
                step, ``(2K + 1, K + 1)``.

        Returns:
            Places ``(J, 2)`` in units of the side, and sizes ``(J,)``.
        """
        key = key_of(self.seed, self.stage, member)
        number = _poisson(self.expected, uniform(key, STREAM_EVENTS, step))
        if not number:
            return np.empty((0, 2)), np.empty(0)
        drawn = uniforms(key, STREAM_EVENTS, step, 1, number)
        x, y, sizes, accepted = drawn.reshape(number, 4).T
        along_x, along_y = self._waves(x, y)
        along_y[:, 1:] *= 2  # for the modes that are not stored
        # not by BLAS, whose sums depend on the number of threads
        values = np.einsum("jx,xy,jy->j", along_x, w_hat, along_y, optimize=False).real
        born = accepted * self.largest < np.minimum(self.rate(values), self.largest)
        return np.stack([x, y], 1)[born], -np.log(sizes[born])

    def spectrum(self, places: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Return the retained spectrum of the blobs of a step, ``(2K + 1, K + 1)`` complex128."""
        along_x, along_y = self._waves(*-places.T)
        total = np.zeros(self.grid.shape, dtype=np.complex128)
        # one sum per mode, in the order of the births
        for one_x, one_y in zip(along_x * sizes[:, None], along_y):
            total += one_x[:, None] * one_y
        return total * self.blob

    def _waves(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return ``exp(2 pi i k x)`` per row and column of the spectrum, for coordinates ``(J,)``.

        Returns:
            Waves along x ``(J, 2K + 1)`` for kx = 0 .. K, -K .. -1, and along y ``(J, K + 1)``.
        """
        k = np.arange(self.grid.modes + 1)
        along_x, along_y = (np.exp(2j * np.pi * place[:, None] * k) for place in (x, y))
        return np.concatenate([along_x, along_x[:, :0:-1].conj()], 1), along_y


def _poisson(mean: float, uniform: float) -> int:
    """Return the quantile of a Poisson law by adding its probabilities; for means up to MOST."""
    term = total = math.exp(-mean)
    number = 0
    while uniform > total and number < 10 * mean + 100:
        number += 1
        term *= mean / number
        total += term
    return number
