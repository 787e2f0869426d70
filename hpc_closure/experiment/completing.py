"""Complete an experiment whose data are files of others: what they hold need not be stated.

Times count from the first stored one. What the files determine (grid, times, members, box) is
taken from them; other settings are taken from them where the experiment states none.
"""

import math
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from hpc_closure.experiment.data_section import Data
from hpc_closure.experiment.sources.faults import DataFault, refuse

if TYPE_CHECKING:
    import numpy as np

    from hpc_closure.experiment.sources.source import Source

LEADS, HORIZON = 4, 16  # lead times and stored times of a rollout that states none
# keys of generate that hold for a solver of this package, beside what the files determine
NUMERICS = ("scheme", "form", "precision")


def completed(values: dict) -> dict:
    """Return the values of an experiment with what its files hold.

    Args:
        values: tree of keys; without ``data`` it is returned as it is.

    Raises:
        DataFault: the files cannot be read as trajectories; the message is one line.
        ImportError: a library for their format is missing.
    """
    if not isinstance(values.get("data"), dict) or values["data"].get("found"):
        return values
    try:
        data = Data.model_validate(values["data"])
    except ValidationError:  # which the validation of the experiment describes
        return values
    from hpc_closure.experiment.sources.source import Source  # which opens files

    source = Source(data, _stated(values, "physics", "length"))
    try:
        return _with(values, data, source)
    finally:
        source.close()


def _with(values: dict, data: Data, source: "Source") -> dict:
    """Return the values with those of an open source."""
    from hpc_closure.experiment.sources.parts import divide

    sides = len(source.points)
    spacing = _spacing(source.times)
    parts, gap = divide(source, data)
    found = {
        "sha256": source.sha256,
        "members": source.members,
        "times": len(source.times),
        "start": float(source.times[0]),
        "spacing": spacing,
        "points": source.points[0],
        "sides": sides,
        "length": source.length,
        "parts": parts,
        "gap": gap,
    }
    if _is_external(values):
        physics = _external(values, data, source)
    else:
        physics = {**values["physics"], "length": source.length}
    steps = _steps(values, data.interval or spacing)
    generate = _generate(values, data, source, spacing, steps, parts, gap)
    data_values = {**values["data"], "path": data.patterns, "found": found}
    out = {**values, "data": data_values, "physics": physics, "generate": generate}
    return _later(out, generate, steps)


def _spacing(times: "np.ndarray") -> float:
    """Return the time between stored times, without the round-off of the times."""
    import numpy as np

    spacing = float(times[-1] - times[0]) / (len(times) - 1)
    single = np.array_equal(times.astype(np.float32).astype(np.float64), times)
    slack = (2e-7 if single else 1e-15) * float(np.abs(times).max())
    slack = max(slack / (len(times) - 1), 1e-12 * spacing)
    for digits in range(1, 16):
        rounded = float(f"{spacing:.{digits}g}")
        if abs(rounded - spacing) <= slack:
            return rounded
    return spacing


def _steps(values: dict, interval: float) -> int:
    """Return the steps of a closure interval, by ``generate.dt`` or ``generate.interval``."""
    dt = None if _is_external(values) else _stated(values, "generate", "dt")
    if not isinstance(dt, (int, float)) or not dt > 0:
        return _stated(values, "generate", "interval") or 1
    _check_multiple("data.interval", interval, dt, "generate.dt, the step of the reduced solver")
    return round(interval / dt)


def _is_external(values: dict) -> bool:
    """Whether the flow is not one of this package."""
    return _stated(values, "physics", "equation") in (None, "external")


def _external(values: dict, data: Data, source: "Source") -> dict:
    """Return section physics of a flow of others; stated kinds of its fields are taken over."""
    stated = values.get("physics") or {}
    physics = {key: stated[key] for key in ("fields", "symmetries") if key in stated}
    sides, own = _stated(values, "physics", "sides"), len(source.points)
    if sides not in (None, own):
        names = list(data.state.values())
        raise refuse(
            "SIDES_DIFFER",
            f"physics.sides={sides}, but {names[0]} has {own}",
            f"{own}",
            "mend physics.sides, or data.dims",
        )
    physics.setdefault("fields", dict.fromkeys(data.state, "scalar"))
    return {"equation": "external", "sides": own, "length": source.length, **physics}


