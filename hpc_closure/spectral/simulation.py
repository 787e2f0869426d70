"""Run members of an ensemble: one state tensor, members on the leading axis."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral import switches
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.noise.rates import Rates
from hpc_closure.spectral.noise.state_dependent import Start
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.schemes import Explicit, Scheme

# Points of a chunk of members: large enough to hide the interpreter, small enough for the cache.
CHUNK_POINTS = 1 << 16
LOST = -1  # level of a member that no step of the ladder is short enough for


class Simulation:
    """Members of one problem, advanced together.

    What a member does depends on the problem, the seed, the stage and its id only; on the CPU to
    the last bit, whatever the chunks, ``threads`` and the number of domain ranks.

    Args:
        problem: the recipe.
        members: member ids, the leading axis of every array.
        seed: seed of the experiment.
        device: ``cpu`` or a CUDA device.
        comm: mpi4py communicator whose ranks share each field (slabs), or None.
        stage: stage whose draws these are.
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
        if not len(members):
            raise ValueError("a simulation needs at least one member")
        self.problem, self.members, self.seed, self.stage = problem, list(members), seed, stage
        self.grid = problem.make_grid()
        self.device, self.comm = torch.device(device), comm
        self.transform = Transform(self.grid, problem.precision, device, comm)
        self.step_index = 0
        # State as real pairs (members, ..., 2).
        shape = (len(self.members), *self.transform.shape, 2)
        self.pairs = torch.zeros(shape, dtype=self.transform.real, device=self.device)
        self.noise = problem.make_noise(seed, stage) if problem.removed == "none" else None
        self.rates = Rates(self.noise, self.members, self.pairs)
        self._steady = self._own_pairs(problem.physics.forcing.spectrum(self.grid))
        self._workers, self._chunks = self._make_workers(threads)
        self._pool = None
        if len(self._workers) > 1:
            workers = len(self._workers)
            self._pool = ThreadPoolExecutor(workers, "chunks", torch.set_num_threads, (1,))
        self.scheme = self._workers[0].scheme_at(0)
        self.scheme.load(self.pairs, {})
        self._device_steps = self._make_device_steps()

    # -- state -----------------------------------------------------------------------------------

    @property
    def time(self) -> float:
        """Time of the state."""
        return self.step_index * self.problem.dt

    @property
    def state(self) -> Tensor:
        """Retained spectrum ``(members, 2K + 1, K + 1)`` complex (this rank's columns), a view."""
        return torch.view_as_complex(self.pairs)

    def initialise(self) -> Simulation:
        """Draw the initial state of every member and set the clock to zero."""
        start = self.problem.physics.initial.draw(self.grid, self.members, self.seed, self.stage)
        return self.load_state(0, start)

    def load_state(
        self,
        step_index: int,
        w_hat: np.ndarray | Tensor,
        rates: np.ndarray | None = None,
        **memory: np.ndarray | Tensor,
    ) -> Simulation:
        """Continue from ``save_state``, or from whole retained spectra of another run.

        Args:
            step_index: steps taken.
            w_hat: ``(members, 2K + 1, K + 1)`` complex.
            rates: state of a forcing that has one; by default it begins anew.
            memory: spectra of past steps that the scheme keeps; without them it starts afresh.
        """
        self.step_index = int(step_index)
        self.pairs.copy_(self._checked_pairs(w_hat))
        kept = {name: self._checked_pairs(value) for name, value in memory.items()}
        self.scheme.load(self.pairs, kept)
        self.rates.load(rates)
        return self

    def forget(self) -> Simulation:
        """Begin the scheme's history anew from the present state, as :meth:`load_state` does."""
        self.scheme.load(self.pairs, {})
        return self

    def save_state(self) -> dict[str, np.ndarray | int]:
        """All that a restart needs, bit-exact: ``sim.load_state(**saved)``. Whole spectra."""
        spectra = {"w_hat": self.pairs, **self.scheme.save()}
        saved: dict[str, np.ndarray | int] = {"step_index": self.step_index}
        for name, pairs in spectra.items():
            whole = self.transform.gather(torch.view_as_complex(pairs))
            saved[name] = whole.cpu().numpy().copy()
        return {**saved, **self.rates.save()}

    def fields(self, names: Sequence[str], size: int | None = None) -> dict[str, Tensor]:
        """Whole physical fields on the grid, or on ``size`` points per side, on every rank.

        Args:
            names: ``vorticity`` and ``streamfunction`` ``(members, n, n)``, ``velocity``
                ``(members, 2, n, n)``; on a line ``state`` ``(members, n)``.
            size: points per side.
        """
        out = {}
        for name in names:
            field = self.transform.to_physical(self.field_spectra(name), size)
            out[name] = self.transform.gather_field(field)
        return out

    def field_spectra(self, name: str) -> Tensor:
        """Spectra of a field of :meth:`fields`; on slabs this rank's columns."""
        grid, local, w = self.grid, self.transform.local, self.state
        if name in ("vorticity", "state"):
            return w
        if grid.dimensions == 2 and name in ("streamfunction", "velocity"):
            psi = w * local(grid.inverse_k2).to(self.pairs)
            if name == "streamfunction":
                return psi
            kx, ky = grid.kx.to(psi), local(grid.ky).to(psi)
            return torch.stack([1j * ky * psi, -1j * kx * psi], 1)
        raise ValueError(f"unknown field {name!r} in {grid.dimensions} dimensions")

    def noise_hat(self, step: int | None = None) -> Tensor:
        """``beta xi_hat`` of the step from ``step`` to ``step + 1``, ``(members, 2K + 1, K + 1)``.

        Zero without noise; a forcing that is coloured or follows the state knows the present step
        only. On slabs this rank's columns.
        """
        step = self.step_index if step is None else step
        if self.noise is None:
            return torch.zeros_like(self.state)
        follows = self.rates.response is not None
        if (self.rates.coloured or follows) and step != self.step_index:
            kind = "forcing that follows the state" if follows else "coloured forcing"
            raise ValueError(f"a {kind} is known at the present step only")
        if follows:
            return torch.view_as_complex(self.rates.shaped(self.start()))
        whole = self.noise.spread(self.rates.at(step))
        return self.transform.local(whole).to(self.state)

    def start(self) -> Start:
        """All members at the start of the coming step."""
        return Start(self.step_index, slice(None), self.pairs, self.transform)

    def nonlinear_hat(self) -> Tensor:
        """The nonlinear term on the right-hand side, ``-(u . grad w)``, of the present state.

        ``(members, 2K + 1, K + 1)``, also when a closure supplies it; on slabs this rank's
        columns.
        """
        out = torch.empty_like(self.pairs)
        for chunk in self._chunks:
            self._workers[0].equation.nonlinear(self.pairs[chunk], out[chunk])
        return torch.view_as_complex(out)

    @property
    def linear(self) -> Tensor:
        """Eigenvalue of the linear part per mode, whole retained shape, complex128."""
        return self._workers[0].equation.linear

    def speed(self) -> np.ndarray:
        """Largest ``|u| + |v|`` of each member, ``(members,)`` float64."""
        worker = self._workers[0]
        return np.concatenate([worker.speed(self.pairs[chunk]) for chunk in self._chunks])

    def levels(self) -> np.ndarray:
        """Refinement level of each member's next step, int64: 0 with a fixed step, LOST where none
        is short enough."""
        worker = self._workers[0]
        return np.concatenate([worker.levels(self.pairs[chunk]) for chunk in self._chunks])

    def diverged(self) -> Tensor:
        """Rows ``(members,)`` of bool, on the device, whose state has diverged; on slabs in this
        rank's columns."""
        return ~self.pairs.flatten(1).square().sum(1).isfinite()

    def mark_lost(self) -> np.ndarray:
        """Rows ``(members,)`` of bool whose state has diverged: from now on all of it is NaN.

        Diverged is what is not finite, or so large that its square is not. On slabs every rank
        must call.
        """
        lost = self.transform.maximum(self.diverged().cpu().numpy().astype(np.int64)) > 0
        if lost.any():
            self.pairs[torch.from_numpy(lost).to(self.device)] = torch.nan
        return lost

    # -- time ------------------------------------------------------------------------------------

    def advance(self, num_steps: int, tendency_hat: Tensor | None = None) -> Simulation:
        """Take ``num_steps`` steps of ``problem.dt``.

        Args:
            num_steps: number of steps.
            tendency_hat: extra right-hand side U_hat ``(members, 2K + 1, K + 1)``, held over these
                steps: how a closure enters. On slabs this rank's columns.
        """
        if num_steps < 0:
            raise ValueError(f"num_steps must not be negative, got {num_steps}")
        extra = None
        if tendency_hat is not None:
            extra = torch.view_as_real(tendency_hat.to(self.state).resolve_conj().contiguous())
        end = self.step_index + num_steps
        while self.step_index < end:
            steps = end - self.step_index
            if self._device_steps is None:
                self._advance_chunks(steps, extra)
            elif self.scheme.is_starting:
                steps = 1  # the first step of a history is not the one in the graphs
                self._advance_chunks(steps, extra)
            else:
                base = self._base(slice(None), extra)
                self._device_steps.advance(self.step_index, steps, base)
            self.step_index += steps
        return self

    def _advance_chunks(self, num_steps: int, extra: Tensor | None) -> None:
        """Each worker takes the next chunk through all steps while it is in its cache."""
        queue, lock = iter(self._chunks), threading.Lock()

        def work(worker: Worker) -> None:
            while True:
                with lock:
                    chunk = next(queue, None)
                if chunk is None:
                    return
                w, base = self.pairs[chunk], self._base(chunk, extra)
                worker.advance(chunk, w, base, self.step_index, num_steps)

        if self._pool is None:
            work(self._workers[0])
            return
        list(self._pool.map(work, self._workers))
        # The workers' single thread is their own; new threads elsewhere keep this thread's number.
        torch.set_num_threads(torch.get_num_threads())

    # -- internals -------------------------------------------------------------------------------

    def _base(self, chunk: slice, extra: Tensor | None) -> Tensor:
        """Steady forcing and closure of a chunk."""
        if extra is None:
            return self._steady.expand_as(self.pairs[chunk])
        return self._steady + extra[chunk]

    def _make_workers(self, threads: int | None) -> tuple[list[Worker], list[slice]]:
        """Workers, one per thread, and the chunks of members that they share out."""
        num = len(self.members)
        chunk = max(1, CHUNK_POINTS // self.grid.size**self.grid.dimensions)
        if self.device.type != "cpu" or self.transform.slabs:
            # one launch, one exchange for all members
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
        return [Worker(problem, each, self.rates, scheme_at) for each in equations], chunks

    def _make_device_steps(self):
        """Make the steps of the switches ``graphs`` and ``fused``.

        None with both off, on the CPU, and where a step needs the host: an adaptive step, a
        coloured forcing, one that follows the state.
        """
        if self.device.type != "cuda" or not switches.active() & {switches.GRAPHS, switches.FUSED}:
            return None
        by_host = self.problem.cfl or self.rates.coloured or self.rates.response is not None
        if by_host or len(self._chunks) > 1:
            return None
        from hpc_closure.spectral.cuda.steps import DeviceSteps

        worker = self._workers[0]
        return DeviceSteps(self.pairs, worker.equation, worker.nonlinear, self.scheme, self.rates)

    def _checked_pairs(self, whole: np.ndarray | Tensor) -> Tensor:
        """Whole spectra of all members as this rank's real pairs."""
        whole = torch.as_tensor(whole)
        expected = (len(self.members), *self.grid.shape)
        if tuple(whole.shape) != expected:
            raise ValueError(f"expected spectra of shape {expected}, got {tuple(whole.shape)}")
        return self._own_pairs(whole)

    def _own_pairs(self, whole: Tensor) -> Tensor:
        mine = self.transform.local(whole).to(self.device, self.transform.complex)
        return torch.view_as_real(mine.contiguous())


class Worker:
    """Steps chunks of members, with the equation and the work arrays of one thread.

    Args:
        problem: the recipe.
        equation: on a transform that no other worker uses.
        rates: the stochastic forcing of the ensemble.
        scheme_at: the scheme at ``dt / 2**level``; the workers share them.
    """

    def __init__(
        self, problem: Problem, equation, rates: Rates, scheme_at: Callable[[int], Scheme]
    ):
        self.problem, self.equation, self.rates = problem, equation, rates
        self.scheme_at, self.transform = scheme_at, equation.transform
        self.nonlinear = equation.nonlinear
        if problem.removed == "convection":
            self.nonlinear = _zero
        self._registers: dict[int, Tensor] = {}

    def advance(self, chunk: slice, w: Tensor, base: Tensor, first: int, num_steps: int) -> None:
        """Advance a chunk in place.

        Args:
            chunk: rows of the ensemble.
            w: their state, real pairs.
            base: their steady forcing and closure, held over these steps.
            first: steps taken before.
            num_steps: steps to take.
        """
        if self.problem.cfl:
            self._advance_adaptive(chunk, w, base, first, num_steps)
        else:
            rates = self.rates.steps(chunk, first, num_steps)
            self._advance_steps(chunk, w, base, enumerate(rates, first), 0)

    def _advance_steps(self, rows, w: Tensor, base: Tensor, rates, level: int) -> None:
        """One step of ``dt / 2**level`` for each of the numbered rates."""
        held = torch.empty_like(w).copy_(base)
        explicit = Explicit(self.nonlinear, held)
        scheme, registers = self.scheme_at(level), self._registers_for(w)
        response = self.rates.response
        for step, rate in rates:
            if response is not None:
                response.add(Start(step, rows, w, self.transform), base, rate, held)
            elif rate is not None:
                self.rates.add(base, rate, held, self.transform.columns)
            scheme.step(w, explicit, registers, rows)

    def _advance_adaptive(
        self, chunk: slice, w: Tensor, base: Tensor, first: int, num_steps: int
    ) -> None:
        """Each member takes ``2^j`` substeps per step; members of one level go together."""
        for step in range(first, first + num_steps):
            levels = self.levels(w)
            w[levels == LOST] = torch.nan
            for level in np.unique(levels[levels != LOST]).tolist():
                chosen = np.flatnonzero(levels == level)
                rows, part, count = chunk.start + chosen, w[chosen], 2**level
                rates = self.rates.steps(rows, step * count, count, level)
                self._advance_steps(rows, part, base[chosen], enumerate(rates), level)
                w[chosen] = part

    def speed(self, w: Tensor) -> np.ndarray:
        """Largest speed of each member over all ranks, float64."""
        return self.transform.maximum(self.equation.speed(w).double().cpu().numpy())

    def levels(self, w: Tensor) -> np.ndarray:
        """Refinement level of each member's next step, from its own largest speed; or LOST."""
        problem, grid = self.problem, self.transform.grid
        if not problem.cfl:
            return np.zeros(w.shape[0], dtype=np.int64)
        speed = self.speed(w)
        number = speed * (problem.dt * grid.size / grid.length / problem.cfl)
        levels = np.ceil(np.log2(np.maximum(number, 1.0)))
        good = np.isfinite(number) & (levels <= problem.max_level)
        return np.where(good, levels, LOST).astype(np.int64)

    def _registers_for(self, w: Tensor) -> Tensor:
        if len(w) not in self._registers:
            self._registers[len(w)] = self.scheme_at(0).make_registers(w)
        return self._registers[len(w)]


def _zero(w: Tensor, out: Tensor) -> Tensor:
    return out.zero_()


def _split(members: int, size: int, threads: int) -> list[slice]:
    """Consecutive chunks of at most ``size`` members, in number a multiple of ``threads``."""
    num = -(-members // size)
    num = min(members, -(-num // threads) * threads)
    edges = [round(i * members / num) for i in range(num + 1)]
    return [slice(a, b) for a, b in zip(edges, edges[1:])]
