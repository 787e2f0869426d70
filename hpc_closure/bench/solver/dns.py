"""Speed of the DNS: our solver alone, or beside other methods in the same run.

The problem is the published one (nu = 1e-3, dt = 1e-3, CN-Euler, its steady and stochastic
forcing), on any grid. Per point and right-hand side, a step on the CPU moves about 14 words
(:data:`WORDS`). This traffic over the measured copy bandwidth is ``fraction_of_copy``. A value
above 1 means that the data stayed in the cache.

Against pyqg the problem is two-layer quasi-geostrophic flow (:mod:`.pyqg`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hpc_closure.bench import measure
from hpc_closure.bench.measure import Advance, Timing
from hpc_closure.bench.published import PublishedSolver
from hpc_closure.bench.solver import peers, pyqg
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.work.mpi import World

#: words of one real per point and right-hand side: mixed fields of the nonlinear term, written and
#: read twice each, 5.3; its spectra and factors 3.1; the update, four operations of three, 5.3
WORDS = 13.7
OURS = "hpc_closure"
ONE_RANK = "one-rank"
PUBLISHED = {"published": 10, "published-1": 1}  # draws per step
PYQG = "pyqg"
AGAINST = (*PUBLISHED, ONE_RANK, *peers.PEERS, PYQG)
NOISE = {"kind": "q_wiener", "amplitude": 5e-5, "draws": 10, "correlation": 0.005}
COLUMNS = measure.columns(
    "case grid:d members:d ranks:d precision method ns_per_point_rhs:.2f "
    "member_steps_per_s:.1f fraction_of_copy:.3f ratio:.2f"
)


@dataclass(frozen=True)
class Case:
    """Settings of a measurement.

    Attributes:
        grid, members, precision: settings of the problem.
        against: methods timed in turns with our solver.
        noise: whether the published stochastic forcing is on; peers lack it, so it is off with
            them.
        ranks, domain_ranks: number of processes, and how many share a field.
        timing: settings of the timed blocks.
    """

    grid: int = 64
    members: int = 20
    precision: str = "float64"
    against: tuple[str, ...] = ()
    noise: bool = True
    ranks: int = 1
    domain_ranks: int = 1
    timing: Timing = Timing()

    def __post_init__(self):
        measure.check(self.members, self.against, AGAINST)
        if self.ranks % self.domain_ranks:
            raise ValueError(
                f"domain ranks {self.domain_ranks} do not divide the {self.ranks} ranks"
            )
        if self.members < self.ranks // self.domain_ranks:
            raise ValueError(
                f"{self.members} members for {self.ranks // self.domain_ranks} groups of ranks: "
                "give each at least one"
            )
        if ONE_RANK in self.against and self.ranks == 1:
            raise ValueError("against one-rank needs several ranks: start it with mpirun -n 2")

    @property
    def name(self) -> str:
        """``dns``, ``dns-quiet`` without stochastic forcing, or ``dns-layers`` of two layers."""
        if self.two_layers:
            return "dns-layers"
        return "dns" if self.noise else "dns-quiet"

    @property
    def two_layers(self) -> bool:
        """Whether the problem is that of pyqg."""
        return PYQG in self.against


def problem_of(case: Case) -> Problem:
    """Return the published problem, or that of pyqg, on the grid of a case."""
    if case.two_layers:
        return pyqg.problem_of(case.grid, case.precision)
    return Problem(
        grid=case.grid,
        forcing={"kind": "published"},
        noise=NOISE if case.noise else {"kind": "none"},
        precision=case.precision,
    )


def split(case: Case) -> list[Case]:
    """Split a case into cases with the same problem for all methods.

    Peers have no stochastic forcing, so they are timed in a case without it; pyqg solves another
    problem.
    """
    if case.two_layers and len(case.against) > 1:
        others = tuple(name for name in case.against if name != PYQG)
        return [*split(replace(case, against=others)), *split(replace(case, against=(PYQG,)))]
    if case.two_layers:
        return [replace(case, noise=False)]
    quiet = tuple(name for name in case.against if name in peers.PEERS)
    if not quiet or not case.noise:
        return [case]
    noisy = tuple(name for name in case.against if name not in quiet)
    first = [replace(case, against=noisy)] if noisy else []
    return [*first, replace(case, against=quiet, noise=False)]


def run(case: Case, world: World | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    """Time a case on the ranks of ``world`` (collective).

    Returns:
        Records, ours first, and remarks, one line each: peers that are not installed, and how much
        the solutions of the others differ from ours. Both are complete on the first rank only.
    """
    world = world or World()
    problem = problem_of(case)
    contenders, remarks = {OURS: _ours(case, problem, world)}, []
    differences, found = {}, []
    for name in case.against:
        try:
            contenders[name], peer = _other(name, case, problem, world)
        except peers.NotInstalled as error:
            remarks.append(str(error))
            continue
        if peer is not None:
            found.append(peer)
            steps = pyqg.STEPS if case.two_layers else 10
            differences[name] = {"difference": difference(peer, problem, case, steps)}
            remarks.append(
                f"  {name}: differs from ours by {differences[name]['difference']:.1e} of the "
                f"change in {'ten' if steps == 10 else steps} steps"
            )

    def meet() -> None:
        if world.comm is not None:
            world.all_arrive(float("inf"))  # a waiting rank does not use its core

    def largest(seconds: float) -> float:
        return max(world.allgather(seconds))

    taken = measure.interleave(contenders, case.timing, meet=meet, agree=largest)
    for peer in found:
        if isinstance(peer, pyqg.Pyqg):
            peer.close()
    copy = sum(world.allgather(measure.copy_bandwidth(case.timing.device, meet=meet)))
    records = [_record(case, name, taken, copy) | differences.get(name, {}) for name in contenders]
    return records, remarks


def _record(case: Case, name: str, taken: dict[str, list[float]], copy: float) -> dict[str, Any]:
    """Create a row; times are of a step of all members."""
    seconds = statistics.median(taken[name])
    fields = len(problem_of(case).physics.channels)
    # of one right-hand side per step, in every method
    points = case.members * fields * case.grid**2
    bandwidth = WORDS * points * (8 if case.precision == "float64" else 4) / seconds
    in_words = name in (OURS, ONE_RANK) and not case.two_layers  # whose traffic is WORDS
    return {
        "case": case.name,
        "grid": case.grid,
        "members": case.members,
        "ranks": 1 if name == ONE_RANK else case.ranks,
        "domain_ranks": 1 if name == ONE_RANK else case.domain_ranks,
        "precision": case.precision,
        "method": name,
        "ns_per_point_rhs": 1e9 * seconds / points,
        "member_steps_per_s": case.members / seconds,
        "fraction_of_copy": bandwidth / copy if in_words else None,
        "ratio": None if name == OURS else measure.ratio(taken[OURS], taken[name]),
        "copy_bytes_per_s": copy,
        **case.timing.columns,
    }


def _ours(case: Case, problem: Problem, world: World) -> Advance:
    """Create our solver: members over groups of ranks, fields over the ranks of a group."""
    groups = world.groups(case.domain_ranks)
    my_members = range(case.members)[groups.index :: groups.count]
    if case.two_layers:
        fields = pyqg.initial_fields(problem, my_members)
        return pyqg.started(problem, fields, case.timing.device, groups.domain.comm).advance
    simulation = Simulation(
        problem, my_members, 0, device=case.timing.device, comm=groups.domain.comm
    )
    return simulation.initialise().advance


def _other(
    name: str, case: Case, problem: Problem, world: World
) -> tuple[Advance, peers.Peer | None]:
    """Return (advance, peer or None) of a method for this rank's share of the members."""
    if name == ONE_RANK:
        if not world.root:
            return (lambda num_steps: None), None
        simulation = Simulation(problem, range(case.members), 0, device=case.timing.device)
        return simulation.initialise().advance, None
    my_members = range(case.members)[world.rank :: world.size]
    if not my_members:
        return (lambda num_steps: None), None
    if name == PYQG:
        if case.precision == "float32":
            raise ValueError(f"{PYQG} computes in float64 only")
        fields = pyqg.initial_fields(problem, my_members)
        layers = pyqg.Pyqg(fields.numpy(), problem.dt, torch.get_num_threads())
        return layers.advance, layers
    start = initial_fields(problem, my_members)
    if name in PUBLISHED:
        solver = published_solver(problem, PUBLISHED[name], case.timing.device, seed=world.rank)
        return solver.start(start).advance, None
    peer = peers.make(
        name,
        start.numpy(),
        forcing_field(problem).numpy(),
        viscosity=problem.viscosity,
        dt=problem.dt,
        precision=case.precision,
    )
    return peer.advance, peer


