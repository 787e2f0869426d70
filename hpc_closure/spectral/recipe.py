"""What a recipe is made of: strict sections of keys, and families of kinds.

Steady forcings, noises, initial laws and equations are families: one class per kind, which holds
its keys with their ranges and defaults, its formula and its law. A class that is imported is
known; no table lists it again. Nothing here needs torch or numpy: experiments are read at once.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
EvenGrid = Annotated[int, Field(ge=8, le=65536, multiple_of=2)]


class Section(BaseModel):
    """Strict: unknown keys and wrong types are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @classmethod
    def keys(cls) -> list[str]:
        """Keys that may stand in the section."""
        return list(cls.model_fields)


class Family(Section):
    """A section of which there are several kinds, each a class of its own.

    A direct subclass is a family (:class:`noise.Noise`); its subclasses are its kinds, known by
    the default of their ``chooser`` key. A family reads ``{chooser: name, key: value, ...}`` as
    the named kind. Keys of the family's other kinds may stand there too, for an experiment
    that changes the kind leaves those of its preset behind: they are checked and dropped.
    """

    chooser: ClassVar[str] = "kind"
    default: ClassVar[str]
    kinds: ClassVar[dict[str, type[Any]]]

    @classmethod
    def __pydantic_init_subclass__(cls, **more: Any) -> None:
        super().__pydantic_init_subclass__(**more)
        if Family in cls.__bases__:
            cls.kinds = {}
        elif not cls.model_fields[cls.chooser].is_required():
            cls.kinds[cls.model_fields[cls.chooser].default] = cls

    @classmethod
    def keys(cls) -> list[str]:
        """Keys of all kinds of a family, or of one kind."""
        if Family not in cls.__bases__:
            return super().keys()
        names = [name for kind in cls.kinds.values() for name in kind.model_fields]
        return list(dict.fromkeys([cls.chooser, *names]))

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_kind(cls, values: Any, build: Any) -> Self:
        if Family not in cls.__bases__ or not isinstance(values, dict):
            return build(values)
        name = values.get(cls.chooser, cls.default)
        kind = cls.kinds.get(name) if isinstance(name, str) else None
        if kind is None:
            raise cls._no_such_kind(name)
        rest = dict(values)
        for other in cls.kinds.values():
            foreign = set(rest) & set(other.model_fields) - set(kind.model_fields)
            other.model_validate({key: rest.pop(key) for key in foreign})
        return kind.model_validate(rest)  # type: ignore[return-value]

    @classmethod
    def _no_such_kind(cls, name: Any) -> ValidationError:
        *names, last = map(repr, cls.kinds)
        expected = f"{', '.join(names)} or {last}"
        line = {"type": "literal_error", "loc": (cls.chooser,), "input": name}
        return ValidationError.from_exception_data(
            cls.__name__, [{**line, "ctx": {"expected": expected}}]  # type: ignore[typeddict-item]
        )

    def parameters(self) -> dict:
        """The kind and its keys, plain values."""
        return self.model_dump(mode="json")

    def named(self) -> dict:
        """The parameters as :meth:`problem.Problem.member_hash` takes them.

        Where a kind's keys have changed this keeps the names of the members that are there.
        """
        return self.parameters()
