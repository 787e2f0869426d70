"""Scores over the model's: a difference that every trajectory shares is seen."""

import torch

from hpc_closure.evaluate.paired import over_the_model


def test_what_trajectories_share_is_no_scatter():
    blocks = torch.arange(20)
    hard = torch.rand(20, generator=torch.Generator().manual_seed(0)).double() + 0.2
    values = {
        "model": hard,
        "mixture": 1.02 * hard,
        "lost": torch.full_like(hard, torch.inf),
    }
    found = dict(over_the_model("crps_to_model", values, blocks))
    assert set(found) == {"mixture"}
    row = found["mixture"]
    assert row["score"] == "crps_to_model" and abs(row["value"] - 1.02) < 1e-9
    assert row["low"] > 1.01  # unpaired it would hold 1
    assert not dict(over_the_model("crps_to_model", {"mixture": hard}, blocks))
