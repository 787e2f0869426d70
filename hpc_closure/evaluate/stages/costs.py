"""Measure the cost of a member for every method of the coupled table, on one thread.

The methods run closure intervals from the starts of the rollout, in turn, with equally many
members. The cost is that of the fastest interval, in microseconds per member and time unit. The
cost of the true ensemble is that of the DNS.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from hpc_closure.data.held_out import HeldOut
from hpc_closure.data.opening import open_data
from hpc_closure.evaluate.context import Inputs
from hpc_closure.experiment.schema import Experiment, Rung
from hpc_closure.rollout.block import coupled_run, start
from hpc_closure.rollout.coupling import CoupledRun
from hpc_closure.spectral.ensemble import Ensemble
from hpc_closure.spectral.simulation import Simulation, simulation_of

ROWS = 80  # largest number of members that are timed together
DNS_ROWS = 4  # number of DNS members
ROUNDS = 6  # timed rounds, of which the first is a warm-up


class Clock(NamedTuple):
    """A method that is timed interval by interval.

    Attributes:
        interval: runs one closure interval and returns its seconds.
        members: number of members that run together.
        span: length of the interval in time units.
    """

    interval: Callable[[], float]
    members: int
    span: float


def measure(inputs: Inputs) -> dict[str, float]:
    """Measure microseconds per member and time unit, by method of the coupled table."""
    with one_thread():
        return fastest(_clocks(inputs), inputs.stop.check)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread within the context."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fastest(
    clocks: Mapping[str, Clock], check: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Time all clocks in turn; return the least microseconds per member and time unit, by name.

    Args:
        clocks: the methods, by name.
        check: called between two intervals, e.g. to check the stop flag.
    """
    best: dict[str, float] = {}
    for turn in range(ROUNDS):
        for name, (interval, members, span) in clocks.items():
            check()
            spent = interval() / members / span
            if turn:
                best[name] = min(spent, best.get(name, float("inf")))
    return {name: 1e6 * seconds for name, seconds in best.items()}


def _clocks(inputs: Inputs) -> dict[str, Clock]:
    """Return a clock for each row of the coupled table, by name of the method."""
    experiment = inputs.experiment
    number = min(ROWS, experiment.rollout.trajectories)
    model_run = _run(inputs, inputs.closure, number)
    clocks = {inputs.model: _model(model_run, number)}
    for compared in inputs.chosen:
        run = _run(inputs, inputs.compared[compared.name], number, compared.experiment)
        clocks[compared.name] = _model(run, number)
    span, model = model_run.coupling.span, model_run.simulations["model"]
    solver = simulation_of(model.problem, range(len(model.members)), 0, device=inputs.device)
    clocks["none"] = bare(solver.load_state(0, model.state), span)
    if experiment.rollout.rungs:
        beside = _run(inputs, inputs.closure, number, rungs=experiment.rollout.rungs)
        clocks |= {name: bare(beside.simulations[name], span) for name in beside.rungs}
    if inputs.replicas is not None or model_run.exact:
        problem = experiment.problem
        if model_run.exact:
            problem = problem.replace(grid=experiment.train_grid)
        rows = range(number if model_run.exact else DNS_ROWS)
        full = Simulation(problem, rows, experiment.seed, device=inputs.device)
        clocks["oracle"] = bare(full.initialise(), span)
    return clocks


def _run(
    inputs: Inputs,
    closure,
    number: int,
    other: Experiment | None = None,
    rungs: Sequence[Rung] = (),
) -> CoupledRun:
    """Start a coupled run without baselines, whose time would otherwise be included.

    Args:
        inputs: inputs of the evaluation.
        closure: closure in the solver.
        number: number of trajectories.
        other: experiment of a compared run, whose grid, step, interval and sensors are taken;
            None for the experiment that is evaluated.
        rungs: bare solvers to start beside it.
    """
    experiment, data = inputs.experiment, inputs.data
    other = other or experiment
    if other.train_grid != experiment.train_grid:
        held = HeldOut.of(other)
        experiment, data = other, open_data(held.experiment, held.run)
    sensors = other.rollout.sensors
    if closure.config["conditions"]["sensors"] == "none":
        sensors = None
    changes = {
        "baselines": (),
        "rungs": tuple(rungs),
        "sensors": sensors,
        "interval": other.rollout.interval,
    }
    rollout = experiment.rollout.model_copy(update=changes)
    experiment = experiment.model_copy(update={"rollout": rollout, "reduced": other.reduced})
    run = coupled_run(experiment, closure, data, range(number), inputs.device)
    start(run, data, experiment)
    return run


def _model(run: CoupledRun, members: int) -> Clock:
    """Return a clock of solver and closure."""

    def interval() -> float:
        before = run.seconds["solver"] + run.seconds["closure"]
        run.advance(1)
        return run.seconds["solver"] + run.seconds["closure"] - before

    return Clock(interval, members, run.coupling.span)


def bare(simulation: Ensemble, span: float) -> Clock:
    """Return a clock of a bare solver for intervals of length ``span``."""
    steps = simulation.problem.steps_in(span)

    def interval() -> float:
        began = time.perf_counter()
        simulation.advance(steps)
        if simulation.device.type == "cuda":
            torch.cuda.synchronize(simulation.device)
        return time.perf_counter() - began

    return Clock(interval, len(simulation.members), span)
