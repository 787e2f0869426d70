"""A variable as an experiment names it; nothing heavy is imported."""

import re
from dataclasses import dataclass

_REFERENCE = re.compile(r"^(?P<name>[^\[\]]+)(\[(?P<parts>\d+(,\d+)*)\])?$")


@dataclass(frozen=True)
class Reference:
    """A variable as an experiment names it: ``NAME`` or ``NAME[component,...]``."""

    name: str
    components: tuple[int, ...] = ()

    @classmethod
    def of(cls, text: str) -> "Reference":
        """Parse a reference.

        Raises:
            ValueError: it is neither NAME nor NAME[number,...].
        """
        match = _REFERENCE.match(text.strip().replace(" ", ""))
        if match is None:
            raise ValueError(f"{text}: expected NAME, or NAME[number] for a component")
        parts = match.group("parts")
        return cls(
            match.group("name").strip("/"), tuple(map(int, parts.split(","))) if parts else ()
        )
