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
from hpc_closure.evaluate.methods import NO_MEAN_GP
from hpc_closure.evaluate.rows import Absent
from hpc_closure.evaluate.scores import cost
from hpc_closure.evaluate.scores.coupled import rescaled
from hpc_closure.evaluate.scores.coupled.climate import Climate, Flow
from hpc_closure.evaluate.scores.coupled.exceedance import event_records
from hpc_closure.evaluate.scores.coupled.growth import growth
from hpc_closure.evaluate.scores.coupled.late import late_of, predictability
from hpc_closure.evaluate.scores.coupled.trajectories import (
    Trajectories,
    joint_energies,
    joint_scores,
)
from hpc_closure.evaluate.scores.forecast import Forecast, Truth
from hpc_closure.evaluate.scores.intervals import block_interval
from hpc_closure.evaluate.scores.paired import differences, of_states
from hpc_closure.evaluate.scores.patches import left_out, threshold_of
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


def score_run(inputs: Inputs) -> Scored | None:
    """Score the coupled runs of an experiment; return None if there are none."""
    experiment, settings = inputs.experiment, inputs.experiment.rollout
    paths = [product.path for product in Ledger.of(experiment, "rollout").products()]
    if not paths:
        return None
    ensemble = CoupledEnsemble(paths)
    _check_starts(inputs, ensemble)
    stored = [float(time - ensemble.start) for time in ensemble.times[1:]]
    leads = sorted({round(time, 9) for time in (*stored, *experiment.evaluate.lead_times)})
    indices = [ensemble.index(lead) for lead in leads]
    log.get().info(
        f"scoring the coupled ensemble: {len(ensemble.members)} members, "
        f"{len(ensemble.cases)} start(s), {len(leads)} lead times"
    )
    if reason := left_out(experiment.known_grid):
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
        return pool[:, None].expand(-1, len(ensemble.cases), -1, -1)

    labels = Labels(
        {
            "closure": inputs.target,
            "sensors": layout_name(settings.sensors),
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
    if inputs.replicas is not None and set(ensemble.cases) <= set(inputs.replicas.cases):
        inputs.replicas.select(ensemble.cases)  # the first replica serves as the truth
        truth = reader("model", inputs.replicas, slice(1))
        references["oracle"] = reader("model", inputs.replicas, slice(1, None))
    scored = score_coupled(
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
        flow=Flow(inputs.reduced(experiment.known_grid)),
    )
    if settings.after_release:  # growth is defined only for members with equal initial states
        rest = [row for row in scored.records if not row["score"].startswith("growth_")]
        scored.records = rest
    if event := experiment.evaluate.event:
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
        stage = {"stage": "coupled", "grid": experiment.known_grid, **labels.shared}
        scored.records += event_records(fields, event, stage)
    for method, columns in _rescaled(inputs, ensemble, others, leads):
        sizes = {"members": len(ensemble.members), "samples": len(ensemble.cases)}
        place = {"stage": "coupled", "grid": experiment.train_grid}
        scored.add(**place, **labels.of(method), **sizes, **columns)
    scored.absent = absent_references(inputs, list(references))
    scored.absent += [Absent("coupled", inputs.target, *reason) for reason in refused.items()]
    return scored


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
    *,
    costs: Mapping[str, float] | None = None,
    seed: int = 0,
    flow: Flow | None = None,
) -> Scored:
    """Score coupled ensembles at every lead time.

    Args:
        truth: the DNS filtered to this grid, (L, n, n) or (cases, L, n, n).
        ensembles: method -> (M, L, n, n) or (M, cases, L, n, n), or a function of the index of the
            lead time that returns (M, cases, n, n), so that only one time is in memory. M = 1 is
            a point forecast.
        lead_times: (L,) times since the start, increasing.
        labels: columns of the rows: ``closure`` and others that apply.
        costs: method -> microseconds per member and time unit; ``none`` is the bare solver.
        seed: seed for ties and pixels.
        flow: computes long-time statistics; they are omitted without it or without the method
            ``none``.

    Raises:
        ValueError: shapes of truth, lead times and ensembles do not match.
    """
    truth = torch.as_tensor(truth)
    truth = truth[None] if truth.ndim == 3 else truth
    cases, num_times, size = len(truth), truth.shape[1], truth.shape[-1]
    times = torch.as_tensor(lead_times, dtype=torch.float64)
    if times.shape != (num_times,):
        raise ValueError(f"{len(times)} lead times for a truth of {num_times} times")
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.arange(cases)
    stage = {"stage": "coupled", "grid": size}
    errors: dict[str, list[Tensor]] = {}
    variances: dict[str, list[Tensor]] = {}
    pools: dict[str, list[Tensor]] = {}
    sizes: dict[str, dict[str, int]] = {}
    scored = Scored()
    joint: dict[str, Trajectories] = {}
    predictable: dict[float, float] = {}
    above = threshold_of(truth)
    climate = Climate(flow, truth) if flow is not None and "none" in ensembles else None

    for index, lead_time in enumerate(times.tolist()):
        y = truth[:, index].double()
        true = Truth(y)
        pools.setdefault("truth", []).append(_some(y, generator))
        if climate is not None:
            climate.add("truth", index, y[None])
        statistics: dict[str, Statistics] = {}
        pixels = torch.randint(y[0].numel(), (1, cases, 1), generator=generator)
        for method, source in ensembles.items():
            x = _at(source, index, y)
            columns_of_method = {**stage, **labels.of(method), "lead_time": lead_time}
            sizes[method] = {"members": len(x), "samples": cases}
            statistics[method] = Statistics(labels.further, above)
            forecast = Forecast(x, true)
            statistics[method].add(forecast)
            joint.setdefault(method, Trajectories()).add(forecast)
            if climate is not None and method != "climatology":
                climate.add(method, index, x)
            lost = diverged(x)
            scored.add(**columns_of_method, score="diverged", value=lost, **sizes[method])
            pools.setdefault(method, []).append(_some(x, generator) if lost == 0 else _LOST)
            if len(x) > 1:
                drawn = ranks(
                    x.flatten(2).gather(2, pixels.expand(len(x), -1, -1)),
                    y.flatten(1).gather(1, pixels[0]),
                    generator,
                )
                # one pixel per case, so there are no rows with few cases
                scored.add_ranks(rank_counts(drawn, len(x)), **columns_of_method, **sizes[method])
            if index == num_times - 1:
                scored.examples["truth"] = y[0].cpu()
                scored.keep_example(method, x[:, 0])
        for method, parts in statistics.items():
            columns_of_method = {**stage, **labels.of(method), "lead_time": lead_time}
            for columns in form_scores(parts, blocks, statistics.get("oracle")):
                scored.add(**columns_of_method, **columns)
            errors.setdefault(method, []).append(parts.joined("total")["relative_error_mean"])
            if parts.members > 1:
                variances.setdefault(method, []).append(parts.joined("shells")["variance"])
            if index == num_times - 1:
                scored.keep_spectra(method, parts)
        crps = {method: parts.joined("total")["crps"] for method, parts in statistics.items()}
        predictabilities = dict(predictability(crps, blocks))
        predictable |= {lead_time: columns["value"] for columns in predictabilities.values()}
        for method, columns in (
            *of_states(statistics, labels.against, blocks),
            *predictabilities.items(),
        ):
            columns_of_method = {**stage, **labels.of(method), "lead_time": lead_time}
            scored.add(**columns_of_method, **sizes[method], **columns)

    for method, parts_list in errors.items():
        columns_of_method = {**stage, **labels.of(method), **sizes[method]}
        reached = valid_time(torch.stack(parts_list, -1), times, VALID)
        value, low, high = block_interval({"t": reached}, blocks, lambda means: means["t"])
        scored.add(**columns_of_method, score="valid_time", value=value, low=low, high=high)
        pool = torch.cat(pools[method])
        if bool(pool.isfinite().all()):
            law = torch.cat(pools["truth"])
            scored.add(
                **columns_of_method,
                score="wasserstein1",
                value=wasserstein1(pool, law) / law.std(),
            )
        for columns in cost.of_members(costs or {}, method):
            scored.add(**columns_of_method, **columns)
    late = late_of(predictable)
    for method, columns in joint_scores(joint, times, blocks, late):
        scored.add(**stage, **labels.of(method), **sizes[method], **columns)
    energies = joint_energies(joint, times, late)
    for method, columns in differences(
        "energy_score_joint_difference", energies, labels.against, blocks
    ):
        scored.add(**stage, **labels.of(method), **sizes[method], **columns)
    if climate is not None:
        scored.fluxes = climate.fluxes()
        for method, columns in climate.similarities(blocks):
            scored.add(**stage, **labels.of(method), **sizes[method], **columns)
    if "oracle" in variances:
        for method, columns in growth(variances, times, blocks):
            scored.add(**stage, **labels.of(method), **sizes[method], **columns)
    return scored


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
    """Read the ensemble (M, cases, n, n) in float64 at one lead time."""
    if callable(source):
        ensemble = source(index)
    elif source.ndim == 4:
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
