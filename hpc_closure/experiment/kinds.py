"""Register the classes that an experiment names: networks, residuals and complete models.

A class registers itself when its module is imported; there is no other list. Classes of the
package are imported when an experiment is first read (:func:`provide`). A class outside the
package is named by its path, ``package.module:Class``, and imported when an experiment names it.
The package's modules with such classes import torch only when a class builds its module, so that
reading an experiment is fast.
"""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from hpc_closure.experiment.user_modules import load_attribute

if TYPE_CHECKING:
    from hpc_closure.spectral.recipe import Section

__all__ = [
    "Kind",
    "ModelKind",
    "NetworkKind",
    "ResidualKind",
    "channel_shape_of",
    "check_loaded",
    "equation_of",
    "fields_of",
    "find",
    "import_all",
    "is_path",
    "names",
    "own_options",
    "provide",
    "whole_fields",
]

BARE = {"sensors": "none", "previous_states": 0, "physics_estimate": False}
_sources: list[Callable[[], None]] = []


class Kind:
    """Base of the classes that an experiment names; a direct subclass defines a family.

    Attributes:
        name: name in an experiment; empty for a class outside the package, which has a path.
        reads: keys of the section ``model`` that it reads.
        several_fields: whether it can be used for a state of several fields.
        Options: section with its additional keys, each with range, default and description. They
            belong to ``model`` for a class of the package, else to ``model.options``.
        known: registered classes of a family, by name.
    """

    name: ClassVar[str] = ""
    reads: ClassVar[tuple[str, ...]] = ()
    several_fields: ClassVar[bool] = False
    Options: ClassVar["type[Section] | None"] = None
    known: ClassVar[dict[str, type[Any]]]
    #: base class to name in error messages, after "a subclass of"
    parent: ClassVar[str] = "a class of hpc_closure.experiment.kinds"

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if Kind in cls.__bases__:
            cls.known = {}
            return
        name = cls.__dict__.get("name")
        if name and cls.known.setdefault(name, cls).__module__ != cls.__module__:
            raise TypeError(f"{cls.__module__}: a class named {name!r} exists already; rename it")


def equation_of(config: dict[str, Any]) -> Any:
    """Build the equation of several fields for which a model is configured; None for one field."""
    from hpc_closure.spectral.equations import Equation

    parameters = config.get("equation")
    return None if parameters is None else Equation.model_validate(parameters)


def fields_of(config: dict[str, Any]) -> int:
    """Return the number of fields of a state for which a model is configured."""
    equation = equation_of(config)
    return 1 if equation is None else len(equation.channels)


def channel_shape_of(config: dict[str, Any]) -> tuple[int, ...]:
    """Return ``(C,)`` for a state of C > 1 fields, and ``()`` for one field."""
    equation = equation_of(config)
    return () if equation is None else equation.channel_shape


def whole_fields(config: dict[str, Any]) -> list[int]:
    """Return the index of each channel's field, where the components of a vector are one field."""
    equation = equation_of(config)
    if equation is None:
        return [0]
    first = [channel.kind not in ("vector y", "vector z") for channel in equation.channels]
    return [sum(first[: number + 1]) - 1 for number in range(len(first))]


class NetworkKind(Kind):
    """A network of the mean or of the amplitude.

    Attributes:
        flow_dimensions: dimensions of the flows for which it can be used.
        decay: weight decay of a mean network, added to that of the experiment. Every target is a
            single draw around the mean, to which the weights would overfit, and a coupled run
            amplifies spurious slopes. Amplitudes have no decay, which made them worse.
        answers_largest: whether a perceptron predicts the largest modes instead of the network.
    """

    parent = "hpc_closure.experiment.kinds.NetworkKind"
    flow_dimensions: ClassVar[tuple[int, ...]] = (2,)
    decay: ClassVar[float] = 0.0
    answers_largest: ClassVar[bool] = False

    @classmethod
    def build(cls, channels: int, config: dict[str, Any]) -> Any:
        """Build the module: channels (B, C, g, g), numbers (B, 51) to a field (B, g, g).

        For a state of several fields (:func:`fields_of`) it has one output field for each.
        """
        raise NotImplementedError


