"""An ensemble and its truth, with cached quantities that several scores share."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from hpc_closure.closure.fields.losses import square_distances
from hpc_closure.evaluate.scores.spectra import per_shell, power, transform


@dataclass(frozen=True)
class Truth:
    """True fields of a block of samples.

    Attributes:
        fields: (S, n, n) float64, on a line (S, n), of three sides (S, n, n, n).
        lengths: length of each side; equal if there are none.
    """

    fields: Tensor
    lengths: tuple[float, ...] = ()

    @property
    def dimensions(self) -> int:
        """Number of sides."""
        return self.fields.ndim - 1

    @cached_property
    def hat(self) -> Tensor:
        """Fourier coefficients (S, n, n // 2 + 1)."""
        return transform(self.fields, self.dimensions)

    def per_shell(self, density: Tensor) -> Tensor:
        """Sum a density per mode (..., n, n // 2 + 1) over shells, (..., shells)."""
        return per_shell(density, self.fields.shape[1:], self.lengths)

    def to(self, device) -> "Truth":
        """Return the truth on a device."""
        if self.fields.device == device:
            return self
        return Truth(self.fields.to(device), self.lengths)


@dataclass(frozen=True)
class Forecast:
    """Ensembles of one method for a block of samples.

    Attributes:
        ensemble: (M, S, n, n) float64.
        truth: truth of the same samples.
    """

    ensemble: Tensor
    truth: Truth

    @cached_property
    def error_moments(self) -> tuple[Tensor, Tensor]:
        """Means over members of the error's coefficients and of their squared moduli, (S, ...)."""
        error_hat = transform(self.ensemble - self.truth.fields, self.truth.dimensions)
        return error_hat.mean(0), power(error_hat).mean(0)

    @cached_property
    def distances(self) -> tuple[Tensor, Tensor]:
        """Mean squared distances of members from the truth (S, M) and each other (S, M, M)."""
        return square_distances(self.ensemble, self.truth.fields)

    @property
    def mean_hat(self) -> Tensor:
        """Coefficients of the ensemble mean, (S, n, n // 2 + 1)."""
        return self.truth.hat + self.error_moments[0]

    @property
    def energy(self) -> Tensor:
        """Mean over members of the squared modulus of each coefficient, (S, n, n // 2 + 1)."""
        mean, square = self.error_moments
        truth_hat = self.truth.hat
        return square + 2 * (truth_hat.conj() * mean).real + power(truth_hat)


def shell_statistics(forecast: Forecast) -> dict[str, Tensor]:
    """Compute the statistics per sample and shell from which the scores per shell are formed.

    Needs float64, because squares are subtracted.

    Returns:
        (S, shells) each: ``energy`` of one member, ``truth_energy``, unbiased ``variance`` over
        members (zero for one member) and ``mean_mse``, the squared error of the ensemble mean. The
        sum over shells of each is the mean over the grid of the same quantity.
    """
    num = len(forecast.ensemble)
    mean, square = forecast.error_moments  # all statistics follow from one pass over the members
    parts = {
        "energy": forecast.energy,
        "truth_energy": power(forecast.truth.hat),
        "variance": (square - power(mean)).clamp_min(0) * (num / (num - 1) if num > 1 else 0.0),
        "mean_mse": power(mean),
    }
    return {name: forecast.truth.per_shell(part) for name, part in parts.items()}
