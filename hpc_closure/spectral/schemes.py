r"""Time schemes for :math:`\dot w = L w + R(w)`, L diagonal, R explicit (flow and forcings).

Forcings are held over a step: white noise enters as its increment over ``dt``. One class per
scheme, formulas in the docstrings; a scheme changes ``w`` in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.modes.transform import Symbol, Transform

#: fills its second argument with a term at the state that is its first, and returns it
Term = Callable[[Tensor, Tensor], Tensor]
#: gives a term at a state as a new tensor
TracedTerm = Callable[[Tensor], Tensor]


@dataclass
class Explicit:
    """``R(w) = N(w) + held``, what a scheme treats explicitly: ``explicit(w, out)`` fills ``out``.

    Attributes:
        nonlinear: N.
        held: forcings and closure, held over the step; like ``w``.
    """

    nonlinear: Term
    held: Tensor

    def __call__(self, w: Tensor, out: Tensor) -> Tensor:
        return self.nonlinear(w, out).add_(self.held)


class Scheme:
    """One scheme for one step size: its coefficients, and what it keeps of past steps.

    Threads may share one object: coefficients are only read, work arrays are handed in, and what
    is kept of past steps stands in rows like the state.

    Args:
        linear: eigenvalues of L, complex128, whole retained shape. Coefficients are computed for
            all modes and then cut to this rank's, so their bits do not depend on the ranks.
        dt: step.
        transform: gives precision, device and this rank's columns.
        implicit_only: leave the explicit half of L out (``removed: diffusion``).
    """

    #: work spectra and right-hand sides of a step
    num_registers = 2
    num_stages = 1
    #: whether L has an explicit half that can be left out
    has_explicit_half = False
    #: whether steps need spectra of past ones: then dt is fixed
    has_memory = False

    def __init__(
        self, linear: Tensor, dt: float, transform: Transform, implicit_only: bool = False
    ):
        if implicit_only and not self.has_explicit_half:
            name = type(self).__name__
            raise ValueError(f"{name} has no explicit half of the linear term to leave out")
        self.dt, self.transform = dt, transform
        self.prepare(linear, dt, implicit_only)

    def prepare(self, linear: Tensor, dt: float, implicit_only: bool) -> None:
        """Compute the coefficients."""
        raise NotImplementedError

    def step(self, w: Tensor, explicit: Explicit, registers: Tensor, rows=slice(None)) -> None:
        """Advance ``w`` by one step.

        Args:
            w: state as real pairs, changed in place.
            explicit: R.
            registers: of :meth:`make_registers`; what they hold before and after has no meaning.
            rows: which rows of the ensemble ``w`` is.
        """
        raise NotImplementedError

    def traced(
        self, w: Tensor, nonlinear: TracedTerm, held: Tensor, past: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The same step in new tensors: autograd goes through it.

        Args:
            w: state as real pairs.
            nonlinear: N.
            held: forcings and closure.
            past: what the scheme keeps of past steps; None begins a history.

        Returns:
            The state a step later, and what is kept for the next step.
        """
        raise NotImplementedError

    def symbol(self, values: Tensor) -> Symbol:
        """Diagonal operator in the working precision."""
        return self.transform.symbol(values)

    def make_registers(self, w: Tensor) -> Tensor:
        """``num_registers`` work spectra of the shape of ``w``."""
        return w.new_empty(self.num_registers, *w.shape)

    # -- memory: nothing, unless a scheme has some -----------------------------------------------

    @property
    def is_starting(self) -> bool:
        """Whether the next step begins a history, and so differs from those after it."""
        return False

    def load(self, w: Tensor, memory: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`save` gave, or with nothing in ``memory`` begin a history.

        Args:
            w: the state of all members.
            memory: spectra of past steps by name, as real pairs like ``w``.
        """
        if memory:
            raise ValueError(f"{type(self).__name__} keeps no {', '.join(sorted(memory))}")

    def save(self) -> dict[str, Tensor]:
        """Spectra of past steps that the next one needs."""
        return {}

    # -- for fused kernels -----------------------------------------------------------------------

    def real_euler(self) -> tuple[Tensor, Tensor] | None:
        """``(a, b)`` per mode if a step is ``w^+ = a w + b R(w)`` with real a and b, else None."""
        return None


class CrankNicolson(Scheme):
    """The coefficients ``(1 + dt L / 2) / (1 - dt L / 2)`` and ``dt / (1 - dt L / 2)``.

    With ``implicit_only`` the numerator of the first is 1: the published "diffusion" closure
    carries the explicit half of the viscosity.
    """

    has_explicit_half = True

    def prepare(self, linear, dt, implicit_only):
        inverse = 1.0 / (1.0 - 0.5 * dt * linear)
        numerator = torch.ones_like(linear) if implicit_only else 1.0 + 0.5 * dt * linear
        self.a = self.symbol(numerator * inverse)
        self.b = self.symbol(dt * inverse)

    def _finish(self, w: Tensor, rate: Tensor, scratch: Tensor) -> None:
        """``w = a w + b rate``."""
        self.a.scale(w, scratch)
        self.b.scale(rate, scratch)
        w.add_(rate)


class CNEuler(CrankNicolson):
    r"""Crank-Nicolson and explicit Euler, the published scheme.

    .. math:: w^+ = \frac{(1 + \tfrac{dt}{2} L) w + dt R(w)}{1 - \tfrac{dt}{2} L}
    """

    def step(self, w, explicit, registers, rows=slice(None)):
        rate, scratch = registers
        explicit(w, rate)
        self._finish(w, rate, scratch)

    def traced(self, w, nonlinear, held, past):
        return self.a.of(w) + self.b.of(nonlinear(w) + held), None

    def real_euler(self):
        if not self.a.is_real:
            return None
        return self.a.real[..., 0], self.b.real[..., 0]


class CNAB2(CrankNicolson):
    r"""Crank-Nicolson and Adams-Bashforth 2; the first step is CN-Euler.

    .. math:: w^+ = \frac{(1 + \tfrac{dt}{2} L) w + dt (\tfrac32 N_n - \tfrac12 N_{n-1} + held)}
                         {1 - \tfrac{dt}{2} L}

    The held forcings belong to their step and are not extrapolated. ``previous_hat`` is
    :math:`N_{n-1}`.
    """

    has_memory = True

    def prepare(self, linear, dt, implicit_only):
        super().prepare(linear, dt, implicit_only)
        self._previous, self._starting = torch.empty(0), np.empty(0, dtype=bool)  # row by row

    def step(self, w, explicit, registers, rows=slice(None)):
        rate, scratch = registers
        previous, starting = self._previous[rows], self._starting[rows]
        explicit.nonlinear(w, rate)
        if starting.any():
            previous.copy_(rate)
            starting[:] = False
        else:
            scratch.copy_(rate)
            rate.mul_(1.5)
            rate.sub_(previous.mul_(0.5))
            previous.copy_(scratch)
        rate.add_(explicit.held)
        self._finish(w, rate, scratch)

    def traced(self, w, nonlinear, held, past):
        now = nonlinear(w)
        rate = held + (now if past is None else 1.5 * now - 0.5 * past)
        return self.a.of(w) + self.b.of(rate), now

    @property
    def is_starting(self):
        return bool(self._starting.any())

    def load(self, w, memory):
        memory = dict(memory)
        previous = memory.pop("previous_hat", None)
        super().load(w, memory)
        if self._previous.shape != w.shape:  # else in place: a graph may hold its address
            self._previous = torch.zeros_like(w)
        self._starting = np.full(len(w), previous is None)
        if previous is not None:
            self._previous.copy_(previous)

    def save(self):
        return {} if self.is_starting else {"previous_hat": self._previous}


class ETDRK4(Scheme):
    r"""Exponential time differencing, fourth order (Cox and Matthews 2002, eqs 26-29).

    .. math::
       a &= e^{L dt/2} w + dt Q R(w), \quad b = e^{L dt/2} w + dt Q R(a), \\
       c &= e^{L dt/2} a + dt Q (2 R(b) - R(w)), \\
       w^+ &= e^{L dt} w + dt [f_1 R(w) + f_2 (R(a) + R(b)) + f_3 R(c)]

    Coefficients by contour integrals (Kassam and Trefethen 2005), free of cancellation.
    """

    num_registers = 6
    num_stages = 4
    CONTOUR = 64

    def prepare(self, linear, dt, implicit_only):
        z = linear * dt
        angle = (torch.arange(self.CONTOUR, dtype=torch.float64) + 0.5) * (
            2 * math.pi / self.CONTOUR
        )
        q, f1, f2, f3 = (torch.zeros_like(z) for _ in range(4))
        for theta in angle.tolist():
            r = z + complex(math.cos(theta), math.sin(theta))
            e = torch.exp(r)
            q += (torch.exp(r / 2) - 1) / r
            f1 += (-4 - r + e * (4 - 3 * r + r**2)) / r**3
            f2 += (2 + r + e * (r - 2)) / r**3
            f3 += (-4 - 3 * r - r**2 + e * (4 - r)) / r**3
        scale = dt / self.CONTOUR
        if not bool((linear.imag != 0).any()):
            # The contour is symmetric about the real axis: what is left of the imaginary part is
            # round-off, and a real symbol is half the work.
            q, f1, f2, f3 = q.real, f1.real, f2.real, f3.real
        self.e_half, self.e_full = self.symbol(torch.exp(z / 2)), self.symbol(torch.exp(z))
        self.q, self.f1 = self.symbol(q * scale), self.symbol(f1 * scale)
        self.f2, self.f3 = self.symbol(2 * f2 * scale), self.symbol(f3 * scale)

    def step(self, w, explicit, registers, rows=slice(None)):
        r1, r2, r3, a, b, scratch = registers
        explicit(w, r1)
        half = self.e_half.apply(w, r2, scratch)
        self.q.apply(r1, a, scratch)
        a.add_(half)
        # r2 holds e^{Ldt/2} w until b is formed, so R(a) goes to r3 first.
        explicit(a, r3)
        self.q.apply(r3, b, scratch)
        b.add_(half)
        explicit(b, r2)
        r3.add_(r2)  # R(a) + R(b)
        r2.mul_(2.0).sub_(r1)
        self.q.scale(r2, scratch)
        self.e_half.apply(a, b, scratch)
        b.add_(r2)  # c
        explicit(b, r2)
        self.e_full.scale(w, scratch)
        self.f1.scale(r1, scratch)
        w.add_(r1)
        self.f2.scale(r3, scratch)
        w.add_(r3)
        self.f3.scale(r2, scratch)
        w.add_(r2)

    def traced(self, w, nonlinear, held, past):
        half, r1 = self.e_half.of(w), nonlinear(w) + held
        a = half + self.q.of(r1)
        r2 = nonlinear(a) + held
        r3 = nonlinear(half + self.q.of(r2)) + held
        r4 = nonlinear(self.e_half.of(a) + self.q.of(2 * r3 - r1)) + held
        rates = self.f1.of(r1) + self.f2.of(r2 + r3) + self.f3.of(r4)
        return self.e_full.of(w) + rates, None


class IMEXRK3(Scheme):
    r"""ARS(3,4,3), third order, L-stable (Ascher, Ruuth, Spiteri 1997, sec. 2.7).

    .. math::
       w_i &= w + dt \sum_{j<i} (\hat a_{ij} R_j + a_{ij} L w_j) + dt\,\gamma L w_i, \\
       w^+ &= w_4 + dt \sum_j (\hat b_j - \hat a_{4j}) R_j

    ``a_4j = b_j`` (stiffly accurate), so only the explicit weights differ in the last line.
    """

    num_registers = 8
    num_stages = 4
    GAMMA = 0.4358665215084590  # root of 6 g^3 - 18 g^2 + 9 g - 1

    def prepare(self, linear, dt, implicit_only):
        g = self.GAMMA
        b1, b2 = -1.5 * g**2 + 4 * g - 0.25, 1.5 * g**2 - 5 * g + 1.25
        a42 = a43 = 0.5529291479
        a31 = (1 - 4.5 * g + 1.5 * g**2) * a42 + (2.75 - 10.5 * g + 3.75 * g**2) * a43
        a31 += -3.5 + 13 * g - 4.5 * g**2
        a32 = (1 + g) / 2 - a31
        self.implicit = [[], [0.0], [0.0, (1 - g) / 2], [0.0, b1, b2]]
        self.explicit = [[], [g], [a31, a32], [1 - a42 - a43, a42, a43]]
        self.weights = [0.0, b1, b2, g]
        self.linear = self.symbol(linear)
        self.solve = self.symbol(1.0 / (1.0 - dt * g * linear))

    def _accumulate(self, target: Tensor, scale: float, term: Tensor, scratch: Tensor) -> None:
        if scale:
            torch.mul(term, scale, out=scratch)
            target.add_(scratch)

    def step(self, w, explicit, registers, rows=slice(None)):
        *rates, l1, l2, stage, scratch = registers
        linears = [None, l1, l2]
        explicit(w, rates[0])
        for i in range(1, 4):
            stage.copy_(w)
            for j in range(i):
                self._accumulate(stage, self.dt * self.explicit[i][j], rates[j], scratch)
                self._accumulate(stage, self.dt * self.implicit[i][j], linears[j], scratch)
            self.solve.scale(stage, scratch)
            if i < 3:
                self.linear.apply(stage, linears[i], scratch)
            explicit(stage, rates[i])
        w.copy_(stage)
        for j in range(4):
            last = self.explicit[3][j] if j < 3 else 0.0
            self._accumulate(w, self.dt * (self.weights[j] - last), rates[j], scratch)

    def traced(self, w, nonlinear, held, past):
        rates, linears, stage = [nonlinear(w) + held], [torch.zeros_like(w)], w
        for i in range(1, 4):
            stage = w
            for j in range(i):
                stage = stage + self.dt * self.explicit[i][j] * rates[j]
                stage = stage + self.dt * self.implicit[i][j] * linears[j]
            stage = self.solve.of(stage)
            linears.append(self.linear.of(stage))
            rates.append(nonlinear(stage) + held)
        for j in range(4):
            last = self.explicit[3][j] if j < 3 else 0.0
            stage = stage + self.dt * (self.weights[j] - last) * rates[j]
        return stage, None


SCHEMES = {"cn_euler": CNEuler, "cn_ab2": CNAB2, "etdrk4": ETDRK4, "imex_rk3": IMEXRK3}
