"""A data set whose states are forecasts: states after one interval of the reduced solver.

A subgrid closure is added to the state at which the reduced solver arrives after an interval. A
closure that reads this state leaves a residual that is uncorrelated with it. Independent draws of
the residual then keep the variance of every mode. If the closure reads the state from which the
solver starts, what the solver does wrong in the interval is part of the residual, and draws do not
take it back: variance accumulates at small scales.
"""

from collections.abc import Sequence

import numpy as np
import torch

from hpc_closure.data.layout import STATE
from hpc_closure.data.reader import DataSet
from hpc_closure.spectral.ensemble import Ensemble
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import simulation_of


class Forecaster:
    """Advances states by one closure interval of the reduced solver.

    Args:
        problem: problem of the reduced solver.
        span: time of a closure interval.
    """

    def __init__(self, problem: Problem, span: float):
        self.problem, self.steps = problem, problem.steps_in(span)
        self._solver: Ensemble | None = None

    def after(self, states: np.ndarray) -> np.ndarray:
        """Return the states after the interval, float64, both (B, n, n) or (B, C, n, n)."""
        if self._solver is None or len(self._solver.members) != len(states):
            self._solver = simulation_of(self.problem, range(len(states)), 0)
        solver, fields = self._solver, torch.from_numpy(np.ascontiguousarray(states)).double()
        spectra = solver.transform.to_spectral(fields)
        solver.load_state(0, spectra).advance(self.steps)
        return solver.transform.to_physical(solver.state).numpy()


class Forecasts:
    """Reads a data set as :class:`~hpc_closure.data.reader.DataSet`, with forecasts as states.

    Args:
        store: the data set.
        forecaster: the reduced solver, on the grid of the fields that are read.
    """

    def __init__(self, store: DataSet, forecaster: Forecaster):
        self.store, self.forecaster = store, forecaster
        self.members: Sequence[int] = store.members
        self.times, self.grid = store.times, store.grid
        self.dimensions, self.channels = store.dimensions, store.channels

    def read(
        self, member: int, index: int | slice, field: str = STATE, grid: int | None = None
    ) -> np.ndarray:
        """Return a field; arguments as of :meth:`~hpc_closure.data.reader.DataSet.read`."""
        values = self.store.read(member, index, field, grid)
        if field != STATE:
            return values
        rows = values if isinstance(index, slice) else values[None]
        after = self.forecaster.after(rows).astype(values.dtype)
        return after if isinstance(index, slice) else after[0]
