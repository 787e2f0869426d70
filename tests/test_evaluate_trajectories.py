"""Scores of whole trajectories against an independent package and closed forms."""

import pytest
import scoringrules
import torch
from test_evaluate_pointwise import normal, stationary

from hpc_closure.evaluate.scores.coupled.trajectories import Trajectories, joint_scores
from hpc_closure.evaluate.scores.forecast import Forecast, Truth

CASES, TIMES, SIZE = 6, 4, 8


def taken(ensemble, truth):
    """Trajectories of an ensemble (M, cases, L, n, n)."""
    own = Trajectories()
    for index in range(truth.shape[1]):
        own.add(Forecast(ensemble[:, :, index], Truth(truth[:, index])))
    return own


def test_the_joint_energy_score_is_that_of_all_numbers_of_a_trajectory():
    truth, ensemble = normal(CASES, TIMES, SIZE, SIZE), normal(5, CASES, TIMES, SIZE, SIZE, seed=1)
    found = taken(ensemble, truth).energy_score()
    numbers = (truth.flatten(1), ensemble.flatten(2).transpose(0, 1))
    expected = scoringrules.es_ensemble(*(one.numpy() for one in numbers), estimator="fair")
    scale = (TIMES * SIZE**2) ** 0.5
    assert torch.allclose(found, torch.as_tensor(expected) / scale, rtol=1e-10)


def test_it_sees_memory_that_single_lead_times_do_not():
    """Members that forget from time to time, against a truth that does not; margins are equal."""
    cases, pattern = 300, stationary(1, SIZE, 0)[0]
    steady = normal(21, cases, 1, 1, 1).expand(-1, -1, TIMES, -1, -1) * pattern
    truth, right = steady[0], taken(steady[1:], steady[0])
    wrong = taken(normal(20, cases, TIMES, 1, 1, seed=1) * pattern, truth)
    rows = {
        (method, columns["score"]): columns
        for method, columns in joint_scores(
            {"model": wrong, "oracle": right}, torch.arange(1.0, TIMES + 1), torch.arange(cases)
        )
    }
    ratio = rows["model", "energy_score_joint_ratio"]
    assert ratio["low"] > 1.02
    assert rows["oracle", "energy_score_joint_ratio"]["value"] == 1


def test_correlation_is_lost_when_it_is():
    """Errors that grow linearly: 1 / sqrt(1 + e^2) = .95 at e = .3287."""
    truth = stationary(CASES, SIZE, 0)[:, None].expand(-1, 20, -1, -1)
    times = 0.05 * torch.arange(1, 21, dtype=torch.float64)
    noise = stationary(30 * CASES, SIZE, 1).unflatten(0, (30, CASES))[:, :, None]
    rms = noise.square().mean((-2, -1), keepdim=True).sqrt()
    across = noise / rms * truth.square().mean((-2, -1), keepdim=True).sqrt()
    overlap = (across * truth).mean((-2, -1), keepdim=True)
    across = across - overlap * truth / truth.square().mean((-2, -1), keepdim=True)
    across = across / across.square().mean((-2, -1), keepdim=True).sqrt()
    across = across * truth.square().mean((-2, -1), keepdim=True).sqrt()
    own = taken(truth + times[:, None, None] * across, truth)
    assert torch.allclose(own.correlated(times), torch.full((CASES,), 0.3287).double(), atol=2e-3)


def test_a_lost_member_is_infinitely_wrong():
    truth, ensemble = normal(CASES, TIMES, SIZE, SIZE), normal(5, CASES, TIMES, SIZE, SIZE, seed=1)
    ensemble[0, 0, -1] = torch.nan
    own = taken(ensemble, truth)
    assert own.energy_score()[0] == torch.inf and own.energy_score()[1:].isfinite().all()
    told = dict(
        (columns["score"], columns["value"])
        for _, columns in joint_scores({"m": own}, torch.arange(4.0), torch.arange(CASES))
    )
    assert told["energy_score_joint"] == pytest.approx(float("inf"))
