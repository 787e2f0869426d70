r"""Measure energy, enstrophy, their budgets and their spectra of a running ensemble.

Kinetic energy is :math:`E = \tfrac12\langle|u|^2\rangle` and enstrophy is
:math:`Z = \tfrac12\langle w^2\rangle`, where the brackets are means over the domain. On a line
:math:`E = \tfrac12\langle u^2\rangle`. All are sums over retained modes. The modes are gathered,
and those of each member are added in the order of its full spectrum. So no result depends on the
number of ranks or on the other members.
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
#: of three-dimensional flow: helicity instead of the budget of enstrophy
FLOW_SERIES = (
    "energy",
    "energy_dissipation",
    "energy_injection",
    "enstrophy",
    "helicity",
    "cfl",
)
SPECTRA = ("energy", "enstrophy", "energy_transfer", "enstrophy_transfer")


def series_names(problem: Problem) -> tuple[str, ...]:
    """Return the keys of :meth:`Diagnostics.measure`."""
    if problem.dimensions == 3:
        return FLOW_SERIES
    if len(problem.physics.channels) > 1:
        moments = ("mean", "variance")
        channels = [channel.name for channel in problem.physics.channels]
        return (*(f"{name}_{moment}" for name in channels for moment in moments), "cfl")
    names = SERIES if problem.dimensions == 2 else [n for n in SERIES if n[:9] != "enstrophy"]
    return (*names, "dt") if problem.cfl else tuple(names)


def diagnostics_of(simulation: Simulation) -> Diagnostics:
    """Return the diagnostics of a simulation: of one field, several channels, or velocities."""
    if simulation.grid.dimensions == 3:
        return FlowDiagnostics(simulation)
    return (ChannelDiagnostics if simulation.channel_shape else Diagnostics)(simulation)


class Diagnostics:
    """Diagnostics of one simulation.

    Scalars are ``(members,)`` float64 and spectra ``(members, shells)``, the same on every rank.
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
        """Return energy, enstrophy, dissipation, injection and CFL number, each ``(members,)``.

        Dissipation counts every linear term and is positive where these damp. Injection is that of
        the steady forcing, ``Re <f w*>``, plus the Ito mean rate of a white forcing. The keys are
        those of :func:`series_names`. A line has no enstrophy. With an adaptive step ``dt`` is the
        length of each member's next step, and its CFL number is that of this step.
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
        """Return the mean rates at which a white forcing injects energy and enstrophy (Ito).

        Each is a number, or ``(members,)`` for a forcing that depends on the state. They are zero
        without noise and for a forcing with a correlation time.
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
        """Return the length of each member's next step; NaN if none is short enough."""
        levels = self.simulation.levels().astype(np.int32)
        length = np.ldexp(self.simulation.problem.dt, -levels)
        return np.where(levels == LOST, np.nan, length)

    def cfl(self, dt: np.ndarray | float | None = None) -> np.ndarray:
        """Return ``max(|u| + |v|) dt / dx``, ``(members,)``; by default dt is ``problem.dt``."""
        simulation = self.simulation
        grid = simulation.grid
        dt = simulation.problem.dt if dt is None else dt
        return simulation.speed() * grid.courant(dt)

    def spectrum(self, quantity: str = "energy") -> np.ndarray:
        """Return one spectrum as shell sums ``(members, shells)``.

        A shell holds the modes whose ``|k|``, in integer units, rounds to its number.

        Args:
            quantity: ``energy``, ``enstrophy``, ``energy_transfer`` or ``enstrophy_transfer``. A
                transfer is the rate at which the nonlinear term feeds each shell.
        """
        return self.spectra([quantity])[quantity]

    def resolved_spectra(self) -> list[np.ndarray]:
        """Return the spectra ``(members, shells)`` that must fall off towards the last shells."""
        return [self.spectrum("enstrophy" if self.two_dimensional else "energy")]

    def spectra(self, quantities: Sequence[str]) -> dict[str, np.ndarray]:
        """Return several spectra by name, each ``(members, shells)``.

        The nonlinear term is computed once for all of them.

        Raises:
            ValueError: a name is not in ``SPECTRA``.
        """
        if unknown := [quantity for quantity in quantities if quantity not in SPECTRA]:
            raise ValueError(
                f"no spectrum of {unknown[0]!r}: expected one of {', '.join(SPECTRA)}"
            )
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
        """Return the sums of the nonlinear transfers and of their magnitudes, each ``(members,)``.

        The sums vanish up to round-off.
        """
        density = self.weights * _inner(self.nonlinear(), self.state())
        return {
            "energy": _sum(density * self.to_energy),
            "energy_magnitude": _sum(abs(density) * self.to_energy),
            "enstrophy": _sum(density),
            "enstrophy_magnitude": _sum(abs(density)),
        }

    def budget(self, num_steps: int) -> dict[str, np.ndarray]:
        r"""Advance by ``num_steps`` steps and return the energy budget of these steps.

        With :math:`\bar w = (w^+ + w)/2`, a step that is Crank-Nicolson in the linear term and
        explicit Euler in the rest obeys exactly

        .. math:: E^+ - E = dt\,[\langle L\bar w, \bar w\rangle + \langle f, \bar w\rangle
                            + \langle\beta\xi, \bar w\rangle + \langle N(w), \bar w\rangle].

        The last term is an error of the scheme, of order dt; the flow does not have it. No such
        term is known for the other schemes: theirs is set to zero, so the residual is their error.

        Returns:
            ``change``, ``dissipation``, ``injection``, ``noise``, ``scheme``, their ``residual``
            and ``scale`` (the sum of the magnitudes), each ``(members,)``, summed over the steps.

        Raises:
            ValueError: the problem lacks a term of the full system, or its step is adaptive.
        """
        simulation = self.simulation
        if simulation.problem.removed != "none" or simulation.problem.cfl:
            raise ValueError(
                "an energy budget needs the full system (removed=none) and a fixed step"
            )
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
                if name == "dissipation":  # by mode: the linear term may feed some and damp others
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
        """Return the full spectra of the state, ``(members, 2K + 1, K + 1)`` complex128."""
        transform = self.simulation.transform
        return transform.gather(self.simulation.state).cpu().numpy().astype(np.complex128)

    def nonlinear(self) -> np.ndarray:
        """Return the full spectra of the nonlinear term, complex128."""
        transform = self.simulation.transform
        rate = transform.gather(self.simulation.nonlinear_hat())
        return rate.cpu().numpy().astype(np.complex128)


