"""Other solvers of the same problem, if they are installed.

Each adapter starts from our initial vorticity and takes first-order steps with one evaluation of
the right-hand side, in double or single precision, without noise: unit square, viscosity, steady
forcing, 2/3 rule. Codes with a member axis (exponax, jax-cfd: ``vmap``) advance all members in one
call. The others advance the members one after another, as their users run ensembles.

    pip install 'hpc_closure[peers]'
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np


class Peer(Protocol):
    """Interface of a solver with members of vorticity on an n x n grid."""

    def advance(self, num_steps: int) -> None:
        """Advance by a number of steps."""

    def field(self) -> np.ndarray:
        """Return vorticity (members, n, n)."""


class NotInstalled(Exception):
    """A peer cannot be imported; the message is one line."""


def make(
    name: str,
    initial: np.ndarray,
    forcing: np.ndarray,
    *,
    viscosity: float,
    dt: float,
    precision: str,
) -> Peer:
    """Create a peer at t = 0.

    Args:
        name: a key of ``PEERS``.
        initial: vorticity (members, n, n); the first axis of the grid is x.
        forcing: steady forcing of the vorticity (n, n).
        viscosity, dt: settings of the problem.
        precision: ``float64`` or ``float32``.

    Raises:
        NotInstalled: the package is missing, or cannot be used here.
        ValueError: the name is unknown, or the peer lacks the precision.
    """
    if name not in PEERS:
        raise ValueError(f"against {name!r}: expected one of {', '.join(['published', *PEERS])}")
    modules, adapter, single = PEERS[name]
    _require(name, modules)
    if precision == "float32" and not single:
        raise ValueError(f"{name} computes in float64 only")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return adapter(initial, forcing, viscosity, dt, precision)
    except ImportError as error:
        raise NotInstalled(f"{name}: installed, but cannot be imported ({error})") from None


def _require(name: str, modules: tuple[str, ...]) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise NotInstalled(f"{name}: not installed (pip install {name})")


def _jax(precision: str):
    """Import JAX with as many threads as torch; must be called before JAX is first imported."""
    import torch

    if torch.get_num_threads() == 1:
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        os.environ.setdefault("XLA_FLAGS", flags)
    import jax

    jax.config.update("jax_enable_x64", precision == "float64")
    return jax


class _Jitted:
    """State of a jitted step that advances all members."""

    def __init__(self, jax, step: Callable, state: Any, to_field: Callable):
        self.jax, self.state, self.to_field = jax, state, to_field
        # the number of steps is an argument, so that one compilation serves every block
        self.many = jax.jit(
            lambda state, num: jax.lax.fori_loop(0, num, lambda i, s: step(s), state)
        )

    def advance(self, num_steps: int) -> None:
        self.state = self.many(self.state, num_steps)
        self.jax.block_until_ready(self.state)

    def field(self) -> np.ndarray:
        return np.asarray(self.to_field(self.state))


def _exponax(initial, forcing, viscosity, dt, precision):
    """Create exponax's ETDRK1 of its vorticity equation, with the forcing as a constant term."""
    jax = _jax(precision)
    import exponax
    import jax.numpy as jnp
    from exponax import spectral

    size = initial.shape[-1]
    f_hat = spectral.fft(jnp.asarray(forcing, precision)[None], num_spatial_dims=2)

    class Forced(exponax.stepper.NavierStokesVorticity):
        """Exponax's nonlinear term plus the forcing."""

        def _build_nonlinear_fun(self, derivative_operator):
            flow = super()._build_nonlinear_fun(derivative_operator)
            return lambda w_hat: flow(w_hat) + f_hat

    # stream function and velocity have the opposite sign in exponax; the scale corrects this
    stepper = Forced(
        2,
        1.0,
        size,
        dt,
        diffusivity=viscosity,
        vorticity_convection_scale=-1.0,
        order=1,
        dealiasing_fraction=2 / 3,
    )
    # the state is a spectrum of one channel, which saves exponax two transforms per step
    step = jax.vmap(stepper.step_fourier)
    to_spectrum = jax.vmap(lambda w: spectral.fft(w, num_spatial_dims=2))
    to_field = jax.vmap(lambda w: spectral.ifft(w, num_spatial_dims=2, num_points=size))
    start = to_spectrum(jnp.asarray(initial, precision)[:, None])
    return _Jitted(jax, step, start, lambda state: to_field(state)[:, 0])


