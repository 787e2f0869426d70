"""Burgers on a line: its exact solution, its forced modes and its energy, and files of it."""

import math
import sys

import h5py
import numpy as np
import pytest
import torch

from hpc_closure.experiment import reading
from hpc_closure.spectral.diagnostics import Diagnostics
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.work.hdf5 import sha256_datasets

TURN = 2 * math.pi
YAML = """
name: line
root: {root}
physics:
  equation: burgers1d
  viscosity: 0.02
  forcing: {{kind: none}}
  noise: {{kind: modes, wavenumber: 3, energy_rate: 0.05}}
  initial: {{kind: zero}}
generate:
  grid: 48
  members: 4
  dt: 0.01
  t_end: 1.0
  closure: none
  certificate: reported
  record: {{start: 0.5, every: 0.1, series_every: 0.1}}
cluster: {{members_per_block: 2, device: cpu, threads: 1}}
"""


def burgers(**settings):
    common = {"equation": "burgers1d", "grid": 96, "length": TURN, "scheme": "etdrk4"}
    return Problem(**{**common, **settings})


def cole_hopf(x, t, nu):
    """``u = -2 nu (log phi)_x`` with ``phi = 1 + exp(-nu t) cos(x) / 2``, a heat flow."""
    a = 0.5 * math.exp(-nu * t)
    return 2 * nu * a * torch.sin(x) / (1 + a * torch.cos(x))


def test_a_quiet_flow_is_the_cole_hopf_solution():
    problem = burgers(viscosity=0.5, dt=0.01)
    sim = Simulation(problem, [0], 0)
    (x,) = sim.grid.coordinates()
    sim.load_state(0, sim.transform.to_spectral(cole_hopf(x, 0.0, 0.5)[None]))
    u = sim.advance(100).fields(["state"])["state"][0]
    torch.testing.assert_close(u, cole_hopf(x, 1.0, 0.5), rtol=0, atol=1e-9)
    assert (u - cole_hopf(x, 0.0, 0.5)).abs().max() > 0.1


def test_weakly_forced_modes_follow_their_linear_law():
    # du = -nu k^2 u dt + dW: E |u_hat|^2 = s (1 - exp(-2 nu k^2 t)) / (2 nu k^2)
    nu, time, members = 0.5, 2.0, 1500
    noise = {"kind": "modes", "wavenumber": 3, "energy_rate": 3e-8}
    problem = burgers(grid=24, viscosity=nu, dt=5e-3, noise=noise, initial={"kind": "zero"})
    sim = Simulation(problem, range(members), 1).initialise()
    assert abs(Diagnostics(sim).measure()["energy_injection"] - 3e-8).max() < 1e-20
    power = (sim.advance(round(time / problem.dt)).state.abs() ** 2).mean(0).numpy()
    k2 = np.arange(1, 4) ** 2
    expected = 1e-8 * (1 - np.exp(-2 * nu * k2 * time)) / (2 * nu * k2)
    np.testing.assert_allclose(power[1:4], expected, rtol=4 / members**0.5)
    assert power[0] == 0 and power[4:].max() < 1e-3 * expected.min()


def test_injection_is_dissipation_in_the_mean():
    # strong forcing: shocks carry the energy to scales that are not forced
    noise = {"kind": "modes", "wavenumber": 3, "energy_rate": 0.5}
    problem = burgers(viscosity=0.1, dt=5e-3, noise=noise, initial={"kind": "zero"})
    sim = Simulation(problem, range(100), 2).initialise().advance(1000)
    figures = Diagnostics(sim)
    dissipation, energy = [], [figures.measure()["energy"]]
    for _ in range(100):
        dissipation.append(figures.measure()["energy_dissipation"])
        sim.advance(10)
    energy.append(figures.measure()["energy"])
    gained = energy[1] - energy[0] + np.mean(dissipation, axis=0) * 5.0
    assert abs(gained.mean() / 5.0 - 0.5) < 4 * gained.std() / 5.0 / 100**0.5
    assert gained.std() / 5.0 / 100**0.5 < 0.05 * 0.5
    spectrum = figures.spectrum("energy").mean(0)
    assert spectrum[4:].sum() > 0.05 * spectrum.sum()


@pytest.mark.mpi
def test_ranks_write_the_same_bits(tmp_path, mpirun, hpc_closure_command):
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(YAML.format(root=tmp_path / name))
    done = hpc_closure_command("generate", tmp_path / "one.yaml")
    assert done.returncode == 0, done.stderr
    words = [sys.executable, "-m", "hpc_closure", "generate", tmp_path / "two.yaml"]
    done = mpirun(2, words)
    assert done.returncode == 0, done.stderr
    files = [sorted((tmp_path / name / "line/data").glob("*.h5")) for name in ("one", "two")]
    assert len(files[0]) == len(files[1]) == 2
    for one, two in zip(*files):
        assert sha256_datasets(one) == sha256_datasets(two)
        with h5py.File(one) as file:
            assert np.abs(file["t0_fields/state"][:]).max() > 0.01


@pytest.mark.parametrize(
    "change, line",
    [
        ("physics.noise.kind=ring", "kind=ring is for flows in two dimensions; burgers1d needs"),
        ("generate.closure=diffusion", "closure=diffusion is for flows in two dimensions"),
        ("physics.equation=vorticity2d", "kind=modes is for flows in one dimension; vorticity2d"),
        ("physics.noise.wavenumber=0", "physics.noise.wavenumber=0: Input should be greater"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, change, line):
    (tmp_path / "line.yaml").write_text(YAML.format(root=tmp_path))
    with pytest.raises(ValueError, match=line):
        reading.load(tmp_path / "line.yaml", [change])
