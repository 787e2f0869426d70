r"""Covariance of the residual across the channels of a state, a Hermitian matrix per wavevector.

A homogeneous law of C fields has a C x C matrix :math:`S(k) = E[\hat q_k \hat q_k^*]` per mode,
with :math:`S(-k) = \overline{S(k)}`. The diagonal law
(:mod:`~hpc_closure.closure.gaussian.kriging`, one per channel) has variances v only. Channel
factors turn its draws z, independent between channels, into draws of the law:

.. math:: q = F z, \qquad F\,\mathrm{diag}(v)\,F^* = S(k).

S is averaged over the modes that a symmetry makes equal. The groupings, from coarse to fine:

* ``isotropic``: invariant under rotation and reflection. One real matrix per :math:`|k|^2`; a
  scalar and a pseudo-scalar are uncorrelated.
* ``isotropic_handed``: invariant under rotation only. One real matrix per :math:`|k|^2`.
* ``zonal``: invariant under y -> -y. One complex matrix per (kx, \|ky\|), hence the imaginary part
  of S may be odd in kx, as for the heat flux of a baroclinic wave.
* ``mode``: one complex matrix per mode.

The last two may be shrunk towards a coarser one, as by n0 earlier snapshots of it. A line has only
the last two, where ``zonal`` is invariance under reflection of the line. A cube has no
``zonal``. A finer grouping is used if the Gaussian likelihood of unseen members is clearly larger
under it.

The components of a vector are first turned along and across k (Helmholtz),

.. math:: a = i\,(k_x u + k_y v) / |k|, \qquad b = i\,(-k_y u + k_x v) / |k|.

Like the divergence and the vorticity, a is the spectrum of a scalar and b that of a pseudo-scalar.
A vector without divergence has a = 0 for all modes, so its draws have none either.

On a cube two components are across k (Craya 1958, Herring 1974), :math:`b_j = i\,e_j\cdot u` with
:math:`e_1 = k\times e_z / |k\times e_z|` and :math:`e_2 = k\times e_1 / |k|`. A rotation about k
turns them into each other, so an isotropic law of two vectors p and q has only

.. math:: E[b^p b^{q*}] = \alpha\,1 + \beta\,J, \qquad J = \begin{pmatrix} 0 & i \\ -i & 0
          \end{pmatrix},

and :math:`\beta`, the helicity, only if reflections change the law. Components across k are
uncorrelated with those along k, and with scalars.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hpc_closure.closure.fields.modes import Band
from hpc_closure.closure.reductions import Reader
from hpc_closure.spectral.modes.grid import shell_sum, to_device_cached

__all__ = ["ChannelCovariance", "apply_channels", "coherence", "covariance", "remove_channels"]

COMPONENTS = ("vector x", "vector y", "vector z")
KINDS = ("scalar", "pseudo-scalar", *COMPONENTS)
LEAST = 8  # members; with fewer the coarsest grouping is used
NATS = 10.0  # least gain of a finer grouping, per snapshot of a member
EARLIER = (4, 16, 64, 256, 1024)  # n0, snapshots of the coarser grouping
CAP = 1e-6  # smallest share of a channel's variance of a shell that is judged
NUGGET = 1e-10  # added to the correlation matrices, whose channels may depend on each other
ABSENT = 1e-10  # share of a vector's variance below which it has no part along (across) k
SINGULAR = 1e-8  # singular value of a vector's block, over the largest, that is taken for 0


@dataclass(frozen=True)
class Grouping:
    """One way to average the matrices.

    Attributes:
        name: ``isotropic``, ``isotropic_handed``, ``zonal`` or ``mode``.
        towards: name of the coarser grouping that it is shrunk towards; "" if it is not shrunk.
        earlier: n0, number of snapshots that the coarser grouping counts for.
    """

    name: str
    towards: str = ""
    earlier: int = 0


class ChannelCovariance:
    """Second moments of snapshots of C channels, from which the channel factors are computed.

    Args:
        kept: band of the residual.
        kinds: kind of each channel: ``scalar``, ``pseudo-scalar``, or ``vector x`` followed by
            ``vector y``, on a cube also by ``vector z``.

    Attributes:
        grouping: name of the grouping that :meth:`factors` has chosen; "" before.
        chosen: the grouping itself, with its shrinkage.

    Raises:
        ValueError: a kind is unknown, a vector is incomplete, or a line has a vector.
    """

    def __init__(self, kept: Band, kinds: Sequence[str]):
        self.band, self.kinds = kept, tuple(kinds)
        self.vectors = _vectors(self.kinds, kept.grid.dimensions)
        count = len(self.kinds)
        self.sums = torch.zeros(2, count, count, *kept.shape, dtype=torch.complex128)
        self.numbers = [0, 0]
        self.members: set[int] = set()
        self.unnamed = 0
        self.chosen: Grouping | None = None
        odd = [kind in ("pseudo-scalar", *COMPONENTS[1:]) for kind in self.kinds]
        signs = torch.where(torch.tensor(odd), -1.0, 1.0).double()
        #: sign of S_ij under reflection, (C, C, 1)
        self._signs = (signs[:, None] * signs)[..., None]
        #: components of a vector across k that rotations about k turn into each other
        across = [each[1:] for each in self.vectors if kept.grid.dimensions == 3]
        self._across = [place for each in across for place in each]

    @property
    def grouping(self) -> str:
        return self.chosen.name if self.chosen else ""

    def add(self, q_hat: Tensor, members: Tensor | None) -> None:
        """Add spectra (B, C, 2K + 1, K + 1) of q.

        The snapshots of a member belong to one of two halves, each of which judges the law of the
        other. Without ``members`` each snapshot is a member of its own.

        Args:
            q_hat: the spectra.
            members: (B,) member of each snapshot, or None.

        Raises:
            ValueError: ``q_hat`` has another number of channels or modes.
        """
        expected = (len(self.kinds), *self.band.shape)
        if tuple(q_hat.shape[1:]) != expected:
            raise ValueError(
                f"spectra have the shape {tuple(q_hat.shape)}, expected (B, "
                f"{', '.join(map(str, expected))}): one row per kind of channel"
            )
        if members is None:
            halves = (self.unnamed + torch.arange(len(q_hat))) % 2
            self.unnamed += len(q_hat)
        else:
            names = [int(name) for name in members.tolist()]
            self.members.update(names)
            # not even and odd ids: members that are held out can be every fourth one
            halves = torch.tensor([name.bit_count() % 2 for name in names])
        for half in range(2):
            q = q_hat[(halves == half).to(q_hat.device)].to(torch.complex128)
            self.sums[half] += torch.einsum("bi...,bj...->ij...", q, q.conj()).cpu()
            self.numbers[half] += len(q)

    def factors(self, reader: Reader, variance: Tensor) -> Tensor:
        """Compute real and imaginary part of F, (2, C, C, 2K + 1, K + 1) float64.

        F is lower triangular up to a block per vector. A channel whose variance is 0 has the
        row and column of the identity, and the other channels have the rest of S.

        Args:
            reader: reader of the added snapshots; it sums over processes.
            variance: (C, 2K + 1, K + 1) v of every channel and mode.

        Raises:
            ValueError: no snapshot was added, or ``variance`` has another shape.
        """
        if variance.shape != self.sums.shape[2:]:
            raise ValueError(
                f"variance has the shape {tuple(variance.shape)}, expected "
                f"{tuple(self.sums.shape[2:])}: a variance per channel and mode"
            )
        sums, *numbers, unnamed = reader.sum(
            torch.view_as_real(self.sums), *self.numbers, self.unnamed
        )
        members = len(set(reader.every(sorted(self.members)))) + unnamed
        if not sum(numbers):
            raise ValueError("no snapshot was added, expected at least one: call add first")
        turn = self._turn()
        moments = torch.view_as_complex(sums.contiguous()).flatten(3)
        moments = self._turned(moments, turn)
        total = moments.sum(0)
        present = self._present(torch.diagonal(total, dim1=0, dim2=1).real.movedim(-1, 0))
        moments, total = moments * _outer(present), total * _outer(present)
        self.chosen = self._choose(moments, numbers, members)
        law = self._grouped(self.chosen, total / sum(numbers), sum(numbers))
        out = self._factors(law, turn, variance.double().cpu().flatten(1))
        out = self.band.hermitian(out.unflatten(-1, self.band.shape))
        return torch.stack([out.real, out.imag])

    def _factors(self, law: Tensor, turn: Tensor, variance: Tensor) -> Tensor:
        """Compute the factors of S (C, C, modes), along and across k, for variances (C, modes).

        Here and below ``modes`` is one axis, of all modes of the band.
        """
        drawn = variance > 0
        # if one component of a vector is not drawn, the other one has its own variance
        apart = torch.zeros(drawn.shape[1:], dtype=torch.bool)
        for each in self.vectors:
            apart |= ~drawn[each].all(0)
        straight = _identity(turn)
        law = torch.where(apart, self._turned(law, turn.transpose(0, 1).conj()), law)
        turn = torch.where(apart, straight, turn)
        root, scale, _ = _cholesky(law * _outer(drawn))
        root = _to_modes(scale[..., None] * root)
        back = turn.transpose(0, 1).conj()
        # turned back on both sides, so that F = 1 where S = diag(v)
        out = _product(_product(back, root), turn)
        return torch.where(_outer(drawn), out / variance.clamp(min=1e-300).sqrt(), straight)

    def _turn(self) -> Tensor:
        """Return the matrices (C, C, modes) to components along and across k, complex128."""
        grid = self.band.grid
        sides = torch.broadcast_tensors(*grid.k)
        k = torch.stack([side.double().flatten() for side in sides])
        size = grid.k2.double().flatten().sqrt()
        out = _identity(self.sums[0].flatten(2)).clone()
        frame = _frame(torch.where(size > 0, k / size.clamp(min=1e-300), 0.0))
        straight = torch.eye(len(k), dtype=frame.dtype)[..., None]
        frame = torch.where(size > 0, 1j * frame, straight)
        for each in self.vectors:
            for i, row in enumerate(each):
                for j, column in enumerate(each):
                    out[row, column] = frame[i, j]
        return out

    def _turned(self, matrices: Tensor, turn: Tensor) -> Tensor:
        """Compute R S R^* of matrices (..., C, C, modes)."""
        if not self.vectors:
            return matrices
        return _product(_product(turn, matrices), turn.transpose(0, 1).conj())

    def _present(self, power: Tensor) -> Tensor:
        """Return where channels (C, modes) along and across k have more power than round-off."""
        out = power > 0
        weights = self.band.weights.flatten().clone()
        weights[0] = 0.0
        for each in self.vectors:
            both = sum(power[one] for one in each)
            for one in each:
                share = (weights * power[one]).sum() / (weights * both).sum().clamp(min=1e-300)
                out[one, weights > 0] &= share > ABSENT
        return out

    def _grouped(self, grouping: Grouping, matrices: Tensor, number: int) -> Tensor:
        """Average matrices (C, C, modes), the mean of ``number`` snapshots, as a grouping does."""
        average: dict[str, Callable[[Tensor], Tensor]] = {
            "isotropic": lambda s: self._isotropic(s, False),
            "isotropic_handed": lambda s: self._isotropic(s, True),
            "zonal": self._zonal,
            "mode": lambda s: s,
        }
        out = average[grouping.name](matrices)
        if not grouping.towards:
            return out
        number *= 2 if grouping.name == "zonal" else 1  # (kx, ky) and (kx, -ky)
        coarse = average[grouping.towards](matrices)
        return (number * out + grouping.earlier * coarse) / (number + grouping.earlier)

    def _isotropic(self, matrices: Tensor, handed: bool) -> Tensor:
        """Average real parts (C, C, modes) per ``|k|^2``; k = 0 over the rotations of the box."""
        out = self._per_group(matrices.real).to(matrices.dtype)
        corner, turns = matrices.real[..., 0], self._rotations()
        out[..., 0] = sum(one @ corner @ one.T for one in turns) / len(turns)
        if self._across:
            out = self._turning(matrices, out, handed)
        return out if handed else torch.where(self._signs > 0, out, 0.0)

    def _per_group(self, values: Tensor) -> Tensor:
        """Average real values (..., modes) over the modes of equal ``|k|^2``."""
        by_group = self.band.by_group(values.unflatten(-1, self.band.shape))
        return self.band.spread(by_group / self.band.group_size).flatten(-len(self.band.shape))

    def _turning(self, matrices: Tensor, average: Tensor, handed: bool) -> Tensor:
        """Make averages those of components across k of a cube, which turn about k."""
        out, across = average.clone(), self._across
        for row in across:  # neither with scalars nor with what is along k
            for column in range(len(self.kinds)):
                if column not in across:
                    out[row, column, 1:] = out[column, row, 1:] = 0.0
        for i, j in zip(across[::2], across[1::2]):
            for m, n in zip(across[::2], across[1::2]):
                equal = 0.5 * (out[i, m] + out[j, n])
                turned = 0.5 * (matrices[i, n] - matrices[j, m]).imag
                turned = 1j * self._per_group(turned) if handed else torch.zeros_like(equal)
                for (row, column), value in {
                    (i, m): equal,
                    (j, n): equal,
                    (i, n): turned,
                    (j, m): -turned,
                }.items():
                    out[row, column, 1:] = value[1:]
        return out

    def _rotations(self) -> list[Tensor]:
        """List the matrices (C, C) by which rotations of the box change the mean of the channels.

        They are 4 of a square and 24 of a cube, of a box of unequal sides 2 and 4; a vector turns,
        other channels are unchanged.
        """
        sides, lengths = self.band.grid.dimensions, self.band.grid.lengths
        out = []
        for axes in itertools.permutations(range(sides)):
            if tuple(lengths[axis] for axis in axes) != lengths:
                continue
            for signs in itertools.product((1.0, -1.0), repeat=sides):
                small = (
                    torch.diag(torch.tensor(signs).double()) @ torch.eye(sides).double()[[*axes]]
                )
                if torch.linalg.det(small) > 0:
                    whole = torch.eye(len(self.kinds)).double()
                    for each in self.vectors:
                        whole[each[0] : each[0] + sides, each[0] : each[0] + sides] = small
                    out.append(whole)
        return out

    def _zonal(self, matrices: Tensor) -> Tensor:
        """Average matrices (C, C, modes) of (kx, ky) and (kx, -ky)."""
        # the mode (kx, -ky) is stored as the conjugate of (-kx, ky)
        rows = matrices.unflatten(-1, (-1, self.band.shape[-1]))
        opposite = torch.roll(torch.flip(rows, (-2,)), 1, -2).flatten(-2)
        return 0.5 * (matrices + self._signs * opposite.conj())

    def _levels(self) -> list[list[Grouping]]:
        """List the groupings from coarse to fine, each with its shrinkages."""
        plain = ["isotropic", "isotropic_handed"] if bool((self._signs < 0).any()) else []
        plain = [] if self.band.grid.dimensions == 1 else plain or ["isotropic"]
        levels = [[Grouping(name)] for name in plain]
        for name in ("mode",) if self.band.grid.dimensions == 3 else ("zonal", "mode"):
            shrunk = [Grouping(name, to, n0) for to in plain for n0 in EARLIER]
            levels.append([Grouping(name), *shrunk])
            plain = [*plain, name]
        return levels

    def _choose(self, moments: Tensor, numbers: list[int], members: int) -> Grouping:
        """Choose a grouping by the likelihood of each half of the members under the other's law.

        Snapshots of a member are correlated, so the least gain grows with their number.

        Args:
            moments: (2, C, C, modes), sums over the snapshots of each half.
            numbers: snapshots of each half.
            members: number of members.
        """
        levels = self._levels()
        best = levels[0][0]
        if members < LEAST or not min(numbers):
            return best
        means = [one / number for one, number in zip(moments, numbers)]
        judged = self._judged(torch.diagonal(moments.sum(0), dim1=0, dim2=1).real.movedim(-1, 0))
        least = NATS * sum(numbers) / members

        def loss(grouping: Grouping) -> Tensor:
            laws = (self._grouped(grouping, s, n) for s, n in zip(means, numbers))
            halves = zip(laws, reversed(means), reversed(numbers))
            return torch.tensor([n * self._loss(law, mean, judged) for law, mean, n in halves])

        smallest = loss(best)
        for level in levels[1:]:
            losses = [loss(grouping) for grouping in level]
            place = min(range(len(level)), key=lambda i: float(losses[i].sum()))
            gain = smallest - losses[place]
            if float(gain.sum()) > least:
                best, smallest = level[place], losses[place]
        return best

    def _judged(self, power: Tensor) -> Tensor:
        """Return which channels and modes (C, modes) are judged: those above round-off."""
        shell, weights = self.band.grid.shell().flatten(), self.band.weights.flatten()
        total = (power * weights).sum(-1, keepdim=True)
        return (shell_sum(power, shell, weights)[:, shell] > CAP * total) & (power > 0)

    def _loss(self, law: Tensor, mean: Tensor, judged: Tensor) -> float:
        """Compute the mean negative log-likelihood of a snapshot, in nats up to a constant.

        Args:
            law: (C, C, modes) S.
            mean: (C, C, modes) second moments of the snapshots.
            judged: (C, modes) what counts.
        """
        root, scale, live = _cholesky(law * _outer(judged))
        seen = _to_matrices(mean * _outer(judged))
        if bool((torch.diagonal(seen, dim1=-2, dim2=-1).real[~live] > 0).any()):
            return math.inf
        scale = torch.where(live, scale, 1.0)
        seen = seen / scale[..., None] / scale[..., None, :]
        misfit = torch.diagonal(torch.cholesky_solve(seen, root), dim1=-2, dim2=-1).real.sum(-1)
        pivots = torch.diagonal(root, dim1=-2, dim2=-1).real * scale
        # modes with ky > 0 are complex numbers; the others are pairs of conjugates, or real
        return float(
            (0.5 * self.band.weights.flatten() * (2 * pivots.log().sum(-1) + misfit)).sum()
        )


def apply_channels(factors: Tensor, q_hat: Tensor) -> Tensor:
    """Compute F q, mode by mode, of spectra (..., C, 2K + 1, K + 1).

    Args:
        factors: (2, C, C, 2K + 1, K + 1) real and imaginary part of F, not changed in place later.
        q_hat: the spectra; the factors are moved to their device and precision, cached.
    """
    matrix = torch.complex(*to_device_cached(factors, q_hat))
    axis = 2 - matrix.ndim - 1  # of the channels: before the sides
    terms = (matrix[:, j] * q_hat.narrow(axis, j, 1) for j in range(q_hat.shape[axis]))
    return sum(terms, q_hat.new_zeros(()))


def remove_channels(factors: Tensor, q_hat: Tensor) -> Tensor:
    """Invert :func:`apply_channels`.

    A channel that is never drawn, and the part of a vector along k if it has no divergence, have
    no inverse. There the result is the smallest spectrum that F maps to ``q_hat``, and the part of
    ``q_hat`` that F cannot make is dropped (pseudo-inverse).

    Args:
        factors: (2, C, C, 2K + 1, K + 1); their inverse is cached unless they need a gradient.
        q_hat: spectra (..., C, 2K + 1, K + 1).
    """
    return apply_channels(_inverse_cached(factors), q_hat)


def covariance(factors: Tensor, variance: Tensor) -> Tensor:
    """Compute S = F diag(v) F^*, (C, C, 2K + 1, K + 1) complex128.

    Args:
        factors: (2, C, C, 2K + 1, K + 1).
        variance: (C, 2K + 1, K + 1) v.
    """
    shape = factors.shape[3:]
    matrix = torch.complex(*factors.double()).flatten(2)
    variance = variance.to(matrix.real).flatten(1)
    return _product(matrix * variance, matrix.transpose(0, 1).conj()).unflatten(-1, shape)


def coherence(s: Tensor) -> tuple[Tensor, Tensor]:
    """Compute coherence and phase of channels i and j, each (C, C, 2K + 1, K + 1).

    The coherence ``|S_ij| / (S_ii S_jj)^(1/2)`` is within [0, 1]; it is 0 where a channel has no
    variance. The phase, in radians, is that of channel i minus that of channel j.

    Args:
        s: (C, C, 2K + 1, K + 1), such as of :func:`covariance`.
    """
    std = torch.diagonal(s, dim1=0, dim2=1).real.clamp(min=0).sqrt().movedim(-1, 0)
    product = std[:, None] * std
    some = product > 0
    size = torch.where(some, s.abs() / torch.where(some, product, 1.0), 0.0)
    return size, torch.where(some, s.angle(), 0.0)


def _vectors(kinds: Sequence[str], sides: int) -> list[list[int]]:
    """Return the places of the components of every vector; ValueError if one is missing."""
    if "vector x" in kinds and sides == 1:
        raise ValueError(
            "a channel is 'vector x', but a line has no directions: use 'scalar' on a line"
        )
    names = COMPONENTS[:sides]
    found: list[list[int]] = []
    for place, kind in enumerate(kinds):
        if kind not in KINDS:
            raise ValueError(f"kind of channel {place} is {kind!r}, expected {', '.join(KINDS)}")
        if kind == "vector x":
            found.append(list(range(place, place + sides)))
    inside = [place for each in found for place in each]
    components = [place for place, kind in enumerate(kinds) if kind in COMPONENTS]
    whole = all(tuple(kinds[each[0] : each[0] + sides]) == names for each in found)
    if inside != components or not whole:
        followed = " and ".join(f"'{name}'" for name in names[1:])
        raise ValueError(
            f"kinds of channels are {', '.join(kinds)}, expected each 'vector x' to be followed "
            f"by its {followed}: order the channels so"
        )
    return found


def _frame(along: Tensor) -> Tensor:
    """Return unit vectors along and across k, (d, d, modes), the first index counts them.

    Args:
        along: (d, modes) k / |k|; 0 for k = 0.
    """
    if len(along) == 2:
        x, y = along
        return torch.stack([along, torch.stack([-y, x])])
    if len(along) == 1:
        return along[None]
    x, y, _ = along
    level = torch.hypot(x, y)
    upright = level < 1e-9
    divisor = torch.where(upright, 1.0, level)
    zero = torch.zeros_like(x)
    # k x e_z; of k along z the axis x
    first = torch.stack([torch.where(upright, 1.0, y / divisor), -x / divisor, zero])
    second = torch.linalg.cross(along, first, dim=0)
    return torch.stack([along, first, second])


def _outer(flags: Tensor) -> Tensor:
    """Return which pairs (C, C, modes) of flagged channels (C, modes) both have a flag."""
    return flags[:, None] & flags


def _identity(like: Tensor) -> Tensor:
    """Return identity matrices shaped like (C, C, modes)."""
    eye = torch.eye(len(like), dtype=like.dtype, device=like.device)
    return eye[(..., *[None] * (like.ndim - 2))].expand(like.shape)


def _to_matrices(values: Tensor) -> Tensor:
    """Move the channels of (..., C, C, modes) last, as linear algebra needs them."""
    return values.movedim((-3, -2), (-2, -1))


def _to_modes(values: Tensor) -> Tensor:
    """Invert :func:`_to_matrices`."""
    return values.movedim((-2, -1), (-3, -2))


def _product(first: Tensor, second: Tensor) -> Tensor:
    """Multiply matrices (..., C, C, modes), mode by mode."""
    return _to_modes(_to_matrices(first) @ _to_matrices(second))


def _cholesky(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factorise the correlations of matrices (C, C, modes).

    Returns:
        The factors (modes, C, C) of the correlations, the identity for channels without variance;
        the standard deviations (modes, C); and which channels have some (modes, C).
    """
    matrices = _to_matrices(matrices)
    power = torch.diagonal(matrices, dim1=-2, dim2=-1).real
    live = power > 0
    scale = power.clamp(min=0).sqrt()
    divisor = torch.where(live, scale, 1.0)
    matrices = matrices / divisor[..., None] / divisor[..., None, :]
    added = torch.where(live, NUGGET, 1.0).to(matrices.dtype)
    return torch.linalg.cholesky(matrices + torch.diag_embed(added)), scale, live


