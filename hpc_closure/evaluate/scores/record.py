"""Define the record of a score: name, formula, and texts for the report and the reference page.

A module that computes scores lists their records in ``SCORES``; ``registry`` collects them. A
user's module does the same and is named in ``evaluate.scores``.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hpc_closure.evaluate.scores.intervals import Means

# captions of tables to which several modules contribute
ACCURACY, CALIBRATION = "Accuracy and cost", "Calibration"
PAIRED = "Differences to a reference method"  # has its own layout, with verdicts in words


@dataclass(frozen=True)
class Score:
    """A score with everything that rows, report and reference page need.

    A score with a ``formula`` or a function ``sample`` is computed for every method, with its
    interval. A score without either is computed by the module that lists the record.

    Attributes:
        name: value of the column ``score`` in the rows.
        heading: heading of its column in a table.
        meaning: one sentence for the glossary and the reference page.
        table: caption of the report's table that has it as a column; empty for none.
        requires: condition under which it exists, in words; empty for always.
        needs: statistics that the formula reads. The prefix ``reference_`` selects that of
            the exact law or true ensemble over the same samples. Per shell the last statistic is
            a denominator: shells in which it is only round-off have no row.
        formula: maps means of the statistics, each () or (blocks,), per shell (..., shells), and
            the ensemble size to the score, () or (blocks,); None for the mean of ``sample``.
        sample: maps an ensemble (M, S, n, n) and its truth (S, n, n), both float64, to numbers
            (S,); the formula reads their mean under the name of the score.
        spectra: whether the formula reads means per shell and returns one number.
        per_shell: whether it also has rows per wavenumber shell.
        ensembles_only: whether point forecasts have no such score.
        by_lead_time: whether the report has a table of it by lead time.
        shells: caption of the report's table per wavenumber shell; empty for none.
    """

    name: str
    heading: str
    meaning: str
    table: str = ""
    requires: str = ""
    needs: tuple[str, ...] = ()
    formula: Callable[[Means, int], Tensor] | None = None
    sample: Callable[[Tensor, Tensor], Tensor] | None = None
    spectra: bool = False
    per_shell: bool = False
    ensembles_only: bool = False
    by_lead_time: bool = False
    shells: str = ""

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the statistics from which it is formed; () if its module computes it."""
        return self.needs or ((self.name,) if self.sample else ())

    def form(self, means: Means, members: int) -> Tensor:
        """Form the score from means of its statistics, () or (blocks,), and the ensemble size."""
        if self.formula is None:
            return means[self.name]
        return self.formula(means, members)
