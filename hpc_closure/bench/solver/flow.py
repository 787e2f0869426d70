"""Speed of three-dimensional flow, beside plain SciPy and exponax, in turns.

Both sides advance the same members by the same scheme, of four right-hand sides: beside SciPy rk4
with exact viscosity at constant power, beside exponax etdrk4 of decaying flow. The time is that of
whole steps, forcing and updates included, per point and right-hand side.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import scipy.fft

from hpc_closure.bench import measure
from hpc_closure.bench.measure import Timing
from hpc_closure.bench.physics.turbulence import STAGES
from hpc_closure.bench.physics.turbulence import Case as Turbulence
from hpc_closure.bench.solver import peers
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

OURS, SCIPY, EXPONAX = "ours", "scipy", "exponax"
AGAINST = (SCIPY, EXPONAX)
AXES = (-3, -2, -1)
COLUMNS = measure.columns(
    "grid:d members:d precision scheme method ns_per_point_rhs:.1f ms_per_member_step:.2f "
    "ratio:.2f"
)


@dataclass(frozen=True)
class Case:
    """Settings of a measurement.

    Attributes:
        grid, members, precision: settings of the problem.
        against: methods timed in turns with our solver.
        timing: settings of the timed blocks.
    """

    grid: int = 64
    members: int = 1
    precision: str = "float64"
    against: tuple[str, ...] = ()
    timing: Timing = Timing()

    def __post_init__(self):
        measure.check(self.members, self.against, AGAINST)


class Other(Protocol):
    """Another solver of the same members."""

    def advance(self, num_steps: int) -> None:
        """Take steps."""

    def state(self) -> np.ndarray:
        """Return the retained spectra ``(members, 3, 2K + 1, 2K + 1, K + 1)``."""


def problem_of(case: Case, name: str) -> Problem:
    """Return the flow in which our solver is timed beside another one."""
    settings = Turbulence(grid=case.grid, precision=case.precision)
    if name == EXPONAX:
        return settings.problem().replace(scheme="etdrk4", forcing={"kind": "none"})
    return settings.problem()


def make(name: str, problem: Problem, u_hat: np.ndarray) -> Other:
    """Create another solver at retained spectra.

    Raises:
        NotInstalled: its package is missing.
    """
    return Plain(problem, u_hat) if name == SCIPY else Exponax(problem, u_hat)


def run(case: Case) -> tuple[list[dict[str, Any]], list[str]]:
    """Time a case; returns records, ours before each other method, and remarks."""
    records: list[dict[str, Any]] = []
    remarks = []
    members = range(case.members)
    for name in case.against or (OURS,):
        problem = problem_of(case, name)
        simulation = Simulation(problem, members, 0, device=case.timing.device).initialise()
        contenders: dict[str, measure.Advance] = {OURS: simulation.advance}
        if name != OURS:
            try:
                other = make(name, problem, simulation.state.numpy(force=True))
            except peers.NotInstalled as reason:
                remarks.append(f"  {reason}")
                continue
            contenders[name] = other.advance
            remarks.append(
                f"  {name}: differs from ours by {difference(name, problem, members):.1e} of the "
                "change in four steps"
            )
        taken = measure.interleave(contenders, case.timing)
        records += [_record(case, problem, name, taken) for name in contenders]
    return records, remarks


def difference(name: str, problem: Problem, members: Sequence[int], steps: int = 4) -> float:
    """Return the distance of another solver from ours, over the change in some steps."""
    simulation = Simulation(problem, members, 0).initialise()
    first = simulation.state.numpy(force=True).copy()
    other = make(name, problem, first)
    other.advance(steps)
    ours = simulation.advance(steps).state.numpy(force=True)
    return float(np.linalg.norm(other.state() - ours) / np.linalg.norm(ours - first))


def _record(case: Case, problem: Problem, name: str, taken: dict) -> dict[str, Any]:
    seconds = statistics.median(taken[name]) / case.members
    return {
        "case": "flow",
        "grid": case.grid,
        "members": case.members,
        "precision": case.precision,
        "scheme": problem.scheme,
        "method": name,
        "ns_per_point_rhs": 1e9 * seconds / (STAGES * case.grid**3),
        "ms_per_member_step": 1e3 * seconds,
        "ratio": None if name == OURS else measure.ratio(taken[OURS], taken[name]),
        **case.timing.columns,
    }


def retained(problem: Problem) -> tuple[Any, ...]:
    """Return the places of the retained modes in the spectra of all points of a side."""
    n, modes = problem.grid, problem.make_grid().modes
    both = np.r_[0 : modes + 1, n - modes : n]
    return (..., *np.ix_(both, both, np.arange(modes + 1)))


def padded(problem: Problem, u_hat: np.ndarray) -> np.ndarray:
    """Return retained spectra among zeros for other modes, ``(members, 3, n, n, n // 2 + 1)``."""
    n = problem.grid
    out = np.zeros((*u_hat.shape[:2], n, n, n // 2 + 1), u_hat.dtype)
    out[retained(problem)] = u_hat
    return out


class Plain:
    """The rotational form ``P (u x curl u)`` in SciPy, member by member, six and three transforms.

    Args:
        problem: flow at constant power; its scheme is rk4.
        u_hat: initial retained spectra ``(members, 3, 2K + 1, 2K + 1, K + 1)``.
    """

    def __init__(self, problem: Problem, u_hat: np.ndarray):
        self.size, grid = problem.grid, problem.make_grid()
        n, self.places = problem.grid, retained(problem)
        self.real = np.dtype(problem.precision)
        self.complex = np.result_type(self.real, np.complex64)
        self.u = padded(problem, u_hat)
        integer = scipy.fft.fftfreq(n, 1 / n), scipy.fft.rfftfreq(n, 1 / n)
        axes = np.meshgrid(integer[0], integer[0], integer[1], indexing="ij", sparse=True)
        self.k = [(grid.unit * axis).astype(self.real) for axis in axes]
        k2 = sum(k**2 for k in self.k)
        self.inverse = np.where(k2 > 0, 1 / np.maximum(k2, grid.unit**2 / 2), 0)
        inside = [abs(axis) <= grid.modes for axis in axes]
        self.mask = inside[0] & inside[1] & inside[2]
        self.dt, self.power = problem.dt, getattr(problem.physics.forcing, "power")
        self.e = np.exp(-problem.viscosity * k2 * (self.dt / 2)).astype(self.real)
        reach = getattr(problem.physics.forcing, "reach") * grid.unit
        self.low = (k2 > 0) & (k2 <= reach**2 * (1 + 1e-9))
        weights = np.where(axes[2] == 0, 1.0, 2.0).astype(self.real)
        self.weights = np.broadcast_to(weights, k2.shape)[self.low]

    def state(self) -> np.ndarray:
        """Return the retained spectra, shaped like the initial ones."""
        return self.u[self.places]

    def rate(self, u: np.ndarray) -> np.ndarray:
        """Return the nonlinear term and the forcing of a member."""
        x, y, z = self.k
        curl = np.stack([y * u[2] - z * u[1], z * u[0] - x * u[2], x * u[1] - y * u[0]])
        n = (self.size,) * 3
        a, b, c = scipy.fft.irfftn(u, n, axes=(1, 2, 3), norm="forward")
        p, q, r = scipy.fft.irfftn(1j * curl, n, axes=(1, 2, 3), norm="forward")
        force = np.stack([b * r - c * q, c * p - a * r, a * q - b * p])
        f = scipy.fft.rfftn(force, axes=(1, 2, 3), norm="forward", overwrite_x=True) * self.mask
        along = (x * f[0] + y * f[1] + z * f[2]) * self.inverse
        f -= np.stack([x * along, y * along, z * along])
        low = u[:, self.low]
        energy = (self.weights * (low.real**2 + low.imag**2)).sum()
        f[:, self.low] += self.power / energy * low
        return f.astype(self.complex, copy=False)

    def advance(self, num_steps: int) -> None:
        """Take steps of rk4 with the exact viscosity."""
        dt, e = self.dt, self.e
        for _ in range(num_steps):
            for member, u in enumerate(self.u):
                half, first = e * u, self.rate(u)
                second = self.rate(half + (dt / 2) * (e * first))
                third = self.rate(half + (dt / 2) * second)
                fourth = self.rate(e * (half + dt * third))
                middle = e * (u + (dt / 6) * first) + (dt / 3) * (second + third)
                self.u[member] = e * middle + (dt / 6) * fourth


class Exponax:
    """Exponax's ``NavierStokesVelocity`` of order 4 on spectra, all members in one call.

    Args:
        problem: decaying flow; its scheme is etdrk4.
        u_hat: initial retained spectra ``(members, 3, 2K + 1, 2K + 1, K + 1)``.

    Raises:
        NotInstalled: exponax is missing.
    """

    def __init__(self, problem: Problem, u_hat: np.ndarray):
        self.places = retained(problem)
        sides = (problem.grid,) * 3
        fields = scipy.fft.irfftn(padded(problem, u_hat), sides, axes=AXES, norm="forward")
        self.solver = peers.exponax_flow(
            fields,
            length=problem.length,
            viscosity=problem.viscosity,
            dt=problem.dt,
            modes=problem.make_grid().modes,
            precision=problem.precision,
        )
        self.advance = self.solver.advance

    def state(self) -> np.ndarray:
        """Return the retained spectra, shaped like the initial ones."""
        spectra = scipy.fft.rfftn(self.solver.field(), axes=AXES, norm="forward")
        return spectra[self.places]
