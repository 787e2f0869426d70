"""What one invocation of a verb was asked: the options of the command line as one record.

They say which part of the work is done now, and how; what the work is stands in the experiment.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Options of a verb; a verb ignores those that its ``--help`` does not name.

    Attributes:
        members: only these members, such as "0-31" or "4,7,9"; all when empty.
        parts: "I/N": only part I (1-based) of N of the units.
        retry_failed: try failed units again.
        partial: score what there is.
        dry_run: print the plan, write nothing.
        max_elapsed: stop cleanly after this long, such as "3h50m".
        redo: delete the stage's products first.
        yes: answer yes to questions.
        verbosity: 1 and more show debug lines, -1 only warnings.
        typed: experiment and overrides as they were typed, for advice on what to type next.
    """

    members: str | None = None
    parts: str | None = None
    retry_failed: bool = False
    partial: bool = False
    dry_run: bool = False
    max_elapsed: str | None = None
    redo: bool = False
    yes: bool = False
    verbosity: int = 0
    typed: tuple[str, ...] = ()


def chosen_members(text: str | None, total: int) -> list[int]:
    """``"0-31"``, ``"4,7,9"`` or all, as indices below ``total``."""
    if not text:
        return list(range(total))
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"--members {text}: expected numbers and ranges, e.g. 0-31 or 4,7,9")
        chosen.update(range(int(first), int(last if dash else first) + 1))
    outside = sorted(member for member in chosen if member >= total)
    if outside or not chosen:
        raise ValueError(f"--members {text}: the experiment has members 0 to {total - 1}")
    return sorted(chosen)


def chosen_part(text: str | None, units: list) -> list:
    """Part ``i/n`` (1-based) of the units; every n-th, so that parts stay alike under growth."""
    if not text:
        return units
    part, slash, parts = text.partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise ValueError(f"--parts {text}: expected I/N with 1 <= I <= N, for example 2/8")
    return units[int(part) - 1 :: int(parts)]


class UsageError(Exception):
    """Bad config or usage: one line, exit code 2."""
