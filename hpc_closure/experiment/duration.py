"""Parse durations such as ``90s``, ``45m``, ``3h50m``, ``03:50:00``."""

import re

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(text: str | float) -> float:
    """Parse a duration such as ``90``, ``45m``, ``3h50m``, ``1d``, ``03:50:00``, to seconds.

    Raises:
        ValueError: not a positive duration.
    """
    value = str(text).strip().lower()
    try:
        if re.fullmatch(r"\d+:\d{1,2}(:\d{1,2})?", value):
            parts = [int(part) for part in value.split(":")]
            total = float(sum(part * 60**power for power, part in enumerate(reversed(parts))))
        elif re.fullmatch(r"(\d+(\.\d*)?[smhd])+", value):
            total = sum(
                float(number) * _UNITS[unit]
                for number, _, unit in re.findall(r"(\d+(\.\d*)?)([smhd])", value)
            )
        else:
            total = float(value)
    except ValueError:
        total = float("nan")
    if not 0 < total < float("inf"):
        raise ValueError(
            f"duration {text!r}: expected seconds or for example 90s, 45m, 3h50m, "
            "1d, 03:50:00, more than 0"
        )
    return total


def check_lead(lead: str | float, walltime: str | float) -> None:
    """Raise ValueError if the warning comes so early that much of the job's time is unused."""
    if seconds(lead) > max(600.0, 0.2 * seconds(walltime)):
        raise ValueError(
            f"signal_before_end={lead} is longer than max(10m, 20 % of walltime={walltime}), "
            "and a job is idle after the warning: shorten it or raise walltime"
        )
