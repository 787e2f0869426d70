r"""Compare coherence and phase of pairs of fields of a coupled run with the true ensemble's.

The cross spectrum of fields i and j is :math:`S_{ij} = \langle \hat w_i \hat w_j^* \rangle`, the
mean over the modes of a shell with kx > 0, and over members, starts and the second half of the
stored lead times. The modes with kx < 0 are the conjugates: together with them the imaginary part
would cancel, as it is odd in kx for a flux along x. On a line these are all modes with k > 0. From
S follow per shell

    coherence    |S_ij| / (S_ii S_jj)^(1/2), in [0, 1]
    phase        of field i minus that of field j, radians
    distance     |c - c'| of the complex coherences c, c' of a method and of the reference, which
                 sees both

The score is the root mean square of the distance over shells. The reference is the true ensemble
(``oracle``), or the filtered DNS without one. Finite samples have a positive distance even if the
laws are equal. The row of ``oracle``, the distance of the halves of its members, shows how large
that is. Modes at the largest kx of an even grid are left out, because its sign is unknown.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hpc_closure.closure.gaussian.channel_covariance import coherence
from hpc_closure.evaluate.scores.intervals import Means, block_interval
from hpc_closure.evaluate.scores.joint.channels import TABLE
from hpc_closure.evaluate.scores.record import Score
from hpc_closure.spectral.modes.grid import shell_of, shell_sum

FLOOR = 1e-6  # share of a field's variance below which a shell holds round-off
JUDGED = 1e-3  # least share of the reference's variance of both fields in a shell that counts
HALVES = ("oracle half 1", "oracle half 2")
SCORES = (
    Score(
        name="coherence_distance",
        heading="coherence of pairs",
        meaning="distance of the complex coherence of two fields from that of the true ensemble, "
        "root mean square over wavenumber shells, second half of the run; for ``oracle`` that of "
        "the halves of its members: what chance alone makes",
        table=TABLE,
        requires="a state of several fields (coupled)",
    ),
)
CAPTION = f"{TABLE}: distance of the coherence of pairs from the true ensemble's"


def pair_names(channels: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return {``FIRST-SECOND``: places} of all pairs of channels."""
    return {
        f"{first}-{second}": (i, j)
        for i, first in enumerate(channels)
        for j, second in enumerate(channels)
        if i < j
    }


def cross_spectra(fields: Tensor, lengths: tuple[float, ...] = (1.0, 1.0)) -> Tensor:
    """Average w_i w_j^* over the modes with kx > 0 of each shell.

    Args:
        fields: (..., C, n, n), on a line (..., C, n), of three sides (..., C, n, n, n).
        lengths: length of each side.

    Returns:
        Complex128 (..., C, C, shells); 0 in shells without such modes.
    """
    sides, longest = len(lengths), max(lengths)
    axes, half = tuple(range(-sides, 0)), (fields.shape[-sides] + 1) // 2
    k2 = torch.zeros(())
    for axis, length in zip(axes, lengths, strict=True):
        size = fields.shape[axis]
        k = torch.fft.fftfreq(size, d=1 / size, dtype=torch.float64) * (longest / length)
        k2 = k2 + k.square().reshape([-1 if one == axis else 1 for one in axes])
    shell = shell_of(k2.narrow(-sides, 1, half - 1))
    spectra = torch.fft.fftn(fields.double(), dim=axes, norm="forward")
    spectra = spectra.narrow(-sides, 1, half - 1)
    products = spectra.unsqueeze(-1 - sides) * spectra.unsqueeze(-2 - sides).conj()
    modes = torch.bincount(shell.flatten()).clamp(min=1).to(products.device)
    real, imaginary = (
        shell_sum(part.contiguous(), shell) for part in (products.real, products.imag)
    )
    return torch.complex(real, imaginary) / modes


def complex_coherence(spectra: Tensor) -> Tensor:
    """Compute S_ij / (S_ii S_jj)^(1/2) of cross spectra (..., C, C, shells), same shape."""
    size, phase = coherence(spectra.movedim((-3, -2), (0, 1)))
    return torch.polar(size, phase).movedim((0, 1), (-3, -2))