class ResidualKind(Kind):
    """A method of drawing the residual q.

    Attributes:
        trained: whether it is trained by gradients, and therefore validated on unseen members.
        reads_sensors: whether it can be conditioned on sensors.
        learns_sensors: whether it can learn how sensors enter.
        one_evaluation: whether a sample is a single evaluation without a sampling method.
        flow_dimensions: dimensions of the flows for which it can be used.
    """

    parent = "hpc_closure.experiment.kinds.ResidualKind"
    flow_dimensions: ClassVar[tuple[int, ...]] = (2,)
    trained: ClassVar[bool] = True
    reads_sensors: ClassVar[bool] = True
    learns_sensors: ClassVar[bool] = False
    one_evaluation: ClassVar[bool] = False

    @classmethod
    def build(cls, channels: int, config: dict[str, Any], band: Any) -> Any:
        """Build a :class:`hpc_closure.closure.composed.generators.Residual`.

        Args:
            channels: number of condition channels.
            config: configuration of the model.
            band: modes of the model.
        """
        raise NotImplementedError

    @classmethod
    def check(cls, config: dict[str, Any]) -> None:
        """Raise ValueError if other parts of the model are incompatible."""


class ModelKind(Kind):
    """A complete model, not composed of a mean, an amplitude and a residual.

    Attributes:
        defaults: keys of ``model`` that it reads, with their default values.
        flow_dimensions: dimensions of the flows for which it can be used.
        tuned: whether its constants are chosen in coupled runs instead of by training.
        draws: whether it is stochastic.
    """

    parent = (
        "hpc_closure.closure.model.ClosureModel or hpc_closure.closure.baselines.base.Baseline"
    )
    defaults: ClassVar[dict[str, Any]] = {}
    flow_dimensions: ClassVar[tuple[int, ...]] = (2,)
    tuned: ClassVar[bool] = False
    draws: ClassVar[bool] = True

    @classmethod
    def build(cls, config: dict[str, Any], grid: int, length: float) -> Any:
        """Build a :class:`hpc_closure.closure.model.ClosureModel`."""
        raise NotImplementedError

    @classmethod
    def check(cls, experiment: Any) -> None:
        """Raise ValueError if the experiment is incompatible with it."""

    @classmethod
    def settings(cls, experiment: Any) -> dict[str, Any]:
        """Return model settings that are derived from other sections of the experiment."""
        return {}


def provide(source: Callable[[], None]) -> None:
    """Register a function that imports further classes; it is called at the first look-up."""
    _sources.append(source)


def import_all(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, which registers its classes."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def _provided(family: type[Kind]) -> dict[str, type[Any]]:
    """Call the functions of :func:`provide`; return the classes of a family by name."""
    while _sources:
        _sources[0]()
        del _sources[0]
    return family.known


def names(family: type[Kind]) -> tuple[str, ...]:
    """List the names of a family's classes."""
    return tuple(_provided(family))


def is_path(name: Any) -> bool:
    """Return whether a name is the path of a class, ``package.module:Class``."""
    return isinstance(name, str) and ":" in name


def find(family: type[Kind], name: str, key: str) -> type[Any]:
    """Find a class by its name, or import it by its path.

    Args:
        family: :class:`NetworkKind`, :class:`ResidualKind` or :class:`ModelKind`; for a path also
            :class:`Kind`, which allows any of them.
        name: name of the class, or ``package.module:Class``.
        key: key of the experiment that names it, for the error message.

    Raises:
        ValueError: the class does not exist, cannot be imported, or is not of the family.
    """
    if not is_path(name):
        known = _provided(family)
        if name not in known:
            raise ValueError(f"{key}={name!r}, expected one of {', '.join(known)}")
        return known[name]
    module, _, attribute = name.partition(":")
    imported: type[Any] = load_attribute(
        f"{key}={name}",
        module,
        attribute,
        f"a subclass of {family.parent}",
        lambda value: isinstance(value, type) and issubclass(value, family),
    )
    if inspect.isabstract(imported):
        missing = ", ".join(sorted(getattr(imported, "__abstractmethods__")))
        raise ValueError(f"{key}={name}: define its abstract method(s) {missing}")
    return imported


def check_loaded(config: dict[str, Any]) -> None:
    """Raise ValueError unless the outside classes that a model file names are imported.

    A model file is data and may name any class; only an experiment or the caller imports one.
    """
    parts = (config.get("preset"), config.get("amplitude"), config.get("residual"))
    for name in (*parts, *(config.get("mean") or ())):
        module = str(name).partition(":")[0]
        if is_path(name) and module not in sys.modules:
            raise ValueError(
                f"its class {name} is not loaded: import {module} first, or name the class in "
                "use.classes of the experiment"
            )


def own_options(kind: type[Kind], config: dict[str, Any]) -> dict[str, Any]:
    """Return the additional keys of a class with their values in a resolved configuration."""
    if kind.Options is None:
        return {}
    values = {**config, **(config.get("options") or {})}
    return {key: values[key] for key in kind.Options.model_fields if key in values}
