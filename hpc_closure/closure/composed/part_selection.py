"""Decide which trained parts act, and how far, on members unseen in training.

A gain is the regression of the truth on a part's output, within [0, 2]. Snapshots of one member
are correlated, members are not, so Student's t is computed from sums over each member's snapshots.
If the gain is not significant (one-sided, at the level of three standard deviations) it is zero,
and a network that is not needed drops out exactly. With fewer than ``LEAST`` members no part acts.
"""

import torch
from torch import Tensor

from hpc_closure.closure.fields.losses import gaussian_crps
from hpc_closure.closure.fields.modes import Band
from hpc_closure.closure.gaussian.kriging import StationaryGaussian
from hpc_closure.closure.reductions import Reader

__all__ = [
    "LEAST",
    "ByMember",
    "Gate",
    "ImprovementGate",
    "PointShareGate",
    "ShareGate",
    "ShellGate",
    "significant",
]

LEAST = 8  # members
LEVEL = 1.35e-3  # probability that a useless part passes
AMPLITUDE_SHARES = (0.25, 0.5, 0.75, 1.0)
SHARES = (0.0, *AMPLITUDE_SHARES)
WORTH = 1e-3  # least gain of an amplitude, in nats per mode


class ByMember:
    """Sums over the snapshots of each member."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._unnamed = 0

    def add(self, values: Tensor, members: Tensor | None) -> None:
        """Add values (B, ...) of snapshots; without ``members`` each is a member of its own."""
        if members is None:
            members = -1 - torch.arange(self._unnamed, self._unnamed + len(values))
            self._unnamed += len(values)
        for name, value in zip(members.tolist(), values.double().cpu()):
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def collect(self, reader: Reader) -> None:
        """Add the sums of other processes; each member is read by one process."""
        # a row is a view of its batch, which would be sent as well
        sums = [(name, value.clone()) for name, value in self._sums.items()]
        self._sums = dict(reader.every(sums))

    def sums(self) -> Tensor:
        """Return the sums (members, ...), ordered by member."""
        return torch.stack([self._sums[name] for name in sorted(self._sums)])

    @property
    def members(self) -> int:
        """Number of members."""
        return len(self._sums)


def significant(sums: Tensor) -> Tensor:
    """Return whether the mean of independent values (members, ...) exceeds zero; False if few."""
    from scipy.stats import t

    count = len(sums)
    if count < LEAST:
        return torch.zeros(sums.shape[1:], dtype=torch.bool)
    error = sums.std(0) / count**0.5
    return sums.mean(0) > float(t.isf(LEVEL, count - 1)) * error


class Gate:
    """Base class of the gates, with their evidence by member."""

    def __init__(self, *evidence: ByMember):
        self.evidence = evidence

    @property
    def members(self) -> int:
        """Number of members in the evidence."""
        return self.evidence[0].members

    def collect(self, reader: Reader) -> None:
        """Add the evidence of the other processes, before a decision."""
        for sums in self.evidence:
            sums.collect(reader)


class ShellGate(Gate):
    """Gains per shell of an output that predicts the truth."""

    def __init__(self, kept: Band):
        self.kept = kept
        self.products, self.squares = ByMember(), ByMember()
        super().__init__(self.products, self.squares)

    def add(self, truth: Tensor, output: Tensor, members: Tensor | None) -> None:
        """Add spectra (B, ...) of the residual band, in units in which modes are comparable."""
        shell_sum = self.kept.grid.shell_sum
        self.products.add(shell_sum((truth.conj() * output).real), members)
        self.squares.add(shell_sum(output.abs().square()), members)

    def gains(self) -> Tensor:
        """Return the gains (shells,)."""
        products, squares = self.products.sums(), self.squares.sums()
        total, power = products.sum(0), squares.sum(0)
        gain = (total / power.clamp(min=1e-300)).clamp(0.0, 2.0)
        return torch.where(significant(products) & (power > 0), gain, 0.0)


class ImprovementGate(Gate):
    """Joint decision for all shells, by whether a score has improved."""

    def __init__(self, kept: Band):
        self.kept = kept
        self.improvements = ByMember()
        super().__init__(self.improvements)

    def add(self, before: Tensor, after: Tensor, members: Tensor | None) -> None:
        """Add scores (B,) without and with the part; a smaller score is better."""
        self.improvements.add(before - after, members)

    def gains(self) -> Tensor:
        """Return the gains (shells,), all 1 or all 0."""
        better = significant(self.improvements.sums())
        return better.double().expand(self.kept.grid.num_shells).clone()


class ShareGate(Gate):
    """Share of log D, 0 to 1, of largest likelihood on unseen members.

    If D is right, U / D is a stationary Gaussian process. The likelihood is therefore that of its
    modes, in which each group of equal :math:`|k|^2` has its best variance. A likelihood of points
    would let a field of D also represent two peaks of a pattern, and blur what a generator would
    make of them.

    Args:
        law: base law of the residual for D = 1; its modes with nonzero variance are judged.
    """

    def __init__(self, law: StationaryGaussian):
        self.band = law.band
        like = torch.zeros((), dtype=torch.float64)
        self.judged = self.band.by_group(law.modes("mask", like)) > 0
        self.levels, self.powers = ByMember(), ByMember()
        super().__init__(self.levels, self.powers)

    def add(self, log: Tensor, field: Tensor, members: Tensor | None) -> None:
        """Add fields (B, n, n), or (B, C, n, n), of snapshots: log D and the residual."""
        level = log.double().mean(self.band.axes)
        if level.ndim > 1:  # per judged mode, over the channels
            modes = (self.judged * self.band.group_size).sum(-1)
            level = (level.cpu() * modes / modes.sum()).sum(-1)
        scaled = [field * torch.exp(-share * log) for share in SHARES]
        squares = self.band.to_spectral(torch.stack(scaled, dim=1)).abs().square()
        self.levels.add(torch.stack([torch.ones_like(level), level], dim=1), members)
        self.powers.add(self.band.by_group(squares)[..., self.judged], members)

    def share(self) -> float:
        """Return the share; 0 unless significant."""
        (snapshots, level), powers = self.levels.sums().T, self.powers.sums()
        size = self.band.group_size.expand(self.judged.shape)[self.judged]
        total = snapshots.sum()
        spectra = (powers.sum(0) / total / size).clamp(min=1e-300)  # (shares, groups)
        shares = torch.tensor(SHARES, dtype=torch.float64)
        volume = (size * spectra.log()).sum(-1)
        misfit = snapshots[:, None] * volume + (powers / spectra).sum(-1)
        loss = shares * level[:, None] + 0.5 * misfit / size.sum()
        gain = loss[:, :1] - loss[:, 1:]  # nats per mode, by member
        best = int(gain.sum(0).argmax())
        # a gain below a thousandth is not worth the error that a trained amplitude adds
        worth = float(gain[:, best].sum() / total) > WORTH
        acts = worth and bool(significant(gain[:, best]))
        return AMPLITUDE_SHARES[best] if acts else 0.0


class PointShareGate(Gate):
    """Share of log D, 0 to 1, of least CRPS at points on unseen members, with Gaussian draws.

    For each share the residual over D has its own standard deviation, from :meth:`measure`.

    Args:
        kept: band of the residual.
    """

    def __init__(self, kept: Band) -> None:
        self.kept = kept
        self.moments: Tensor | float = 0.0  # (shares, [C]) sums of the squares of U / D
        self.number = 0
        self.scores = ByMember()
        super().__init__(self.scores)

    def measure(self, log: Tensor, field: Tensor) -> None:
        """Add fields (B, n, n), or (B, C, n, n), to the mean squares: log D and the residual."""
        squares = [
            (field * torch.exp(-share * log)).square().mean(self.kept.axes).sum(0)
            for share in SHARES
        ]
        self.moments = self.moments + torch.stack(squares).cpu()
        self.number += len(field)

    def sum(self, reader: Reader) -> None:
        """Add the mean squares of the other processes."""
        self.moments, self.number = reader.sum(self.moments, self.number)

    def add(self, log: Tensor, field: Tensor, members: Tensor | None) -> None:
        """Add scores of snapshots, fields as of :meth:`measure`, in units of the residual."""
        std = (torch.as_tensor(self.moments) / self.number).clamp(min=1e-300).sqrt().to(field)
        unit, sides = self.kept.each(std[0]), len(self.kept.axes)
        scores = [
            gaussian_crps(field / unit, share * log + (self.kept.each(own) / unit).log(), sides)
            for share, own in zip(SHARES, std)
        ]
        self.scores.add(torch.stack(scores, dim=1), members)

    def share(self) -> float:
        """Return the share; 0 unless significant."""
        scores = self.scores.sums()
        gain = scores[:, :1] - scores[:, 1:]
        best = int(gain.sum(0).argmax())
        return AMPLITUDE_SHARES[best] if bool(significant(gain[:, best])) else 0.0
