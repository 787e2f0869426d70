r"""Features of a resolved state, and physical estimates of its closure.

The features u, v, w, w_x, w_y follow from the vorticity spectrum by spectral derivatives, with
:math:`-\Delta\psi = w` and :math:`(u, v) = (\psi_y, -\psi_x)`. They are exact on any grid.
"""

from functools import lru_cache

import torch
from torch import Tensor

from hpc_closure.closure.fields.modes import Band
from hpc_closure.closure.fields.vectors import carried_by, gradients, solenoidal, strain_norm
from hpc_closure.spectral.equations import Equation
from hpc_closure.spectral.modes.grid import to_device_cached

__all__ = [
    "FEATURES",
    "Features",
    "carried",
    "coordinates",
    "divergence",
    "feature_names",
    "feature_spectra",
    "gradient",
    "physics_estimate",
]

FEATURES = ("u", "v", "w", "w_x", "w_y")
ON_A_LINE = ("u", "u_x")
AXES = ("kx", "ky")
ENDS = ("_x", "_y", "_z")  # of the names of derivatives
STATES = {1: "u", 2: "w"}  # feature that is the state, by number of dimensions


def feature_names(band: Band) -> tuple[str, ...]:
    """List the names of the features of :func:`feature_spectra`."""
    return ON_A_LINE if band.grid.dimensions == 1 else FEATURES


def feature_spectra(w_hat: Tensor, band: Band) -> Tensor:
    """Compute spectra (..., 5, 2K + 1, K + 1) of u, v, w, w_x, w_y from spectra of w.

    On a line, compute spectra (..., 2, 1, K + 1) of u, u_x from spectra of u.
    """
    real = w_hat.real.dtype
    if band.grid.dimensions == 1:
        i_u = torch.complex(-w_hat.imag, w_hat.real)
        slope = i_u * band.on("ky", w_hat.device, real)
        return torch.stack([w_hat, slope], dim=band.axes[0] - 1)
    kx, ky = band.on("kx", w_hat.device, real), band.on("ky", w_hat.device, real)
    inverse = band.on("inverse_k2", w_hat.device, real)
    iw = torch.complex(-w_hat.imag, w_hat.real)
    parts = [iw * (ky * inverse), iw * (-kx * inverse), w_hat, iw * kx, iw * ky]
    return torch.stack(parts, dim=-3)


