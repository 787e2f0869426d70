"""Log lines about a new ensemble: stationarity of the flow, size of the closure."""

import numpy as np
import torch

from hpc_closure.closure.targets import reduced_problem
from hpc_closure.data.reader import DataSet
from hpc_closure.experiment.schema import Experiment
from hpc_closure.spectral.diagnostics import series_names
from hpc_closure.spectral.ensemble import Ensemble
from hpc_closure.spectral.simulation import Simulation, simulation_of

SAMPLED = 64  # snapshots read for the size of the closure
CERTAIN, SMALL = 3.0, 0.02  # a drift exceeds both: standard errors, and relative change
NAMES = ("energy", "enstrophy")


def lines(experiment: Experiment, data: DataSet, stride: int) -> list[str]:
    """Describe data of closure ``subgrid``: is the flow stationary, and how large is U?

    ``stride`` is the number of DNS steps per step of the reduced solver.
    """
    measured = series_names(experiment.problem)
    names = [name for name in NAMES if name in measured]
    names = names or [f"{channel}_variance" for channel in data.channels]
    changes = [drift(data, name) for name in names if len(data.times) >= 4]
    return [*changes, share(experiment, data, stride)]


def drift(data: DataSet, name: str) -> str:
    """Describe the change of a diagnostic between the halves of the record, over members."""
    whole, half = data.whole, len(data.times) // 2
    series = np.array([data.read(member, slice(None), f"scalars/{name}") for member in whole])
    first, second = series[:, :half].mean(1), series[:, half:].mean(1)
    change = (second - first).mean() / series.mean()
    error = (second - first).std(ddof=1) / series.mean() / len(whole) ** 0.5 if whole[1:] else 0.0
    stationary = abs(change) <= max(CERTAIN * error, SMALL)
    verdict = (
        "stationary" if stationary else "not stationary, record later (generate.record.start)"
    )
    return (
        f"{name} {series.mean():.3g}, changes by {100 * change:+.2g} % (standard error "
        f"{100 * error:.2g} %) from the first half of the record to the second: {verdict}"
    )


def share(experiment: Experiment, data: DataSet, stride: int) -> str:
    """Describe the rms of a subgrid closure over the rms of the reduced solver's tendency."""
    generate = experiment.generate
    snapshots = [(member, index) for member in data.whole for index in range(len(data.times))]
    count = min(SAMPLED, len(snapshots))
    keys = [snapshots[number * len(snapshots) // count] for number in range(count)]
    state, closure = (
        torch.from_numpy(np.stack([data.read(*key, name) for key in keys])).double()
        for name in ("state", "closure")
    )
    reduced = reduced_problem(experiment.problem, data.grid, "subgrid", stride)
    span = generate.interval * generate.dt
    solver = simulation_of(reduced, range(count), experiment.seed)
    start = solver.transform.to_spectral(state)
    solver.load_state(0, start).advance(reduced.steps_in(span))
    tendency = (solver.state - start) / span
    ratio = _power(closure, data) / _power(solver.transform.to_physical(tendency), data)
    of = f" of {', '.join(data.channels)}" if data.channels else ""
    sizes = [f"{float(size):.2g}" for size in ratio.sqrt().flatten()]
    return (
        f"closure: {', '.join(sizes)} times the reduced solver's own tendency over "
        f"{generate.interval} step(s), root mean square{of}; {_step_of(solver, stride)}"
    )


def _step_of(solver: Ensemble, stride: int) -> str:
    """Describe the step of the reduced solver, which is at the end of an interval."""
    problem = solver.problem
    if not isinstance(solver, Simulation):
        return f"your solver takes steps of {problem.dt:g}"
    cfl = float(solver.speed().max()) * problem.make_grid().courant(problem.dt)
    return f"the solver takes {stride} of them in one (CFL {cfl:.2g})"


def _power(fields: torch.Tensor, data: DataSet) -> torch.Tensor:
    """Compute the mean square of fields (B, n, n), or of each channel of (B, C, n, n), (C,)."""
    sides = range(-data.dimensions, 0)
    return fields.square().mean((0, *sides)) if data.channels else fields.square().mean()
