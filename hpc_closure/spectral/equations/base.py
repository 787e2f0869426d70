"""Base classes of an equation: its keys, its linear symbol and its nonlinear term."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, SerializeAsAny

from hpc_closure.spectral.forcing import Forcing, PublishedForcing
from hpc_closure.spectral.initial import GaussianField, Initial
from hpc_closure.spectral.noise.laws import Noise, QWiener
from hpc_closure.spectral.recipe import Family, Positive

if TYPE_CHECKING:
    from torch import Tensor

    from hpc_closure.spectral.modes.differentiable import DifferentiableTransform
    from hpc_closure.spectral.modes.grid import Grid
    from hpc_closure.spectral.modes.transform import Transform

_WORDS = {1: "one dimension", 2: "two dimensions"}


class Equation(Family):
    """The full system dv/dt = M(v): a periodic equation, its forcings and its initial law.

    A kind adds its coefficients.
    """

    discriminator: ClassVar[str] = "equation"
    default: ClassVar[str] = "vorticity2d"
    #: dimensions of the flow, 1 or 2
    dimensions: ClassVar[int]

    equation: str
    length: Positive = Field(1.0, description="side of the periodic box")
    forcing: SerializeAsAny[Forcing] = PublishedForcing()
    noise: SerializeAsAny[Noise] = QWiener()
    initial: SerializeAsAny[Initial] = GaussianField()

    @property
    def damping(self) -> dict[int, float]:
        """Return the nonzero coefficients ``nu_p`` of the terms ``-nu_p (-Lap)^p`` by order p."""
        return {}

    @property
    def other_linear_terms(self) -> list[str]:
        """Return the keys of the linear terms other than viscosity."""
        return []

    def linear(self, grid: Grid) -> Tensor:
        """Return the eigenvalue of the linear part per mode, full retained shape, complex128."""
        raise NotImplementedError

    def terms(self, transform: Transform, form: str) -> Terms:
        """Return the equation on a transform.

        Args:
            transform: sets precision, device and slabs.
            form: form of the nonlinear term, for equations that have several.
        """
        raise NotImplementedError

    def is_symmetry(self, exchanged: int, sign_x: int, sign_y: int) -> bool:
        """Return whether a map of the square takes unforced solutions to solutions.

        Args:
            exchanged: 1 if the axes are exchanged first, else 0.
            sign_x, sign_y: -1 if an axis is reflected, else 1.
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
        """Write the nonlinear term of ``w``, ``(members, ..., 2)``, to ``out`` and return it."""
        raise NotImplementedError

    def differentiable_nonlinear(self, w: Tensor, transform: DifferentiableTransform) -> Tensor:
        """Return the nonlinear term of ``w`` as a new tensor that autograd differentiates."""
        raise NotImplementedError

    def speed(self, w: Tensor) -> Tensor:
        """Return the largest speed per member on this rank's rows, ``(members,)``.

        The CFL number needs it.
        """
        raise NotImplementedError


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
