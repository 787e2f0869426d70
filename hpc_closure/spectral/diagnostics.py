r"""Energy, enstrophy, their budgets and spectra of a running ensemble, summed in a fixed order.

Kinetic energy is :math:`E = \tfrac12\langle|u|^2\rangle`, enstrophy
:math:`Z = \tfrac12\langle w^2\rangle`, means over the domain (on a line,
:math:`E = \tfrac12\langle u^2\rangle`). All are sums over retained modes; the modes are gathered
and each member's are added in the order of its whole spectrum, so no figure depends on the number
of ranks or on the other members.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import LOST, Simulation

SERIES = (
    "energy",
    "energy_dissipation",
    "energy_injection",
    "enstrophy",
    "enstrophy_dissipation",
    "enstrophy_injection",
    "cfl",
)
SPECTRA = ("energy", "enstrophy", "energy_transfer", "enstrophy_transfer")


def series_names(problem: Problem) -> tuple[str, ...]:
    """Keys of :meth:`Diagnostics.measure`."""
    names = SERIES if problem.dimensions == 2 else [n for n in SERIES if n[:9] != "enstrophy"]
    return (*names, "dt") if problem.cfl else tuple(names)


class Diagnostics:
    """Diagnostics of one simulation.

    Figures are ``(members,)`` float64, spectra ``(members, shells)``, the same on every rank.
    """

    def __init__(self, simulation: Simulation):
        self.simulation = simulation
        grid = simulation.grid
        self.two_dimensional = grid.dimensions == 2
        self.weights = np.broadcast_to(grid.weights.numpy(), grid.shape)
        # |u|^2 = |w|^2 / k^2 in two dimensions; on a line the state is the velocity.
        ones = np.ones(grid.shape)
        self.to_energy = grid.inverse_k2.numpy() if self.two_dimensional else ones
        self.damping = -simulation.linear.real.numpy()
        self.forcing = simulation.problem.physics.forcing.spectrum(grid).numpy()

    def measure(self) -> dict[str, np.ndarray]:
        """Energy, enstrophy, dissipation, injection and CFL number of the present state.

        Dissipation counts every linear term and is positive where they damp. Injection is that of
        the steady forcing, ``Re <f w*>``, plus the Ito mean rate of a white forcing. The keys are
        :func:`series_names`: on a line there is no enstrophy, and with an adaptive step each
        member's own ``dt`` of its next step is there, which its CFL number is of.
        """
        w = self.state()
        power = self.weights * _square(w)
        work = self.weights * _inner(self.forcing, w)
        energy_rate, enstrophy_rate = self.mean_noise_injection()
        out = {
            "energy": 0.5 * _sum(power * self.to_energy),
            "energy_dissipation": _sum(power * self.to_energy * self.damping),
            "energy_injection": _sum(work * self.to_energy) + energy_rate,
        }
        dt = self.steps()
        out["cfl"] = self.cfl(dt)
        if self.simulation.problem.cfl:
            out["dt"] = dt
        if self.two_dimensional:
            out["enstrophy"] = 0.5 * _sum(power)
            out["enstrophy_dissipation"] = _sum(power * self.damping)
            out["enstrophy_injection"] = _sum(work) + enstrophy_rate
        return out

    def mean_noise_injection(self) -> tuple[float | np.ndarray, float | np.ndarray]:
        """Mean rates of energy and enstrophy injection by a white forcing (Ito correction).

        Of a forcing that follows the state one of each member, given its present state.
        """
        simulation = self.simulation
        noise, response = simulation.noise, simulation.rates.response
        if noise is None or noise.correlation_time:
            return 0.0, 0.0
        if response is None:
            half_rate = 0.5 * noise.dt * self.weights * noise.std_hat.numpy() ** 2
            energy = _sum((half_rate * self.to_energy)[None])[0]
            return float(energy), float(_sum(half_rate[None])[0])
        mean, variance = response.moments(simulation.start())
        rate = self.weights * (0.5 * noise.dt * variance + _inner(mean, self.state()))
        return _sum(rate * self.to_energy), _sum(rate)

    def steps(self) -> np.ndarray:
        """Length of each member's next step; NaN where none is short enough."""
        levels = self.simulation.levels().astype(np.int32)
        length = np.ldexp(self.simulation.problem.dt, -levels)
        return np.where(levels == LOST, np.nan, length)

    def cfl(self, dt: np.ndarray | float | None = None) -> np.ndarray:
        """``max(|u| + |v|) dt / dx`` of each member at steps ``dt``, by default ``problem.dt``."""
        simulation = self.simulation
        grid = simulation.grid
        dt = simulation.problem.dt if dt is None else dt
        return simulation.speed() * (dt * grid.size / grid.length)

    def spectrum(self, quantity: str = "energy") -> np.ndarray:
        """Shell sums ``(members, shells)``; shells are ``|k|`` rounded, in integer units.

        Args:
            quantity: ``energy``, ``enstrophy``, ``energy_transfer`` or ``enstrophy_transfer``
                (what the nonlinear term brings to each shell per unit time).
        """
        return self.spectra([quantity])[quantity]

    def spectra(self, quantities: Sequence[str]) -> dict[str, np.ndarray]:
        """Several of them by name: the nonlinear term is computed once."""
        if unknown := [quantity for quantity in quantities if quantity not in SPECTRA]:
            raise ValueError(f"no spectrum of {unknown[0]!r}")
        w, out = self.state(), {}
        densities = {"": 0.5 * _square(w)}
        if any(quantity.endswith("_transfer") for quantity in quantities):
            densities["transfer"] = _inner(self.nonlinear(), w)
        for quantity in quantities:
            kind, _, which = quantity.partition("_")
            density = densities[which] * (self.to_energy if kind == "energy" else 1.0)
            out[quantity] = self.simulation.grid.shell_sum(torch.from_numpy(density)).numpy()
        return out

    def transfer(self) -> dict[str, np.ndarray]:
        """Sums of the nonlinear transfers, which vanish, and of their magnitudes."""
        density = self.weights * _inner(self.nonlinear(), self.state())
        return {
            "energy": _sum(density * self.to_energy),
            "energy_magnitude": _sum(abs(density) * self.to_energy),
            "enstrophy": _sum(density),
            "enstrophy_magnitude": _sum(abs(density)),
        }

    def budget(self, num_steps: int) -> dict[str, np.ndarray]:
        r"""Advance by ``num_steps`` and account for the change of energy (on a line too).

        With :math:`\bar w = (w^+ + w)/2` every step obeys, for a scheme that is Crank-Nicolson in
        the linear term and explicit Euler in the rest, exactly

        .. math:: E^+ - E = dt\,[\langle L\bar w, \bar w\rangle + \langle f, \bar w\rangle
                            + \langle\beta\xi, \bar w\rangle + \langle N(w), \bar w\rangle].

        The last term, which the flow itself does not have, is the scheme's own, of order dt. Of
        other schemes no such term is known: theirs is zero, and the residual is their error.

        Returns:
            ``change``, ``dissipation``, ``injection``, ``noise``, ``scheme``, their ``residual``
            and ``scale`` (the sum of the magnitudes), each ``(members,)``, summed over the steps.
        """
        simulation = self.simulation
        if simulation.problem.removed != "none" or simulation.problem.cfl:
            raise ValueError("a budget needs the full system and a fixed step")
        dt = simulation.problem.dt
        names = ("change", "dissipation", "injection", "noise", "scheme")
        out = {name: np.zeros(len(simulation.members)) for name in names}
        scale = np.zeros(len(simulation.members))
        euler = simulation.problem.scheme == "cn_euler"
        w = self.state()
        for _ in range(num_steps):
            noise = simulation.transform.gather(simulation.noise_hat()).cpu().numpy()
            nonlinear = self.nonlinear() if euler else w
            simulation.advance(1)
            new = self.state()
            mean = 0.5 * (w + new)
            terms = {
                "change": 0.5 * (_square(new) - _square(w)),
                "dissipation": dt * self.damping * _square(mean),
                "injection": dt * _inner(self.forcing, mean),
                "noise": dt * _inner(noise, mean),
            }
            if euler:
                terms["scheme"] = dt * _inner(nonlinear, mean)
            for name, density in terms.items():
                density = self.weights * self.to_energy * density
                total = _sum(density)
                out[name] += total
                if name == "dissipation":  # of modes that are fed and modes that are damped
                    scale += _sum(abs(density))
                elif name != "change":
                    scale += abs(total)
            w = new
        out["residual"] = out["change"] - (
            out["injection"] + out["noise"] + out["scheme"] - out["dissipation"]
        )
        out["scale"] = scale
        return out

    def state(self) -> np.ndarray:
        """Whole spectra of the present state, complex128."""
        transform = self.simulation.transform
        return transform.gather(self.simulation.state).cpu().numpy().astype(np.complex128)

    def nonlinear(self) -> np.ndarray:
        """Whole spectra of the nonlinear term, complex128."""
        transform = self.simulation.transform
        rate = transform.gather(self.simulation.nonlinear_hat())
        return rate.cpu().numpy().astype(np.complex128)


def _square(w: np.ndarray) -> np.ndarray:
    return w.real**2 + w.imag**2


def _inner(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``Re(a b*)``."""
    return a.real * b.real + a.imag * b.imag


def _sum(density: np.ndarray) -> np.ndarray:
    """Each member's sum over its modes, one member at a time: one order for any batch."""
    return np.array([np.ascontiguousarray(row).ravel().sum() for row in density])