def initial_fields(problem: Problem, members: Sequence[int]) -> torch.Tensor:
    """Return vorticity (members, n, n) float64 at t = 0, the same for every method."""
    double = problem.replace(precision="float64")
    simulation = Simulation(double, members, 0, threads=1).initialise()
    return simulation.fields(["vorticity"])["vorticity"]


def forcing_field(problem: Problem) -> torch.Tensor:
    """Return the steady forcing (n, n) float64."""
    grid = problem.make_grid()
    return Transform(grid).to_physical(problem.physics.forcing.spectrum(grid)[None])[0]


def published_solver(
    problem: Problem, draws: int, device: str = "cpu", seed: int = 0
) -> PublishedSolver:
    """Create the published solver of our problem; fewer draws have the same total variance."""
    noise = problem.physics.noise.parameters()
    beta = 0.0
    if noise["kind"] == "q_wiener":
        beta = noise["amplitude"] * (noise["draws"] / draws) ** 0.5
    precision = torch.float64 if problem.precision == "float64" else torch.float32
    return PublishedSolver(
        forcing_field(problem).to(device, precision),
        viscosity=problem.viscosity,
        dt=problem.dt,
        noise=beta,
        draws=draws,
        correlation=noise.get("correlation", 0.005),
        seed=seed,
    )


def difference(peer: peers.Peer, problem: Problem, case: Case, steps: int = 10) -> float:
    """Compute the distance of a fresh peer from our solution, over the change in some steps.

    Two first-order schemes differ by their O(dt) errors only. The result is therefore of the order
    of dt times a rate, far below 1. For a peer that solves another problem it is 1 or more. pyqg
    has our scheme and is equal to round-off while modes beyond two thirds, which it retains, are
    empty. Of two layers the result is the larger one.
    """
    device = case.timing.device
    if case.two_layers:
        simulation = pyqg.started(
            problem, pyqg.initial_fields(problem, range(case.members)), device
        )
    else:
        simulation = Simulation(problem, range(case.members), 0, device=device).initialise()
    names = problem.physics.channel_names or ("vorticity",)

    def state() -> np.ndarray:
        fields = simulation.fields(names)
        return np.stack([fields[name].cpu().double().numpy() for name in names])

    start = state()
    simulation.advance(steps)
    peer.advance(steps)
    ours, theirs = state(), np.asarray(peer.field(), dtype=np.float64)
    theirs = theirs.swapaxes(0, 1) if case.two_layers else theirs[None]
    norm = np.linalg.norm
    return max(float(norm(b - a) / norm(a - first)) for a, b, first in zip(ours, theirs, start))
