r"""Closed-form part of the mean: a regression of U on simple terms, per group of |k|^2.

.. math:: \hat m(k) = \sum_p c_p(|k|^2)\, \hat\phi_p(k)

The coefficients are real, and the terms generic: the features u, v, w, w_x, w_y; w of each earlier
state; the 15 products of two features, free of aliasing. If the model reads previous closures,
these and their advection, -u . grad U, are terms too. ``conditions.physics_estimate`` adds an
estimate of the closure; otherwise no term is specific to the equation.

If the state is a velocity, U and the terms are vectors: the velocity and its earlier values, the
closures and their advection, and the terms of :data:`~..fields.vectors.QUADRATIC`. All components
share a coefficient, so the mean turns with the axes, and has no divergence if the terms have none.

A coefficient is free in each group, or a polynomial in |k|^2 if the criterion prefers it. A
polynomial holds in the whole band, also where the training data are at round-off level. Terms are
chosen by forward selection under the Bayesian information criterion. A law that is linear in V
then costs one product per mode, and an unrelated term costs nothing. This is the sparse regression
of Brunton, Proctor, Kutz (PNAS 2016) with a spectrum as each coefficient.

Of C fields each has coefficients of its own, and its terms include the previous closures of all
fields. Their recursion is then a vector autoregressive one, with a C x C matrix per group and lag.
"""

from itertools import combinations_with_replacement
from typing import Callable, Iterable, Sequence

import torch
from torch import Tensor

from hpc_closure.closure.fields.features import FEATURES, Features
from hpc_closure.closure.fields.modes import Band
from hpc_closure.closure.fields.vectors import QUADRATIC, vector_terms
from hpc_closure.closure.reductions import Reader
from hpc_closure.spectral.modes.grid import to_device_cached

__all__ = ["TermRegression", "term_names"]

KINDS = ("none", "linear", "quadratic")
SIGNIFICANT = 3.0  # standard errors
LARGEST_RADIUS = 0.999  # spectral radius below which feedback of previous closures decays
CARRIED = "u.grad "  # advection of a previous closure


def term_names(
    kind: str,
    history: int = 0,
    physics: bool = False,
    previous: int = 0,
    features: tuple[str, ...] = FEATURES,
    states: tuple[str, ...] = ("w",),
    products: list[str] | None = None,
) -> list[str]:
    """List the names of the candidate terms, in the order of the coefficients.

    Earlier states are named by ``states``, the fields of a state; previous closures are U[-1], ...
    of one field, and U_rain[-1], ... of several. ``products`` are the quadratic terms; None = all
    products of two features.
    """
    if kind not in KINDS:
        raise ValueError(f"regression_terms={kind!r}, expected one of {', '.join(KINDS)}")
    if kind == "none":
        return []
    names = list(features) + list(_lagged(states, history))
    names += ["physics"] * physics
    names += _lagged(_closures(states), previous)
    names += [CARRIED + name for name in _lagged(_closures(states), previous)]
    if kind == "quadratic":
        pairs = [f"{a}*{b}" for a, b in combinations_with_replacement(features, 2)]
        names += pairs if products is None else products
    return names


def _closures(states: Sequence[str]) -> tuple[str, ...]:
    """Name the closure of each field of a state."""
    return tuple(f"U_{state}" for state in states) if len(states) > 1 else ("U",)


def _lagged(fields: Sequence[str], count: int) -> dict[str, tuple[int, int]]:
    """Return (lag, number of the field) by name of a term, for lags from 1 to ``count``."""
    return {
        f"{field}[-{lag}]": (lag, number)
        for lag in range(1, count + 1)
        for number, field in enumerate(fields)
    }


