"""Rates of a stochastic forcing for the steps of an ensemble, drawn many steps at once.

What a step adds is the rate itself, or what a :class:`~state_noise.Response` makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.noise.kinds import NoiseModel
from hpc_closure.spectral.noise.state_dependent import Start

# Bytes of noise drawn at once per chunk of members.
NOISE_BYTES = 4 << 20


class Rates:
    """What a stochastic forcing adds to ``dw/dt`` of every member, step by step.

    Rates are real pairs ``(rows, *box, 2)`` in the box of drawn modes. White noise is known at any
    step. An Ornstein-Uhlenbeck forcing has a state, so its steps are asked for in order. Threads
    may ask at the same time, each for rows of its own.

    Args:
        noise: the forcing, or None for none.
        members: member ids, one per row.
        like: tensor whose precision and device the rates take.
    """

    def __init__(self, noise: NoiseModel | None, members: Sequence[int], like: Tensor):
        self.noise, self.members, self._like = noise, list(members), like[:0]
        # Of an Ornstein-Uhlenbeck forcing: the present rates (members, *box) complex128.
        self._state = np.empty(0)
        # Drawn for coming steps: first row of a chunk -> first step, rates.
        self._ahead: dict[int, tuple[int, Tensor]] = {}
        #: how the noise follows the state, or None: it is the rate
        self.response = None if noise is None else noise.response(self.members)

    @property
    def coloured(self) -> bool:
        """Whether the forcing has a state."""
        return self.noise is not None and self.noise.correlation_time > 0

    def load(self, state: np.ndarray | None) -> None:
        """Take up a state that :meth:`save` gave; without one it begins anew."""
        if self.response is not None:
            self.response.load(state)
        if self.noise is not None and self.coloured:
            if state is None:
                state = self.noise.stationary(self.members)
            self._state = state.copy()

    def save(self) -> dict[str, np.ndarray]:
        """``rates``, the state of the forcing, where there is one."""
        state = self._state if self.response is None else self.response.state
        return {"rates": state.copy()} if len(state) else {}

    def at(self, step: int) -> np.ndarray:
        """Rates of all members from ``step`` on, ``(members, *box)``; the state if coloured."""
        assert self.noise is not None
        return self._state if self.coloured else self.noise.draw(self.members, step, 1)[0]

    def steps(
        self, rows: slice | np.ndarray, first: int, num: int, level: int = 0
    ) -> Iterator[Tensor | None]:
        """Rates of some rows in steps ``first ...`` of ``dt / 2**level``; None without noise."""
        noise = self.noise
        if noise is None:
            yield from repeat(None, num)
            return
        index = np.arange(len(self.members))[rows]
        members = [self.members[row] for row in index]
        block = max(1, NOISE_BYTES // (len(members) * noise.box[0] * noise.box[1] * 16))
        for start in range(first, first + num, block):
            count = min(block, first + num - start)
            if self.coloured:
                draws = noise.draw(members, start, count, level)
                yield from self._pairs(self._relax(index, draws, level))
            elif isinstance(rows, slice) and count < block:
                yield from self._draw_ahead(rows, start, count, block)
            else:
                yield from self._pairs(noise.draw(members, start, count, level))

    def add(self, base: Tensor, rate: Tensor, out: Tensor, columns: slice) -> None:
        """``out = base + rate`` in the box of drawn modes; elsewhere ``out`` stays.

        Args:
            base: real pairs ``(rows, 2K + 1, columns, 2)``, on a line ``(rows, K + 1, 2)``.
            rate: of these rows.
            out: like ``base``.
            columns: which columns of the whole spectrum ``base`` holds.
        """
        assert self.noise is not None
        self.noise.draws.add(base, rate, out, columns)

    def shaped(self, start: Start) -> Tensor:
        """The noise of the step from ``start`` where it follows the state, real pairs like it."""
        assert self.response is not None
        out = torch.zeros_like(start.w)
        (rate,) = self._pairs(self.at(start.step)[None])
        self.response.add(start, torch.zeros_like(out), rate, out)
        return out

    def _pairs(self, draws: np.ndarray) -> Tensor:
        return torch.view_as_real(torch.from_numpy(draws)).to(self._like)

    def _draw_ahead(self, chunk: slice, first: int, count: int, block: int) -> Tensor:
        """Rates of a few steps, from a longer draw when the last call ended where this begins."""
        assert self.noise is not None
        start, rates = self._ahead.get(chunk.start, (first, self._like))
        if not start <= first <= first + count <= start + len(rates):
            goes_on = len(rates) > 0 and first == start + len(rates)
            num = min(max(count, 2 * len(rates)), block) if goes_on else count
            start, rates = first, self._pairs(self.noise.draw(self.members[chunk], first, num))
            self._ahead[chunk.start] = start, rates
        return rates[first - start : first - start + count]

    def _relax(self, rows: np.ndarray, draws: np.ndarray, level: int) -> np.ndarray:
        """Ornstein-Uhlenbeck rates of the steps from their driving normals; keeps the last."""
        assert self.noise is not None
        decay, kick = self.noise.relaxation(self.noise.dt * 2.0**-level)
        y = self._state[rows]
        out = np.empty_like(draws)
        for step, z in enumerate(draws):
            out[step] = y
            y = y * decay + z * kick
        self._state[rows] = y
        return out
