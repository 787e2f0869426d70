"""Budgets, spectra and the certificate."""

import numpy as np
import pytest
import torch

from hpc_closure.generate.certificate import certify
from hpc_closure.spectral.diagnostics import SERIES, Diagnostics
from hpc_closure.spectral.modes.grid import resize
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

WIENER = {"kind": "q_wiener", "amplitude": 5e-5, "draws": 10, "correlation": 0.005}
COLOURED = {"kind": "ornstein_uhlenbeck", "wavenumber": 3, "rms": 1, "correlation_time": 1}
PUBLISHED = Problem(grid=32, forcing={"kind": "published"}, noise=WIENER)


def test_taylor_green_figures():
    problem = Problem(
        grid=32,
        viscosity=0.01,
        initial={"kind": "taylor_green", "amplitude": 3.0, "wavenumber": 2},
    )
    sim = Simulation(problem, [0], 0).initialise()
    figures = Diagnostics(sim).measure()
    assert set(figures) == set(SERIES)
    # u = (A sin kx cos ky, ...): <|u|^2> / 2 = A^2 / 4; w = 2 k A sin sin: <w^2> / 2 = k^2 A^2 / 2
    k2 = (2 * sim.grid.unit) ** 2
    np.testing.assert_allclose(figures["energy"], 9 / 4)
    np.testing.assert_allclose(figures["enstrophy"], k2 * 9 / 2)
    np.testing.assert_allclose(figures["energy_dissipation"], 2 * 0.01 * figures["enstrophy"])
    np.testing.assert_allclose(
        figures["enstrophy_dissipation"], 2 * 0.01 * 2 * k2 * figures["enstrophy"]
    )
    np.testing.assert_allclose(figures["cfl"], 3.0 * 1e-3 * 32, rtol=0.02)


def test_spectra_add_up():
    sim = Simulation(PUBLISHED, [0, 1, 2], 0).initialise().advance(5)
    diagnostics = Diagnostics(sim)
    figures = diagnostics.measure()
    for name in ("energy", "enstrophy"):
        np.testing.assert_allclose(diagnostics.spectrum(name).sum(1), figures[name])
        transfer = diagnostics.spectrum(f"{name}_transfer")
        assert (abs(transfer.sum(1)) < 1e-13 * abs(transfer).sum(1)).all()
    with pytest.raises(ValueError, match="no spectrum"):
        diagnostics.spectrum("helicity")


def test_figures_do_not_depend_on_the_batch():
    whole = Simulation(PUBLISHED, range(5), 0).initialise().advance(3)
    alone = Simulation(PUBLISHED, [3], 0).initialise().advance(3)
    a, b = Diagnostics(whole).measure(), Diagnostics(alone).measure()
    for name in SERIES:
        assert a[name][3] == b[name][0]


@pytest.mark.parametrize("noise", [{"kind": "none"}, WIENER], ids=["deterministic", "stochastic"])
def test_the_published_schemes_budget_closes_to_round_off(noise):
    problem = PUBLISHED.replace(noise=noise, drag=0.1)
    sim = Simulation(problem, [0, 1], 0).initialise()
    budget = Diagnostics(sim).budget(20)
    assert (abs(budget["residual"]) < 1e-11 * budget["scale"]).all()
    # the scheme's own term is of order dt: halving dt halves it over the same time
    finer = problem.replace(dt=problem.dt / 2)
    if noise["kind"] == "none":
        half = Diagnostics(Simulation(finer, [0, 1], 0).initialise()).budget(40)
        np.testing.assert_allclose(budget["scheme"] / half["scheme"], 2.0, rtol=0.02)


@pytest.mark.parametrize("scheme", ["cn_ab2", "etdrk4", "imex_rk3"])
def test_deterministic_budget_of_the_other_schemes(scheme):
    problem = PUBLISHED.replace(noise={"kind": "none"}, scheme=scheme, viscosity=5e-3)
    sim = Simulation(problem, [0, 1], 0).initialise().advance(1)
    budget = Diagnostics(sim).budget(20)
    assert (abs(budget["residual"]) < 1e-4 * budget["scale"]).all()


