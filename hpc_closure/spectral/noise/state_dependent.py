r"""Noise that the state shapes, in the sense of Ito: from what is drawn to what a step adds.

A forcing of this sort has, beside its law in :mod:`~hpc_closure.spectral.noise.paths`, a
:class:`Response`, which forms the noise of a step from the rates :math:`\beta\xi` drawn for it and
from the state at its start. Sums over the state are taken of whole gathered spectra, member by
member in one order, so what a member does has the same bits for any batch and number of ranks.
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
        rows: which rows of the ensemble they are.
        w: their state, real pairs, this rank's columns.
        transform: of the thread that asks.
    """

    step: int
    rows: slice | np.ndarray
    w: Tensor
    transform: Transform

    def whole(self) -> np.ndarray:
        """Whole spectra ``(rows, 2K + 1, K + 1)`` complex128, on every rank."""
        spectra = self.transform.gather(torch.view_as_complex(self.w))
        return spectra.cpu().numpy().astype(np.complex128)


class Response:
    """The noise of a step, given the state at its start."""

    #: what a restart needs, one entry a member; empty = nothing
    state: np.ndarray = np.empty(0, dtype=np.int8)

    def load(self, state: np.ndarray | None) -> None:
        """Take up what ``state`` was; None begins anew."""

    def add(self, start: Start, base: Tensor, rate: Tensor, out: Tensor) -> None:
        """``out = base + noise``.

        Args:
            start: the members and their state.
            base: real pairs like the state.
            rate: drawn for this step, ``(rows, *box, 2)``.
            out: like ``base``, equal to it outside what earlier calls have set.
        """
        raise NotImplementedError

    def moments(self, start: Start) -> tuple[np.ndarray, np.ndarray]:
        """Mean of the noise of the step and ``E |noise_hat - mean|^2``, whole spectra."""
        raise NotImplementedError


class Amplitude(Response):
    """``D(w) beta xi`` with ``D = 1 + strength |w| / rms(w)``, cut to the retained modes.

    Args:
        strength: c.
        model: the :class:`~hpc_closure.spectral.noise.kinds.NoiseModel` that draws beta xi.
    """

    def __init__(self, strength: float, model):
        self.strength, self.model = strength, model
        self.weights = mode_weights(model.grid)

    def add(self, start, base, rate, out):
        transform = start.transform
        noise = torch.zeros_like(base)
        self.model.draws.add(noise, rate, noise, transform.columns)
        vorticity, field = transform.synthesize((start.w, None), (noise, None))
        slope = slopes(self.strength, start.whole(), self.weights)
        factor = vorticity.abs_().mul_(slope.to(vorticity)[:, None, None]).add_(1.0)
        torch.add(base, transform.analyse(factor.mul_(field)[None])[0], out=out)

    def factor(self, w_hat: Tensor, transform: Transform) -> Tensor:
        """D, ``(rows, n, n)``, of whole spectra."""
        slope = slopes(self.strength, w_hat.numpy(), self.weights)
        return transform.to_physical(w_hat).abs_().mul_(slope[:, None, None]).add_(1.0)

    def moments(self, start):
        whole, transform = start.whole(), Transform(self.model.grid)
        variance = []
        for w_hat in torch.from_numpy(whole):
            factor = self.factor(w_hat[None], transform)[0]
            variance.append(spectrum_of_product(factor, self.model.std_hat, transform).numpy())
        return np.zeros_like(whole), np.stack(variance)


class Regimes(Response):
    """Two regimes of noise, one drawn for each member at the start of each interval.

    Intervals are counted from step 0. A run that begins inside one, with no regime to take up,
    draws its regime there.

    Args:
        law: the :class:`~hpc_closure.spectral.noise.paths.TwoRegimes`.
        model: the :class:`~hpc_closure.spectral.noise.kinds.NoiseModel` that draws beta xi.
        members: member ids, one per row of the ensemble.
    """

    def __init__(self, law, model, members: Sequence[int]):
        self.law, self.model, self.members = law, model, list(members)
        self.steps = law.steps(model.dt)
        self.weights = mode_weights(model.grid)
        #: coefficient of the modes (1, 0) and (-1, 0): a sqrt(2) cos has half of it in each
        self.pattern = law.pattern * math.sqrt(0.5 * model.variance / self.steps)
        #: 1 in the first regime, -1 in the second, 0 where none has been drawn
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
        """Regimes of some members in the coming step, drawn where an interval begins."""
        index = np.arange(len(self.members))[start.rows]
        fresh = self.state[index] == 0
        if start.step % self.steps == 0:
            fresh[:] = True
        if fresh.any():
            probability = self.probability(start.whole())
            for row, place in zip(index[fresh].tolist(), np.flatnonzero(fresh).tolist()):
                key = self.model.key(self.members[row])
                drawn = uniform(key, STREAM_REGIME, start.step // self.steps)
                self.state[row] = 1 if drawn < probability[place] else -1
        return self.state[index].astype(np.float64)

    def log_odds(self, whole: np.ndarray) -> np.ndarray:
        """``log(p / (1 - p))`` of states given as whole spectra, (rows,)."""
        observed = -math.sqrt(2.0) * whole[:, 0, 1].imag
        return observed * inverse_rms(whole, self.weights) / self.law.scale

    def probability(self, whole: np.ndarray) -> list[float]:
        """p(w) of states given as whole spectra."""
        # 1 / (1 + exp(-x)), which no x makes overflow
        return [0.5 * (1 + math.tanh(0.5 * x)) for x in self.log_odds(whole).tolist()]

    def moments(self, start):
        whole, sign = start.whole(), self.signs(start)
        first, second = self.law.amplitudes
        mean = np.zeros_like(whole)
        mean[:, [1, -1], 0] = (sign * self.pattern)[:, None]
        size = np.where(sign > 0, first, second)[:, None, None]
        return mean, size**2 * self.model.std_hat.numpy() ** 2


def mode_weights(grid: Grid) -> np.ndarray:
    """Parseval weights of the whole retained spectrum, float64."""
    return np.broadcast_to(grid.weights.numpy(), grid.shape)


def inverse_rms(whole: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """1 / rms of fields given as whole spectra, (rows,); 0 for a field that is zero."""
    power = weights * (whole.real**2 + whole.imag**2)
    sums = np.array([np.ascontiguousarray(row).ravel().sum() for row in power])
    return np.divide(1.0, np.sqrt(sums), out=np.zeros_like(sums), where=sums > 0)


def slopes(strength: float, whole: np.ndarray, weights: np.ndarray) -> Tensor:
    """c / rms(w) of states given as whole spectra, (rows,) float64."""
    return torch.from_numpy(strength * inverse_rms(whole, weights))


def spectrum_of_product(factor: Tensor, std_hat: Tensor, transform: Transform) -> Tensor:
    """``E |(D q)_hat|^2`` on the retained modes, of a field times a homogeneous Gaussian one.

    The convolution of ``|D_hat|^2`` with the spectrum of q on the grid's points, aliasing
    included: the transform of the product of D's autocorrelation and q's covariance.

    Args:
        factor: D, ``(..., n, n)`` float64.
        std_hat: ``sqrt(E |q_hat|^2)``, retained shape.
        transform: of the grid.
    """
    power = torch.fft.fft2(factor, norm="forward").abs().square()
    correlation = torch.fft.ifft2(power, norm="forward").real
    covariance = transform.to_physical((std_hat**2).to(torch.complex128))
    return transform.to_spectral(correlation * covariance).real
