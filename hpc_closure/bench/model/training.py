"""Speed of the model: a training step and a sample, beside the published network.

All have a batch of equal size, with 16 x 16 sensors. ``default`` uses the training engine, with
every learned part switched on, because a part that does not act is skipped and costs nothing. The
cost of its generator depends on the residual. The residual of the published problem has few modes,
and the network computes on a grid for these; ``default, full band`` is the same for a residual
with all modes of the grid. ``published`` is the network as published
(:mod:`hpc_closure.bench.published`): complex weights in eager PyTorch, Adam, ten evaluations per
sample. ``published fft`` and ``published matrix`` are the preset, in its two forms, in our engine.
*Recomputed* is a training with ``train.recompute``.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hpc_closure.bench import measure
from hpc_closure.bench.measure import Advance, Timing
from hpc_closure.bench.model.known import WHITE, Known, fit
from hpc_closure.bench.published import published_loss, published_network, published_sample
from hpc_closure.closure.baselines.published_model import SENSORS_PER_SIDE
from hpc_closure.closure.composed.model import CompositeClosure
from hpc_closure.closure.fields.sensors import read_regular, subgrid
from hpc_closure.closure.model import ClosureModel, Request
from hpc_closure.experiment.schema import Train
from hpc_closure.spectral import switches
from hpc_closure.train.processes import Processes
from hpc_closure.train.trainer import start_engine

PUBLISHED, FORMS = "published", ("fft", "matrix")
RECOMPUTED = ("default, full band", "published fft")  # trained with and without recomputation
COLUMNS = measure.columns(
    "case grid:d batch:d method network_grid:d modes:d evaluations:d milliseconds:.3f "
    "kept_mb:.0f ratio:.2f"
)


@dataclass(frozen=True)
class Contender:
    """A network with its inputs.

    Attributes:
        model: model of this package; None = the published form.
        state, target: (batch, n, n).
        network_grid, modes: points per side and retained modes of the network.
        evaluations: evaluations per sample.
        recompute: whether it is trained with ``train.recompute``.
    """

    model: ClosureModel | None
    state: torch.Tensor
    target: torch.Tensor
    network_grid: int
    modes: int
    evaluations: int = 10
    recompute: bool = False


def run(
    *,
    grid: int = 64,
    batch: int = 80,
    samples: Sequence[int] = (1, 20),
    timing: Timing = Timing(seconds=1.0),
    config: dict | None = None,
) -> list[dict[str, Any]]:
    """Measure cases ``training_step`` and ``sample``; returns a row per batch size and method.

    ``ratio`` is the speed over that of the published form. ``kept_mb`` is the megabytes (1e6
    bytes) that a training step stores for its backward pass.

    Args:
        grid: points per side.
        batch: batch of the training step.
        samples: numbers of members drawn at once for a state.
        timing: settings of the blocks.
        config: differences from the ``default`` preset.
    """
    settings = Train(steps=1, batch=batch, engine="torch", lr=1e-3)
    here = Processes(device=torch.device(timing.device))
    entered = _contenders(grid, batch, timing.device, config)
    again = {
        f"{name}, recomputed": replace(
            entered[name], model=copy.deepcopy(entered[name].model), recompute=True
        )
        for name in RECOMPUTED
    }
    trained = {**entered, **again}
    network = published_network().to(timing.device)
    records = []

    def add(case: str, number: int, contenders: dict[str, Advance]) -> None:
        taken = measure.interleave(contenders, timing)
        for name, advance in contenders.items():
            contender, step = trained[name], case == "training_step"
            theirs = None if name == PUBLISHED else measure.ratio(taken[name], taken[PUBLISHED])
            records.append(
                {
                    "case": case,
                    "grid": grid,
                    "batch": number,
                    "method": name,
                    "network_grid": contender.network_grid,
                    "modes": contender.modes,
                    "evaluations": 1 if step else contender.evaluations,
                    "milliseconds": 1e3 * statistics.median(taken[name]),
                    "kept_mb": 1e-6 * backward_bytes(advance) if step else None,
                    "ratio": theirs,
                    **timing.columns,
                }
            )

    def training(contender: Contender) -> Advance:
        if contender.model is None:
            return _their_training(network, settings, contender.state, contender.target)
        train_settings = settings.model_copy(update={"recompute": contender.recompute})
        return training_step(
            contender.model, train_settings, contender.state, contender.target, here
        )

    steps = {name: training(contender) for name, contender in trained.items()}
    add("training_step", batch, steps)
    for contender in entered.values():
        if contender.model:
            _switch_on(contender.model)
    for number in samples:
        draws = {
            name: (
                _our_sample(contender.model, contender.state[:1], contender.target[:1], number)
                if contender.model
                else _their_sample(network, contender.state[:1], contender.target[:1], number)
            )
            for name, contender in entered.items()
        }
        add("sample", number, draws)
    return records


def _contenders(grid: int, batch: int, device: str, config: dict | None) -> dict[str, Contender]:
    """Create all contenders, with arbitrary weights, which do not affect the speed."""
    known, entered = Known("diffusion", grid), {}
    narrow = training_batch(known, batch, device)
    size = max(batch, 64)
    for name, law, pair in (
        ("default", known, narrow),
        ("default, full band", white := Known("diffusion", grid, correlation=WHITE), None),
    ):
        model = fit(law, samples=size, steps=0, config=config).to(device)
        evaluations, modes = int(model.config["function_evaluations"]), int(model.config["modes"])
        state, target = pair or training_batch(white, batch, device)
        entered[name] = Contender(model, state, target, _generator_grid(model), modes, evaluations)
    entered[PUBLISHED] = Contender(None, *narrow, grid, 8)
    for form in FORMS:
        model = fit(
            known,
            samples=size,
            steps=0,
            config={"preset": "published", "spectral_convolution": form},
        )
        entered[f"{PUBLISHED} {form}"] = Contender(model.to(device), *narrow, grid, 8)
    return entered


def _generator_grid(model: ClosureModel) -> int:
    """Return the points per side on which the generator of a ``default`` model computes."""
    assert isinstance(model, CompositeClosure)
    return model.frame.size


def backward_bytes(advance: Advance) -> int:
    """Count the bytes that a training step stores for its backward pass, without the weights."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        switches.only(),  # a graph saves nothing by hooks
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        advance(1)
    return sum(storages.values())


