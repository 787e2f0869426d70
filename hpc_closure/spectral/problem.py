"""The recipe of a member: all settings that decide its bits, and the hash that names it."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, SerializeAsAny, model_validator

from hpc_closure.spectral.equations import Equation
from hpc_closure.spectral.modes.resolution import per_side
from hpc_closure.spectral.recipe import Finite, Positive, Section, SideGrid

if TYPE_CHECKING:
    from torch import Tensor

    from hpc_closure.spectral.equations.base import Terms
    from hpc_closure.spectral.modes.grid import Grid
    from hpc_closure.spectral.modes.transform import Transform
    from hpc_closure.spectral.noise.draws import NoiseModel
    from hpc_closure.spectral.schemes import Scheme

# Closures that replace a term of the full system; the reduced solver then leaves the term out.
REMOVABLE = ("diffusion", "convection")
# Schemes that need past steps, and schemes that treat half of the linear term explicitly.
WITH_MEMORY = ("cn_ab2", "ab3", "ab3_plain")
WITH_EXPLICIT_HALF = ("cn_euler", "cn_ab2")
# Initial laws in boxes of unequal sides.
UNEQUAL_INITIAL = ("zero", "gaussian_field", "band")


def check_sides(key: str, value: Any, physics: Equation) -> None:
    """Raise ValueError if a list has another number of entries than the flow has sides."""
    sides = physics.dimensions
    if isinstance(value, tuple) and len(value) != sides:
        raise ValueError(
            f"{key}={list(value)} has {len(value)} entries, but {physics.equation} has {sides} "
            f"side{'' if sides == 1 else 's'}: write one number, or a list with one per side"
        )


class Numerics(Section):
    """How a flow is discretised."""

    grid: SideGrid = Field(64, description="points per side, or a list with those of each side")
    dt: Positive = Field(1e-3, description="time step; with cfl the longest one")
    cfl: Positive | None = Field(
        None,
        description="a member takes 2^j steps of dt / 2^j, with the least j that keeps "
        "max(|u| + |v|) dt / 2^j <= cfl dx; none = all steps are dt",
    )
    max_refinements: Annotated[int, Field(ge=1, le=20)] = Field(
        6, description="with cfl: largest j; a member that needs more is lost"
    )
    scheme: Literal[
        "cn_euler", "cn_ab2", "etdrk4", "imex_rk3", "ab3", "ab3_plain", "rk2", "rk4"
    ] = "cn_euler"
    form: Literal["basdevant", "flux"] = Field(
        "basdevant", description="algebraic form of the nonlinear term"
    )
    precision: Literal["float32", "float64"] = Field("float64", description="of the computation")


class Problem(Numerics):
    """One periodic flow and how it is discretised.

    ``Problem(grid=32, viscosity=1e-2, noise={"kind": "ring"})`` accepts the keys of the equation
    beside those of the numerics. Forcing and noise are then none unless stated.

    Attributes:
        physics: the equation, its forcings and its initial law.
        removed: term that a closure must supply.
        path_dt: step in which the noise path is drawn; by default ``dt``.
        drain: damping rates, 1/time, of the integer shells 0, 1, ..., added to those of the
            equation; higher shells have none.
        reduced_python: where the user's solver of the reduced problem is, ``file.py:Name`` or
            ``module:Name``; empty = the solver of this package.

    Raises:
        ValueError: a value is out of range, or the settings do not fit together; one line says
            which, in the words of an experiment file.
    """

    physics: SerializeAsAny[Equation]
    removed: Literal["none", "diffusion", "convection"] = "none"
    path_dt: Positive | None = None
    drain: tuple[Finite, ...] = ()
    reduced_python: str = ""

    def __init__(self, **settings: Any):
        if "physics" not in settings:
            numerics = {
                key: settings.pop(key) for key in list(settings) if key in type(self).keys()
            }
            physics = {"forcing": {"kind": "none"}, "noise": {"kind": "none"}, **settings}
            equation = Equation.kinds.get(physics.get("equation", Equation.default))
            sides = getattr(equation, "dimensions", None)  # external: a number per problem
            if sides == 1:
                physics.setdefault("initial", {"kind": "line"})
            if sides == 3:
                physics.setdefault("initial", {"kind": "band", "wavenumber": 2.0, "width": 1.0})
            settings = {**numerics, "physics": physics}
        super().__init__(**settings)

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        self.physics.check()
        self._check_sides()
        if len(self.physics.channels) > 1:
            self._check_channels()
        self.physics.forcing.retained(min(self.sizes), max(self.lengths))
        self.physics.noise.check(self.dt, self.cfl)
        if self.removed != "none":
            self._check_removed()
        if self.cfl and self.scheme in WITH_MEMORY:
            raise ValueError(
                f"generate.cfl={self.cfl:g}: scheme {self.scheme} needs steps of one length; "
                "remove cfl, or set generate.scheme to cn_euler, etdrk4, imex_rk3, rk2 or rk4"
            )
        return self

    def _check_sides(self) -> None:
        """Check a list of points or lengths, and refuse what needs equal sides."""
        physics = self.physics
        for key, value in (("generate.grid", self.grid), ("physics.length", physics.length)):
            check_sides(key, value, physics)
        if self.equal_sides:
            return
        unequal = f"sides of {list(self.sizes)} points and lengths {list(self.lengths)}"
        if not physics.unequal_sides:
            raise ValueError(
                f"physics.equation={physics.equation} needs equal sides, not {unequal}"
            )
        for key, setting, expected in (
            ("physics.forcing.kind", physics.forcing.kind, ("none", "power")),
            ("physics.noise.kind", physics.noise.kind, ("none",)),
            ("physics.initial.kind", physics.initial.kind, UNEQUAL_INITIAL),
            ("generate.closure", self.removed, ("none",)),
            ("generate.cfl", str(self.cfl or "none"), ("none",)),
        ):
            if setting not in expected:
                raise ValueError(
                    f"{key}={setting} needs equal sides, not {unequal}; without them it is "
                    f"{' or '.join(expected)}"
                )

    def _check_channels(self) -> None:
        name = self.physics.equation
        if self.physics.noise.depends_on_state:
            raise ValueError(
                f"physics.noise.kind={self.physics.noise.kind} is for equations of one field; "
                f"{name} needs none, ring, ornstein_uhlenbeck or q_wiener"
            )
        if self.cfl:
            raise ValueError(
                f"generate.cfl={self.cfl:g}: {name} is solved in steps of one length; remove cfl"
            )
        if self.removed != "none":
            raise ValueError(
                f"generate.closure={self.removed} is a term of vorticity2d; {name} needs "
                "generate.closure=none"
            )

    def _check_removed(self) -> None:
        alternative = "or set generate.closure to convection, subgrid or none"
        if self.cfl:
            raise ValueError(
                f"generate.cfl={self.cfl:g}: closure {self.removed} is defined for steps of one "
                "length; remove cfl, or set generate.closure to subgrid or none"
            )
        if self.removed != "diffusion":
            return
        if self.scheme not in WITH_EXPLICIT_HALF:
            raise ValueError(
                f"generate.scheme={self.scheme}: closure diffusion is half the viscous term of "
                f"Crank-Nicolson; set generate.scheme to cn_euler or cn_ab2, {alternative}"
            )
        for key in self.physics.other_linear_terms:
            raise ValueError(
                f"physics.{key}={getattr(self.physics, key):g}: closure diffusion is defined for "
                f"viscosity as the only linear term; set physics.{key} to 0, {alternative}"
            )

    @classmethod
    def of(cls, physics: Equation, numerics: Numerics, removed: str = "none") -> Problem:
        """Return the problem of an experiment's ``physics`` and ``generate`` sections."""
        shared = {name: getattr(numerics, name) for name in Numerics.model_fields}
        return cls(physics=physics, removed=removed, **shared)

    def replace(self, **changes: Any) -> Problem:
        """Return the problem with some settings of the equation or the numerics changed."""
        return type(self)(**{**self.recipe(), **changes})

    def recipe(self) -> dict[str, Any]:
        """Return all settings as plain JSON values, defaults included: ``Problem(**recipe)``."""
        plain = self.model_dump(mode="json")
        return {**plain.pop("physics"), **plain}

    def member_hash(self) -> str:
        """Return the SHA-256 of the recipe; with seed and index it names a member."""
        settings = {**self.recipe(), **self.physics.hash_parameters(), "cfl": self.cfl or 0.0}
        settings["max_level"] = settings.pop("max_refinements")  # as when members were first named
        path = settings.pop("path_dt")
        del settings["reduced_python"]  # it changes targets, not members
        if not self.drain:
            del settings["drain"]
        if settings["noise"]["kind"] != "none":
            settings["noise"] = {**settings["noise"], "path_dt": path}
        text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    # -- parts -----------------------------------------------------------------------------------

    @property
    def dimensions(self) -> int:
        """Return the dimensions of the flow, 1 to 3."""
        return self.physics.dimensions

    @property
    def length(self) -> float:
        """Return the side of the domain; a tuple of the lengths if they were listed."""
        return self.physics.length

    @property
    def lengths(self) -> tuple[float, ...]:
        """Return the length of each side."""
        return self.physics.lengths

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the points of each side."""
        return per_side(self.grid, self.dimensions, "generate.grid")

    @property
    def equal_sides(self) -> bool:
        """Whether all sides have the same length and number of points."""
        return len(set(self.sizes)) == len(set(self.lengths)) == 1

    @property
    def viscosity(self) -> float:
        """Return the coefficient of the Laplacian; 0 if the equation has none."""
        return self.physics.damping.get(1, 0.0)

    def steps_in(self, span: float) -> int:
        """Return the number of steps of ``dt`` in a time span.

        Raises:
            ValueError: the span is not a whole number of steps.
        """
        steps = round(span / self.dt)
        if abs(steps * self.dt - span) > 1e-6 * self.dt * max(1, steps):
            raise ValueError(f"a time of {span:g} is not a whole number of steps of {self.dt:g}")
        return steps

    def make_grid(self) -> Grid:
        """Return the grid of the solver."""
        from hpc_closure.spectral.modes.grid import Grid

        return Grid(self.grid, self.length, self.dimensions)

    def make_equation(self, transform: Transform) -> Terms:
        """Return the equation on a transform."""
        return self.physics.terms(transform, self.form)

    def make_noise(self, seed: int, stage: str = "generate") -> NoiseModel | None:
        """Return the draws of the stochastic forcing, or None."""
        from hpc_closure.spectral.noise.draws import NoiseModel

        noise = self.physics.noise
        if noise.kind == "none":
            return None
        return NoiseModel(noise, self.make_grid(), self.dt, seed, stage, self.path_dt)

    def make_scheme(self, linear, transform: Transform, level: int = 0) -> Scheme:
        """Return the time scheme at step ``dt / 2**level``."""
        from hpc_closure.spectral.schemes import SCHEMES

        if self.drain:
            linear = linear - self._drain_of(transform)
        implicit_only = self.removed == "diffusion"
        return SCHEMES[self.scheme](linear, self.dt * 2.0**-level, transform, implicit_only)

    def _drain_of(self, transform: Transform) -> Tensor:
        """Return the damping rate of every retained mode, full retained shape."""
        import torch

        shell = transform.grid.shell()
        rates = torch.zeros(max(len(self.drain), int(shell.max()) + 1), dtype=torch.float64)
        rates[: len(self.drain)] = torch.tensor(self.drain, dtype=torch.float64)
        return rates[shell]
