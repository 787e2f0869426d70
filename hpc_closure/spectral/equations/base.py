"""Base classes of an equation: its keys, its linear symbol and its nonlinear term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny

from hpc_closure.spectral.forcing import Forcing, PublishedForcing
from hpc_closure.spectral.initial import GaussianField, Initial
from hpc_closure.spectral.modes.resolution import per_side
from hpc_closure.spectral.noise.laws import Noise, QWiener
from hpc_closure.spectral.recipe import Family, SideLengths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from hpc_closure.spectral.modes.differentiable import DifferentiableTransform
    from hpc_closure.spectral.modes.grid import Grid
    from hpc_closure.spectral.modes.transform import Transform
    from hpc_closure.spectral.noise.events import Events

_WORDS = {1: "one dimension", 2: "two dimensions", 3: "three dimensions"}


@dataclass(frozen=True)
class Channel:
    """One field of a state.

    Attributes:
        name: name of the field, also of its data set.
        unit: unit in terms of ``length`` and ``time``; empty if it has none.
        kind: how a map of the box changes it. A reflection changes the sign of a pseudo-scalar.
            "vector x" and, as the next channels, "vector y" and "vector z", one per side, are the
            components of a vector: they change their signs as their axes do and are exchanged if
            the axes are.
    """

    name: str
    unit: str
    kind: Literal["scalar", "pseudo-scalar", "vector x", "vector y", "vector z"]


class Equation(Family):
    """The full system dv/dt = M(v): a periodic equation, its forcings and its initial law.

    A kind adds its coefficients.
    """

    discriminator: ClassVar[str] = "equation"
    default: ClassVar[str] = "vorticity2d"
    #: whether its sides may have different lengths and numbers of points
    unequal_sides: ClassVar[bool] = False
    #: dimensions of the flow, 1 to 3
    dimensions: ClassVar[int]
    #: fields of the state; forcing and noise act on the first
    channels: ClassVar[tuple[Channel, ...]] = (Channel("vorticity", "1/time", "pseudo-scalar"),)
    #: whether the velocity of :attr:`velocity_channels` has no divergence, and so have closures
    solenoidal: ClassVar[bool] = False
    #: whether linear terms let modes grow; then round-off between modes k and -k, which the
    #: nonlinear term does not see, would grow with them
    amplifies: ClassVar[bool] = False

    equation: str
    length: SideLengths = Field(
        1.0, description="side of the periodic box, or a list with the length of each side"
    )
    forcing: SerializeAsAny[Forcing] = PublishedForcing()
    noise: SerializeAsAny[Noise] = QWiener()
    initial: SerializeAsAny[Initial] = GaussianField()

    @property
    def lengths(self) -> tuple[float, ...]:
        """Return the length of each side."""
        return per_side(self.length, self.dimensions)

    @property
    def damping(self) -> dict[int, float]:
        """Return the nonzero coefficients ``nu_p`` of the terms ``-nu_p (-Lap)^p`` by order p."""
        return {}

    @property
    def other_linear_terms(self) -> list[str]:
        """Return the keys of the linear terms other than viscosity."""
        return []

    @property
    def channel_shape(self) -> tuple[int, ...]:
        """Return ``(C,)`` for a state of C > 1 fields, and ``()`` for a single field."""
        return (len(self.channels),) if len(self.channels) > 1 else ()

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Return the names of C > 1 fields of the state, and ``()`` for a single field."""
        names = tuple(channel.name for channel in self.channels)
        return names if len(names) > 1 else ()

    def linear(self, grid: Grid) -> Tensor:
        """Return the eigenvalues of the diagonal linear part per mode, complex128.

        Their shape is ``(*channel_shape, 2K + 1, K + 1)``. Linear terms that couple channels
        belong to :meth:`Terms.nonlinear`.
        """
        raise NotImplementedError

    @property
    def velocity_channels(self) -> tuple[int, ...]:
        """Return the channels that are the components of the flow's velocity, one per side.

        Empty if the velocity follows from streamfunctions (:meth:`stream_factors`). In three
        dimensions the first vector is the velocity.
        """
        kinds = [channel.kind for channel in self.channels]
        if self.dimensions != 3 or "vector x" not in kinds:
            return ()
        first = kinds.index("vector x")
        return (first, first + 1, first + 2)

    @property
    def is_velocity(self) -> bool:
        """Whether a state is a velocity and nothing else."""
        return len(self.velocity_channels) == len(self.channels)

    @property
    def carriers(self) -> tuple[int, ...]:
        """Return for each channel the flow of :meth:`stream_factors` that carries it."""
        return (0,) * len(self.channels)

    @property
    def mean_velocities(self) -> tuple[float, ...]:
        """Return the mean velocity along x of each flow, which its streamfunction lacks."""
        return (0.0,) * (1 + max(self.carriers))

    def stream_factors(self, grid: Grid) -> Tensor:
        r"""Return real factors (flows, C, 2K + 1, K + 1) from channels to streamfunctions.

        The velocities of a flow are :math:`(u, v) = (\psi_y, -\psi_x)`. By default there is one
        flow, whose vorticity :math:`-\Delta\psi` is the first channel.
        """
        factors = grid.k2.new_zeros(1, len(self.channels), *grid.shape)
        factors[0, 0] = grid.inverse_k2
        return factors

    def steady(self, grid: Grid) -> Tensor:
        """Return the steady forcing of all channels, ``(*channel_shape, ...)`` complex128."""
        return self._of_first_channel(self.forcing.spectrum(grid))

    def draw_initial(self, grid: Grid, members: Sequence[int], seed: int, stage: str) -> Tensor:
        """Draw initial states ``(members, *channel_shape, ...)`` complex128.

        The initial law is that of the first channel; the others begin at zero.
        """
        return self._of_first_channel(self.initial.draw(grid, members, seed, stage), 1)

    def events(self, grid: Grid, dt: float, seed: int, stage: str) -> Events | None:
        """Return the random events that change the state at single steps, or None.

        Args:
            grid: the solver's grid.
            dt: step of the run.
            seed: seed of the experiment.
            stage: stage of the pipeline, part of the Philox key.
        """
        return None

    @property
    def is_random(self) -> bool:
        """Whether trajectories from equal states differ."""
        return self.noise.kind != "none"

    def without_noise(self) -> dict[str, Any]:
        """Return the keys that make the equation deterministic, as a reduced solver has it."""
        return {"noise": {"kind": "none"}}

    def forced(self, values: Tensor) -> Tensor:
        """Return a view of the channel that the noise forces, of values like the state."""
        return values[:, 0] if self.channel_shape else values

    def _of_first_channel(self, spectra: Tensor, axis: int = 0) -> Tensor:
        """Insert an axis of channels before the modes; all channels but the first are zero."""
        if not self.channel_shape:
            return spectra
        shape = (*spectra.shape[:axis], *self.channel_shape, *spectra.shape[axis:])
        out = spectra.new_zeros(shape)
        out.select(axis, 0).copy_(spectra)
        return out

    def terms(self, transform: Transform, form: str) -> Terms:
        """Return the equation on a transform.

        Args:
            transform: sets precision, device and slabs.
            form: form of the nonlinear term, for equations that have several.
        """
        raise NotImplementedError

    def is_symmetry(self, permutation: tuple[int, ...], signs: tuple[int, ...]) -> bool:
        """Return whether a map of the box takes unforced solutions to solutions.

        It maps each channel according to its kind. If noise acts on the first channel alone and
        that is a component of a vector, the equation must refuse to exchange the axes.

        Args:
            permutation: axis a of the mapped state is axis ``permutation[a]`` of the state; on
                the plane (0, 1), or (1, 0) if the axes are exchanged.
            signs: -1 for every axis of the mapped state that is reflected, else 1.
        """
        return True

    def check(self) -> None:
        """Raise ValueError if a forcing or the initial law is not for these dimensions."""
        for name in ("initial", "forcing", "noise"):
            law = getattr(self, name)
            if self.dimensions in law.dimensions:
                continue
            kinds = type(law).kinds.items()
            *names, last = [
                kind for kind, law_class in kinds if self.dimensions in law_class.dimensions
            ]
            expected = f"{', '.join(names)} or {last}" if names else last
            if name == "initial":
                why = f"does not fit {self.equation}; expected {expected}"
            else:
                where = _WORDS[law.dimensions[0]]
                why = f"is for flows in {where}; {self.equation} needs {expected}"
            raise ValueError(f"physics.{name}.kind={law.kind} {why}")

    def hash_parameters(self) -> dict:
        laws = {
            name: getattr(self, name).hash_parameters() for name in ("forcing", "noise", "initial")
        }
        return {**super().hash_parameters(), **laws}


