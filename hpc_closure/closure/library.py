r"""The closed-form part of the mean: a regression of U on simple terms, per group of |k|^2.

.. math:: \hat m(k) = \sum_p c_p(|k|^2)\, \hat\phi_p(k)

with real coefficients and generic terms: the features u, v, w, w_x, w_y (of each history frame:
w) and the 15 products of two features, free of aliasing. Nothing is granted: the terms that stay
are chosen by forward selection under the Bayesian information criterion, so a law that is linear
in V costs one product per mode, and one that no such term explains costs nothing. It is the
sparse regression of Brunton, Proctor, Kutz (PNAS 2016) with a spectrum as each coefficient.
"""

from itertools import combinations_with_replacement
from typing import Iterable

import torch
from torch import Tensor

from hpc_closure.closure.bands import Band
from hpc_closure.closure.conditions import FEATURES, feature_spectra

__all__ = ["Library", "term_names"]

KINDS = ("none", "linear", "quadratic")


def term_names(kind: str, history: int = 0) -> list[str]:
    """Names of the candidate terms, in the order of the coefficients."""
    if kind not in KINDS:
        raise ValueError(f"library={kind!r}, expected one of {', '.join(KINDS)}")
    if kind == "none":
        return []
    names = list(FEATURES) + [f"w[-{lag}]" for lag in range(1, history + 1)]
    if kind == "quadratic":
        names += [f"{a}*{b}" for a, b in combinations_with_replacement(FEATURES, 2)]
    return names


class Library:
    """Terms and their coefficients; ``active`` are the names of the terms in use.

    Args:
        band: the model's band; products are formed on its alias-free grid.
        kind: ``none``, ``linear`` or ``quadratic``.
        history: number of history frames.
        coefficients: (terms, groups) float64; zeros when None.
    """

    def __init__(
        self, band: Band, kind: str, history: int = 0, coefficients: Tensor | None = None
    ):
        self.band, self.history = band, history
        self.names = term_names(kind, history)
        shape = (len(self.names), len(band.group_k2))
        if coefficients is None:
            coefficients = torch.zeros(shape, dtype=torch.float64)
        if tuple(coefficients.shape) != shape:
            raise ValueError(f"coefficients are {tuple(coefficients.shape)}, expected {shape}")
        self._take(coefficients)

    def _take(self, coefficients: Tensor) -> None:
        self.coefficients = coefficients
        used = (coefficients != 0).any(-1).tolist()
        self.active = [name for name, use in zip(self.names, used) if use]
        self._on: dict = {}

    def terms(self, frames_hat: Tensor, names: list[str]) -> Tensor:
        """Spectra (B, len(names), 2K + 1, K + 1) of terms.

        Args:
            frames_hat: (B, 1 + history, 2K + 1, K + 1), the present state first.
            names: a subset of ``self.names``.
        """
        features = feature_spectra(frames_hat[:, 0], self.band)
        size = self.band.grid.size
        needed = sorted({f for name in names if "*" in name for f in name.split("*")})
        fields = {
            name: self.band.to_physical(features[:, FEATURES.index(name)], size) for name in needed
        }
        out = []
        for name in names:
            if "*" in name:
                one, other = name.split("*")
                out.append(self.band.to_spectral(fields[one] * fields[other]))
            elif name.startswith("w["):
                out.append(frames_hat[:, int(name[3:-1])])
            else:
                out.append(features[:, FEATURES.index(name)])
        return torch.stack(out, dim=1)

    def __call__(self, frames_hat: Tensor) -> Tensor:
        """Closed-form mean (B, 2K + 1, K + 1) of frames (B, 1 + history, 2K + 1, K + 1)."""
        active = self.active
        if not active:
            return torch.zeros_like(frames_hat[:, 0])
        key = (str(frames_hat.device), frames_hat.real.dtype)
        if key not in self._on:
            rows = [self.names.index(name) for name in active]
            modes = self.band.spread(self.coefficients[rows])
            self._on[key] = modes.to(device=frames_hat.device, dtype=frames_hat.real.dtype)
        terms = torch.view_as_real(self.terms(frames_hat, active))
        return torch.view_as_complex((terms * self._on[key][..., None]).sum(1))

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> list[str]:
        """Choose terms and coefficients from (frames_hat, target_hat) batches; return names."""
        band, num = self.band, len(self.names)
        groups = len(band.group_k2)
        gram = torch.zeros(groups, num, num, dtype=torch.float64)
        cross = torch.zeros(groups, num, dtype=torch.float64)
        power = torch.zeros(groups, dtype=torch.float64)
        samples = 0
        for frames_hat, target_hat in batches:
            target = target_hat.to(torch.complex128).cpu()
            power += band.by_group(target.abs().square()).sum(0)
            samples += len(target)
            if num:
                terms = self.terms(frames_hat.to(torch.complex128).cpu(), self.names)
                terms = torch.view_as_real(terms).permute(2, 3, 1, 0, 4).flatten(3).flatten(0, 1)
                target = torch.view_as_real(target).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
                weights = band.weights.flatten()[:, None, None]
                index = band.groups.flatten()
                gram.index_add_(0, index, weights * (terms @ terms.transpose(1, 2)))
                cross.index_add_(0, index, weights[..., 0] * (terms @ target[..., None])[..., 0])
        if not samples:
            raise ValueError("the library was given no snapshots to fit")
        self._take(select(gram, cross, power, band.group_size * samples))
        return self.active


