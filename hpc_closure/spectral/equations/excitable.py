r"""An excitable medium in a stirred tracer, on a periodic square: four channels.

.. math::
   w_t + u\cdot\nabla w &= \nu\nabla^2 w - \alpha w + \beta\xi \\
   c_t + u\cdot\nabla c &= \kappa\nabla^2 c - u_x \\
   d_t + u\cdot\nabla d &= D_d\nabla^2 d + (1 - d)\,[r\,d\,(d - (v + b)/a) + s\,\chi],
   \qquad \chi = |\nabla(c + x)|^2 \\
   v_t + u\cdot\nabla v &= D_v\nabla^2 v + (d - v)/T_v

The tracer c is the deviation from a mean that increases by 1 per length along x. Where its total
gradient is steep, it lifts the activator d over the threshold (v + b)/a. A pulse of d near 1
follows, until the inhibitor v has risen. The kinetics are Barkley's (Physica D 49, 1991). They
need :math:`d \le 1`: above 1 the threshold follows d, and both grow without end. So the stimulus
has the factor 1 - d, too.

There is no noise but that of the vorticity. So this is the control of :mod:`~equations.clouds`:
its events are all-or-nothing, too, but the state determines them.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from hpc_closure.spectral.equations.base import Channel, Equation, Stirred
from hpc_closure.spectral.recipe import Finite, NonNegative, Positive


class Excitable(Equation):
    """Vorticity, tracer with a mean gradient along x, activator and inhibitor on a square."""

    dimensions: ClassVar[int] = 2
    channels: ClassVar[tuple[Channel, ...]] = (
        Channel("vorticity", "1/time", "pseudo-scalar"),
        Channel("tracer", "length", "scalar"),
        Channel("activator", "", "scalar"),
        Channel("inhibitor", "", "scalar"),
    )

    equation: Literal["excitable"] = "excitable"
    viscosity: NonNegative = Field(2e-3, description="nu, length^2/time")
    drag: NonNegative = Field(0.0, description="linear drag of the vorticity, 1/time")
    tracer_diffusivity: NonNegative = Field(3e-3, description="kappa, length^2/time")
    activator_diffusivity: NonNegative = Field(0.02, description="D_d, length^2/time")
    inhibitor_diffusivity: NonNegative = Field(0.01, description="D_v, length^2/time")
    reaction_rate: NonNegative = Field(20.0, description="r, 1/time")
    threshold_offset: Finite = Field(0.06, description="b of the threshold (v + b)/a")
    threshold_scale: Positive = Field(0.75, description="a of the threshold (v + b)/a")
    recovery_time: Positive = Field(0.6, description="T_v, time in which v follows d")
    stimulus: NonNegative = Field(
        0.01, description="s, 1/time; of the squared gradient of the tracer and its mean"
    )

    @property
    def damping(self) -> dict[int, float]:
        return {1: self.viscosity} if self.viscosity else {}

    @property
    def other_linear_terms(self) -> list[str]:
        return ["recovery_time"]

    def linear(self, grid):
        import torch

        rates = [
            -self.viscosity * grid.k2 - self.drag,
            -self.tracer_diffusivity * grid.k2,
            -self.activator_diffusivity * grid.k2,
            -self.inhibitor_diffusivity * grid.k2 - 1 / self.recovery_time,
        ]
        return torch.stack(rates) + 0j

    def is_symmetry(self, permutation, signs):
        # the mean gradient distinguishes the axes and the direction of x
        return permutation == (0, 1) and signs[0] == 1

    def terms(self, transform, form):
        return ExcitableTerms(self, transform)


class ExcitableTerms(Stirred):
    """Advection of the four channels, the mean gradient, and the reaction with its stimulus.

    The reaction has products of three fields, which alias on the grid of the solver. They are
    formed on 3/2 of its points per side, without aliasing: three fields of modes up to K need more
    than 4 K points for the modes up to K of their product. The other products have two factors.
    """

    def __init__(self, equation: Excitable, transform):
        super().__init__(equation, transform)
        grid = transform.grid
        self.equation = equation
        self.gradient = transform.factors(grid.kx, grid.ky)  # without the factor i
        self.points = 3 * grid.size // 2

    def nonlinear(self, w, out):
        equation, transform, flow = self.equation, self.transform, self.flow
        self.carry(w, out)
        out[:, 1].sub_(flow.rotate(w[:, 0].contiguous()) * flow.to_velocity[0])
        along_x, along_y, activator, threshold = transform.synthesize(
            (flow.rotate(w[:, 1]), self.gradient),
            (w[:, 2], None),
            (w[:, 3], None),
            size=self.points,
        )
        along_x.add_(1)  # the mean gradient
        source = along_x.mul_(along_x).add_(along_y.mul_(along_y)).mul_(equation.stimulus)
        threshold.add_(equation.threshold_offset).mul_(1 / equation.threshold_scale)
        growth = threshold.neg_().add_(activator).mul_(activator).mul_(equation.reaction_rate)
        reaction = growth.add_(source).mul_(activator.neg_().add_(1))
        out[:, 2].add_(transform.analyse(reaction[None])[0])
        out[:, 3].add_(w[:, 2] * (1 / equation.recovery_time))
        return out

    def differentiable_nonlinear(self, w, transform):
        import torch

        from hpc_closure.spectral.modes.differentiable import times_i
        from hpc_closure.spectral.modes.grid import to_fields, to_spectra

        equation, flow = self.equation, self.flow
        vorticity, tracer, activator, inhibitor = w.unbind(1)
        by_channel = self.differentiable_carry(w, transform)
        by_channel[1] = by_channel[1] - times_i(vorticity) * flow.to_velocity[0]
        of_reaction = torch.stack([*(times_i(tracer) * self.gradient), activator, inhibitor])
        fields = to_fields(torch.view_as_complex(of_reaction), self.points)
        along_x, along_y, d, v = fields
        source = equation.stimulus * ((along_x + 1).square() + along_y.square())
        threshold = (v + equation.threshold_offset) / equation.threshold_scale
        reaction = (1 - d) * (equation.reaction_rate * d * (d - threshold) + source)
        by_channel[2] = by_channel[2] + torch.view_as_real(
            to_spectra(reaction, transform.grid.modes)
        )
        by_channel[3] = by_channel[3] + activator / equation.recovery_time
        return torch.stack(by_channel, 1)