class FlowDiagnostics(Diagnostics):
    r"""Diagnostics of the velocities of three-dimensional flow.

    Enstrophy is :math:`\tfrac12\langle|\nabla\times u|^2\rangle` and helicity is
    :math:`\langle u\cdot\nabla\times u\rangle`.
    """

    def __init__(self, simulation: Simulation):
        self.simulation = simulation
        grid = simulation.grid
        self.two_dimensional = False
        self.weights = np.broadcast_to(grid.weights.numpy(), grid.shape)
        self.to_energy = np.ones(grid.shape)
        self.k2, self.damping = grid.k2.numpy(), -simulation.linear.real.numpy()
        self.forcing = np.zeros((3, *grid.shape), dtype=np.complex128)

    def measure(self):
        """Return energy, its dissipation and injection, enstrophy, helicity and the CFL number.

        Injection is that of the forcing ``power`` plus the Ito mean rate of a white forcing; that
        of a forcing with a correlation time is not counted.
        """
        u = self.state()
        power = self.weights * _square(u)
        injection = getattr(self.simulation.problem.physics.forcing, "power", 0.0)
        return {
            "energy": 0.5 * _sum(power),
            "energy_dissipation": _sum(power * self.damping),
            "energy_injection": injection + self.mean_noise_injection()[0] + np.zeros(len(u)),
            "enstrophy": 0.5 * _sum(power * self.k2),
            "helicity": _sum(self.weights * _inner(u, self.curl(u))),
            "cfl": self.cfl(),
        }

    def curl(self, u: np.ndarray) -> np.ndarray:
        """Return the spectra of the vorticity, shaped like ``u``."""
        x, y, z = (1j * k.numpy() for k in self.simulation.grid.k)
        a, b, c = u[:, 0], u[:, 1], u[:, 2]
        return np.stack([y * c - z * b, z * a - x * c, x * b - y * a], 1)

    def cfl(self, dt=None):
        """Return ``max(|u| + |v| + |w|) dt / dx``, ``(members,)``."""
        return super().cfl(dt)

    def spectra(self, quantities):
        """Return shell sums ``(members, shells)`` by name; see :meth:`Diagnostics.spectra`.

        The transfer of enstrophy includes its production by stretching.
        """
        if unknown := [quantity for quantity in quantities if quantity not in SPECTRA]:
            raise ValueError(
                f"no spectrum of {unknown[0]!r}: expected one of {', '.join(SPECTRA)}"
            )
        u, out = self.state(), {}
        densities = {"": 0.5 * _square(u)}
        if any(quantity.endswith("_transfer") for quantity in quantities):
            densities["transfer"] = _inner(self.nonlinear(), u)
        for quantity in quantities:
            kind, _, which = quantity.partition("_")
            density = densities[which].sum(1) * (self.k2 if kind == "enstrophy" else 1.0)
            out[quantity] = self.simulation.grid.shell_sum(torch.from_numpy(density)).numpy()
        return out

    def resolved_spectra(self):
        return [self.spectrum("enstrophy")]

    def transfer(self):
        """Return the sum of the nonlinear transfers of energy and that of their magnitudes.

        The sum vanishes up to round-off.
        """
        density = self.weights * _inner(self.nonlinear(), self.state())
        return {"energy": _sum(density), "energy_magnitude": _sum(abs(density))}


