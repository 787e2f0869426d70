"""Scores of the coupled run: ensembles of the reduced solver with the closure in it.

A *case* is one start: a resolved state at t0 whose DNS continuation is the truth. Each method runs
M members from every case. The true ensemble, where there is one, is what the full system would do
from the same resolved state; the ratios refer to it, else to the members of ``oracle``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hpc_closure.evaluate.bootstrap import block_bootstrap
from hpc_closure.evaluate.generated import Scored
from hpc_closure.evaluate.rank_histogram import rank_counts, rank_p, ranks
from hpc_closure.evaluate.scores import valid_time, wasserstein1
from hpc_closure.evaluate.statistics import Statistics, form_scores

VALID = 0.5  # relative error of the ensemble mean at which a forecast ends
POOL_VALUES = 20_000  # values of each lead time that enter a Wasserstein distance
_LOST = torch.tensor([torch.nan], dtype=torch.float64)

Source = Tensor | Callable[[int], Tensor] | Any


def score_coupled(
    truth: Any,
    ensembles: Mapping[str, Source],
    lead_times: Sequence[float],
    labels: Mapping[str, Any],
    *,
    true_ensemble: Source | None = None,
    costs: Mapping[str, float] | None = None,
    method_labels: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> Scored:
    """Score coupled ensembles at every lead time.

    Args:
        truth: (L, n, n) or (cases, L, n, n): the DNS, filtered to this grid.
        ensembles: method -> (M, L, n, n) or (M, cases, L, n, n), or ``read(l)`` -> (M, cases, n,
            n), which need not hold all times at once. M = 1 is a point forecast.
        lead_times: (L,) times since the start, increasing.
        labels: columns of every row: ``closure`` and what else applies.
        true_ensemble: like an entry of ``ensembles``; reference of the ratios.
        costs: method -> milliseconds per member and solver step; ``none`` is the bare solver.
        method_labels: further columns of single methods.
        seed: of ties, pixels and bootstrap.
    """
    truth = torch.as_tensor(truth)
    truth = truth[None] if truth.ndim == 3 else truth
    cases, num_times, size = truth.shape[:3]
    times = torch.as_tensor(lead_times, dtype=torch.float64)
    if times.shape != (num_times,):
        raise ValueError(f"{len(times)} lead times for a truth of {num_times} times")
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.arange(cases)
    common = {"stage": "coupled", "grid": size, **labels}
    further = method_labels or {}
    errors: dict[str, list[Tensor]] = {}
    pools: dict[str, list[Tensor]] = {}
    sizes: dict[str, dict[str, int]] = {}
    scored = Scored()

    for index, lead_time in enumerate(times.tolist()):
        y = truth[:, index].double()
        pools.setdefault("truth", []).append(_some(y, generator))
        reference = Statistics() if true_ensemble is not None else None
        if reference is not None:
            reference.add(_at(true_ensemble, index, y), y)
        statistics: dict[str, Statistics] = {}
        pixels = torch.randint(size * size, (1, cases, 1), generator=generator)
        for method, source in ensembles.items():
            x = _at(source, index, y)
            own = {**common, **further.get(method, {}), "method": method, "lead_time": lead_time}
            sizes[method] = {"members": len(x), "samples": cases}
            statistics[method] = Statistics()
            statistics[method].add(x, y)
            lost = 1 - x.isfinite().flatten(1).all(1).double().mean()
            scored.rows.add(**own, score="diverged", value=lost, **sizes[method])
            pools.setdefault(method, []).append(_some(x, generator) if lost == 0 else _LOST)
            if len(x) > 1:
                drawn = ranks(
                    x.flatten(2).gather(2, pixels.expand(len(x), -1, -1)),
                    y.flatten(1).gather(1, pixels[0]),
                    generator,
                )
                counts = rank_counts(drawn, len(x))
                scored.ranks[method] = counts
                p = rank_p(counts)
                if p == p:  # one pixel per case: n/a for few cases
                    scored.rows.add(**own, score="rank_p", value=p, **sizes[method])
            if index == num_times - 1:
                scored.examples["truth"] = y[0].cpu()
                scored.keep_example(method, x[:, 0])
        for method, parts in statistics.items():
            own = {**common, **further.get(method, {}), "method": method, "lead_time": lead_time}
            for columns in form_scores(parts, blocks, reference or statistics.get("oracle")):
                scored.rows.add(**own, **columns)
            errors.setdefault(method, []).append(parts.joined("total")["relative_error_mean"])
            if index == num_times - 1:
                scored.keep_spectra(method, parts)
        if reference is not None and index == num_times - 1:
            scored.spread_spectra["true ensemble"] = reference.joined("shells")["variance"].mean(0)

    for method, parts_list in errors.items():
        own = {**common, **further.get(method, {}), "method": method, **sizes[method]}
        reached = valid_time(torch.stack(parts_list, -1), times, VALID)
        value, low, high = block_bootstrap({"t": reached}, blocks, lambda means: means["t"])
        scored.rows.add(**own, score="valid_time", value=value, low=low, high=high)
        pool = torch.cat(pools[method])
        if bool(pool.isfinite().all()):
            law = torch.cat(pools["truth"])
            scored.rows.add(**own, score="wasserstein1", value=wasserstein1(pool, law) / law.std())
        if costs and method in costs:
            scored.rows.add(**own, score="cost_ms", value=costs[method])
            if "none" in costs:
                scored.rows.add(**own, score="cost_ratio", value=costs[method] / costs["none"])
    return scored


def _some(fields: Tensor, generator: torch.Generator) -> Tensor:
    """Values at randomly chosen points of randomly chosen members."""
    chosen = torch.randint(fields.numel(), (POOL_VALUES,), generator=generator)
    return fields.flatten()[chosen.to(fields.device)].cpu()


def _at(source: Source, index: int, truth: Tensor) -> Tensor:
    """Ensemble (M, cases, n, n) in float64 at one lead time."""
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
