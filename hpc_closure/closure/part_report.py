"""Records of which parts of a model act, and their summary line for reports and files."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PartReport", "describe", "is_closed_form"]


@dataclass(frozen=True)
class PartReport:
    """Whether a part of a model acts.

    Attributes:
        name: part and method: ``mean: regression``, ``residual: score``.
        trained: whether its weights were trained by gradients; otherwise it is a closed form.
        acts: whether its output enters the samples.
        gains: gains of its output, per shell if it has them.
        note: terms of a regression, or the reason why it does not act.
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
    """Return whether no trained part acts."""
    return not any(part.trained and part.acts for part in parts)


def describe(parts: Sequence[PartReport]) -> str:
    """Describe in one line which parts act."""
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
