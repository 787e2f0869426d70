r"""State-dependent noise, in the sense of Ito: from a draw and the state to the noise of a step.

Such a forcing has, beside its law in :mod:`~hpc_closure.spectral.noise.laws`, a
:class:`Response`, which forms the noise of a step from the rates :math:`\beta\xi` drawn for it and
from the state at its start. Sums over the state run over full gathered spectra, member by member
in one order. So the bits of a member do not depend on the batch or on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.modes.grid import Grid
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.noise.counters import STREAM_REGIME, uniform


@dataclass(frozen=True)
class Start:
    """Some members at the start of a step.

    Attributes:
        step: steps taken before.
        rows: rows of the ensemble that these members are.
        w: their state, real pairs, this rank's columns.
        transform: transform of the calling thread.
    """

    step: int
    rows: slice | np.ndarray
    w: Tensor
    transform: Transform

    def full_spectra(self) -> np.ndarray:
        """Return full spectra ``(rows, *channels, 2K + 1, K + 1)`` complex128, on every rank."""
        spectra = self.transform.gather(torch.view_as_complex(self.w))
        return spectra.cpu().numpy().astype(np.complex128)


class Response:
    """Computes the noise of a step from its draw and the state at its start."""

    #: what a restart needs, one entry per member; empty if nothing
    state: np.ndarray = np.empty(0, dtype=np.int8)

    def load(self, state: np.ndarray | None) -> None:
        """Continue from a saved ``state``; None starts anew."""

    def add(self, start: Start, base: Tensor, rate: Tensor, out: Tensor) -> None:
        """Write ``base + noise`` to ``out``.

        Args:
            start: the members and their state.
            base: real pairs like the state.
            rate: draw of this step, ``(rows, *box, 2)``.
            out: like ``base``, and equal to it where earlier calls have not written.
        """
        raise NotImplementedError

    def moments(self, start: Start) -> tuple[np.ndarray, np.ndarray]:
        """Return the noise's mean and variance ``E |noise_hat - mean|^2``, full spectra."""
        raise NotImplementedError


class Amplitude(Response):
    """``D(w) beta xi`` with ``D = 1 + strength |w| / rms(w)``, cut to the retained modes.

    Args:
        strength: c.
        model: the :class:`~hpc_closure.spectral.noise.draws.NoiseModel` that draws beta xi.
    """

    def __init__(self, strength: float, model):
        self.strength, self.model = strength, model
        self.weights = mode_weights(model.grid)

    def add(self, start, base, rate, out):
        transform = start.transform
        noise = torch.zeros_like(base)
        self.model.draws.add(noise, rate, noise, transform.columns)
        vorticity, field = transform.synthesize((start.w, None), (noise, None))
        slope = slopes(self.strength, start.full_spectra(), self.weights)
        factor = vorticity.abs_().mul_(slope.to(vorticity)[:, None, None]).add_(1.0)
        torch.add(base, transform.analyse(factor.mul_(field)[None])[0], out=out)

    def factor(self, w_hat: Tensor, transform: Transform) -> Tensor:
        """Return D, ``(rows, n, n)``, of full spectra."""
        slope = slopes(self.strength, w_hat.numpy(), self.weights)
        return transform.to_physical(w_hat).abs_().mul_(slope[:, None, None]).add_(1.0)

    def moments(self, start):
        full_spectra, transform = start.full_spectra(), Transform(self.model.grid)
        variance = []
        for w_hat in torch.from_numpy(full_spectra):
            factor = self.factor(w_hat[None], transform)[0]
            variance.append(spectrum_of_product(factor, self.model.std_hat, transform).numpy())
        return np.zeros_like(full_spectra), np.stack(variance)


