"""Similarity of long-time statistics: its values where they are known, and what it refuses."""

import math

import pytest
import torch
from test_evaluate_pointwise import normal

from hpc_closure.evaluate.scores.coupled.climate import BINS, TOTAL, Climate, Flow
from hpc_closure.spectral.modes.grid import to_fields
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

CASES, LEADS, SIZE = 6, 4, 16


@pytest.fixture(scope="module")
def flow():
    return Flow(Problem(grid=SIZE, viscosity=1e-3))


def advanced(flow, states, steps):
    """The states after some steps of the solver, cut to its modes."""
    sides = flow.problem.dimensions
    spectra = flow.simulation(states).advance(steps).state
    return to_fields(spectra, states.shape[-1], sides)


@pytest.fixture(scope="module")
def truth(flow):
    """Vorticity within the retained band."""
    white = normal(CASES * LEADS, SIZE, SIZE, seed=1)
    return advanced(flow, white, 0).unflatten(0, (CASES, LEADS))


def taken(flow, truth, **methods):
    climate = Climate(flow, truth)
    for lead in range(truth.shape[1]):
        climate.add("truth", lead, truth[None, :, lead])
        for name, ensemble in methods.items():
            climate.add(name, lead, ensemble[:, :, lead])
    return climate


def scores(climate, method):
    blocks = torch.arange(CASES)
    return {
        row["score"].removeprefix("similarity_"): row
        for name, row in climate.similarities(blocks)
        if name == method
    }


def test_velocities_of_three_sides_have_energy_and_a_law_of_all_components():
    physics = {"equation": "navier_stokes_3d", "viscosity": 0.05, "length": 2 * math.pi}
    flow = Flow(Problem(grid=8, scheme="rk4", dt=0.05, **physics))
    states = Simulation(flow.problem, range(CASES * LEADS), 0).initialise().advance(2).state
    truth = to_fields(states, 8, 3).unflatten(0, (CASES, LEADS))
    turned = truth.roll(1, 2).transpose(-1, -2).transpose(-2, -3)  # axes and components turned
    none = 0.5 * truth[None]
    climate = taken(flow, truth, none=none, same=truth[None], turned=turned[None], bare=none)
    for method, expected in (("same", 1), ("turned", 1), ("bare", 0)):
        found = scores(climate, method)
        assert set(found) == {"energy_spectrum", "energy_flux", "values", "energy", "worst"}
        for name, row in found.items():
            assert row["value"] == pytest.approx(expected, abs=1e-9), (method, name)
    lines = climate.fluxes()["energy"]
    assert lines["truth"][-1] == pytest.approx(0, abs=1e-12 * float(lines["truth"].abs().max()))


def test_similarity_is_one_for_the_truth_and_zero_for_what_the_bare_solver_does(flow, truth):
    none = 0.5 * truth[None]
    climate = taken(flow, truth, none=none, same=truth.expand(3, *truth.shape), bare=none)
    for method, expected in (("same", 1), ("bare", 0)):
        found = scores(climate, method)
        assert len(found) == 8
        for name, row in found.items():
            assert row["value"] == pytest.approx(expected, abs=1e-12), name


def test_similarity_of_states_that_are_too_small(flow, truth):
    """Of c times the truth: values scale by c, spectra by c^2, fluxes by c^3."""
    small, bare = 0.8, 0.4
    found = scores(taken(flow, truth, none=bare * truth[None], model=small * truth[None]), "model")
    of_power = {power: 1 - (1 - small**power) / (1 - bare**power) for power in (1, 2, 3)}
    for name in ("energy_spectrum", "enstrophy_spectrum"):
        assert found[name]["value"] == pytest.approx(of_power[2], rel=1e-9)
    for name in ("energy_flux", "enstrophy_flux"):
        assert found[name]["value"] == pytest.approx(of_power[3], rel=1e-9)
    bins = TOTAL[1] / BINS  # of the law's spacing
    assert found["values"]["value"] == pytest.approx(of_power[1], abs=2 * bins)
    for name in ("energy", "enstrophy"):
        assert found[name]["value"] == pytest.approx(of_power[2], abs=4 * bins)
    assert found["worst"]["value"] == min(
        row["value"] for name, row in found.items() if name != "worst"
    )


def test_similarity_looks_at_the_second_half_of_the_run(flow, truth):
    wrong = truth.clone()
    wrong[:, : LEADS // 2] *= 10
    found = scores(taken(flow, truth, none=0.5 * truth[None], model=wrong[None]), "model")
    assert found["worst"]["value"] == pytest.approx(1, abs=1e-12)


def test_similarity_that_harms_is_negative_and_a_lost_member_is_worst(flow, truth):
    lost = truth.expand(3, *truth.shape).clone()
    lost[1, 2, -1] = math.nan
    climate = taken(flow, truth, none=0.9 * truth[None], wild=2 * truth[None], lost=lost)
    assert scores(climate, "wild")["worst"]["value"] < -5
    for name, row in scores(climate, "lost").items():
        assert row["value"] == -math.inf, name
    assert "lost" not in climate.fluxes()["energy"]


def test_fluxes_vanish_at_the_last_shell_and_know_their_sign(flow, truth):
    """What the nonlinear term takes from all scales is nothing; truncated noise goes both ways."""
    fluxes = taken(flow, truth, none=0.5 * truth[None]).fluxes()
    for quantity in ("energy", "enstrophy"):
        flux, bare = fluxes[quantity]["truth"], fluxes[quantity]["none"]
        assert abs(flux[-1]) < 1e-12 * flux.abs().max()
        assert torch.allclose(bare, 0.125 * flux, rtol=1e-9)
    states = truth[:, LEADS // 2 :].flatten(0, 1)
    before, after = (
        flow.measure(advanced(flow, states, steps))["enstrophy_spectrum"] for steps in (0, 1)
    )
    undamped = Flow(flow.problem.replace(viscosity=0.0, dt=1e-5))
    after = undamped.measure(advanced(undamped, states, 1))["enstrophy_spectrum"]
    lost = -((after - before) / 1e-5).mean(0).cumsum(-1)  # by all scales up to each shell
    assert torch.allclose(lost, fluxes["enstrophy"]["truth"], atol=1e-3 * float(lost.abs().max()))


def test_on_a_line_there_is_energy_alone():
    problem = Problem(equation="burgers1d", grid=32, viscosity=1e-2)
    states = normal(CASES * LEADS, 32, seed=2)
    flow = Flow(problem)
    truth = advanced(flow, states, 0).unflatten(0, (CASES, LEADS))
    climate = taken(flow, truth, none=0.5 * truth[None], model=truth[None])
    assert set(climate.fluxes()) == {"energy"}
    expected = {"energy_spectrum", "energy_flux", "values", "energy", "worst"}
    assert set(scores(climate, "model")) == expected
