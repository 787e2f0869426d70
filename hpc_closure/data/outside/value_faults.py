"""Faults that the values show: missing ones, wrong boundaries, spectra, members, drift."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from hpc_closure.data.outside.sample import Sample
from hpc_closure.experiment.sources.faults import Fault
from hpc_closure.experiment.sources.formats import SIDES
from hpc_closure.experiment.sources.source import CLOSURE, STATE, variable_of

if TYPE_CHECKING:
    from hpc_closure.experiment.schema import Experiment

LARGE = 1e15  # numbers beyond are those that stand for missing values
STANDINS = (-999.0, -9999.0, -32767.0, -32768.0, 32767.0)
JUMP = 2.0  # a jump at the boundary, over the largest step inside, that is no accident
BEYOND = 1e-3  # share of variance beyond the retained modes
RISE = 2.0  # last shells over the smallest before
FEW_VALUES = 0.1  # different values over points
ALIKE = 0.95  # correlation of two members
FRACTION_LONG = float(np.exp(-1))
DRIFT, CERTAIN = 0.1, 3.0  # relative change, and standard errors that it exceeds
ENOUGH_MEMBERS = 8
CHUNK, CHUNK_BYTES = 16, 2**20  # size of a chunk over that of a snapshot; least bytes


def faults(sample: Sample, experiment: "Experiment") -> Iterator[Fault]:
    """Yield the faults of the values of a sample; missing values alone if there are any."""
    missing = list(_missing(sample))
    yield from missing
    if missing:
        return
    constant = list(_constant(sample))
    yield from constant
    if any(one.code == "CONSTANT" for one in constant):
        return
    alike, edges, coarse = (list(each(sample)) for each in (_members, _boundaries, _precision))
    yield from (*alike, *edges, *coarse)
    yield from _closure(sample, experiment)
    if not (edges or coarse):  # which a spectrum shows as small scales
        yield from _spectra(sample)
    if not alike:
        yield from _drift(sample)
    yield from _number(sample, experiment)
    yield from _chunks(sample)


def _missing(sample: Sample) -> Iterator[Fault]:
    """Yield values that are not finite, with member and first time, and stand-ins for missing."""
    source = sample.source
    last = len(source.times) - 1
    for name, values in sample.fields.items():
        bad: dict[int, int] = {}
        finite = np.isfinite(values).reshape(len(values), 2, -1).all(-1)
        for member, time, ok in zip(sample.members.tolist(), sample.times.tolist(), finite):
            if not ok.all():
                at = time + int(ok.argmin())
                bad[member] = min(bad.get(member, at), at)
        for member in sample.further:
            if member not in bad and not np.isfinite(sample.one(name, member, last)).all():
                bad[member] = last
        skipped = set(source.data.skip)
        bad = {member: time for member, time in bad.items() if member not in skipped}
        if bad:
            member = min(bad)
            since = _since(sample, name, member, bad[member])
            rest = f" (and {len(bad) - 1} further members)" if len(bad) > 1 else ""
            yield Fault(
                "NOT_FINITE",
                f"{name} of member {member} has NaN or Inf since time {since} of {last + 1} "
                f"(t = {source.times[since]:g}){rest}",
                "finite numbers",
                f"leave the member out by data.skip=[{', '.join(map(str, sorted(bad)))}], or "
                "store fewer times",
            )
        known = np.isfinite(values)
        shown = np.where(known, values, 0.0)
        size = float(np.abs(shown).max())
        stand = [one for one in STANDINS if (shown == one).sum() > 1]
        if size > LARGE or stand:
            worst = stand[0] if stand else float(shown.ravel()[np.abs(shown).argmax()])
            yield Fault(
                "FILL_VALUE",
                f"{name} holds {worst:g}, with a median size of {np.median(np.abs(shown)):.3g}",
                "no stand-ins for missing values",
                "a periodic box has no gaps: name another variable, or mend the files",
            )


def _since(sample: Sample, name: str, member: int, bad: int) -> int:
    """Return the first time at which a member is not finite, if it stays so (bisection)."""
    low, high = -1, bad
    while high - low > 1:
        middle = (low + high) // 2
        if np.isfinite(sample.one(name, member, middle)).all():
            low = middle
        else:
            high = middle
    return high


def _constant(sample: Sample) -> Iterator[Fault]:
    sides = tuple(range(3, sample.state.ndim))
    for name, values in sample.fields.items():
        for number, channel in enumerate(sample.channels):
            field = values[:, :, number]
            spread = float(field.std())
            if spread <= 1e-12 * float(np.abs(field).max()):
                yield Fault(
                    "CONSTANT",
                    f"{name} {channel} is {field.flat[0]:g} everywhere",
                    "a field that varies",
                    "name another variable",
                )
    same = (sample.state[:, 0] == sample.state[:, 1]).all(axis=tuple(range(1, 1 + len(sides) + 1)))
    if same.any():
        at = int(same.argmax())
        yield Fault(
            "REPEATED",
            f"member {sample.members[at]} has equal states at times {sample.times[at]} and "
            f"{sample.times[at] + 1} ({int(same.sum())} of {len(same)} pairs)",
            "states that change",
            "store a state once per time, or raise data.stride",
        )


def _members(sample: Sample) -> Iterator[Fault]:
    source = sample.source
    middle = len(source.times) // 2
    chosen = [one for one in sample.further if one not in source.data.skip]
    if len(chosen) < 2:
        return
    seen: dict[bytes, int] = {}
    flat: list[np.ndarray] = []
    for member in chosen:
        state = sample.one(STATE, member, middle)
        key = state.tobytes()
        if key in seen:
            yield Fault(
                "SAME_MEMBERS",
                f"members {seen[key]} and {member} are equal",
                "independent members",
                f"leave one out by data.skip=[{member}], and give each run a seed of its own",
            )
            return
        seen[key] = member
        if len(flat) < 4:
            flat.append((state - state.mean()).ravel().astype(np.float64))
    first, *others = flat
    alike = [
        float(first @ one / np.sqrt((first @ first) * (one @ one) + 1e-300)) for one in others
    ]
    if max(alike) > ALIKE:
        yield Fault(
            "MEMBERS_ALIKE",
            f"members {chosen[0]} and {chosen[1 + int(np.argmax(alike))]} correlate by "
            f"{max(alike):.3g} at time {middle}",
            "independent members",
            "let members run apart before they are stored",
        )


def _boundaries(sample: Sample) -> Iterator[Fault]:
    """Compare the step across the boundary with those between neighbours, side by side."""
    for number, channel in enumerate(sample.channels):
        field = sample.state[:, 0, number]
        for axis in range(1, field.ndim):
            lines = np.moveaxis(field, axis, 0).reshape(field.shape[axis], -1)
            inside = np.sqrt((np.diff(lines, axis=0) ** 2).mean(1))
            across = float(np.sqrt(((lines[0] - lines[-1]) ** 2).mean()))
            side, typical = SIDES[axis - 1], float(np.median(inside))
            if across <= 1e-6 * typical:
                yield Fault(
                    "ENDPOINT",
                    f"{channel}: the last point of {side} equals the first, neighbours differ by "
                    f"{typical:.3g}",
                    "each point of the periodic box once",
                    "leave out the last point of each side before it is stored",
                )
                return
            if across > JUMP * float(inside.max()):
                yield Fault(
                    "NOT_PERIODIC",
                    f"{channel} jumps by {across:.3g} from the last point of {side} to the first, "
                    f"neighbours differ by at most {inside.max():.3g}",
                    "a periodic box",
                    "store the whole box; walls and cut-outs cannot be used",
                )
                return


def _closure(sample: Sample, experiment: "Experiment") -> Iterator[Fault]:
    if sample.closure is None:
        return
    difference = float(((sample.closure - sample.state) ** 2).mean())
    if difference <= 1e-12 * float((sample.state**2).mean()):
        yield Fault(
            "CLOSURE_IS_STATE",
            "the closure equals the state",
            "what the reduced solver's tendency lacks",
            "name another variable in data.closure",
        )
        return
    data, spacing = experiment.data, sample.source.times[1] - sample.source.times[0]
    assert data is not None
    anomaly = sample.closure - sample.closure.mean((0, 1))
    now, later = anomaly[:, 0], anomaly[:, 1]
    same = float((now * later).mean() / np.sqrt((now**2).mean() * (later**2).mean()))
    interval = experiment.generate.closure_interval
    left = max(same, 1e-9) ** (interval / spacing)
    if len(now) >= 4 and left < FRACTION_LONG:
        yield Fault(
            "INTERVAL_LONG",
            f"closures one interval ({interval:.4g}) apart correlate by {left:.2g}",
            f"at least {FRACTION_LONG:.2g}, so that a closure can stand for its interval",
            "shorten data.interval, unless the closure is a mean over it, or accept it",
        )


def spectrum(fields: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the mean square per mode in shells of max |k|, and the share beyond the retained.

    Args:
        fields: (B, *points).
    """
    sides, n = fields.ndim - 1, fields.shape[-1]
    power = (np.abs(np.fft.fftn(fields, axes=range(1, 1 + sides))) ** 2).mean(0)
    waves = np.abs(np.fft.fftfreq(n, 1 / n))
    shell = np.max(np.meshgrid(*[waves] * sides, indexing="ij"), axis=0).astype(int)
    power.flat[0] = 0.0
    number = np.bincount(shell.ravel())
    total = np.bincount(shell.ravel(), power.ravel())
    retained = (n - 1) // 3
    return total / number, float(total[retained + 1 :].sum() / max(total.sum(), 1e-300))


