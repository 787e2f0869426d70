"""What an equation is: a class with its keys, its linear symbol and its nonlinear term."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, SerializeAsAny

from hpc_closure.spectral.forcing import Forcing, PublishedForcing
from hpc_closure.spectral.initial import GaussianField, Initial
from hpc_closure.spectral.noise.paths import Noise, QWiener
from hpc_closure.spectral.recipe import Family, Positive

if TYPE_CHECKING:
    from torch import Tensor

    from hpc_closure.spectral.modes.differentiable import TracedTransform
    from hpc_closure.spectral.modes.grid import Grid
    from hpc_closure.spectral.modes.transform import Transform

_WORDS = {1: "one dimension", 2: "two dimensions"}


class Equation(Family):
    """The full system dv/dt = M(v): a periodic equation, its forcings and its initial law.

    A kind adds the coefficients that it has.
    """

    chooser: ClassVar[str] = "equation"
    default: ClassVar[str] = "vorticity2d"
    #: of the flow, 1 or 2
    dimensions: ClassVar[int]

    equation: str
    length: Positive = Field(1.0, description="side of the periodic box")
    forcing: SerializeAsAny[Forcing] = PublishedForcing()
    noise: SerializeAsAny[Noise] = QWiener()
    initial: SerializeAsAny[Initial] = GaussianField()

    @property
    def damping(self) -> dict[int, float]:
        """Coefficients ``nu_p`` of its terms ``-nu_p (-Lap)^p`` by order p, where not zero."""
        return {}

    @property
    def beyond_viscosity(self) -> list[str]:
        """Keys of the linear terms that are there besides viscosity."""
        return []

    def linear(self, grid: Grid) -> Tensor:
        """Eigenvalue of the linear part per mode, whole retained shape, complex128."""
        raise NotImplementedError

    def terms(self, transform: Transform, form: str) -> Terms:
        """The equation on a transform.

        Args:
            transform: precision, device and slabs come from it.
            form: form of the nonlinear term, for equations that have several.
        """
        raise NotImplementedError

    def leaves(self, exchanged: int, sign_x: int, sign_y: int) -> bool:
        """Whether a map of the square takes solutions to solutions, where nothing forces them.

        Args:
            exchanged: 1 where the axes are exchanged, after
            sign_x, sign_y: -1 where an axis is turned over.
        """
        return True

    def check(self) -> None:
        """Raise ValueError unless the forcings and the initial law are for these dimensions."""
        for name in ("initial", "forcing", "noise"):
            law = getattr(self, name)
            if self.dimensions in law.dimensions:
                continue
            known = type(law).kinds.items()
            *names, last = [kind for kind, one in known if self.dimensions in one.dimensions]
            fitting = f"{', '.join(names)} or {last}" if names else last
            if name == "initial":
                why = f"does not fit {self.equation}; expected {fitting}"
            else:
                where = _WORDS[law.dimensions[0]]
                why = f"is for flows in {where}; {self.equation} needs {fitting}"
            raise ValueError(f"physics.{name}.kind={law.kind} {why}")

    def named(self) -> dict:
        laws = {name: getattr(self, name).named() for name in ("forcing", "noise", "initial")}
        return {**super().named(), **laws}


class Terms:
    """An equation on a transform; states are real pairs.

    Args:
        equation: the equation.
        transform: transform of the grid.
    """

    #: the form of an advection on the plane, which may be fused with the step on a GPU
    advection: Any = None

    def __init__(self, equation: Equation, transform: Transform):
        self.transform = transform
        self.linear = equation.linear(transform.grid)

    def nonlinear(self, w: Tensor, out: Tensor) -> Tensor:
        """``out`` = the nonlinear term of ``w``, ``(members, ..., 2)``."""
        raise NotImplementedError

    def traced(self, w: Tensor, transform: TracedTransform) -> Tensor:
        """The nonlinear term of ``w``, a new tensor: autograd goes through it."""
        raise NotImplementedError

    def speed(self, w: Tensor) -> Tensor:
        """Largest speed of each member on this rank's rows, ``(members,)``: for the CFL number."""
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

    def traced(self, w, transform):
        from hpc_closure.spectral.modes.differentiable import times_i

        square = transform.spectra(transform.fields(w).square())
        return -times_i(square) * self.half_k[0]

    def speed(self, w):
        return self.transform.synthesize((w, None))[0].abs_().amax(-1)
