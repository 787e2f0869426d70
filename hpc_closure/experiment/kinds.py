"""What an experiment chooses by name: networks, residuals and whole models, each one class.

A class that is imported is known; no table lists it again. Those of the package are imported when
an experiment is first read (:func:`provide`); one from elsewhere is named by its path,
``package.module:Class``, and imported when an experiment names it. Nothing at the top of the
package's own needs torch: experiments are read at once, and what a class builds is imported then.
"""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from hpc_closure.spectral.recipe import Section

__all__ = [
    "Kind",
    "ModelKind",
    "NetworkKind",
    "ResidualKind",
    "check_loaded",
    "find",
    "import_all",
    "is_path",
    "names",
    "own_options",
    "provide",
]

BARE = {"sensors": "none", "history": 0, "physics": False}
_sources: list[Callable[[], None]] = []


class Kind:
    """A class of which an experiment names one; a direct subclass is a family.

    Attributes:
        name: in an experiment; a class outside the package has none, its path names it.
        reads: keys of the section ``model`` that it reads.
        Options: section of the keys of its own, each with range, default and description. Of a
            class of the package they stand in ``model``, of another in ``model.options``.
        known: the kinds of a family, by name.
    """

    name: ClassVar[str] = ""
    reads: ClassVar[tuple[str, ...]] = ()
    Options: ClassVar["type[Section] | None"] = None
    known: ClassVar[dict[str, type[Any]]]
    parent: ClassVar[str]  # of a family: what to derive from

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if Kind in cls.__bases__:
            cls.known = {}
            return
        name = cls.__dict__.get("name")
        if name and cls.known.setdefault(name, cls).__module__ != cls.__module__:
            raise TypeError(f"{cls.__module__}: a class named {name!r} is there already")


class NetworkKind(Kind):
    """A network of the mean, or of the amplitude.

    Attributes:
        flow_dimensions: of the flows that it reads.
        decay: weight decay of a mean's weights, beyond that of the experiment. Every target is one
            draw about the mean, which they would learn by heart, and a coupled run amplifies
            slopes that are not there (an amplitude, which it made worse, has none).
        answers_largest: a perceptron beside it answers for the largest modes.
    """

    parent = "hpc_closure.experiment.kinds.NetworkKind"
    flow_dimensions: ClassVar[tuple[int, ...]] = (2,)
    decay: ClassVar[float] = 0.0
    answers_largest: ClassVar[bool] = False

    @classmethod
    def build(cls, channels: int, config: dict[str, Any]) -> Any:
        """Build the module: channels (B, C, g, g), numbers (B, 51) to a field (B, g, g)."""
        raise NotImplementedError


class ResidualKind(Kind):
    """How the residual q is drawn.

    Attributes:
        trained: by gradients, and so judged on unseen members.
        reads_sensors: it can be conditioned on sensors.
        learns_sensors: it can learn how sensors enter.
        one_evaluation: a sample is one evaluation, by no method.
    """

    parent = "hpc_closure.experiment.kinds.ResidualKind"
    trained: ClassVar[bool] = True
    reads_sensors: ClassVar[bool] = True
    learns_sensors: ClassVar[bool] = False
    one_evaluation: ClassVar[bool] = False

    @classmethod
    def build(cls, channels: int, config: dict[str, Any], band: Any) -> Any:
        """Build a :class:`hpc_closure.closure.composed.generators.Residual`.

        Args:
            channels: of the conditions.
            config: of the model.
            band: of the model.
        """
        raise NotImplementedError

    @classmethod
    def check(cls, config: dict[str, Any]) -> None:
        """Raise ValueError where the other parts of the model do not fit it."""


class ModelKind(Kind):
    """A whole model, not made of a mean, an amplitude and a residual.

    Attributes:
        defaults: keys of ``model`` that it reads, with their values.
        flow_dimensions: of the flows that it reads.
        tuned: its constants are chosen in coupled runs; no phase trains it.
        draws: there is chance in it.
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
        """Raise ValueError where the rest of the experiment does not fit it."""

    @classmethod
    def settings(cls, experiment: Any) -> dict[str, Any]:
        """Return settings of the model that follow from the rest of the experiment."""
        return {}


def provide(source: Callable[[], None]) -> None:
    """Import further kinds by ``source()``, when one is first looked for."""
    _sources.append(source)


def import_all(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that its kinds are known."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def _provided(family: type[Kind]) -> dict[str, type[Any]]:
    while _sources:
        _sources[0]()
        del _sources[0]
    return family.known


def names(family: type[Kind]) -> tuple[str, ...]:
    """List the kinds of a family by name."""
    return tuple(_provided(family))


def is_path(name: Any) -> bool:
    """Whether a name is the path of a class outside the package."""
    return isinstance(name, str) and ":" in name


def find(family: type[Kind], name: str, key: str) -> type[Any]:
    """Find a kind by its name, or import it by its path.

    Args:
        family: :class:`NetworkKind`, :class:`ResidualKind` or :class:`ModelKind`.
        name: its name, or ``package.module:Class``.
        key: of the experiment that names it, for an error.

    Raises:
        ValueError: one line: there is none, or it is none of the family.
    """
    if not is_path(name):
        known = _provided(family)
        if name not in known:
            raise ValueError(f"{key}={name!r}, expected one of {', '.join(known)}")
        return known[name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{key}={name}: {error}; install its package, or add its folder to PYTHONPATH"
        ) from None
    except AttributeError:
        raise ValueError(f"{key}={name}: module {module} has no {attribute}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"{key}={name}: importing {module} fails ({reason})") from None
    if not isinstance(found, type) or not issubclass(found, family):
        raise ValueError(f"{key}={name}: no subclass of {family.parent}")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__")))
        raise ValueError(f"{key}={name}: it lacks {missing}")
    return found


def check_loaded(config: dict[str, Any]) -> None:
    """Raise ValueError unless the classes outside the package that a model names are imported.

    A file may name any class; only an experiment or the caller decides that one is imported.
    """
    parts = (config.get("preset"), config.get("amplitude"), config.get("residual"))
    for name in (*parts, *(config.get("mean") or ())):
        module = str(name).partition(":")[0]
        if is_path(name) and module not in sys.modules:
            raise ValueError(
                f"its class {name} is not loaded: import {module} first, or name the class in the "
                "experiment"
            )


def own_options(kind: type[Kind], config: dict[str, Any]) -> dict[str, Any]:
    """Return a kind's own keys with their values in a resolved configuration."""
    if kind.Options is None:
        return {}
    values = {**config, **(config.get("options") or {})}
    return {key: values[key] for key in kind.Options.model_fields if key in values}
