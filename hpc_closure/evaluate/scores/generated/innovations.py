"""Test whether the innovations of a closure with memory are Gaussian and independent of the state.

A closure conditioned on its last values is a conditional mean plus an innovation. If the
innovations are Gaussian and their variance does not depend on the state, the model's Gaussian law
is complete and a generator cannot improve it. Otherwise these scores show which shells deviate and
how. Every score is also computed for equally many draws of the model's Gaussian law, which shows
the sampling error of a Gaussian sample of this size.

Intervals are over trajectories (:mod:`~hpc_closure.evaluate.scores.intervals`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pandas import DataFrame, isna
from torch import Tensor

from hpc_closure.closure.fields.modes import Band
from hpc_closure.evaluate.rows import find, format_value, select
from hpc_closure.evaluate.scores.intervals import interval_columns
from hpc_closure.evaluate.scores.record import Score

LOW_SHELLS = 4  # highest shell whose modes enter the patterns
PATTERNS = 8  # number of leading principal components
PATCH = 4  # number of patches along a side
CARRIES = 0.01  # share of the innovations' variance above which a shell is scored
QUIET = 1e-9  # share of the largest variance below which a mode holds only round-off
# largest excess kurtosis and ratio of variances that do not justify a generator
FLAT, EQUAL = 0.3, 1.3
TABLE = "Innovations: closure minus its mean (gp: draws of the Gaussian law instead)"
SCORES = tuple(
    Score(
        name=name,
        heading=heading,
        meaning=meaning,
        table=TABLE,
        requires="a subgrid closure that reads its last draws (generated)",
        per_shell=bool(shells),
        shells=shells,
    )
    for name, heading, meaning, shells in (
        (
            "kurtosis",
            "kurtosis of modes",
            "excess kurtosis of the innovations' modes, each over its own variance: 0 is "
            "Gaussian; in all weighted by the shells' power",
            "Excess kurtosis of the innovations' modes",
        ),
        (
            "kurtosis_field",
            "of the field",
            "the same of the field's values, per shell of the shell's part alone",
            "Excess kurtosis of the innovations' field",
        ),
        (
            "skewness",
            "skewness",
            "of the innovations' values: 0 is Gaussian",
            "Skewness of the innovations' field",
        ),
        (
            "variance_follows_state",
            "explained by the state",
            "share of the variance of squared innovations that a regression on local |w|, "
            "|grad w| and strain squared explains",
            "",
        ),
        (
            "variance_high_over_low",
            "high / low variance",
            "mean squared innovation over the quarter of points where that regression is largest, "
            "over that where it is least: 1 does not follow the state",
            "",
        ),
        (
            "kurtosis_patterns",
            "kurtosis of patterns",
            "mean excess kurtosis of the leading principal components of the lowest shells",
            "",
        ),
        ("kurtosis_patches", "of patches", "the same of square patches of the field", ""),
    )
)


@dataclass(frozen=True)
class Innovations:
    """Innovations of S snapshots.

    Attributes:
        band: band of modes that hold the innovations.
        q_hat: spectra of the innovations in this band (S, ...).
        features: positive features of the states (S, F, n, n) on which the variance may depend.
        trajectories: trajectory of each snapshot (S,).
    """

    band: Band
    q_hat: Tensor
    features: Tensor
    trajectories: Tensor

    def scores(self) -> Iterator[dict[str, Any]]:
        """Yield columns ``score, value, low, high``, and ``shell`` for scores per shell."""
        yield from self._of_modes()
        yield from self._of_fields()
        yield from self._of_variance()
        yield from self._of_patterns()

    # ---- modes and fields -----------------------------------------------------------------------

    @property
    def shells(self) -> list[int]:
        """Shells with more than the share ``CARRIES`` of the variance."""
        power = self._power()
        return [s for s in range(1, len(power)) if power[s] > CARRIES * power.sum()]

    def _power(self) -> Tensor:
        return self.band.grid.shell_sum(self.q_hat.abs().square()).mean(0)

    def _numbers(self) -> tuple[Tensor, Tensor]:
        """Return real and imaginary parts (S, C) of the modes that vary, and their shells (C,)."""
        numbers = torch.view_as_real(self.q_hat).flatten(1)
        shell = self.band.grid.shell().expand(self.band.shape).flatten().repeat_interleave(2)
        variance = numbers.square().mean(0)
        # where the last wavenumber is 0 one half of the modes is the conjugate of the other
        once = self.band.independent.flatten().repeat_interleave(2)
        varies = (variance > QUIET * variance.max()) & (shell > 0) & once
        return numbers[:, varies], shell[varies]

    def _of_modes(self) -> Iterator[dict[str, Any]]:
        numbers, shell = self._numbers()
        moments = _moments(numbers)
        power = self._power()
        share = power[shell] / torch.bincount(shell, minlength=len(power))[shell]
        chosen = {s: (shell == s).double() for s in self.shells}
        for s, weight in [*chosen.items(), (None, share)]:
            weight = weight / weight.sum()

            def mean(means: Mapping[str, Tensor], weight: Tensor = weight) -> Tensor:
                return (_kurtosis(means) * weight).sum(-1)

            yield self._row("kurtosis", moments, mean, s)

    def _of_fields(self) -> Iterator[dict[str, Any]]:
        places = self.band.grid.shell().expand(self.band.shape)
        for s in [*self.shells, None]:
            part = self.q_hat if s is None else self.q_hat * (places == s)
            values = self._fields(part).flatten(1)
            moments = {name: moment.mean(1) for name, moment in _moments(values).items()}
            yield self._row("kurtosis_field", moments, _kurtosis, s)
            yield self._row("skewness", moments, _skewness, s)

    def _fields(self, q_hat: Tensor) -> Tensor:
        return self.band.to_physical(q_hat, self.features.shape[-1])

    # ---- variance that follows the state --------------------------------------------------------

    def _of_variance(self) -> Iterator[dict[str, Any]]:
        square = self._fields(self.q_hat).square().flatten(1)
        features = self.features.flatten(2).double()
        features = features / features.mean((0, 2), keepdim=True)
        terms = torch.cat([torch.ones_like(features[:, :1]), features], 1)
        points = square.shape[1]
        sums = {
            "gram": terms @ terms.mT / points,
            "cross": (terms @ square[..., None])[..., 0] / points,
            "mean": square.mean(1),
            "square": square.square().mean(1),
        }

        def explained(means: Mapping[str, Tensor]) -> Tensor:
            weights = torch.linalg.solve(means["gram"], means["cross"])
            of_mean = means["mean"].square()
            about = (weights * means["cross"]).sum(-1) - of_mean
            return about / (means["square"] - of_mean)

        yield self._row("variance_follows_state", sums, explained)
        weights = torch.linalg.solve(sums["gram"].mean(0), sums["cross"].mean(0))
        guess = torch.einsum("f,sfp->sp", weights, terms)
        ordered = guess.flatten().sort().values
        quarter = max(1, len(ordered) // 4)
        quarters = {
            name: mask.double()
            for name, mask in (
                ("low_variance", guess <= ordered[quarter - 1]),
                ("high_variance", guess >= ordered[-quarter]),
            )
        }
        sums = {name: mask.mean(1) for name, mask in quarters.items()}
        sums |= {f"{name}_square": (square * mask).mean(1) for name, mask in quarters.items()}

        def ratio(means: Mapping[str, Tensor]) -> Tensor:
            low, high = (means[f"{name}_square"] / means[name] for name in quarters)
            return high / low

        yield self._row("variance_high_over_low", sums, ratio)

    # ---- patterns -------------------------------------------------------------------------------

    def _of_patterns(self) -> Iterator[dict[str, Any]]:
        numbers, shell = self._numbers()
        low = numbers[:, shell <= LOW_SHELLS]
        if low.shape[1]:
            yield self._row("kurtosis_patterns", _moments(_leading(low)), _mean_kurtosis)
        fields = self._fields(self.q_hat)
        parts, sides = fields, fields.ndim - 1
        for axis in range(sides, 0, -1):
            side = fields.shape[axis] // PATCH
            parts = parts.unfold(axis, side, side)
        patches = parts.reshape(len(fields), PATCH**sides, -1)
        components = _leading(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
        moments = {name: moment.mean(1) for name, moment in _moments(components).items()}
        yield self._row("kurtosis_patches", moments, _mean_kurtosis)

    def _row(
        self,
        score: str,
        values: Mapping[str, Tensor],
        formula: Callable[[Mapping[str, Tensor]], Tensor],
        shell: int | None = None,
    ) -> dict[str, Any]:
        signed = "kurtosis" in score or score == "skewness"
        numbers = interval_columns(values, self.trajectories, formula, signed=signed)
        return {"score": score, "shell": shell, **numbers}


def _moments(values: Tensor) -> dict[str, Tensor]:
    return {f"m{power}": values**power for power in (2, 3, 4)}


def _kurtosis(means: Mapping[str, Tensor]) -> Tensor:
    return means["m4"] / means["m2"].square() - 3


def _mean_kurtosis(means: Mapping[str, Tensor]) -> Tensor:
    return _kurtosis(means).mean(-1)


def _skewness(means: Mapping[str, Tensor]) -> Tensor:
    return means["m3"] / means["m2"] ** 1.5


def _leading(numbers: Tensor) -> Tensor:
    """Project numbers (S, C) on their leading principal components; returns (S, J)."""
    about = numbers - numbers.mean(0)
    _, vectors = torch.linalg.eigh(about.T @ about / len(about))
    return about @ vectors[:, -PATTERNS:]


def local_features(w_hat: Tensor, b: Band, size: int) -> Tensor:
    """Compute |w|, |grad w| and the squared strain rate of states (B, ...); returns (B, 3, n, n).

    In other numbers of dimensions than two the third feature is the squared slope.
    """

    def field(spectrum: Tensor) -> Tensor:
        return b.to_physical(spectrum, size)

    sides = [k.to(w_hat.device) for k in b.grid.k]
    slopes = [field(1j * k * w_hat).square() for k in sides]
    steep = strain = sum(slopes[1:], slopes[0])
    if b.grid.dimensions == 2:
        kx, ky = sides
        k2 = kx**2 + ky**2
        psi = w_hat / torch.where(k2 > 0, k2, torch.inf)
        strain = field(2 * kx * ky * psi).square() + field((kx**2 - ky**2) * psi).square()
    return torch.stack([field(w_hat).abs(), steep.sqrt(), strain], 1)


# ---- in words -----------------------------------------------------------------------------------


def verdict(rows: DataFrame, method: str = "model", law: str = "mean_gp") -> tuple[str, str]:
    """Describe the innovations of a method and, for comparison, draws of its Gaussian law.

    A shell is called not Gaussian if the excess kurtosis of its modes or of its field exceeds
    ``FLAT`` and the interval is disjoint from that of the Gaussian law. The variance is said to
    follow the state if the ratio exceeds ``EQUAL`` in the same sense.

    Returns:
        Two sentences; ("", "") without rows.
    """
    total = find(rows, method=method, score="kurtosis", shell=None)
    if total is None:
        return "", ""
    wrong, largest = [], 0.0
    for shell in sorted(set(select(rows, method=method, score="kurtosis")["shell"].dropna())):
        beyond = False
        for score in ("kurtosis", "kurtosis_field"):
            own, plain = (find(rows, method=m, score=score, shell=shell) for m in (method, law))
            largest = max(largest, abs(own.value), key=abs)
            beyond |= abs(own.value) > FLAT and _apart(own, plain)
        if beyond:
            wrong.append(int(shell))
    own, plain = (
        find(rows, method=m, score="variance_high_over_low", shell=None) for m in (method, law)
    )
    follows = own.value > EQUAL and _apart(own, plain)
    share = find(rows, method=method, score="variance_follows_state", shell=None)
    variance = (
        f"{format_value('', own.value)} times the variance in the high-variance quarter of "
        f"points as in the low-variance one, {format_value('', 100 * share.value)} % of their "
        "variance explained by the state"
    )
    if wrong:
        shells = ", ".join(map(str, wrong))
        words = f"not Gaussian in shell{'' if len(wrong) == 1 else 's'} {shells}"
        words += f" (excess kurtosis up to {format_value('', largest)})"
    else:
        words = (
            f"Gaussian in every shell (excess kurtosis within ±{format_value('', abs(largest))})"
        )
    field, of_law = (
        find(rows, method=m, score="kurtosis_field", shell=None) for m in (method, law)
    )
    words += f"; of the field within ±{format_value('', abs(field.value))}; {variance}"
    if follows:
        words += ": their variance follows the state"
    elif not wrong and abs(field.value) <= FLAT:
        words += ": a generator can add almost nothing"
    of_draws = (
        f"draws of its own Gaussian law: excess kurtosis of the field "
        f"{format_value('', of_law.value)}, ratio of the variances {format_value('', plain.value)}"
    )
    return words, of_draws


def _apart(own, other) -> bool:
    """Return whether two intervals are disjoint; without intervals, whether the values differ.

    Returns False if ``other`` is None: in that shell only one of both has enough variance.
    """
    if other is None:
        return False
    if any(isna(edge) for edge in (own.low, own.high, other.low, other.high)):
        return bool(own.value != other.value)
    return bool(own.low > other.high or own.high < other.low)
