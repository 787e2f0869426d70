"""Base classes of a recipe: strict sections of keys, and families of interchangeable sections.

Steady forcings, noises, initial laws and equations are families: one class per kind, which holds
its keys with their ranges and defaults, its formula and its law. A class joins its family when it
is imported; no table lists the classes. Nothing here needs torch or numpy, so that an experiment
file is read at once.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WrapValidator,
    model_validator,
)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
EvenGrid = Annotated[int, Field(ge=8, le=65536, multiple_of=2)]


def _each_side(value: Any, check: Any) -> Any:
    """Check a number, or a list with a number per side, which becomes a tuple."""
    if not isinstance(value, (list, tuple)):
        return check(value)
    if not value:
        return check(None)
    return tuple(check(one) for one in value)


#: a number for all sides, or a tuple with one per side; checkers of types know the number only
_PER_SIDE = WrapValidator(_each_side), PlainSerializer(lambda value: value)
SideLengths = Annotated[float, Field(gt=0, allow_inf_nan=False), *_PER_SIDE]
SideGrid = Annotated[int, Field(ge=8, le=65536, multiple_of=2), *_PER_SIDE]


class Section(BaseModel):
    """Strict: unknown keys and wrong types are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @classmethod
    def keys(cls) -> list[str]:
        """Return the keys that the section accepts."""
        return list(cls.model_fields)


class Family(Section):
    """A section that has several kinds, each a class (a discriminated union).

    A direct subclass is a family (:class:`~noise.paths.Noise`). The subclasses of a family are its
    kinds, registered by the default of their ``discriminator`` key. A family reads
    ``{discriminator: name, key: value, ...}`` as the named kind. Keys of the family's other kinds
    are accepted, checked and dropped, because an experiment that changes the kind inherits the
    keys of its preset's kind.
    """

    discriminator: ClassVar[str] = "kind"
    default: ClassVar[str]
    kinds: ClassVar[dict[str, type[Any]]]

    @classmethod
    def __pydantic_init_subclass__(cls, **more: Any) -> None:
        super().__pydantic_init_subclass__(**more)
        if Family in cls.__bases__:
            cls.kinds = {}
        elif not cls.model_fields[cls.discriminator].is_required():
            cls.kinds[cls.model_fields[cls.discriminator].default] = cls

    @classmethod
    def keys(cls) -> list[str]:
        """Return the keys of all kinds of a family, or the keys of one kind."""
        if Family not in cls.__bases__:
            return super().keys()
        names = [name for kind in cls.kinds.values() for name in kind.model_fields]
        return list(dict.fromkeys([cls.discriminator, *names]))

    @model_validator(mode="wrap")
    @classmethod
    def _build_kind(cls, values: Any, build: Any) -> Self:
        if Family not in cls.__bases__ or not isinstance(values, dict):
            return build(values)
        name = values.get(cls.discriminator, cls.default)
        kind = cls.kinds.get(name) if isinstance(name, str) else None
        if kind is None:
            raise cls._unknown_kind(name)
        remaining = dict(values)
        for other in cls.kinds.values():
            foreign = set(remaining) & set(other.model_fields) - set(kind.model_fields)
            other.model_validate({key: remaining.pop(key) for key in foreign})
        return kind.model_validate(remaining)  # type: ignore[return-value]

    @classmethod
    def _unknown_kind(cls, name: Any) -> ValidationError:
        *names, last = map(repr, cls.kinds)
        expected = f"{', '.join(names)} or {last}"
        line = {"type": "literal_error", "loc": (cls.discriminator,), "input": name}
        return ValidationError.from_exception_data(
            cls.__name__, [{**line, "ctx": {"expected": expected}}]  # type: ignore[typeddict-item]
        )

    def parameters(self) -> dict:
        """Return the kind and its keys as plain values."""
        return self.model_dump(mode="json")

    def hash_parameters(self) -> dict:
        """Return the parameters that enter :meth:`problem.Problem.member_hash`.

        A kind whose keys have changed overrides this, so that existing members keep their hashes.
        """
        return self.parameters()
