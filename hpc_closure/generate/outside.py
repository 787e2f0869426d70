"""Data of others: their check with the reduced solver of the experiment."""

import numpy as np

from hpc_closure.closure.targets import reduced_problem
from hpc_closure.data.forecasts import Forecaster
from hpc_closure.data.outside import checking, solver_faults
from hpc_closure.experiment.schema import Experiment
from hpc_closure.work import log
from hpc_closure.work.session import Session


def check(experiment: Experiment) -> checking.Checked:
    """Check the files of ``data`` on a sample of their values, with the reduced solver."""
    return checking.check(experiment, advance_of(experiment))


def require(experiment: Experiment) -> checking.Checked:
    """Check the data and return what was found.

    Raises:
        ValueError: there is an error that ``data.accept`` does not name; one line.
    """
    checked = check(experiment)
    if refused := checked.refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise ValueError(
            f"{refused[0].line}{more}; `hpc-closure data check EXPERIMENT` lists all, "
            f"data.accept=[{', '.join(dict.fromkeys(one.code for one in refused))}] accepts"
        )
    return checked


def require_in(session: Session, log_findings: bool = False) -> None:
    """Check the data on the first process of a verb and log the faults.

    Args:
        session: the verb's.
        log_findings: log also what was found.

    Raises:
        ValueError: as :func:`require`, on each process.
    """
    error: BaseException | None = None
    if session.world.root:
        try:
            checked = require(session.experiment)
            for what, text in checked.screen if log_findings else ():
                log.get().info(f"{what}: {text}")
            for line in checked.fault_lines():
                log.get().warning(line)
        except (ValueError, OSError, RuntimeError, ImportError) as failure:
            error = failure
    error = session.world.agree_on_error(error)
    if error is not None:
        raise error


def advance_of(experiment: Experiment) -> solver_faults.Advance | None:
    """Return the reduced solver over a closure interval; None if the experiment has none."""
    if experiment.physics.equation == "external" and not experiment.reduced.python:
        return None
    problem = reduced_problem(experiment.problem, experiment.data_grid, "subgrid")
    span = experiment.generate.closure_interval
    several = bool(experiment.physics.channel_names)

    def advance(states: np.ndarray, factor: float) -> np.ndarray:
        scaled = problem if factor == 1 else problem.replace(length=factor * problem.length)
        fields = states if several else states[:, 0]
        after = Forecaster(scaled, span).after(fields)
        return after if several else after[:, None]

    return advance
