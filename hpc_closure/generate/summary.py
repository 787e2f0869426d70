"""What can be said of an ensemble before anything is learned from it."""

import numpy as np
import torch

from hpc_closure.closure.targets import reduced_problem
from hpc_closure.data.reader import DataSet
from hpc_closure.experiment.schema import Experiment
from hpc_closure.spectral.modes.grid import from_row
from hpc_closure.spectral.simulation import Simulation

SAMPLED = 64  # snapshots
CERTAIN, SMALL = 3.0, 0.02  # a drift is more than so many standard errors, and than that share
NAMES = ("energy", "enstrophy")


def lines(experiment: Experiment, data: DataSet, stride: int) -> list[str]:
    """Of closure ``subgrid``: whether the flow is stationary while recorded, how much U is.

    ``stride`` is the number of the DNS's steps in one of the reduced solver's.
    """
    names = NAMES if data.dimensions == 2 else NAMES[:1]
    changes = [drift(data, name) for name in names if len(data.times) >= 4]
    return [*changes, share(experiment, data, stride)]


def drift(data: DataSet, name: str) -> str:
    """Change of a diagnostic from the first half of the record to the second, over members."""
    whole, half = data.whole, len(data.times) // 2
    series = np.array([data.read(member, slice(None), f"scalars/{name}") for member in whole])
    first, second = series[:, :half].mean(1), series[:, half:].mean(1)
    change = (second - first).mean() / series.mean()
    error = (second - first).std(ddof=1) / series.mean() / len(whole) ** 0.5 if whole[1:] else 0.0
    still = abs(change) <= max(CERTAIN * error, SMALL)
    verdict = "stationary" if still else "not stationary, record later (generate.record.start)"
    return (
        f"{name} {series.mean():.3g}, changes by {100 * change:+.2g} % (standard error "
        f"{100 * error:.2g} %) from the first half of the record to the second: {verdict}"
    )


def share(experiment: Experiment, data: DataSet, stride: int) -> str:
    """Root mean square of a subgrid closure over that of the reduced solver's own tendency."""
    generate = experiment.generate
    every = [(member, index) for member in data.whole for index in range(len(data.times))]
    count = min(SAMPLED, len(every))
    keys = [every[number * len(every) // count] for number in range(count)]
    state, closure = (
        torch.from_numpy(np.stack([data.read(*key, name) for key in keys])).double()
        for name in ("vorticity", "closure")
    )
    reduced = reduced_problem(experiment.problem, data.grid, "subgrid", stride)
    span = generate.interval * generate.dt
    solver = Simulation(reduced, range(count), experiment.seed)
    sides = experiment.physics.dimensions
    start = solver.transform.to_spectral(from_row(state, sides))
    solver.load_state(0, start).advance(reduced.steps_in(span))
    moved = (solver.state - start) / span
    cfl = float(solver.speed().max()) * reduced.dt * reduced.grid / reduced.length
    ratio = closure.square().mean() / solver.transform.to_physical(moved).square().mean()
    return (
        f"closure: {float(ratio.sqrt()):.2g} times the reduced solver's own tendency over "
        f"{generate.interval} step(s), root mean square; the solver takes {stride} of them in one "
        f"(CFL {cfl:.2g})"
    )
