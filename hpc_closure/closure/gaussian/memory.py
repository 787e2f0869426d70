r"""Memory of the residual: base noise that is correlated between calls but stores no state.

If the correlation time of the residual in a shell exceeds the interval between closure calls,
draws of consecutive calls must be correlated. Between knots that are T calls apart, the noise
rotates from one draw to the next,

.. math:: \xi(t) = \cos\theta\,\eta_k + \sin\theta\,\eta_{k+1}, \qquad
          t / T = k + 2\theta/\pi,

which is a unit-variance Gaussian process with integral time :math:`8T/\pi^2`. T is chosen to match
:math:`\tau = -\Delta / \ln\rho`, with :math:`\rho` the correlation of snapshots at their spacing
:math:`\Delta`. Every draw is keyed, so a call needs no earlier call, and results do not depend on
members, blocks, restarts and threads. White residuals have T = 0 and independent draws.

Snapshots that are many intervals apart may be uncorrelated although neighbouring closures are
correlated. The memory is then unknown, and :meth:`LagCorrelation.demand` raises an error.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hpc_closure.closure.fields.modes import Band
from hpc_closure.closure.reductions import Reader

__all__ = ["LagCorrelation", "Tags", "knot_spacing"]

# (member, time index) of snapshots, if known; indices of neighbouring snapshots differ by 1
Tags = tuple[Tensor, Tensor] | None

# A memory counts as detected if the correlation of neighbouring snapshots exceeds LEAST, and
# CERTAIN standard errors of the correlation of a white residual.
LEAST = 0.2
CERTAIN = 4.0
INTEGRAL = 8 / math.pi**2  # integral time over T
# Draws are independent in any case up to the correlation WHITE of neighbouring closures (T < 1).
# Shells with less than the share MATTERS of the residual's power are not checked.
WHITE = math.exp(-1 / INTEGRAL)
MATTERS = 0.01


class LagCorrelation:
    """Correlation per shell between neighbouring snapshots of a member.

    Args:
        kept: band of the residual.
        channel_shape: () of one field; (C,) of C channels, whose results are (C, shells).
        whole: index of each channel's field, where the components of a vector are one field and
            have one memory; None = each channel is a field.
    """

    def __init__(
        self,
        kept: Band,
        channel_shape: tuple[int, ...] = (),
        whole: Sequence[int] | None = None,
    ):
        self.kept, self.whole = kept, whole
        shape = *channel_shape, kept.grid.num_shells
        self.product = torch.zeros(shape, dtype=torch.float64)
        self.power = torch.zeros_like(self.product)
        self.pairs = 0
        self.last: dict[int, tuple[int, Tensor]] = {}

    def add(self, q_hat: Tensor, tags: Tags) -> None:
        """Add spectra (B, ...) with their tags; without tags nothing is added."""
        if tags is None:
            return
        for row, member, time in zip(q_hat, tags[0].tolist(), tags[1].tolist()):
            before = self.last.get(member)
            self.last[member] = (time, row)
            if before is not None and time == before[0] + 1:
                self._add((before[1].conj() * row).real, self.product)
                both = 0.5 * (before[1].abs().square() + row.abs().square())
                self._add(both, self.power)
                self.pairs += 1

    def _add(self, values: Tensor, sums: Tensor) -> None:
        # add mode by mode to the running sums: the order of additions decides the last bits
        weighted = values.double().cpu() * self.kept.weights
        sums.index_add_(-1, self.kept.grid.shell().flatten(), weighted.flatten(self.kept.axes[0]))

    def collect(self, reader: Reader) -> None:
        """Add the sums of all processes; each process has read different members."""
        self.product, self.power, self.pairs = reader.sum(self.product, self.power, self.pairs)
        if self.whole is not None and len(set(self.whole)) < len(self.whole):
            self.product, self.power = self._of_fields(self.product), self._of_fields(self.power)

    def _of_fields(self, sums: Tensor) -> Tensor:
        """Average sums (C, shells) over the channels of each field."""
        assert self.whole is not None
        places = torch.tensor(self.whole)
        means = torch.zeros_like(sums).index_add_(0, places, sums)
        return means[places] / torch.bincount(places)[places][:, None]

    def times(self) -> Tensor:
        """Compute the correlation time (shells,) in units of snapshot spacings; 0 = none found."""
        rho, error = self._correlation()
        tau = -1 / rho.clamp(min=1e-6, max=0.999).log()
        detected = (rho > LEAST) & (rho > CERTAIN * error) & (self.power > 0)
        return torch.where(detected, tau, 0.0)

    def _correlation(self) -> tuple[Tensor, Tensor]:
        """Compute the correlation (shells,) and its standard error (shells,) for white q."""
        rho = self.product / self.power.clamp(min=1e-300)
        degrees_of_freedom = self.kept.grid.shell_sum(torch.ones(self.kept.shape).double())
        return rho, (self.pairs * degrees_of_freedom.clamp(min=1)).clamp(min=1).rsqrt()

    def demand(self, spacing: float) -> None:
        """Raise ValueError unless the snapshots determine the memory between closures.

        They do in shells where they show a correlation, and in shells where the correlation of
        neighbouring closures is small in any case: it is at most :math:`\\rho^{1/s}`, with the
        largest :math:`\\rho` that these data allow.

        Args:
            spacing: closure intervals s from one snapshot to the next.
        """
        way_out = (
            "set generate.record.burst to at least 2, or record.every to one closure interval, "
            "or model.noise_memory=off for noise that is white from call to call"
        )
        if not self.pairs:
            raise ValueError(
                f"no snapshot has a neighbour in its trajectory, so the memory of the residual is "
                f"unknown: {way_out}"
            )
        if spacing < 1 + 1e-6:
            return
        rho, error = self._correlation()
        most = (rho.clamp(min=0) + CERTAIN * error).clamp(max=1) ** (1 / spacing)
        undetermined = (
            (self.times() == 0)
            & (self.power > MATTERS * self.power.sum(-1, keepdim=True))
            & (most > WHITE)
        )
        if not bool(undetermined.any()):
            return
        worst = int(torch.where(undetermined, self.power, 0.0).argmax())
        shell, rho, most = worst % rho.shape[-1], rho.flatten()[worst], most.flatten()[worst]
        raise ValueError(
            f"snapshots are {spacing:g} closure intervals apart (generate.record.every) and in "
            f"shell {shell} correlated by {float(rho):.2f}: the correlation of the "
            f"residual may be {float(most):.2f} from one call to the next, more than "
            f"{WHITE:.2f}, up to which draws are independent; {way_out}"
        )


def knot_spacing(times: Tensor, spacing: float) -> Tensor:
    """Compute the knot spacing T (shells,) in trained intervals, a power of two; 0 = white.

    Args:
        times: correlation times in snapshot spacings, 0 = white.
        spacing: trained intervals from one snapshot to the next.
    """
    calls = times * spacing / INTEGRAL
    rounded = 2.0 ** torch.round(torch.log2(calls.clamp(min=1e-9)))
    return torch.where(calls > 1, rounded, 0.0)
