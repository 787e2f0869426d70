"""The update of Adams-Bashforth 3 in one pass over memory, compiled (CPU).

The operations on a number are those of :class:`~hpc_closure.spectral.schemes.AB3`, in the same
order, and multiplications and additions are not fused. So the bits are those of its array
operations, which read and write every array several times.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from hpc_closure.spectral.cpu import jit
from hpc_closure.spectral.cpu.line_kernels import with_names
from hpc_closure.spectral.cpu.tiles import LANES, adams_bashforth
from hpc_closure.spectral.modes.transform import Symbol


def _update(w, rate, past, held, linear, filter_, weights, dt):  # noqa: PLR0913 - compiled
    modes = filter_.shape[0]
    blocks = modes // LANES
    for i in range(w.shape[0]):
        for c in range(w.shape[1]):
            state, now, before, first = w[i, c], rate[i, c], past[0, i, c], past[1, i, c]
            added, real, imag = held[i, c], linear[0, c], linear[1, c]
            for block in range(blocks):
                adams_bashforth(
                    state,
                    now,
                    before,
                    first,
                    added,
                    real,
                    imag,
                    filter_,
                    block * LANES,
                    weights,
                    dt,
                )
            for j in range(blocks * LANES, modes):
                a, b = 2 * j, 2 * j + 1
                x, y = state[a], state[b]
                p = now[a] + (x * real[j] - y * imag[j])
                q = now[b] + (y * real[j] + x * imag[j])
                u, v = p * weights[0], q * weights[0]
                u, v = u + before[a] * weights[1], v + before[b] * weights[1]
                u, v = u + first[a] * weights[2], v + first[b] * weights[2]
                first[a], first[b] = before[a], before[b]
                before[a], before[b] = p, q
                state[a] = (x + (u + added[a]) * dt) * filter_[j]
                state[b] = (y + (v + added[b]) * dt) * filter_[j]


_compiled = jit.cached(with_names(_update, {}))


class Update:
    """A step of Adams-Bashforth 3 that knows two past rates, and its filter.

    Args:
        linear: symbol of the linear term, of C fields with a leading axis.
        filter_: real symbol of the filter.
        weights: of the present rate and of the two before it.
        dt: step.
    """

    def __init__(self, linear: Symbol, filter_: Symbol, weights: Sequence[float], dt: float):
        # a number per mode: pairs have the factor of the real part and plus or minus the other one
        self.factors = filter_.real[..., 0].flatten().contiguous().numpy()
        self.channels = linear.real[..., 0].numel() // self.factors.size
        parts = [
            part.reshape(self.channels, -1).numpy()
            for part in (linear.real[..., 0], linear.imag[..., 1])
        ]
        self.linear = np.stack(parts)
        kind = self.factors.dtype.type
        self.weights, self.dt = tuple(kind(weight) for weight in weights), kind(dt)

    def step(self, w: Tensor, rate: Tensor, past: Tensor, held: Tensor) -> None:
        """Advance ``w`` by a step, and ``past`` by one rate, in place.

        Args:
            w: state as contiguous real pairs ``(members, C, ..., 2)``, of one field without C.
            rate: the nonlinear term.
            past: the last two rates, ``(2, *w.shape)``.
            held: forcings and closure.
        """
        shape = len(w), self.channels, -1
        state, now, added = (each.view(shape).numpy() for each in (w, rate, held))
        before = past.view(2, *shape).numpy()
        _compiled(state, now, before, added, self.linear, self.factors, self.weights, self.dt)
