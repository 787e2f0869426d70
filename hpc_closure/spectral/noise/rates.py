"""Rates of a stochastic forcing for the steps of an ensemble, drawn many steps at once.

The noise of a step is the rate, or what a :class:`~state_dependent.Response` computes from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.noise.draws import NoiseModel
from hpc_closure.spectral.noise.state_dependent import Start

# Bytes of noise drawn at once per chunk of members.
NOISE_BYTES = 4 << 20


class Rates:
    """The rates that a stochastic forcing adds to ``dw/dt`` of every member, step by step.

    Rates are real pairs ``(rows, *box, 2)`` in the box of drawn modes. White noise can be drawn
    for any step. An Ornstein-Uhlenbeck forcing has a state, so its steps must be drawn in order.
    Threads may draw at the same time, each for different rows.

    Args:
        noise: the forcing, or None.
        members: member ids, one per row.
        like: tensor whose precision and device the rates take.
    """

    def __init__(self, noise: NoiseModel | None, members: Sequence[int], like: Tensor):
        self.noise, self.members, self._like = noise, list(members), like[:0]
        # Present rates of an Ornstein-Uhlenbeck forcing, (members, *box) complex128.
        self._state = np.empty(0)
        # Rates drawn for coming steps: first row of a chunk -> first step, rates.
        self._ahead: dict[int, tuple[int, Tensor]] = {}
        #: how the noise depends on the state; None = the noise is the rate
        self.response = None if noise is None else noise.response(self.members)

    @property
    def coloured(self) -> bool:
        """Return whether the forcing has a correlation time, and so a state."""
        return self.noise is not None and self.noise.correlation_time > 0

    def load(self, state: np.ndarray | None) -> None:
        """Continue from a state that :meth:`save` returned; without one start anew."""
        if self.response is not None:
            self.response.load(state)
        if self.noise is not None and self.coloured:
            if state is None:
                state = self.noise.stationary(self.members)
            self._state = state.copy()

    def save(self) -> dict[str, np.ndarray]:
        """Return ``rates``, the state of the forcing, if it has one."""
        state = self._state if self.response is None else self.response.state
        return {"rates": state.copy()} if len(state) else {}

    def at(self, step: int) -> np.ndarray:
        """Return the rates of all members in ``step``, ``(members, *box)``.

        A coloured forcing returns its state.
        """
        assert self.noise is not None
        return self._state if self.coloured else self.noise.draw(self.members, step, 1)[0]

    def steps(
        self, rows: slice | np.ndarray, first: int, num: int, level: int = 0
    ) -> Iterator[Tensor | None]:
        """Yield the rates of some rows in ``num`` steps of ``dt / 2**level``; None without noise.

        Args:
            rows: rows of the ensemble.
            first: number of the first step, in steps of ``dt / 2**level``.
            num: number of steps.
            level: refinement of ``dt``.
        """
        noise = self.noise
        if noise is None:
            yield from repeat(None, num)
            return
        index = np.arange(len(self.members))[rows]
        members = [self.members[row] for row in index]
        block = max(1, NOISE_BYTES // (len(members) * math.prod(noise.box) * 16))
        for start in range(first, first + num, block):
            count = min(block, first + num - start)
            if self.coloured:
                draws = noise.draw(members, start, count, level)
                yield from self._pairs(self._relax(index, draws, level))
            elif isinstance(rows, slice) and count < block:
                yield from self._draw_ahead(rows, start, count, block)
            else:
                yield from self._pairs(noise.draw(members, start, count, level))

    def add(
        self,
        base: Tensor,
        rate: Tensor,
        out: Tensor,
        columns: slice,
        halves: slice | None = None,
    ) -> None:
        """Write ``base + rate`` to ``out`` in the box of drawn modes.

        ``out`` is unchanged elsewhere.

        Args:
            base: real pairs ``(rows, 2K + 1, columns, 2)``, on a line ``(rows, K + 1, 2)``.
            rate: rates of these rows.
            out: shaped like ``base``.
            columns, halves: see :meth:`ModeDraws.add`.
        """
        assert self.noise is not None
        self.noise.draws.add(base, rate, out, columns, halves)

    def state_dependent(self, start: Start) -> Tensor:
        """Return the noise of the step from ``start``, real pairs like the state."""
        assert self.response is not None
        out = torch.zeros_like(start.w)
        (rate,) = self._pairs(self.at(start.step)[None])
        self.response.add(start, torch.zeros_like(out), rate, out)
        return out

    def _pairs(self, draws: np.ndarray) -> Tensor:
        return torch.view_as_real(torch.from_numpy(draws)).to(self._like)

    def _draw_ahead(self, chunk: slice, first: int, count: int, block: int) -> Tensor:
        """Return the rates of a few steps, drawn ahead if this call continues the last one."""
        assert self.noise is not None
        start, rates = self._ahead.get(chunk.start, (first, self._like))
        if not start <= first <= first + count <= start + len(rates):
            continues = len(rates) > 0 and first == start + len(rates)
            num = min(max(count, 2 * len(rates)), block) if continues else count
            start, rates = first, self._pairs(self.noise.draw(self.members[chunk], first, num))
            self._ahead[chunk.start] = start, rates
        return rates[first - start : first - start + count]

    def _relax(self, rows: np.ndarray, draws: np.ndarray, level: int) -> np.ndarray:
        """Return Ornstein-Uhlenbeck rates from their driving normals, and store the last rate."""
        assert self.noise is not None
        decay, kick = self.noise.relaxation(self.noise.dt * 2.0**-level)
        y = self._state[rows]
        out = np.empty_like(draws)
        for step, z in enumerate(draws):
            out[step] = y
            y = y * decay + z * kick
        self._state[rows] = y
        return out