def training_batch(known: Known, batch: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw states and targets (batch, n, n) that no model was fitted to."""
    states, targets = map(torch.cat, zip(*known.batches("test", batch), strict=True))
    return states[:batch].to(device), targets[:batch].to(device)


def training_step(
    model: ClosureModel,
    settings: Train,
    state: torch.Tensor,
    target: torch.Tensor,
    found: Processes,
) -> Advance:
    """Create a function that takes steps of the generator's phase, the longest one.

    Args:
        model: model on its device.
        settings: settings of the engine.
        state, target: this process's share (B, n, n) of the batch.
        found: the processes that share the batch.
    """
    model.train()
    model.resume(max(model.phases, key=lambda phase: phase.share).name)
    engine = start_engine(model, settings, found)
    numbers = found.rank * len(state) + torch.arange(len(state))
    batch = {"state": state, "target": target, "sample_index": numbers}
    count = itertools.count(1)

    def step() -> None:
        engine.step([(dict(batch), 0, next(count))], settings.lr)

    return measure.repeat(step)


def _their_training(network, settings, state, target) -> Advance:
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.lr)

    def step() -> None:
        optimizer.zero_grad()
        published_loss(network, state, target).backward()
        optimizer.step()

    return measure.repeat(step)


def _switch_on(model: ClosureModel) -> None:
    """Set all gains to 1, so that every part acts in every shell."""
    model.eval()
    if not isinstance(model, CompositeClosure):
        return
    ones = torch.ones(model.frame.kept.grid.num_shells, dtype=torch.float64)
    fitted = replace(model.statistics, mean_gain=ones, score_gain=ones, amplitude_gain=1.0)
    model.adopt(fitted)


def _our_sample(model, state, target, number: int) -> Advance:
    sensors = read_regular(target, SENSORS_PER_SIDE)
    call = itertools.count(1)
    return measure.repeat(
        lambda: model.sample_batch(Request(state, range(number), 0, next(call), sensors))
    )


def _their_sample(network, state, target, number: int) -> Advance:
    states = state.expand(number, -1, -1)
    sensors = subgrid(target, SENSORS_PER_SIDE).expand(number, -1, -1)
    return measure.repeat(lambda: published_sample(network, states, sensors))
