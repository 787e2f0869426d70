r"""Incompressible flow in a periodic box, three velocities.

.. math::
   u_t + P\,\nabla\cdot(u\,u) = \nu\Delta u - \nu_h(-\Delta)^p u - \alpha u
   + \frac{\varepsilon\,u_{low}}{2 E_{low}} + f, \qquad \nabla\cdot u = 0

P is the projection on solenoidal fields. The term with :math:`\varepsilon` is the forcing
``power``: constant power in the modes up to ``reach``. f is the stochastic forcing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, SerializeAsAny

from hpc_closure.spectral.equations.base import Channel, Equation, Terms
from hpc_closure.spectral.forcing import Forcing, NoForcing, PowerForcing
from hpc_closure.spectral.initial import Band, Initial
from hpc_closure.spectral.noise.laws import Noise, NoNoise
from hpc_closure.spectral.recipe import NonNegative

if TYPE_CHECKING:
    from torch import Tensor


class NavierStokes3D(Equation):
    """Incompressible flow in a box."""

    dimensions: ClassVar[int] = 3
    unequal_sides: ClassVar[bool] = True
    channels: ClassVar[tuple[Channel, ...]] = (
        Channel("u", "length/time", "vector x"),
        Channel("v", "length/time", "vector y"),
        Channel("w", "length/time", "vector z"),
    )
    solenoidal: ClassVar[bool] = True

    equation: Literal["navier_stokes_3d"] = "navier_stokes_3d"
    viscosity: NonNegative = Field(1e-2, description="nu, length^2/time")
    hyperviscosity: NonNegative = Field(0.0, description="coefficient of (-Lap)^order")
    hyperviscosity_order: Annotated[int, Field(ge=2, le=8)] = 4
    drag: NonNegative = Field(0.0, description="linear drag, 1/time")
    forcing: SerializeAsAny[Forcing] = NoForcing()
    noise: SerializeAsAny[Noise] = NoNoise()
    initial: SerializeAsAny[Initial] = Band(wavenumber=2.0, width=1.0)

    @property
    def damping(self) -> dict[int, float]:
        terms = {1: self.viscosity, self.hyperviscosity_order: self.hyperviscosity}
        return {order: value for order, value in terms.items() if value}

    @property
    def other_linear_terms(self) -> list[str]:
        return [name for name in ("hyperviscosity", "drag") if getattr(self, name)]

    def linear(self, grid):
        damping = -self.viscosity * grid.k2 - self.drag
        if self.hyperviscosity:
            damping = damping - self.hyperviscosity * grid.k2**self.hyperviscosity_order
        return (damping + 0j).expand(3, *grid.shape)

    def draw_initial(self, grid, members, seed, stage):
        return self.initial.draw(grid, members, seed, stage)

    def forced(self, values):
        return values

    def check(self):
        super().check()
        if isinstance(self.forcing, PowerForcing) and self.initial.kind == "zero":
            raise ValueError(
                "physics.initial.kind=zero: forcing power needs a flow at the start; "
                "expected band or taylor_green"
            )

    def terms(self, transform, form):
        return NavierStokesTerms(self, transform)


class NavierStokesTerms(Terms):
    """Convection, and the forcing that follows the state."""

    def __init__(self, equation: NavierStokes3D, transform):
        from hpc_closure.spectral.equations.convection import Convection

        super().__init__(equation, transform)
        self.convection = Convection(transform)
        self.power: Power | None = None
        if isinstance(equation.forcing, PowerForcing):
            self.power = Power(equation.forcing, transform)

    def nonlinear(self, w, out):
        self.convection.tendency(w, out)
        if self.power is not None:
            self.power.add(w, out)
        return out

    def state_forcing(self, w):
        import torch

        if self.power is None:
            return None
        force = torch.zeros_like(w)
        self.power.add(w, force)
        return force

    def differentiable_nonlinear(self, w, transform):
        tendency = self.convection.differentiable_tendency(w, transform)
        return tendency if self.power is None else tendency + self.power.force(w)

    def speed(self, w):
        return self.convection.speed(w)

    def derived(self, name, w):
        if name == "velocity":
            return w
        if name == "vorticity":
            return self.convection.vorticity(w)
        return super().derived(name, w)


class Power:
    """The force ``power u_low / (2 E_low)`` on the modes of ``forcing.reach``.

    u_low is the solenoidal part of the velocity, with modes k and -k of a real field. The force
    grows with u_low. Without the projections it would amplify round-off, which the rest of the
    equation does not see, until divergence ends the run after some hundred eddy times.

    Args:
        forcing: power and reach.
        transform: transform of the grid.
    """

    def __init__(self, forcing: PowerForcing, transform):
        import torch

        grid, self.power, self.transform = transform.grid, forcing.power, transform
        scaled = grid.k2 / grid.unit**2
        low = (scaled > 0) & (scaled <= forcing.reach**2 * (1 + 1e-9))
        number = torch.full(grid.shape, -1)
        number[low] = torch.arange(int(low.sum()))
        here = transform.local(number).flatten()
        #: places of this rank's low modes among its own modes and among all low modes
        self.local = (here >= 0).nonzero().flatten().to(transform.device)
        self.places = here[here >= 0].to(transform.device)

        def of_low(values: Tensor) -> Tensor:
            return values.expand(grid.shape)[low].to(transform.device, transform.real)

        self.weights = of_low(grid.weights)
        direction = torch.stack([of_low(k) for k in grid.k])
        self.direction = (direction / direction.square().sum(0).sqrt())[..., None]
        wavevectors = torch.stack([k.expand(grid.shape)[low] for k in grid.integer_k], 1)
        place = {tuple(k): index for index, k in enumerate(wavevectors.tolist())}
        # only where the last wavenumber is zero are both k and -k stored
        opposite = [place.get(tuple(-k for k in key), place[key]) for key in place]
        self.opposite = torch.tensor(opposite, device=transform.device)
        both = of_low((grid.integer_k[-1] == 0).double())[:, None]
        #: weights of a mode and of the opposite one in their mean as modes of a real field
        self.mean = 1 - 0.5 * both, 0.5 * both * both.new_tensor([1.0, -1.0])

    def add(self, w: Tensor, out: Tensor) -> None:
        """Add the force to ``out``; both are contiguous ``(members, 3, ..., 2)``."""
        import numpy as np
        import torch

        low = self._projected(self._gathered(w.flatten(2, -2)[:, :, self.local]))
        square = low.square()
        power = square[:, 0].sum(-1) + square[:, 1].sum(-1) + square[:, 2].sum(-1)
        # a cumulative sum adds in the order of the modes, whatever the batch
        twice_energy = np.cumsum((power * self.weights).cpu().numpy(), 1)[:, -1:]
        factor = (self.power / torch.from_numpy(twice_energy).to(out))[..., None, None]
        out.flatten(2, -2).index_add_(2, self.local, low[:, :, self.places] * factor)

    def force(self, w: Tensor) -> Tensor:
        """Return the force as a new tensor that autograd differentiates, on a single rank."""
        low = self._projected(w.flatten(2, -2)[:, :, self.local])
        twice_energy = (low.square().sum((1, 3)) * self.weights).sum(1)
        force = low * (self.power / twice_energy)[:, None, None, None]
        out = w.new_zeros(*w.shape).flatten(2, -2)
        return out.index_add(2, self.local, force).view(w.shape)

    def _gathered(self, own: Tensor) -> Tensor:
        """Return all low modes (members, 3, modes, 2) from this rank's."""
        import numpy as np
        import torch

        if self.transform.num_ranks == 1:
            return own
        # each mode is on one rank, and its largest value over the ranks is that rank's
        low = own.new_full((*own.shape[:2], len(self.weights), 2), -np.inf)
        low[:, :, self.places] = own
        return torch.from_numpy(self.transform.maximum(low.numpy()))

    def _projected(self, low: Tensor) -> Tensor:
        """Return the solenoidal part (members, 3, modes, 2) of the real field with these modes."""
        import torch

        low = torch.addcmul(low * self.mean[0], low[:, :, self.opposite], self.mean[1])
        x, y, z = (low * self.direction).unbind(1)
        return torch.addcmul(low, (x + y + z)[:, None], self.direction, value=-1)
