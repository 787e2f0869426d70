"""Import what an experiment names outside the package: classes, scores, solvers of the user.

Every error is one line with the key and the value of the experiment, and a way out.
"""

import glob
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
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


def is_file(text: str) -> bool:
    """Whether ``file.py:Name``, ``file.py``, ``module:Name`` or ``module`` names a file."""
    return text.partition(":")[0].endswith(".py")


def beside(text: str, folder: Path) -> str:
    """Return ``file.py:Name`` with an absolute path: in ``folder``, else in the working folder.

    Text that names a module is returned as it is.
    """
    file, colon, name = text.partition(":")
    if not is_file(text):
        return text
    path = Path(file).expanduser()
    path = folder / path if (folder / path).exists() else path
    return f"{path.resolve()}{colon}{name}"


def pattern_beside(pattern: str, folder: Path) -> str:
    """Return a path or pattern of data files in ``folder`` if there are any, else as it is."""
    inside = folder.absolute() / os.path.expandvars(os.path.expanduser(pattern))
    return str(inside) if glob.glob(str(inside), recursive=True) else pattern


def source_of(setting: str, text: str) -> str:
    """Return the source text of the file or module that ``file.py:Name`` or ``module:Name`` names.

    Args:
        setting: key of the experiment, the start of the error message.
        text: file or dotted module, and perhaps a name in it.

    Raises:
        ValueError: there is no such file or module.
    """
    place = text.partition(":")[0]
    try:
        if is_file(text):
            return Path(place).expanduser().read_text(encoding="utf-8")
        found = importlib.util.find_spec(place)
        if found is not None and found.origin:
            return Path(found.origin).read_text(encoding="utf-8")
        reason = "no such module; install its package, or add its folder to PYTHONPATH"
    except ModuleNotFoundError as error:
        reason = f"{error}; install its package, or add its folder to PYTHONPATH"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a Python source"
        reason += "; a file is searched beside the experiment's, then in the working folder"
    raise ValueError(f"{setting}={text}: {reason}")


@lru_cache(maxsize=None)
def load_file(setting: str, path: str) -> ModuleType:
    """Import a Python file by its path; modules beside it can be imported by it.

    Args:
        setting: ``key=value`` of the experiment, the start of the error message.
        path: the file.

    Raises:
        ValueError: there is no such file, or its import fails.
    """
    place = Path(path).expanduser().resolve()
    name = f"{place.stem}_{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if not place.is_file():
        raise ValueError(f"{setting}: there is no file {place}")
    if str(place.parent) not in sys.path:
        sys.path.append(str(place.parent))
    spec = importlib.util.spec_from_file_location(name, place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything
        del sys.modules[name]
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"{setting}: {place} cannot be imported ({reason})") from None
    return module


def load_python(key: str, text: str, expected: str, fits: Callable[[Any], bool]) -> Any:
    """Return what ``file.py:Name``, ``file.py``, ``module:Name`` or ``module`` names.

    Args:
        key: key of the experiment.
        text: its value.
        expected: what it must be, in words.
        fits: returns whether a value is that.

    Raises:
        ValueError: there is no such file, module or name, or it does not fit.
    """
    place, _, name = text.partition(":")
    setting = f"{key}={text}"
    module = load_file(setting, place) if is_file(text) else load_module(setting, place)
    value = module
    for part in filter(None, name.split(".")):
        if not hasattr(value, part):
            raise ValueError(f"{setting}: {place} has no {name}; expected {expected}")
        value = getattr(value, part)
    if fits(value):
        return value
    raise ValueError(f"{setting}: {name or place} is not {expected}")
