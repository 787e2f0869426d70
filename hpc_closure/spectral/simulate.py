"""Run members of an ensemble: one state tensor, members on the leading axis."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.forcing import steady_forcing
from hpc_closure.spectral.initial import initial_spectrum
from hpc_closure.spectral.noise import NoiseModel
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.transform import Transform

# Bytes of noise drawn ahead per chunk of members.
NOISE_BYTES = 4 << 20


class Simulation:
    """Members of one problem, advanced together.

    What a member does depends on the problem, the seed, the stage and its id only; on the CPU to the
    last bit, whatever ``chunk``, ``threads`` and the number of domain ranks.

    Args:
        problem: the recipe.
        members: member ids, the leading axis of every array.
        seed: seed of the experiment.
        device: ``cpu`` or a CUDA device.
        comm: mpi4py communicator whose ranks share each field (slabs), or None.
        stage: stage whose draws these are.
        chunk: members advanced together in cache, by default by size.
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
        chunk: int | None = None,
        threads: int | None = None,
    ):
        if not len(members):
            raise ValueError("a simulation needs at least one member")
        self.problem, self.members, self.seed, self.stage = problem, list(members), seed, stage
        self.grid = problem.make_grid()
        self.device, self.comm = torch.device(device), comm
        self.transform = Transform(self.grid, problem.precision, device, comm)
        self.noise: NoiseModel | None = None
        if problem.removed == "none":
            self.noise = problem.make_noise(seed, stage)
        self.step_index = 0
        if self.transform.slabs or self.device.type != "cpu":
            threads = 1
        threads = min(threads or torch.get_num_threads(), len(self.members))
        self._chunks = _split(len(self.members), chunk or self._chunk_size(), threads)
        threads = min(threads, len(self._chunks))
        self._lanes = [_Lane(self) for _ in range(threads)]
        self._pool = None
        if threads > 1:
            self._pool = ThreadPoolExecutor(threads, initializer=_one_torch_thread)
        self._w = self._zeros()
        self._previous = self._zeros() if self._lanes[0].scheme(0).keeps_previous else None
        self._rates: np.ndarray | None = None
        self._fresh = True

    # -- state -----------------------------------------------------------------------------------

    @property
    def time(self) -> float:
        """Time of the state."""
        return self.step_index * self.problem.dt

    @property
    def state(self) -> Tensor:
        """Retained spectrum ``(members, 2K + 1, K + 1)`` complex (this rank's columns), a view."""
        return torch.view_as_complex(self._w)

    def initialise(self) -> Simulation:
        """Draw the initial state of every member and set the clock to zero."""
        start = initial_spectrum(
            self.grid, members=self.members, seed=self.seed, stage=self.stage, **self.problem.initial
        )
        return self.load_state(0, start)

    def load_state(
        self,
        step_index: int,
        w_hat: np.ndarray | Tensor,
        previous_hat: np.ndarray | None = None,
        rates: np.ndarray | None = None,
    ) -> Simulation:
        """Continue from ``save_state``, or from whole retained spectra of another run.

        Args:
            step_index: steps taken.
            w_hat: ``(members, 2K + 1, K + 1)`` complex.
            previous_hat: last nonlinear term, for schemes that keep it; without it they restart.
            rates: state of an Ornstein-Uhlenbeck forcing; by default drawn stationary.
        """
        self.step_index = int(step_index)
        self._put(self._w, w_hat)
        self._fresh = previous_hat is None
        if self._previous is not None and previous_hat is not None:
            self._put(self._previous, previous_hat)
        if self.noise is not None and self.noise.correlation_time:
            self._rates = self.noise.stationary(self.members) if rates is None else rates.copy()
        return self

    def save_state(self) -> dict[str, np.ndarray | int]:
        """All that a restart needs, bit-exact: ``sim.load_state(**saved)``. Whole spectra."""
        saved: dict[str, np.ndarray | int] = {
            "step_index": self.step_index,
            "w_hat": self._whole(self._w),
        }
        if self._previous is not None and not self._fresh:
            saved["previous_hat"] = self._whole(self._previous)
        if self._rates is not None:
            saved["rates"] = self._rates.copy()
        return saved

    def fields(self, names: Sequence[str], size: int | None = None) -> dict[str, Tensor]:
        """Physical fields on the grid (or ``size`` points): ``vorticity`` ``(members, n, n)``,
        ``velocity`` ``(members, 2, n, n)``, ``streamfunction``; on a line ``state``. Whole fields on
        every rank."""
        out = {}
        for name in names:
            spectra = self._field_spectra(name)
            out[name] = self.transform.gather_field(self.transform.to_physical(spectra, size))
        return out

    def _field_spectra(self, name: str) -> Tensor:
        local, grid, w = self.transform.local, self.grid, self.state
        if name in ("vorticity", "state"):
            return w
        if name == "streamfunction" and grid.dimensions == 2:
            return w * local(grid.inverse_k2).to(self._w)
        if name == "velocity" and grid.dimensions == 2:
            psi = w * local(grid.inverse_k2).to(self._w)
            return torch.stack([1j * local(grid.ky).to(psi) * psi, -1j * grid.kx.to(psi) * psi], 1)
        raise ValueError(f"unknown field {name!r} in {grid.dimensions} dimensions")

    def noise_hat(self, step: int | None = None) -> Tensor:
        """``beta xi_hat`` of the step from ``step`` to ``step + 1``, ``(members, 2K + 1, K + 1)``.

        Zero without noise; a coloured forcing knows the present step only. On slabs this rank's
        columns.
        """
        step = self.step_index if step is None else step
        noise = self.noise
        if noise is None:
            return torch.zeros_like(self.state)
        if noise.correlation_time:
            if step != self.step_index:
                raise ValueError("a coloured forcing is known at the present step only")
            box = self._rates
        else:
            box = noise.draw(self.members, step, 1)[0]
        return self.transform.local(noise.spread(box)).to(self.state)

    def nonlinear_hat(self) -> Tensor:
        """``-(u . grad w)`` of the present state, like ``state`` (this rank's columns)."""
        out = self._zeros()
        self._lanes[0].equation.nonlinear(self._w, out)
        return torch.view_as_complex(out)

    def nonlinear_hat(self) -> Tensor:
        """The nonlinear term on the right-hand side, ``-(u . grad w)``, of the present state.

        ``(members, 2K + 1, K + 1)``; on slabs this rank's columns.
        """
        out = torch.empty_like(self._w)
        for chunk in self._chunks:
            self._lanes[0].equation.nonlinear(self._w[chunk], out[chunk])
        return torch.view_as_complex(out)

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
        held = None
        if tendency_hat is not None:
            held = torch.view_as_real(tendency_hat.to(self.state).resolve_conj().contiguous())
        queue = iter(self._chunks)
        lock = threading.Lock()

        def work(lane: _Lane) -> None:
            while True:
                with lock:
                    chunk = next(queue, None)
                if chunk is None:
                    return
                lane.advance(chunk, num_steps, None if held is None else held[chunk])

        if self._pool is None:
            work(self._lanes[0])
        else:
            list(self._pool.map(work, self._lanes))
        if num_steps:
            self._fresh = False
        self.step_index += num_steps
        return self

    @property
    def linear(self) -> Tensor:
        """Eigenvalue of the linear part per mode, whole retained shape, complex128."""
        return self._lanes[0].equation.linear

    def speed(self) -> np.ndarray:
        """Largest ``|u| + |v|`` of each member, ``(members,)`` float64."""
        return np.concatenate([self._lanes[0].speed(self._w[chunk]) for chunk in self._chunks])

    def levels(self) -> np.ndarray:
        """Refinement level that each member takes in its next step, int (zeros with a fixed step)."""
        return np.concatenate([self._lanes[0].levels(self._w[chunk]) for chunk in self._chunks])

    # -- internals -------------------------------------------------------------------------------

    def _zeros(self) -> Tensor:
        shape = (len(self.members), *self.transform.shape, 2)
        return torch.zeros(shape, dtype=self.transform.real, device=self.device)

    def _chunk_size(self) -> int:
        """Members whose work arrays stay in the outer cache of a core; all of them on a GPU."""
        if self.device.type != "cpu" or self.transform.slabs:
            return len(self.members)
        points = self.grid.size**self.grid.dimensions
        return max(1, min(64, (1 << 16) // points))

    def _put(self, target: Tensor, whole: np.ndarray | Tensor) -> None:
        whole = torch.as_tensor(whole)
        expected = (len(self.members), *self.grid.shape)
        if tuple(whole.shape) != expected:
            raise ValueError(f"expected spectra of shape {expected}, got {tuple(whole.shape)}")
        mine = self.transform.local(whole).to(self.device, self.transform.complex)
        target.copy_(torch.view_as_real(mine.contiguous()))

    def _whole(self, w: Tensor) -> np.ndarray:
        return self.transform.gather(torch.view_as_complex(w)).cpu().numpy().copy()


class _Lane:
    """One worker: its equation, schemes and buffers."""

    def __init__(self, simulation: Simulation):
        self.owner = simulation
        problem, shared = simulation.problem, simulation.transform
        self.transform = shared
        if simulation.device.type == "cpu":
            self.transform = Transform(shared.grid, problem.precision, "cpu", simulation.comm)
        self.equation = problem.make_equation(self.transform)
        self.nonlinear = self.equation.nonlinear
        if problem.removed == "convection":
            self.nonlinear = _zero
        steady = shared.local(steady_forcing(shared.grid, **problem.forcing))
        self.steady = torch.view_as_real(steady.to(shared.device, shared.complex).contiguous())
        self._schemes: dict[int, object] = {}

    def scheme(self, level: int):
        """Scheme at ``dt / 2**level``, coefficients cached."""
        if level not in self._schemes:
            self._schemes[level] = self.owner.problem.make_scheme(
                self.equation.linear, self.transform, level
            )
        return self._schemes[level]

    def speed(self, w: Tensor) -> np.ndarray:
        """Largest speed of each member over all ranks, float64."""
        return self.transform.maximum(self.equation.speed(w).double().cpu().numpy())

    def levels(self, w: Tensor) -> np.ndarray:
        """Refinement level of each member from its own largest speed."""
        problem, grid = self.owner.problem, self.owner.grid
        if not problem.cfl:
            return np.zeros(w.shape[0], dtype=np.int64)
        speed = self.speed(w)
        number = speed * (problem.dt * grid.size / grid.length / problem.cfl)
        levels = np.ceil(np.log2(np.maximum(number, 1.0)))
        if not np.isfinite(number).all() or levels.max() > problem.max_level:
            worst = int(np.nanargmax(np.where(np.isfinite(number), number, np.inf)))
            raise RuntimeError(
                f"a member's speed {speed[worst]:.4g} needs a step below dt / 2^{problem.max_level} "
                f"for cfl {problem.cfl}: lower dt or raise max_level"
            )
        return levels.astype(np.int64)

    def advance(self, chunk: slice, num_steps: int, extra: Tensor | None) -> None:
        """Advance the members of ``chunk``."""
        w = self.owner._w[chunk]
        base = self.steady.expand_as(w) if extra is None else self.steady + extra
        if self.owner.problem.cfl:
            self._advance_adaptive(chunk, w, base, num_steps)
            return
        previous = None if self.owner._previous is None else self.owner._previous[chunk]
        held = base.contiguous().clone()
        scheme = self.scheme(0)
        for index, rate in enumerate(self._noise(chunk, self.owner.step_index, num_steps)):
            if rate is not None:
                self._hold(held, base, rate)
            if previous is not None:
                first = self.owner._fresh and index == 0
                scheme.step_with_memory(w, self.nonlinear, held, previous, first)
            else:
                scheme.step(w, self._explicit(held), None)

    def _explicit(self, held: Tensor):
        """R(w): the nonlinear term unless a closure supplies it, and the held forcings."""

        def explicit(w: Tensor, out: Tensor) -> Tensor:
            return self.nonlinear(w, out).add_(held)

        return explicit

    def _advance_adaptive(self, chunk: slice, w: Tensor, base: Tensor, num_steps: int) -> None:
        """Each member takes ``2^j`` substeps per step; members of one level go together."""
        start = self.owner.step_index
        for step in range(start, start + num_steps):
            levels = self.levels(w)
            for level in np.unique(levels).tolist():
                rows = np.flatnonzero(levels == level)
                part, part_base = w[rows], base[rows]
                held = part_base.clone()
                scheme, count = self.scheme(level), 2**level
                where = chunk.start + rows
                for rate in self._noise(where, step * count, count, level):
                    if rate is not None:
                        self._hold(held, part_base, rate)
                    scheme.step(part, self._explicit(held), None)
                w[rows] = part

    def _hold(self, held: Tensor, base: Tensor, rate: Tensor) -> None:
        """``held = base + rate`` in the box of drawn modes (real pairs)."""
        draws, columns = self.owner.noise.draws, self.transform.columns
        width = min(draws.columns + 1, columns.stop) - columns.start
        if width <= 0:
            return
        rate = rate[:, :, columns.start : columns.start + width]
        upper = draws.rows + 1
        torch.add(base[:, :upper, :width], rate[:, :upper], out=held[:, :upper, :width])
        if draws.rows:
            lower = slice(-draws.rows, None)
            torch.add(base[:, lower, :width], rate[:, upper:], out=held[:, lower, :width])

    def _noise(
        self, where: slice | np.ndarray, first: int, steps: int, level: int = 0
    ) -> Iterator[Tensor | None]:
        """Rates of steps ``first ...`` for some rows of the ensemble, drawn many steps at once."""
        noise = self.owner.noise
        if noise is None:
            yield from (None for _ in range(steps))
            return
        rows = np.arange(len(self.owner.members))[where]
        members = [self.owner.members[row] for row in rows]
        per_step = len(members) * noise.box[0] * noise.box[1] * 16
        block = max(1, NOISE_BYTES // per_step)
        for start in range(0, steps, block):
            count = min(block, steps - start)
            draws = noise.draw(members, first + start, count, level)
            if noise.correlation_time:
                draws = self._relax(rows, draws, level)
            rates = torch.view_as_real(torch.from_numpy(draws)).to(self.owner._w)
            yield from rates

    def _relax(self, rows: np.ndarray, draws: np.ndarray, level: int) -> np.ndarray:
        """Ornstein-Uhlenbeck rates of the steps from their driving normals; keeps the last."""
        rates = self.owner._rates
        decay, kick = self.owner.noise.relaxation(self.owner.problem.dt * 2.0**-level)
        y = rates[rows]
        out = np.empty_like(draws)
        for step, z in enumerate(draws):
            out[step] = y
            y = y * decay + z * kick
        rates[rows] = y
        return out


def _split(members: int, size: int, threads: int) -> list[slice]:
    """Consecutive chunks of at most ``size`` members, a multiple of ``threads`` when there are more."""
    num = -(-members // size)
    num = min(members, -(-num // threads) * threads)
    edges = [round(i * members / num) for i in range(num + 1)]
    return [slice(a, b) for a, b in zip(edges, edges[1:])]


def _zero(w: Tensor, out: Tensor) -> Tensor:
    return out.zero_()


def _one_torch_thread() -> None:
    torch.set_num_threads(1)
