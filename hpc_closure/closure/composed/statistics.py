"""Closed-form statistics of the composite closure, and the factors that training changes.

The phases fill :class:`Statistics` in order. ``mean`` sets the scales of features, the regression,
the first spectrum of the residual and the grid sizes. ``generator`` sets the gain of the mean's
network on unseen members, the amplitude and the law of the residual. ``check`` sets the gains of
the generator (see :mod:`part_selection`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from hpc_closure.closure.fields.modes import Band
from hpc_closure.closure.gaussian.memory import Tags
from hpc_closure.closure.reductions import Reader
from hpc_closure.spectral.modes.grid import resize
from hpc_closure.spectral.modes.resolution import per_side

__all__ = [
    "NO_CENTRE",
    "Adjusted",
    "Adjustment",
    "Batch",
    "Statistics",
    "acts",
    "generator_grid",
]

# Sizes of the generator's grid: even, with small prime factors.
SIZES = (16, 20, 24, 32, 36, 40, 48, 60, 64, 72, 80, 96, 108, 120, 128, 144, 160, 192, 216, 256)
NOT_YET: Any = None


@dataclass(frozen=True)
class Statistics:
    """All closed-form results; None until the phase has run. Tensors are float64, on the CPU.

    Of C channels, spectra are (C, groups), and values per shell are (C, shells).

    In files the first ``_`` of a name is a ``/``: ``first_tail`` is ``first/tail``.

    Attributes:
        library: (terms, groups) coefficients of the regression; of C fields (C, terms, groups).
        features_rms: (features,) rms of the condition channels.
        features_largest: (features,) largest size of each channel, in rms, over members unseen by
            the mean's network; only of a model that reads previous closures.
        summary_mean, summary_std: (51,) of the state's summary numbers (:meth:`Band.summary`);
            None in a model without networks.
        numbers_mean: (terms, 25) coefficients of the mean of the largest modes (:mod:`numbers`),
            if the mean has this part.
        numbers_scale: (51,) scales of its summary numbers.
        state_spectrum: (groups,) variance per mode of the state, in the residual band, if the
            generator reads the whitened state.
        state_least, state_largest: (shells,) least and largest power of each shell of the training
            states, the range of the training; of several fields (F, shells) as ``target_largest``.
            None in old files.
        target_rms: rms of the closure; over the channels its root sum of squares.
        target_largest, target_mean: (shells,) power of a shell that only a share ``RARE`` of the
            fitted closures exceeds, and the mean power; only of a model that reads previous
            closures. Of several fields (F, shells), with one row for all components of a vector.
        target_beyond: (1 + shells,) share of the closures of other training members that exceed
            ``target_largest``, in any shell and in each.
        first_spectrum: (groups,) variance per mode of the regression's residual.
        first_tail: its variance beyond the residual band.
        first_snapshots: number of snapshots in the fit of the mean.
        generator_modes, generator_size: modes of the residual band, points per side of its grid.
        mean_gain: (shells,) gain of the mean's network, judged on ``mean_members`` members.
        mean_share: (shells,) share of that gain in long coupled runs (:mod:`steady`); None = 1.
        mean_largest: largest output of that network on unseen members, in standard deviations of
            the residual; only of a model that reads previous closures.
        amplitude_gain: share of log D in use, judged on ``amplitude_members`` members; 0 = D is 1.
        law_spectrum, law_tail: of the residual q, as those of ``first``.
        law_archive: (N, ..., 2) real pairs of q of N snapshots, if q is drawn from them.
        law_channels: (2, C, C, ...) factors across C channels of the law of q, real and imaginary
            parts (:mod:`~hpc_closure.closure.gaussian.channel_covariance`); None for one field.
        law_modes: (3, ...) factors of the law of q by wavevector
            (:mod:`~hpc_closure.closure.gaussian.mode_covariance`), if q is drawn from it.
        law_offset: (25,) initial position of two peaks of the largest modes (:mod:`mixture`).
        plain_spectrum: (groups,) variance per mode of the residual for D = 1.
        plain_channels: its factors across channels.
        copula_spectrum: (groups,) variance per mode of the normal scores of q at points, in the
            modes of q, if q is drawn from a mixture at every point (:mod:`point_mixture`).
        copula_channels: factors of these scores across channels, as ``law_channels``.
        memory_times: (shells,) correlation times in snapshots; 0 = none.
        memory_spacing: trained intervals between snapshots.
        score_gain: (shells,) gain of the generator, judged on ``score_members`` members.
        score_spread: (shells,) std of the residual over that of the generator's draws.
        centre_inner, centre_middle, centre_outer: weights of the mean of the generator's draws
            (:mod:`centre`), which is subtracted; judged on ``centre_members`` members.
        trajectory_scale: (calls,) CRPS of coupled ensembles before their training.
        trajectory_power: (shells - 1,) mean power of the true states.
        trajectory_noise: (shells,) factor of the noise's std, from coupled runs.
    """

    library: Tensor = NOT_YET
    features_rms: Tensor = NOT_YET
    features_largest: Tensor | None = None
    summary_mean: Tensor | None = None
    summary_std: Tensor | None = None
    numbers_mean: Tensor | None = None
    numbers_scale: Tensor | None = None
    state_spectrum: Tensor | None = None
    state_least: Tensor | None = None
    state_largest: Tensor | None = None
    target_rms: float = NOT_YET
    target_largest: Tensor | None = None
    target_mean: Tensor | None = None
    target_beyond: Tensor | None = None
    first_spectrum: Tensor = NOT_YET
    first_tail: float = NOT_YET
    first_snapshots: float = NOT_YET
    generator_modes: int = NOT_YET
    generator_size: int = NOT_YET
    mean_gain: Tensor | None = None
    mean_members: float | None = None
    mean_share: Tensor | None = None
    mean_largest: float | None = None
    amplitude_gain: float | None = None
    amplitude_members: float | None = None
    law_spectrum: Tensor = NOT_YET
    law_tail: float = NOT_YET
    law_archive: Tensor | None = None
    law_channels: Tensor | None = None
    law_modes: Tensor | None = None
    law_offset: Tensor | None = None
    plain_spectrum: Tensor = NOT_YET
    plain_channels: Tensor | None = None
    copula_spectrum: Tensor | None = None
    copula_channels: Tensor | None = None
    memory_times: Tensor = NOT_YET
    memory_spacing: float | None = None
    score_gain: Tensor | None = None
    score_members: float | None = None
    score_spread: Tensor | None = None
    centre_inner: Tensor | None = None
    centre_middle: Tensor | None = None
    centre_outer: Tensor | None = None
    centre_members: float | None = None
    trajectory_scale: Tensor | None = None
    trajectory_power: Tensor | None = None
    trajectory_noise: Tensor | None = None

    @cached_property
    def mean_gain_in_use(self) -> Tensor | None:
        """Gain (shells,) of the mean's network times its share; None before it is judged."""
        gain, share = self.mean_gain, self.mean_share
        return gain if gain is None or share is None else gain * share[: gain.shape[-1]]

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the statistics that are set, in the form of a file."""
        values = {field.name.replace("_", "/", 1): getattr(self, field.name) for field in KEYS}
        return {
            key: torch.as_tensor(value, dtype=torch.float64)
            for key, value in values.items()
            if value is not None
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Statistics":
        """Read the statistics of a file. Raises KeyError for an unknown key."""
        read: dict[Any, Callable] = {int: int, float: float, float | None: float}
        kinds = {field.name.replace("_", "/", 1): field for field in KEYS}
        return cls(
            **{
                kinds[key].name: read.get(kinds[key].type, _held)(value)
                for key, value in tensors.items()
            }
        )


KEYS = fields(Statistics)
NO_CENTRE: dict[str, Any] = {
    entry.name: None for entry in KEYS if entry.name.startswith("centre_")
}


_acting = WeakTensorKeyDictionary()  # whether gains act, with the version of their values


def acts(gain: Tensor) -> bool:
    """Return whether a gain is not zero in some shell; cached, as exports cannot read values."""
    known = _acting.get(gain)
    if known is None or known[0] != gain._version:
        known = _acting[gain] = gain._version, bool((gain != 0).any())
    return known[1]


def _held(value: Tensor) -> Tensor:
    return value.double().cpu()


@dataclass(frozen=True)
class Batch:
    """A reader's batch.

    Attributes:
        state, target: (B, n, n), of C channels (B, C, n, n).
        history: (B, H, n, n), or None.
        previous: (B, P, n, n) closures, or None; of C channels (B, P, C, n, n), as ``history``.
        tags: (member, moment) of each snapshot, or None if the reader has none.
    """

    state: Tensor
    target: Tensor
    history: Tensor | None
    previous: Tensor | None
    tags: Tags

    @property
    def members(self) -> Tensor | None:
        """Members (B,) of the snapshots; None if the reader has none."""
        return None if self.tags is None else self.tags[0]

    @classmethod
    def read(cls, reader: Reader) -> Iterable["Batch"]:
        """Yield all batches of a reader."""
        for batch in reader:
            yield cls._of(batch)

    @classmethod
    def _of(cls, batch: Any) -> "Batch":
        if not isinstance(batch, dict):
            batch = {"state": batch[0], "target": batch[1]}
        history, previous = (
            None if batch.get(name) is None else torch.as_tensor(batch[name])
            for name in ("history", "previous")
        )
        tags = None
        if "moment" in batch and "member" in batch:
            tags = torch.as_tensor(batch["member"]), torch.as_tensor(batch["moment"])
        return cls(
            torch.as_tensor(batch["state"]),
            torch.as_tensor(batch["target"]),
            history,
            previous,
            tags,
        )


def generator_grid(band: Band, variance: Tensor, network_modes: int) -> tuple[int, int, float]:
    """Choose modes and grid of the residual; returns them and the variance beyond.

    The grid holds all but 1e-7 of the residual's variance with at most 32 points per side, or else
    all but 1e-4, within the band. Channels count by their share of their variance. Of unequal
    sides the numbers are those of the side of fewest modes (:meth:`Band.proportional`).

    Args:
        band: band of the model.
        variance: (groups,) of the residual, summed over the modes of each group; of C channels
            (C, groups).
        network_modes: modes of the networks' spectral convolutions.
    """
    if variance.ndim > 1:
        variance = (variance / variance.sum(-1, keepdim=True).clamp(min=1e-300)).mean(0)
    per_mode = band.spread(variance / band.group_size) * band.weights
    total = float(variance.sum())

    def tail(modes: int) -> float:
        kept = resize(per_mode, per_side(band.proportional(modes), band.grid.dimensions))
        return max(total - float(kept.sum()), 0.0)

    most = min(band.mode_counts)
    options = list(range(min(4, most), most + 1))
    small = [m for m in options if m <= 15 and tail(m) <= 1e-7 * total]
    loose = [m for m in options if tail(m) <= 1e-4 * total]
    modes = (small or loose or [most])[0]
    need = max(2 * modes + 2, 2 * network_modes)
    size = next((s for s in SIZES if s >= need), need + need % 2)
    return modes, size, tail(modes)


class Adjusted(NamedTuple):
    """Factors of the closed forms.

    Attributes:
        noise: (shells,) of the standard deviation of the base law.
        terms: (terms, shells) of the coefficients of the regression.
    """

    noise: Tensor
    terms: Tensor


class Adjustment(nn.Module):
    """Trainable factors of the closed forms, initially 1.

    Args:
        terms: number of terms of the regression.
        shells: number of shells.
        noise: whether the noise amplitude is trained.
    """

    def __init__(self, terms: int, shells: int, noise: bool = True):
        super().__init__()
        self.log_noise: Tensor
        log_noise = torch.zeros(shells)
        if noise:
            self.log_noise = nn.Parameter(log_noise)
        else:
            self.register_buffer("log_noise", log_noise)
        self.terms = nn.Parameter(torch.zeros(terms, shells))

    def forward(self) -> Adjusted:
        return Adjusted(self.log_noise.exp(), 1 + self.terms)

    def __str__(self) -> str:
        noise, terms = (part.detach() for part in self())
        most = float((terms - 1).abs().max()) if terms.numel() else 0.0
        return f"noise x {noise.min():.2f} to {noise.max():.2f}, terms by up to {most:.0%}"
