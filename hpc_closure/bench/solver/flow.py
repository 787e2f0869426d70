"""Speed of three-dimensional flow, beside the rotational form in plain SciPy, in turns.

All advance the same members at constant power by the same scheme: rk4 with exact viscosity. The
time is that of whole steps, forcing and updates included, per point and right-hand side.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft

from hpc_closure.bench import measure
from hpc_closure.bench.measure import Timing
from hpc_closure.bench.physics.turbulence import STAGES
from hpc_closure.bench.physics.turbulence import Case as Turbulence
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

OURS, SCIPY = "ours", "scipy"
AGAINST = (SCIPY,)
COLUMNS = measure.columns(
    "grid:d members:d precision method ns_per_point_rhs:.1f ms_per_member_step:.2f ratio:.2f"
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


def run(case: Case) -> tuple[list[dict[str, Any]], list[str]]:
    """Time a case; returns records, ours first, and remarks."""
    settings = Turbulence(grid=case.grid, precision=case.precision)
    problem, members = settings.problem(), range(case.members)
    simulation = Simulation(problem, members, 0, device=case.timing.device).initialise()
    contenders: dict[str, measure.Advance] = {OURS: simulation.advance}
    remarks = []
    for name in case.against:
        contenders[name] = Plain(problem, simulation.state.numpy(force=True)).advance
        remarks.append(
            f"  {name}: differs from ours by {difference(problem, members):.1e} of the change in "
            "four steps"
        )
    taken = measure.interleave(contenders, case.timing)
    return [_record(case, name, taken) for name in contenders], remarks


def difference(problem: Problem, members: Sequence[int], steps: int = 4) -> float:
    """Return the distance of the plain solver from ours, over the change in some steps."""
    simulation = Simulation(problem, members, 0).initialise()
    first = simulation.state.numpy(force=True).copy()
    plain = Plain(problem, first)
    plain.advance(steps)
    ours = simulation.advance(steps).state.numpy(force=True)
    return float(np.linalg.norm(plain.state() - ours) / np.linalg.norm(ours - first))


def _record(case: Case, name: str, taken: dict[str, list[float]]) -> dict[str, Any]:
    seconds = statistics.median(taken[name]) / case.members
    return {
        "case": "flow",
        "grid": case.grid,
        "members": case.members,
        "precision": case.precision,
        "method": name,
        "ns_per_point_rhs": 1e9 * seconds / (STAGES * case.grid**3),
        "ms_per_member_step": 1e3 * seconds,
        "ratio": None if name == OURS else measure.ratio(taken[OURS], taken[name]),
        **case.timing.columns,
    }


class Plain:
    """The rotational form ``P (u x curl u)`` in SciPy, member by member, six and three transforms.

    Args:
        problem: flow at constant power; its scheme is rk4.
        u_hat: initial retained spectra ``(members, 3, 2K + 1, 2K + 1, K + 1)``.
    """

    def __init__(self, problem: Problem, u_hat: np.ndarray):
        self.size, grid = problem.grid, problem.make_grid()
        self.modes, n = grid.modes, problem.grid
        self.kept = np.r_[0 : self.modes + 1, n - self.modes : n]
        self.real = np.dtype(problem.precision)
        self.complex = np.result_type(self.real, np.complex64)
        self.u = np.stack([self._padded(member) for member in u_hat])
        integer = scipy.fft.fftfreq(n, 1 / n), scipy.fft.rfftfreq(n, 1 / n)
        axes = np.meshgrid(integer[0], integer[0], integer[1], indexing="ij", sparse=True)
        self.k = [(grid.unit * axis).astype(self.real) for axis in axes]
        k2 = sum(k**2 for k in self.k)
        self.inverse = np.where(k2 > 0, 1 / np.maximum(k2, grid.unit**2 / 2), 0)
        inside = [abs(axis) <= self.modes for axis in axes]
        self.mask = inside[0] & inside[1] & inside[2]
        self.dt, self.power = problem.dt, getattr(problem.physics.forcing, "power")
        self.e = np.exp(-problem.viscosity * k2 * (self.dt / 2)).astype(self.real)
        reach = getattr(problem.physics.forcing, "reach") * grid.unit
        self.low = (k2 > 0) & (k2 <= reach**2 * (1 + 1e-9))
        weights = np.where(axes[2] == 0, 1.0, 2.0).astype(self.real)
        self.weights = np.broadcast_to(weights, k2.shape)[self.low]

    def _padded(self, u_hat: np.ndarray) -> np.ndarray:
        n = self.size
        out = np.zeros((3, n, n, n // 2 + 1), self.complex)
        out[:, self.kept[:, None], self.kept, : self.modes + 1] = u_hat
        return out

    def state(self) -> np.ndarray:
        """Return the retained spectra, shaped like the initial ones."""
        return self.u[:, :, self.kept[:, None], self.kept, : self.modes + 1]

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
