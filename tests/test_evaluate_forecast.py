"""What several scores are made of is computed once, and is what it says."""

import torch
from test_evaluate_pointwise import normal

from hpc_closure.closure.fields.losses import square_distances
from hpc_closure.evaluate.scores import forecast
from hpc_closure.evaluate.scores.forecast import Forecast, Truth
from hpc_closure.evaluate.scores.generated import budget
from hpc_closure.evaluate.scores.generated.budget import Origin
from hpc_closure.evaluate.scores.spectra import power, transform
from hpc_closure.evaluate.scores.table import Labels
from hpc_closure.evaluate.stages.coupled import score_coupled
from hpc_closure.evaluate.stages.generated import score_generated

SAMPLES, SIZE = 4, 8


def test_moments_are_those_of_the_ensemble():
    ensemble, truth = normal(5, SAMPLES, SIZE, SIZE), normal(SAMPLES, SIZE, SIZE, seed=1)
    one = Forecast(ensemble, Truth(truth))
    assert torch.allclose(one.mean_hat, transform(ensemble).mean(0), atol=1e-14)
    assert torch.allclose(one.energy, power(transform(ensemble)).mean(0), atol=1e-14)


def test_distances_of_pairs_are_computed_once_for_a_lead_time(monkeypatch):
    calls = []

    def counted(ensemble, truth):
        calls.append(len(ensemble))
        return square_distances(ensemble, truth)

    monkeypatch.setattr(forecast, "square_distances", counted)
    labels = Labels({"closure": "subgrid"})
    ensembles = {"model": normal(3, 2, SIZE, SIZE, seed=1), "none": normal(1, 2, SIZE, SIZE)}
    score_coupled(normal(2, SIZE, SIZE), ensembles, [0.1, 0.2], labels)
    assert calls == [3, 1, 3, 1]


def test_the_truth_is_transformed_once_for_all_methods(monkeypatch):
    seen = []

    def counted(fields, *sides):
        seen.append(fields.ndim)
        return transform(fields, *sides)

    for module in (forecast, budget):
        monkeypatch.setattr(module, "transform", counted)
    truth = normal(SAMPLES, SIZE, SIZE)
    samplers = {
        name: lambda indices, members, seed=seed: normal(
            members, len(indices), SIZE, SIZE, seed=seed
        )
        for seed, name in enumerate(("model", "mean_gp", "oracle"))
    }
    labels = Labels({"closure": "diffusion"})
    origin = Origin(states=normal(SAMPLES, SIZE, SIZE, seed=9), span=0.1)
    score_generated(truth, samplers, labels, members=3, origin=origin)
    # truth and states, and the members of every method
    assert sorted(seen) == [3, 3, 4, 4, 4]
