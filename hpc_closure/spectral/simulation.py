"""Advance the members of an ensemble: one state tensor, members on the leading axis."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral import switches
from hpc_closure.spectral.ensemble import Ensemble
from hpc_closure.spectral.modes.grid import symmetrise
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.noise.events import Events
from hpc_closure.spectral.noise.rates import Rates
from hpc_closure.spectral.noise.state_dependent import Start
from hpc_closure.spectral.outside.problem import OutsideProblem
from hpc_closure.spectral.outside.simulation import OutsideSimulation
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.schemes import Explicit, Scheme

# Points of a chunk of members: enough to hide the interpreter's cost, few enough for the cache.
CHUNK_POINTS = 1 << 16
# Steps after which modes k and -k of an equation that amplifies are made those of a real field:
# few enough for growth by a small factor, many enough to cost nothing.
SYMMETRISED = 64
LOST = -1  # refinement level of a member for which no allowed step is short enough


class Simulation(Ensemble):
    """Members of one problem, advanced together.

    The trajectory of a member depends only on the problem, the seed, the stage and the member's
    id. On the CPU this holds to the last bit, for any chunks, ``threads`` and number of domain
    ranks.

    Args:
        problem: the recipe.
        members: member ids, the leading axis of every array.
        seed: seed of the experiment.
        device: ``cpu`` or a CUDA device.
        comm: mpi4py communicator whose ranks share each field (slabs), or None.
        stage: stage of the pipeline, part of the Philox key.
        threads: worker threads over chunks; by default torch's number of threads.
    """

    def __init__(
        self,
        problem: Problem,
        members: Sequence[int],
        seed: int,
        *,
        device="cpu",
        comm=None,
        stage: str = "generate",
        threads: int | None = None,
    ):
        super().__init__(problem, members, seed, device=device, comm=comm, stage=stage)
        self.noise = problem.make_noise(seed, stage) if problem.removed == "none" else None
        self.rates = Rates(self.noise, self.members, self.pairs)
        self.events = problem.physics.events(self.grid, problem.dt, seed, stage)
        self._steady = self._local_pairs(problem.physics.steady(self.grid))
        self._workers, self._chunks = self._make_workers(threads)
        self._pool = None
        if len(self._workers) > 1:
            workers = len(self._workers)
            self._pool = ThreadPoolExecutor(workers, "chunks", torch.set_num_threads, (1,))
        self.scheme = self._workers[0].scheme_at(0)
        self.scheme.load(self.pairs, {})
        self._device_steps = self._make_device_steps()

    def initialise(self) -> Simulation:
        """Draw the initial state of every member and set the step index to zero."""
        physics = self.problem.physics
        start = physics.draw_initial(self.grid, self.members, self.seed, self.stage)
        return self.load_state(0, start)

    def load_state(
        self,
        step_index: int,
        w_hat: np.ndarray | Tensor,
        rates: np.ndarray | None = None,
        **memory: np.ndarray | Tensor,
    ) -> Simulation:
        self.step_index = int(step_index)
        self.pairs.copy_(self._checked_pairs(w_hat))
        past = {name: self._checked_pairs(value) for name, value in memory.items()}
        self.scheme.load(self.pairs, past)
        self.rates.load(rates)
        return self

    def forget(self) -> Simulation:
        self.scheme.load(self.pairs, {})
        return self

    def save_state(self) -> dict[str, np.ndarray | int]:
        spectra = {"w_hat": self.pairs, **self.scheme.save()}
        saved: dict[str, np.ndarray | int] = {"step_index": self.step_index}
        for name, pairs in spectra.items():
            full = self.transform.gather(torch.view_as_complex(pairs))
            saved[name] = full.cpu().numpy().copy()
        return {**saved, **self.rates.save()}

    def noise_hat(self, step: int | None = None) -> Tensor:
        """Return ``beta xi_hat`` of one step, ``(members, 2K + 1, K + 1)``.

        It is zero without noise. On slabs it is this rank's columns.

        Args:
            step: number of the step, by default the next one.

        Raises:
            ValueError: another step than the next one, and the forcing has a correlation time or
                depends on the state.
        """
        step = self.step_index if step is None else step
        if self.noise is None:
            return torch.zeros_like(self.state)
        state_dependent = self.rates.response is not None
        if (self.rates.coloured or state_dependent) and step != self.step_index:
            kind = "state-dependent forcing" if state_dependent else "coloured forcing"
            raise ValueError(f"a {kind} is known at the present step only, not at step {step}")
        if state_dependent:
            return torch.view_as_complex(self.rates.state_dependent(self.start()))
        noise = torch.zeros_like(self.state)
        full = self.noise.spread(self.rates.at(step))
        self.problem.physics.forced(noise).copy_(self.transform.local(full))
        return noise

    def start(self) -> Start:
        """Return all members at the start of the next step."""
        return Start(self.step_index, slice(None), self.pairs, self.transform)

    def nonlinear_hat(self) -> Tensor:
        """Return the nonlinear term of the state, ``-(u . grad w)``, as a right-hand side.

        The result is ``(members, 2K + 1, K + 1)``, on slabs this rank's columns. It is computed
        also if a closure supplies the term. A forcing that follows the state is left out.
        """
        out = torch.empty_like(self.pairs)
        equation = self._workers[0].equation
        for chunk in self._chunks:
            equation.nonlinear(self.pairs[chunk], out[chunk])
            force = equation.state_forcing(self.pairs[chunk])
            if force is not None:
                out[chunk].sub_(force)
        return torch.view_as_complex(out)

    def _derived(self, name: str) -> Tensor:
        return self._workers[0].equation.derived(name, self.pairs)

    @property
    def linear(self) -> Tensor:
        """Return the eigenvalue of the linear part per mode, full retained shape, complex128."""
        return self._workers[0].equation.linear

    def speed(self) -> np.ndarray:
        """Return the largest ``|u| + |v|`` of each member, ``(members,)`` float64."""
        worker = self._workers[0]
        return np.concatenate([worker.speed(self.pairs[chunk]) for chunk in self._chunks])

    def levels(self) -> np.ndarray:
        """Return the refinement level of each member's next step, ``(members,)`` int64.

        It is 0 with a fixed step, and LOST if no allowed step is short enough.
        """
        worker = self._workers[0]
        return np.concatenate([worker.levels(self.pairs[chunk]) for chunk in self._chunks])

    # -- time ------------------------------------------------------------------------------------

    def advance(self, num_steps: int, tendency_hat: Tensor | None = None) -> Simulation:
        """Take ``num_steps`` steps of ``problem.dt``.

        Args:
            num_steps: number of steps.
            tendency_hat: closure U_hat ``(members, 2K + 1, K + 1)``, added to the right-hand side
                and constant over these steps. On slabs this rank's columns.

        Raises:
            ValueError: ``num_steps`` is negative.
        """
        if num_steps < 0:
            raise ValueError(f"num_steps must not be negative, got {num_steps}")
        closure = None
        if tendency_hat is not None:
            closure = torch.view_as_real(tendency_hat.to(self.state).resolve_conj().contiguous())
        end = self.step_index + num_steps
        while self.step_index < end:
            steps = end - self.step_index
            if self._device_steps is None:
                self._advance_chunks(steps, closure)
            elif self.scheme.is_starting:
                steps = 1  # the first step of a scheme differs from the recorded ones
                self._advance_chunks(steps, closure)
            else:
                base = self._base(slice(None), closure)
                self._device_steps.advance(self.step_index, steps, base)
            self.step_index += steps
        return self

    def _advance_chunks(self, num_steps: int, closure: Tensor | None) -> None:
        """Advance all chunks; a worker takes a chunk through all steps while it is cached."""
        queue, lock = iter(self._chunks), threading.Lock()

        def work(worker: Worker) -> None:
            while True:
                with lock:
                    chunk = next(queue, None)
                if chunk is None:
                    return
                w, base = self.pairs[chunk], self._base(chunk, closure)
                worker.advance(chunk, w, base, self.step_index, num_steps)

        if self._pool is None:
            work(self._workers[0])
            return
        list(self._pool.map(work, self._workers))
        # Workers run with one torch thread each; new threads elsewhere get this thread's number.
        torch.set_num_threads(torch.get_num_threads())

    # -- internals -------------------------------------------------------------------------------

    def _base(self, chunk: slice, closure: Tensor | None) -> Tensor:
        """Return the steady forcing plus the closure of a chunk, real pairs."""
        if closure is None:
            return self._steady.expand_as(self.pairs[chunk])
        return self._steady + closure[chunk]

    def _make_workers(self, threads: int | None) -> tuple[list[Worker], list[slice]]:
        """Return one worker per thread, and the chunks of members that the workers share."""
        num = len(self.members)
        points = math.prod(self.grid.points) * len(self.problem.physics.channels)
        chunk = max(1, CHUNK_POINTS // points)
        if self.device.type != "cpu" or self.transform.slabs:
            # a GPU needs one launch for all members, slabs need one exchange
            threads, chunk = 1, num
        threads = min(threads or torch.get_num_threads(), num)
        chunks = _split(num, chunk, threads)
        problem = self.problem
        transforms = [self.transform]
        for _ in range(1, min(threads, len(chunks))):
            transforms.append(Transform(self.grid, problem.precision, self.device))
        equations = [problem.make_equation(transform) for transform in transforms]
        linear, transform = equations[0].linear, self.transform
        scheme_at = cache(lambda level: problem.make_scheme(linear, transform, level))
        workers = [
            Worker(problem, equation, self.rates, self.events, scheme_at) for equation in equations
        ]
        return workers, chunks

    def _make_device_steps(self):
        """Make the steps of the switches ``graphs`` and ``fused``.

        None with both off, on the CPU, and where a step needs the host: an adaptive step, a
        coloured forcing, one that follows the state, several channels, unequal sides.
        """
        if self.device.type != "cuda" or not switches.active() & {switches.GRAPHS, switches.FUSED}:
            return None
        by_host = self.problem.cfl or self.rates.coloured or self.rates.response is not None
        if by_host or self.channel_shape or len(self._chunks) > 1 or not self.problem.equal_sides:
            return None
        from hpc_closure.spectral.cuda.steps import DeviceSteps

        worker = self._workers[0]
        return DeviceSteps(self.pairs, worker.equation, worker.nonlinear, self.scheme, self.rates)


def simulation_of(
    problem: Problem, members: Sequence[int], seed: int, **settings: Any
) -> Ensemble:
    """Return members of a problem with the solver that advances them.

    Args:
        problem: the recipe; of a reduced solver perhaps that of a user's.
        members: member ids.
        seed: seed of the experiment.
        settings: ``device``, ``comm``, ``stage`` and ``threads`` of :class:`Simulation`.
    """
    if isinstance(problem, OutsideProblem):
        return OutsideSimulation(problem, members, seed, **settings)
    return Simulation(problem, members, seed, **settings)


class Worker:
    """Steps chunks of members, with the equation and the work arrays of one thread.

    Args:
        problem: the recipe.
        equation: on a transform that no other worker uses.
        rates: the stochastic forcing of the ensemble.
        events: random events of the equation, or None.
        scheme_at: returns the scheme at ``dt / 2**level``; the workers share the schemes.
    """

    def __init__(
        self,
        problem: Problem,
        equation,
        rates: Rates,
        events: Events | None,
        scheme_at: Callable[[int], Scheme],
    ):
        self.problem, self.equation, self.rates, self.events = problem, equation, rates, events
        self.scheme_at, self.transform = scheme_at, equation.transform
        self.nonlinear = equation.nonlinear
        if problem.removed == "convection":
            self.nonlinear = _zero
        # this rank has the modes with both signs: those with wavenumber 0 along the last side
        self.symmetrises = problem.physics.amplifies and self.transform.columns.start == 0
        self._registers: dict[int, Tensor] = {}

    def advance(self, chunk: slice, w: Tensor, base: Tensor, first: int, num_steps: int) -> None:
        """Advance a chunk in place.

        Args:
            chunk: rows of the ensemble.
            w: state of the chunk, real pairs.
            base: steady forcing and closure of the chunk, constant over these steps.
            first: number of the first step.
            num_steps: steps to take.
        """
        if self.problem.cfl:
            self._advance_adaptive(chunk, w, base, first, num_steps)
        else:
            rates = self.rates.steps(chunk, first, num_steps)
            self._advance_steps(chunk, w, base, enumerate(rates, first), 0)

    def _advance_steps(self, rows, w: Tensor, base: Tensor, rates, level: int) -> None:
        """Take one step of ``dt / 2**level`` for each numbered rate."""
        held = torch.empty_like(w).copy_(base)
        explicit = Explicit(self.nonlinear, held)
        scheme, registers = self.scheme_at(level), self._registers_for(w)
        response = self.rates.response
        forced = self.problem.physics.forced(base), self.problem.physics.forced(held)
        members = np.asarray(self.rates.members)[rows].tolist() if self.events else []
        for step, rate in rates:
            if self.symmetrises and step % SYMMETRISED == 0:
                symmetrise(torch.view_as_complex(w), self.problem.physics.dimensions)
            if response is not None:
                response.add(Start(step, rows, w, self.transform), base, rate, held)
            elif rate is not None:
                held_modes = self.transform.columns, self.transform.halves
                self.rates.add(forced[0], rate, forced[1], *held_modes)
            if self.events is not None:
                self.events.add(Start(step, rows, w, self.transform), members, base, held)
            scheme.step(w, explicit, registers, rows)

    def _advance_adaptive(
        self, chunk: slice, w: Tensor, base: Tensor, first: int, num_steps: int
    ) -> None:
        """Take ``2^j`` substeps per step and member; members of one level advance together."""
        for step in range(first, first + num_steps):
            levels = self.levels(w)
            w[levels == LOST] = torch.nan
            for level in np.unique(levels[levels != LOST]).tolist():
                chosen = np.flatnonzero(levels == level)
                rows, selected, count = chunk.start + chosen, w[chosen], 2**level
                rates = self.rates.steps(rows, step * count, count, level)
                self._advance_steps(rows, selected, base[chosen], enumerate(rates), level)
                w[chosen] = selected

    def speed(self, w: Tensor) -> np.ndarray:
        """Return the largest speed of each member over all ranks, ``(rows,)`` float64."""
        return self.transform.maximum(self.equation.speed(w).double().cpu().numpy())

    def levels(self, w: Tensor) -> np.ndarray:
        """Return the refinement level of each member's next step, from its speed; or LOST."""
        problem, grid = self.problem, self.transform.grid
        if not problem.cfl:
            return np.zeros(w.shape[0], dtype=np.int64)
        speed = self.speed(w)
        number = speed * (grid.courant(problem.dt) / problem.cfl)
        levels = np.ceil(np.log2(np.maximum(number, 1.0)))
        allowed = np.isfinite(number) & (levels <= problem.max_refinements)
        return np.where(allowed, levels, LOST).astype(np.int64)

    def _registers_for(self, w: Tensor) -> Tensor:
        if len(w) not in self._registers:
            self._registers[len(w)] = self.scheme_at(0).make_registers(w)
        return self._registers[len(w)]


def _zero(w: Tensor, out: Tensor) -> Tensor:
    return out.zero_()


def _split(members: int, size: int, threads: int) -> list[slice]:
    """Return consecutive chunks of at most ``size`` members.

    Their number is a multiple of ``threads``, if there are that many members.
    """
    num = -(-members // size)
    num = min(members, -(-num // threads) * threads)
    edges = [round(i * members / num) for i in range(num + 1)]
    return [slice(a, b) for a, b in zip(edges, edges[1:])]
