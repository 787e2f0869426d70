"""The coupled run: the true closure gives the truth, the exact law gives the spread."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hpc_closure.closure.exact import ExactLaw
from hpc_closure.data.targets import Target, reduced_problem, removed_terms_hat
from hpc_closure.experiment import SensorLayout
from hpc_closure.rollout.coupling import CoupledRun
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulate import Simulation

NOISE = {"kind": "q_wiener", "amplitude": 5e-5, "draws": 10, "correlation": 0.005}
PROBLEM = Problem(grid=32, dt=1e-3, noise=NOISE, forcing={"kind": "published"})


class Exact:
    """The exact law as a closure object."""

    def __init__(self, problem, kind):
        self.problem, self.kind = problem, kind

    def sample(self, state, *, members, seed, call, interval=1, sensors=None):
        law = ExactLaw(self.problem, self.kind, interval)
        mean = law.mean(state)
        rows = [
            law.sample(state[row : row + 1], members=[member], seed=seed, call=call)[0, 0]
            - mean[row]
            for row, member in enumerate(members)
        ]
        return mean + torch.stack(rows)


def start_state(steps=200):
    simulation = Simulation(PROBLEM, [7], 3).initialise()
    simulation.advance(steps)
    return simulation.fields(["vorticity"])["vorticity"].numpy()


@pytest.mark.parametrize("kind", ["diffusion", "convection"])
def test_the_true_closure_turns_the_reduced_solver_into_the_full_one(kind):
    full = Simulation(PROBLEM, [0, 1], 5).initialise()
    reduced = Simulation(reduced_problem(PROBLEM, 32, kind), [0, 1], 5)
    reduced.load_state(0, full.state.clone())
    for _ in range(20):
        closure = removed_terms_hat(full, kind)
        full.advance(1)
        reduced.advance(1, tendency_hat=closure)
    assert torch.allclose(full.state, reduced.state, rtol=0, atol=1e-14)


def test_the_subgrid_target_is_the_defect_of_the_reduced_map():
    fine = replace(PROBLEM, noise={"kind": "none"}, viscosity=1e-4)
    coarse = reduced_problem(fine, 16, "subgrid")
    simulation = Simulation(fine, [0], 1).initialise()
    simulation.advance(50)
    from hpc_closure.spectral.grid import resize, retained_modes

    modes = retained_modes(16)
    before = resize(simulation.state, modes).clone()
    closure = Target("subgrid", 5, coarse).compute(simulation)
    reduced = Simulation(coarse, [0], 1)
    reduced.load_state(0, before)
    reduced.advance(5)
    after = reduced.state + closure * (5 * fine.dt)
    assert torch.allclose(after, resize(simulation.state, modes), rtol=0, atol=1e-15)
    assert closure.abs().max() > 1e-6


def test_a_target_of_several_steps_is_their_mean():
    simulation = Simulation(PROBLEM, [0], 1).initialise()
    other = Simulation(PROBLEM, [0], 1).initialise()
    mean = Target("diffusion", 4).compute(simulation)
    parts = []
    for _ in range(4):
        parts.append(removed_terms_hat(other, "diffusion"))
        other.advance(1)
    assert torch.allclose(mean, torch.stack(parts).mean(0), rtol=0, atol=1e-16)
    assert simulation.step_index == 4


@pytest.mark.parametrize("interval", [1, 5, 20])
def test_spread_does_not_depend_on_the_interval(interval):
    """The exact law, held for m steps with 1/m of the variance, spreads like fresh noise does."""
    rows = [(7, member) for member in range(24)]
    run = CoupledRun(
        PROBLEM, "diffusion", 32, Exact(PROBLEM, "diffusion"), rows, [7], seed=3,
        interval=interval,
    )  # fmt: skip
    run.start(start_state(), 200)
    run.advance(100 // interval)
    fields = run.fields()
    spread = {name: fields[name].var(0).mean().sqrt() for name in ("model", "oracle")}
    assert float(spread["model"] / spread["oracle"]) == pytest.approx(1.0, abs=0.2)
    assert run.step_index == 300


def test_sensors_see_the_mean_closure_of_the_coming_interval():
    seen = {}

    class Spy(Exact):
        def sample(self, state, *, sensors, **options):
            seen["sensors"] = sensors
            return super().sample(state, **options)

    layout = SensorLayout(layout="regular", number=8)
    run = CoupledRun(
        PROBLEM, "diffusion", 32, Spy(PROBLEM, "diffusion"), [(7, 0)], [7], seed=3, interval=5,
        sensors=layout,
    )  # fmt: skip
    run.start(start_state(), 200)
    run.advance(1)
    truth = Simulation(PROBLEM, [7], 3).initialise()
    truth.advance(200)
    closure = truth.transform.to_physical(Target("diffusion", 5).compute(truth))
    expected = closure[0, ::4, ::4].flatten()
    assert torch.allclose(seen["sensors"].values[0], expected, rtol=0, atol=1e-12)


def test_a_restart_goes_on_bit_for_bit():
    def make():
        rows = [(7, 0), (7, 1)]
        return CoupledRun(
            PROBLEM, "diffusion", 32, Exact(PROBLEM, "diffusion"), rows, [7], seed=3, interval=5
        )

    whole, first, second = make(), make(), make()
    whole.start(start_state(), 200)
    first.start(start_state(), 200)
    whole.advance(8)
    first.advance(4)
    second.load_state(first.save_state())
    second.advance(4)
    for name, fields in whole.fields().items():
        assert np.array_equal(fields.numpy(), second.fields()[name].numpy()), name


def test_members_of_different_starts_draw_different_noise():
    states = np.concatenate([start_state(), start_state()])
    rows = [(7, 0), (8, 0), (7, 1)]
    run = CoupledRun(
        PROBLEM, "diffusion", 32, Exact(PROBLEM, "diffusion"), rows, [7, 8], seed=3, interval=5
    )
    run.start(states, 200)
    run.advance(2)
    model = run.fields()["model"]
    assert not torch.equal(model[0], model[1]) and not torch.equal(model[0], model[2])
