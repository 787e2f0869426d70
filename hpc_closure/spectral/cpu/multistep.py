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
from hpc_closure.spectral.modes.transform import Symbol


def _update(w, rate, past, held, linear, filter_, weights, dt):  # noqa: PLR0913 - compiled
    for i in range(w.shape[0]):
        for c in range(w.shape[1]):
            state, now, before, first = w[i, c], rate[i, c], past[0, i, c], past[1, i, c]
            added, real, imag = held[i, c], linear[0, c], linear[1, c]
            for j in range(state.shape[0] // 2):
                a, b = 2 * j, 2 * j + 1
                x, y = state[a], state[b]
                p = now[a] + (x * real[a] + y * imag[a])
                q = now[b] + (y * real[b] + x * imag[b])
                u, v = p * weights[0], q * weights[0]
                u, v = u + before[a] * weights[1], v + before[b] * weights[1]
                u, v = u + first[a] * weights[2], v + first[b] * weights[2]
                first[a], first[b] = before[a], before[b]
                before[a], before[b] = p, q
                state[a] = (x + (u + added[a]) * dt) * filter_[a]
                state[b] = (y + (v + added[b]) * dt) * filter_[b]


_compiled = jit.cached(_update)


class Update:
    """A step of Adams-Bashforth 3 that knows two past rates, and its filter.

    Args:
        linear: symbol of the linear term, of C fields with a leading axis.
        filter_: real symbol of the filter.
        weights: of the present rate and of the two before it.
        dt: step.
    """

    def __init__(self, linear: Symbol, filter_: Symbol, weights: Sequence[float], dt: float):
        self.factors = filter_.real.flatten().numpy()
        self.channels = linear.real.numel() // self.factors.size
        parts = [part.reshape(self.channels, -1).numpy() for part in (linear.real, linear.imag)]
        self.linear = np.stack(parts)
        kind = self.factors.dtype.type
        self.weights, self.dt = np.array(weights, dtype=kind), kind(dt)

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