def exponax_flow(
    initial: np.ndarray,
    *,
    length: float,
    viscosity: float,
    dt: float,
    modes: int,
    precision: str,
) -> _Jitted:
    """Create exponax's ETDRK4 of decaying three-dimensional flow, on spectra.

    Args:
        initial: velocities (members, 3, n, n, n).
        length, viscosity, dt: settings of the problem.
        modes: largest retained wavenumber of a side.
        precision: ``float64`` or ``float32``.

    Raises:
        NotInstalled: exponax is missing.
    """
    _require("exponax", ("jax", "exponax"))
    jax = _jax(precision)
    import exponax
    import jax.numpy as jnp
    from exponax import spectral

    size = initial.shape[-1]
    stepper = exponax.stepper.NavierStokesVelocity(
        3,
        length,
        size,
        dt,
        diffusivity=viscosity,
        order=4,
        dealiasing_fraction=(modes + 1) / (size // 2),
    )
    to_spectrum = jax.vmap(lambda u: spectral.fft(u, num_spatial_dims=3))
    to_field = jax.vmap(lambda u: spectral.ifft(u, num_spatial_dims=3, num_points=size))
    start = to_spectrum(jnp.asarray(initial, precision))
    return _Jitted(jax, jax.vmap(stepper.step_fourier), start, to_field)


def _jax_cfd(initial, forcing, viscosity, dt, precision):
    """Create jax-cfd's NavierStokes2D with one explicit Euler, implicit Euler step."""
    jax = _jax(precision)
    import jax.numpy as jnp
    from jax_cfd.base import grids
    from jax_cfd.spectral import equations, time_stepping

    size = initial.shape[-1]
    grid = grids.Grid((size, size), domain=((0, 1), (0, 1)))
    f_hat = jnp.fft.rfftn(jnp.asarray(forcing, precision))
    equation = equations.NavierStokes2D(viscosity, grid, smooth=True)
    flow = equation.explicit_terms
    terms = time_stepping.ImplicitExplicitODE()
    terms.explicit_terms = lambda w_hat: flow(w_hat) + f_hat
    terms.implicit_terms, terms.implicit_solve = equation.implicit_terms, equation.implicit_solve
    step = jax.vmap(time_stepping.backward_forward_euler(terms, dt))
    start = jnp.fft.rfftn(jnp.asarray(initial, precision), axes=(1, 2))
    return _Jitted(jax, step, start, lambda state: jnp.fft.irfftn(state, axes=(1, 2)))


class _OneByOne:
    """Advance members one after another."""

    def __init__(self, members: list):
        self.members = members

    def advance(self, num_steps: int) -> None:
        for member in self.members:
            member.advance(num_steps)

    def field(self) -> np.ndarray:
        return np.stack([member.field() for member in self.members])


class _Fluidsim:
    """A member in fluidsim's ns2d solver, by explicit Euler with exactly integrated viscosity."""

    def __init__(self, initial, forcing, viscosity, dt):
        from fluidsim.solvers.ns2d.solver import Simul

        size = initial.shape[-1]
        parameters = Simul.create_default_params()
        parameters.oper.nx = parameters.oper.ny = size
        parameters.oper.Lx = parameters.oper.Ly = 1.0
        parameters.oper.coef_dealiasing = 2 / 3
        parameters.nu_2 = viscosity
        parameters.output.HAS_TO_SAVE = False
        parameters.init_fields.type = "in_script"
        parameters.time_stepping.type_time_scheme = "Euler"
        parameters.time_stepping.USE_CFL = False
        parameters.time_stepping.deltat0 = dt
        parameters.forcing.enable = True
        parameters.forcing.type = "in_script"
        parameters.forcing.key_forced = "rot_fft"
        self.sim = sim = Simul(parameters)
        # fluidsim's first axis is y
        rot = np.ascontiguousarray(initial.T)
        sim.state.init_statespect_from(rot_fft=sim.oper.fft(rot))
        f_hat = sim.oper.fft(np.ascontiguousarray(forcing.T))
        maker = sim.forcing.forcing_maker
        maker.monkeypatch_compute_forcing_fft_each_time(lambda _: f_hat)
        sim.forcing.compute()  # steady: once

    def advance(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.sim.time_stepping.one_time_step_computation()

    def field(self) -> np.ndarray:
        return np.array(self.sim.state.get_var("rot")).T


def _fluidsim(initial, forcing, viscosity, dt, precision):
    """Create a fluidsim simulation per member."""
    os.environ.setdefault("FLUIDSIM_PATH", tempfile.gettempdir())
    return _OneByOne([_Fluidsim(one, forcing, viscosity, dt) for one in initial])


#: required modules, adapter, whether it has single precision
PEERS: dict[str, tuple[tuple[str, ...], Callable[..., Peer], bool]] = {
    "exponax": (("jax", "exponax"), _exponax, True),
    "jax-cfd": (("jax", "jax_cfd"), _jax_cfd, True),
    "fluidsim": (("fluidsim",), _fluidsim, False),
}
