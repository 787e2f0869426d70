"""Kolmogorov flow in exponax: a DNS on 64 x 64 points, a coarse stepper on 24 x 24."""

import glob
import sys

import equinox
import exponax
import h5py
import jax
import numpy as np

jax.config.update("jax_enable_x64", True)
SIDE, SPAN = 2 * np.pi, 0.2  # of the box; time between two calls of the closure


def stepper(points, dt):
    return exponax.stepper.KolmogorovFlowVorticity(2, SIDE, points, dt, diffusivity=5e-3)


class Reduced:
    """The coarse stepper: vorticity (members, 24, 24), ``n`` steps."""

    dt = 0.02
    one = stepper(24, dt)

    def step(self, v, n):
        return march(self.one, n, v)


@equinox.filter_jit
def march(one, n, v):  # exponax has an axis of channels and no members
    return jax.vmap(exponax.repeat(one, n))(v[:, None])[:, 0]


def dns(path, members=16, snapshots=100, spin_up=200):
    """Write the vorticity q(member, time, x, y) every 0.2 time units."""
    draw = exponax.ic.RandomTruncatedFourierSeries(2, cutoff=4, std_one=True)
    keys = jax.random.split(jax.random.PRNGKey(0), members)
    fine, steps = stepper(64, 0.005), round(SPAN / 0.005)
    w = 2 * jax.vmap(lambda key: draw(64, key=key)[0])(keys)
    with h5py.File(path, "w") as file:
        q = file.create_dataset("q", (members, snapshots, 64, 64), "float32")
        file["time"] = SPAN * np.arange(snapshots)
        for number in range(-spin_up, snapshots):
            w = march(fine, steps, w)
            if number >= 0:
                q[:, number] = w


def run_inside(run, members=20, calls=50):
    """March exponax's own ensemble with the closure of a run; returns (calls, members, 24, 24)."""
    import hpc_closure

    process = hpc_closure.load(f"{run}/train/model.safetensors").process(members, seed=1)
    block = sorted(glob.glob(f"{run}/data/block_*.h5"))[-1]
    with h5py.File(block) as file:  # the last stored state of a trajectory, and its past
        state = file["t0_fields/vorticity"][-1].astype(float)
        closure = file["t0_fields/closure"][-1].astype(float)
    v, *past = (np.repeat(one[None], members, 0) for one in (state[-1], closure[-2], closure[-3]))
    process.begin(closures=past)
    reduced, states = Reduced(), []
    v = jax.numpy.asarray(v)
    for _ in range(calls):
        v = reduced.step(v, round(SPAN / Reduced.dt))
        v = v + SPAN * process(v)  # process(v) is a JAX array, too
        states.append(v)
    return jax.numpy.stack(states)


if __name__ == "__main__":
    dns(sys.argv[1])
