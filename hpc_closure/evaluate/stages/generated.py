"""Score the generated closure: samples of U for held-out states, beside the references.

Every method is sampled for the same snapshots, block by block; memory holds one block of one
method. If the exact law is known, a control is scored as well: the oracle with its spread reduced
to 95 %. It shows whether the calibration test can detect such an error.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hpc_closure.evaluate.context import Inputs
from hpc_closure.evaluate.methods import Method, Methods, Moments
from hpc_closure.evaluate.rows import Absent, points_in_words
from hpc_closure.evaluate.scores import cost
from hpc_closure.evaluate.scores.forecast import Forecast, Truth
from hpc_closure.evaluate.scores.generated.budget import Budget, Origin
from hpc_closure.evaluate.scores.joint.channels import Channels, scales, split
from hpc_closure.evaluate.scores.joint.patches import left_out, threshold_of
from hpc_closure.evaluate.scores.paired import of_states
from hpc_closure.evaluate.scores.pointwise import mse
from hpc_closure.evaluate.scores.rank_histogram import MAX_RANKS, rank_counts, ranks
from hpc_closure.evaluate.scores.table import Labels, Scored, Statistics, form_scores
from hpc_closure.evaluate.scores.variance_quartiles import Quarters
from hpc_closure.work import log

# size of a block's float64 ensemble; scoring holds a few copies of it
BLOCK_BYTES = 2**27
CONTROL = 0.95

Key = tuple[int, str, str]


def score_run(inputs: Inputs) -> dict[Key, Scored]:
    """Score samples of U for a run's held-out states.

    Returns:
        {(grid, sensors in words, channel): Scored}; the channel is "" for a state of one field,
        and for the scores of all channels together.
    """
    experiment, settings = inputs.experiment, inputs.experiment.evaluate
    bare = [None] if inputs.closure.config["conditions"]["sensors"] != "required" else []
    if inputs.channels:
        log.get().info("a state of several fields: the closure's budget is not scored")
    evaluations = inputs.closure.evaluations(settings.sampler.function_evaluations)
    results: dict[Key, Scored] = {}
    for grid in experiment.score_grids:
        snapshots, pool = inputs.snapshots(grid), inputs.climatology(grid)
        origin = inputs.origin(snapshots)
        if reason := left_out(grid, inputs.dimensions):
            log.get().info(reason)
        for layout in [*bare, *settings.sensors]:
            methods = Methods(inputs, snapshots, layout, pool)
            sensors = methods.sensors_in_words
            log.get().info(
                f"scoring {len(snapshots.states)} snapshots at "
                f"{points_in_words(grid, inputs.dimensions)}, "
                f"sensors: {sensors}"
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
                inputs.channels,
                inputs.lengths,
            )
            by_channel = score_channels(
                methods.truth,
                methods.samplers,
                labels,
                members=settings.members,
                origin=replace(origin, reference=pool),
                law=methods.moments(),
                seed=settings.seed,
            )
            for channel, scored in by_channel.items():
                scored.absent = [
                    Absent("generated", inputs.target, method, reason, sensors)
                    for method, reason in methods.absent.items()
                ]
                results[grid, sensors, channel] = scored
    return results


def score_generated(
    truth: Any, samplers: Mapping[str, Method], labels: Labels, **options: Any
) -> Scored:
    """Score samples of a closure of one field; arguments as of :func:`score_channels`."""
    return score_channels(truth, samplers, labels, **options)[""]


def score_channels(
    truth: Any,
    samplers: Mapping[str, Method],
    labels: Labels,
    *,
    members: int,
    origin: Origin = Origin(),
    law: Moments | None = None,
    seed: int = 0,
) -> dict[str, Scored]:
    """Score samples of the closure, each channel by itself and all of them together.

    Args:
        truth: true closures (S, n, n), of C channels (S, C, n, n), with ``labels.dimensions``
            sides; a tensor, an array or an HDF5 data set (sliced by blocks).
        samplers: method -> ``sample(indices, members)``, with indices (s,) into ``truth``; returns
            (members, s, n, n), or (1, s, n, n) for a point forecast, with an axis of channels as
            the truth has. Ratios refer to ``oracle``.
        labels: columns of the rows: ``closure`` and others that apply (``sensors``, ``split``);
            names of the channels.
        members: ensemble size.
        origin: trajectory of each snapshot, for the intervals; its state, for the budget; closures
            of other members, for the threshold of patch maxima and the scales of channels. Without
            the latter exceedance is not scored.
        law: moments of the exact law, if it is known. Neither it nor the budget is used for
            several channels.
        seed: seed for ties and rank coordinates.

    Returns:
        {"": Scored} for one field; {channel: Scored} for several, with "" for all together.

    Raises:
        ValueError: there are no snapshots, or a sampler returns a wrong shape.
    """
    num_samples = int(truth.shape[0])
    if num_samples == 0:
        raise ValueError("there are no held-out snapshots to score; see train.split and window")
    trajectories = origin.trajectories
    blocks = torch.arange(num_samples) if trajectories is None else torch.as_tensor(trajectories)
    if blocks.shape != (num_samples,):
        raise ValueError(f"trajectories {tuple(blocks.shape)} for {num_samples} snapshots")
    channels, reference, size = labels.channels, origin.reference, int(truth.shape[-1])
    sides = labels.dimensions
    values = math.prod(truth.shape[-sides:]) * max(1, len(channels))
    step = max(1, BLOCK_BYTES // (8 * members * values))
    if channels:
        origin, law = replace(origin, states=None), None
    references = {} if reference is None else split(reference, channels, sides)
    fields = {
        name: _Field(labels.of_channel(name), blocks, step, origin, law, seed)
        for name in channels or ("",)
    }
    for name, part in references.items():
        fields[name].above = threshold_of(part, sides)
    whole = None
    if channels:
        whole = Channels(
            scales(torch.as_tensor(truth[:]) if reference is None else reference, sides)
        )
    costs: dict[str, list[float]] = {}

    for start in range(0, num_samples, step):
        indices = torch.arange(start, min(start + step, num_samples))
        block = torch.as_tensor(truth[start : start + len(indices)]).double()
        mean = None
        if law is not None:
            mean = law.mean(indices).double()
            block = block.to(mean.device)
        for name, part in split(block, channels, sides).items():
            fields[name].begin(indices, part, mean)
        for method, ensemble, seconds in _ensembles(samplers, indices, members, mean):
            if ensemble.shape[1:] != block.shape:
                raise ValueError(
                    f"{method} returned {tuple(ensemble.shape)} for {len(indices)} states; "
                    f"expected (members, {', '.join(map(str, block.shape))})"
                )
            if seconds is not None:
                each = 1e3 * seconds / (len(ensemble) * len(indices))
                costs.setdefault(method, []).append(each)
            forecasts = [
                fields[name].add(method, part)
                for name, part in split(ensemble, channels, sides).items()
            ]
            if whole is not None:
                whole.add(method, [forecast.distances for forecast in forecasts])

    if whole is None:
        return {"": fields[""].finish(costs)}
    together = Scored()
    for method, columns in whole.records(blocks):
        together.add(stage="generated", grid=size, **labels.of(method), **columns)
    for method, times in costs.items():
        columns = {"members": whole.members[method], "samples": num_samples}
        columns |= {**labels.of(method), **cost.of_samples(times)}
        together.add(stage="generated", grid=size, **columns)
    return {**{name: field.finish() for name, field in fields.items()}, "": together}


class _Field:
    """Scores of one field of the closures, accumulated block by block and method by method.

    Args:
        labels: columns of the rows.
        blocks: trajectory of each snapshot (S,).
        step: number of snapshots of a block.
        origin: states of the snapshots, for the budget.
        law: moments of the exact law, if it is known.
        seed: seed for ties and rank coordinates.

    Attributes:
        above: threshold of patch maxima; None scores no exceedance.
    """

    def __init__(
        self,
        labels: Labels,
        blocks: Tensor,
        step: int,
        origin: Origin,
        law: Moments | None,
        seed: int,
    ):
        self.labels, self.blocks, self.origin, self.law = labels, blocks, origin, law
        self.above: float | None = None
        self.ties, self.chooser = (torch.Generator().manual_seed(2 * seed + i) for i in range(2))
        self.statistics: dict[str, Statistics] = {}
        self.counts: dict[str, Tensor] = {}
        self.budget = None if origin.states is None else Budget(origin.span)
        self.floors: list[Tensor] = []
        self.variances: list[Tensor] = []
        self.quarters = Quarters.of(None if law is None else law.variance_at, len(blocks), step)
        self.scored = Scored()
        # of the present block
        self.indices: Tensor
        self.true: Truth
        self.floor: Tensor | None = None
        self.picks: Tensor | None = None

    def begin(self, indices: Tensor, block: Tensor, mean: Tensor | None) -> None:
        """Begin a block: indices (s,), true closures and, if known, their exact mean (s, n, n)."""
        if not self.statistics:
            self.scored.examples["truth"] = block[0].cpu()
        self.indices, self.true, self.picks = indices, Truth(block, self.labels.lengths), None
        if self.law is not None and mean is not None:
            self.floor = mse(mean[None], block)
            self.floors.append(self.floor.cpu())
            if self.law.variance is not None:
                known = self.law.variance
                value = torch.as_tensor(known(indices) if callable(known) else known)
                self.variances.append(value.double().cpu().expand(len(indices)))
        if self.budget is not None and self.origin.states is not None:
            self.budget.begin(self.true, self.origin.states[indices])

    def add(self, method: str, ensemble: Tensor) -> Forecast:
        """Add a method's ensemble (M, s, n, n) for the block."""
        forecast = Forecast(ensemble, self.true.to(ensemble.device))
        num, samples = len(ensemble), len(self.blocks)
        places = {} if self.quarters is None else self.quarters.at(self.indices)
        if method not in self.statistics:
            self.statistics[method] = Statistics(self.labels.further, self.above)
            self.scored.keep_example(method, ensemble[:, 0])
        self.statistics[method].add(forecast, self.floor, places)
        if self.budget is not None:
            self.budget.add(method, forecast)
        if num > 1:
            x, y = (
                _coordinates(self.law, part, self.labels.dimensions)
                for part in (ensemble, forecast.truth.fields)
            )
            if self.picks is None:  # the same coordinates for every method
                here = len(self.indices)
                self.picks = _pick(x.shape[-1], here, samples, self.law, self.chooser)
            drawn = ranks(_take(x, self.picks), _take(y, self.picks), self.ties)
            histogram = rank_counts(drawn, num)
            self.counts[method] = self.counts.get(method, torch.zeros_like(histogram)) + histogram
        return forecast

    def finish(self, costs: Mapping[str, list[float]] | None = None) -> Scored:
        """Form the rows of all methods.

        Args:
            costs: method -> milliseconds per sample of each block.
        """
        scored, labels, statistics, blocks = self.scored, self.labels, self.statistics, self.blocks
        stage = {"stage": "generated", "grid": self.true.fields.shape[-1]}
        for method, parts in statistics.items():
            columns_of_method = {**stage, **labels.of(method)}
            for columns in form_scores(parts, blocks, statistics.get("oracle")):
                scored.add(**columns_of_method, **columns)
            sizes = {"members": parts.members, "samples": len(blocks)}
            if self.budget is not None:
                scored.keep_transfer(method, self.budget.transfer(method))
                for columns in self.budget.scores(method, blocks):
                    scored.add(**columns_of_method, **columns, **sizes)
            if method in self.counts:
                scored.add_ranks(self.counts[method], **columns_of_method, **sizes)
            if costs and method in costs:
                scored.add(**columns_of_method, **cost.of_samples(costs[method]), **sizes)
            scored.keep_spectra(method, parts)
        for method, columns in of_states(statistics, labels.against, blocks):
            sizes = {"members": statistics[method].members, "samples": len(blocks)}
            scored.add(**stage, **labels.of(method), **sizes, **columns)
        if self.law is not None:
            columns_of_method = {**stage, **labels.of("oracle"), "samples": len(blocks)}
            energy = next(iter(statistics.values())).joined("total")["truth_energy"].mean()
            realised = float((torch.cat(self.floors).mean() / energy).sqrt())
            scored.add(**columns_of_method, score="floor_realised", value=realised)
            if self.variances:
                floor = (torch.cat(self.variances).mean() / energy).sqrt()
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


def _coordinates(law: Moments | None, fields: Tensor, sides: int) -> Tensor:
    if law is not None and law.whiten is not None:
        return law.whiten(fields)
    return fields.flatten(-sides)


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
