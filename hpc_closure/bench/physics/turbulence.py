r"""Statistics of three-dimensional turbulence at constant power: what the literature knows of it.

Members advance one after another from the initial band; after ``spin_up`` statistics are averaged
over times and members. With :math:`u'^2 = 2E/3` and the dissipation :math:`\varepsilon`:

* ``re_lambda`` :math:`= u'\lambda/\nu`, :math:`\lambda^2 = 15\nu u'^2/\varepsilon`
* ``c_epsilon`` :math:`= \varepsilon L/u'^3`, :math:`L = \pi/(2u'^2)\int E(k)/k\,dk`
* ``skewness`` and ``flatness`` of :math:`\partial u_i/\partial x_i`, mean over the three
* ``kolmogorov``: largest :math:`E(k)k^{5/3}\varepsilon^{-2/3}` over the shells k >= 3, each shell
  over its number of modes times :math:`4\pi k^2`
* ``balance``: :math:`(P - dE/dt)/\varepsilon` over the run, 1 without errors of the scheme
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from hpc_closure.bench import measure
from hpc_closure.spectral.diagnostics import FlowDiagnostics
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

COLUMNS = measure.columns(
    "grid:d dt:.4f re_lambda:.1f c_epsilon:.3f skewness:.3f flatness:.2f kolmogorov:.2f "
    "kmax_eta:.3f turnover:.2f balance:.5f ns_per_point_rhs:.1f"
)
STAGES = 4  # right-hand sides of a step of rk4


@dataclass(frozen=True)
class Case:
    """Settings of a run in a box of side 2 pi.

    Attributes:
        grid: points per side.
        viscosity, power: of the flow; power in the modes |k| <= 1.5.
        dt: step of rk4.
        spin_up, span: time before and of the statistics.
        every: time between two states of the statistics.
        members: number of trajectories.
        precision: of the computation.
    """

    grid: int = 64
    viscosity: float = 0.017
    power: float = 1.0
    dt: float = 1 / 60
    spin_up: float = 10.0
    span: float = 20.0
    every: float = 0.5
    members: int = 1
    precision: str = "float64"

    def problem(self) -> Problem:
        """Return the problem."""
        return Problem(
            equation="navier_stokes_3d",
            grid=self.grid,
            length=2 * np.pi,
            viscosity=self.viscosity,
            dt=self.dt,
            scheme="rk4",
            forcing={"kind": "power", "power": self.power, "reach": 1.5},
            initial={"kind": "band", "wavenumber": 2.0, "width": 1.0, "energy": 1.5},
            precision=self.precision,
        )


def run(case: Case, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Run a case and return its record.

    Args:
        case: settings.
        report: called with one line per member.

    Raises:
        ValueError: a time is not a whole number of steps.
        RuntimeError: a member diverged.
    """
    problem = case.problem()
    every, spin_up = problem.steps_in(case.every), problem.steps_in(case.spin_up)
    samples: list[dict[str, Any]] = []
    balance, steps, seconds = [], 0, 0.0
    for member in range(case.members):
        simulation = Simulation(problem, [member], 0, threads=1).initialise()
        diagnostics = FlowDiagnostics(simulation)
        simulation.advance(1).initialise()  # compiles
        clock = time.process_time()
        simulation.advance(spin_up)
        seconds += time.process_time() - clock
        steps += spin_up
        entries: list[dict[str, Any]] = []
        for number in range(round(case.span / case.every) + 1):
            if number:
                clock = time.process_time()
                simulation.advance(every)
                seconds += time.process_time() - clock
                steps += every
            entries.append(sample(diagnostics))
            if not np.isfinite(entries[-1]["energy"]):
                raise RuntimeError(f"member {member} is lost at t = {simulation.time:g}: lower dt")
        samples += entries
        energy = [entry["energy"] for entry in entries]
        dissipated = np.trapezoid([entry["dissipation"] for entry in entries], dx=case.every)
        balance.append((case.power * case.span - (energy[-1] - energy[0])) / dissipated)
        report(f"member {member}: energy {energy[-1]:.3f} at t = {simulation.time:g}")
    record = statistics(case, samples)
    nanoseconds = 1e9 * seconds / (steps * STAGES * case.grid**3)
    return record | {"balance": float(np.mean(balance)), "ns_per_point_rhs": nanoseconds}


def sample(diagnostics: FlowDiagnostics) -> dict[str, Any]:
    """Return energy, dissipation, spectrum and derivative moments of the only member."""
    simulation = diagnostics.simulation
    entries = diagnostics.measure()
    gradients = torch.stack(
        [1j * k * part for k, part in zip(simulation.grid.k, simulation.state[0])]
    )
    fields = simulation.transform.to_physical(gradients.to(simulation.state)).double()
    moments = [fields.pow(power).mean((1, 2, 3)).numpy() for power in (2, 3, 4)]
    return {
        "energy": float(entries["energy"][0]),
        "dissipation": float(entries["energy_dissipation"][0]),
        "spectrum": diagnostics.spectrum("energy")[0],
        "skewness": float((moments[1] / moments[0] ** 1.5).mean()),
        "flatness": float((moments[2] / moments[0] ** 2).mean()),
    }


def statistics(case: Case, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the record of a list of :func:`sample`."""
    mean = {key: np.mean([entry[key] for entry in samples], 0) for key in samples[0]}
    energy, dissipation, spectrum = mean["energy"], mean["dissipation"], mean["spectrum"]
    speed = np.sqrt(2 * energy / 3)
    shells = np.arange(1, len(spectrum))
    integral = np.pi / (2 * speed**2) * (spectrum[1:] / shells).sum()
    grid = case.problem().make_grid()
    count = grid.shell_sum(torch.ones(grid.shape, dtype=torch.float64)).numpy()[1:]
    compensated = spectrum[1:] * (4 * np.pi * shells**2 / count) * shells ** (5 / 3)
    compensated, modes = compensated * dissipation ** (-2 / 3), grid.modes
    return {
        **asdict(case),
        "energy": float(energy),
        "dissipation": float(dissipation),
        "re_lambda": float(np.sqrt(15 / (case.viscosity * dissipation)) * speed**2),
        "c_epsilon": float(dissipation * integral / speed**3),
        "skewness": float(mean["skewness"]),
        "flatness": float(mean["flatness"]),
        "kolmogorov": float(compensated[2:modes].max()),
        "kmax_eta": float(modes * (case.viscosity**3 / dissipation) ** 0.25),
        "turnover": float(integral / speed),
        "compensated_spectrum": compensated[:modes].round(4).tolist(),
        "samples": len(samples),
    }