class Features:
    """Features of a state, for any equation.

    * Of one field: those of :func:`feature_spectra`.
    * Of C fields: the velocities u, v of each flow, then each field with its two derivatives. They
      are named by the channel, such as ``rain`` and ``rain_x``; several flows are u1, v1, u2, ...
    * Of C fields among which are the components of the velocity: each field with its derivatives,
      the resolved nonlinear term of each, such as ``N u``, and the norm of the strain, ``|S|``.

    Args:
        band: band of the state.
        equation: an equation of several fields; None = a flow of one field.

    Attributes:
        names: names of the F features.
        own: index of the feature that is the state; indices, one per channel, of several fields.
        channels: names of the fields; empty if there is one.
        factors: names of the features whose products are terms of a regression.
        velocity: channels that are the components of the velocity; empty if it follows from
            streamfunctions.
    """

    def __init__(self, band: Band, equation: Equation | None = None):
        self.band, self.equation = band, equation
        self.channels: tuple[str, ...] = ()
        self.velocity: list[int] = []
        self.own: int | list[int]
        if equation is None:
            self.names = self.factors = feature_names(band)
            self.own = self.names.index(STATES[band.grid.dimensions])
            return
        self.channels = equation.channel_names
        self.velocity = list(equation.velocity_channels)
        if self.velocity:
            fields = [
                name + end for name in self.channels for end in ("", *ENDS[: len(band.axes)])
            ]
            terms = [f"N {name}" for name in self.channels]
            self.names, self.factors = (*fields, *terms, "|S|"), ()
            self.own = [self.names.index(name) for name in self.channels]
            return
        self._factors = equation.stream_factors(band.grid)
        flows = len(self._factors)
        numbers = [str(flow + 1) for flow in range(flows)] if flows > 1 else [""]
        velocities = [f"{part}{number}" for number in numbers for part in ("u", "v")]
        fields = [name + end for name in self.channels for end in ("", "_x", "_y")]
        self.names = self.factors = (*velocities, *fields)
        self.own = [self.names.index(name) for name in self.channels]

    def spectra(self, state_hat: Tensor) -> Tensor:
        """Compute spectra (B, F, ...) of the features of states (B, ...) or (B, C, ...)."""
        if not self.channels:
            return feature_spectra(state_hat, self.band)
        if self.velocity:
            return self._of_velocity(state_hat)
        kx, ky = (self.band.on(name, state_hat.device, state_hat.real.dtype) for name in AXES)
        i_f = torch.complex(-state_hat.imag, state_hat.real)
        fields = torch.stack([state_hat, i_f * kx, i_f * ky], dim=2).flatten(1, 2)
        return torch.cat([self.velocities(state_hat), fields], dim=1)

    @property
    def is_vector(self) -> bool:
        """Whether the state is a velocity and nothing else, so that a regression is of vectors."""
        return self.equation is not None and self.equation.is_velocity

    def _of_velocity(self, state_hat: Tensor) -> Tensor:
        band = self.band
        slopes = gradients(state_hat, band)
        fields = torch.cat([state_hat[:, :, None], slopes], dim=2).flatten(1, 2)
        strain = strain_norm(state_hat[:, self.velocity], band)[:, None]
        return torch.cat([fields, self.nonlinear(state_hat), band.to_spectral(strain)], dim=1)

    def nonlinear(self, state_hat: Tensor, fields_hat: Tensor | None = None) -> Tensor:
        r"""Compute spectra (B, C, ...) of the resolved nonlinear term :math:`-u\cdot\nabla f`.

        Of a solenoidal velocity, the part without divergence.

        Args:
            state_hat: (B, C, ...) states.
            fields_hat: (B, C, ...) f; None = the state itself.
        """
        fields_hat = state_hat if fields_hat is None else fields_hat
        u_hat = state_hat[:, self.velocity]
        return self.projected(carried_by(u_hat, fields_hat, self.band))

    def projected(self, values_hat: Tensor) -> Tensor:
        """Remove the divergence of the velocity of states or closures (B, C, ...).

        They are unchanged if the equation does not demand it.
        """
        if not self.velocity or self.equation is None or not self.equation.solenoidal:
            return values_hat
        u_hat = solenoidal(values_hat[:, self.velocity], self.band)
        if self.is_vector:
            return u_hat
        out = values_hat.clone()
        out[:, self.velocity] = u_hat
        return out

    def velocities(self, state_hat: Tensor) -> Tensor:
        """Compute spectra (B, 2 flows, ...) of u, v of each flow from states (B, C, ...)."""
        real = state_hat.real.dtype
        kx, ky = (self.band.on(name, state_hat.device, real) for name in AXES)
        factors = to_device_cached(self._factors, state_hat.real)
        psi = (state_hat[:, None] * factors).sum(2)
        i_psi = torch.complex(-psi.imag, psi.real)
        return torch.stack([i_psi * ky, -i_psi * kx], dim=2).flatten(1, 2)

    def carried(self, state_hat: Tensor, closures_hat: Tensor) -> Tensor:
        r"""Compute spectra (B, P, ...) of :math:`-u\cdot\nabla U` of P closures, free of aliasing.

        Of C fields they are (B, P, C, ...). Each field is carried by its own flow
        (:attr:`~hpc_closure.spectral.equations.Equation.carriers`) and by its mean velocity.
        """
        if self.equation is None:
            return carried(state_hat, closures_hat, self.band)
        if self.velocity:
            each = [self.nonlinear(state_hat, one) for one in closures_hat.unbind(1)]
            return torch.stack(each, dim=1)
        size, real = self.band.grid.sizes, state_hat.real.dtype
        kx, ky = (self.band.on(name, state_hat.device, real) for name in AXES)
        flows = self.band.to_physical(self.velocities(state_hat), size).unflatten(1, (-1, 2))
        means = self.equation.mean_velocities
        i_f = torch.complex(-closures_hat.imag, closures_hat.real)
        out = []
        for channel, flow in enumerate(self.equation.carriers):
            u, v = (part[:, None] for part in flows[:, flow].unbind(1))
            slopes = torch.stack([i_f[:, :, channel] * kx, i_f[:, :, channel] * ky])
            slope_x, slope_y = self.band.to_physical(slopes, size)
            out.append(-((u + means[flow]) * slope_x + v * slope_y))
        return self.band.to_spectral(torch.stack(out, dim=2))