def test_stochastic_injection_rate_within_its_error_bar():
    # From rest the mean energy grows at the injected rate until the flow feels its damping.
    problem = Problem(
        grid=32,
        viscosity=1e-4,
        noise={"kind": "ring", "wavenumber": 5, "width": 1, "energy_rate": 0.01},
        initial={"kind": "zero"},
        dt=2e-3,
    )
    sim = Simulation(problem, range(64), 0).initialise()
    diagnostics = Diagnostics(sim)
    assert abs(diagnostics.measure()["energy_injection"] - 0.01).max() < 1e-15
    budget = diagnostics.budget(50)
    gained = budget["change"] + budget["dissipation"]
    error = gained.std() / 8
    assert abs(gained.mean() - 0.01 * 0.1) < 4 * error
    assert error < 0.05 * 0.01 * 0.1


def test_certificate_of_a_resolved_flow():
    problem = PUBLISHED.replace(grid=64)
    sim = Simulation(problem, [0, 1], 0).initialise().advance(50)
    before = sim.state.clone()
    certificate = certify(sim, steps=5).check()
    assert certificate.passed and torch.equal(sim.state, before) and sim.step_index == 50
    figures = certificate.as_dict()["figures"]
    assert figures["budget"] < 1e-11 and figures["aliasing"] < 1e-3 and figures["kmax_eta"] > 1


def test_certificate_of_an_unresolved_flow():
    problem = Problem(
        grid=24, viscosity=1e-6, initial={"kind": "band", "wavenumber": 6, "energy": 1.0}, dt=5e-3
    )
    sim = Simulation(problem, [0], 0).initialise().advance(20)
    certificate = certify(sim, steps=5)
    assert not certificate.passed
    with pytest.raises(RuntimeError, match="tail"):
        certificate.check()


def test_aliasing_probe_is_the_distance_from_a_grid_one_and_a_half_times_finer():
    figures, smooth = {}, {"kind": "band", "wavenumber": 3, "width": 1, "energy": 0.1}
    for grid in (24, 48):
        problem = PUBLISHED.replace(grid=grid, initial=smooth)
        sim = Simulation(problem, [0, 1], 0).initialise().advance(10)
        figures[grid] = certify(sim, steps=4).figures["aliasing"]
        finer = problem.replace(grid=3 * grid // 2)
        fine = Simulation(finer, [0, 1], 0).load_state(
            10, resize(sim.state, finer.make_grid().modes)
        )
        expected = resize(fine.advance(4).state, sim.grid.modes)
        distance = (sim.advance(4).state - expected).flatten(1).norm(dim=1)
        by_hand = float((distance / expected.flatten(1).norm(dim=1)).max())
        assert figures[grid] == pytest.approx(by_hand, rel=1e-6)
    assert 0 < figures[48] < 0.2 * figures[24]


def test_certificate_is_of_the_members_that_are_left():
    sim = Simulation(PUBLISHED, [3, 8], 0).initialise().advance(3)
    alone = Simulation(PUBLISHED, [8], 0).initialise().advance(3)
    sim.state[0, 2, 2] = float("nan")
    assert certify(sim).figures == certify(alone).figures
    sim.state[1, 2, 2] = float("inf")
    with pytest.raises(RuntimeError, match=r"all 2 members are lost at step 3: lower dt"):
        certify(sim).check()


@pytest.mark.parametrize(
    "change",
    [
        {"scheme": "cn_ab2"},
        {"noise": COLOURED},
        {"cfl": 0.5},
        {"precision": "float32"},
        {"removed": "diffusion"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_certificate_runs_on_every_kind_of_problem(change):
    sim = Simulation(PUBLISHED.replace(**change), [0, 1], 0).initialise().advance(3)
    assert certify(sim, steps=3).figures["aliasing"] < 0.2


def test_certificate_on_a_line():
    problem = Problem(equation="kuramoto_sivashinsky1d", grid=64, length=22.0, scheme="etdrk4")
    sim = Simulation(problem, [0], 0).initialise().advance(10)
    assert certify(sim, steps=3).passed
