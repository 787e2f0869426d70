"""An ensemble beside the truth, with what several kinds of scores are made of: computed once."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from hpc_closure.closure.fields.losses import square_distances
from hpc_closure.evaluate.scores.spectra import per_shell, power, transform


@dataclass(frozen=True)
class Truth:
    """What every method is compared with.

    Attributes:
        fields: (S, n, n) float64.
    """

    fields: Tensor

    @cached_property
    def hat(self) -> Tensor:
        """Its coefficients (S, n, n // 2 + 1)."""
        return transform(self.fields)

    def to(self, device) -> "Truth":
        """The same where an ensemble is."""
        return self if self.fields.device == device else Truth(self.fields.to(device))


@dataclass(frozen=True)
class Forecast:
    """Answers of one method.

    Attributes:
        ensemble: (M, S, n, n) float64.
        truth: of the same samples.
    """

    ensemble: Tensor
    truth: Truth

    @cached_property
    def error_moments(self) -> tuple[Tensor, Tensor]:
        """Means over members of the error's coefficients and of their squares, (S, ...) each."""
        error_hat = transform(self.ensemble - self.truth.fields)
        return error_hat.mean(0), power(error_hat).mean(0)

    @cached_property
    def distances(self) -> tuple[Tensor, Tensor]:
        """Mean squares of members less truth (S, M), and less each other (S, M, M)."""
        return square_distances(self.ensemble, self.truth.fields)

    @property
    def mean_hat(self) -> Tensor:
        """Coefficients of the ensemble mean, (S, n, n // 2 + 1)."""
        return self.truth.hat + self.error_moments[0]

    @property
    def energy(self) -> Tensor:
        """Mean over members of the square of every coefficient, (S, n, n // 2 + 1)."""
        mean, square = self.error_moments
        truth_hat = self.truth.hat
        return square + 2 * (truth_hat.conj() * mean).real + power(truth_hat)


def shell_statistics(forecast: Forecast) -> dict[str, Tensor]:
    """What the scores per shell are made of, one value per sample and shell.

    Returns:
        (S, shells) each: ``energy`` of one member, ``truth_energy``, unbiased ``variance`` over
        members (zero for one member) and ``mean_mse``, the squared error of the ensemble mean. In
        all, each sums over shells to the mean over the grid of the same quantity. Differences of
        squares are taken: give float64.
    """
    num = len(forecast.ensemble)
    mean, square = forecast.error_moments  # all from these two: one pass over the members
    parts = {
        "energy": forecast.energy,
        "truth_energy": power(forecast.truth.hat),
        "variance": (square - power(mean)).clamp_min(0) * (num / (num - 1) if num > 1 else 0.0),
        "mean_mse": power(mean),
    }
    return {name: per_shell(part, forecast.ensemble.shape[-1]) for name, part in parts.items()}