def _generate(
    values: dict, data: Data, source: "Source", spacing: float, steps: int, parts: int, gap: int
) -> dict:
    """Return section generate: members, times and grid of the files, and the closure interval."""
    from hpc_closure.experiment.sources.parts import length_of_part

    interval = data.interval or spacing
    stored = length_of_part(len(source.times), parts, gap)
    if data.in_place:
        every = spacing
        if interval > spacing * (1 + 1e-6):
            times = math.ceil(interval / spacing - 1e-6)
            raise refuse(
                "TIME_STEP",
                f"data.interval={interval:g}, but states are stored {spacing:g} apart",
                "an interval that ends before the next stored time",
                f"state data.stride={times * data.stride}, or mend data.interval",
            )
        what = f"the step of the reduced solver, data.interval / {steps}"
        _check_multiple("the spacing of the stored times", spacing, interval / steps, what)
    else:
        _check_multiple("data.interval", interval, spacing, "the spacing of the stored times")
        ahead = round(interval / spacing)
        every, stored = interval, (stored - 1) // ahead
        if stored < 2:
            raise refuse(
                "FEW_TIMES",
                f"{len(source.times)} stored times in {parts} part(s) give {stored} closure(s) of "
                f"interval {interval:g} each",
                "at least two",
                "lower data.interval or data.parts",
            )
    points = source.points[0]
    grid = points if data.in_place else _stated(values, "reduced", "grid") or points
    stated = values.get("generate") or {}
    record = {"start": 0.0, "every": every, "grid": grid}
    if source.dtype.itemsize == 8:
        record["precision"] = "float64"
    return {
        **{key: stated[key] for key in NUMERICS if key in stated},
        "members": source.members * parts,
        "t_end": (stored - 1) * every,
        "closure": "subgrid",
        "grid": points,
        "dt": interval / steps,
        "interval": steps,
        "certificate": "reported",
        "record": record,
    }


def _check_multiple(name: str, value: float, step: float, what: str) -> None:
    """Refuse a time that is no multiple of a step, ``what`` in words."""
    ratio = value / step
    if abs(ratio - round(ratio)) > 1e-3 * max(1.0, ratio) or round(ratio) < 1:
        raise refuse(
            "TIME_STEP",
            f"{name}, {value:g}, is {ratio:.4g} times {step:g}, {what}",
            "a whole number",
            "mend data.interval or generate.dt, or state data.time_factor if units differ",
        )


def _later(values: dict, generate: dict, steps: int) -> dict:
    """Return the values with times of rollout and evaluate where the experiment states none."""
    out = dict(values)
    every, end = generate["record"]["every"], generate["t_end"]
    interval = generate["dt"] * generate["interval"]
    conditions = _stated(values, "model", "conditions") or {}
    past = max(conditions.get("previous_states", 0), conditions.get("previous_closures", 0))
    rollout = {"interval": steps, "baselines": ["none"], **(values.get("rollout") or {})}
    multiple = next((n for n in range(1, 1001) if _whole(n * every / interval)), 1)
    rollout.setdefault("every", multiple * every)
    rollout.setdefault("t_start", past * every)
    room = (end - rollout["t_start"]) / rollout["every"]
    stored = max(1, min(HORIZON, math.floor(room + 1e-6)))
    rollout.setdefault("t_end", rollout["t_start"] + stored * rollout["every"])
    out["rollout"] = rollout
    evaluate = dict(values.get("evaluate") or {})
    reach = math.floor((rollout["t_end"] - rollout["t_start"]) / rollout["every"] + 1e-6)
    if "lead_times" not in evaluate and reach >= 1:
        numbers = sorted({max(1, reach * n // LEADS) for n in range(1, LEADS + 1)})
        evaluate["lead_times"] = [n * rollout["every"] for n in numbers]
    out["evaluate"] = evaluate
    model = dict(values.get("model") or {})
    model["conditions"] = {"sensors": "none", **conditions}
    out["model"] = model
    return out


def _whole(ratio: float) -> bool:
    return abs(ratio - round(ratio)) < 1e-6 * max(1.0, ratio)


def _stated(values: dict, section: str, key: str) -> Any:
    """Return a key of a section, None if it is not stated."""
    part = values.get(section)
    return part.get(key) if isinstance(part, dict) else None


__all__ = ["DataFault", "completed"]
