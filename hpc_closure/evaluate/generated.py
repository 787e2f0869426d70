"""Scores of the generated closure: samples of U for held-out states, beside the references.

Every method answers the same snapshots, block by block. In memory at any time: one block of one
method. Where the exact law is known the run also scores a control, the oracle with its spread
shrunk to 95 %, so that a reader sees whether the calibration test could have failed.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hpc_closure.evaluate.rank_histogram import MAX_RANKS, rank_counts, rank_p, ranks
from hpc_closure.evaluate.rows import Rows
from hpc_closure.evaluate.scores import mse
from hpc_closure.evaluate.statistics import Statistics, form_scores

# a block's float64 ensemble; the scores hold a few copies of it at a time
BLOCK_BYTES = 2**27
CONTROL = 0.95

Sampler = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Law:
    """What is known exactly about p(U | y).

    Attributes:
        mean: indices (s,) -> conditional mean (s, n, n).
        variance: pointwise variance averaged over the grid: a number, or indices -> (s,).
        whiten: fields (..., n, n) -> coordinates (..., d) that are independent under the law
            (:func:`hpc_closure.evaluate.ranks.fourier_coordinates`); None = one pixel per field.
    """

    mean: Callable[[Tensor], Tensor]
    variance: float | Callable[[Tensor], Tensor] | None = None
    whiten: Callable[[Tensor], Tensor] | None = None


@dataclass
class Scored:
    """Rows, and what the figures need beside them.

    Attributes:
        rows: score rows.
        spectra: method or ``truth`` -> mean square per shell (shells,).
        spread_spectra: ensemble method -> variance over members per shell (shells,).
        ranks: ensemble method -> rank histogram (M + 1,).
        examples: ``truth`` -> (n, n); method -> (3, n, n): one member, ensemble mean, ensemble
            standard deviation (zero for a point forecast).
    """

    rows: Rows = field(default_factory=Rows)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    spread_spectra: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, Tensor] = field(default_factory=dict)
    examples: dict[str, Tensor] = field(default_factory=dict)

    def keep_example(self, method: str, ensemble: Tensor) -> None:
        """Keep one member, mean and standard deviation of an ensemble (M, n, n)."""
        std = ensemble.std(0) if len(ensemble) > 1 else torch.zeros_like(ensemble[0])
        self.examples[method] = torch.stack((ensemble[0], ensemble.mean(0), std)).cpu()

    def keep_spectra(self, method: str, statistics: Statistics) -> None:
        """Keep the mean spectra of a method."""
        shells = statistics.joined("shells")
        self.spectra[method] = shells["energy"].mean(0)
        self.spectra["truth"] = shells["truth_energy"].mean(0)
        if statistics.members > 1:
            self.spread_spectra[method] = shells["variance"].mean(0)


def score_generated(
    truth: Any,
    samplers: Mapping[str, Sampler],
    labels: Mapping[str, Any],
    *,
    members: int,
    trajectories: Tensor | None = None,
    law: Law | None = None,
    method_labels: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    block_bytes: int = BLOCK_BYTES,
) -> Scored:
    """Score samples of the closure.

    Args:
        truth: (S, n, n) true closures; a tensor, an array or an HDF5 data set (sliced by blocks).
        samplers: method -> ``sample(indices, members)``, indices (s,) into ``truth``; returns
            (members, s, n, n), or (1, s, n, n) for a point forecast. ``oracle`` is the reference
            of the ratios.
        labels: columns of every row: ``closure`` and what else applies (``sensors``, ``split``).
        members: ensemble size asked for.
        trajectories: (S,) trajectory of each snapshot; None = each its own.
        law: the exact law, where there is one.
        method_labels: further columns of single methods, e.g. ``{"model": {"evaluations": 2}}``.
        seed: of ties, rank coordinates and bootstrap.
        block_bytes: bound on one ensemble in memory.
    """
    num_samples, size = int(truth.shape[0]), int(truth.shape[-1])
    if num_samples == 0:
        raise ValueError("there are no held-out snapshots to score; see train.split and window")
    blocks = torch.arange(num_samples) if trajectories is None else torch.as_tensor(trajectories)
    if blocks.shape != (num_samples,):
        raise ValueError(f"trajectories {tuple(blocks.shape)} for {num_samples} snapshots")
    step = max(1, block_bytes // (8 * members * size * size))
    ties, chooser = (torch.Generator().manual_seed(2 * seed + i) for i in range(2))
    statistics: dict[str, Statistics] = {}
    counts: dict[str, Tensor] = {}
    costs: dict[str, list[float]] = {}
    floors, variances = [], []
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
        picks = None
        if start == 0:
            scored.examples["truth"] = block[0].cpu()

        for method, ensemble, seconds in _ensembles(samplers, indices, members, mean):
            if ensemble.shape[1:] != block.shape:
                raise ValueError(
                    f"{method} returned {tuple(ensemble.shape)} for {len(indices)} states; "
                    f"expected (members, {len(indices)}, {size}, {size})"
                )
            y = block.to(ensemble.device)
            num = len(ensemble)
            statistics.setdefault(method, Statistics()).add(ensemble, y, floor)
            if seconds is not None:
                costs.setdefault(method, []).append(1e3 * seconds / (num * len(indices)))
            if num > 1:
                x, y = _coordinates(law, ensemble), _coordinates(law, y)
                if picks is None:  # the same coordinates for every method
                    picks = _pick(x.shape[-1], len(indices), num_samples, law, chooser)
                drawn = ranks(_take(x, picks), _take(y, picks), ties)
                histogram = rank_counts(drawn, num)
                counts[method] = counts.get(method, torch.zeros_like(histogram)) + histogram
            if start == 0:
                scored.keep_example(method, ensemble[:, 0])

    common = {"stage": "generated", "grid": size, **labels}
    reference = statistics.get("oracle")
    for method, parts in statistics.items():
        own = {**common, **(method_labels or {}).get(method, {}), "method": method}
        for columns in form_scores(parts, blocks, reference):
            scored.rows.add(**own, **columns)
        sizes = {"members": parts.members, "samples": num_samples}
        if method in counts:
            scored.ranks[method] = counts[method]
            p = rank_p(counts[method])
            if p == p:
                scored.rows.add(**own, score="rank_p", value=p, **sizes)
        if method in costs:
            cost = torch.tensor(costs[method]).median()
            scored.rows.add(**own, score="cost_ms", value=cost, **sizes)
        scored.keep_spectra(method, parts)
    if law is not None:
        own = {**common, "method": "oracle", "samples": num_samples}
        energy = next(iter(statistics.values())).joined("total")["truth_energy"].mean()
        realised = (torch.cat(floors).mean() / energy).sqrt()
        scored.rows.add(**own, score="floor_realised", value=realised)
        if variances:
            scored.rows.add(
                **own, score="floor", value=(torch.cat(variances).mean() / energy).sqrt()
            )
    return scored


def _ensembles(
    samplers: Mapping[str, Sampler], indices: Tensor, members: int, mean: Tensor | None
):
    """Yield (method, ensemble float64, seconds), the control after the oracle."""
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


def _coordinates(law: Law | None, fields: Tensor) -> Tensor:
    if law is not None and law.whiten is not None:
        return law.whiten(fields)
    return fields.flatten(-2)


def _pick(
    dimensions: int, here: int, samples: int, law: Law | None, generator: torch.Generator
) -> Tensor:
    """Coordinates ranked for each snapshot, (s, q): enough for MAX_RANKS in all, one if pixels."""
    whitened = law is not None and law.whiten is not None
    num = min(dimensions, max(1, round(MAX_RANKS / samples))) if whitened else 1
    return torch.rand(here, dimensions, generator=generator).argsort(-1)[:, :num]


def _take(coordinates: Tensor, picks: Tensor) -> Tensor:
    """Gather (..., s, d) at picks (s, q) -> (..., s, q)."""
    picks = picks.to(coordinates.device).expand(*coordinates.shape[:-1], picks.shape[-1])
    return coordinates.gather(-1, picks)