class TermRegression:
    """Terms and their coefficients; ``active`` are the names of the terms in use.

    Args:
        band: the model's band; products are formed on its alias-free grid.
        kind: ``none``, ``linear`` or ``quadratic``.
        history: number of earlier states.
        previous: number of previous closures.
        coefficients: (terms, groups) float64; None = zeros.
        estimate: function from state spectra to spectra of a closure estimate, a further term.
        features: features of the state; None = those of a state of one field. Of C fields each
            has coefficients of its own, (C, terms, groups), and closures are (B, C, ...). A
            velocity has the coefficients of one field, and terms (B, terms, C, ...).
    """

    def __init__(
        self,
        band: Band,
        kind: str,
        history: int = 0,
        previous: int = 0,
        coefficients: Tensor | None = None,
        estimate: Callable[[Tensor], Tensor] | None = None,
        features: Features | None = None,
    ):
        self.band, self.history, self.estimate = band, history, estimate
        self._features = features or Features(band)
        self.features, self.channels = self._features.names, self._features.channels
        self.is_vector = self._features.is_vector
        states = self.channels or ("w",)
        products: list[str] | None = None if self._features.factors else []
        if self.is_vector:
            self.features, self.channels = ("u",), ()
            states, products = self.features, list(QUADRATIC)
        self.names = term_names(
            kind, history, estimate is not None, previous, self.features, states, products
        )
        self._earlier = _lagged(states, history)
        self._last = _lagged(_closures(states), previous)
        self._moved = {CARRIED + name: place for name, place in self._last.items()}
        shape = (*self.channel_shape, len(self.names), len(band.group_k2))
        if coefficients is None:
            coefficients = torch.zeros(shape, dtype=torch.float64)
        if tuple(coefficients.shape) != shape:
            raise ValueError(f"coefficients are {tuple(coefficients.shape)}, expected {shape}")
        self._set(coefficients)

    @property
    def channel_shape(self) -> tuple[int, ...]:
        """Return ``(C,)`` of C > 1 fields, and ``()`` of one."""
        return (len(self.channels),) if self.channels else ()

    def _set(self, coefficients: Tensor) -> None:
        self.coefficients = coefficients
        by_term = coefficients.flatten(0, -3) if self.channels else coefficients[None]
        used = (by_term != 0).any(-1).any(0).tolist()
        self.active = [name for name, use in zip(self.names, used) if use]
        self._on: dict = {}
        self._bound: tuple[Tensor, Tensor] | None = None  # factors, and limit over their radius

    def terms(self, frames_hat: Tensor, names: list[str], moved: Tensor | None = None) -> Tensor:
        """Compute spectra (B, len(names), 2K + 1, K + 1) of terms.

        Args:
            frames_hat: (B, 1 + history + previous, 2K + 1, K + 1): the present state, the earlier
                states, the previous closures. Of C fields it is (B, ..., C, 2K + 1, K + 1).
            names: a subset of ``self.names``.
            moved: (B, previous, 2K + 1, K + 1) advection of the previous closures, if computed
                before; of C fields (B, previous, C, 2K + 1, K + 1).
        """
        if self.is_vector:
            return self._vector_terms(frames_hat, names, moved)
        features = self._features.spectra(frames_hat[:, 0])
        size = self.band.grid.sizes
        needed = sorted({f for name in names if "*" in name for f in name.split("*")})
        fields = {
            name: self.band.to_physical(features[:, self.features.index(name)], size)
            for name in needed
        }
        lags = sorted({self._moved[name][0] for name in names if name in self._moved})
        by_lag: dict[int, Tensor] = {}
        if lags and moved is None:
            last = torch.stack([frames_hat[:, self.history + lag] for lag in lags], dim=1)
            by_lag = dict(zip(lags, self._features.carried(frames_hat[:, 0], last).unbind(1)))
        elif moved is not None:
            by_lag = {lag: moved[:, lag - 1] for lag in lags}
        out = []
        for name in names:
            if "*" in name:
                first, second = name.split("*")
                out.append(self.band.to_spectral(fields[first] * fields[second]))
            elif name in self._earlier:
                lag, channel = self._earlier[name]
                out.append(self._of_channel(frames_hat[:, lag], channel))
            elif name in self._last:
                lag, channel = self._last[name]
                out.append(self._of_channel(frames_hat[:, self.history + lag], channel))
            elif name in self._moved:
                lag, channel = self._moved[name]
                out.append(self._of_channel(by_lag[lag], channel))
            elif name == "physics" and self.estimate is not None:
                out.append(self.estimate(frames_hat[:, 0]))
            else:
                out.append(features[:, self.features.index(name)])
        return torch.stack(out, dim=1)

    def _vector_terms(self, frames_hat: Tensor, names: list[str], moved: Tensor | None) -> Tensor:
        """Compute spectra (B, len(names), C, ...) of terms of a velocity."""
        u_hat, last = frames_hat[:, 0], frames_hat[:, 1 + self.history :]
        made = vector_terms(u_hat, self.band, names)
        if moved is None and any(name in self._moved for name in names):
            moved = self._features.carried(u_hat, last)
        out = []
        for name in names:
            if name in made:
                out.append(made[name])
            elif name in self._earlier:
                out.append(frames_hat[:, self._earlier[name][0]])
            elif name in self._last:
                out.append(last[:, self._last[name][0] - 1])
            elif moved is not None and name in self._moved:
                out.append(moved[:, self._moved[name][0] - 1])
            else:
                out.append(u_hat)
        return torch.stack(out, dim=1)

    def _of_channel(self, spectra: Tensor, channel: int) -> Tensor:
        """Return the spectra (B, ...) of a channel of (B, C, ...); of one field, themselves."""
        return spectra[:, channel] if self.channels else spectra

    def __call__(
        self, frames_hat: Tensor, moved: Tensor | None = None, factors: Tensor | None = None
    ) -> Tensor:
        """Compute the mean (B, 2K + 1, K + 1); arguments as of :meth:`terms`.

        ``factors`` (terms, shells) multiply the coefficients; None = 1.
        """
        active = self.active
        if not active:
            return torch.zeros_like(frames_hat[:, 0])
        key = (str(frames_hat.device), frames_hat.real.dtype)
        rows = [self.names.index(name) for name in active]
        if key not in self._on:
            modes = self.band.spread(self.coefficients[..., rows, :])
            self._on[key] = modes.to(device=frames_hat.device, dtype=frames_hat.real.dtype)
        coefficients = self._on[key]
        if factors is not None:
            chosen = torch.stack([factors[row] for row in rows])
            by_mode = chosen[:, to_device_cached(self.band.grid.shell(), factors)]
            coefficients = coefficients * by_mode.to(coefficients)
        terms = torch.view_as_real(self.terms(frames_hat, active, moved))
        if self.channels:
            each = [(terms * own[..., None]).sum(1) for own in coefficients]
            return torch.view_as_complex(torch.stack(each, 1))
        if self.is_vector:
            coefficients = coefficients[:, None]
        return torch.view_as_complex((terms * coefficients[..., None]).sum(1))

    def spectral_radius(self, factors: Tensor | None = None) -> Tensor:
        r"""Compute the spectral radius (shells,) of the feedback of previous closures.

        It is the largest root of :math:`\det(z^P - \sum_p A_p z^{P-p}) = 0` in the shell, with
        :math:`A_p` the coefficients of the closures p calls ago: a number per group, of C fields a
        C x C matrix. A perturbation of the previous closures decays if it is below 1. ``factors``
        are those of a call.
        """
        known = [name in self.names for name in self._last]
        shell, count = self.band.group_shell, self.band.grid.num_shells
        if not any(known):
            return torch.zeros(count, dtype=torch.float64)
        rows = [
            self.names.index(name) if is_term else 0 for name, is_term in zip(self._last, known)
        ]
        lags = self.coefficients[..., rows, :] * torch.tensor(known).double()[:, None]
        if factors is not None:
            lags = lags * factors.detach().double().cpu()[rows][:, shell]
        fields, size = len(self.channels) or 1, len(rows)  # rows: all fields of lag 1, of lag 2...
        companion = torch.zeros(len(shell), size, size, dtype=torch.float64)
        companion[:, :fields] = lags.reshape(fields, size, -1).permute(2, 0, 1)
        companion[:, fields:, :-fields] = torch.eye(size - fields, dtype=torch.float64)
        radius = torch.linalg.eigvals(companion).abs().amax(1)
        return radius.new_zeros(count).scatter_reduce(0, shell, radius, "amax")

    def bounded(self, factors: Tensor) -> Tensor:
        """Reduce ``factors`` so that no shell's spectral radius exceeds ``LARGEST_RADIUS``.

        In a shell that exceeds it, the coefficients of U[-p] are multiplied by the p-th power of
        the limit over the radius. The result is cached, because the factors do not change within a
        run.
        """
        known = torch.zeros(factors.shape, dtype=torch.float64)
        known.copy_(factors.detach())
        last = self._bound
        if last is None or not torch.equal(last[0], known):
            # compared by value, because an engine may change weights without their version
            radius = self.spectral_radius(known).clamp(min=1e-300)
            last = self._bound = known, (LARGEST_RADIUS / radius).clamp(max=1.0)
        lacks = last[1]
        if bool((lacks == 1).all()):
            return factors
        powers = torch.tensor([self._last.get(name, (0, 0))[0] for name in self.names])
        return factors * lacks.to(factors) ** powers.to(factors)[:, None]

    def fit(
        self, batches: Iterable[tuple[Tensor, Tensor]], reader: Reader = Reader(())
    ) -> list[str]:
        """Fit terms and coefficients to (frames_hat, target_hat) batches; returns term names.

        ``reader`` sums over the processes that have batches.
        """
        band, num = self.band, len(self.names)
        groups = len(band.group_k2)
        fields = len(self.channels) or 1
        gram = torch.zeros(groups, num, num, dtype=torch.float64)
        crosses = torch.zeros(fields, groups, num, dtype=torch.float64)
        powers = torch.zeros(fields, groups, dtype=torch.float64)
        samples = 0
        for frames_hat, target_hat in batches:
            whole = target_hat.to(torch.complex128).cpu()
            whole = whole.flatten(0, 1) if self.is_vector else whole
            targets = whole.unbind(1) if self.channels else (whole,)
            for power, target in zip(powers, targets):
                power += band.by_group(target.abs().square()).sum(0)
            samples += len(whole)
            if num:
                terms = self.terms(frames_hat.to(torch.complex128).cpu(), self.names)
                terms = terms.transpose(1, 2).flatten(0, 1) if self.is_vector else terms
                terms = torch.view_as_real(terms.flatten(2)).permute(2, 1, 0, 3).flatten(2)
                weights = band.weights.flatten()[:, None, None]
                index = band.groups.flatten()
                gram.index_add_(0, index, weights * (terms @ terms.transpose(1, 2)))
                for cross, target in zip(crosses, targets):
                    rows = torch.view_as_real(target.flatten(1)).permute(1, 0, 2).flatten(1)
                    products = weights[..., 0] * (terms @ rows[..., None])[..., 0]
                    cross.index_add_(0, index, products)
        gram, crosses, powers, samples = reader.sum(gram, crosses, powers, samples)
        if not samples:
            raise ValueError("no snapshots to fit the regression to: expected at least one")
        counts = band.group_size * samples
        chosen = [
            select(gram, cross, power, counts, band.group_k2)
            for cross, power in zip(crosses, powers)
        ]
        self._set(torch.stack(chosen) if self.channels else chosen[0])
        ones = torch.ones(num, band.grid.num_shells, dtype=torch.float64)
        self._set(self.coefficients * self.bounded(ones)[:, band.group_shell])
        return self.active


