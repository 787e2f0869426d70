"""The command-line options of one invocation of a verb, as one record.

Options say which part of the work is done now, and how. The experiment says what the work is.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Options of a verb; a verb ignores those that its ``--help`` does not list.

    Attributes:
        members: members to compute, such as "0-31" or "4,7,9"; all if empty.
        shard: "I/N": only shard I (1-based) of N of the units.
        retry_failed: try failed units again.
        partial: score the products that exist.
        dry_run: print the plan, write nothing.
        max_elapsed: stop cleanly after this time, such as "3h50m".
        overwrite: delete the stage's products first.
        yes: answer yes to questions.
        verbosity: 1 and more show debug lines, -1 only warnings.
        typed: experiment and overrides as typed, for advice on the next command.
    """

    members: str | None = None
    shard: str | None = None
    retry_failed: bool = False
    partial: bool = False
    dry_run: bool = False
    max_elapsed: str | None = None
    overwrite: bool = False
    yes: bool = False
    verbosity: int = 0
    typed: tuple[str, ...] = ()


def chosen_members(text: str | None, total: int) -> list[int]:
    """Return the members of ``"0-31"``, ``"4,7,9"`` or all, as sorted indices below ``total``.

    Raises:
        ValueError: the text is not of this form, or a member is outside.
    """
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


def chosen_shard(text: str | None, units: list) -> list:
    """Return shard ``i/n`` (1-based): every n-th unit, so further units change no shard.

    Raises:
        ValueError: the text is not of this form.
    """
    if not text:
        return units
    shard, slash, shards = text.partition("/")
    if not (slash and shard.isdigit() and shards.isdigit() and 1 <= int(shard) <= int(shards)):
        raise ValueError(f"--shard {text}: expected I/N with 1 <= I <= N, for example 2/8")
    return units[int(shard) - 1 :: int(shards)]


class UsageError(Exception):
    """Invalid configuration or usage: one line, exit code 2."""
