"""The solver against solvers that share no line with it: exponax, fluidsim and pyqg, if installed.

pyqg 0.7.2 needs numpy 1, so it may be in another environment: ``PYQG_PYTHON=/path/to/python``.
"""

import contextlib
import io
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from hpc_closure.bench.solver.dns import forcing_field
from hpc_closure.bench.solver.pyqg import problem_of
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


# 100 steps of an hour of the eddy configuration (Ross et al. 2023), from large scales
PYQG = """
import sys
import numpy as np
import pyqg
model = pyqg.QGModel(
    nx=128, dt=3600.0, L=1e6, beta=1.5e-11, rek=5.787e-7, rd=15000.0, delta=0.25, U1=0.025, U2=0.0,
    tmax=1e20, tavestart=1e30, twrite=10**9, log_level=0, ntd=1,
)
model.q = np.load(sys.argv[1])
model._invert()
for _ in range(100):
    model._step_forward()
np.save(sys.argv[2], np.array(model.q))
"""


def test_two_layers_end_where_pyqg_ends(tmp_path):
    python = os.environ.get("PYQG_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import pyqg"], capture_output=True).returncode:
        pytest.skip(f"{python} cannot import pyqg")
    problem = problem_of(128)
    sim = Simulation(problem, [0], 0)
    noise = torch.randn(1, 2, 128, 128, generator=torch.Generator().manual_seed(0)).double()
    spectra = sim.transform.to_spectral(noise) * (sim.grid.integer_k2 <= 36)
    fields = sim.transform.to_physical(spectra)
    size = torch.tensor([5e-6, 1e-6])[:, None, None] / fields.std((-2, -1), keepdim=True)
    sim.load_state(0, spectra * size)
    # the first axis is x here, the last one in pyqg
    np.save(tmp_path / "start.npy", (fields * size)[0].mT.numpy())
    command = [python, "-c", PYQG, tmp_path / "start.npy", tmp_path / "end.npy"]
    subprocess.run(command, check=True, capture_output=True)
    expected = torch.from_numpy(np.load(tmp_path / "end.npy")).mT
    sim.advance(100)
    for layer, name in enumerate(("q_upper", "q_lower")):
        field = sim.fields([name])[name][0]
        assert (field - (fields * size)[0, layer]).abs().max() > 0.3 * field.abs().max()
        assert (field - expected[layer]).abs().max() < 1e-6 * field.abs().max()


def test_three_dimensional_flow_ends_where_exponax_ends():
    """ETDRK4 of decaying flow on 16^3, viscous enough that the grid holds it, to round-off."""
    pytest.importorskip("jax")
    exponax = pytest.importorskip("exponax")
    import jax

    jax.config.update("jax_enable_x64", True)
    flow = Problem(
        equation="navier_stokes_3d",
        grid=16,
        length=2 * np.pi,
        viscosity=0.05,
        dt=0.02,
        scheme="etdrk4",
        initial={"kind": "band", "wavenumber": 2, "width": 1, "energy": 1.0},
    )
    simulation = Simulation(flow, [0], 1).initialise()
    first = simulation.transform.to_physical(simulation.state)[0].clone()
    last = simulation.advance(40).transform.to_physical(simulation.state)[0]
    stepper = exponax.stepper.NavierStokesVelocity(
        3,
        flow.length,
        flow.grid,
        flow.dt,
        diffusivity=flow.viscosity,
        order=4,
        dealiasing_fraction=(simulation.grid.modes + 1) / (flow.grid // 2),
    )
    found = exponax.repeat(stepper, 40)(jax.numpy.asarray(first.numpy()))
    assert distance(last, first) > 0.5
    assert distance(torch.from_numpy(np.asarray(found).copy()), last) < 1e-10