def carried(w_hat: Tensor, fields_hat: Tensor, band: Band) -> Tensor:
    r"""Compute spectra (B, F, ...) of :math:`-u\cdot\nabla f` of F fields f, free of aliasing.

    Args:
        w_hat: (B, 2K + 1, K + 1) vorticity of the flow; on a line its velocity u.
        fields_hat: (B, F, 2K + 1, K + 1) spectra of f.
        band: band of both.
    """
    real, count = w_hat.real.dtype, fields_hat.shape[1]
    kx, ky = band.on("kx", w_hat.device, real), band.on("ky", w_hat.device, real)
    i_f = torch.complex(-fields_hat.imag, fields_hat.real)
    if band.grid.dimensions == 1:
        both = band.to_physical(torch.cat([w_hat[:, None], i_f * ky], dim=1), band.grid.sizes)
        return band.to_spectral(-both[:, :1] * both[:, 1:])
    flow = feature_spectra(w_hat, band)[:, :2]
    fields = band.to_physical(torch.cat([flow, i_f * kx, i_f * ky], dim=1), band.grid.sizes)
    u, v = fields[:, :1], fields[:, 1:2]
    slope_x, slope_y = fields[:, 2:].split(count, dim=1)
    return band.to_spectral(-(u * slope_x + v * slope_y))


def gradient(w_hat: Tensor, band: Band) -> Tensor:
    """Compute the gradient (..., 2, n, n) of f on the alias-free grid from spectra of f."""
    return band.to_physical(feature_spectra(w_hat, band)[..., 3:, :, :], band.grid.sizes)


def divergence(flux: Tensor, band: Band) -> Tensor:
    """Compute spectra (..., 2K + 1, K + 1) of the divergence of fields (..., 2, n, n)."""
    x, y = band.to_spectral(flux).unbind(-3)
    kx, ky = (band.on(name, flux.device, flux.dtype) for name in ("kx", "ky"))
    return 1j * (kx * x + ky * y)


def physics_estimate(w_hat: Tensor, band: Band, kind: str, viscosity: float) -> Tensor:
    r"""Compute the physical estimate of the closure from vorticity spectra (..., 2K + 1, K + 1).

    Kind ``diffusion``: :math:`\tfrac\nu2\Delta w`; ``convection``: :math:`-u\cdot\nabla w`;
    ``subgrid``: the form of Leith's model, :math:`\nabla\cdot(|\nabla w|\nabla w)`, without its
    constant, which the model fits (Leith, Physica D 1996).
    """
    if kind == "diffusion":
        return w_hat * (-0.5 * viscosity * band.on("k2", w_hat.device, w_hat.real.dtype))
    if kind == "convection":
        size = band.grid.sizes
        u, v, _, w_x, w_y = band.to_physical(feature_spectra(w_hat, band), size).unbind(-3)
        return band.to_spectral(-(u * w_x + v * w_y))
    if kind != "subgrid":
        raise ValueError(f"no physics estimate of closure {kind!r}")
    slope = gradient(w_hat, band)
    return divergence(torch.hypot(*slope.unbind(-3)).unsqueeze(-3) * slope, band)


@lru_cache(maxsize=32)
def _coordinates(points: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
    out = []
    for axis, size in enumerate(points):
        if size == 1:  # the row of a line
            continue
        angle = torch.arange(size, dtype=torch.float64) * (2 * torch.pi / size)
        x = angle.view(-1, *[1] * (len(points) - 1 - axis)).expand(points)
        out += [x.sin(), x.cos()]
    return torch.stack(out).to(device=device, dtype=dtype)


def coordinates(points: tuple[int, ...], like: Tensor) -> Tensor:
    """Return periodic coordinates (4, n, n): sin and cos of 2 pi x / L and 2 pi y / L.

    Args:
        points: shape of a field, (n, n); there are two coordinates per side.
        like: tensor whose device and precision they have.
    """
    return _coordinates(points, str(like.device), like.dtype)
