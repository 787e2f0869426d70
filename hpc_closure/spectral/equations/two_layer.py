r"""Two-layer quasi-geostrophic flow in a periodic box, with a mean shear.

.. math::
   \partial_t q_i + J(\psi_i, q_i) + U_i\,\partial_x q_i + Q_{i,y}\,\partial_x\psi_i
   = -\delta_{i2}\,r\,\nabla^2\psi_2 - \nu_h(-\nabla^2)^p q_i + \delta_{i1} f

with :math:`q_1 = \nabla^2\psi_1 + F_1(\psi_2 - \psi_1)`, :math:`q_2 = \nabla^2\psi_2 + F_2(\psi_1
- \psi_2)`, :math:`F_1 = r_d^{-2}/(1 + \delta)`, :math:`F_2 = \delta F_1`, and mean gradients
:math:`Q_{1,y} = \beta + F_1(U_1 - U_2)`, :math:`Q_{2,y} = \beta - F_2(U_1 - U_2)` (Vallis 2017,
sec. 5.3; the model of pyqg). Velocities are :math:`(u, v) = (-\psi_y, \psi_x)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from hpc_closure.spectral.equations.base import Channel, Equation, Terms
from hpc_closure.spectral.recipe import Finite, NonNegative, Positive

if TYPE_CHECKING:
    from hpc_closure.spectral.cpu.layers import CompiledLayers


class TwoLayerQG(Equation):
    """Two-layer quasi-geostrophic flow; channel 0 is the upper layer."""

    dimensions: ClassVar[int] = 2
    unequal_sides: ClassVar[bool] = True
    channels: ClassVar[tuple[Channel, ...]] = (
        Channel("q_upper", "1/time", "pseudo-scalar"),
        Channel("q_lower", "1/time", "pseudo-scalar"),
    )
    amplifies: ClassVar[bool] = True

    equation: Literal["two_layer_qg"] = "two_layer_qg"
    beta: Finite = Field(0.0, description="gradient of the planetary vorticity")
    drag: NonNegative = Field(0.0, description="linear drag, 1/time; of the lower layer")
    deformation_radius: Positive = Field(0.1, description="r_d, length")
    depth_ratio: Positive = Field(1.0, description="depth of the upper layer over the lower one")
    mean_flow: tuple[Finite, Finite] = Field(
        (0.0, 0.0), description="velocities U of the layers along x"
    )
    hyperviscosity: NonNegative = Field(0.0, description="coefficient of (-Lap)^order")
    hyperviscosity_order: Annotated[int, Field(ge=2, le=8)] = 4

    @property
    def damping(self) -> dict[int, float]:
        return {self.hyperviscosity_order: self.hyperviscosity} if self.hyperviscosity else {}

    @property
    def other_linear_terms(self) -> list[str]:
        return ["mean_flow"]

    @property
    def stretching(self) -> tuple[float, float]:
        """Return F_1 and F_2, 1/length^2."""
        upper = self.deformation_radius**-2 / (1 + self.depth_ratio)
        return upper, self.depth_ratio * upper

    @property
    def mean_gradients(self) -> tuple[float, float]:
        """Return the gradients along y of the layers' mean potential vorticity."""
        (upper, lower), (f1, f2) = self.mean_flow, self.stretching
        return self.beta + f1 * (upper - lower), self.beta - f2 * (upper - lower)

    def linear(self, grid):
        import torch

        damping = -self.hyperviscosity * grid.k2**self.hyperviscosity_order
        layers = [
            torch.complex(damping, -speed * grid.kx.expand(grid.shape)) for speed in self.mean_flow
        ]
        return torch.stack(layers)

    @property
    def carriers(self):
        return (0, 1)

    @property
    def mean_velocities(self):
        return self.mean_flow

    def stream_factors(self, grid):
        import torch

        # q = -M psi with M = [[k^2 + F1, -F1], [-F2, k^2 + F2]]; velocities are (-psi_y, psi_x)
        f1, f2 = self.stretching
        determinant = grid.k2 * (grid.k2 + f1 + f2)
        inverse = determinant.new_zeros(grid.shape)
        inverse[grid.k2 > 0] = 1 / determinant[grid.k2 > 0]
        one = inverse.new_ones(grid.shape)
        upper = torch.stack([(grid.k2 + f2) * inverse, f1 * one * inverse])
        lower = torch.stack([f2 * one * inverse, (grid.k2 + f1) * inverse])
        return torch.stack([upper, lower])

    def is_symmetry(self, permutation, signs):
        # shear and beta distinguish the axes and the direction of x
        plain = not self.beta and self.mean_flow[0] == self.mean_flow[1] == 0
        return plain or (permutation == (0, 1) and signs[0] == 1)

    def terms(self, transform, form):
        return TwoLayerTerms(self, transform)


