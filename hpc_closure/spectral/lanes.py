"""A lane advances chunks of members: one per worker thread, or the one of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.forcing import steady_forcing
from hpc_closure.spectral.schemes import CNAB2, Scheme
from hpc_closure.spectral.transform import Transform

if TYPE_CHECKING:
    from hpc_closure.spectral.simulation import Simulation

# Bytes of noise drawn at once per chunk of members.
NOISE_BYTES = 4 << 20


class Lane:
    """One worker: its transform, equation, schemes and work arrays.

    Args:
        simulation: whose state it advances, chunk by chunk.
    """

    def __init__(self, simulation: Simulation):
        problem, shared = simulation.problem, simulation.transform
        self.simulation, self.problem = simulation, problem
        self.transform = Transform(
            shared.grid, problem.precision, simulation.device, simulation.comm
        )
        self.equation = problem.make_equation(self.transform)
        self.nonlinear = self.equation.nonlinear
        if problem.removed == "convection":
            self.nonlinear = _zero
        steady = shared.local(steady_forcing(shared.grid, **problem.forcing))
        self.steady = torch.view_as_real(steady.to(shared.device, shared.complex).contiguous())
        self._schemes: dict[int, Scheme] = {}

    def scheme(self, level: int = 0) -> Scheme:
        """Scheme at ``dt / 2**level``, coefficients cached."""
        if level not in self._schemes:
            linear = self.equation.linear
            self._schemes[level] = self.problem.make_scheme(linear, self.transform, level)
        return self._schemes[level]

    def speed(self, w: Tensor) -> np.ndarray:
        """Largest speed of each member over all ranks, float64."""
        return self.transform.maximum(self.equation.speed(w).double().cpu().numpy())

    def levels(self, w: Tensor) -> np.ndarray:
        """Refinement level of each member's next step, from its own largest speed."""
        problem, grid = self.problem, self.transform.grid
        if not problem.cfl:
            return np.zeros(w.shape[0], dtype=np.int64)
        speed = self.speed(w)
        number = speed * (problem.dt * grid.size / grid.length / problem.cfl)
        levels = np.ceil(np.log2(np.maximum(number, 1.0)))
        good = np.isfinite(number) & (levels <= problem.max_level)
        if not good.all():
            worst = speed[~good][0]
            raise RuntimeError(
                f"a member's speed {worst:.4g} needs a step below dt / 2^{problem.max_level} for "
                f"cfl {problem.cfl}: lower dt or raise max_level"
            )
        return levels.astype(np.int64)

    def advance(self, chunk: slice, num_steps: int, extra: Tensor | None) -> None:
        """Advance the members of ``chunk`` by ``num_steps``; ``extra`` is held over them."""
        w = self.simulation.pairs[chunk]
        base = self.steady.expand_as(w) if extra is None else self.steady + extra
        if self.problem.cfl:
            self._advance_adaptive(chunk, w, base, num_steps)
            return
        held, scheme, start = base.contiguous().clone(), self.scheme(), self.simulation.step_index
        for index, rate in enumerate(self._noise(chunk, start, num_steps)):
            if rate is not None:
                self.hold(held, base, rate)
            if isinstance(scheme, CNAB2):
                previous = self.simulation.previous[chunk]
                first = self.simulation.fresh and index == 0
                scheme.step_with_memory(w, self.nonlinear, held, previous, first)
            else:
                scheme.step(w, self.explicit(held))

    def explicit(self, held: Tensor):
        """R(w): the nonlinear term unless a closure supplies it, and the held forcings."""

        def rate(w: Tensor, out: Tensor) -> Tensor:
            return self.nonlinear(w, out).add_(held)

        return rate

    def _advance_adaptive(self, chunk: slice, w: Tensor, base: Tensor, num_steps: int) -> None:
        """Each member takes ``2^j`` substeps per step; members of one level go together."""
        start = self.simulation.step_index
        for step in range(start, start + num_steps):
            levels = self.levels(w)
            for level in np.unique(levels).tolist():
                rows = np.flatnonzero(levels == level)
                part, part_base = w[rows], base[rows]
                held = part_base.clone()
                scheme, count = self.scheme(level), 2**level
                for rate in self._noise(chunk.start + rows, step * count, count, level):
                    if rate is not None:
                        self.hold(held, part_base, rate)
                    scheme.step(part, self.explicit(held))
                w[rows] = part

    def hold(self, held: Tensor, base: Tensor, rate: Tensor) -> None:
        """``held = base + rate`` in the box of drawn modes (real pairs)."""
        noise, columns = self.simulation.noise, self.transform.columns
        assert noise is not None
        width = min(noise.draws.columns + 1, columns.stop) - columns.start
        if width <= 0:
            return
        rate = rate[:, :, columns.start : columns.start + width]
        upper = noise.draws.rows + 1
        torch.add(base[:, :upper, :width], rate[:, :upper], out=held[:, :upper, :width])
        if noise.draws.rows:
            lower = slice(-noise.draws.rows, None)
            torch.add(base[:, lower, :width], rate[:, upper:], out=held[:, lower, :width])

    def _noise(
        self, where: slice | np.ndarray, first: int, steps: int, level: int = 0
    ) -> Iterator[Tensor | None]:
        """Rates of steps ``first ...`` for some rows of the ensemble, many steps drawn at once."""
        noise = self.simulation.noise
        if noise is None:
            yield from (None for _ in range(steps))
            return
        rows = np.arange(len(self.simulation.members))[where]
        block = max(1, NOISE_BYTES // (len(rows) * noise.box[0] * noise.box[1] * 16))
        for start in range(first, first + steps, block):
            count = min(block, first + steps - start)
            if noise.correlation_time:
                draws = noise.draw(self._members(rows), start, count, level)
                yield from self._pairs(self._relax(rows, draws, level))
            elif isinstance(where, slice) and count < block:
                yield from self._drawn_ahead(where, start, count, block)
            else:
                yield from self._pairs(noise.draw(self._members(rows), start, count, level))

    def _members(self, rows: np.ndarray) -> list[int]:
        return [self.simulation.members[row] for row in rows]

    def _pairs(self, draws: np.ndarray) -> Tensor:
        return torch.view_as_real(torch.from_numpy(draws)).to(self.simulation.pairs)

    def _drawn_ahead(self, chunk: slice, first: int, count: int, block: int) -> Tensor:
        """Rates of a few steps, from a longer draw when the last call ended where this begins."""
        noise, kept = self.simulation.noise, self.simulation.drawn_ahead
        assert noise is not None
        start, rates = kept.get(chunk.start, (first, self.simulation.pairs[:0]))
        if not start <= first <= first + count <= start + len(rates):
            goes_on = len(rates) > 0 and first == start + len(rates)
            num = min(max(count, 2 * len(rates)), block) if goes_on else count
            members = self.simulation.members[chunk]
            start, rates = first, self._pairs(noise.draw(members, first, num))
            kept[chunk.start] = start, rates
        return rates[first - start : first - start + count]

    def _relax(self, rows: np.ndarray, draws: np.ndarray, level: int) -> np.ndarray:
        """Ornstein-Uhlenbeck rates of the steps from their driving normals; keeps the last."""
        noise, rates = self.simulation.noise, self.simulation.rates
        assert noise is not None
        decay, kick = noise.relaxation(self.problem.dt * 2.0**-level)
        y = rates[rows]
        out = np.empty_like(draws)
        for step, z in enumerate(draws):
            out[step] = y
            y = y * decay + z * kick
        rates[rows] = y
        return out


def _zero(w: Tensor, out: Tensor) -> Tensor:
    return out.zero_()
