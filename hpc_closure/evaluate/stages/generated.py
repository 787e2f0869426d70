"""Score the generated closure: samples of U for held-out states, beside the references.

Every method is sampled for the same snapshots, block by block; memory holds one block of one
method. If the exact law is known, a control is scored as well: the oracle with its spread reduced
to 95 %. It shows whether the calibration test can detect such an error.
"""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hpc_closure.evaluate.context import Inputs
from hpc_closure.evaluate.methods import Method, Methods, Moments
from hpc_closure.evaluate.rows import Absent
from hpc_closure.evaluate.scores import cost
from hpc_closure.evaluate.scores.forecast import Forecast, Truth
from hpc_closure.evaluate.scores.generated.budget import Budget, Origin
from hpc_closure.evaluate.scores.paired import of_states
from hpc_closure.evaluate.scores.patches import left_out, threshold_of
from hpc_closure.evaluate.scores.pointwise import mse
from hpc_closure.evaluate.scores.rank_histogram import MAX_RANKS, rank_counts, ranks
from hpc_closure.evaluate.scores.table import Labels, Scored, Statistics, form_scores
from hpc_closure.evaluate.scores.variance_quartiles import Quarters
from hpc_closure.work import log

# size of a block's float64 ensemble; scoring holds a few copies of it
BLOCK_BYTES = 2**27
CONTROL = 0.95


def score_run(inputs: Inputs) -> dict[tuple[int, str], Scored]:
    """Score samples of U for a run's held-out states; {(grid, sensors in words): Scored}."""
    experiment, settings = inputs.experiment, inputs.experiment.evaluate
    bare = [None] if inputs.closure.config["conditions"]["sensors"] != "required" else []
    evaluations = inputs.closure.evaluations(settings.sampler.function_evaluations)
    results = {}
    for grid in experiment.score_grids:
        snapshots, pool = inputs.snapshots(grid), inputs.climatology(grid)
        origin = inputs.origin(snapshots)
        if reason := left_out(grid):
            log.get().info(reason)
        for layout in [*bare, *settings.sensors]:
            methods = Methods(inputs, snapshots, layout, pool)
            sensors = methods.sensors_in_words
            log.get().info(
                f"scoring {len(snapshots.states)} snapshots at {grid}^2, sensors: {sensors}"
            )
            labels = Labels(
                {
                    "closure": inputs.target,
                    "sensors": sensors,
                    "interval": experiment.generate.interval,
                },
                {
                    inputs.model: {"evaluations": evaluations},
                    "mean_gp": {"evaluations": 0},
                    **{
                        name: {"evaluations": closure.evaluations()}
                        for name, closure in inputs.compared.items()
                    },
                },
                inputs.against,
                inputs.scores,
            )
            results[grid, sensors] = scored = score_generated(
                snapshots.closures,
                methods.samplers,
                labels,
                members=settings.members,
                origin=origin,
                law=methods.moments(),
                reference=pool,
                seed=settings.seed,
            )
            scored.absent = [
                Absent("generated", inputs.target, method, reason, sensors)
                for method, reason in methods.absent.items()
            ]
    return results