class Regimes(Response):
    """Two regimes of noise, one drawn per member at the start of each interval.

    Intervals are counted from step 0. A run that begins inside an interval, without a saved
    regime, draws its regime there.

    Args:
        law: the :class:`~hpc_closure.spectral.noise.laws.TwoRegimes`.
        model: the :class:`~hpc_closure.spectral.noise.draws.NoiseModel` that draws beta xi.
        members: member ids, one per row of the ensemble.
    """

    def __init__(self, law, model, members: Sequence[int]):
        self.law, self.model, self.members = law, model, list(members)
        self.steps = law.steps(model.dt)
        self.weights = mode_weights(model.grid)
        #: coefficient of the modes (1, 0) and (-1, 0): half of that of a sqrt(2) cos in each
        self.pattern = law.pattern * math.sqrt(0.5 * model.variance / self.steps)
        #: 1 in the first regime, -1 in the second, 0 before a regime is drawn
        self.state = np.zeros(len(self.members), dtype=np.int8)

    def load(self, state):
        self.state[:] = 0 if state is None else state

    def add(self, start, base, rate, out):
        sign = self.signs(start)
        first, second = self.law.amplitudes
        size = torch.from_numpy(np.where(sign > 0, first, second)).to(rate)
        self.model.draws.add(base, rate * size[:, None, None, None], out, start.transform.columns)
        if start.transform.columns.start:
            return
        pattern = torch.from_numpy(sign * self.pattern).to(out)
        for row in (1, -1):
            beyond_box = self.model.draws.rows == 0
            mode = (base if beyond_box else out)[:, row, 0, 0]
            torch.add(mode, pattern, out=out[:, row, 0, 0])

    def signs(self, start: Start) -> np.ndarray:
        """Return the regimes of some members in the next step, ``(rows,)``.

        A regime is drawn if the step begins an interval, or if the member has none yet.
        """
        index = np.arange(len(self.members))[start.rows]
        undrawn = self.state[index] == 0
        if start.step % self.steps == 0:
            undrawn[:] = True
        if undrawn.any():
            probability = self.probability(start.full_spectra())
            for row, place in zip(index[undrawn].tolist(), np.flatnonzero(undrawn).tolist()):
                key = self.model.key(self.members[row])
                drawn = uniform(key, STREAM_REGIME, start.step // self.steps)
                self.state[row] = 1 if drawn < probability[place] else -1
        return self.state[index].astype(np.float64)

    def log_odds(self, full_spectra: np.ndarray) -> np.ndarray:
        """Return ``log(p / (1 - p))`` of full spectra, ``(rows,)``."""
        observed = -math.sqrt(2.0) * full_spectra[:, 0, 1].imag
        return observed * inverse_rms(full_spectra, self.weights) / self.law.scale

    def probability(self, full_spectra: np.ndarray) -> list[float]:
        """Return p(w) of full spectra."""
        # 1 / (1 + exp(-x)) in a form that does not overflow
        return [0.5 * (1 + math.tanh(0.5 * x)) for x in self.log_odds(full_spectra).tolist()]

    def moments(self, start):
        full_spectra, sign = start.full_spectra(), self.signs(start)
        first, second = self.law.amplitudes
        mean = np.zeros_like(full_spectra)
        mean[:, [1, -1], 0] = (sign * self.pattern)[:, None]
        size = np.where(sign > 0, first, second)[:, None, None]
        return mean, size**2 * self.model.std_hat.numpy() ** 2


def mode_weights(grid: Grid) -> np.ndarray:
    """Return Parseval weights of the full retained spectrum, float64."""
    return np.broadcast_to(grid.weights.numpy(), grid.shape)


def inverse_rms(full_spectra: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return 1 / rms of fields from their full spectra, ``(rows,)``; 0 for a zero field."""
    power = weights * (full_spectra.real**2 + full_spectra.imag**2)
    sums = np.array([np.ascontiguousarray(row).ravel().sum() for row in power])
    return np.divide(1.0, np.sqrt(sums), out=np.zeros_like(sums), where=sums > 0)


def slopes(strength: float, full_spectra: np.ndarray, weights: np.ndarray) -> Tensor:
    """Return c / rms(w) of full spectra, ``(rows,)`` float64."""
    return torch.from_numpy(strength * inverse_rms(full_spectra, weights))


def spectrum_of_product(factor: Tensor, std_hat: Tensor, transform: Transform) -> Tensor:
    """Return ``E |(D q)_hat|^2`` on the retained modes, q homogeneous and Gaussian.

    It is the convolution of ``|D_hat|^2`` with the spectrum of q on the grid's points, aliasing
    included, computed as the transform of D's autocorrelation times q's covariance.

    Args:
        factor: D, ``(..., n, n)`` float64.
        std_hat: ``sqrt(E |q_hat|^2)``, retained shape.
        transform: transform of the grid.
    """
    power = torch.fft.fft2(factor, norm="forward").abs().square()
    correlation = torch.fft.ifft2(power, norm="forward").real
    covariance = transform.to_physical((std_hat**2).to(torch.complex128))
    return transform.to_spectral(correlation * covariance).real
