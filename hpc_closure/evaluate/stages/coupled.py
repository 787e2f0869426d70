"""Score the coupled run: ensembles of the reduced solver with the closure.

A *case* is one start: a resolved state at t0 whose DNS continuation is the truth. Each method runs
M members from every case. Ratios refer to the members of ``oracle``: runs of the full system from
the same resolved state, or with sensors the reduced solver with draws of the exact law.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pandas import DataFrame
from torch import Tensor

from hpc_closure.closure.compatibility import has_mean_gp
from hpc_closure.closure.fields.sensors import layout_name
from hpc_closure.data.reader import BESIDE, CoupledEnsemble
from hpc_closure.evaluate import compare
from hpc_closure.evaluate.context import Inputs
from hpc_closure.evaluate.methods import NO_MEAN_GP, UNREAD
from hpc_closure.evaluate.rows import Absent
from hpc_closure.evaluate.scores import cost
from hpc_closure.evaluate.scores.coupled import rescaled
from hpc_closure.evaluate.scores.coupled.climate import Climate, Flow
from hpc_closure.evaluate.scores.coupled.exceedance import event_records
from hpc_closure.evaluate.scores.coupled.growth import growth
from hpc_closure.evaluate.scores.coupled.late import late_of, predictability
from hpc_closure.evaluate.scores.coupled.returns import ReturnTimes
from hpc_closure.evaluate.scores.coupled.trajectories import (
    Trajectories,
    joint_energies,
    joint_scores,
)
from hpc_closure.evaluate.scores.forecast import Forecast, Truth
from hpc_closure.evaluate.scores.intervals import block_interval
from hpc_closure.evaluate.scores.joint.channels import Channels, scales, split
from hpc_closure.evaluate.scores.joint.coherence import Pairs
from hpc_closure.evaluate.scores.joint.patches import left_out, threshold_of
from hpc_closure.evaluate.scores.paired import differences, of_states
from hpc_closure.evaluate.scores.pointwise import VALID, diverged, valid_time, wasserstein1
from hpc_closure.evaluate.scores.rank_histogram import rank_counts, ranks
from hpc_closure.evaluate.scores.table import Labels, Scored, Statistics, form_scores
from hpc_closure.evaluate.stages import costs
from hpc_closure.work import log
from hpc_closure.work.units import Ledger

# states of two trajectories differ by more than this relative distance, truncations by less
OTHER = 0.5
POOL_VALUES = 20_000  # values per lead time that enter a Wasserstein distance
_LOST = torch.tensor([torch.nan], dtype=torch.float64)

Source = Tensor | Callable[[int], Tensor] | Any


def score_run(inputs: Inputs) -> dict[str, Scored]:
    """Score the coupled runs of an experiment; {} if there are none.

    Returns:
        {"": Scored} for a state of one field; {channel: Scored} for several, with "" for all
        channels together.
    """
    experiment, settings = inputs.experiment, inputs.experiment.rollout
    paths = [product.path for product in Ledger.of(experiment, "rollout").products()]
    if not paths:
        return {}
    ensemble = CoupledEnsemble(paths)
    _check_starts(inputs, ensemble)
    stored = [float(time - ensemble.start) for time in ensemble.times[1:]]
    leads = sorted({round(time, 9) for time in (*stored, *experiment.evaluate.lead_times)})
    indices = [ensemble.index(lead) for lead in leads]
    log.get().info(
        f"scoring the coupled ensemble: {len(ensemble.members)} members, "
        f"{len(ensemble.cases)} start(s), {len(leads)} lead times"
    )
    if reason := left_out(experiment.known_grid, inputs.dimensions):
        log.get().info(reason)

    def reader(name, source=ensemble, members=slice(None)):
        places = [source.index(lead) for lead in leads]

        def read(number):
            inputs.stop.check()
            return inputs.cut(torch.from_numpy(source.read(name, places[number])[members]))

        return read

    def climatology(number):
        """Return states of the training members at this time, or at the last stored time."""
        training = inputs.training
        time = min(ensemble.times[indices[number]], training.times[-1])
        index = int(np.argmin(np.abs(training.times - time)))
        states = [
            training.read(member, index, "state", experiment.train_grid)
            for member in inputs.parts["train"]
        ]
        pool = inputs.cut(torch.from_numpy(np.stack(states)))
        return pool[:, None].expand(-1, len(ensemble.cases), *pool.shape[1:])

    labels = Labels(
        {
            "closure": inputs.target,
            "sensors": layout_name(settings.sensors, inputs.dimensions),
            "interval": settings.interval,
        },
        {
            inputs.model: {
                "evaluations": inputs.closure.evaluations(settings.sampler.function_evaluations)
            },
            "mean_gp": {"evaluations": 0},
            **{
                compared.name: {
                    "evaluations": compared.evaluations(inputs.compared[compared.name])
                }
                for compared in inputs.chosen
            },
        },
        inputs.against,
        inputs.scores,
        inputs.channels,
        inputs.lengths,
    )
    candidates = {
        compared.name: compare.coupled(compared, experiment, ensemble)
        for compared in inputs.chosen
    }
    others = {
        name: candidate
        for name, candidate in candidates.items()
        if isinstance(candidate, CoupledEnsemble)
    }
    refused = {name: reason for name, reason in candidates.items() if isinstance(reason, str)}
    names = [name for name in ("none", *BESIDE, *ensemble.rungs) if name in ensemble.names]
    references = {name: reader(name) for name in names}
    truth = reader("truth")
    known = inputs.replicas is not None and set(ensemble.cases) <= set(inputs.replicas.cases)
    if known and not settings.sensors:
        assert inputs.replicas is not None
        inputs.replicas.select(ensemble.cases)  # the first replica serves as the truth
        truth = reader("model", inputs.replicas, slice(1))
        references["oracle"] = reader("model", inputs.replicas, slice(1, None))
    has_climate = not inputs.channels or inputs.dimensions == 3
    if not has_climate:
        log.get().info("a state of several fields: long-time statistics are not scored")
    equation = inputs.equation(experiment.known_grid) if has_climate else None
    by_channel = score_channels(
        torch.stack([truth(number)[0] for number in range(len(leads))], dim=1),
        {
            inputs.model: reader("model"),
            **{name: reader("model", theirs) for name, theirs in others.items()},
            **references,
            "climatology": climatology,
        },
        leads,
        labels,
        costs=costs.measure(inputs),
        seed=experiment.evaluate.seed,
        flow=None if equation is None else Flow(equation),
    )
    if settings.after_release:  # growth is defined only for members with equal initial states
        for part in by_channel.values():
            rest = [row for row in part.records if not row["score"].startswith("growth_")]
            part.records = rest
    scored = by_channel[""]
    event = experiment.evaluate.event
    if event:
        index = ensemble.index(event.lead_time)
        available = [
            name
            for name in ("model", "mean_gp", "oracle", "none", "truth")
            if name in ensemble.names
        ]
        fields = {
            inputs.model if name == "model" else name: inputs.cut(
                torch.from_numpy(ensemble.read(name, index))
            )
            for name in available
        }
        if inputs.channels and "oracle" in references:
            fields["oracle"] = references["oracle"](leads.index(round(event.lead_time, 9)))
        channel = event.channel or ""
        fields = {
            name: split(part, inputs.channels, inputs.dimensions)[channel]
            for name, part in fields.items()
        }
        of_channel = labels.of_channel(channel).shared
        stage = {"stage": "coupled", "grid": experiment.known_grid, **of_channel}
        by_channel[channel].records += event_records(fields, event, stage)
    for method, columns in _rescaled(inputs, ensemble, others, leads):
        sizes = {"members": len(ensemble.members), "samples": len(ensemble.cases)}
        place = {"stage": "coupled", "grid": experiment.train_grid}
        scored.add(**place, **labels.of(method), **sizes, **columns)
    absent = absent_references(inputs, list(references))
    if known and settings.sensors:
        absent = [each for each in absent if each.method != "oracle"]
        absent.append(Absent("coupled", inputs.target, "oracle", UNREAD))
    absent += [Absent("coupled", inputs.target, *reason) for reason in refused.items()]
    for part in by_channel.values():
        part.absent = list(absent)
    return by_channel


def _check_starts(inputs: Inputs, ensemble: CoupledEnsemble) -> None:
    """Raise ValueError unless a second data set contains the initial states of the runs."""
    test_set, grid = inputs.test_set, inputs.experiment.train_grid
    if not test_set.second:
        return
    begun = ensemble.read("truth", 0)[0]
    index = inputs.data.time_index(float(ensemble.times[0]))
    for case, there in zip(ensemble.cases, begun, strict=True):
        known = case in inputs.parts["test"]
        here = inputs.data.read(case, index, grid=grid) if known else np.zeros_like(there)
        if np.linalg.norm(here - there) > OTHER * np.linalg.norm(there):
            raise ValueError(
                f"{inputs.run.rollout}: start {case} is no state of use.test={test_set.second} "
                f"(seed {test_set.seed}): run `rollout --overwrite`"
            )


def _rescaled(
    inputs: Inputs,
    ensemble: CoupledEnsemble,
    others: Mapping[str, CoupledEnsemble],
    leads: Sequence[float],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows on rescaled draws, for every model whose runs have counted them."""
    runs = {
        inputs.model: (ensemble, "model", inputs.closure),
        "mean_gp": (ensemble, "mean_gp", inputs.closure),
        **{name: (run, "model", inputs.compared[name]) for name, run in others.items()},
    }
    runs = {method: run for method, run in runs.items() if run[1] in run[0].counted}
    return rescaled.records(
        {
            method: [run.rescaled_counts(name, run.index(lead)) for lead in leads]
            for method, (run, name, _) in runs.items()
        },
        {method: closure.model.expected_rescaled for method, (_, _, closure) in runs.items()},
        leads,
    )


