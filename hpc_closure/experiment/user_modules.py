"""Import what an experiment names outside the package: classes and scores of the user's modules.

Every error is one line with the key and the value of the experiment, and a way out.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any


def load_module(setting: str, module: str) -> ModuleType:
    """Import a user's module by its dotted name.

    Args:
        setting: ``key=value`` of the experiment, the start of the error message.
        module: dotted name of the module.

    Raises:
        ValueError: the module does not exist, or its import fails.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # a user's module may raise anything
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(
            f"{setting}: {module} cannot be imported ({reason}); install its package, or add its "
            "folder to PYTHONPATH"
        ) from None


def load_attribute(
    setting: str, module: str, attribute: str, expected: str, fits: Callable[[Any], bool]
) -> Any:
    """Import a user's module and return one of its attributes.

    Args:
        setting: ``key=value`` of the experiment, the start of the error message.
        module: dotted name of the module.
        attribute: name in the module.
        expected: what the attribute must be, in words.
        fits: returns whether a value is that.

    Raises:
        ValueError: the module cannot be imported, lacks the attribute, or it does not fit.
    """
    imported = load_module(setting, module)
    if not hasattr(imported, attribute):
        raise ValueError(f"{setting}: {module} has no {attribute}; expected {expected}")
    value = getattr(imported, attribute)
    if not fits(value):
        raise ValueError(f"{setting}: {attribute} of {module} is not {expected}")
    return value