class TwoLayerTerms(Terms):
    """Advection in flux form, and the linear terms that couple the layers."""

    def __init__(self, equation: TwoLayerQG, transform):
        from hpc_closure.spectral.equations.advection import Basdevant, Flux

        super().__init__(equation, transform)
        grid, factors = transform.grid, transform.factors
        self.mean_flow = equation.mean_flow
        # psi = S q without a mean
        self.inversion = factors(*(-equation.stream_factors(grid)).flatten(0, 1))
        # without the factor i: u_hat = -i ky psi_hat, v_hat = i kx psi_hat
        self.transport = Flux(transform, factors(-grid.ky, grid.kx))
        self.gradients = factors(*(gradient * grid.kx for gradient in equation.mean_gradients))
        self.drag = factors(equation.drag * grid.k2)[0]
        self.compiled: CompiledLayers | None = None
        if transform.lines.on_cpu:
            from hpc_closure.spectral.cpu.layers import compiled_layers

            f1, f2 = equation.stretching
            flows = (grid.k2 > 0).to(grid.k2)  # the mean of J(psi_1, psi_2) is zero
            self.compiled = compiled_layers(
                transform,
                self.transport.to_velocity,
                factors(*Basdevant.factors(grid)),
                factors(-f1 * flows, f2 * flows),
                self.inversion,
                self.gradients,
                self.drag[None],
            )

    def streamfunctions(self, w):
        """Return the pairs of psi, shaped like the state ``(members, 2, 2K + 1, columns, 2)``."""
        import torch

        upper, lower, (a, b, c, d) = w[:, 0], w[:, 1], self.inversion
        return torch.stack([a * upper + b * lower, c * upper + d * lower], 1)

    def nonlinear(self, w, out):
        if self.compiled is None:
            return self.by_transforms(w, out)
        self.compiled.compare_once(self.by_transforms)
        return self.compiled.rate(w, out)

    def by_transforms(self, w, out):
        """Write the term to ``out`` layer by layer, and return it."""
        psi = self.streamfunctions(w)
        layers = (-1, *w.shape[2:])  # layers as further members
        self.transport.carry(psi.reshape(layers), w.reshape(layers), out.view(layers))
        rotated = self.transport.rotate(psi)
        for layer, gradient in enumerate(self.gradients):
            out[:, layer].sub_(gradient * rotated[:, layer])
        out[:, 1].add_(self.drag * psi[:, 1])
        return out

    def differentiable_nonlinear(self, w, transform):
        import torch

        from hpc_closure.spectral.modes.differentiable import times_i

        psi, layers = self.streamfunctions(w), (-1, *w.shape[2:])
        advection = self.transport.differentiable_tendency(
            psi.reshape(layers), transform, w.reshape(layers)
        )
        gradients = torch.stack([gradient[0] for gradient in self.gradients])
        drag = torch.stack([torch.zeros_like(self.drag[0]), self.drag[0]])
        return advection.view_as(w) - gradients * times_i(psi) + drag * psi

    def speed(self, w):
        u, v = self.transport.velocity(self.streamfunctions(w).reshape(-1, *w.shape[2:]))
        u, v = (part.reshape(*w.shape[:2], *part.shape[1:]) for part in (u, v))
        mean = u.new_tensor(self.mean_flow)[:, None, None]
        return (u + mean).abs_().add_(v.abs_()).amax((-3, -2, -1))

    def derived(self, name, w):
        import torch

        psi = self.streamfunctions(w)
        if name == "streamfunction":
            return psi
        if name == "velocity":  # (members, 2 components, 2 layers, ...)
            rotated = self.transport.rotate(psi)
            return torch.stack([rotated * factor[0] for factor in self.transport.to_velocity], 1)
        return super().derived(name, w)