def absent_references(inputs: Inputs, names: Sequence[str]) -> list[Absent]:
    """List the methods missing in the coupled tables; ``names`` are the existing references."""
    reasons = dict.fromkeys(("fourier", "physics"), "scored as generated closure only")
    left_out = "rollout.baselines leaves it out"
    if "oracle" not in names:
        reasons["oracle"] = f"no exact law is known for this closure, or {left_out}"
    if "mean_gp" not in names:
        has = has_mean_gp(inputs.closure.config)
        reasons["mean_gp"] = left_out if has else NO_MEAN_GP
    return [Absent("coupled", inputs.target, *reason) for reason in reasons.items()]


def score_coupled(
    truth: Any,
    ensembles: Mapping[str, Source],
    lead_times: Sequence[float],
    labels: Labels,
    **options: Any,
) -> Scored:
    """Score coupled ensembles of one field; arguments as of :func:`score_channels`."""
    return score_channels(truth, ensembles, lead_times, labels, **options)[""]


def score_channels(
    truth: Any,
    ensembles: Mapping[str, Source],
    lead_times: Sequence[float],
    labels: Labels,
    *,
    costs: Mapping[str, float] | None = None,
    seed: int = 0,
    flow: Flow | None = None,
) -> dict[str, Scored]:
    """Score coupled ensembles at every lead time, each channel by itself and all together.

    Args:
        truth: the DNS filtered to this grid, (L, n, n) or (cases, L, n, n); of C channels with
            their axis before the sides, of which there are ``labels.dimensions``.
        ensembles: method -> (M, L, n, n) or (M, cases, L, n, n), or a function of the index of the
            lead time that returns (M, cases, n, n), so that only one time is in memory; with an
            axis of channels as the truth has. M = 1 is a point forecast.
        lead_times: (L,) times since the start, increasing.
        labels: columns of the rows: ``closure`` and others that apply; names of the channels.
        costs: method -> microseconds per member and time unit; ``none`` is the bare solver.
        seed: seed for ties and pixels.
        flow: computes long-time statistics, of several channels together; they are omitted
            without it, and without the method ``none``.

    Returns:
        {"": Scored} for one field; {channel: Scored} for several, with "" for all together.

    Raises:
        ValueError: shapes of truth, lead times and ensembles do not match.
    """
    truth, channels = torch.as_tensor(truth), labels.channels
    sides = labels.dimensions
    alone = truth.ndim == 1 + sides + bool(channels)
    truth = truth[None] if alone else truth
    times = torch.as_tensor(lead_times, dtype=torch.float64)
    if times.shape != (truth.shape[1],):
        raise ValueError(f"{len(times)} lead times for a truth of {truth.shape[1]} times")
    used = flow if "none" in ensembles else None
    climate = None if used is None else Climate(used, truth)
    fields = {
        name: _Field(part, times, labels.of_channel(name), seed)
        for name, part in split(truth, channels, sides).items()
    }
    together, scale = Scored(), scales(truth, sides) if channels else torch.ones(1)
    pairs = Pairs(channels, len(times), labels.lengths) if channels else None
    for index, lead_time in enumerate(times.tolist()):
        y = truth[:, index].double()
        whole = Channels(scale) if channels else None
        for field in fields.values():
            field.begin(index)
        if pairs is not None:
            pairs.add("truth", index, y[None])
        if climate is not None:
            climate.add("truth", index, y[None])
        for method, source in ensembles.items():
            x = _at(source, index, y)
            forecasts = [
                fields[name].add(method, part) for name, part in split(x, channels, sides).items()
            ]
            if whole is not None:
                whole.add(method, [forecast.distances for forecast in forecasts])
            if pairs is not None:
                pairs.add(method, index, x)
            if climate is not None and method != "climatology":
                climate.add(method, index, x)
        for field in fields.values():
            field.end()
        if whole is not None:
            place = {"stage": "coupled", "grid": truth.shape[-1], "lead_time": lead_time}
            for method, columns in whole.records(torch.arange(len(truth))):
                together.add(**place, **labels.of(method), **columns)
    first = fields[channels[0] if channels else ""]
    if not channels:
        together = first.finish(costs or {})
    if climate is not None:
        together.fluxes = climate.fluxes()
        place = {"stage": "coupled", "grid": truth.shape[-1]}
        for method, columns in climate.similarities(torch.arange(len(truth))):
            together.add(**place, **labels.of(method), **first.sizes[method], **columns)
    if not channels:
        return {"": together}
    for method in ensembles:
        place = {"stage": "coupled", "grid": truth.shape[-1], **labels.of(method)}
        for columns in cost.of_members(costs or {}, method):
            together.add(**place, **first.sizes[method], **columns)
    if pairs is not None:
        together.coherences = pairs.coherences()
        for method, columns in pairs.records(torch.arange(len(truth))):
            together.add(stage="coupled", grid=truth.shape[-1], **labels.of(method), **columns)
    return {**{name: field.finish({}) for name, field in fields.items()}, "": together}


