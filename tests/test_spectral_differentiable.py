"""The solver with gradients: it is the solver, and its gradients are those of differences."""

import pytest
import torch

from hpc_closure.spectral import differentiable
from hpc_closure.spectral.differentiable import DifferentiableSolver
from hpc_closure.spectral.modes.grid import hermitian
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

SCHEMES = ("cn_euler", "cn_ab2", "etdrk4", "imex_rk3")
PLANE = {"grid": 16, "viscosity": 1e-3, "dt": 5e-3}
PROBLEMS = {
    "basdevant": {**PLANE, "beta": 0.5, "drag": 0.1},
    "flux": {**PLANE, "form": "flux", "forcing": {"kind": "ring", "wavenumber": 2}},
    "burgers": {"grid": 16, "equation": "burgers1d", "viscosity": 1e-2, "dt": 5e-3},
    "line": {"grid": 16, "equation": "kuramoto_sivashinsky1d", "length": 22.0, "dt": 5e-3},
    "diffusion": {**PLANE, "removed": "diffusion"},
    "convection": {**PLANE, "removed": "convection"},
}
CASES = [
    (name, scheme)
    for name in PROBLEMS
    for scheme in SCHEMES
    if name != "diffusion" or scheme in ("cn_euler", "cn_ab2")
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def problem(request):
    name, scheme = request.param
    return Problem(scheme=scheme, **PROBLEMS[name])


def draw(problem, members, seed, size):
    generator = torch.Generator().manual_seed(seed)
    shape = (members, *problem.make_grid().shape)
    drawn = torch.randn(*shape, dtype=torch.complex128, generator=generator)
    drawn[..., 0] = 0 if problem.dimensions == 1 else drawn[..., 0]
    return size * hermitian(drawn, problem.dimensions)


def test_it_is_the_solver(problem):
    """Over two calls, the second with another closure, from the past of the first."""
    start, one, other = (draw(problem, 3, seed, 0.1) for seed in range(3))
    simulation = Simulation(problem, range(3), 0).load_state(0, start)
    simulation.advance(30, tendency_hat=one).advance(4, tendency_hat=other)
    solver = DifferentiableSolver(problem)
    state, past = solver.advance(start, 30, one)
    state, past = solver.advance(state, 4, other, past)
    size = simulation.state.abs().max()
    assert (state - start).abs().max() > 1e-3 * size
    assert (state - simulation.state).abs().max() < 1e-14 * size
    assert (past is None) == (problem.scheme != "cn_ab2")


def test_gradients_are_those_of_differences(problem):
    """Of the start, of a held closure, and of what the scheme keeps of the steps before."""
    solver = DifferentiableSolver(problem)
    values = [draw(problem, 1, seed, 0.1).requires_grad_() for seed in range(2)]
    if problem.scheme == "cn_ab2":
        values.append(draw(problem, 1, 2, 0.1).requires_grad_())
    aim = draw(problem, 1, 3, 0.1)

    def score(w, tendency, past=None):
        past = None if past is None else torch.view_as_real(past)
        w, past = solver.advance(w, 27, tendency, past)
        return (solver.advance(w, 2, None, past)[0] - aim).abs().square().sum()

    gradients = torch.autograd.grad(score(*values), values)
    for which, gradient in enumerate(gradients):
        along, step = draw(problem, 1, 9, 1.0), 1e-5
        ends = [[v.detach().clone() for v in values] for _ in range(2)]
        ends[0][which] += step * along
        ends[1][which] -= step * along
        with torch.no_grad():
            slope = (score(*ends[0]) - score(*ends[1])) / (2 * step)
        assert (gradient.conj() * along).real.sum() == pytest.approx(slope.item(), rel=1e-6)


@pytest.mark.parametrize("form", ["basdevant", "flux"])
def test_matrices_and_ffts_give_the_same_gradient(form):
    problem = Problem(form=form, **PLANE)
    found = []
    for largest in (64, 0):
        start = draw(problem, 2, 0, 0.1).requires_grad_()
        solver = DifferentiableSolver(problem, matrices=largest)
        assert solver._transform.by_matrices == bool(largest)
        solver.advance(start, 5)[0].abs().square().sum().backward()
        found.append(start.grad)
    assert (found[0] - found[1]).abs().max() < 1e-13 * found[0].abs().max()


def test_stretches_change_no_gradient(monkeypatch):
    problem = Problem(scheme="cn_ab2", **PLANE)
    found = []
    for stretch in (25, 4, 1):
        monkeypatch.setattr(differentiable, "STRETCH", stretch)
        start = draw(problem, 2, 0, 0.1).requires_grad_()
        DifferentiableSolver(problem).advance(start, 11)[0].abs().square().sum().backward()
        found.append(start.grad)
    for other in found[1:]:
        assert (other - found[0]).abs().max() < 1e-14 * found[0].abs().max()


def test_float32_is_computed_in_float32():
    problem = Problem(**PLANE, precision="float32")
    start = draw(problem, 2, 0, 0.1)
    state, _ = DifferentiableSolver(problem).advance(start, 3)
    assert state.dtype == torch.complex64
    exact, _ = DifferentiableSolver(Problem(**PLANE)).advance(start, 3)
    assert (state - exact).abs().max() < 1e-6


@pytest.mark.parametrize(
    "settings, named",
    [({"cfl": 0.5}, "generate.cfl=0.5"), ({"noise": {"kind": "ring"}}, "stochastic forcing")],
)
def test_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        DifferentiableSolver(Problem(grid=32, viscosity=1e-3, **settings))
