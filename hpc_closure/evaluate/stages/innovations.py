"""Score the innovations of closures with memory, on members that were not used in training.

The same scores for draws of the closure's Gaussian law are rows of the method ``mean_gp``, or
``NAME_gp`` for a compared closure.
"""

import numpy as np
import torch
from torch import Tensor

from hpc_closure.closure.artifact import Closure
from hpc_closure.closure.composed.model import CompositeClosure
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.sensors import layout_name
from hpc_closure.data.forecasts import Forecasts
from hpc_closure.data.reader import DataSet
from hpc_closure.data.samples import Past, TrainingSet
from hpc_closure.evaluate.context import Inputs
from hpc_closure.evaluate.scores.generated.gains import gains
from hpc_closure.evaluate.scores.generated.innovations import Innovations, local_features
from hpc_closure.evaluate.scores.table import Scored
from hpc_closure.work import log

MOST = 4096  # largest number of snapshots
AT_ONCE = 256  # snapshots per batch


def score_run(inputs: Inputs) -> Scored:
    """Score the innovations of the model and of the compared closures, and their gains per shell.

    Innovations are defined for subgrid closures with memory and a trained mean; gains for all.
    """
    closures = {inputs.model: inputs.closure, **inputs.compared}
    experiment, scored = inputs.experiment, Scored()
    grid, layouts = experiment.score_grids[0], experiment.evaluate.sensors
    required = inputs.closure.config["conditions"]["sensors"] == "required"
    shared = {
        "stage": "generated",
        "closure": inputs.target,
        "grid": grid,
        "interval": experiment.generate.interval,
        # the layout under which the other rows of the model are listed
        "sensors": layout_name(layouts[0] if required and layouts else None),
    }
    for name, closure in closures.items():
        for record in gains(closure.parts()):
            scored.add(**shared, method=name, **record)
        if inputs.target != "subgrid" or not has_innovations(closure):
            continue
        if inputs.channels:
            log.get().info(f"innovations of {name} are not scored: a state of several fields")
            continue
        if closure.header.size != experiment.train_grid:
            continue  # the closure of a solver on another grid has another target
        inputs.stop.check()
        of_data, of_law = compute_innovations(inputs, closure, grid)
        count = len(of_data.q_hat)
        log.get().info(f"innovations of {name}: {count} snapshots")
        law = "mean_gp" if name == inputs.model else f"{name}_gp"
        for method, sample in ((name, of_data), (law, of_law)):
            for record in sample.scores():
                scored.add(**shared, method=method, samples=count, **record)
    return scored


def has_innovations(closure: Closure) -> bool:
    """Return whether a closure reads its last draws and has a mean and a Gaussian law."""
    model = closure.model
    if not isinstance(model, CompositeClosure) or not model.previous:
        return False
    return bool(model.config["mean"]) and model.config["residual"] != "none"


def compute_innovations(
    inputs: Inputs, closure: Closure, grid: int
) -> tuple[Innovations, Innovations]:
    """Compute the innovations on test members, and draw equally many from the Gaussian law."""
    model = closure.model
    assert isinstance(model, CompositeClosure)
    past = Past(model.history, model.previous)
    data, spacing = inputs.data, inputs.experiment.generate.spacing
    indices = data.with_past(inputs.window, past.lead, spacing)
    source: DataSet | Forecasts = data
    if closure.config["conditions"].get("forecast"):
        source = Forecasts(data, inputs.forecaster(grid))
    samples = TrainingSet(source, inputs.parts["test"], indices, grid=grid, past=past)
    count = min(MOST, len(samples))
    numbers = np.arange(count) * len(samples) // count
    parts: list[tuple[Tensor, ...]] = []
    for first in range(0, count, AT_ONCE):
        inputs.stop.check()
        rows = numbers[first : first + AT_ONCE]
        seed = inputs.experiment.evaluate.seed
        parts.append(_of_batch(model, samples.gather(rows), rows.tolist(), seed))
    left, drawn, features, members = (torch.cat(each) for each in zip(*parts))
    band = model.frame.kept
    return (
        Innovations(band, left, features, members),
        Innovations(band, drawn, features, members),
    )


@torch.no_grad()
def _of_batch(
    model: CompositeClosure, batch: dict, rows: list[int], seed: int
) -> tuple[Tensor, ...]:
    """Return innovations, Gaussian draws, features of the states and members of a batch."""
    state = batch["state"].double()
    earlier = (batch.get("history"), batch.get("previous"))
    device = model.device
    frames_hat = model.frames(
        state.to(device), *(None if past is None else past.double().to(device) for past in earlier)
    )
    encoding, frame = model.encode(frames_hat), model.frame
    target_hat = model.band.to_spectral(batch["target"].double().to(device))
    left = frame.standardise(target_hat - encoding.mean_hat, encoding.log_amplitude)
    key = keyed_noise.Key(seed, "innovations", rows, 0)
    drawn = model.base_noise(frame.law, key, keyed_noise.STREAM_BASE)
    drawn = frame.kept.resized(drawn)
    features = local_features(encoding.state_hat, model.band, state.shape[-1])
    parts = (left.to(torch.complex128), drawn.to(torch.complex128), features)
    return (*(part.cpu() for part in parts), batch["member"])