class _Field:
    """Scores of one field of coupled ensembles, accumulated by lead time and method.

    Args:
        truth: true fields (cases, L, n, n).
        times: lead times (L,).
        labels: columns of the rows.
        seed: seed for ties and pixels.

    Attributes:
        sizes: method -> columns ``members`` and ``samples``.
    """

    def __init__(self, truth: Tensor, times: Tensor, labels: Labels, seed: int):
        self.truth, self.times, self.labels = truth, times, labels
        self.generator = torch.Generator().manual_seed(seed)
        self.blocks = torch.arange(len(truth))
        self.stage = {"stage": "coupled", "grid": truth.shape[-1]}
        self.errors: dict[str, list[Tensor]] = {}
        self.variances: dict[str, list[Tensor]] = {}
        self.pools: dict[str, list[Tensor]] = {}
        self.sizes: dict[str, dict[str, int]] = {}
        self.scored = Scored()
        self.joint: dict[str, Trajectories] = {}
        self.predictable: dict[float, float] = {}
        self.above = threshold_of(truth, labels.dimensions)
        self.returns = ReturnTimes(truth, times) if labels.channels else None
        # of the present lead time
        self.index = -1
        self.true: Truth
        self.pixels: Tensor
        self.statistics: dict[str, Statistics] = {}

    @property
    def last(self) -> bool:
        """Whether the present lead time is the last."""
        return self.index == len(self.times) - 1

    def _columns(self, method: str) -> dict[str, Any]:
        """Return the columns of a method's rows at the present lead time."""
        lead_time = float(self.times[self.index])
        return {**self.stage, **self.labels.of(method), "lead_time": lead_time}

    def begin(self, index: int) -> None:
        """Begin the lead time number ``index``."""
        y = self.truth[:, index].double()
        self.index, self.true, self.statistics = index, Truth(y, self.labels.lengths), {}
        self.pools.setdefault("truth", []).append(_some(y, self.generator))
        shape = (1, len(y), 1)
        self.pixels = torch.randint(y[0].numel(), shape, generator=self.generator)

    def add(self, method: str, x: Tensor) -> Forecast:
        """Add a method's ensemble (M, cases, n, n)."""
        y, scored = self.true.fields, self.scored
        sizes = self.sizes[method] = {"members": len(x), "samples": len(y)}
        forecast = Forecast(x, self.true)
        self.statistics[method] = Statistics(self.labels.further, self.above)
        self.statistics[method].add(forecast)
        self.joint.setdefault(method, Trajectories()).add(forecast)
        if self.returns is not None and method != "climatology":
            self.returns.add(method, x)
        lost = diverged(x)
        scored.add(**self._columns(method), score="diverged", value=lost, **sizes)
        pool = _some(x, self.generator) if lost == 0 else _LOST
        self.pools.setdefault(method, []).append(pool)
        if len(x) > 1:
            drawn = ranks(
                x.flatten(2).gather(2, self.pixels.expand(len(x), -1, -1)),
                y.flatten(1).gather(1, self.pixels[0]),
                self.generator,
            )
            # one pixel per case, so there are no rows with few cases
            scored.add_ranks(rank_counts(drawn, len(x)), **self._columns(method), **sizes)
        if self.last:
            scored.examples["truth"] = y[0].cpu()
            scored.keep_example(method, x[:, 0])
        return forecast

    def end(self) -> None:
        """Form the rows of the present lead time."""
        scored, statistics, blocks = self.scored, self.statistics, self.blocks
        for method, parts in statistics.items():
            for columns in form_scores(parts, blocks, statistics.get("oracle")):
                scored.add(**self._columns(method), **columns)
            error = parts.joined("total")["relative_error_mean"]
            self.errors.setdefault(method, []).append(error)
            if parts.members > 1:
                variance = parts.joined("shells")["variance"]
                self.variances.setdefault(method, []).append(variance)
            if self.last:
                scored.keep_spectra(method, parts)
        crps = {method: parts.joined("total")["crps"] for method, parts in statistics.items()}
        predictabilities = dict(predictability(crps, blocks))
        lead_time = float(self.times[self.index])
        self.predictable |= {lead_time: columns["value"] for columns in predictabilities.values()}
        for method, columns in (
            *of_states(statistics, self.labels.against, blocks),
            *predictabilities.items(),
        ):
            scored.add(**self._columns(method), **self.sizes[method], **columns)

    def finish(self, costs: Mapping[str, float]) -> Scored:
        """Form the rows of all lead times together.

        Args:
            costs: method -> microseconds per member and time unit.
        """
        scored, labels, stage, sizes = self.scored, self.labels, self.stage, self.sizes
        times, blocks = self.times, self.blocks
        for method, parts in self.errors.items():
            columns_of_method = {**stage, **labels.of(method), **sizes[method]}
            reached = valid_time(torch.stack(parts, -1), times, VALID)
            value, low, high = block_interval({"t": reached}, blocks, lambda means: means["t"])
            scored.add(**columns_of_method, score="valid_time", value=value, low=low, high=high)
            pool = torch.cat(self.pools[method])
            if bool(pool.isfinite().all()):
                law = torch.cat(self.pools["truth"])
                scored.add(
                    **columns_of_method,
                    score="wasserstein1",
                    value=wasserstein1(pool, law) / law.std(),
                )
            for columns in cost.of_members(costs, method):
                scored.add(**columns_of_method, **columns)
        late = late_of(self.predictable)
        for method, columns in joint_scores(self.joint, times, blocks, late):
            scored.add(**stage, **labels.of(method), **sizes[method], **columns)
        energies = joint_energies(self.joint, times, late)
        for method, columns in differences(
            "energy_score_joint_difference", energies, labels.against, blocks
        ):
            scored.add(**stage, **labels.of(method), **sizes[method], **columns)
        if self.returns is not None:
            for method, columns in self.returns.records():
                scored.add(**stage, **labels.of(method), **sizes[method], **columns)
        if "oracle" in self.variances:
            for method, columns in growth(self.variances, times, blocks):
                scored.add(**stage, **labels.of(method), **sizes[method], **columns)
        return scored


