r"""Score extremes and small patches of fields, which scores of points or fields do not see.

Patches of ``SIDE`` points a side tile the periodic square, in one dimension the line. The CRPS of
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

import torch
from torch import Tensor

from hpc_closure.closure.fields.losses import check_ensemble, crps, energy_score
from hpc_closure.evaluate.scores.record import Score

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


def side_of(size: int) -> int | None:
    """Return the largest side up to SIDE, at least 2, that divides ``size``; None without one."""
    return next((side for side in range(SIDE, 1, -1) if size % side == 0), None)


def left_out(size: int) -> str:
    """Return why fields of ``size`` points a side have no scores of patches; "" if they have."""
    if side_of(size) is not None:
        return ""
    return f"patches are not scored on {size}^2: no side from 2 to {SIDE} divides {size}"


def cut(fields: Tensor, side: int = SIDE) -> Tensor:
    """Cut fields (..., n, n) into patches without overlap, (..., rows, side, columns, side).

    In one dimension (..., 1, n) a patch has one row.

    Raises:
        ValueError: ``side`` does not divide the number of points.
    """
    rows, columns = fields.shape[-2:]
    height = min(side, rows)
    if side < 1 or rows % height or columns % side:
        raise ValueError(
            f"patches of side {side} do not tile fields of {rows} x {columns} points: choose a "
            "side that divides both"
        )
    return fields.unflatten(-1, (-1, side)).unflatten(-3, (-1, height))


def extremes(fields: Tensor, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Find least and largest value of each patch of fields (..., n, n); (..., patches) each.

    Both are NaN for a patch with a value that is not finite.
    """
    parts = cut(fields, side)
    least, largest = (
        values.flatten(-2) for values in (parts.amin((-3, -1)), parts.amax((-3, -1)))
    )
    lost = ~(least.isfinite() & largest.isfinite())
    return least.masked_fill(lost, torch.nan), largest.masked_fill(lost, torch.nan)


def threshold(reference: Tensor, side: int = SIDE, quantile: float = QUANTILE) -> float:
    """Compute the quantile of patch maxima over reference fields (..., n, n), units of fields.

    The reference must not contain the ensembles that are judged. Patches with a value that is not
    finite are left out.

    Raises:
        ValueError: no patch of the reference is finite.
    """
    values = extremes(reference, side)[1].flatten()
    values = values[values.isfinite()].sort().values
    if not len(values):
        raise ValueError(f"no patch of the reference {tuple(reference.shape)} has finite values")
    place = quantile * (len(values) - 1)
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return float(values[below] + (place - below) * (values[above] - values[below]))


def threshold_of(reference: Tensor | None) -> float | None:
    """Return :func:`threshold` with the side for these fields; None without fields or side."""
    side = None if reference is None else side_of(reference.shape[-1])
    return None if reference is None or side is None else threshold(reference.double(), side)


# ---- values per sample --------------------------------------------------------------------------


def patch_max_crps(ensemble: Tensor, truth: Tensor, side: int = SIDE) -> Tensor:
    """Compute the fair CRPS of patch maxima, mean over patches: (M, S, n, n), (S, n, n) -> (S,).

    In units of the truth, as all CRPS.
    """
    check_ensemble(ensemble, truth)
    return crps(extremes(ensemble, side)[1], extremes(truth, side)[1])


def patch_min_crps(ensemble: Tensor, truth: Tensor, side: int = SIDE) -> Tensor:
    """Compute the same of patch minima: (M, S, n, n), (S, n, n) -> (S,)."""
    check_ensemble(ensemble, truth)
    return crps(extremes(ensemble, side)[0], extremes(truth, side)[0])


def field_max_crps(ensemble: Tensor, truth: Tensor) -> Tensor:
    """Compute the fair CRPS of the field's maximum: (M, S, n, n), (S, n, n) -> (S,)."""
    check_ensemble(ensemble, truth)
    return crps(ensemble.amax((-2, -1)), truth.amax((-2, -1)))


def patch_energy_score(ensemble: Tensor, truth: Tensor, side: int = SIDE) -> Tensor:
    """Compute the fair energy score, mean over patches: (M, S, n, n), (S, n, n) -> (S,).

    The norm is the root mean square over the points of a patch, as that of the energy score of
    fields is over the grid. Units of the truth.
    """
    check_ensemble(ensemble, truth)
    members = len(ensemble)

    def points(fields: Tensor) -> Tensor:
        return cut(fields, side).transpose(-3, -2).flatten(-2).flatten(-3, -2)

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
    return _events(extremes(ensemble, side)[1], extremes(truth, side)[1], above)


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
    side = side_of(truth.shape[-1])
    if side is None:
        return found
    (low, high), (true_low, true_high) = (extremes(part, side) for part in (ensemble, truth))
    found["patch_max_crps"], found["patch_min_crps"] = crps(high, true_high), crps(low, true_low)
    found["patch_energy_score"] = patch_energy_score(ensemble, truth, side)
    if above is not None:
        names = ("exceedance_brier", "exceedance_forecast", "exceedance_truth")
        found |= dict(zip(names, _events(high, true_high, above), strict=True))
    return found
