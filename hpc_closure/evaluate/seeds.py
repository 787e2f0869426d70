"""One row of several trainings that differ in their seed alone (``evaluate.seeds``).

Each of them is scored as a method of its own, ``name#1`` and so on. The row ``name`` has the mean
over them, and instead of an interval the range: the least and the largest value. Of paired
differences the range is that of their intervals, so a row is better or worse when each training
is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from hpc_closure.evaluate.paired import DIFFERENCES
from hpc_closure.evaluate.rows import MARK
from hpc_closure.evaluate.statistics import Scored

KEY = ("lead_time", "shell", "score")


def one_of(name: str, number: int) -> str:
    """The method's name of one training of a row, counted from 1."""
    return f"{name}{MARK}{number}"


def join(scored: Scored, seeds: Mapping[str, Sequence[str]]) -> None:
    """Add the rows, spectra and fluxes of ``evaluate.seeds`` to what was scored.

    A row whose trainings are not all there has a note instead of numbers.
    """
    for name, runs in seeds.items():
        each = [one_of(name, number) for number in range(1, len(runs) + 1)]
        for note in [note for note in scored.absent if note.method in each]:
            reason = f"{note.method}: {note.reason}"
            scored.absent.append(replace(note, method=name, reason=reason))
        found: dict[tuple, list[dict]] = {}
        for record in scored.records:
            if record["method"] in each:
                found.setdefault(tuple(record.get(key) for key in KEY), []).append(record)
        scored.records += [
            _joined(name, records) for records in found.values() if len(records) == len(each)
        ]
        parts = [scored.spectra, scored.spread_spectra]
        for part in [*parts, *scored.fluxes.values(), *scored.work.values()]:
            if set(each) <= set(part):
                part[name] = torch.stack([part[method] for method in each]).mean(0)


def _joined(name: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record of those of each training."""
    values = [float(record["value"]) for record in records]
    ends = [(value, value) for value in values]
    if records[0]["score"] in DIFFERENCES:
        ends = [(float(record["low"]), float(record["high"])) for record in records]
    lows, highs = zip(*ends, strict=True)
    unknown = any(math.isnan(end) for end in (*lows, *highs))
    return {
        **records[0],
        "method": name,
        "value": (
            math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.inf
        ),
        "low": math.nan if unknown else min(lows),
        "high": math.nan if unknown else max(highs),
        "seeds": len(records),
    }


def shown(scored: Scored) -> Scored:
    """What report and figures show: rows for all trainings, no single ones."""

    def without(part: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in part.items() if MARK not in name}

    return replace(
        scored,
        records=[record for record in scored.records if MARK not in record["method"]],
        absent=[note for note in scored.absent if MARK not in note.method],
        spectra=without(scored.spectra),
        spread_spectra=without(scored.spread_spectra),
        fluxes={name: without(part) for name, part in scored.fluxes.items()},
        work={name: without(part) for name, part in scored.work.items()},
        ranks=without(scored.ranks),
        examples=without(scored.examples),
    )