class _Fit:
    """Least squares in all groups, with coefficients of one form.

    Args:
        gram, cross, power, counts: as in :func:`select`.
        k2: (groups,) integer |k|^2.
        degree: degree of the coefficients as polynomials in |k|^2; None = free per group.
    """

    def __init__(self, gram, cross, power, counts, k2, degree: int | None):
        self.power, self.counts = power, counts
        # amplitudes a few millionths of the largest are treated as round-off
        self.floor = (1e-11 * (power / counts).max()).clamp(min=1e-60)
        size = gram.diagonal(dim1=1, dim2=2)
        # a term at round-off level in a group (the mean of a derivative) must not be amplified
        self.seen = size > 1e-14 * (size.sum(0) / counts.sum()) * counts[:, None]
        self.scale = size.clamp(min=1e-300).sqrt()
        gram = gram / (self.scale[:, :, None] * self.scale[:, None, :])
        self.gram = torch.where(self.seen[:, :, None] & self.seen[:, None, :], gram, 0.0)
        self.cross = torch.where(self.seen, cross / self.scale, 0.0)
        self.degree = degree
        if degree is None:
            self.price = counts.log().sum()
            return
        self.price = (degree + 1) * counts.sum().log()
        x = k2.double() / k2.max().clamp(min=1)
        self.powers = torch.stack([x**n for n in range(degree + 1)], dim=-1)
        # (groups, P, degree + 1): powers of |k|^2 in the units of the scaled groups
        self.basis = torch.where(self.seen, self.scale, 0.0)[..., None] * self.powers[:, None]
        all_terms = list(range(cross.shape[1]))
        free = _Fit.free(self, all_terms)
        self.weights = self.floor / (self._rest(free, all_terms) / counts).clamp(min=self.floor)

    def free(self, chosen: list[int]) -> Tensor:
        """Solve for scaled coefficients (groups, chosen) in each group separately."""
        unseen = torch.diag_embed((~self.seen[:, chosen]).to(self.gram.dtype))
        matrix = self.gram[:, chosen][:, :, chosen] + unseen
        matrix = matrix + 1e-12 * torch.eye(len(chosen), dtype=matrix.dtype)
        return torch.linalg.solve(matrix, self.cross[:, chosen])

    def normal(self, chosen: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Form the normal equations of the polynomials, scaled to a unit diagonal.

        Returns the matrix (n, n), the vector (n,) and the scale (n,) of the unknowns, with
        n = chosen x (degree + 1).
        """
        basis, num = self.basis[:, chosen], len(chosen)
        gram, cross = self.gram[:, chosen][:, :, chosen], self.cross[:, chosen]
        weighted = basis * self.weights[:, None, None]
        matrix = torch.einsum("gpi,gpq,gqj->piqj", weighted, gram, basis)
        matrix = matrix.reshape(num * basis.shape[-1], -1)
        vector = torch.einsum("gpi,gp->pi", weighted, cross).flatten()
        size = matrix.diagonal().clamp(min=1e-300).sqrt()
        return matrix / (size[:, None] * size), vector / size, size

    def polynomials(self, chosen: list[int]) -> Tensor:
        """Solve for factors (chosen, degree + 1) of the powers of |k|^2 / max |k|^2."""
        matrix, vector, size = self.normal(chosen)
        factors = torch.linalg.lstsq(matrix, vector[:, None], driver="gelsd").solution[:, 0]
        return (factors / size).unflatten(0, (len(chosen), -1))

    def errors(self, chosen: list[int]) -> Tensor:
        """Compute standard errors (chosen, groups) of the polynomials in every group."""
        matrix, _, size = self.normal(chosen)
        # the weights are the inverse variances of the residual in units of the floor
        spread = self.floor * torch.linalg.pinv(matrix, hermitian=True)
        spread = (spread / (size[:, None] * size)).reshape(len(chosen), self.powers.shape[1], -1)
        by_term = torch.stack(
            [rows.unflatten(1, (len(chosen), -1))[:, p] for p, rows in enumerate(spread)]
        )
        return torch.einsum("gi,pij,gj->pg", self.powers, by_term, self.powers).clamp(min=0).sqrt()

    def solve(self, chosen: list[int]) -> Tensor:
        """Solve for scaled coefficients (groups, chosen)."""
        if self.degree is None:
            return self.free(chosen)
        return (self.basis[:, chosen] * self.polynomials(chosen)).sum(-1)

    def _rest(self, solved: Tensor, chosen: list[int]) -> Tensor:
        """Compute residual sums of squares (groups,)."""
        fitted = (self.gram[:, chosen][:, :, chosen] @ solved[..., None])[..., 0]
        return self.power + (solved * (fitted - 2 * self.cross[:, chosen])).sum(1)

    def cost(self, chosen: list[int]) -> float:
        """Compute the Bayesian information criterion."""
        rest = self._rest(self.solve(chosen), chosen) if chosen else self.power
        fit = (self.counts * (rest / self.counts).clamp(min=self.floor).log()).sum()
        return float(fit + len(chosen) * self.price)

    def forward(self) -> tuple[float, list[int]]:
        """Select terms by forward selection; returns cost and terms."""
        chosen: list[int] = []
        best, num = self.cost(chosen), self.cross.shape[1]
        while len(chosen) < num:
            left = [p for p in range(num) if p not in chosen]
            value, term = min((self.cost(chosen + [p]), p) for p in left)
            if not value < best:
                break
            chosen.append(term)
            best = value
        return best, chosen

    def coefficients(self, chosen: list[int]) -> Tensor:
        """Compute coefficients (P, groups); zero for other terms.

        In groups in which the training data are at round-off level, free coefficients are zero.
        Polynomials are used as far as their sign is certain (SIGNIFICANT standard errors from
        zero).
        """
        groups, num = self.cross.shape
        out = torch.zeros(num, groups, dtype=torch.float64)
        if not chosen:
            return out
        known = self.seen[:, chosen].T
        if self.degree is None:
            values = self.free(chosen).T / self.scale[:, chosen].T
        else:
            values = self.polynomials(chosen) @ self.powers.T
            known = known | (values.abs() > SIGNIFICANT * self.errors(chosen))
        out[chosen] = torch.where(known, values, 0.0)
        return out


def select(gram: Tensor, cross: Tensor, power: Tensor, counts: Tensor, k2: Tensor) -> Tensor:
    """Select terms and coefficients of least Bayesian information criterion, jointly for groups.

    The criterion is ``sum_g N_g log(RSS_g / N_g)`` plus a price per fitted number: one number per
    term and group, or few per term if its coefficient is a polynomial in |k|^2. Damping and
    advection have such coefficients, which are far more accurate from the same data.

    Args:
        gram: (groups, P, P) sums of products of terms.
        cross: (groups, P) sums of terms times target.
        power: (groups,) sums of the target's squares.
        counts: (groups,) real degrees of freedom N_g.
        k2: (groups,) integer |k|^2.

    Returns:
        (P, groups) coefficients, zero for other terms.
    """
    fits = [_Fit(gram, cross, power, counts, k2, degree) for degree in (0, 1, 2, None)]
    _, chosen, best = min(
        ((*fit.forward(), fit) for fit in fits), key=lambda selection: selection[0]
    )
    return best.coefficients(chosen)