def _spectra(sample: Sample) -> Iterator[Fault]:
    retained = (sample.source.points[0] - 1) // 3
    raw = sample.source.data.closure == {}
    for number, channel in enumerate(sample.channels):
        density, beyond = spectrum(sample.state[:, 0, number])
        if not raw and beyond > BEYOND:
            yield Fault(
                "NOT_FILTERED",
                f"{channel}: {100 * beyond:.2g} % of the variance is beyond wavenumber "
                f"{retained}, which a solver on this grid does not retain (2/3 rule)",
                f"at most {100 * BEYOND:g} %",
                "filter the state before it is stored, or accept it: these modes are cut off",
            )
        end = retained if density[retained + 1 :].sum() <= BEYOND * density.sum() else None
        end = len(density) - 2 if end is None else end
        low = density[max(1, end // 3) : end - 1]
        tail = density[max(1, end - 1) : end + 1].mean()
        if len(low) and low.min() > 0 and tail > RISE * low.min():
            yield Fault(
                "PILE_UP",
                f"{channel}: the spectrum at wavenumber {end} is {tail / low.min():.3g} times its "
                "minimum before",
                "a spectrum that falls",
                "resolve the dissipation, or accept it",
            )


def _precision(sample: Sample) -> Iterator[Fault]:
    for number, channel in enumerate(sample.channels):
        field = sample.state[0, 0, number]
        different = len(np.unique(field))
        if field.size >= 256 and different < FEW_VALUES * field.size:
            yield Fault(
                "LOW_PRECISION",
                f"{channel} has {different} different values on {field.size} points "
                f"({sample.source.dtype})",
                "float32 or float64",
                "store it with more digits, or accept it",
            )


def _drift(sample: Sample) -> Iterator[Fault]:
    third = len(sample.times) // 3
    if third < 4:
        return
    order = np.argsort(sample.times, kind="stable")
    for number, channel in enumerate(sample.channels):
        field = sample.state[order, 0, number].reshape(len(order), -1)
        scale = float(np.sqrt((field**2).mean()))
        for what, series, size in (
            ("mean", field.mean(1), scale),
            ("mean square", (field**2).mean(1), scale**2),
        ):
            early, late = series[:third], series[-third:]
            change = float(late.mean() - early.mean()) / size
            error = float(np.sqrt((early.var() + late.var()) / third)) / size
            if abs(change) > max(DRIFT, CERTAIN * error):
                yield Fault(
                    "DRIFT",
                    f"{channel}: its {what} changes by {100 * change:+.3g} % of its size from the "
                    "first third of the times to the last",
                    "a stationary flow",
                    "store later times only, or accept it",
                )
                break


def _number(sample: Sample, experiment: "Experiment") -> Iterator[Fault]:
    data, source = experiment.data, sample.source
    assert data is not None and data.found is not None
    number = (source.members - len(data.skip)) * data.found.parts
    if number < ENOUGH_MEMBERS:
        yield Fault(
            "FEW_MEMBERS",
            f"{number} trajectories",
            f"at least {ENOUGH_MEMBERS}, of which some are for validation and test",
            "add members, or a longer run, which is divided (data.parts)",
        )
    found = data.found
    if found.parts > 1:
        from hpc_closure.experiment.sources.parts import correlation_time, length_of_part

        length = length_of_part(found.times, found.parts, found.gap)
        least = 4 * correlation_time(source)
        if length < least:
            yield Fault(
                "PARTS_SHORT",
                f"parts of {length} stored times, the correlation time is {least / 4:.3g}",
                f"at least {least:.3g}",
                "lower data.parts, or add a longer run",
            )


def _chunks(sample: Sample) -> Iterator[Fault]:
    source = sample.source
    snapshot = int(np.prod(source.points))
    for name, references in source.fields.items():
        for reference in references.values():
            variable = variable_of(source.file(source.paths[0]), reference.name)
            chunk = int(np.prod(variable.chunk)) if variable.chunk else 0
            size = chunk * variable.dtype.itemsize
            if chunk > CHUNK * snapshot and size > CHUNK_BYTES:
                yield Fault(
                    "LARGE_CHUNKS",
                    f"{reference.name} is stored in chunks of {size / 2**20:.3g} MiB, a snapshot "
                    f"has {snapshot * variable.dtype.itemsize / 2**20:.2g}",
                    f"chunks of at most {CHUNK} snapshots",
                    "store it in smaller chunks, or raise train.memory_gib to hold all",
                )
                return


__all__ = ["faults", "spectrum", "CLOSURE"]
