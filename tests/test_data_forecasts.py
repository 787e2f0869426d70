"""States after an interval of the reduced solver, as a data set."""

import numpy as np
import pytest
import torch

from hpc_closure.data.forecasts import Forecaster, Forecasts
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

PLANE = Problem(grid=16, dt=0.01, viscosity=1e-2)
LINE = Problem(grid=16, dt=0.01, equation="burgers1d", viscosity=1e-2)
CLOUDS = Problem(grid=16, dt=0.01, equation="clouds", length=6.28, scheme="etdrk4", births="mean")
SPAN = 0.05


class Store:
    """States of two members at three times, with closures."""

    members, grid = range(2), 16

    def __init__(self, problem):
        simulation = Simulation(problem, range(2), 3).initialise()
        self.dimensions, self.channels = problem.dimensions, problem.physics.channel_names
        self.times, states = np.arange(3) * SPAN, []
        for _ in self.times:
            states.append(simulation.transform.to_physical(simulation.state).clone().numpy())
            simulation.advance(5)
        self.state = np.stack(states, 1).astype(np.float32)

    def read(self, member, index, field="state", grid=None):
        return self.state[member, index] if field == "state" else -self.state[member, index]


@pytest.mark.parametrize("problem", [PLANE, LINE, CLOUDS], ids=["plane", "line", "clouds"])
def test_states_are_those_after_the_interval(problem):
    store = Store(problem)
    found = Forecasts(store, Forecaster(problem, SPAN))
    for member in store.members:
        # every forecast of this deterministic solver is the next stored state
        after = found.read(member, slice(0, 2))
        assert after.dtype == np.float32
        assert np.allclose(after, store.state[member, 1:], atol=1e-5)
        assert np.array_equal(found.read(member, 1), after[1])
        assert not np.allclose(after, store.state[member, :2], atol=1e-4)
        assert np.array_equal(found.read(member, 1, "closure"), -store.state[member, 1])
    assert (found.channels, found.dimensions) == (store.channels, problem.dimensions)


def test_a_closure_of_the_forecast_keeps_the_variance_of_every_mode():
    """A solver makes an error in the interval, and the truth does not keep it.

    The closure regressed on the state before the interval leaves the error in its residual, and
    independent draws of the residual do not take it back. Regressed on the forecast it does.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 2, generator=generator, dtype=torch.float64)
    # the solver sees a mode v and its error e, which is part of its forecast but not of v
    v, error = noise.unbind(1)
    forecast = 0.9 * v + 0.6 * error
    truth = 0.9 * v + (1 - 0.81) ** 0.5 * torch.randn(4000, generator=generator).double()
    closure = truth - forecast
    variances = []
    for read in (v, forecast):
        slope = (closure @ read) / (read @ read)
        residual = closure - slope * read
        fresh = residual[torch.randperm(4000, generator=generator)]
        variances.append(float((forecast + slope * read + fresh).var()))
    assert variances[0] > 1.5
    assert variances[1] == pytest.approx(float(truth.var()), rel=0.05)