def select(gram: Tensor, cross: Tensor, power: Tensor, counts: Tensor) -> Tensor:
    """Forward selection of terms for all groups together.

    Minimises ``sum_g N_g log(RSS_g / N_g) + (terms) sum_g log N_g`` (BIC).

    Args:
        gram: (groups, P, P) sums of products of terms.
        cross: (groups, P) sums of terms times target.
        power: (groups,) sums of the target's squares.
        counts: (groups,) real degrees of freedom N_g.

    Returns:
        (P, groups) coefficients, zero for terms left out.
    """
    groups, num = cross.shape
    # single precision of stored fields: what lies below cannot be told from round-off
    floor = 1e-11 * (power / counts).max()
    penalty = counts.log().sum()
    size = gram.diagonal(dim1=1, dim2=2)
    # a term that is round-off in a group (the mean of a derivative, say) must not be amplified
    seen = size > 1e-14 * (size.sum(0) / counts.sum()) * counts[:, None]
    scale = size.clamp(min=1e-300).sqrt()
    gram = gram / (scale[:, :, None] * scale[:, None, :])
    gram = torch.where(seen[:, :, None] & seen[:, None, :], gram, 0.0)
    cross = torch.where(seen, cross / scale, 0.0)

    def solve(chosen: list[int]) -> Tensor:
        unseen = torch.diag_embed((~seen[:, chosen]).to(gram.dtype))
        matrix = gram[:, chosen][:, :, chosen] + unseen
        matrix = matrix + 1e-12 * torch.eye(len(chosen), dtype=gram.dtype)
        return torch.linalg.solve(matrix, cross[:, chosen])

    def cost(chosen: list[int]) -> float:
        rest = power if not chosen else power - (solve(chosen) * cross[:, chosen]).sum(1)
        fit = (counts * (rest / counts).clamp(min=floor).log()).sum()
        return float(fit + len(chosen) * penalty)

    chosen: list[int] = []
    best = cost(chosen)
    while len(chosen) < num:
        left = [p for p in range(num) if p not in chosen]
        value, term = min((cost(chosen + [p]), p) for p in left)
        if not value < best:
            break
        chosen.append(term)
        best = value
    coefficients = torch.zeros(num, groups, dtype=torch.float64)
    if chosen:
        coefficients[chosen] = (solve(chosen) / scale[:, chosen]).T
    return coefficients
