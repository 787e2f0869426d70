r"""Score extremes and small patches of fields, which scores of points or fields do not see.

Patches of ``SIDE`` points a side tile the periodic square, line or cube. The CRPS of
a point does not depend on how values are joined, and the energy score of a field of many points
depends on little more than their variances: distances of independent fields concentrate. A
Gaussian ensemble with the variance of rare events has nearly the same energy score as the events
themselves; the largest value of a patch separates both.

    CRPS of maxima        fair CRPS of the largest value of each patch, mean over patches
    energy of patches     fair energy score of the values of a patch (rms norm), mean over patches
    exceedance            event: the largest value of a patch is above a threshold, the 99 %
                          quantile over patches of reference fields that no method has drawn
    fair Brier score      (p - o)^2 - p (1 - p) / (M - 1), with p the share of members
    reliability           mean of p over the frequency of the event

The fair Brier score is the fair CRPS of the event's indicator. Sources: Ferro, Q. J. R. Meteorol.
Soc. 140 (2014) 1917; Scheuerer and Hamill, Mon. Wea. Rev. 143 (2015) 1321 (the energy score does
not discriminate between dependences in many dimensions).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hpc_closure.closure.fields.losses import check_ensemble, crps, energy_score
from hpc_closure.evaluate.scores.record import Score
from hpc_closure.spectral.modes.resolution import alike, per_side

SIDE = 4
QUANTILE = 0.99  # of patch maxima; above it is the event
# distances between members that are computed at once: on a CPU more exceed its caches
PAIR_VALUES = {"cpu": 2**17, "cuda": 2**23}
TABLE = "Extremes and patches"
LARGEST = f"largest value of a patch of {SIDE} points a side"
OTHERWISE = "3 or 2 where the grid has no multiple"
LAW = "a reference ensemble (``oracle``)"
THRESHOLD = f"the {100 * QUANTILE:g} % quantile of that value"

# statistics per sample, read by the formulas below
STATISTICS = {
    "patch_max_crps": "fair CRPS of the largest value of a patch, mean over patches",
    "patch_min_crps": "the same of the least value",
    "field_max_crps": "fair CRPS of the largest value of the field",
    "patch_energy_score": "fair energy score of a patch, mean over patches",
    "exceedance_brier": "fair Brier score of the event that a patch exceeds the threshold",
    "exceedance_forecast": "probability of that event, mean over patches",
    "exceedance_truth": "share of patches with that event",
}
SCORES = (
    Score(
        name="patch_max_crps",
        heading="patch maxima",
        meaning=f"fair CRPS of the {LARGEST} ({OTHERWISE}), mean over patches",
        table=TABLE,
        needs=("patch_max_crps",),
        formula=lambda s, m: s["patch_max_crps"],
        by_lead_time=True,
    ),
    Score(
        name="patch_max_crps_ratio",
        heading="patch maxima, ratio",
        meaning="CRPS of patch maxima over that of the exact law (or true ensemble); 1 is the "
        "best possible",
        table=TABLE,
        requires=LAW,
        needs=("patch_max_crps", "reference_patch_max_crps"),
        formula=lambda s, m: s["patch_max_crps"] / s["reference_patch_max_crps"],
    ),
    Score(
        name="patch_min_crps",
        heading="patch minima",
        meaning="the same of the least value of a patch",
        table=TABLE,
        needs=("patch_min_crps",),
        formula=lambda s, m: s["patch_min_crps"],
    ),
    Score(
        name="field_max_crps",
        heading="field maximum",
        meaning="the same of the largest value of the field",
        table=TABLE,
        needs=("field_max_crps",),
        formula=lambda s, m: s["field_max_crps"],
    ),
    Score(
        name="patch_energy_score",
        heading="energy of patches",
        meaning="fair energy score of the values of a patch, mean over patches",
        table=TABLE,
        needs=("patch_energy_score",),
        formula=lambda s, m: s["patch_energy_score"],
    ),
    Score(
        name="patch_energy_score_ratio",
        heading="energy of patches, ratio",
        meaning="energy score of patches over that of the exact law (or true ensemble)",
        table=TABLE,
        requires=LAW,
        needs=("patch_energy_score", "reference_patch_energy_score"),
        formula=lambda s, m: s["patch_energy_score"] / s["reference_patch_energy_score"],
    ),
    Score(
        name="exceedance_brier",
        heading="exceedance, Brier score",
        meaning=f"fair Brier score of the event that the {LARGEST} is above {THRESHOLD} in "
        "training closures (generated) or in the truth over all lead times (coupled)",
        table=TABLE,
        needs=("exceedance_brier",),
        formula=lambda s, m: s["exceedance_brier"],
    ),
    Score(
        name="exceedance_reliability",
        heading="exceedance, probability / frequency",
        meaning="mean forecast probability of that event over its frequency; 1 is calibrated",
        table=TABLE,
        requires="the event happened",
        needs=("exceedance_forecast", "exceedance_truth"),
        formula=lambda s, m: reliability(s["exceedance_forecast"], s["exceedance_truth"]),
    ),
)


# ---- patches ------------------------------------------------------------------------------------


def side_of(*points: int) -> int | None:
    """Return the largest side up to SIDE, at least 2, that divides ``points``; None without one.

    Args:
        points: points per side, or of one side for equal sides.
    """
    sides = range(SIDE, 1, -1)
    return next((side for side in sides if not any(size % side for size in points)), None)


def left_out(size: Any, dimensions: int = 2) -> str:
    """Return why fields of ``size`` points a side have no scores of patches; "" if they have.

    ``size`` is a tuple if sides have different numbers.
    """
    points = per_side(size, dimensions)
    if side_of(*points) is not None:
        return ""
    grid = f"{size}^{dimensions}" if dimensions > 1 else f"{size} points"
    grid = grid if alike(points) == points[0] else " x ".join(map(str, points))
    numbers = " and ".join(map(str, dict.fromkeys(points)))
    return f"patches are not scored on {grid}: no side from 2 to {SIDE} divides {numbers}"


def cut(fields: Tensor, side: int = SIDE, dimensions: int = 2) -> Tensor:
    """Cut fields (..., n, n) into patches without overlap, (..., rows, side, columns, side).

    Fields of other numbers of sides have such a pair of axes for each side.

    Raises:
        ValueError: ``side`` does not divide the number of points.
    """
    points = fields.shape[-dimensions:]
    if side < 1 or any(size % side for size in points):
        raise ValueError(
            f"patches of side {side} do not tile fields of {' x '.join(map(str, points))} points: "
            f"choose a side that divides {'both' if dimensions == 2 else 'all of them'}"
        )
    for axis in range(-1, -1 - 2 * dimensions, -2):
        fields = fields.unflatten(axis, (-1, side))
    return fields


def extremes(fields: Tensor, side: int = SIDE, dimensions: int = 2) -> tuple[Tensor, Tensor]:
    """Find least and largest value of each patch of fields (..., n, n); (..., patches) each.

    Both are NaN for a patch with a value that is not finite.
    """
    parts = cut(fields, side, dimensions)
    inside = tuple(range(1 - 2 * dimensions, 0, 2))
    least, largest = (
        values.flatten(-dimensions) for values in (parts.amin(inside), parts.amax(inside))
    )
    lost = ~(least.isfinite() & largest.isfinite())
    return least.masked_fill(lost, torch.nan), largest.masked_fill(lost, torch.nan)


def threshold(
    reference: Tensor, side: int = SIDE, quantile: float = QUANTILE, dimensions: int = 2
) -> float:
    """Compute the quantile of patch maxima over reference fields (..., n, n), units of fields.

    The reference must not contain the ensembles that are judged. Patches with a value that is not
    finite are left out.

    Raises:
        ValueError: no patch of the reference is finite.
    """
    values = extremes(reference, side, dimensions)[1].flatten()
    values = values[values.isfinite()].sort().values
    if not len(values):
        raise ValueError(f"no patch of the reference {tuple(reference.shape)} has finite values")
    place = quantile * (len(values) - 1)
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return float(values[below] + (place - below) * (values[above] - values[below]))


def threshold_of(reference: Tensor | None, dimensions: int = 2) -> float | None:
    """Return :func:`threshold` with the side for these fields; None without fields or side."""
    side = None if reference is None else side_of(*reference.shape[-dimensions:])
    if reference is None or side is None:
        return None
    return threshold(reference.double(), side, dimensions=dimensions)


# ---- values per sample --------------------------------------------------------------------------


def patch_max_crps(ensemble: Tensor, truth: Tensor, side: int = SIDE) -> Tensor:
    """Compute the fair CRPS of patch maxima, mean over patches: (M, S, n, n), (S, n, n) -> (S,).

    In units of the truth, as all CRPS.
    """
    check_ensemble(ensemble, truth)
    x, y = (_extremes(fields, truth, side)[1] for fields in (ensemble, truth))
    return crps(x, y)


def patch_min_crps(ensemble: Tensor, truth: Tensor, side: int = SIDE) -> Tensor:
    """Compute the same of patch minima: (M, S, n, n), (S, n, n) -> (S,)."""
    check_ensemble(ensemble, truth)
    x, y = (_extremes(fields, truth, side)[0] for fields in (ensemble, truth))
    return crps(x, y)


def field_max_crps(ensemble: Tensor, truth: Tensor) -> Tensor:
    """Compute the fair CRPS of the field's maximum: (M, S, n, n), (S, n, n) -> (S,)."""
    check_ensemble(ensemble, truth)
    sides = tuple(range(1 - truth.ndim, 0))
    return crps(ensemble.amax(sides), truth.amax(sides))