class ChannelDiagnostics(Diagnostics):
    """Means and variances of the channels of a simulation."""

    def __init__(self, simulation: Simulation):
        self.simulation = simulation
        grid = simulation.grid
        self.weights = np.broadcast_to(grid.weights.numpy(), grid.shape)
        self.names = [channel.name for channel in simulation.problem.physics.channels]

    def measure(self):
        """Return mean and variance over the domain of each channel, and the CFL number."""
        w, out = self.state(), {}
        power = self.weights * _square(w)
        power[..., 0, 0] = 0.0
        for number, name in enumerate(self.names):
            out[f"{name}_mean"] = np.ascontiguousarray(w[:, number, 0, 0].real)
            out[f"{name}_variance"] = _sum(power[:, number])
        return {**out, "cfl": self.cfl()}

    def spectra(self, quantities):
        """Return half the variance of channels per shell, by name."""
        if unknown := [quantity for quantity in quantities if quantity not in self.names]:
            raise ValueError(
                f"no spectrum of {unknown[0]!r}: expected one of {', '.join(self.names)}"
            )
        density = torch.from_numpy(0.5 * _square(self.state()))
        sums = self.simulation.grid.shell_sum(density).numpy()
        return {name: sums[:, self.names.index(name)] for name in quantities}

    def resolved_spectra(self):
        return list(self.spectra(self.names).values())


def _square(w: np.ndarray) -> np.ndarray:
    """Return ``|w|^2``."""
    return w.real**2 + w.imag**2


def _inner(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return ``Re(a b*)``."""
    return a.real * b.real + a.imag * b.imag


def _sum(density: np.ndarray) -> np.ndarray:
    """Sum the modes of ``(members, ...)`` per member, in an order that no batch changes."""
    return np.array([np.ascontiguousarray(row).ravel().sum() for row in density])
