"""Loss and simple scores of the averaged weights, on validation members and training members."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpc_closure.closure.fields.losses import crps
from hpc_closure.closure.fields.sensors import read_regular
from hpc_closure.closure.model import ClosureModel, Request
from hpc_closure.data.samples import TrainingSet
from hpc_closure.train.processes import Processes

JUDGED = 512  # largest number of samples in a validation
JUDGED_THROUGH = 48  # largest number of starts of coupled ensembles in a validation
SCORED = 16  # snapshots for the scores beside the loss
MEMBERS = 8  # members per snapshot for these scores


def my_share(numbers: np.ndarray, processes: Processes) -> np.ndarray:
    """Return this process's share of the sample numbers."""
    return numbers[processes.rank :: processes.size]


def batches(part: TrainingSet, numbers: np.ndarray, size: int) -> Iterator[dict[str, Any]]:
    """Yield the samples by number, ``size`` at a time."""
    for first in range(0, len(numbers), size):
        yield part.gather(numbers[first : first + size])


@torch.no_grad()
def mean_loss(
    loss: nn.Module, part: TrainingSet, numbers: np.ndarray, size: int, seed: int, processes
) -> float:
    """Compute the mean loss over samples of all processes, with the same noise at every call."""
    total = torch.zeros(2, dtype=torch.float64)
    for batch in batches(part, my_share(numbers, processes), size):
        count = len(batch["state"])
        total += torch.tensor([loss(batch, seed, 0).item() * count, count], dtype=torch.float64)
    total = processes.mean(total)
    return float(total[0] / total[1])


@torch.no_grad()
def scores(
    model: ClosureModel,
    part: TrainingSet,
    numbers: np.ndarray,
    seed: int,
    processes: Processes,
) -> dict[str, float]:
    """Score ensembles of ``MEMBERS`` members per snapshot.

    ``error`` is the relative error of the ensemble mean, ``crps`` the fair CRPS over the target's
    rms, and ``spread_skill`` is 1 if the spread matches the error of the mean.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for batch in batches(part, my_share(numbers, processes), 8):
        samples = ensemble(model, batch, MEMBERS, seed).double()
        sums += score_sums(samples, batch["target"].double()).cpu()
    error, size, variance, crps = processes.mean(sums).tolist()
    return {
        "error": math.sqrt(error / size),
        "crps": crps / math.sqrt(size * _points(part, numbers, processes)),
        "spread_skill": math.sqrt((MEMBERS + 1) / MEMBERS * variance / error) if error else 1.0,
    }


def ensemble(model: ClosureModel, batch: dict[str, Any], members: int, seed: int) -> Tensor:
    """Draw an ensemble per state, (members, B, n, n), with sensors if they are required."""

    def repeat(field: Tensor) -> Tensor:
        return field.repeat(members, *[1] * (field.ndim - 1))

    target = batch["target"]
    state, truth = repeat(batch["state"]), repeat(target)
    history, previous = (
        repeat(batch[name]) if name in batch else None for name in ("history", "previous")
    )
    sensors = None
    if model.config["conditions"]["sensors"] == "required":
        size = target.shape[-1]
        side = next(side for side in (16, 12, 10, 8, 6, 5, 4, 3, 2, 1) if size % side == 0)
        sensors = read_regular(truth, side, model.length)
    numbers = batch["sample_index"].tolist()
    ids = [number * members + member for member in range(members) for number in numbers]
    request = Request(state, ids, seed, sensors=sensors, history=history, previous=previous)
    samples = model.sample_batch(request)
    return samples.view(members, *target.shape)


def _points(part: TrainingSet, numbers: np.ndarray, processes: Processes) -> float:
    return len(numbers) * math.prod(part.points) / processes.size


def score_sums(samples: Tensor, target: Tensor) -> Tensor:
    """Sum (mean - target)^2, target^2, variance and fair CRPS over points; returns (4,).

    Args:
        samples: (members, B, n, n).
        target: (B, n, n).
    """
    points = target[0].numel()
    return torch.stack(
        [
            ((samples.mean(0) - target) ** 2).sum(),
            (target**2).sum(),
            samples.var(0).sum(),
            crps(samples, target).sum() * points,
        ]
    )
