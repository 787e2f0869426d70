"""Run members of an ensemble: one state tensor, members on the leading axis."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.initial import initial_spectrum
from hpc_closure.spectral.lanes import Lane
from hpc_closure.spectral.noise import NoiseModel
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.transform import Transform

# Points of a chunk of members: large enough to hide the interpreter, small enough for the cache.
CHUNK_POINTS = 1 << 16


class Simulation:
    """Members of one problem, advanced together.

    What a member does depends on the problem, the seed, the stage and its id only; on the CPU to
    the last bit, whatever ``chunk``, ``threads`` and the number of domain ranks.

    Args:
        problem: the recipe.
        members: member ids, the leading axis of every array.
        seed: seed of the experiment.
        device: ``cpu`` or a CUDA device.
        comm: mpi4py communicator whose ranks share each field (slabs), or None.
        stage: stage whose draws these are.
        chunk: members advanced together, by default by size.
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
        # State as real pairs (members, ..., 2); the last nonlinear term of schemes that keep it;
        # the state of a coloured forcing; noise drawn for coming steps (chunk -> first step,
        # rates); whether a scheme that keeps its last term starts afresh.
        self.pairs = self._zeros()
        self._make_lanes(chunk, threads)
        keeps = self._lanes[0].scheme().keeps_previous
        self.previous = self._zeros() if keeps else self.pairs.new_empty(0)
        self.rates = np.empty(0)
        self.drawn_ahead: dict[int, tuple[int, Tensor]] = {}
        self.fresh = True

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
        kind = dict(self.problem.initial)
        start = initial_spectrum(
            self.grid, kind.pop("kind"), self.members, self.seed, self.stage, **kind
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
        self._put(self.pairs, w_hat)
        self.fresh = previous_hat is None
        if len(self.previous) and previous_hat is not None:
            self._put(self.previous, previous_hat)
        if self.noise is not None and self.noise.correlation_time:
            self.rates = self.noise.stationary(self.members) if rates is None else rates.copy()
        return self

    def save_state(self) -> dict[str, np.ndarray | int]:
        """All that a restart needs, bit-exact: ``sim.load_state(**saved)``. Whole spectra."""
        saved: dict[str, np.ndarray | int] = {
            "step_index": self.step_index,
            "w_hat": self._whole(self.pairs),
        }
        if len(self.previous) and not self.fresh:
            saved["previous_hat"] = self._whole(self.previous)
        if len(self.rates):
            saved["rates"] = self.rates.copy()
        return saved

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
            box = self.rates
        else:
            box = noise.draw(self.members, step, 1)[0]
        return self.transform.local(noise.spread(box)).to(self.state)

    def nonlinear_hat(self) -> Tensor:
        """The nonlinear term on the right-hand side, ``-(u . grad w)``, of the present state.

        ``(members, 2K + 1, K + 1)``, also when a closure supplies it; on slabs this rank's
        columns.
        """
        out = torch.empty_like(self.pairs)
        for chunk in self._chunks:
            self._lanes[0].equation.nonlinear(self.pairs[chunk], out[chunk])
        return torch.view_as_complex(out)

    @property
    def linear(self) -> Tensor:
        """Eigenvalue of the linear part per mode, whole retained shape, complex128."""
        return self._lanes[0].equation.linear

    def speed(self) -> np.ndarray:
        """Largest ``|u| + |v|`` of each member, ``(members,)`` float64."""
        return np.concatenate([self._lanes[0].speed(self.pairs[chunk]) for chunk in self._chunks])

    def levels(self) -> np.ndarray:
        """Refinement level of each member's next step, int64 (zeros with a fixed step)."""
        return np.concatenate([self._lanes[0].levels(self.pairs[chunk]) for chunk in self._chunks])

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
        if num_steps:
            self._advance_chunks(num_steps, extra)
            self.fresh = False
            self.step_index += num_steps
        return self

    def _advance_chunks(self, num_steps: int, extra: Tensor | None) -> None:
        """Each worker takes the next chunk through all steps while it is in its cache."""
        queue, lock = iter(self._chunks), threading.Lock()

        def work(lane: Lane) -> None:
            while True:
                with lock:
                    chunk = next(queue, None)
                if chunk is None:
                    return
                lane.advance(chunk, num_steps, None if extra is None else extra[chunk])

        if self._pool is None:
            work(self._lanes[0])
            return
        list(self._pool.map(work, self._lanes))
        # The workers' single thread is their own; new threads elsewhere keep this thread's number.
        torch.set_num_threads(torch.get_num_threads())

    # -- internals -------------------------------------------------------------------------------

    def _make_lanes(self, chunk: int | None, threads: int | None) -> None:
        num = len(self.members)
        if self.device.type != "cpu" or self.transform.slabs:
            # one launch, one exchange for all members
            threads, chunk = 1, chunk or num
        elif chunk is None:
            chunk = max(1, CHUNK_POINTS // self.grid.size**self.grid.dimensions)
        self._chunks = _split(num, chunk, min(threads or torch.get_num_threads(), num))
        threads = min(threads or torch.get_num_threads(), len(self._chunks))
        if self.device.type == "cuda":
            from hpc_closure.spectral.graphs import GraphLane

            self._lanes: list[Lane] = [GraphLane(self)]
        else:
            self._lanes = [Lane(self) for _ in range(threads)]
        self._pool: ThreadPoolExecutor | None = None
        if threads > 1:
            self._pool = ThreadPoolExecutor(threads, "lane", torch.set_num_threads, (1,))

    def _zeros(self) -> Tensor:
        shape = (len(self.members), *self.transform.shape, 2)
        return torch.zeros(shape, dtype=self.transform.real, device=self.device)

    def _put(self, target: Tensor, whole: np.ndarray | Tensor) -> None:
        whole = torch.as_tensor(whole)
        expected = (len(self.members), *self.grid.shape)
        if tuple(whole.shape) != expected:
            raise ValueError(f"expected spectra of shape {expected}, got {tuple(whole.shape)}")
        mine = self.transform.local(whole).to(self.device, self.transform.complex)
        target.copy_(torch.view_as_real(mine.contiguous()))

    def _whole(self, pairs: Tensor) -> np.ndarray:
        return self.transform.gather(torch.view_as_complex(pairs)).cpu().numpy().copy()


def _split(members: int, size: int, threads: int) -> list[slice]:
    """Consecutive chunks of at most ``size`` members, in number a multiple of ``threads``."""
    num = -(-members // size)
    num = min(members, -(-num // threads) * threads)
    edges = [round(i * members / num) for i in range(num + 1)]
    return [slice(a, b) for a, b in zip(edges, edges[1:])]
