"""The closure's budget is the change that it makes; of a closure that damps, and of noise."""

import pytest
import torch
from test_evaluate_pointwise import normal

from hpc_closure.evaluate.scores.forecast import Forecast, Truth
from hpc_closure.evaluate.scores.generated.budget import Budget
from hpc_closure.evaluate.scores.spectra import shell_power

SPAN, SIZE, SAMPLES = 0.3, 12, 20


def budget(closures, truth, states, span=SPAN):
    made = Budget(span)
    for part in torch.arange(SAMPLES).split(7):
        true = Truth(truth[part])
        made.begin(true, states[part])
        made.add("other", Forecast(torch.zeros_like(closures[:, part]), true))
        made.add("own", Forecast(closures[:, part], true))
    return made


@pytest.fixture(scope="module")
def case():
    """States, true closures and an ensemble."""
    shapes = ((SAMPLES,), (SAMPLES,), (5, SAMPLES))
    return [normal(*shape, SIZE, SIZE, seed=seed) for seed, shape in enumerate(shapes)]


def test_the_budget_is_the_change_of_enstrophy_that_a_closure_makes(case):
    states, truth, ensemble = case
    rates = budget(ensemble, truth, states).transfer("own")
    before = 0.5 * shell_power(states)
    for name, closures in (("truth", truth[None]), ("own", ensemble)):
        change = (0.5 * shell_power(states + SPAN * closures).mean(0) - before) / SPAN
        assert torch.allclose(rates[f"{name}_enstrophy"], change, atol=1e-12)


def test_energy_is_enstrophy_over_the_square_of_the_wavenumber():
    x = torch.arange(SIZE, dtype=torch.float64) * 2 * torch.pi / SIZE
    states = (torch.cos(x)[:, None] + torch.cos(3 * x)).expand(SAMPLES, SIZE, SIZE)
    rates = budget(-states[None], -states, states).transfer("own")
    per_mode = 0.5 * (-1 + SPAN / 2)  # of a wave of amplitude one, damped at rate one
    energy, enstrophy = rates["own_energy"][0], rates["own_enstrophy"][0]
    assert enstrophy[1] == pytest.approx(per_mode) and energy[1] == pytest.approx(per_mode)
    assert enstrophy[3] == pytest.approx(per_mode)
    assert energy[3] == pytest.approx(per_mode / 9)


def test_scores_of_a_closure_that_damps_too_little_and_of_noise(case):
    states = case[0]
    drag, weak = 1.0, 0.6
    found = {
        row["score"]: row["value"]
        for row in budget(-weak * states[None], -drag * states, states).scores(
            "own", torch.arange(SAMPLES) // 4
        )
    }
    expected = (-weak + SPAN / 2 * weak**2) / (-drag + SPAN / 2 * drag**2)
    assert found["energy_transfer_ratio"] == pytest.approx(expected)
    assert found["enstrophy_transfer_ratio"] == pytest.approx(expected)
    assert found["enstrophy_transfer_distance"] == pytest.approx(1 - expected)
    noise = normal(400, SAMPLES, SIZE, SIZE, seed=5)
    rate = budget(noise, noise[0], states).transfer("own")["own_enstrophy"].sum(-1).mean()
    assert float(rate) == pytest.approx(SPAN / 2, rel=0.05)


def test_on_a_line_energy_is_the_square_and_a_lost_sample_has_no_score(case):
    states, truth, ensemble = (part[..., 0, :] for part in case)
    made = budget(ensemble, truth, states)
    change = 0.5 * (shell_power(states + SPAN * truth, 1) - shell_power(states, 1)) / SPAN
    assert torch.allclose(made.transfer("own")["truth_energy"], change, atol=1e-12)
    assert set(made.transfer("own")) == {"own_energy", "truth_energy"}
    blocks = torch.arange(SAMPLES)
    assert {row["score"] for row in made.scores("own", blocks)} == {
        "energy_transfer_ratio",
        "energy_transfer_distance",
    }
    ensemble = ensemble.clone()
    ensemble[0, 3, 1] = torch.nan
    assert not list(budget(ensemble, truth, states).scores("own", blocks))
