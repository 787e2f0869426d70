"""A flow whose solver is not in this package: its box and its fields, and no terms.

Data come from files of others, the reduced solver from ``reduced.python``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator

from hpc_closure.spectral.equations.base import Channel, Equation
from hpc_closure.spectral.forcing import Forcing, NoForcing
from hpc_closure.spectral.initial import AtRest, Initial
from hpc_closure.spectral.noise.laws import Noise, NoNoise
from hpc_closure.spectral.recipe import Section

ChannelKind = Literal["scalar", "pseudo-scalar", "vector x", "vector y", "vector z"]
COMPONENTS = ("vector x", "vector y", "vector z")
NO_SOLVER = "physics.equation=external has no solver in this package: name yours in reduced.python"


class FieldOf(Section):
    """One field of a state."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")] = Field(
        description="name of the field"
    )
    kind: ChannelKind = Field("scalar", description="how a map of the box changes it")
    unit: str = Field("", description="unit, for the labels of figures")


class External(Equation):
    """A flow of another solver in a periodic box."""

    equation: Literal["external"] = "external"
    sides: Annotated[int, Field(ge=1, le=3)] = Field(2, description="sides of the box")
    fields: tuple[FieldOf, ...] = Field(
        (FieldOf(name="state"),),
        description="fields of the state, {name: kind} or [{name, kind, unit}]; the components of "
        "a vector follow each other",
    )
    symmetries: Literal["translations", "all"] = Field(
        "translations",
        description="maps of the box that take solutions to solutions, for train.augment; all: "
        "also rotations and reflections",
    )
    forcing: SerializeAsAny[Forcing] = NoForcing()
    noise: SerializeAsAny[Noise] = NoNoise()
    initial: SerializeAsAny[Initial] = AtRest()

    @field_validator("fields", mode="before")
    @classmethod
    def _of_mapping(cls, value: Any) -> Any:
        """Convert ``{name: kind}`` to a list, because files of settings sort the keys."""
        if not isinstance(value, dict):
            return value
        return tuple(
            {"name": name, **(kind if isinstance(kind, dict) else {"kind": kind})}
            for name, kind in value.items()
        )

    @property
    def dimensions(self) -> int:  # type: ignore[override]
        return self.sides

    @property
    def channels(self) -> tuple[Channel, ...]:  # type: ignore[override]
        return tuple(Channel(one.name, one.unit, one.kind) for one in self.fields)

    def check(self):
        for name, law, expected in (
            ("forcing", self.forcing, "none"),
            ("noise", self.noise, "none"),
            ("initial", self.initial, "zero"),
        ):
            if law.kind != expected:
                raise ValueError(
                    f"physics.{name}.kind={law.kind}: equation external has no terms here, so "
                    f"it is {expected}"
                )
        kinds, names = [one.kind for one in self.fields], [one.name for one in self.fields]
        if not kinds:
            raise ValueError("physics.fields=[]: expected at least one field, {name: kind}")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"physics.fields: {name} is listed twice")
        wanted, first = COMPONENTS[: self.sides], 0
        while first < len(kinds):
            if kinds[first] not in COMPONENTS:
                first += 1
                continue
            if tuple(kinds[first : first + self.sides]) != wanted:
                raise ValueError(
                    f"physics.fields: the kinds are {', '.join(kinds)}; expected {wanted[0]} "
                    f"followed by the other components of the {self.sides} sides"
                )
            first += self.sides
        if self.sides == 1 and len(kinds) > 1:
            raise ValueError(
                f"physics.fields: {len(kinds)} fields on a line; expected one, or two sides"
            )
        if self.sides == 3 and "vector x" not in kinds:
            raise ValueError(
                "physics.fields: in three dimensions closures read the velocity; expected fields "
                "of kind vector x, vector y and vector z"
            )

    def stream_factors(self, grid):
        # the first pseudo-scalar is read as a vorticity; without one, the first field
        kinds = [one.kind for one in self.fields]
        place = kinds.index("pseudo-scalar") if "pseudo-scalar" in kinds else 0
        factors = grid.k2.new_zeros(1, len(kinds), *grid.shape)
        factors[0, place] = grid.inverse_k2
        return factors

    def linear(self, grid):
        raise ValueError(NO_SOLVER)

    def terms(self, transform, form):
        raise ValueError(NO_SOLVER)

    def is_symmetry(self, permutation, signs):
        moved = permutation != tuple(range(self.sides)) or min(signs) < 0
        return self.symmetries == "all" or not moved