#: inverse by factors; an entry lives as long as its factors
_inverses = WeakTensorKeyDictionary()


def _inverse_cached(factors: Tensor) -> Tensor:
    if factors.requires_grad:
        return _inverse(factors)
    if factors not in _inverses:
        _inverses[factors] = _inverse(factors)
    return _inverses[factors]


def _inverse(factors: Tensor) -> Tensor:
    """Invert factors (2, C, C, modes) block by block, in which channels may differ in units.

    A block is a channel or a vector. What a singular block does not draw is in no other block
    either, so that its pseudo-inverse suffices.
    """
    matrix = torch.complex(*factors.double()).flatten(2)
    rows: list[Tensor] = []
    place, count = 0, len(matrix)
    while place < count:
        # only a vector has numbers above the diagonal
        above = [
            column
            for column in range(place + 1, count)
            if bool((matrix[place:column, column] != 0).any())
        ]
        block = slice(place, max([place, *above]) + 1)
        left = _identity(matrix)[block]
        if rows:
            left = left - torch.einsum(
                "ia...,aj...->ij...", matrix[block, :place], torch.cat(rows)
            )
        inner = torch.linalg.pinv(_to_matrices(matrix[block, block]), rtol=SINGULAR)
        rows.append(torch.einsum("ia...,aj...->ij...", _to_modes(inner), left))
        place = block.stop
    out = torch.cat(rows).unflatten(-1, factors.shape[3:])
    return torch.stack([out.real, out.imag])
