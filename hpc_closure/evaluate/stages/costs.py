"""What a member costs: every method of the coupled table, timed in one run on one thread.

Each runs some closure intervals from the starts of the rollout, turn by turn, with equally many
members; its cost is that of its fastest interval, in microseconds per member and time unit. The
true ensemble's is that of the DNS.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from hpc_closure.data.held_out import HeldOut
from hpc_closure.data.reader import DataSet
from hpc_closure.evaluate.context import Inputs
from hpc_closure.experiment.schema import Experiment, Rung
from hpc_closure.rollout.block import coupled_run, start
from hpc_closure.rollout.coupling import CoupledRun
from hpc_closure.spectral.simulation import Simulation

ROWS = 80  # members that are timed together, at most
DNS_ROWS = 4  # of the full system
ROUNDS = 6  # of which the first one warms up


Clock = tuple[Callable[[], float], int]  # seconds of one interval, and for how many members


def measure(inputs: Inputs) -> dict[str, float]:
    """Microseconds per member and time unit, by method of the coupled table."""
    with one_thread():
        span, clocks = _clocks(inputs)
        return fastest(clocks, span, inputs.stop.check)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch has one thread inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fastest(
    clocks: Mapping[str, Clock], span: float, check: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Microseconds per member and time unit, by name; turn by turn, the least of some turns.

    Args:
        clocks: what runs one interval and returns its seconds, and its number of members.
        span: time of an interval.
        check: called between two of them.
    """
    best: dict[str, float] = {}
    for turn in range(ROUNDS):
        for name, (clock, rows) in clocks.items():
            check()
            spent = clock() / rows / span
            if turn:
                best[name] = min(spent, best.get(name, float("inf")))
    return {name: 1e6 * seconds for name, seconds in best.items()}


def _clocks(inputs: Inputs) -> tuple[float, dict[str, Clock]]:
    """The time of a closure interval, and a clock for every method."""
    experiment = inputs.experiment
    number = min(ROWS, experiment.rollout.trajectories)
    own = _run(inputs, inputs.closure, number)
    clocks: dict[str, Clock] = {inputs.model: (_model(own), number)}
    for one in inputs.chosen:
        run = _run(inputs, inputs.compared[one.name], number, one.experiment)
        clocks[one.name] = (_model(run), number)
    span, model = own.coupling.span, own.simulations["model"]
    solver = Simulation(model.problem, range(len(model.members)), 0, device=inputs.device)
    clocks["none"] = bare(solver.load_state(0, model.state), span)
    if experiment.rollout.rungs:
        beside = _run(inputs, inputs.closure, number, rungs=experiment.rollout.rungs)
        clocks |= {name: bare(beside.simulations[name], span) for name in beside.rungs}
    if inputs.replicas is not None or own.exact:
        problem = experiment.problem
        if own.exact:
            problem = problem.replace(grid=experiment.train_grid)
        rows = range(number if own.exact else DNS_ROWS)
        full = Simulation(problem, rows, experiment.seed, device=inputs.device)
        clocks["oracle"] = bare(full.initialise(), span)
    return span, clocks


def _run(
    inputs: Inputs,
    closure,
    number: int,
    other: Experiment | None = None,
    rungs: Sequence[Rung] = (),
) -> CoupledRun:
    """A coupled run from the starts, without references, which would be run in each of its turns.

    Args:
        inputs: what is scored.
        closure: of the run.
        number: of trajectories.
        other: the experiment of a compared run.
        rungs: bare solvers that are begun beside it.
    """
    experiment, data = inputs.experiment, inputs.data
    if other is not None and other.train_grid != experiment.train_grid:
        experiment, data = other, DataSet(HeldOut.of(other).run.data)
    rollout = experiment.rollout.model_copy(update={"references": (), "rungs": tuple(rungs)})
    experiment = experiment.model_copy(update={"rollout": rollout})
    run = coupled_run(experiment, closure, data, range(number), inputs.device)
    start(run, data, experiment)
    return run


def _model(run: CoupledRun) -> Callable[[], float]:
    """Seconds that an interval of the reduced solver with its closure takes."""

    def interval() -> float:
        before = run.seconds["solver"] + run.seconds["closure"]
        run.advance(1)
        return run.seconds["solver"] + run.seconds["closure"] - before

    return interval


def bare(simulation: Simulation, span: float) -> Clock:
    """A clock of a bare solver."""
    steps = simulation.problem.steps_in(span)

    def interval() -> float:
        began = time.perf_counter()
        simulation.advance(steps)
        if simulation.device.type == "cuda":
            torch.cuda.synchronize(simulation.device)
        return time.perf_counter() - began

    return interval, len(simulation.members)