def readings(inputs: Inputs) -> list[str]:
    """Describe the truth of coupled runs of a subgrid closure that sensors condition; [] if none.

    Also says what the compared runs read, where that differs.
    """
    layout, sides = inputs.experiment.rollout.sensors, inputs.dimensions
    if not layout or inputs.target != "subgrid":
        return []
    sentences = [
        f"Coupled runs read sensors ({layout_name(layout, sides)}) of the start's own trajectory. "
        "It is the truth in their tables, and replicas, which are draws of the law without "
        "readings, are not in them."
    ]
    for compared in inputs.chosen:
        other = compared.experiment
        if other is None or other.rollout.sensors == layout:
            continue
        theirs = layout_name(other.rollout.sensors, sides)
        what = "no sensors" if theirs == "none" else f"sensors {theirs}"
        sentences.append(f"The coupled run of {compared.name} reads {what}.")
    return sentences


def losses(rows: DataFrame) -> list[str]:
    """Describe which coupled ensembles lost members, one sentence per method."""
    with_losses = rows[(rows["score"] == "diverged") & (rows["value"] > 0)]
    return [
        f"Coupled run of {method}: {last.value:.3g} of the members diverged by lead time "
        f"{last.lead_time:g}; scores count them as infinitely wrong."
        for method, group in with_losses.groupby("method", sort=False)
        for last in [group.loc[group["lead_time"].idxmax()]]
    ]


def _some(fields: Tensor, generator: torch.Generator) -> Tensor:
    """Sample POOL_VALUES values at random points of random members."""
    chosen = torch.randint(fields.numel(), (POOL_VALUES,), generator=generator)
    return fields.flatten()[chosen.to(fields.device)].cpu()


def _at(source: Source, index: int, truth: Tensor) -> Tensor:
    """Read the ensemble in float64 at one lead time, (M, *truth.shape)."""
    if callable(source):
        ensemble = source(index)
    elif source.ndim == 1 + truth.ndim:
        ensemble = source[:, None, index]
    else:
        ensemble = source[:, :, index]
    ensemble = torch.as_tensor(ensemble).double().to(truth.device)
    if ensemble.shape[1:] != truth.shape:
        raise ValueError(
            f"an ensemble of shape {tuple(ensemble.shape)}; expected (members, "
            f"{', '.join(map(str, truth.shape))}) at each lead time"
        )
    return ensemble
