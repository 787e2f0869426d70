"""A stepper of exponax as the reduced solver: vorticity on 16 x 16 points."""

import exponax
import jax

jax.config.update("jax_enable_x64", True)
stepper = exponax.stepper.NavierStokesVorticity(2, 1.0, 16, 0.02, diffusivity=1e-3, drag=-0.05)
dt = stepper.dt


@jax.jit(static_argnums=1)
def step(v, n):  # (members, 16, 16); exponax has an axis of channels and no members
    return jax.vmap(exponax.repeat(stepper, n))(v[:, None])[:, 0]