def score_generated(
    truth: Any,
    samplers: Mapping[str, Method],
    labels: Labels,
    *,
    members: int,
    origin: Origin = Origin(),
    law: Moments | None = None,
    reference: Tensor | None = None,
    seed: int = 0,
) -> Scored:
    """Score samples of the closure.

    Args:
        truth: true closures (S, n, n); a tensor, an array or an HDF5 data set (sliced by blocks).
        samplers: method -> ``sample(indices, members)``, with indices (s,) into ``truth``; returns
            (members, s, n, n), or (1, s, n, n) for a point forecast. Ratios refer to ``oracle``.
        labels: columns of the rows: ``closure`` and others that apply (``sensors``, ``split``).
        members: ensemble size.
        origin: trajectory of each snapshot, for the intervals, and its state, for the budget.
        law: moments of the exact law, if it is known.
        reference: closures (P, n, n) of other members, for the threshold of patch maxima; without
            them exceedance is not scored.
        seed: seed for ties and rank coordinates.

    Raises:
        ValueError: there are no snapshots, or a sampler returns a wrong shape.
    """
    num_samples, size = int(truth.shape[0]), int(truth.shape[-1])
    if num_samples == 0:
        raise ValueError("there are no held-out snapshots to score; see train.split and window")
    trajectories = origin.trajectories
    blocks = torch.arange(num_samples) if trajectories is None else torch.as_tensor(trajectories)
    if blocks.shape != (num_samples,):
        raise ValueError(f"trajectories {tuple(blocks.shape)} for {num_samples} snapshots")
    step = max(1, BLOCK_BYTES // (8 * members * size * size))
    ties, chooser = (torch.Generator().manual_seed(2 * seed + i) for i in range(2))
    statistics: dict[str, Statistics] = {}
    counts: dict[str, Tensor] = {}
    costs: dict[str, list[float]] = {}
    budget = None if origin.states is None else Budget(origin.span)
    floors, variances = [], []
    quarters = Quarters.of(None if law is None else law.variance_at, num_samples, step)
    above = threshold_of(reference)
    scored = Scored()

    for start in range(0, num_samples, step):
        indices = torch.arange(start, min(start + step, num_samples))
        block = torch.as_tensor(truth[start : start + len(indices)]).double()
        floor = mean = None
        if law is not None:
            mean = law.mean(indices).double()
            block = block.to(mean.device)
            floor = mse(mean[None], block)
            floors.append(floor.cpu())
            if law.variance is not None:
                value = law.variance(indices) if callable(law.variance) else law.variance
                variances.append(torch.as_tensor(value).double().cpu().expand(len(indices)))
        true, picks = Truth(block), None
        if budget is not None and origin.states is not None:
            budget.begin(true, origin.states[indices])
        if start == 0:
            scored.examples["truth"] = block[0].cpu()

        for method, ensemble, seconds in _ensembles(samplers, indices, members, mean):
            if ensemble.shape[1:] != block.shape:
                raise ValueError(
                    f"{method} returned {tuple(ensemble.shape)} for {len(indices)} states; "
                    f"expected (members, {len(indices)}, {size}, {size})"
                )
            forecast = Forecast(ensemble, true.to(ensemble.device))
            num = len(ensemble)
            places = {} if quarters is None else quarters.at(indices)
            parts = statistics.setdefault(method, Statistics(labels.further, above))
            parts.add(forecast, floor, places)
            if budget is not None:
                budget.add(method, forecast)
            if seconds is not None:
                costs.setdefault(method, []).append(1e3 * seconds / (num * len(indices)))
            if num > 1:
                x, y = (_coordinates(law, part) for part in (ensemble, forecast.truth.fields))
                if picks is None:  # the same coordinates for every method
                    picks = _pick(x.shape[-1], len(indices), num_samples, law, chooser)
                drawn = ranks(_take(x, picks), _take(y, picks), ties)
                histogram = rank_counts(drawn, num)
                counts[method] = counts.get(method, torch.zeros_like(histogram)) + histogram
            if start == 0:
                scored.keep_example(method, ensemble[:, 0])

    stage = {"stage": "generated", "grid": size}
    for method, parts in statistics.items():
        columns_of_method = {**stage, **labels.of(method)}
        for columns in form_scores(parts, blocks, statistics.get("oracle")):
            scored.add(**columns_of_method, **columns)
        sizes = {"members": parts.members, "samples": num_samples}
        if budget is not None:
            scored.keep_transfer(method, budget.transfer(method))
            for columns in budget.scores(method, blocks):
                scored.add(**columns_of_method, **columns, **sizes)
        if method in counts:
            scored.add_ranks(counts[method], **columns_of_method, **sizes)
        if method in costs:
            scored.add(**columns_of_method, **cost.of_samples(costs[method]), **sizes)
        scored.keep_spectra(method, parts)
    for method, columns in of_states(statistics, labels.against, blocks):
        sizes = {"members": statistics[method].members, "samples": num_samples}
        scored.add(**stage, **labels.of(method), **sizes, **columns)
    if law is not None:
        columns_of_method = {**stage, **labels.of("oracle"), "samples": num_samples}
        energy = next(iter(statistics.values())).joined("total")["truth_energy"].mean()
        realised = float((torch.cat(floors).mean() / energy).sqrt())
        scored.add(**columns_of_method, score="floor_realised", value=realised)
        if variances:
            floor = (torch.cat(variances).mean() / energy).sqrt()
            scored.add(**columns_of_method, score="floor", value=float(floor))
    return scored


def _ensembles(samplers: Mapping[str, Method], indices: Tensor, members: int, mean: Tensor | None):
    """Yield method, float64 ensemble and seconds; the control follows the oracle."""
    for method, sample in samplers.items():
        begin = time.perf_counter()
        ensemble = sample(indices, members)
        if ensemble.is_cuda:
            torch.cuda.synchronize(ensemble.device)
        seconds = time.perf_counter() - begin
        ensemble = ensemble.double()
        yield method, ensemble, seconds
        if method == "oracle" and mean is not None and len(ensemble) > 1:
            centre = mean.to(ensemble.device)
            yield f"oracle_x{CONTROL:g}", centre + CONTROL * (ensemble - centre), None


def _coordinates(law: Moments | None, fields: Tensor) -> Tensor:
    if law is not None and law.whiten is not None:
        return law.whiten(fields)
    return fields.flatten(-2)


def _pick(
    dimensions: int, here: int, samples: int, law: Moments | None, generator: torch.Generator
) -> Tensor:
    """Choose the coordinates to rank for each snapshot, (s, q).

    q gives about MAX_RANKS ranks in total; without whitening, q = 1 pixel.
    """
    whitened = law is not None and law.whiten is not None
    num = min(dimensions, max(1, round(MAX_RANKS / samples))) if whitened else 1
    return torch.rand(here, dimensions, generator=generator).argsort(-1)[:, :num]


def _take(coordinates: Tensor, picks: Tensor) -> Tensor:
    """Gather (..., s, d) at picks (s, q) -> (..., s, q)."""
    picks = picks.to(coordinates.device).expand(*coordinates.shape[:-1], picks.shape[-1])
    return coordinates.gather(-1, picks)
