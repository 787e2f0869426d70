"""Which trained parts act, and how far: judged on members that they have not seen.

A gain is the regression of the truth on a part's output, within [0, 2]. Snapshots of one member
are correlated, members are not: sums over a member's snapshots are what Student's t is taken of.
Where it is not significant (one-sided, at the level of three standard deviations) the gain is
zero, and an unneeded network drops out exactly. Fewer than ``LEAST`` members decide nothing.
"""

import torch
from torch import Tensor

from hpc_closure.closure.fields.modes import Band
from hpc_closure.closure.gaussian.kriging import BaseLaw
from hpc_closure.closure.reductions import Reader

__all__ = ["LEAST", "ByMember", "Gate", "ImprovementGate", "ShareGate", "ShellGate", "significant"]

LEAST = 8  # members
LEVEL = 1.35e-3  # probability that a part without merit is let through
AMPLITUDE_SHARES = (0.25, 0.5, 0.75, 1.0)
WORTH = 1e-3  # nats per mode: what an amplitude must bring at least


class ByMember:
    """Sums over the snapshots of each member."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._unnamed = 0

    def add(self, values: Tensor, members: Tensor | None) -> None:
        """Take in values (B, ...) of snapshots; without ``members`` each is its own."""
        if members is None:
            members = -1 - torch.arange(self._unnamed, self._unnamed + len(values))
            self._unnamed += len(values)
        for name, value in zip(members.tolist(), values.double().cpu()):
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def collect(self, reader: Reader) -> None:
        """Take in the members that other processes have seen: none that was seen here."""
        # a row would carry its whole batch along
        seen = [(name, value.clone()) for name, value in self._sums.items()]
        self._sums = dict(reader.every(seen))

    def sums(self) -> Tensor:
        """(members, ...), by member."""
        return torch.stack([self._sums[name] for name in sorted(self._sums)])

    @property
    def members(self) -> int:
        """Number of members seen."""
        return len(self._sums)


def significant(sums: Tensor) -> Tensor:
    """Whether the mean of independent values (members, ...) is above zero; never for few."""
    from scipy.stats import t

    count = len(sums)
    if count < LEAST:
        return torch.zeros(sums.shape[1:], dtype=torch.bool)
    error = sums.std(0) / count**0.5
    return sums.mean(0) > float(t.isf(LEVEL, count - 1)) * error


class Gate:
    """What the gates share: evidence by member."""

    def __init__(self, *evidence: ByMember):
        self.evidence = evidence

    @property
    def members(self) -> int:
        """Number of members seen."""
        return self.evidence[0].members

    def collect(self, reader: Reader) -> None:
        """Take in the evidence of the other processes, before a decision."""
        for one in self.evidence:
            one.collect(reader)


class ShellGate(Gate):
    """Gains per shell of an output that is meant to be the truth."""

    def __init__(self, kept: Band):
        self.kept = kept
        self.products, self.squares = ByMember(), ByMember()
        super().__init__(self.products, self.squares)

    def add(self, truth: Tensor, output: Tensor, members: Tensor | None) -> None:
        """Take in spectra (B, ...) of the residual band, in units in which modes compare."""
        shell_sum = self.kept.grid.shell_sum
        self.products.add(shell_sum((truth.conj() * output).real), members)
        self.squares.add(shell_sum(output.abs().square()), members)

    def gains(self) -> Tensor:
        """(shells,)."""
        products, squares = self.products.sums(), self.squares.sums()
        total, power = products.sum(0), squares.sum(0)
        gain = (total / power.clamp(min=1e-300)).clamp(0.0, 2.0)
        return torch.where(significant(products) & (power > 0), gain, 0.0)


class ImprovementGate(Gate):
    """One decision for all shells: whether a score has improved."""

    def __init__(self, kept: Band):
        self.kept = kept
        self.improvements = ByMember()
        super().__init__(self.improvements)

    def add(self, before: Tensor, after: Tensor, members: Tensor | None) -> None:
        """Take in scores (B,), smaller is better, without and with the part."""
        self.improvements.add(before - after, members)

    def gains(self) -> Tensor:
        """(shells,), one or zero."""
        better = significant(self.improvements.sums())
        return better.double().expand(self.kept.grid.num_shells).clone()


class ShareGate(Gate):
    r"""Share of log D, 0 to 1, that is most likely on unseen members.

    Where D is right, U / D is a stationary Gaussian process: the likelihood is that of its modes,
    each group of equal :math:`|k|^2` with its own best variance. Point by point a field of D could
    stand for two peaks of a pattern, too, and blur what a generator would make of them.

    Args:
        law: base law of the residual where D = 1; its modes that carry anything are judged.
    """

    def __init__(self, law: BaseLaw):
        self.band = law.band
        like = torch.zeros((), dtype=torch.float64)
        self.judged = self.band.by_group(law.modes("mask", like)) > 0
        self.levels, self.powers = ByMember(), ByMember()
        super().__init__(self.levels, self.powers)

    def add(self, log: Tensor, field: Tensor, members: Tensor | None) -> None:
        """Take in fields (B, n, n) of snapshots: log D, and the residual."""
        level = log.double().mean((-2, -1))
        scaled = [field * torch.exp(-share * log) for share in (0.0, *AMPLITUDE_SHARES)]
        squares = self.band.to_spectral(torch.stack(scaled, dim=1)).abs().square()
        self.levels.add(torch.stack([torch.ones_like(level), level], dim=1), members)
        self.powers.add(self.band.by_group(squares)[..., self.judged], members)

    def share(self) -> float:
        """0 unless significant."""
        (snapshots, level), powers = self.levels.sums().T, self.powers.sums()
        size, total = self.band.group_size[self.judged], snapshots.sum()
        spectra = (powers.sum(0) / total / size).clamp(min=1e-300)  # (shares, groups)
        shares = torch.tensor((0.0, *AMPLITUDE_SHARES), dtype=torch.float64)
        volume = (size * spectra.log()).sum(-1)
        misfit = snapshots[:, None] * volume + (powers / spectra).sum(-1)
        loss = shares * level[:, None] + 0.5 * misfit / size.sum()
        gain = loss[:, :1] - loss[:, 1:]  # nats per mode, by member
        best = int(gain.sum(0).argmax())
        # a uniform amplitude costs accuracy and buys nothing below a part in a thousand
        worth = float(gain[:, best].sum() / total) > WORTH
        kept = worth and bool(significant(gain[:, best]))
        return AMPLITUDE_SHARES[best] if kept else 0.0