class Terms:
    """An equation on a transform; states are real pairs ``(members, ..., 2)``.

    Args:
        equation: the equation.
        transform: transform of the grid.
    """

    #: advection form of an equation on the plane; a GPU may fuse it with the step
    advection: Any = None

    def __init__(self, equation: Equation, transform: Transform):
        self.transform = transform
        self.linear = equation.linear(transform.grid)

    def nonlinear(self, w: Tensor, out: Tensor) -> Tensor:
        """Write the nonlinear term of ``w`` to ``out`` and return it.

        Both are ``(members, *channel_shape, 2K + 1, columns, 2)``, on a line without the rows.
        """
        raise NotImplementedError

    def state_forcing(self, w: Tensor) -> Tensor | None:
        """Return the forcing of :meth:`nonlinear` that follows the state, shaped like it.

        None if there is none.
        """
        return None

    def derived(self, name: str, w: Tensor) -> Tensor:
        """Return the pairs of a field that states determine; see :meth:`Simulation.fields`.

        Raises:
            ValueError: the equation has no such field.
        """
        raise ValueError(f"unknown field {name!r}")

    def differentiable_nonlinear(self, w: Tensor, transform: DifferentiableTransform) -> Tensor:
        """Return the nonlinear term of ``w`` as a new tensor that autograd differentiates."""
        raise NotImplementedError

    def speed(self, w: Tensor) -> Tensor:
        """Return the largest speed per member on this rank's rows, ``(members,)``.

        The CFL number needs it.
        """
        raise NotImplementedError


