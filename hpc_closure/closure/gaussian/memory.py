r"""Memory of the residual: base noise that is correlated from call to call, without any state.

A residual whose correlation time, per wavenumber shell, exceeds the interval between calls must
not be drawn afresh each time. Between knots that are T calls apart the noise turns from one draw
into the next,

.. math:: \xi(t) = \cos\theta\,\eta_k + \sin\theta\,\eta_{k+1}, \qquad
          t / T = k + 2\theta/\pi,

a unit-variance Gaussian process with integral time :math:`8T/\pi^2`, which is matched to
:math:`\tau = -\Delta / \ln\rho` of the snapshots' correlation :math:`\rho` at their spacing
:math:`\Delta`. Every draw is keyed, so a call needs no earlier call: members, blocks, restarts and
threads do not matter. White residuals have T = 0 and are drawn afresh.

Snapshots that are many intervals apart may show no correlation though neighbouring closures have
one: then nothing is known of it, and :meth:`LagCorrelation.demand` says so.
"""

import math

import torch
from torch import Tensor

from hpc_closure.closure.fields.modes import Band
from hpc_closure.closure.reductions import Reader

__all__ = ["LagCorrelation", "Tags", "knot_spacing", "position", "share_of_mean"]

# (member, moment) of snapshots, where they are known; neighbouring moments differ by one
Tags = tuple[Tensor, Tensor] | None

# Shortest memory that is believed, as correlation of neighbouring snapshots, and how many standard
# errors of a white residual's correlation it must exceed.
LEAST = 0.2
CERTAIN = 4.0
INTEGRAL = 8 / math.pi**2
# Correlation of neighbouring closures up to which they are drawn afresh in any case (T < 1), and
# share of the residual's power from which it matters whether a shell's is larger.
WHITE = math.exp(-1 / INTEGRAL)
MATTERS = 0.01


class LagCorrelation:
    """Correlation, per shell, of spectra of neighbouring snapshots of a member."""

    def __init__(self, kept: Band):
        self.kept = kept
        self.product = torch.zeros(kept.grid.num_shells, dtype=torch.float64)
        self.power = torch.zeros_like(self.product)
        self.pairs = 0
        self.last: dict[int, tuple[int, Tensor]] = {}

    def add(self, q_hat: Tensor, tags: Tags) -> None:
        """Take in spectra (B, ...) with their (member, moment); no tags, no memory."""
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
        # mode after mode into the running sums: other bits than sums of sums
        weighted = values.double().cpu() * self.kept.weights
        sums.index_add_(0, self.kept.grid.shell().flatten(), weighted.flatten())

    def collect(self, reader: Reader) -> None:
        """Take in what the other processes have seen, each of members of its own."""
        self.product, self.power, self.pairs = reader.sum(self.product, self.power, self.pairs)

    def times(self) -> Tensor:
        """Correlation time per shell in units of the snapshots' spacing; 0 = none seen."""
        rho, error = self._correlation()
        tau = -1 / rho.clamp(min=1e-6, max=0.999).log()
        seen = (rho > LEAST) & (rho > CERTAIN * error) & (self.power > 0)
        return torch.where(seen, tau, 0.0)

    def _correlation(self) -> tuple[Tensor, Tensor]:
        """Of neighbouring snapshots per shell, and its standard error if they are white."""
        rho = self.product / self.power.clamp(min=1e-300)
        numbers = self.kept.grid.shell_sum(
            torch.ones(self.kept.shape).double()
        )  # real degrees of freedom
        return rho, (self.pairs * numbers.clamp(min=1)).clamp(min=1).rsqrt()

    def demand(self, spacing: float) -> None:
        """Raise ValueError unless the snapshots tell the memory from one closure to the next.

        They do where it is seen in them, and where it would be: as they are, neighbouring
        closures of a shell may still be correlated by :math:`\\rho^{1/s}`, with the largest
        :math:`\\rho` that these data allow.

        Args:
            spacing: closure intervals s from one snapshot to the next.
        """
        way_out = (
            "set generate.record.burst to at least 2, or record.every to one closure interval, "
            "or model.memory=off for noise that is white from call to call"
        )
        if not self.pairs:
            raise ValueError(
                f"no snapshot has a neighbour in its trajectory, which would tell the memory of "
                f"what the mean leaves of the closure: {way_out}"
            )
        if spacing < 1 + 1e-6:
            return
        rho, error = self._correlation()
        most = (rho.clamp(min=0) + CERTAIN * error).clamp(max=1) ** (1 / spacing)
        open_ = (self.times() == 0) & (self.power > MATTERS * self.power.sum()) & (most > WHITE)
        if not bool(open_.any()):
            return
        shell = int(torch.where(open_, self.power, 0.0).argmax())
        raise ValueError(
            f"snapshots are {spacing:g} closure intervals apart (generate.record.every) and in "
            f"shell {shell} correlated by {float(rho[shell]):.2f}: the memory of what the mean "
            f"leaves of the closure may be {float(most[shell]):.2f} from one call to the next, "
            f"more than the {WHITE:.2f} up to which draws are white anyhow; {way_out}"
        )


def knot_spacing(times: Tensor, spacing: float) -> Tensor:
    """Knot spacing T per shell in trained intervals, a power of two; 0 = white.

    Args:
        times: correlation times in snapshots, 0 = white.
        spacing: trained intervals from one snapshot to the next.
    """
    calls = times * spacing / INTEGRAL
    rounded = 2.0 ** torch.round(torch.log2(calls.clamp(min=1e-9)))
    return torch.where(calls > 1, rounded, 0.0)


def share_of_mean(rho: Tensor, held: float) -> Tensor:
    r"""Variance of a mean over ``held`` trained intervals over that of one, per shell.

    Closures of consecutive intervals that are correlated by :math:`\rho^k`, k apart, have means
    over m of them with

    .. math:: \frac{m (1 - \rho^2) - 2 \rho (1 - \rho^m)}{m^2 (1 - \rho)^2}

    of the variance: 1 / m where they are white, nearly 1 where m is short beside their memory.

    Args:
        rho: (shells,) correlation of neighbouring intervals, 0 = white, below 1.
        held: m > 0.
    """
    among = held * (1 - rho.square()) - 2 * rho * (1 - rho.pow(held))
    return among / (held * (1 - rho)).square()


def position(call: float, knots: float) -> tuple[int, float, float]:
    """(k, cos theta, sin theta) of a call."""
    before = math.floor(call / knots)
    theta = 0.5 * math.pi * (call / knots - before)
    return before, math.cos(theta), math.sin(theta)
