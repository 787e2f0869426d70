"""Faults that a reduced solver shows: sign and factor of the closure, time, length."""

from collections.abc import Callable, Iterator

import numpy as np

from hpc_closure.data.outside.sample import Sample
from hpc_closure.experiment.sources.faults import Fault

#: advances states (B, C, *points) by the closure interval, on a box of a length times the factor
Advance = Callable[[np.ndarray, float], np.ndarray]
UNRELATED = 0.3  # correlation of closure and defect
SLOPE = 0.1  # deviation of the slope from 1 that is refused
REVERSED = 0.8  # error backwards over forwards
FACTORS = (1.0, 0.5, 2.0, 1 / (2 * np.pi), 2 * np.pi, 1e-3, 1e3)
SHORTER = 0.5  # defect of another length over the own that is refused


def faults(sample: Sample, advance: Advance, ahead: float, scalable: bool) -> Iterator[Fault]:
    """Yield the faults that a reduced solver shows on the pairs of a sample.

    Args:
        sample: pairs of stored times one closure interval apart.
        advance: the reduced solver.
        ahead: closure interval.
        scalable: whether the solver can run on a box of another length.
    """
    now, later = sample.state[:, 0], sample.state[:, 1]
    with np.errstate(all="ignore"):
        forwards = later - advance(now, 1.0)
        backwards = now - advance(later, 1.0)
    ratio = _size(backwards) / max(_size(forwards), 1e-300)
    if ratio < REVERSED:
        yield Fault(
            "TIME_REVERSED",
            f"from the earlier state the solver misses the later by {_size(forwards):.3g}, from "
            f"the later the earlier by {_size(backwards):.3g}",
            "the smaller miss forwards in time",
            "reverse the stored order of the times",
        )
        return
    other_length = list(_length(now, later, advance)) if scalable else []
    yield from other_length
    if sample.closure is not None and not other_length:
        yield from _regression(forwards / ahead, sample)


def _size(values: np.ndarray) -> float:
    size = float(np.sqrt((values**2).mean()))
    return size if np.isfinite(size) else np.inf


def _length(now: np.ndarray, later: np.ndarray, advance: Advance) -> Iterator[Fault]:
    """Yield a fault if the defect is far smaller on a box of another length."""
    sizes = {}
    for factor in FACTORS:
        with np.errstate(all="ignore"):
            try:
                sizes[factor] = _size(later - advance(now, factor))
            except (ValueError, RuntimeError):  # the solver refuses this box
                continue
    best = min(sizes, key=lambda factor: sizes[factor])
    # a box so large that nothing moves has the defect of no solver at all
    still = _size(later - now)
    if best != 1.0 and sizes[best] < SHORTER * min(sizes[1.0], 0.9 * still):
        yield Fault(
            "LENGTH_UNITS",
            f"the reduced solver's defect is {sizes[1.0] / sizes[best]:.3g} times smaller on a "
            f"box {best:.4g} times as long",
            "the smallest defect for the stated length",
            f"multiply data.length by {best:.4g}, or mend units of time and state",
        )


def _regression(defect: np.ndarray, sample: Sample) -> Iterator[Fault]:
    closure = sample.closure
    assert closure is not None
    stored = closure[:, 0]
    factor = sample.source.data.closure_factor
    for number, channel in enumerate(sample.channels):
        wanted, have = defect[:, number], stored[:, number]
        power = float((have**2).mean())
        both = float((wanted * have).mean())
        related = both / np.sqrt(power * float((wanted**2).mean()) + 1e-300)
        slope = both / max(power, 1e-300)
        if not np.isfinite(related) or abs(related) < UNRELATED:
            yield Fault(
                "CLOSURE_UNRELATED",
                f"closure {channel} correlates by {related:.2g} with the defect of the reduced "
                "solver",
                "the defect, (v(t + D) - Phi v(t)) / D",
                "compare interval, time and solver with those of the closure",
            )
        elif related < 0:
            yield Fault(
                "CLOSURE_SIGN",
                f"the defect of the reduced solver is {slope:.3g} times the closure {channel}",
                "1 times",
                f"state data.closure_sign={-sample.source.data.closure_sign}",
            )
        elif abs(slope - 1) > SLOPE:
            yield Fault(
                "CLOSURE_FACTOR",
                f"the defect of the reduced solver is {slope:.4g} times the closure {channel}",
                "1 times",
                f"state data.closure_factor={slope * factor:.4g}, if the factor is known to be so",
            )