class Stirred(Terms):
    """Several channels, all carried by the flow whose vorticity is the first."""

    def __init__(self, equation: Equation, transform: Transform):
        from hpc_closure.spectral.equations.advection import Flux

        super().__init__(equation, transform)
        self.flow = Flux(transform)

    def carry(self, w: Tensor, out: Tensor) -> Tensor:
        """Write the advection of all channels, ``(members, C, ..., 2)``, to ``out``; return it."""
        vorticity, work = w[:, 0].contiguous(), self.flow.work("tendency", w[:, 0])
        out[:, 0].copy_(self.flow.tendency(vorticity, work))
        for channel in range(1, w.shape[1]):
            out[:, channel].copy_(self.flow.carry(vorticity, w[:, channel].contiguous(), work))
        return out

    def differentiable_carry(self, w: Tensor, transform: DifferentiableTransform) -> list[Tensor]:
        """Return the advection of each channel as new tensors ``(members, ..., 2)``."""
        vorticity, *carried = w.unbind(1)
        tendency = self.flow.differentiable_tendency
        return [
            tendency(vorticity, transform),
            *(tendency(vorticity, transform, field) for field in carried),
        ]

    def speed(self, w):
        velocity = self.flow.velocity(w[:, 0]).abs_()
        return velocity[0].add_(velocity[1]).amax((-2, -1))

    def derived(self, name, w):
        if name == "velocity":
            rotated = self.flow.rotate(w[:, 0])
            return (rotated[None] * self.flow.to_velocity).transpose(0, 1).contiguous()
        return super().derived(name, w)


class SelfAdvection(Terms):
    """``-u u_x = -(u^2)_x / 2`` on a line."""

    def __init__(self, equation: Equation, transform: Transform):
        super().__init__(equation, transform)
        self.half_k = transform.factors(0.5 * transform.grid.ky)

    def nonlinear(self, w, out):
        u = self.transform.synthesize((w, None))
        square = self.transform.analyse(u.mul_(u), self.half_k)[0]
        # -i k / 2 times the spectrum of u^2
        out[..., 0].copy_(square[..., 1])
        out[..., 1].copy_(square[..., 0]).neg_()
        return out

    def differentiable_nonlinear(self, w, transform):
        from hpc_closure.spectral.modes.differentiable import times_i

        square = transform.spectra(transform.fields(w).square())
        return -times_i(square) * self.half_k[0]

    def speed(self, w):
        return self.transform.synthesize((w, None))[0].abs_().amax(-1)
