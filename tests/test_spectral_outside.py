"""A user's solver in place of the built-in one: targets, gradients, states that hold more."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hpc_closure.closure.targets import Target, reduced_problem, users_solver
from hpc_closure.spectral.differentiable import differentiable
from hpc_closure.spectral.modes.grid import to_fields
from hpc_closure.spectral.outside.problem import OutsideProblem
from hpc_closure.spectral.outside.solver import OutsideSolver, Through
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation, simulation_of

SOLVERS = Path(__file__).parent / "user_solvers"
FULL = Problem(
    grid=64,
    dt=0.005,
    scheme="rk4",
    viscosity=0.0,
    hyperviscosity=1e-13,
    hyperviscosity_order=4,
    drag=0.05,
    initial={"kind": "band", "wavenumber": 3.0, "width": 2.0, "energy": 0.02},
)
STRIDE = 4  # the users' dt is 0.02
LIBRARIES = [
    "numpy",
    "torch",
    pytest.param(
        "jax", marks=pytest.mark.skipif("not __import__('importlib.util').util.find_spec('jax')")
    ),
]


def full_with(library):
    return FULL.replace(reduced_python=f"{SOLVERS / f'vorticity_{library}.py'}:Reduced")


def target(problem, stride):
    dns = Simulation(problem, range(3), 0, threads=1).initialise()
    return Target("subgrid", 12, reduced_problem(problem, 16, "subgrid", stride)).compute(dns)


def wrapped(solver, **problem):
    """Return the reduced problem of a solver object on a small grid."""
    full = Problem(grid=16, equation="external", **problem)
    return OutsideProblem.of_solver(full, 16, OutsideSolver(solver, "reduced.python=x"))


def states(problem, members=3):
    fields = torch.randn((members, 16, 16), generator=torch.Generator().manual_seed(1))
    return simulation_of(problem, range(members), 0).transform.to_spectral(fields.double())


@pytest.mark.parametrize("library", LIBRARIES)
def test_targets_are_those_of_the_built_in_solver(library):
    ours, theirs = target(FULL, STRIDE), target(full_with(library), 1)
    assert float((ours - theirs).abs().max()) < 1e-6 * float(ours.abs().max())


@pytest.mark.parametrize("library", LIBRARIES[1:])
def test_gradients_are_those_of_the_built_in_solver(library):
    found = []
    for problem, stride in ((FULL, STRIDE), (full_with(library), 1)):
        reduced = reduced_problem(problem, 16, "subgrid", stride)
        start = Simulation(FULL.replace(grid=16), range(3), 0).initialise().state.clone()
        ends, _ = differentiable(reduced).advance(start.requires_grad_(), 3)
        fields = to_fields(ends, 16)
        weights = torch.randn(fields.shape, generator=torch.Generator().manual_seed(2)).double()
        (fields * weights).sum().backward()
        found.append(to_fields(start.grad, 16))
    assert float((found[0] - found[1]).abs().max()) < 1e-6 * float(found[0].abs().max())


def test_numpy_without_adjoint_is_refused_for_training_and_with_one_is_trained_through():
    decay = np.exp(-0.1 * np.arange(9) ** 2)

    def step(v, n):
        return np.fft.irfft2(np.fft.rfft2(v) * decay**n, s=(16, 16))

    plain = wrapped(SimpleNamespace(dt=0.1, step=step))
    with pytest.raises(ValueError, match=r"numpy without vjp\(v, n, g\)"):
        differentiable(plain)
    own = SimpleNamespace(dt=0.1, step=step, vjp=lambda v, n, g: step(g, n))
    v = torch.randn(2, 16, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: Through.apply(v, wrapped(own).solver, 2), v)


def test_a_solver_of_single_members_is_looped():
    seen = []

    def step(v, n):
        seen.append(v.shape)
        return v * 0.5**n

    problem = wrapped(SimpleNamespace(dt=0.1, step=step, vectorized=False))
    run = simulation_of(problem, range(3), 0).load_state(0, states(problem))
    run.advance(2)
    assert seen == 3 * [(16, 16)]
    assert torch.allclose(run.state, states(problem) / 4)


class Multistep:
    """Adams-Bashforth on dv/dt = -v, whose state holds the last rate."""

    dt = 0.1

    def start(self, v):
        return {"v": v, "last": None}

    def fields(self, state):
        return state["v"]

    def with_fields(self, state, v):
        return {**state, "v": v}

    def step(self, state, n):
        v, last = state["v"], state["last"]
        for _ in range(n):
            rate = -v
            v = v + self.dt * (rate if last is None else 1.5 * rate - 0.5 * last)
            last = rate
        return {"v": v, "last": last}


def test_a_state_that_holds_more_goes_on_is_stored_and_is_forgotten():
    problem = wrapped(Multistep())
    begun = simulation_of(problem, range(3), 0).load_state(0, states(problem))
    saved = begun.advance(2).save_state()
    whole = begun.advance(2).state.clone()
    again = simulation_of(problem, range(3), 0).load_state(**saved)
    assert torch.equal(again.advance(2).state, whole)
    fresh = simulation_of(problem, range(3), 0).load_state(**saved).forget()
    assert not torch.allclose(fresh.advance(2).state, whole, rtol=1e-4)
    once = simulation_of(problem, range(3), 0).load_state(0, states(problem)).advance(4)
    assert torch.allclose(once.state, whole, rtol=1e-12)


def test_a_lost_member_reaches_the_solver_as_zeros_and_stays_lost():
    def step(v, n):
        assert np.isfinite(v).all()
        return v

    problem = wrapped(SimpleNamespace(dt=0.1, step=step))
    start = states(problem)
    start[1] = torch.nan
    run = simulation_of(problem, range(3), 0).load_state(0, start).advance(1)
    assert run.diverged().tolist() == [False, True, False]
    assert torch.allclose(run.state[0], start[0])


@pytest.mark.parametrize(
    "solver, line",
    [
        (SimpleNamespace(dt=-1.0, step=abs), "dt=-1.0, expected a positive number"),
        (SimpleNamespace(dt=0.1), "no dt or no step"),
        (SimpleNamespace(dt=0.1, step=abs, dtype="half"), 'expected "float32" or "float64"'),
        (SimpleNamespace(dt=0.1, step=abs, library="cupy"), "expected one of numpy, torch, jax"),
        (SimpleNamespace(dt=0.1, step=abs, start=abs), r"needs start\(v\) and fields\(state\)"),
    ],
)
def test_a_solver_that_does_not_fit_is_refused_in_one_line(solver, line):
    with pytest.raises(ValueError, match=line):
        OutsideSolver(solver, "reduced.python=x")


@pytest.mark.parametrize(
    "step, line",
    [
        (lambda v, n: v[:1], r"returned shape \(1, 16, 16\) for \(3, 16, 16\)"),
        (lambda v, n: v.astype("f4"), 'returned float32 for float64: .*dtype = "float32"'),
        (lambda v, n: [1.0], "step returned a list"),
    ],
)
def test_what_a_step_returns_is_checked(step, line):
    problem = wrapped(SimpleNamespace(dt=0.1, step=step))
    with pytest.raises(ValueError, match=line):
        simulation_of(problem, range(3), 0).advance(1)


def test_an_error_of_a_step_names_its_line():
    problem = wrapped(SimpleNamespace(dt=0.1, step=lambda v, n: v.no_such))
    with pytest.raises(RuntimeError, match=rf"step failed: AttributeError.*{Path(__file__).name}"):
        simulation_of(problem, range(3), 0).advance(1)


def test_an_interval_must_be_a_whole_number_of_steps():
    with pytest.raises(ValueError, match="its dt=0.02 does not divide the closure interval"):
        reduced_problem(full_with("numpy"), 16, "subgrid").steps_in(0.05)


def test_the_package_does_not_solve_it_by_mistake():
    with pytest.raises(ValueError, match="solves this problem, not the solver of the package"):
        Simulation(reduced_problem(full_with("numpy"), 16, "subgrid"), [0], 0)


def test_a_file_imports_what_is_beside_it_and_a_module_is_a_solver(tmp_path, monkeypatch):
    (tmp_path / "beside_it.py").write_text("DT = 0.25\n")
    (tmp_path / "as_module.py").write_text(
        "from beside_it import DT as dt\ndef step(v, n):\n    return v\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert users_solver(str(tmp_path / "as_module.py")).dt == 0.25
    with pytest.raises(ValueError, match="has no Missing; expected a class without arguments"):
        users_solver(f"{tmp_path / 'as_module.py'}:Missing")
    with pytest.raises(ValueError, match="there is no file"):
        users_solver(str(tmp_path / "gone.py"))
