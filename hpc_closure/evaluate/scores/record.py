"""What a score is: its name, its formula, and what the report and the reference page say of it.

A module that computes scores lists their records in its ``SCORES``; ``registry`` collects them. A
module of a user's own does the same and is named in ``evaluate.scores``.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hpc_closure.evaluate.scores.intervals import Means

# captions of tables that several modules fill
ACCURACY, CALIBRATION = "Accuracy and cost", "Calibration"
PAIRED = "Differences to a reference method"  # laid out apart, in words


@dataclass(frozen=True)
class Score:
    """A score, described once.

    With a formula, or a function of one sample, the score is computed for every method beside the
    built-in ones, with its interval. Without both, the module that has the record computes it.

    Attributes:
        name: in the column ``score`` of the rows.
        heading: of its column in a table.
        meaning: for glossary and reference page, one sentence.
        table: caption of the report's table in which it is a column; empty for none.
        requires: where it exists, in words; empty for everywhere.
        needs: statistics that the formula reads; ``reference_`` before a name is that of the
            exact law or true ensemble over the same samples. Per shell the last is a
            denominator: shells in which it holds nothing but round-off have no row.
        formula: from means of the statistics, each () or (blocks,), per shell (..., shells), and
            the ensemble size to the score, () or (blocks,); none for the mean of ``sample``.
        sample: from an ensemble (M, S, n, n) and its truth (S, n, n), float64, to (S,) numbers;
            the formula finds their mean under the name of the score.
        spectra: the formula reads means per shell and returns one number.
        per_shell: it has rows per wavenumber shell, too.
        ensembles_only: a point forecast has none.
        by_lead_time: the report has a table of it by lead time.
        shells: caption of the report's table of it per wavenumber shell; empty for none.
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
        """Names of the statistics that it is formed from; () where a function computes it."""
        return self.needs or ((self.name,) if self.sample else ())

    def form(self, means: Means, members: int) -> Tensor:
        """Form the score from means of its statistics, () or (blocks,), and ensemble size."""
        if self.formula is None:
            return means[self.name]
        return self.formula(means, members)
