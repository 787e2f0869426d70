"""Which trained parts act, and how far: judged on members that they have not seen.

A gain is the regression of the truth on a part's output, within [0, 2]. Snapshots of one member
are correlated, members are not: sums over a member's snapshots are what Student's t is taken of.
Where it is not significant (one-sided, at the level of three standard deviations) the gain is
zero, and an unneeded network drops out exactly. Fewer than ``LEAST`` members decide nothing.
"""

import torch
from torch import Tensor

from hpc_closure.closure.band import Band

__all__ = ["LEAST", "ImprovementGate", "ShareGate", "ShellGate", "significant"]

LEAST = 8  # members
LEVEL = 1.35e-3  # probability that a part without merit is let through
AMPLITUDE_SHARES = (0.25, 0.5, 0.75, 1.0)
WORTH = 1e-3  # nats per point: what an amplitude must bring at least


class ByMember:
    """Values per snapshot, and sums of them by member."""

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._members: list[Tensor] = []
        self._unnamed = 0

    def add(self, values: Tensor, members: Tensor | None) -> None:
        """Take in values (B, ...) of snapshots; without ``members`` each is its own."""
        if members is None:
            members = -1 - torch.arange(self._unnamed, self._unnamed + len(values))
            self._unnamed += len(values)
        self._values.append(values.double().cpu())
        self._members.append(members.cpu())

    @property
    def values(self) -> Tensor:
        """(snapshots, ...)."""
        return torch.cat(self._values)

    def sums(self, of: Tensor | None = None) -> Tensor:
        """Sums (members, ...) of the values, or of other values of the same snapshots."""
        values = self.values if of is None else of
        names, index = torch.unique(torch.cat(self._members), return_inverse=True)
        return values.new_zeros(len(names), *values.shape[1:]).index_add_(0, index, values)

    @property
    def members(self) -> int:
        """Number of members seen."""
        return len(torch.unique(torch.cat(self._members))) if self._members else 0


def significant(sums: Tensor) -> Tensor:
    """Whether the mean of independent values (members, ...) is above zero; never for few."""
    from scipy.stats import t

    count = len(sums)
    if count < LEAST:
        return torch.zeros(sums.shape[1:], dtype=torch.bool)
    error = sums.std(0) / count**0.5
    return sums.mean(0) > float(t.isf(LEVEL, count - 1)) * error


class ShellGate:
    """Gains per shell of an output that is meant to be the truth."""

    def __init__(self, kept: Band):
        self.kept = kept
        self.products, self.squares = ByMember(), ByMember()

    def add(self, truth: Tensor, output: Tensor, members: Tensor | None) -> None:
        """Take in spectra (B, ...) of the residual band, in units in which modes compare."""
        shell_sum = self.kept.grid.shell_sum
        self.products.add(shell_sum((truth.conj() * output).real), members)
        self.squares.add(shell_sum(output.abs().square()), members)

    @property
    def members(self) -> int:
        """Number of members seen."""
        return self.products.members

    def gains(self) -> Tensor:
        """(shells,)."""
        products, squares = self.products.sums(), self.squares.sums()
        total, power = products.sum(0), squares.sum(0)
        gain = (total / power.clamp(min=1e-300)).clamp(0.0, 2.0)
        return torch.where(significant(products) & (power > 0), gain, 0.0)


class ImprovementGate:
    """One decision for all shells: whether a score has improved."""

    def __init__(self, kept: Band):
        self.kept = kept
        self.improvements = ByMember()

    def add(self, before: Tensor, after: Tensor, members: Tensor | None) -> None:
        """Take in scores (B,), smaller is better, without and with the part."""
        self.improvements.add(before - after, members)

    @property
    def members(self) -> int:
        """Number of members seen."""
        return self.improvements.members

    def gains(self) -> Tensor:
        """(shells,), one or zero."""
        better = significant(self.improvements.sums())
        return better.double().expand(self.kept.grid.num_shells).clone()


class ShareGate:
    """Share of log D, 0 to 1, that is most likely on unseen members."""

    def __init__(self) -> None:
        self.levels, self.scaled = ByMember(), ByMember()

    def add(self, log: Tensor, square: Tensor, members: Tensor | None) -> None:
        """Take in fields (B, n, n) of snapshots: log D, and the square of the residual."""
        powers = [
            (square * torch.exp(-2 * share * log)).mean((-2, -1))
            for share in (0.0, *AMPLITUDE_SHARES)
        ]
        self.levels.add(log.mean((-2, -1)), members)
        self.scaled.add(torch.stack(powers, dim=1), members)

    @property
    def members(self) -> int:
        """Number of members seen."""
        return self.levels.members

    def share(self) -> float:
        """0 unless significant."""
        level, scaled = self.levels.values, self.scaled.values
        # each amplitude, the uniform one included, with its own best overall factor
        factor = scaled.mean(0)
        shares = torch.tensor((0.0, *AMPLITUDE_SHARES), dtype=torch.float64)
        loss = shares * level[:, None] + 0.5 * (factor.log() + scaled / factor)
        gain = loss[:, :1] - loss[:, 1:]
        best = int(gain.sum(0).argmax())
        # a uniform amplitude costs accuracy and buys nothing below a part in a thousand
        worth = float(gain[:, best].mean()) > WORTH
        kept = worth and bool(significant(self.levels.sums(gain[:, best])))
        return AMPLITUDE_SHARES[best] if kept else 0.0