class Pairs:
    """Cross spectra by method, accumulated lead time by lead time.

    Args:
        channels: names of the fields.
        times: number of lead times; the first half of them is ignored.
        lengths: length of each side.
    """

    def __init__(
        self, channels: Sequence[str], times: int, lengths: tuple[float, ...] = (1.0, 1.0)
    ):
        self.lengths = lengths
        self.pairs, self.since = pair_names(channels), times // 2
        self.sizes: dict[str, dict[str, int]] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, method: str, index: int, ensemble: Tensor) -> None:
        """Add members (M, cases, C, n, n) at lead time ``index``."""
        if index < self.since:
            return
        self.sizes[method] = {"members": len(ensemble), "samples": ensemble.shape[1]}
        for number, states in enumerate(ensemble):  # one member at a time is in memory
            spectra = cross_spectra(states, self.lengths).cpu()
            names = [method]
            if method == "oracle" and len(ensemble) > 1:
                names.append(HALVES[2 * number >= len(ensemble)])
            for name in names:
                self._sums[name] = self._sums.get(name, 0) + spectra

    @property
    def reference(self) -> str:
        """Method with which the others are compared."""
        return "oracle" if HALVES[1] in self._sums else "truth"

    def _carried(self, share: float) -> Tensor:
        """Return which shells (C, shells) have more than a share of the reference's variance."""
        power = torch.diagonal(self._sums[self.reference].mean(0), dim1=0, dim2=1).real.T
        return power > share * power.sum(1, keepdim=True)

    def coherences(self) -> dict[str, dict[str, Tensor]]:
        """Return {pair: {method or ``truth``: complex coherence (shells,)}} without lost runs.

        It is 0 in shells in which the reference has only round-off.
        """
        live = self._carried(FLOOR)
        means = {name: part.mean(0) for name, part in self._sums.items() if name not in HALVES}
        values = {
            name: complex_coherence(part) * (live[:, None] & live)
            for name, part in means.items()
            if bool(torch.view_as_real(part).isfinite().all())
        }
        return {
            pair: {name: part[place] for name, part in values.items()}
            for pair, place in self.pairs.items()
        }

    def records(self, blocks: Tensor) -> Iterator[tuple[str, dict]]:
        """Yield method and columns ``score, channel, value, low, high, members, samples``.

        The value is infinite if a member was lost.

        Args:
            blocks: block of each case (cases,), for the intervals.
        """
        firsts, seconds = map(list, zip(*self.pairs.values(), strict=True))
        law = self._sums[self.reference]
        carried = self._carried(JUDGED)
        judged = (carried[firsts] & carried[seconds]).double()

        def distance(means: Means) -> Tensor:
            """Return the root mean square distance (..., pairs)."""
            own, other = (
                complex_coherence(torch.view_as_complex(means[name])) for name in ("own", "law")
            )
            apart = (own - other)[..., firsts, seconds, :].abs().square()
            return ((apart * judged).sum(-1) / judged.sum(-1)).sqrt()

        for method, sizes in self.sizes.items():
            own, other = self._sums[method], law
            if method == self.reference:
                if method == "truth":
                    continue
                own, other = (self._sums[half] for half in HALVES)
            elif method == "truth":  # one of the ensemble's members, or its equal
                continue
            values = {"own": torch.view_as_real(own), "law": torch.view_as_real(other)}
            numbers = (torch.full((len(self.pairs),), torch.inf),) * 3
            if all(bool(part.isfinite().all()) for part in values.values()):
                numbers = block_interval(values, blocks, distance)
            for pair, *row in zip(self.pairs, *map(Tensor.tolist, numbers), strict=True):
                if not math.isnan(row[0]):  # no shell carries both fields
                    columns = dict(zip(("value", "low", "high"), row, strict=True))
                    yield method, {
                        "score": SCORES[0].name,
                        "channel": pair,
                        **columns,
                        **sizes,
                    }