def patch_energy_score(ensemble: Tensor, truth: Tensor, side: int = SIDE) -> Tensor:
    """Compute the fair energy score, mean over patches: (M, S, n, n), (S, n, n) -> (S,).

    The norm is the root mean square over the points of a patch, as that of the energy score of
    fields is over the grid. Units of the truth.
    """
    check_ensemble(ensemble, truth)
    members, sides = len(ensemble), truth.ndim - 1

    def points(fields: Tensor) -> Tensor:
        parts, lead = cut(fields, side, sides), fields.ndim - sides
        patches = [lead + 2 * axis for axis in range(sides)]
        parts = parts.permute(*range(lead), *patches, *(axis + 1 for axis in patches))
        return parts.flatten(-sides).flatten(lead, -2)

    patches = points(truth[:1]).shape[-2]
    at_once = max(1, PAIR_VALUES[truth.device.type] // (patches * members**2))
    out = []
    for first in range(0, len(truth), at_once):
        here = slice(first, first + at_once)
        x, y = points(ensemble[:, here]), points(truth[here])
        score = energy_score(x.flatten(1, 2), y.flatten(0, 1))
        out.append(score.unflatten(0, y.shape[:2]).mean(1))
    return torch.cat(out)


def exceedance(
    ensemble: Tensor, truth: Tensor, above: float, side: int = SIDE
) -> tuple[Tensor, Tensor, Tensor]:
    """Score the event that a patch's maximum is above a threshold; three means over patches (S,).

    Args:
        ensemble: (M, S, n, n).
        truth: (S, n, n).
        above: threshold, see :func:`threshold`.
        side: points per side of a patch.

    Returns:
        Fair Brier score, probability (share of members) and frequency of the event; NaN if a
        value is not finite.
    """
    check_ensemble(ensemble, truth)
    x, y = (_extremes(fields, truth, side)[1] for fields in (ensemble, truth))
    return _events(x, y, above)


def _extremes(fields: Tensor, truth: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Find the extremes of fields with the sides of the truth (S, ...)."""
    return extremes(fields, side, truth.ndim - 1)


def _events(ensemble: Tensor, truth: Tensor, above: float) -> tuple[Tensor, Tensor, Tensor]:
    """Score the event for patch maxima (M, S, patches) and (S, patches)."""
    x, y = (
        (values > above).to(values.dtype).masked_fill(values.isnan(), torch.nan)
        for values in (ensemble, truth)
    )
    return crps(x, y), x.mean((0, -1)), y.mean(-1)


def reliability(forecast: Tensor, frequency: Tensor) -> Tensor:
    """Divide the mean probability of an event by its frequency; NaN if it never happened."""
    return torch.where(frequency > 0, forecast / frequency, torch.nan)


def statistics(
    ensemble: Tensor, truth: Tensor, above: float | None = None
) -> Mapping[str, Tensor]:
    """Compute the STATISTICS of ensemble (M, S, n, n) and truth (S, n, n), (S,) each.

    Args:
        ensemble: (M, S, n, n).
        truth: (S, n, n).
        above: threshold of the event; without it there are no statistics of the event. Neither
            these nor those of patches exist if no side divides the number of points.
    """
    found = {"field_max_crps": field_max_crps(ensemble, truth)}
    side = side_of(*truth.shape[1:])
    if side is None:
        return found
    (low, high), (true_low, true_high) = (
        _extremes(part, truth, side) for part in (ensemble, truth)
    )
    found["patch_max_crps"], found["patch_min_crps"] = crps(high, true_high), crps(low, true_low)
    found["patch_energy_score"] = patch_energy_score(ensemble, truth, side)
    if above is not None:
        names = ("exceedance_brier", "exceedance_forecast", "exceedance_truth")
        found |= dict(zip(names, _events(high, true_high, above), strict=True))
    return found
