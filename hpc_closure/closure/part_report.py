"""Which parts of a model act: the records, and the line that reports and files carry."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PartReport", "describe", "is_closed_form"]


@dataclass(frozen=True)
class PartReport:
    """Whether a part of a model acts.

    Attributes:
        name: what it is, and how it is done: ``mean: regression``, ``residual: score``.
        trained: its weights were learned by gradients; the others are closed forms.
        acts: what it gives enters the samples.
        gains: of what it gives, per shell where it has such.
        note: terms of a regression, or why it does not act.
    """

    name: str
    trained: bool
    acts: bool
    gains: tuple[float, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        how = self.note
        acting = [gain for gain in self.gains if gain]
        if self.acts and acting:
            low, high = min(acting), max(acting)
            span = f"{low:.2g}" if high - low < 0.005 else f"{low:.2g} to {high:.2g}"
            shells = "" if len(acting) == len(self.gains) else f" in {len(acting)} shells"
            how = f"gain {span}{shells}"
        return f"{self.name} ({how})" if how else self.name


def is_closed_form(parts: Sequence[PartReport]) -> bool:
    """Whether no trained part acts."""
    return not any(part.trained and part.acts for part in parts)


def describe(parts: Sequence[PartReport]) -> str:
    """Which parts act, in one line."""
    acting = [part for part in parts if part.acts]
    idle = [part for part in parts if part.trained and not part.acts]
    line = ", ".join(map(str, acting))
    if is_closed_form(parts):
        line = f"closed form: {line}; no trained part acts"
    else:
        line = f"parts that act: {line}"
    if idle:
        line += "; do not act: " + ", ".join(map(str, idle))
    return line
