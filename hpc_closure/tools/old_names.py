"""Accept the old names of commands and options for one release, with a line that has the new name.

A name is renamed only where the command line has the new one, so it stays unknown elsewhere. The
old names are not parameters of any command, so ``--help`` and completion do not list them.
"""

import sys
from collections.abc import Collection
from typing import Any

from typer.core import TyperGroup

from hpc_closure.work.launch import Launch, launch

NEW = {
    "visit": "gpu",
    "sizes": "network-size",
    "--after": "--dependency",
    "--correct": "--calibrate-spread",
    "--one-pass": "--crps-generator",
    "--parts": "--shard",
    "--redo": "--overwrite",
}


class RenamedGroup(TyperGroup):
    """Group of commands that also accepts the old names of its commands and their options."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return name, command and remaining words, all with new names."""
        found: set[str] = set()
        first = _renamed(args[0], self.commands, found)
        name, command, rest = super().resolve_command(ctx, [first, *args[1:]])
        if command is not None:
            options = [option for one in command.params for option in one.opts]
            end = rest.index("--") if "--" in rest else len(rest)
            rest[:end] = [_renamed(word, options, found) for word in rest[:end]]
        if not ctx.resilient_parsing:  # which is set while a shell completes a word
            for old in sorted(found):
                _warn(old, "" if old.startswith("-") else f"{ctx.info_name} ")
        return name, command, rest


def _renamed(word: str, known: Collection[str], found: set[str]) -> str:
    """Return the word with its new name if ``known`` has that; adds the old name to ``found``.

    The word of an option may have a value: ``--parts=1/2``.
    """
    old, equals, value = word.partition("=")
    if NEW.get(old) not in known or old in known:
        return word
    found.add(old)
    return NEW[old] + equals + value


def _warn(old: str, group: str) -> None:
    """Print the new name, on the first of the processes that were started together."""
    try:
        started = launch()
    except ValueError:  # the verb reports it
        started = Launch()
    if started.rank == 0:
        print(
            f"{group}{old} is now {group}{NEW[old]}; the old name is accepted until the next "
            "release",
            file=sys.stderr,
        )
