"""Speed of the model: a training step and a sample, beside the published network's form.

Both sides see the same batch, with 16 x 16 sensors. Ours is the ``default`` preset through the
training engine, with every learned part switched on (a part that did not earn its place would be
skipped, and cost nothing). The other side is :mod:`.networks`: complex weights in eager PyTorch,
Adam, ten evaluations per sample.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from hpc_closure.bench import measure
from hpc_closure.bench.known import Known, fit
from hpc_closure.bench.measure import Timing
from hpc_closure.bench.networks import (
    published_loss,
    published_network,
    published_sample,
)
from hpc_closure.closure.composed import ComposedModel
from hpc_closure.closure.interface import ClosureModel, Request
from hpc_closure.closure.published import SENSORS_PER_SIDE
from hpc_closure.closure.sensors import read_regular, subgrid
from hpc_closure.experiment.schema import Train
from hpc_closure.train.engine import TorchEngine
from hpc_closure.train.processes import Processes

OURS, PUBLISHED = "default", "published"
COLUMNS = {
    "case": "",
    "grid": "d",
    "batch": "d",
    "method": "",
    "evaluations": "d",
    "milliseconds": ".3f",
    "ratio": ".2f",
}


def run(
    *,
    grid: int = 64,
    batch: int = 80,
    samples: Sequence[int] = (1, 20),
    timing: Timing = Timing(seconds=1.0),
    config: dict | None = None,
) -> list[dict[str, Any]]:
    """Records: case ``training_step`` and ``sample`` at each batch size, two methods each.

    Args:
        grid: points per side.
        batch: of the training step.
        samples: numbers of members drawn at once for one state.
        timing: of the blocks.
        config: differences from the ``default`` preset.
    """
    known, device = Known("diffusion", grid), timing.device
    settings = Train(steps=1, batch=batch, engine="torch", lr=1e-3)
    # closed-form parts only: the weights do not matter for the speed
    model = fit(known, samples=max(batch, 64), steps=0, config=config)
    model.to(device)
    state, target = (x[:batch].to(device) for x in _whole(known.batches("test", batch)))
    network = published_network().to(device)
    records = []

    def add(case: str, number: int, evaluations: dict[str, int], contenders: dict) -> None:
        taken = measure.interleave(contenders, timing)
        for name in contenders:
            records.append(
                {
                    "case": case,
                    "grid": grid,
                    "batch": number,
                    "method": name,
                    "evaluations": evaluations[name],
                    "milliseconds": 1e3 * statistics.median(taken[name]),
                    "ratio": None if name == OURS else measure.ratio(taken[OURS], taken[name]),
                    "device": device,
                    "threads": torch.get_num_threads(),
                    "repeats": timing.repeats,
                }
            )

    add(
        "training_step",
        batch,
        {OURS: 1, PUBLISHED: 1},
        {
            OURS: _our_training(model, settings, state, target, device),
            PUBLISHED: _their_training(network, settings, state, target),
        },
    )
    _switch_on(model)
    evaluations = {OURS: int(model.config["evaluations"]), PUBLISHED: 10}
    for number in samples:
        add(
            "sample",
            number,
            evaluations,
            {
                OURS: _our_sample(model, state[:1], target[:1], number),
                PUBLISHED: _their_sample(network, state[:1], target[:1], number),
            },
        )
    return records


def _whole(batches) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([one for one, _ in batches]), torch.cat([one for _, one in batches])


def _our_training(model: ClosureModel, settings, state, target, device) -> Callable[[int], None]:
    """The generator's phase, which has most of the steps and the dearer ones."""
    model.train()
    model.phase = "generator"
    trained = {id(weight) for weight in model.parameters_of("generator")}
    for weight in model.parameters():
        weight.requires_grad_(id(weight) in trained)
    worker = TorchEngine(model, settings, Processes(device=torch.device(device)))
    count = 0

    def advance(num_steps: int) -> None:
        nonlocal count
        for _ in range(num_steps):
            count += 1
            numbers = torch.arange(len(state))
            batch = {"state": state, "target": target, "sample_index": numbers}
            worker.step([(batch, 0, count)], 1e-3)

    return advance


def _their_training(network, settings, state, target) -> Callable[[int], None]:
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.lr)

    def advance(num_steps: int) -> None:
        for _ in range(num_steps):
            optimizer.zero_grad()
            published_loss(network, state, target).backward()
            optimizer.step()

    return advance


def _switch_on(model: ClosureModel) -> None:
    """Use the generator in every shell, whatever it has learned."""
    model.eval()
    assert isinstance(model, ComposedModel)
    ones = torch.ones(model.frame.kept.grid.num_shells, dtype=torch.float64)
    fitted = replace(model.statistics, mean_gain=ones, score_gain=ones, amplitude_gain=1.0)
    model.adopt(fitted)


def _our_sample(model, state, target, number: int) -> Callable[[int], None]:
    sensors = read_regular(target, SENSORS_PER_SIDE)
    call = 0

    def advance(num_steps: int) -> None:
        nonlocal call
        for _ in range(num_steps):
            call += 1
            model.sample_batch(Request(state, range(number), 0, call, sensors))

    return advance


def _their_sample(network, state, target, number: int) -> Callable[[int], None]:
    given = state.expand(number, -1, -1)
    sensors = subgrid(target, SENSORS_PER_SIDE).expand(number, -1, -1)

    def advance(num_steps: int) -> None:
        for _ in range(num_steps):
            published_sample(network, given, sensors)

    return advance
