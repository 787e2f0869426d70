"""The solver against solvers that share no line with it: exponax and fluidsim, where installed."""

import contextlib
import io
import warnings

import numpy as np
import pytest
import torch

from hpc_closure.bench.dns import forcing_field
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

# Half a turn-over of a flow that fills its grid: the nonlinear term decides where it ends.
PROBLEM = Problem(
    grid=64,
    viscosity=2e-3,
    forcing={"kind": "published", "amplitude": 2.0},
    initial={"kind": "band", "wavenumber": 2, "width": 1, "energy": 0.5},
    dt=2.5e-3,
)
TIME = 0.5
STEPS = round(TIME / PROBLEM.dt)


def initial_field():
    """Vorticity (n, n) float64 at t = 0."""
    return Simulation(PROBLEM, [0], 0).initialise().fields(["vorticity"])["vorticity"][0]


def end(**changes):
    """Our vorticity (n, n) at ``TIME``."""
    problem = PROBLEM.replace(**changes)
    simulation = Simulation(problem, [0], 0).initialise()
    simulation.advance(round(TIME / problem.dt))
    return simulation.fields(["vorticity"])["vorticity"][0]


def exponax_end(field, forcing):
    """ETDRK4 of exponax's vorticity equation."""
    pytest.importorskip("jax")
    exponax = pytest.importorskip("exponax")
    import jax

    jax.config.update("jax_enable_x64", True)
    from exponax import spectral

    f_hat = spectral.fft(jax.numpy.asarray(forcing)[None], num_spatial_dims=2)

    class Forced(exponax.stepper.NavierStokesVorticity):
        """With a steady forcing."""

        def _build_nonlinear_fun(self, derivative_operator):
            flow = super()._build_nonlinear_fun(derivative_operator)
            return lambda w_hat: flow(w_hat) + f_hat

    # the scale turns round its velocity, whose sign is not ours; it cuts at fraction n/2 - 1
    modes = PROBLEM.make_grid().modes
    stepper = Forced(
        2,
        1.0,
        PROBLEM.grid,
        PROBLEM.dt,
        diffusivity=PROBLEM.viscosity,
        order=4,
        vorticity_convection_scale=-1.0,
        num_circle_points=64,
        dealiasing_fraction=(modes + 1) / (PROBLEM.grid // 2),
    )
    state = exponax.repeat(stepper, STEPS)(jax.numpy.asarray(field)[None])
    return np.asarray(state[0])


def fluidsim_end(field, forcing):
    """RK4 of fluidsim's ns2d, viscosity integrated exactly; its first axis is y."""
    pytest.importorskip("fluidsim")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        from fluidsim.solvers.ns2d.solver import Simul

        parameters = Simul.create_default_params()
        parameters.oper.nx = parameters.oper.ny = PROBLEM.grid
        parameters.oper.Lx = parameters.oper.Ly = 1.0
        parameters.oper.coef_dealiasing = 2 / 3
        parameters.nu_2 = PROBLEM.viscosity
        parameters.output.HAS_TO_SAVE = False
        parameters.init_fields.type = "in_script"
        parameters.time_stepping.type_time_scheme = "RK4"
        parameters.time_stepping.USE_CFL = False
        parameters.time_stepping.deltat0 = PROBLEM.dt
        parameters.forcing.enable = True
        parameters.forcing.type = "in_script"
        parameters.forcing.key_forced = "rot_fft"
        simulation = Simul(parameters)
        spectral = simulation.oper.fft
        simulation.state.init_statespect_from(rot_fft=spectral(np.ascontiguousarray(field.T)))
        f_hat = spectral(np.ascontiguousarray(forcing.T))
        maker = simulation.forcing.forcing_maker
        maker.monkeypatch_compute_forcing_fft_each_time(lambda _: f_hat)
        simulation.forcing.compute()
        for _ in range(STEPS):
            simulation.time_stepping.one_time_step_computation()
        return np.array(simulation.oper.ifft(simulation.state.state_spect.get_var("rot_fft"))).T


@pytest.fixture(scope="module", params=[exponax_end, fluidsim_end], ids=["exponax", "fluidsim"])
def independent(request, tmp_path_factory):
    """Vorticity at ``TIME`` by another solver, from the same initial field."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLUIDSIM_PATH", str(tmp_path_factory.mktemp("fluidsim")))
        found = request.param(initial_field().numpy(), forcing_field(PROBLEM).numpy())
    return torch.from_numpy(found.copy())


def distance(a, b):
    """Relative L2 distance."""
    return float((a - b).norm() / b.norm())


def test_etdrk4_ends_where_an_independent_solver_ends(independent):
    assert distance(independent, initial_field()) > 0.5  # it went a long way
    assert distance(end(scheme="etdrk4"), independent) < 1e-7


def test_the_published_scheme_converges_to_an_independent_solver(independent):
    """First order in dt; extrapolated to dt = 0 it ends there to second order."""
    ends = [end(dt=PROBLEM.dt / 2**level) for level in (1, 2, 3)]
    errors = [distance(field, independent) for field in ends]
    assert errors[-1] < 0.01
    assert [a / b for a, b in zip(errors, errors[1:])] == pytest.approx([2, 2], rel=0.05)
    coarse, fine = (2 * b - a for a, b in zip(ends, ends[1:]))
    assert distance(coarse, independent) / distance(fine, independent) == pytest.approx(4, rel=0.1)
