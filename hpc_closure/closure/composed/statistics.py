"""Closed-form statistics of the default model: the record, and what single numbers follow from.

:class:`Statistics` is filled phase by phase: ``mean`` gives feature scales, the regression, the
first residual spectrum and sizes; ``generator`` the gains of the mean network on members it has
not seen, the amplitude and the law of the residual; ``check`` the gains of the generator (see
:mod:`gate`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hpc_closure.closure.fields.modes import Band
from hpc_closure.closure.gaussian.memory import Tags
from hpc_closure.closure.reductions import Reader
from hpc_closure.spectral.modes.grid import resize

__all__ = ["NO_CENTRE", "Adjusted", "Adjustment", "Batch", "Statistics", "generator_grid"]

# Sizes of the generator's grid: even, with small prime factors.
SIZES = (16, 20, 24, 32, 36, 40, 48, 60, 64, 72, 80, 96, 108, 120, 128, 144, 160, 192, 216, 256)
NOT_YET: Any = None


@dataclass(frozen=True)
class Statistics:
    """Every closed-form result; None until its phase has run. Tensors are float64, on the CPU.

    In files a field's first ``_`` is a ``/``: ``first_tail`` is ``first/tail``.

    Attributes:
        library: (terms, groups) coefficients of the regression.
        features_rms: (features,) rms of the condition channels.
        features_largest: (features,) largest size of one, in rms, that members unseen by the
            network of the mean have; of a model that reads closures of its own.
        summary_mean, summary_std: (51,) of the state's numbers (:meth:`Band.summary`); None in a
            model without networks.
        numbers_mean: (terms, 25) coefficients of the mean of the largest modes (:mod:`numbers`),
            of a model whose mean has them.
        numbers_scale: (51,) of the numbers that they read.
        state_spectrum: (groups,) variance per mode of the state, in the residual band; where the
            generator reads the state whitened.
        target_rms: of the closure.
        target_largest, target_mean: (shells,) power of a shell that hardly a closure of the fit
            exceeds, and its mean; of a model that reads closures of its own.
        target_beyond: (1 + shells,) share of the closures of other training members that exceed
            it, in any shell and in each.
        first_spectrum: (groups,) variance per mode that the regression leaves.
        first_tail: variance of that beyond the residual band.
        first_snapshots: that the mean was fitted on.
        generator_modes, generator_size: modes of the residual band, points per side of its grid.
        mean_gain: (shells,) of the mean network; ``mean_members`` have decided.
        mean_share: (shells,) share of that gain which coupled runs bear (:mod:`steady`); None = 1.
        mean_largest: the largest answer of that network to them, in standard deviations of the
            residual; of a model that reads closures of its own.
        amplitude_gain: share of log D in use; 0 = D is 1; ``amplitude_members`` have decided.
        law_spectrum, law_tail: of the residual, like those of ``first``.
        law_modes: (3, ...) factors of the law of q by wavevector (:mod:`mode_law`), of a residual
            that is drawn from it.
        law_offset: (25,) where two peaks of its largest modes begin (:mod:`mixture`).
        plain_spectrum: (groups,) of the residual where D = 1.
        memory_times: (shells,) correlation times in snapshots; 0 = none.
        memory_spacing: trained intervals from one snapshot to the next.
        score_gain: (shells,) of the generator; ``score_members`` have decided.
        score_spread: (shells,) std of the residual over that of the generator's samples.
        centre_inner, centre_middle, centre_outer: weights of the mean of the generator's draws
            (:mod:`centre`), to be taken out; ``centre_members`` have let it act.
        trajectory_scale: (calls,) CRPS of coupled ensembles before they were trained.
        trajectory_power: (shells - 1,) mean power of the states that they were compared with.
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
    law_modes: Tensor | None = None
    law_offset: Tensor | None = None
    plain_spectrum: Tensor = NOT_YET
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

    def to_tensors(self) -> dict[str, Tensor]:
        """As a file holds them, those that are there."""
        values = {field.name.replace("_", "/", 1): getattr(self, field.name) for field in KEYS}
        return {
            key: torch.as_tensor(value, dtype=torch.float64)
            for key, value in values.items()
            if value is not None
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Statistics":
        """The record of a file; a key that is none of its own is an error (KeyError)."""
        read: dict[Any, Callable] = {int: int, float: float, float | None: float}
        kinds = {field.name.replace("_", "/", 1): field for field in KEYS}
        return cls(
            **{
                kinds[key].name: read.get(kinds[key].type, _held)(value)
                for key, value in tensors.items()
            }
        )


KEYS = fields(Statistics)
NO_CENTRE: dict[str, Any] = {one.name: None for one in KEYS if one.name.startswith("centre_")}


def _held(value: Tensor) -> Tensor:
    return value.double().cpu()


@dataclass(frozen=True)
class Batch:
    """A reader's batch.

    Attributes:
        state, target: (B, n, n).
        history: (B, H, n, n), or None.
        previous: (B, P, n, n) closures, or None.
        tags: (member, moment) of each, or None where the reader does not tell.
    """

    state: Tensor
    target: Tensor
    history: Tensor | None
    previous: Tensor | None
    tags: Tags

    @property
    def members(self) -> Tensor | None:
        """(B,), or None where the reader does not tell."""
        return None if self.tags is None else self.tags[0]

    @classmethod
    def read(cls, reader: Reader) -> Iterable["Batch"]:
        """All of a reader."""
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
    """(modes, grid, variance beyond) that hold the residual.

    All but 1e-7 of its variance on a grid of at most 32, else all but 1e-4, within the band.

    Args:
        band: of the model.
        variance: (groups,) of the residual, summed over the modes of each group.
        network_modes: modes of the networks' spectral convolutions.
    """
    per_mode = band.spread(variance / band.group_size) * band.weights
    total = float(variance.sum())

    def tail(modes: int) -> float:
        return max(total - float(resize(per_mode, modes).sum()), 0.0)

    options = list(range(min(4, band.modes), band.modes + 1))
    small = [m for m in options if m <= 15 and tail(m) <= 1e-7 * total]
    loose = [m for m in options if tail(m) <= 1e-4 * total]
    modes = (small or loose or [band.modes])[0]
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
    """Starts as no change.

    Args:
        terms: number of the regression's.
        shells: number of them.
        noise: there is noise whose size can be trained.
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
